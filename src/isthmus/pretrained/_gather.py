"""What moves in the files: the index of every moved axis of every stored tensor, and reading in that order."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from isthmus.errors import ShapeError, SymmetryError
from isthmus.pretrained._lazy import LazyState
from isthmus.pretrained._open import OpenedModel
from isthmus.symmetry import Slot, SymmetrySpec
from isthmus.symmetry._apply import check_permutations, permute_tensor

__all__ = ["BLOCK_BYTES", "STILL", "Gather", "blocks", "gather_of", "gathers", "gathers_by_key"]

BLOCK_BYTES = 64 * 2**20
"""Bytes of a tensor that are worked on at a time."""


@dataclass(frozen=True, eq=False)
class Gather:
    """How one tensor is put in order.

    Attributes:
        axes: by axis, the index that orders it; axes that stay are left out.
        parts: ``(group, slot)`` pairs that move a part of the tensor only (one expert's units), after the axes.
        permutations: of these groups.
    """

    axes: Mapping[int, Tensor]
    parts: tuple[tuple[str, Slot], ...] = ()
    permutations: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor])

    def __bool__(self) -> bool:
        """Whether anything moves."""
        return bool(self.axes or self.parts)

    def apply(self, tensor: Tensor) -> Tensor:
        """Return the tensor in order; the same tensor where nothing moves."""
        for axis, index in self.axes.items():
            tensor = tensor.index_select(axis, index)
        return permute_tensor(tensor, {0: self.parts}, self.permutations) if self.parts else tensor

    def same(self, other: Gather) -> bool:
        """Whether two tensors are ordered alike."""
        return (
            self.axes.keys() == other.axes.keys()
            and all(torch.equal(index, other.axes[axis]) for axis, index in self.axes.items())
            and [(g, s.axis, s.index, s.block) for g, s in self.parts]
            == [(g, s.axis, s.index, s.block) for g, s in other.parts]
        )


STILL = Gather({})
"""Nothing moves."""


def gathers(spec: SymmetrySpec, permutations: Mapping[str, Tensor]) -> dict[str, Gather]:
    """Return how every tensor that permutations move is put in order.

    Raises:
        SymmetryError: a permutation names an unknown group.
        ShapeError: a permutation has the wrong shape.
    """
    checked = check_permutations(spec, permutations)
    found = {n: gather_of(slots, spec.shapes[n], checked) for n, slots in spec.slots_by_tensor().items()}
    return {name: gather for name, gather in found.items() if gather}


def gather_of(
    by_axis: Mapping[int, Sequence[tuple[str, Slot]]],
    shape: Sequence[int],
    permutations: Mapping[str, Tensor],
) -> Gather:
    """Return how one tensor is put in order.

    Args:
        by_axis: per axis, the ``(group, slot)`` pairs that act there.
        shape: of the tensor.
        permutations: checked permutations by group; a group that is not listed does not move.
    """
    axes: dict[int, Tensor] = {}
    parts: list[tuple[str, Slot]] = []
    own = {g: permutations[g] for slots in by_axis.values() for g, _ in slots if g in permutations}
    moving = {g: p for g, p in own.items() if not torch.equal(p, torch.arange(len(p)))}
    for axis, slots in by_axis.items():
        still = torch.arange(shape[axis])
        index = permute_tensor(still, {0: [(g, s) for g, s in slots if not s.block]}, moving)
        if not torch.equal(index, still):
            axes[axis] = index
        parts += [(g, s) for g, s in slots if s.block and g in moving]
    return Gather(axes, tuple(parts), {g: moving[g] for g, _ in parts})


def gathers_by_key(
    spec: SymmetrySpec, permutations: Mapping[str, Tensor], opened: OpenedModel
) -> dict[str, Gather]:
    """Return how the stored tensors are put in order, by their names in the files.

    Raises:
        SymmetryError: the spec is of another network, or moves tied tensors differently.
        ShapeError: a tensor's shape differs from the spec's.
    """
    moves = gathers(spec, permutations)
    for name in moves:
        if name not in opened.state:
            raise SymmetryError(
                f"{opened.path}: has no tensor {name!r}, which the alignment moves. Was it made for this network?"
            )
        shape = opened.state.stored(name).shape
        if shape != spec.shapes[name]:
            raise ShapeError(
                f"{opened.path}: {name!r} has shape {shape}, the alignment expects {spec.shapes[name]}. Was it made "
                "for this network?"
            )
    found: dict[str, Gather] = {}
    for key, names in opened.names.items():
        wanted = [moves.get(name, STILL) for name in names]
        if any(not wanted[0].same(other) for other in wanted[1:]):
            raise SymmetryError(
                f"{opened.path}: {', '.join(map(repr, names))} are one tensor, but the alignment moves them "
                "differently. Make the alignment from this model folder."
            )
        if wanted and wanted[0]:
            found[key] = wanted[0]
    return found


def blocks(state: LazyState, key: str, gather: Gather, limit: int = BLOCK_BYTES) -> Iterator[Tensor]:
    """Yield a tensor, put in order, in blocks of rows of about ``limit`` bytes.

    Only a tensor whose axis 0 or whose parts move is ever read whole; of any other no more than a block is in
    memory.
    """
    stored = state.stored(key)
    if not stored.shape:
        yield state[key]
        return
    length = stored.shape[0]
    step = max(1, limit * length // max(stored.nbytes, 1))
    within = Gather({axis: index for axis, index in gather.axes.items() if axis})
    rows = gather.axes.get(0)
    whole = None if rows is None else state[key]
    if gather.parts:
        whole, rows, within = gather.apply(state[key]), None, STILL
    for start in range(0, length, step):
        stop = min(start + step, length)
        if whole is None:
            block = state.rows(key, start, stop)
        else:
            block = whole[start:stop] if rows is None else whole.index_select(0, rows[start:stop])
        yield within.apply(block)
