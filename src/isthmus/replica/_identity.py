"""Networks that know their parts by identity, which a copy of them cannot have."""

from __future__ import annotations

import contextlib
import types
import weakref
from collections import deque
from collections.abc import Iterable, Iterator
from itertools import chain
from typing import Any

from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary, WeakIdRef

from isthmus.errors import ModelError, printable
from isthmus.replica._walk import ATOMS, REGISTERS, children, registered

__all__ = ["refuse_identities"]

_Parts = dict[int, tuple[str, Any]]
_BY_KEY = (weakref.WeakKeyDictionary, WeakIdKeyDictionary)
_CONTAINERS = (dict, set, frozenset, list, tuple, weakref.WeakSet, weakref.WeakValueDictionary, *_BY_KEY)


def refuse_identities(model: nn.Module, tensors: Iterable[Tensor]) -> None:
    """Refuse a network that holds the identity of something which its copy will have anew.

    Looked for are numbers that equal the ``id()`` or the ``data_ptr()`` of a part, among keys of dictionaries and in
    sets, lists and tuples, and weak containers of parts, which are copied with the parts of the original in them. (A
    single number in an attribute is left alone: ``torch.compile`` notes one.) Looked at is what
    :func:`isthmus.replica.hidden_tensors` follows, and what classes of the network and global variables that their
    methods name hold.

    Args:
        model: the network.
        tensors: those that the copy does not share.

    Raises:
        ModelError: naming where it is held, and which part it is.
    """
    parts = _parts(model, list(tensors))
    numbers = {str(n): name for name, part in parts.values() for n in _identities(part)}
    for path, value in chain(_below(model, parts), _shared(model)):
        words = _held(value, numbers, parts)
        if words:
            raise ModelError(
                f"{type(model).__name__} knows its parts by identity: {printable(path)!r} {words}. States are run in a "
                "private copy, whose parts are others, so it would compute something else there. Let it go by names, "
                "or keep the tensor or module itself as an attribute."
            )


def _parts(model: nn.Module, tensors: list[Tensor]) -> _Parts:
    """Return the modules and tensors that are copied, with their names, by identity."""
    names = {id(t): name for name, t, _ in registered(model)}
    found: _Parts = {id(t): (names.get(id(t), "a tensor"), t) for t in tensors}
    found.update({id(m): (name or "the network", m) for name, m in model.named_modules()})
    return found


def _identities(part: Any) -> Iterator[int]:
    yield id(part)
    if not isinstance(part, Tensor):
        return
    with contextlib.suppress(NotImplementedError, RuntimeError):  # a tensor without one storage
        yield from (p for p in (part.data_ptr(), part.untyped_storage().data_ptr()) if p)


def _below(model: nn.Module, parts: _Parts) -> Iterator[tuple[str, Any]]:
    """Yield all that modules and their tensors hold, at any depth."""
    waiting = deque[tuple[str, Any]]()
    for name, part in parts.values():
        if isinstance(part, Tensor):
            waiting.extend((f"{name}.{k}", v) for k, v in vars(part).items())
    for prefix, module in model.named_modules():
        start = f"{prefix}." if prefix else ""
        waiting.extend((f"{start}{k}", v) for k, v in vars(module).items() if k not in REGISTERS)
    seen: dict[int, Any] = {key: part for key, (_, part) in parts.items()}
    while waiting:
        path, value = waiting.popleft()
        yield path, value
        if not isinstance(value, ATOMS) and id(value) not in seen:
            seen[id(value)] = value
            waiting.extend((f"{path}{step}", child) for step, child in children(value))


def _shared(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield the containers that classes of the network, and global variables named by their methods, hold."""
    kinds = dict.fromkeys(c for m in model.modules() for c in type(m).__mro__)
    for kind in kinds:
        if kind is object or kind.__module__.partition(".")[0] == "torch":
            continue
        for name, value in vars(kind).items():
            held = {f"{kind.__name__}.{name}": value}
            if isinstance(value, types.FunctionType):
                known = value.__globals__
                held = {n: known[n] for n in value.__code__.co_names if n in known}
            for path, container in held.items():
                if isinstance(container, _CONTAINERS):
                    yield path, container
                    yield from ((path, child) for _, child in children(container))


def _held(value: Any, numbers: dict[str, str], parts: _Parts) -> str:
    """Return words on the identities that a value holds directly, or nothing."""
    if isinstance(value, _BY_KEY):
        weak = [v() if isinstance(v, WeakIdRef) else v for v in value]
    elif isinstance(value, weakref.WeakValueDictionary):
        weak = list(value.values())
    else:
        weak = list(value) if isinstance(value, weakref.WeakSet) else []
    known = next((parts[id(v)][0] for v in weak if id(v) in parts), None)
    if known is not None:
        return f"is a {type(value).__name__} that holds {known!r}"
    keys = list(value) if isinstance(value, (dict, set, frozenset, list, tuple)) else []
    given = [k for key in keys for k in (key if isinstance(key, tuple) else (key,))]
    number = next((str(n) for n in given if isinstance(n, (int, str)) and str(n) in numbers), None)
    return "" if number is None else f"holds the id() or data_ptr() of {numbers[number]!r}"
