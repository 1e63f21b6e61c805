"""Couplings that send each unit to one unit: permutations, alone, with signs, and with factors."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from isthmus.couplings import Monomial, Permutation
from isthmus.errors import DataError
from isthmus.matching._solvers._sides import Sides, as_sides
from isthmus.transport import assign, gain_of_factors, least_squares_factors, norm_factors

__all__ = ["Assignment", "ScaledAssignment", "SignedAssignment", "assignment_solver"]

_ROWS = 2**20
"""Pairs of units whose factors are computed at a time."""


@dataclass(frozen=True)
class Assignment:
    """The permutation of largest total gain: exact linear assignment (:func:`isthmus.transport.assign`)."""

    acts: str = "permutation"

    def __call__(self, gain: Sides | Tensor) -> Permutation:
        """Return the permutation; gains of ``-inf`` are forbidden pairs."""
        return _assigned(gain.total if isinstance(gain, Sides) else gain)


assignment_solver = Assignment()
"""The usual solver."""


@dataclass(frozen=True)
class SignedAssignment:
    r"""The permutation and signs of largest total gain: symmetries of odd activations.

    A pair gains :math:`\pm(G_{ij} + H_{ij}) + U_{ij}`, so the assignment is over :math:`\lvert G + H\rvert + U` and the
    signs are those of the chosen entries; an entry of zero keeps its sign.

    Example:
        >>> SignedAssignment()(torch.tensor([[0.0, -5.0], [2.0, 1.0]])).factors
        tensor([-1.,  1.], dtype=torch.float64)
    """

    acts: str = "signed"

    def __call__(self, gain: Sides | Tensor) -> Monomial:
        """Return the permutation with its signs; gains of ``-inf`` are forbidden pairs."""
        sides = as_sides(gain)
        both = sides.holders + sides.readers
        order = _assigned(torch.where(both == -math.inf, both, both.abs() + sides.unmoved))
        chosen = both.gather(1, order.index[:, None].to(both.device))[:, 0].cpu()
        return Monomial(order.index, torch.where(chosen < 0, -1.0, 1.0).double())


@dataclass(frozen=True)
class ScaledAssignment:
    r"""The permutation and factors of least squared distance: symmetries of positively homogeneous activations.

    Each pair of units gets its own best factor first (see :func:`isthmus.transport.least_squares_factors`); the
    assignment is then over the costs that are left, so both are best together. Units of B are multiplied by the factor
    where tensors hold them, and divided by it where they read them.

    Attributes:
        rule: ``"least squares"``: the factor of least squared distance; by activations, where nothing reads, the
            regression :math:`E h_A h_B / E h_B^2`. ``"norms"``: the geometric mean of the ratios of the units' norms
            (see :func:`isthmus.transport.norm_factors`); by activations :math:`\lambda^2 = E h_A^2 / E h_B^2`.
        signed: whether factors may be negative, which linear units alone allow.
        most: largest factor, and its inverse the least.
        alone: the same where only one side is seen at all. Tune this first there: nothing holds a factor back, and
            units that hardly agree would be all but erased on the side that is seen, and blown up on the other.

    Raises:
        DataError: an unknown rule, or a largest factor that is not finite or below one.

    Source:
        ``"norms"``: SEA (OpenReview vl4iv7siTg), which alternates permutations with scales; here every pair has its
        scale before the permutation is chosen, so within a group there is nothing to alternate.
    """

    rule: Literal["least squares", "norms"] = "least squares"
    signed: bool = False
    most: float = 1e3
    alone: float = math.e
    acts: str = field(init=False, repr=False)

    def __post_init__(self) -> None:
        """Check the rule and the bound."""
        if self.rule not in ("least squares", "norms"):
            raise DataError(
                f"ScaledAssignment: expected rule 'least squares' or 'norms', found {self.rule!r}."
            )
        for most in (self.most, self.alone):
            if not 1 <= most < math.inf:
                raise DataError(
                    f"ScaledAssignment: expected a finite largest factor of at least 1, found {most}."
                )
        object.__setattr__(self, "acts", "monomial" if self.signed else "positive")

    def __call__(self, gain: Sides | Tensor) -> Monomial:
        """Return the permutation with its factors; gains of ``-inf`` are forbidden pairs.

        Raises:
            ShapeError: the norms of B's units are not known, or of A's for ``"norms"``.
        """
        sides = as_sides(gain)
        norms = sides.norms()
        of_a = sides.norms("A") if self.rule == "norms" else None
        most = self.most if all(bool(norm.any()) for norm in norms) else min(self.alone, self.most)
        total, factors = torch.empty_like(sides.holders), torch.empty_like(sides.holders)
        step = max(1, _ROWS // max(sides.holders.shape[1], 1))
        for start in range(0, len(total), step):
            rows = slice(start, start + step)
            held, read = sides.holders[rows], sides.readers[rows]
            forbidden = (held == -math.inf) | (read == -math.inf)
            held, read = (torch.where(forbidden, 0.0, x) for x in (held, read))
            own = None if of_a is None else (of_a[0][rows], of_a[1][rows])
            found = self._factors(held, read, own, norms, most)
            value = gain_of_factors(found, held, read, norms) + sides.unmoved[rows]
            total[rows], factors[rows] = torch.where(forbidden, -math.inf, value), found
        order = _assigned(total)
        return Monomial(order.index, factors.gather(1, order.index[:, None].to(factors.device))[:, 0].cpu())

    def _factors(
        self,
        held: Tensor,
        read: Tensor,
        of_a: tuple[Tensor, Tensor] | None,
        norms: tuple[Tensor, Tensor],
        most: float,
    ) -> Tensor:
        if of_a is None:
            return least_squares_factors(held, read, norms, signed=self.signed, most=most)
        found = norm_factors(of_a, norms, most=most)
        flipped = self.signed & (found * held + read / found < 0)
        return torch.where(flipped, -found, found)


def _assigned(gain: Tensor) -> Permutation:
    return Permutation.known(assign(gain, maximize=True, proof=False).columns.cpu())
