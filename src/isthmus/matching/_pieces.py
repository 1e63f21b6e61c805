"""Tensors that hold the parameters of several layers, taken apart: ``w[0]`` and ``w[1]``.

Such a tensor is moved by the groups of all its layers. As one term it could only be compared once all of them are
known, so a single pass would have nothing to begin with. Where every group acts inside one segment of an axis, the
segments are compared one by one, as if they were parameters of their own.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from isthmus.symmetry import IndexMap, Slot

__all__ = ["Piece", "chained", "pieces_of"]

Table = Mapping[int, Sequence[tuple[str, Slot]]]


@dataclass(frozen=True, eq=False)
class Piece:
    """A segment of a tensor, or the whole of it.

    Attributes:
        shape: of the segment.
        table: by axis of the segment, the ``(group, slot)`` pairs that act there.
        cut: the axis along which it is cut, where it begins and its length; None for the whole.
    """

    shape: tuple[int, ...]
    table: Table
    cut: tuple[int, int, int] | None = None


def pieces_of(table: Table, shape: Sequence[int]) -> list[Piece]:
    """Return a tensor in pieces that no group acts across.

    Args:
        table: by axis, the ``(group, slot)`` pairs that act on the tensor.
        shape: of the tensor.
    """
    whole = Piece(tuple(shape), table)
    slots = [slot for pairs in table.values() for _, slot in pairs]
    for axis in range(len(shape)):
        if not any(axis in dict(slot.block) for slot in slots):
            continue
        parts = [part for slot in slots if (part := _part(slot, axis)) is not None]
        spans = _spans(parts) if len(parts) == len(slots) else []
        if len(spans) > 1:
            return [_cut(table, shape, axis, *span) for span in spans]
    return [whole]


def chained(pieces: Sequence[Piece], known: Collection[str]) -> list[str]:
    """Return the groups of pieces in an order in which each is read before what is computed from it is held.

    Args:
        pieces: of one tensor.
        known: groups that come before.
    """
    left, found = list(pieces), list[str]()
    while left:
        held = [{g for g, s in _pairs(piece) if s.role == "holds"} for piece in left]
        for k, piece in enumerate(left):
            before = {g for g, s in _pairs(piece) if s.role == "reads"} - {*known, *found}
            if not any(before & other for j, other in enumerate(held) if j != k):
                break
        else:
            k = 0  # a ring: any piece is as good as another
        found += [g for g, _ in sorted(_pairs(left[k]), key=_holds)]
        del left[k]
    return list(dict.fromkeys(found))


def _pairs(piece: Piece) -> list[tuple[str, Slot]]:
    return [pair for axis in sorted(piece.table) for pair in piece.table[axis]]


def _holds(pair: tuple[str, Slot]) -> bool:
    return pair[1].role == "holds"


def _part(slot: Slot, axis: int) -> IndexMap | None:
    """Return where a slot acts on an axis, ``None`` where it acts all along it."""
    return slot.index if slot.axis == axis else dict(slot.block).get(axis)


def _spans(parts: Sequence[IndexMap]) -> list[tuple[int, int]]:
    """Return the separate stretches of an axis that index maps cover, as ``(start, stop)``."""
    found: list[tuple[int, int]] = []
    for low, high in sorted(
        (int(p.positions().min()), int(p.positions().max()) + 1) for p in parts if p.covered
    ):
        if found and low < found[-1][1]:
            found[-1] = (found[-1][0], max(found[-1][1], high))
        else:
            found.append((low, high))
    return found


def _cut(table: Table, shape: Sequence[int], axis: int, start: int, stop: int) -> Piece:
    length = stop - start
    kept: dict[int, list[tuple[str, Slot]]] = {}
    for place, pairs in table.items():
        for group, slot in pairs:
            part = _part(slot, axis)
            assert part is not None, "every slot acts on a part of the axis"
            if not start <= int(part.positions().min()) < stop:
                continue
            kept.setdefault(place, []).append((group, _inside(slot, axis, part, start, length)))
    return Piece(tuple(length if k == axis else n for k, n in enumerate(shape)), kept, (axis, start, length))


def _inside(slot: Slot, axis: int, part: IndexMap, start: int, length: int) -> Slot:
    """Return a slot as it acts on a segment."""
    moved = replace(part, length=length, offset=part.offset - start)
    if slot.axis == axis:
        return replace(slot, index=moved)
    everywhere = torch.equal(moved.positions().flatten().sort().values, torch.arange(length))
    block = tuple(
        (k, moved if k == axis else index) for k, index in slot.block if k != axis or not everywhere
    )
    return replace(slot, block=block)
