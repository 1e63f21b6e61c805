"""Check plain JSON-like values against type annotations, so that a ``TypedDict`` is the only schema."""

from __future__ import annotations

import math
import types
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, NotRequired, Union, get_args, get_origin, get_type_hints, is_typeddict

from isthmus.errors import CheckpointError

__all__ = ["Between", "Fraction", "NonNegative", "check", "fail"]


@dataclass(frozen=True)
class Between:
    """A closed range for a number, used inside ``Annotated``."""

    low: float
    high: float = math.inf


Fraction = Annotated[float, Between(0.0, 1.0)]
NonNegative = Annotated[float, Between(0.0)]


def fail(path: str, expected: str, found: object) -> CheckpointError:
    """Build the error for one entry of a record: what was expected at ``path`` and what is there."""
    text = repr(found)
    text = text if len(text) <= 60 else text[:57] + "..."
    return CheckpointError(
        f"reading a result record: expected {expected} at {path or 'the top level'}, found {text}. "
        "Write the record with the same version of Isthmus that reads it."
    )


def check(value: Any, kind: Any, path: str = "") -> Any:
    """Return a copy of ``value`` that fits the annotation ``kind``.

    Knows ``str``, ``int``, ``float`` (finite; an int will do), ``Annotated`` with :class:`Between`,
    ``T | None`` (a NaN becomes ``None``), ``list``, ``dict[str, T]``, ``TypedDict`` and ``Any``.
    Unknown keys of a ``TypedDict`` are kept as they are: newer records stay readable.

    Raises:
        CheckpointError: the value does not fit; the message names the path of the entry.
    """
    origin = get_origin(kind)
    if kind is Any:
        return value
    if is_typeddict(kind):
        return _check_typed_dict(value, kind, path)
    if origin in (Union, types.UnionType):
        return _check_optional(value, kind, path)
    if origin is Annotated:
        return _check_range(check(value, get_args(kind)[0], path), get_args(kind)[1], path)
    if origin is list:
        if not isinstance(value, list | tuple):
            raise fail(path, "a list", value)
        return [check(item, get_args(kind)[0], f"{path}[{i}]") for i, item in enumerate(value)]
    if origin is dict:
        return {k: check(v, get_args(kind)[1], _join(path, k)) for k, v in _mapping(value, path).items()}
    return _check_scalar(value, kind, path)


def _check_typed_dict(value: Any, kind: Any, path: str) -> dict[str, Any]:
    """Check every declared key; a missing one is an error unless it is ``NotRequired``."""
    found = dict(_mapping(value, path))
    for key, hint in get_type_hints(kind, include_extras=True).items():
        optional = get_origin(hint) is NotRequired
        if key in found:
            found[key] = check(found[key], get_args(hint)[0] if optional else hint, _join(path, key))
        elif not optional:
            raise fail(path, f"the key {key!r}", f"keys {sorted(found)}")
    return found


def _check_optional(value: Any, kind: Any, path: str) -> Any:
    """Check ``T | None``; a NaN means the same as ``None``, because JSON has no NaN."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    (inner,) = (arm for arm in get_args(kind) if arm is not type(None))
    return check(value, inner, path)


def _check_range(value: float, allowed: Between, path: str) -> float:
    if not allowed.low <= value <= allowed.high:
        bound = f"between {allowed.low:g} and {allowed.high:g}"
        raise fail(path, f"a number {bound if math.isfinite(allowed.high) else f'>= {allowed.low:g}'}", value)
    return value


def _check_scalar(value: Any, kind: Any, path: str) -> Any:
    if kind is float:
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise fail(path, "a finite number", value)
        return float(value)
    if not isinstance(value, kind) or isinstance(value, bool):
        raise fail(path, {int: "an integer", str: "a text"}[kind], value)
    return value


def _mapping(value: Any, path: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise fail(path, "a mapping with text keys", value)
    return value


def _join(path: str, key: str) -> str:
    return f"{path}.{key}" if path else key
