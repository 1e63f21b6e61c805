r"""Inner products of what was made of units, and the planes of units that may turn without their feeling it.

The positions that an inner product sums over are taken in pairs :math:`(i, i')`. Let a linear map take the plane of
units :math:`(f, f')` to such a pair, :math:`(q_i, q_{i'}) = T (u_f, u_{f'})`. A multiplication by a complex number,
that is a rotation and a factor, passes :math:`T` if :math:`T` is one too,

.. math:: T = \begin{pmatrix} c & -s \\ s & c \end{pmatrix},

that is if row :math:`i'` is row :math:`i` turned by a right angle. Whether :math:`c` and :math:`s` are cosines does not
matter. Where this holds for all planes on both sides, the inner product keeps its value when one side is multiplied by
:math:`M` and the other by :math:`M^{-\top}`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from isthmus.symmetry._planes.forms import FOREIGN, NOTHING, UnitForm
from isthmus.symmetry._planes.symbols import Coefficients
from isthmus.symmetry._planes.units import Units

__all__ = ["ScoreProduct"]

_Terms = tuple[tuple[int, int], ...]
"""Units of an entry with their coefficients, sorted."""
_Positions = Mapping[frozenset[int], Sequence[int]]


class ScoreProduct:
    """One inner product of two forms.

    Args:
        units: all units; spoiled, paired and tied here.
        numbers: of coefficients.
        sides: both forms, of shape ``(common, own, summed)``.
        name: tells the inner product from others.
    """

    def __init__(
        self, units: Units, numbers: Coefficients, sides: tuple[UnitForm, UnitForm], name: object
    ) -> None:
        self._units, self._numbers, self._sides, self._name = units, numbers, sides, name

    def examine(self) -> None:
        """Pair what can be paired, tie both sides, and spoil the rest."""
        first_rows = [side.units[:, :, :1] for side in self._sides]
        for side, first in zip(self._sides, first_rows, strict=True):
            if not bool((side.units == first).all()):  # other units in one row than in another
                self._spoil_both()
                return
        together = torch.cat([first[:, :, 0].transpose(0, 1).flatten(1) for first in first_rows], 1)
        _, which = together.unique(dim=0, return_inverse=True)
        partners = torch.empty(0, dtype=torch.int64)
        size = self._sides[0].shape[-1]
        paired = torch.full((len(which), size), NOTHING)
        for number in range(int(which.max()) + 1 if len(which) else 0):
            at = torch.nonzero(which == number).flatten()
            partners = self._pairs_of(int(at[0]), (self._name, number))
            paired[at] = partners
        for side in self._sides:
            self._check(side, paired)

    def _spoil_both(self) -> None:
        for side in self._sides:
            self._units.spoil(side.units)

    # --- One row -----------------------------------------------------------------------------------------------

    def _pairs_of(self, common: int, row: object) -> Tensor:
        """Return by position the second one of its pair, where it is a first one, and nothing elsewhere."""
        sides = [self._terms(side, common) for side in self._sides]
        size = len(sides[0])
        tables = [_positions(side) for side in sides]
        partner = [self._partner(sides, tables, i) for i in range(size)]
        found = torch.full((size,), NOTHING)
        for i in range(size):
            other = partner[i]
            if other is None or partner[other] != i:
                self._units.spoil(u for side in sides for u, _ in side[i])
            elif i < other:
                if self._tied([(side[i], side[other]) for side in sides], row):
                    found[i] = other
                else:
                    self._units.spoil(u for side in sides for k in (i, other) for u, _ in side[k])
        return found

    def _terms(self, side: UnitForm, common: int) -> list[_Terms]:
        """Return the terms of every position, in the first of a side's own rows."""
        if not side.shape[1]:
            return [()] * side.shape[-1]
        units, coefficients = side.units[:, common, 0].T.tolist(), side.coefficients[:, common, 0].T.tolist()
        return [
            tuple(sorted((u, c) for u, c in zip(us, cs, strict=True) if u != NOTHING))
            for us, cs in zip(units, coefficients, strict=True)
        ]

    def _partner(
        self, sides: Sequence[Sequence[_Terms]], tables: Sequence[_Positions], position: int
    ) -> int | None:
        """Return the only other position with the same units, on a side where each is made of two of a tensor."""
        found: set[int] = set()
        for side, table in zip(sides, tables, strict=True):
            own = _by_tensor(self._units, side[position])
            if any(len(units) == 2 for units in own.values()):
                found.update(k for k in table[_units(side[position])] if k != position)
        return found.pop() if len(found) == 1 else None

    def _tied(self, sides: Sequence[tuple[_Terms, _Terms]], row: object) -> bool:
        """Tie the planes of both sides at a pair of positions; return whether every unit has found its partner."""
        firsts: list[list[int]] = []
        for one, two in sides:
            planes = self._planes(one, two)
            if not planes:
                return False
            firsts.append([first for first, _ in planes])
        for own in firsts:
            for other in own:
                self._units.tie(own[0], other, inverse=False, row=row)
        self._units.tie(firsts[0][0], firsts[1][0], inverse=True, row=row)
        return True

    def _planes(self, one: _Terms, two: _Terms) -> list[tuple[int, int]]:
        """Return the planes at a pair of positions, each in the order in which it turns; none where one fails."""
        if any(u == FOREIGN for u, _ in (*one, *two)):
            return []
        here, there = _by_tensor(self._units, one), _by_tensor(self._units, two)
        found: list[tuple[int, int]] = []
        for tensor, units in here.items():
            plane = self._oriented(units, there.get(tensor, {}))
            if plane is None or not self._units.pair(*plane):
                return []
            found.append(plane)
        return found if here.keys() == there.keys() else []

    def _oriented(self, one: dict[int, list[int]], two: dict[int, list[int]]) -> tuple[int, int] | None:
        both = {*one, *two}
        if len(both) != 2:
            return None
        a, b = sorted(both)
        for first, second in ((a, b), (b, a)):
            if self._turned(one, first, second) == {u: sorted(cs) for u, cs in two.items()}:
                return first, second
        return None

    def _turned(self, terms: dict[int, list[int]], first: int, second: int) -> dict[int, list[int]]:
        """Return the terms of an entry turned by a right angle: first units become second, second minus first."""
        found: dict[int, list[int]] = {}
        if first in terms:
            found[second] = sorted(terms[first])
        if second in terms:
            found[first] = sorted(self._numbers.negated(torch.tensor(terms[second])).tolist())
        return found

    # --- All rows ----------------------------------------------------------------------------------------------

    def _check(self, side: UnitForm, paired: Tensor) -> None:
        """Look at every row whether second positions are first ones turned by a right angle; spoil what is not."""
        partner, sign = self._units.partners()
        if not len(partner) or not side.units.numel():
            return
        has_pair = (paired >= 0)[:, None, :].expand(side.shape)
        at = paired.clamp(min=0)[:, None, :].expand(side.shape)
        units, coefficients = side.units, side.coefficients
        known = units >= 0
        safe = units.clamp(min=0)
        turned_units = torch.where(known, partner[safe], units)
        turned = torch.where(known & (sign[safe] < 0), self._numbers.negated(coefficients), coefficients)
        there = at.expand(units.shape)
        wanted = _sorted(turned_units, turned)
        seen = _sorted(units.gather(-1, there), coefficients.gather(-1, there))
        wrong = has_pair & ~(wanted == seen).all(0)
        unpaired = has_pair & (known & (sign[safe] == 0)).any(0)
        for bad in (wrong, unpaired):
            if bool(bad.any()):
                self._units.spoil(units[:, bad])
                self._units.spoil(units.gather(-1, there)[:, bad])


def _positions(side: Sequence[_Terms]) -> _Positions:
    """Return the positions of each set of units."""
    found: dict[frozenset[int], list[int]] = {}
    for k, terms in enumerate(side):
        found.setdefault(_units(terms), []).append(k)
    return found


def _sorted(units: Tensor, coefficients: Tensor) -> Tensor:
    """Return terms as numbers, in order, so that equal sums are equal."""
    return ((units + 2) * (1 << 31) + coefficients).sort(0).values


def _units(terms: _Terms) -> frozenset[int]:
    return frozenset(u for u, _ in terms)


def _by_tensor(units: Units, terms: _Terms) -> dict[str, dict[int, list[int]]]:
    """Return coefficients by unit, by tensor."""
    found: dict[str, dict[int, list[int]]] = {}
    for unit, coefficient in terms:
        if unit >= 0:
            found.setdefault(units.tensor_of(unit), {}).setdefault(unit, []).append(coefficient)
    return found
