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
    tolerance: float = 1e-10
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
        eye = torch.eye(len(sides.holders), dtype=torch.float64)
        starts = Linear(eye, eye), BalancedProcrustes(self.condition**0.25)(sides)
        best = max(starts, key=sides.value)
        value = sides.value(best)
        scale = sum(float(gram.trace()) for gram in sides.grams())
        for _ in range(self.most_steps):
            better = self._improved(sides, best, value)
            if better is None:
                break
            rise, (best, value) = better[1] - value, better
            if rise <= self.tolerance * scale:
                break
        return best

    def _improved(self, sides: Sides, at: Linear, value: float) -> tuple[Linear, float] | None:
        """Return a map of larger value and this value, or ``None`` if no step along the direction has one."""
        direction = _direction(sides, at)
        size = 1.0
        while size >= _SHORTEST:
            there, back = (
                torch.linalg.matrix_exp(size * direction),
                torch.linalg.matrix_exp(-size * direction),
            )
            matrix, undone = there @ at.matrix(), at.inverse().matrix() @ back
            if bool(torch.isfinite(matrix).all()) and float(torch.linalg.cond(matrix)) <= self.condition:
                found = Linear(matrix, undone)
                reached = sides.value(found)
                if reached > value:
                    return found, reached
            size /= 2
        return None


def _direction(sides: Sides, at: Linear) -> Tensor:
    """Return the step of the linearised problem, on the CPU: a Sylvester equation between two positive matrices."""
    there, back = at.matrix(), at.inverse().matrix()
    held, read = (g.cpu() for g in (sides.holders, sides.readers))
    norm_held, norm_read = (g.cpu() for g in sides.grams())
    held, read = held @ there.T, read @ back
    norm_held, norm_read = there @ norm_held @ there.T, back.T @ norm_read @ back
    wanted = (held - norm_held) - (read.T - norm_read)
    left, left_axes = torch.linalg.eigh(0.5 * (norm_read + norm_read.T))
    right, right_axes = torch.linalg.eigh(0.5 * (norm_held + norm_held.T))
    # A little damping, relative to the larger side, keeps directions still that neither side sees.
    largest = max(float(left.max()) if len(left) else 0.0, float(right.max()) if len(right) else 0.0)
    sizes = left.clamp(min=0.0)[:, None] + right.clamp(min=0.0)[None, :] + 1e-9 * largest
    inside = left_axes.T @ wanted @ right_axes / sizes if largest else torch.zeros_like(wanted)
    return left_axes @ inside @ right_axes.T
