"""Which tensors of a module lie in the same memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from isthmus.replica import storage_key

__all__ = ["aliases_of", "overlaps", "saved_tensors", "view_key"]


def saved_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the parameters and saved buffers under all names that ``state_dict`` gives."""
    names = set(model.state_dict().keys())
    named = (
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    )
    yield from ((name, tensor) for name, tensor in named if name in names)


def view_key(tensor: Tensor) -> tuple[Any, ...] | None:
    """Return what two tensors have in common exactly if they are one view of one memory."""
    key = storage_key(tensor)
    if key is None:
        return None
    return (key, tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype)


def aliases_of(state: Mapping[str, Tensor]) -> dict[str, tuple[str, ...]]:
    """Return, for each name, all names of the same view of the same memory, in order."""
    groups: dict[Any, list[str]] = {}
    for name, tensor in state.items():
        groups.setdefault(view_key(tensor) or id(tensor), []).append(name)
    return {name: tuple(names) for names in groups.values() for name in names}


def overlaps(state: Mapping[str, Tensor], constants: Mapping[str, Tensor]) -> dict[str, str]:
    """Return, for each state tensor whose memory another view reaches, the name of one such."""
    everything = {**{f"constant {n!r}": t for n, t in constants.items()}, **state}
    groups: dict[int, list[str]] = {}
    for name, tensor in everything.items():
        key = storage_key(tensor)
        if key is not None:
            groups.setdefault(key, []).append(name)
    found: dict[str, str] = {}
    for names in groups.values():
        for name in (n for n in names if n in state):
            own = everything[name]
            touching = (o for o in names if view_key(everything[o]) != view_key(own))
            other = next((o for o in touching if _touch(everything[o], own)), None)
            if other is not None:
                found[name] = other
    return found


def _touch(one: Tensor, other: Tensor) -> bool:
    """Tell whether the stretches of memory that two views span overlap."""
    (low, high), (start, end) = (_stretch(t) for t in (one, other))
    return low < end and start < high


def _stretch(tensor: Tensor) -> tuple[int, int]:
    width, start = tensor.element_size(), tensor.storage_offset()
    length = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True)) + 1
    return int(start * width), int(start + (length if tensor.numel() else 0)) * width
