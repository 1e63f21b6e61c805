"""Couplings that mix units by any invertible matrix: both factors of a circuit, which stays as it is."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from isthmus.couplings import Linear
from isthmus.errors import DataError
from isthmus.matching._solvers._sides import Sides, as_sides
from isthmus.transport import balancing, procrustes

__all__ = ["BalancedProcrustes", "LeastSquares"]

_SHORTEST = 2.0**-24


@dataclass(frozen=True)
class BalancedProcrustes:
    r"""An invertible map by balanced factors: a rotation between the singular value decompositions of two circuits.

    What holds the units and what reads them are two factors of a circuit, such as values and outputs of a head, or
    queries and keys. In each network the units are first changed so that both factors have the same inner products
    (see :func:`isthmus.transport.balancing`), :math:`T_A` and :math:`T_B`; then B is rotated towards A there, and taken
    back: :math:`M = T_A^{-1} Q\, T_B`. B's circuit is exactly the same whatever :math:`M` is.

    Attributes:
        most: largest factor by which balancing changes a direction's size, relative to the median direction. Lower
            it where heads have directions that all but vanish and the relabelled network is kept in a short dtype.

    Raises:
        DataError: a largest factor below one, or none.

    Source:
        Theus 2025 matches heads by their circuits; balancing both factors and the closed form are ours.
    """

    most: float = 100.0
    acts: str = "general"

    def __post_init__(self) -> None:
        """Check the bound."""
        if not 1 <= self.most < math.inf:
            raise DataError(
                f"BalancedProcrustes: expected a finite largest factor of at least 1, found {self.most}."
            )

    def __call__(self, gain: Sides | Tensor) -> Linear:
        """Return the map.

        Raises:
            ShapeError: the inner products of the units with one another are not known in both networks.
        """
        sides = as_sides(gain)
        (own, own_back), (other, other_back) = (self._balanced(sides, network) for network in "AB")
        held, read = own @ sides.holders @ other, own_back @ sides.readers @ other_back
        turned = procrustes(held + read)
        return Linear((own_back @ turned @ other).cpu(), (other_back @ turned.T @ own).cpu())

    def _balanced(self, sides: Sides, network: str) -> tuple[Tensor, Tensor]:
        """Return the balancing map of a network and its inverse, both symmetric."""
        found = balancing(*sides.grams(network), most=self.most)
        sizes, axes = torch.linalg.eigh(found)
        return found, (axes / sizes) @ axes.T


@dataclass(frozen=True)
class LeastSquares:
    r"""An invertible map of least squared distance, both sides counted.

    .. math:: \min_M \; \lvert A - M B \rvert^2 + \lvert R - M^{-\top} S \rvert^2

    by Gauss and Newton's method: with :math:`M \to e^X M`, the best :math:`X` of the linearised problem solves
    :math:`X N + K X = (G - N) - (H^\top - K)`, all inner products under the current map, and steps are halved until
    the distance falls. It starts from the better of the identity and :class:`BalancedProcrustes`, so it is never worse
    than either.

    Attributes:
        condition: bound on the condition number of the map; steps beyond are not taken.
        most_steps: after which it gives up.
        tolerance: rise of the value, relative to B's squared norm, below which it stops.

    Raises:
        DataError: a bound below one, or none.

    Source:
        Ours.
    """

    condition: float = 1e4
    most_steps: int = 100
    tolerance: float = 1e-9
    acts: str = "general"

    def __post_init__(self) -> None:
        """Check the bound."""
        if not 1 <= self.condition < math.inf:
            raise DataError(
                "LeastSquares: expected a finite bound on the condition number of at least 1, "
                f"found {self.condition}."
            )

    def __call__(self, gain: Sides | Tensor) -> Linear:
        """Return the map.

        Raises:
            ShapeError: the inner products of the units with one another are not known in both networks.
        """
        sides = as_sides(gain)
        balanced = BalancedProcrustes(self.condition**0.25)(sides)
        eye = torch.eye(len(sides.holders), dtype=torch.float64)
        descent = _Descent(sides, self.condition)
        at = max(
            (eye, eye),
            (balanced.matrix(), balanced.inverse().matrix()),
            key=lambda pair: descent.value(*pair),
        )
        value = descent.value(*at)
        for _ in range(self.most_steps):
            better = descent.improved(at, value)
            if better is None:
                break
            rise, (at, value) = better[1] - value, better
            if rise <= self.tolerance * descent.scale:
                break
        return Linear(at[0], _refined(*at))


_MapAndInverse = tuple[Tensor, Tensor]
"""A matrix and its inverse."""


class _Descent:
    """One problem of least squares, on the CPU."""

    def __init__(self, sides: Sides, condition: float) -> None:
        self._gains = sides.holders.cpu(), sides.readers.cpu()
        self._grams = tuple(g.cpu() for g in sides.grams())
        self._condition = condition
        self.scale = sum(float(g.trace()) for g in self._grams)

    def value(self, there: Tensor, back: Tensor) -> float:
        """Return minus half the squared distance under a map and its inverse, up to a constant."""
        parts = zip((there, back.T), self._gains, self._grams, strict=True)
        return float(sum((m * (gain - 0.5 * m @ gram)).sum() for m, gain, gram in parts))

    def improved(self, at: _MapAndInverse, value: float) -> tuple[_MapAndInverse, float] | None:
        """Return a map of larger value and this value, or ``None`` if no step along the direction has one."""
        direction = self._direction(*at)
        size = 1.0
        while size >= _SHORTEST:
            there, back = (torch.linalg.matrix_exp(sign * size * direction) for sign in (1, -1))
            moved = there @ at[0], at[1] @ back
            if self._well_shaped(moved) and (reached := self.value(*moved)) > value:
                return moved, reached
            size /= 2
        return None

    def _well_shaped(self, found: _MapAndInverse) -> bool:
        """Return whether a map keeps within the bound on the condition number."""
        if not all(bool(torch.isfinite(x).all()) for x in found):
            return False
        # The product of Frobenius norms bounds the condition number, and mostly saves the singular values.
        rough = float(found[0].norm() * found[1].norm())
        return rough <= self._condition or float(torch.linalg.cond(found[0])) <= self._condition

    def _direction(self, there: Tensor, back: Tensor) -> Tensor:
        """Return the step of the linearised problem: a Sylvester equation between two positive matrices."""
        held, read = self._gains[0] @ there.T, self._gains[1] @ back
        norm_held, norm_read = there @ self._grams[0] @ there.T, back.T @ self._grams[1] @ back
        wanted = (held - norm_held) - (read.T - norm_read)
        left, left_axes = torch.linalg.eigh(0.5 * (norm_read + norm_read.T))
        right, right_axes = torch.linalg.eigh(0.5 * (norm_held + norm_held.T))
        largest = max(float(s[-1]) if len(s) else 0.0 for s in (left, right))
        if largest <= 0:
            return torch.zeros_like(wanted)
        # A little damping, relative to the larger side, keeps directions still that neither side sees.
        sizes = left.clamp(min=0.0)[:, None] + right.clamp(min=0.0)[None, :] + 1e-9 * largest
        return left_axes @ (left_axes.T @ wanted @ right_axes / sizes) @ right_axes.T


def _refined(there: Tensor, back: Tensor) -> Tensor:
    """Return an inverse to rounding from one that many steps have worn (Newton and Schulz)."""
    return back @ (2 * torch.eye(len(there), dtype=there.dtype) - there @ back)
