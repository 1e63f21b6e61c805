"""What operators demand of factors and matrices on the units of one atom, and the largest class that meets it all."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from typing import NamedTuple

from isthmus.symmetry._acts import Acts
from isthmus.symmetry._powers import ONE, Form, System, minus, plus, wished
from isthmus.symmetry._slots import Role

__all__ = ["ZERO", "Cause", "Demands", "Grade", "Settled"]


class Cause(NamedTuple):
    """The operator that demands something, and the module that calls it."""

    operator: str
    module: str


@dataclass(frozen=True)
class Grade:
    """How the entries of a value change when its units are acted on.

    Attributes:
        size: power of a positive factor.
        sign: power of a sign, modulo 2.
        turn: 0 where a matrix acts as on what holds the units, 1 where its inverse transpose does, modulo 2.
        squared: whether they are squares of what a matrix acts on, and summed over before anything else.
    """

    size: Form = field(default_factory=dict[int, Fraction])
    sign: Form = field(default_factory=dict[int, Fraction])
    turn: Form = field(default_factory=dict[int, Fraction])
    squared: bool = False


ZERO = Grade()
"""Entries that only change places."""

_UNIT: Form = {ONE: Fraction(1)}
Entry = tuple[Form, Cause]


@dataclass
class Demands:
    """The equations of one atom.

    Attributes:
        sizes: forms of :attr:`Grade.size` that must vanish.
        signs: the same for signs, modulo 2.
        turns: the same for matrices, modulo 2; what contradicts itself holds for orthogonal matrices only.
        limits: classes of matrices that operators allow at most.
        unknowns: those of the state's tensors.
        readers: those of tensors that the units of data are summed over with.
        outer: whether other units lie within these, whose own couplings then hold all factors.
    """

    sizes: list[Entry] = field(default_factory=list[Entry])
    signs: list[Entry] = field(default_factory=list[Entry])
    turns: list[Entry] = field(default_factory=list[Entry])
    limits: list[tuple[Acts, Cause]] = field(default_factory=list[tuple[Acts, Cause]])
    unknowns: list[int] = field(default_factory=list[int])
    readers: dict[int, None] = field(default_factory=dict[int, None])
    outer: bool = False

    def zero(self, grade: Grade, cause: Cause, most: Acts = Acts.PERMUTATION) -> None:
        """Demand that factors do not show in a grade; of matrices, that they are of a class."""
        self.sizes.append((grade.size, cause))
        self.signs.append((grade.sign, cause))
        self.limit(most, cause)

    def unsigned(self, grade: Grade, cause: Cause) -> Grade:
        """Demand positive factors; return the grade of the result."""
        self.signs.append((grade.sign, cause))
        self.limit(Acts.PERMUTATION, cause)
        return Grade(grade.size, {}, grade.turn)

    def unsized(self, grade: Grade, cause: Cause) -> Grade:
        """Demand factors of size 1; return the grade of the result."""
        self.sizes.append((grade.size, cause))
        self.limit(Acts.PERMUTATION, cause)
        return Grade({}, grade.sign, grade.turn)

    def equal(self, one: Grade, other: Grade, cause: Cause) -> None:
        """Demand that two values change alike."""
        self.sizes.append((minus(one.size, other.size), cause))
        self.signs.append((minus(one.sign, other.sign), cause))
        self.turns.append((plus(one.turn, other.turn), cause))

    def summed(self, one: Grade, other: Grade, cause: Cause) -> None:
        """Demand that the sum of the products of two values over the units stays."""
        self.sizes.append((plus(one.size, other.size), cause))
        self.signs.append((plus(one.sign, other.sign), cause))
        self.turns.append((plus(one.turn, other.turn, _UNIT), cause))

    def read(self, grade: Grade) -> None:
        """Note that a tensor of the state, or what is made of it, reads the units."""
        self.readers.update(dict.fromkeys((*grade.size, *grade.sign)))

    def limit(self, most: Acts, cause: Cause) -> None:
        """Allow a class of matrices at most."""
        self.limits.append((most, cause))

    def settle(self, roles: Mapping[int, Role], without: str = "") -> Settled:
        """Return the largest class, and the power of each tensor of the state.

        Args:
            roles: of the unknowns.
            without: an operator whose demands are left out: what would be, were it not for it.
        """
        if self.outer:
            return Settled(Acts.PERMUTATION, {})
        matrix = self._matrix(roles, without)
        return matrix if matrix is not None else self._factors(roles, without)

    def limiting(self) -> Iterator[Cause]:
        """Yield the operators that allow less than every invertible matrix, each once."""
        yield from dict.fromkeys(cause for _, cause in self.limits)

    # --- Matrices ----------------------------------------------------------------------------------------------

    def _matrix(self, roles: Mapping[int, Role], without: str) -> Settled | None:
        limits = {most for most, cause in self.limits if cause.operator != without}
        if Acts.PERMUTATION in limits:
            return None
        system = System(2)
        clear = system.demand_all(_kept(self.turns, without))
        if clear:
            system = wished(system, _wishes(roles, self.unknowns, {"holds": 0, "reads": 1}))
        acts = next((a for a in (Acts.MEAN_FIXING, Acts.ORTHOGONAL) if a in limits), Acts.GENERAL)
        if not clear and acts is Acts.GENERAL:
            acts = Acts.ORTHOGONAL
        turns = system.solution(self.unknowns) if clear else dict.fromkeys(self.unknowns, Fraction(0))
        return Settled(acts, {u: -1 if turn % 2 else 1 for u, turn in turns.items()})

    # --- Factors -----------------------------------------------------------------------------------------------

    def _factors(self, roles: Mapping[int, Role], without: str) -> Settled:
        usual = _wishes(roles, self.unknowns, {"scales": 0, "holds": 1})
        sizes = self._powers(0, _kept(self.sizes, without), usual)
        signs = self._powers(2, _kept(self.signs, without), usual)
        if sizes is not None and signs is not None:
            # where there is a choice, signs and sizes should act on the same tensors
            together = self._powers(2, _kept(self.signs, without), [(u, p % 2) for u, p in sizes.items()])
            if together is not None and self._agree(sizes, together):
                return Settled(Acts.MONOMIAL, sizes)
            together = self._powers(0, _kept(self.sizes, without), list(signs.items()))
            if together is not None and self._agree(together, signs):
                return Settled(Acts.MONOMIAL, together)
        if sizes is not None:
            return Settled(Acts.POSITIVE, sizes)
        if signs is not None:
            return Settled(Acts.SIGNED, signs)
        return Settled(Acts.PERMUTATION, {})

    def _agree(self, sizes: Mapping[int, int], signs: Mapping[int, int]) -> bool:
        return all((sizes[u] - signs[u]) % 2 == 0 for u in self.unknowns)

    def _powers(
        self, modulus: int, forms: Iterable[Form], wishes: Iterable[tuple[int, int]]
    ) -> dict[int, int] | None:
        """Return the powers of one factor for each unit, which all its readers take out again; None if there is none.

        Gains stay if they can. Where readers can then be scaled one by one, the factors belong to the gains of the
        norms that they read, not to the units; where none reads, nothing takes a factor out again.
        """
        system = System(modulus)
        system.demand_all(forms)
        listed = list(wishes)
        with_gains_at_rest = wished(system, [(u, number) for u, number in listed if not number])
        return self._shared(with_gains_at_rest, listed) or self._shared(system, listed)

    def _shared(self, system: System, wishes: Iterable[tuple[int, int]]) -> dict[int, int] | None:
        """Return the powers by which all readers share one factor; None where they share none."""
        readers, modulus = list(self.readers), system.modulus
        if not readers or system.rank_of(readers) != 1:
            return None
        first = next(u for u in readers if system.reduced({u: Fraction(1)}))
        found = system.copy()
        found.demand({first: Fraction(1), ONE: Fraction(1)})
        solved = wished(found, wishes).solution(self.unknowns)
        if not all(solved[u] for u in readers):
            return None
        whole = math.lcm(*(power.denominator for power in solved.values()))
        return {
            u: int(power * whole) % modulus if modulus else int(power * whole) for u, power in solved.items()
        }


@dataclass(frozen=True)
class Settled:
    """The class of an atom, and the power of each unknown of the state."""

    acts: Acts
    powers: Mapping[int, int]


def _kept(entries: Iterable[Entry], without: str) -> list[Form]:
    return [form for form, cause in entries if form and cause.operator != without]


def _wishes(
    roles: Mapping[int, Role], unknowns: Iterable[int], words: Mapping[str, int]
) -> list[tuple[int, int]]:
    """Return what the powers of tensors of some roles should be, role by role."""
    listed = list(unknowns)
    return [(u, number) for word, number in words.items() for u in listed if roles.get(u) == word]
