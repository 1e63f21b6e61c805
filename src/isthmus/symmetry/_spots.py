"""Spots: where the units of a group sit in a value, and which spot of an operand a spot of the result came from.

A spot is known by two entries, those of its units 0 and 1 with all other coordinates at rest. To learn from where an
operator took the units of a result, the two entries are followed back into the operand; the spots there whose unit
changes from one to the other are the ones.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from isthmus.symmetry._axes import Atom, Placement, placements
from isthmus.symmetry._origins import shape_of
from isthmus.symmetry._segments import Stacked
from isthmus.symmetry._values import Value

__all__ = ["Place", "Spot", "aligned", "between", "seen_through", "spots_of"]

Place = tuple[int, ...]
"""Coordinates of an entry."""


@dataclass(frozen=True)
class Spot:
    """Where the units of one atom sit on one axis of a value.

    Attributes:
        atom: the atom.
        axis: the axis.
        placement: the positions, within the segment.
        segment: the axis that is cut into segments, where this one begins and how long it is; None for a whole value.
        rank: number of axes of the value.
    """

    atom: Atom
    axis: int
    placement: Placement
    segment: tuple[int, int, int] | None
    rank: int

    @property
    def key(self) -> tuple[int, int, int, int | None]:
        """What tells the spot from the others of a value: axis, first position, step, segment."""
        start = None if self.segment is None else self.segment[1]
        return self.axis, self.placement.offset, self.placement.stride, start

    def ends(self) -> tuple[Place, Place]:
        """Return the entries of unit 0 and unit 1."""
        found: list[Place] = []
        for unit in (0, 1):
            at = [0] * self.rank
            if self.segment is not None:
                at[self.segment[0]] = self.segment[1]
            at[self.axis] += self.placement.offset + unit * self.placement.stride
            found.append(tuple(at))
        return found[0], found[1]

    def unit(self, at: Place) -> int | None:
        """Return which unit an entry belongs to, or ``None``."""
        rest = at[self.axis] - self.placement.offset
        if self.segment is not None:
            dim, start, length = self.segment
            if not start <= at[dim] < start + length:
                return None
            rest -= start if dim == self.axis else 0
        digits = [(self.placement.stride, self.atom.size, True)]
        digits += [(step, e.size, False) for e, step in self.placement.siblings if e.size > 1]
        unit = None
        for step, size, own in sorted(digits, key=_step, reverse=True):
            digit, rest = divmod(rest, step)
            if not 0 <= digit < size:
                return None
            unit = digit if own else unit
        return unit if rest == 0 else None


def _step(digit: tuple[int, int, bool]) -> tuple[int, int]:
    return digit[0], digit[1]


def spots_of(value: Any) -> list[Spot]:
    """Return where the atoms that may move sit in a value, segments apart; none for what is no tensor."""
    if isinstance(value, Value):
        return list(_spots(value, None))
    if not isinstance(value, Stacked):
        return []
    found: list[Spot] = []
    start = 0
    for part, length in zip(value.parts, value.lengths, strict=True):
        found += _spots(part, (value.dim, start, length))
        start += length
    if value.whole is not None:
        found = [spot for spot in found if spot.axis != value.dim]
        found += [Spot(place.atom, value.dim, place, None, value.ndim) for place in _moving(value.whole)]
    return found


def _spots(value: Value, segment: tuple[int, int, int] | None) -> Iterator[Spot]:
    for axis, expression in enumerate(value.axes):
        for place in _moving(expression):
            yield Spot(place.atom, axis, place, segment, value.ndim)


def _moving(expression: Any) -> Iterator[Placement]:
    for place in placements(expression):
        if isinstance(place, Placement) and place.atom.pinned is None and place.atom.size > 1:
            yield place


def between(spots: Sequence[Spot], atom: Atom, ends: tuple[Place, Place]) -> list[int]:
    """Return which spots of an atom change their unit from one entry to another, by their numbers in the list."""
    found: list[int] = []
    for k, spot in enumerate(spots):
        if spot.atom is atom:
            units = [spot.unit(at) for at in ends]
            if None not in units and units[0] != units[1]:
                found.append(k)
    return found


def aligned(at: Place, shape: Sequence[int]) -> Place:
    """Return the entry of an operand that is broadcast to where an entry of the result is."""
    own = at[len(at) - len(shape) :] if shape else ()
    return tuple(0 if size == 1 else k for k, size in zip(own, shape, strict=True))


def seen_through(node: fx.Node, source: fx.Node) -> list[tuple[Sequence[int], int]]:
    """Return, for each result of an operator that only views its operand, strides and offset into it, row-major.

    Raises:
        RuntimeError: the operator copies.
    """
    given = torch.empty(tuple(shape_of(source)), device="meta")

    def filled(n: fx.Node) -> Any:
        return given if n is source else torch.empty(tuple(shape_of(n)), device="meta")

    args, kwargs = fx.map_arg((node.args, node.kwargs), filled)
    with torch.no_grad():
        made: Any = node.target(*args, **kwargs)  # type: ignore[operator]
    results: Sequence[Tensor] = made if isinstance(made, (list, tuple)) else [made]
    return [(r.stride(), int(r.storage_offset())) for r in results]


def unravelled(flat: int, shape: Sequence[int]) -> Place:
    """Return the coordinates of an entry, given its number in row-major order."""
    found: list[int] = []
    for k in range(len(shape)):
        inner = math.prod(shape[k + 1 :])
        found.append(flat // inner if inner else 0)
        flat = flat % inner if inner else 0
    return tuple(found)
