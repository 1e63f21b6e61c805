"""When the slots of a spec may lie on the same positions of an axis, and when they would destroy entries or each other.

Every slot moves units as wholes to distinct positions, so by itself it is a bijection. Two slots on one axis are sound

* when their positions are disjoint (segments, heads);
* when one belongs to a group nested in the other's, and lies inside its outer unit: outer moves first;
* when they move independent digits of the same positions (both factors of a flattened product, ``u * n + v``): every
  pair of their units meets, and each way of moving one commutes with each way of moving the other.

Anything else (a slot given twice, groups that share a slot, segments that overlap) moves entries twice, in an order
that nobody chose.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from isthmus.errors import SymmetryError

__all__ = ["check_overlaps", "distinct_positions"]

_MOST = 2**28
"""Positions beyond which distinctness is not settled by listing them."""


class _MapLike(Protocol):
    @property
    def length(self) -> int: ...
    @property
    def size(self) -> int: ...
    @property
    def offset(self) -> int: ...
    @property
    def stride(self) -> int: ...
    @property
    def copies(self) -> tuple[tuple[int, int], ...]: ...
    @property
    def covered(self) -> int: ...
    def positions(self) -> Tensor: ...
    def gather_index(self, permutation: Tensor, /) -> Tensor: ...


class _SlotLike(Protocol):
    @property
    def tensor(self) -> str: ...
    @property
    def axis(self) -> int: ...
    @property
    def index(self) -> _MapLike: ...
    @property
    def block(self) -> tuple[tuple[int, _MapLike], ...]: ...


class _GroupLike(Protocol):
    @property
    def name(self) -> str: ...
    @property
    def slots(self) -> Sequence[_SlotLike]: ...
    @property
    def within(self) -> tuple[tuple[str, int], ...]: ...


def distinct_positions(index: _MapLike) -> bool:
    """Return whether all units and copies of an index map have positions of their own."""
    steps = sorted((s, n) for n, s in ((index.size, index.stride), *index.copies) if n > 1)
    reach = 0  # of all smaller steps together; a larger step is always enough
    for stride, count in steps:
        if stride <= reach:
            break
        reach += (count - 1) * stride
    else:
        return True
    if index.covered > min(index.length, _MOST):
        return False
    places = index.positions().reshape(-1)
    return len(places.unique()) == len(places)


def check_overlaps(groups: Mapping[str, _GroupLike]) -> None:
    """Check every two slots that act on one axis of one tensor.

    Raises:
        SymmetryError: they move the same positions, and not independently.
    """
    table: dict[tuple[str, int], list[tuple[_GroupLike, _SlotLike]]] = {}
    for group in groups.values():
        for slot in group.slots:
            table.setdefault((slot.tensor, slot.axis), []).append((group, slot))
    for slots in table.values():
        for (one, first), (other, second) in _meeting(slots):
            if not _sound(one, first, other, second):
                same = (
                    f"twice in group {one.name!r}"
                    if one is other
                    else f"groups {one.name!r} and {other.name!r}"
                )
                raise SymmetryError(
                    f"{same}: slots {first} and {second} move the same positions, and not independently, so entries "
                    "would be moved twice. Give each position to one group, or nest one group within the other."
                )


def _meeting(
    slots: Sequence[tuple[_GroupLike, _SlotLike]],
) -> Iterable[tuple[tuple[_GroupLike, _SlotLike], tuple[_GroupLike, _SlotLike]]]:
    """Yield the pairs of slots whose spans meet, in order of where they begin; few do on a long axis of many heads."""
    if len(slots) < 2:
        return
    spans = [
        (slot.index.offset, _last(slot.index), k) for k, (_, slot) in enumerate(slots) if slot.index.covered
    ]
    spans.sort()
    open_: list[tuple[int, int]] = []
    for start, stop, k in spans:
        open_ = [(end, j) for end, j in open_ if end >= start]
        for _, j in open_:
            yield slots[min(j, k)], slots[max(j, k)]
        open_.append((stop, k))


def _last(index: _MapLike) -> int:
    return index.offset + sum((n - 1) * s for n, s in ((index.size, index.stride), *index.copies))


def _sound(one: _GroupLike, first: _SlotLike, other: _GroupLike, second: _SlotLike) -> bool:
    blocks = dict(first.block), dict(second.block)
    for axis in blocks[0].keys() & blocks[1].keys():
        if not _common(blocks[0][axis], blocks[1][axis]):
            return True  # two experts of one tensor
    if not _common(first.index, second.index):
        return True
    for (outer, place), (inner, part) in (((one, first), (other, second)), ((other, second), (one, first))):
        for name, unit in inner.within:
            if name == outer.name:
                return _inside(place.index, unit, part.index)
    return _independent(first.index, second.index)


@functools.lru_cache(maxsize=4096)
def _common(first: _MapLike, second: _MapLike) -> bool:
    marked = torch.zeros(first.length, dtype=torch.bool)
    marked[first.positions().reshape(-1)] = True
    return bool(marked[second.positions().reshape(-1)].any())


@functools.lru_cache(maxsize=4096)
def _inside(outer: _MapLike, unit: int, inner: _MapLike) -> bool:
    """Whether the positions of a nested group belong to its outer unit."""
    if not 0 <= unit < outer.size:
        return False
    marked = torch.zeros(outer.length, dtype=torch.bool)
    marked[outer.positions()[unit]] = True
    return bool(marked[inner.positions().reshape(-1)].all())


@functools.lru_cache(maxsize=4096)
def _independent(first: _MapLike, second: _MapLike) -> bool:
    """Whether two maps move independent digits of the positions they share.

    All permutations of units are products of one swap and one cycle, so if these commute, all do.
    """
    units = torch.full((2, first.length), -1)
    for row, index in enumerate((first, second)):
        units[row, index.positions().reshape(-1)] = torch.arange(index.size).repeat_interleave(
            index.covered // max(index.size, 1)
        )
    shared = (units >= 0).all(0)
    pairs = units[0, shared] * second.size + units[1, shared]
    if len(pairs.unique()) != first.size * second.size:
        return False
    moves = [[m.gather_index(p) for p in _generators(m.size)] for m in (first, second)]
    return all(torch.equal(a[b], b[a]) for a in moves[0] for b in moves[1])


def _generators(size: int) -> list[Tensor]:
    swap = torch.arange(size)
    swap[:2] = swap[:2].flip(0)
    return [swap, torch.arange(size).roll(1)]
