"""Where atoms sit on an axis: offsets, strides and copies, read off its expression."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from isthmus.symmetry._expressions import Atom, Expression, Fixed, Sum, Woven, resolve

__all__ = ["Occurrence", "Placement", "merged_copies", "occurrences", "placements"]


def merged_copies(copies: Iterable[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    """Return ``(count, stride)`` pairs by falling stride, with pairs that follow each other seamlessly merged."""
    result: list[tuple[int, int]] = []
    for number, stride in sorted(copies, key=lambda c: -c[1]):
        if result and result[-1][1] == number * stride:
            result[-1] = (result[-1][0] * number, stride)
        else:
            result.append((number, stride))
    return tuple(result)


@dataclass(frozen=True)
class Placement:
    """Where an atom sits on an axis: unit ``u`` at ``offset + u·stride``, repeated along all ``siblings``.

    Attributes:
        atom: the atom, free or pinned.
        offset: position of unit 0.
        stride: distance of neighbouring units.
        siblings: the other factors of all products around the atom, each with its own stride.
    """

    atom: Atom
    offset: int
    stride: int
    siblings: tuple[tuple[Expression, int], ...]

    @property
    def copies(self) -> tuple[tuple[int, int], ...]:
        """``(count, stride)`` of every direction in which the units are repeated."""
        return merged_copies((e.size, step) for e, step in self.siblings)


def placements(
    e: Expression, offset: int = 0, stride: int = 1, siblings: tuple[tuple[Expression, int], ...] = ()
) -> Iterator[Placement | tuple[Fixed, int]]:
    """Yield where each atom sits on an axis, and each fixed part with the number of positions it takes."""
    e = resolve(e)
    if isinstance(e, Atom):
        yield Placement(e, offset, stride, siblings)
    elif isinstance(e, Fixed):
        yield e, e.size * math.prod(s.size for s, _ in siblings)
    elif isinstance(e, Sum):
        for part in e.parts:
            yield from placements(part, offset, stride, siblings)
            offset += stride * part.size
    elif isinstance(e, Woven):
        for lead, trail in e.strands:
            turn = stride * e.period
            beside = ((trail, stride),) if trail.size > 1 else ()
            yield from placements(lead, offset, turn, (*siblings, *beside))
            yield from placements(trail, offset, stride, (*siblings, (lead, turn)))
            offset += stride * trail.size
    else:
        strides = [stride] * len(e.factors)
        for k in range(len(e.factors) - 1, 0, -1):
            strides[k - 1] = strides[k] * e.factors[k].size
        for k, factor in enumerate(e.factors):
            others = tuple((f, strides[j]) for j, f in enumerate(e.factors) if j != k)
            yield from placements(factor, offset, strides[k], siblings + others)


@dataclass(frozen=True)
class Occurrence:
    """Where a free atom sits on an axis: unit ``u``, copy ``(i, …)`` at ``offset + u·stride + Σ i·copy_stride``."""

    atom: Atom
    offset: int
    stride: int
    copies: tuple[tuple[int, int], ...]


def occurrences(e: Expression) -> Iterator[Occurrence | tuple[Fixed, int]]:
    """Yield where each free atom sits on an axis, and each part that cannot move with its number of positions."""
    for found in placements(e):
        if isinstance(found, tuple):
            yield found
        elif found.atom.pinned is not None:
            yield (
                Fixed(found.atom.size, found.atom.pinned),
                found.atom.size * math.prod(n for n, _ in found.copies),
            )
        else:
            yield Occurrence(found.atom, found.offset, found.stride, found.copies)
