"""Words and numbers: how methods are called and how values are printed, on the page and in the figures."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from isthmus.matching import METHODS
from isthmus.report._record import Record

__all__ = [
    "NATS",
    "amount",
    "best_method",
    "label",
    "moved_share",
    "number",
    "percent",
    "shorten",
    "unit_of",
    "with_error",
]

NATS = "nats per example"
"""Unit of a cross-entropy, and of records that name no unit."""

_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
_DASH = "–"


def label(method: str) -> str:
    """Return the name of a method in words, with what it matches by; an unknown method keeps its own name."""
    plain, _, symmetry = method.partition(", ")
    if symmetry:
        return f"{label(plain)} ({symmetry})"
    if method in METHODS:
        return METHODS[method].label
    return "no relabelling" if method == "none" else method


def unit_of(record: Mapping[str, Any]) -> str:
    """Return the unit of a record's losses and barriers."""
    return record.get("unit", NATS)


def number(value: float | None, decimals: int = 3) -> str:
    """Print a number with fixed decimals, as ``1.2×10⁻⁷`` where those show nothing, a dash for ``None``."""
    if value is None:
        return _DASH
    if value == 0:
        return "0"
    if 10.0**-decimals <= abs(value) < 1e6:
        return f"{value:,.{decimals}f}".replace("-", "−")
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{mantissa}×10{str(int(exponent)).translate(_SUPERSCRIPTS)}".replace("-", "−")


def amount(value: float | None, unit: str) -> str:
    """Print a loss or a barrier with its unit: ``1.131 nats per example``, ``0.2 (squared error)``."""
    return f"{number(value)} {unit if unit == NATS else f'({unit})'}"


def with_error(value: float, error: float | None, decimals: int = 3) -> str:
    """Print a value with its standard error, where there is one."""
    return number(value, decimals) + ("" if error is None else f" ± {number(error, decimals)}")


def percent(fraction: float | None, decimals: int = 2) -> str:
    """Print a fraction as a percentage; a dash for ``None``."""
    return _DASH if fraction is None else f"{100 * fraction:.{decimals}f}\N{NO-BREAK SPACE}%"


def shorten(name: str, length: int = 26) -> str:
    """Cut a long parameter path at the front, where paths are alike."""
    return name if len(name) <= length else "…" + name[-(length - 1) :]


def best_method(record: Record) -> str | None:
    """Return the relabelling with the lowest barrier on the headline split, ``None`` if none was tried."""
    tried = [name for name in record["methods"] if name != "none"]
    return min(tried, key=lambda name: record["methods"][name]["barrier"], default=None)


def moved_share(record: Record, moved: Mapping[str, float]) -> float | None:
    """Return the share of all units of the moving groups that changed place, ``None`` if nothing is known."""
    sizes = {g["name"]: g["size"] for g in record["symmetry"]["groups"] if g["name"] in moved}
    total = sum(sizes.values())
    return sum(moved[name] * size for name, size in sizes.items()) / total if total else None
