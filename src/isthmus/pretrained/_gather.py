"""What moves in the files: how every stored tensor is put in order or carried, and reading it so, block by block."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from isthmus.couplings import Coupling, Permutation, is_orthogonal
from isthmus.errors import CheckpointError, ShapeError, SymmetryError, printable
from isthmus.pretrained._lazy import LazyState
from isthmus.pretrained._open import OpenedModel
from isthmus.symmetry import (
    Couplings,
    Reordering,
    Slot,
    Slots,
    SymmetrySpec,
    as_couplings,
    carry_tensor,
    reordering,
)

__all__ = ["BLOCK_BYTES", "LARGE", "STILL", "Carrying", "Move", "blocks", "moves", "moves_by_key"]


BLOCK_BYTES = 64 * 2**20
"""Bytes of a tensor that are worked on at a time."""
LARGE = 2**27
"""Entries of a tensor above which it is computed with in float32: 1 GiB in float64."""


STILL = Reordering()
"""Nothing moves."""


@dataclass(frozen=True, eq=False)
class Carrying:
    """How couplings that do more than permute (signs, factors, rotations, maps) carry one tensor.

    Attributes:
        slots: by axis, the ``(group, slot)`` pairs that act on the tensor, outer groups first.
        at: couplings by group, checked; groups without one do not move.
    """

    slots: Slots
    at: Couplings

    def __bool__(self) -> bool:
        """Whether anything moves."""
        return bool(self._listed())

    def _listed(self) -> list[tuple[str, Slot]]:
        return [(group, slot) for slots in self.slots.values() for group, slot in slots if group in self.at]

    @property
    def by_rows(self) -> bool:
        """Whether blocks of rows (axis 0) can be carried one by one: no slot acts on them, or on some of them only."""
        return all(slot.axis and all(axis for axis, _ in slot.block) for _, slot in self._listed())

    def apply(self, tensor: Tensor) -> Tensor:
        """Return the tensor carried, in its own dtype."""
        return self.wide(tensor).to(tensor.dtype)

    def wide(self, tensor: Tensor) -> Tensor:
        """Return the tensor carried and not rounded: float64, float32 for large ones.

        A tensor that several groups act on is thus rounded once, when it is written, whatever its dtype.
        """
        if not tensor.is_floating_point():
            return carry_tensor(tensor, self.slots, self.at)
        dtype = torch.float64 if tensor.numel() <= LARGE else torch.float32
        return carry_tensor(tensor.to(torch.promote_types(tensor.dtype, dtype)), self.slots, self.at)

    def same(self, other: Carrying) -> bool:
        """Whether two tensors are carried alike: a rotation carries what holds units and what reads them alike."""
        ours, theirs = self._listed(), other._listed()
        return len(ours) == len(theirs) and all(
            group == name and _alike(one, two, self.at[group])
            for (group, one), (name, two) in zip(ours, theirs, strict=True)
        )


Move = Reordering | Carrying
"""What is done to a stored tensor: permutations put it in order, bit by bit; other couplings compute."""


def _alike(one: Slot, two: Slot, coupling: Coupling | Tensor) -> bool:
    """Return whether a coupling does the same at two slots of tensors that are one."""
    if (one.axis, one.index, one.block) != (two.axis, two.index, two.block):
        return False
    if (one.role, one.power) == (two.role, two.power) or isinstance(coupling, Permutation | Tensor):
        return True
    # Signs are orthogonal, and yet leave alone what only reorders (power 0).
    known = one.power is not None and two.power is not None and abs(one.power) == abs(two.power)
    return known and is_orthogonal(coupling)


def _same(one: Move, two: Move) -> bool:
    """Return whether two tensors are moved alike."""
    if isinstance(one, Carrying) and isinstance(two, Carrying):
        return one.same(two)
    return isinstance(one, Reordering) and isinstance(two, Reordering) and one.same(two)


def moves(spec: SymmetrySpec, permutations: Couplings) -> dict[str, Move]:
    """Return what couplings do to every tensor that they move.

    Raises:
        SymmetryError: a coupling names an unknown group.
        ShapeError: a coupling has the wrong shape.
    """
    checked = as_couplings(spec, permutations)
    found: dict[str, Move] = {}
    for name, slots in spec.slots_by_tensor().items():
        acting = [checked[g] for listed in slots.values() for g, _ in listed if g in checked]
        plain = all(isinstance(coupling, Permutation) for coupling in acting)
        found[name] = reordering(slots, checked) if plain else Carrying(slots, checked)
    return {name: move for name, move in found.items() if move}


def moves_by_key(spec: SymmetrySpec, permutations: Couplings, opened: OpenedModel) -> dict[str, Move]:
    """Return what couplings do to the stored tensors, by their names in the files.

    Raises:
        SymmetryError: the spec is of another network, moves tied tensors differently, or knows tensors to be ones or
            zeros that are not.
        ShapeError: a tensor's shape differs from the spec's.
    """
    found_by_name = moves(spec, permutations)
    for name in found_by_name:
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
    if any(isinstance(move, Carrying) for move in found_by_name.values()):
        _require_constants(spec, opened)
    found: dict[str, Move] = {}
    for key, names in opened.names.items():
        wanted = [found_by_name.get(name, STILL) for name in names]
        if any(not _same(wanted[0], other) for other in wanted[1:]):
            raise SymmetryError(
                f"{opened.path}: {', '.join(map(repr, names))} are one tensor, but the alignment moves them "
                "differently. Make the alignment from this model folder."
            )
        if wanted and wanted[0]:
            found[key] = wanted[0]
    return found


def _require_constants(spec: SymmetrySpec, opened: OpenedModel) -> None:
    """Check that what the spec takes to be ones and zeros is: a rotation found with that changes other networks."""
    for names, value, what in ((spec.ones, 1, "one"), (spec.zeros, 0, "zero")):
        for name in names:
            if name in opened.state and not bool((opened.state[name] == value).all()):
                raise SymmetryError(
                    f"{printable(opened.path)}: the alignment takes all entries of {printable(name)!r} to be {what}, "
                    "and some are not. Fold this model folder (isthmus fold), and align what is written then."
                )


def blocks(
    state: LazyState, key: str, move: Move, limit: int = BLOCK_BYTES, *, wide: bool = False
) -> Iterator[Tensor]:
    """Yield a tensor, moved, in blocks of rows of about ``limit`` bytes as it is stored.

    Only a tensor whose axis 0 or whose parts move is ever read whole; of any other no more than a block is in
    memory.

    Args:
        state: the stored tensors.
        key: which one.
        move: what is done to it.
        limit: bytes.
        wide: whether what couplings compute is yielded as it is computed, to be rounded by whoever goes on with it.

    Raises:
        CheckpointError: what couplings compute is not finite, or too large for the stored dtype.
    """
    stored = state.stored(key)
    if not stored.shape:
        yield state[key]
        return
    length = stored.shape[0]
    step = max(1, limit * length // max(stored.nbytes, 1))
    if isinstance(move, Carrying):
        yield from _carried(state, key, move, step, wide)
        return
    within = Reordering(move.without(0).axes)
    rows = move.axes.get(0)
    whole = None if rows is None else state[key]
    if move.parts:
        whole, rows, within = move.apply(state[key]), None, STILL
    for start in range(0, length, step):
        stop = min(start + step, length)
        if whole is None:
            block = state.rows(key, start, stop)
        else:
            block = whole[start:stop] if rows is None else whole.index_select(0, rows[start:stop])
        yield within.apply(block)


def _carried(state: LazyState, key: str, move: Carrying, step: int, wide: bool) -> Iterator[Tensor]:
    """Yield a tensor carried by couplings, in blocks of rows."""
    stored = state.stored(key)
    whole = None if move.by_rows else move.wide(state[key])
    for start in range(0, stored.shape[0], step):
        stop = min(start + step, stored.shape[0])
        block = move.wide(state.rows(key, start, stop)) if whole is None else whole[start:stop]
        rounded = block.to(stored.dtype)
        if not bool(torch.isfinite(rounded).all()):
            short = bool(torch.isfinite(block).all())
            raise CheckpointError(
                f"{printable(stored.file)}: {printable(key)!r} has entries that are NaN or infinite after carrying: "
                + (
                    f"they are too large for {str(stored.dtype).removeprefix('torch.')}. Save the network in float32 "
                    "first, or align with a smaller class of symmetries."
                    if short
                    else "so are some that are stored, or they grew too large. Repair the checkpoint, or align by "
                    "permutations, which move them unharmed."
                )
            )
        yield block if wide else rounded
