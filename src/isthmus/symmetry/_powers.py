r"""Powers: how a factor on the units of a group must be spread over the tensors that it acts on.

When each unit :math:`u` of a group is multiplied by a factor :math:`\lambda_u`, an entry of a value is multiplied by
:math:`\lambda_u^p`. The powers :math:`p` of the tensors of the state are unknowns, those of all other values are sums
of them, and every operator demands that some such sums vanish. So the powers that leave the outputs alone are the
solutions of a homogeneous linear system, over the rationals for sizes and modulo 2 for signs. Matrices are treated
alike: there the unknown is whether a tensor is carried by :math:`M` (0) or by its inverse transpose (1), modulo 2.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from fractions import Fraction
from typing import TypeVar

__all__ = ["ONE", "Form", "System", "minus", "plus", "times"]

ONE = -1
"""The unknown that is always 1, for equations with a constant."""
Form = Mapping[int, Fraction]
"""A sum of unknowns with their factors."""

_KeyT = TypeVar("_KeyT")


def plus(*forms: Form) -> Form:
    """Return the sum of forms."""
    total: dict[int, Fraction] = {}
    for form in forms:
        for unknown, factor in form.items():
            total[unknown] = total.get(unknown, Fraction(0)) + factor
    return {unknown: factor for unknown, factor in total.items() if factor}


def times(form: Form, factor: int | Fraction) -> Form:
    """Return a multiple of a form."""
    return {unknown: own * factor for unknown, own in form.items()} if factor else {}


def minus(one: Form, other: Form) -> Form:
    """Return the difference of two forms."""
    return plus(one, times(other, -1))


class System:
    """Linear equations ``form = 0``, kept solved: each determines one unknown by those that are free.

    Attributes:
        modulus: 2 for signs, 0 for rational numbers.
    """

    def __init__(self, modulus: int = 0) -> None:
        self.modulus = modulus
        self._rows: dict[int, Form] = {}

    def copy(self) -> System:
        """Return a system with the same equations, to which others may be added."""
        found = System(self.modulus)
        found._rows = dict(self._rows)
        return found

    def reduced(self, form: Form) -> Form:
        """Return a form in terms of free unknowns."""
        found = self._taken(form)
        for unknown in [u for u in found if u in self._rows]:
            factor = found.get(unknown)
            if factor:
                found = self._taken(minus(found, times(self._rows[unknown], factor)))
        return found

    def demand(self, form: Form) -> bool:
        """Add an equation unless it contradicts the others; return whether it holds now."""
        rest = self.reduced(form)
        unknown = next((u for u in rest if u != ONE), None)
        if unknown is None:
            return not rest
        row = self._taken(times(rest, 1 / rest[unknown]))
        for other, own in self._rows.items():
            if unknown in own:
                self._rows[other] = self._taken(minus(own, times(row, own[unknown])))
        self._rows[unknown] = row
        return True

    def demand_all(self, forms: Iterable[Form]) -> bool:
        """Add equations; return whether all hold."""
        held = [self.demand(form) for form in forms]
        return all(held)

    def rank_of(self, unknowns: Sequence[int]) -> int:
        """Return in how many independent ways some unknowns can be chosen."""
        seen = System(self.modulus)
        for unknown in unknowns:
            seen.demand(self.reduced({unknown: Fraction(1)}))
        return len(seen._rows)

    def solution(self, unknowns: Iterable[int]) -> dict[int, Fraction]:
        """Return a solution in which all free unknowns are 0."""
        return {u: self.reduced({u: Fraction(1)}).get(ONE, Fraction(0)) for u in unknowns}

    def _taken(self, form: Form) -> Form:
        if not self.modulus:
            return dict(form)
        return {u: Fraction(1) for u, factor in form.items() if factor % self.modulus}


def wished(system: System, wishes: Iterable[tuple[int, int]]) -> System:
    """Return a system with as many wishes ``unknown = number`` fulfilled, in order, as the equations allow."""
    found = system.copy()
    for unknown, number in wishes:
        found.demand({unknown: Fraction(1), ONE: Fraction(-number)} if number else {unknown: Fraction(1)})
    return found
