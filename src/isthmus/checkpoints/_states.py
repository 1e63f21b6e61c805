"""Finding the state inside what a trainer saved, and making plain tensors of its entries."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from isthmus.errors import CheckpointError, printable
from isthmus.states import State, with_versions_of

__all__ = ["StatesByKey", "inside", "plain_state", "states_in"]

StatesByKey = dict[str, Mapping[Any, Any]]
"""From the key under which a state lies (parts joined by points; empty for the file itself) to that state."""

_DEEPEST = 5
"""Dictionaries inside dictionaries that are looked into."""
_OPTIMISER = frozenset({"state", "param_groups"})
"""The keys of an optimiser's state, whose moments are no network."""
_LARGEST_SIZE = 2**40
_LAYOUTS = {
    torch.sparse_coo: "sparse",
    torch.sparse_csr: "sparse",
    torch.sparse_csc: "sparse",
    torch.sparse_bsr: "sparse",
    torch.sparse_bsc: "sparse",
}


def states_in(content: Any) -> StatesByKey:
    """Return all states inside what a file holds, by key.

    A state is a dictionary of tensors or NumPy arrays, not all of them single numbers (those are metrics); the moments
    of an optimiser are none. A file that is such a dictionary itself holds nothing else.
    """
    if not isinstance(content, Mapping):
        return {}
    if content and all(_is_entry(v) for v in content.values()):
        return {"": content}
    found: StatesByKey = {}
    _look(content, "", found, {id(content)}, 0)
    return found


def _look(content: Mapping[Any, Any], above: str, found: StatesByKey, seen: set[int], depth: int) -> None:
    if depth == _DEEPEST or content.keys() >= _OPTIMISER:
        return
    for key, value in content.items():
        # A dictionary may hold itself, and may lie under many keys.
        if not isinstance(key, str) or not isinstance(value, Mapping) or id(value) in seen:
            continue
        seen.add(id(value))
        name = f"{above}.{key}" if above else key
        if _is_state(value):
            found[name] = value
        else:
            _look(value, name, found, seen, depth + 1)


def _is_entry(value: object) -> bool:
    return isinstance(value, Tensor | np.ndarray | np.generic)


def _is_state(value: Mapping[Any, Any]) -> bool:
    entries = list(value.values())
    return (
        bool(entries)
        and all(isinstance(k, str) for k in value)
        and all(_is_entry(v) for v in entries)
        and any(isinstance(v, Tensor | np.ndarray) and v.ndim for v in entries)
    )


def inside(content: Any, key: str) -> Any:
    """Return what lies under a key, whose parts may be joined by points; None where there is nothing."""
    if not isinstance(content, Mapping):
        return None
    if key in content:
        return content[key]
    first, point, rest = key.partition(".")
    while point:
        if first in content and (found := inside(content[first], rest)) is not None:
            return found
        more, point, rest = rest.partition(".")
        first = f"{first}.{more}"
    return None


def plain_state(entries: Mapping[Any, Any], where: str) -> State:
    """Return entries as ordinary tensors, detached.

    NumPy arrays and numbers become tensors of their dtype.

    Raises:
        CheckpointError: an entry is something else, or a tensor that is no full array of numbers.
    """
    tensors: State = {}
    for key, value in entries.items():
        name = str(key)
        if name in tensors:
            raise CheckpointError(
                f"{where}: two entries are called {printable(name)!r}, once as a text and once not. Save under texts."
            )
        tensors[name] = _plain(value, name, where)
    return with_versions_of(entries, tensors)


def _plain(value: object, name: str, where: str) -> Tensor:
    shown = printable(name)
    if isinstance(value, np.ndarray | np.generic):
        try:
            return torch.from_numpy(np.array(value))
        except TypeError as error:
            raise CheckpointError(
                f"{where}: {shown!r} is a NumPy array of {printable(value.dtype)}, which no tensor can hold. Save "
                "numbers."
            ) from error
    if not isinstance(value, Tensor):
        raise CheckpointError(
            f"{where}: expected a tensor under {shown!r}, found {type(value).__name__}. "
            "Pass a state dict of tensors only."
        )
    tensor = value.detach()
    if tensor.is_meta:
        raise CheckpointError(
            f"{where}: {shown!r} is on the meta device: it has a shape and no values. Save the state after the weights "
            "are loaded."
        )
    if tensor.is_nested:
        raise CheckpointError(
            f"{where}: {shown!r} is a nested tensor, which has no single array of numbers. Save "
            "tensor.to_padded_tensor(0), or its parts."
        )
    if tensor.layout in _LAYOUTS or tensor.layout is not torch.strided:
        kind = _LAYOUTS.get(tensor.layout, str(tensor.layout))
        raise CheckpointError(
            f"{where}: {shown!r} is a {kind} tensor, whose units cannot be moved. Save tensor.to_dense()."
        )
    if tensor.is_quantized:
        raise CheckpointError(
            f"{where}: {shown!r} is a quantised tensor, whose packed units cannot be permuted. Save the network that "
            "it was quantised from, or tensor.dequantize()."
        )
    return tensor.resolve_conj().resolve_neg()
