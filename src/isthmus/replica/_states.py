"""The saved tensors of a module: under which names, which share memory, whether they are those of a state."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping

from torch import Tensor, nn

from isthmus.errors import CheckpointError
from isthmus.replica._contents import same_values
from isthmus.replica._walk import storage_key

__all__ = ["Stamp", "refuse_torn", "saved", "saved_once", "sharing", "version"]

_changes = itertools.count(-1, -1)


def saved(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield parameters and saved buffers under all their names."""
    for prefix, module in model.named_modules(remove_duplicate=False):
        start = f"{prefix}." if prefix else ""
        for leaf, tensor in module._parameters.items():
            if tensor is not None:
                yield start + leaf, tensor
        for leaf, tensor in module._buffers.items():
            if tensor is not None and leaf not in module._non_persistent_buffers_set:
                yield start + leaf, tensor


def saved_once(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the saved tensors under their first name."""
    done: set[int] = set()
    for name, tensor in saved(model):
        if id(tensor) not in done:
            done.add(id(tensor))
            yield name, tensor


def sharing(own: Mapping[str, Tensor]) -> list[list[str]]:
    """Return the names of saved tensors that share memory, in groups."""
    groups: dict[int, list[str]] = {}
    for name, tensor in own.items():
        key = storage_key(tensor)
        if key is not None:
            groups.setdefault(key, []).append(name)
    return [names for names in groups.values() if len(names) > 1]


def refuse_torn(own: Mapping[str, Tensor], state: Mapping[str, Tensor], groups: list[list[str]]) -> None:
    """Refuse a state whose tensors differ where those of a module, which holds it, share memory.

    Raises:
        CheckpointError: naming two of them.
    """
    for names in groups:
        torn = [
            n for n in names if n in state and not same_values(own[n].detach(), state[n].detach().to(own[n]))
        ]
        if not torn:
            continue
        other = next(n for n in names if n != torn[0])
        one = own[other] is own[torn[0]]
        pair = " and ".join(repr(n) for n in names if n in (other, torn[0]))
        raise CheckpointError(
            f"{pair} {'are one tensor' if one else 'share memory'} in the model but differ in the state. "
            "Give both the same values, or untie them in the model."
        )


class Stamp:
    """Tells whether a state is the one that was put in, and unchanged since."""

    def __init__(self, state: Mapping[str, Tensor]) -> None:
        self._tensors = list(state.values())  # held, so that no other tensor gets the identity of one of them
        self._versions = [version(t) for t in self._tensors]

    def is_of(self, state: Mapping[str, Tensor]) -> bool:
        if len(state) != len(self._tensors):
            return False
        pairs = zip(state.values(), self._tensors, strict=True)
        return all(a is b for a, b in pairs) and self._versions == [version(t) for t in self._tensors]


def version(tensor: Tensor) -> int:
    """Return how often a tensor was written; tensors that do not count are taken to change all the time."""
    try:
        return tensor._version
    except RuntimeError:
        return next(_changes)
