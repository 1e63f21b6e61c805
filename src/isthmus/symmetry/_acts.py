"""What may act on the units of a group: classes of matrices, from permutations to every invertible map."""

from __future__ import annotations

from enum import StrEnum

__all__ = ["Acts"]


class Acts(StrEnum):
    """The largest class of couplings that leaves the network's function alone, whatever its weights are.

    Every class but the last two contains the permutations. ``SIGNED`` and ``POSITIVE`` are contained in ``MONOMIAL``,
    ``SIGNED`` in ``ORTHOGONAL``, which contains ``MEAN_FIXING``; ``GENERAL`` contains all. ``PLANE_ROTATIONS`` and
    ``COMPLEX``, which contains them, act on pairs of units (:attr:`isthmus.symmetry.AxisGroup.planes`) that stay where
    they are.
    """

    PERMUTATION = "permutation"
    """Units change places."""
    SIGNED = "signed"
    """And change their sign."""
    POSITIVE = "positive"
    """And are multiplied by positive factors."""
    MONOMIAL = "monomial"
    """And are multiplied by any factors but zero."""
    MEAN_FIXING = "mean-fixing"
    """Rotations and reflections that fix the direction in which all units are equal, ``Q 1 = 1``."""
    ORTHOGONAL = "orthogonal"
    """Rotations and reflections."""
    GENERAL = "general"
    """Invertible matrices."""
    PLANE_ROTATIONS = "plane-rotations"
    """Every pair of units is rotated by an angle of its own, and stays where it is."""
    COMPLEX = "complex"
    """And is scaled by a factor of its own: a pair is multiplied by a complex number, ``((a, -b), (b, a))``."""

    @property
    def mixes(self) -> bool:
        """Whether units are mixed with one another."""
        return self in (Acts.MEAN_FIXING, Acts.ORTHOGONAL, Acts.GENERAL) or self.pairs

    @property
    def pairs(self) -> bool:
        """Whether it acts on pairs of units, which do not change places."""
        return self in (Acts.PLANE_ROTATIONS, Acts.COMPLEX)

    def contains(self, other: Acts) -> bool:
        """Return whether every element of another class is one of this class."""
        return other is self or other in _BELOW[self]

    @property
    def words(self) -> str:
        """How texts call the class."""
        return _WORDS[self]


_BELOW: dict[Acts, frozenset[Acts]] = {
    Acts.PERMUTATION: frozenset(),
    Acts.SIGNED: frozenset({Acts.PERMUTATION}),
    Acts.POSITIVE: frozenset({Acts.PERMUTATION}),
    Acts.MONOMIAL: frozenset({Acts.PERMUTATION, Acts.SIGNED, Acts.POSITIVE}),
    Acts.MEAN_FIXING: frozenset({Acts.PERMUTATION}),
    Acts.ORTHOGONAL: frozenset({Acts.PERMUTATION, Acts.SIGNED, Acts.MEAN_FIXING, Acts.PLANE_ROTATIONS}),
    Acts.GENERAL: frozenset(Acts) - {Acts.GENERAL},
    Acts.PLANE_ROTATIONS: frozenset(),
    Acts.COMPLEX: frozenset({Acts.PLANE_ROTATIONS}),
}
_WORDS = {
    Acts.PERMUTATION: "permutations",
    Acts.SIGNED: "signs",
    Acts.POSITIVE: "positive scales",
    Acts.MONOMIAL: "signs and scales",
    Acts.MEAN_FIXING: "rotations that fix the mean",
    Acts.ORTHOGONAL: "rotations",
    Acts.GENERAL: "invertible maps",
    Acts.PLANE_ROTATIONS: "rotations of pairs",
    Acts.COMPLEX: "complex factors of pairs",
}
