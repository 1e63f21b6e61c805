"""Couplings that multiply pairs of units by complex numbers: what rotary embeddings leave free."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from isthmus.couplings import Linear, Rotation
from isthmus.errors import DataError
from isthmus.matching._solvers._sides import Sides, as_sides

__all__ = ["ComplexFactors"]

_GRID, _ROUNDS = 65, 60
_GOLDEN = (5**0.5 - 1) / 2


@dataclass(frozen=True)
class ComplexFactors:
    r"""The complex factor of least squared distance for each plane of two units.

    A factor :math:`r e^{i\theta}` acts on what holds a plane, and :math:`e^{i\theta} / r` on what reads it. With the
    gains of both sides as complex numbers :math:`g, h` and the squared norms :math:`n, k` of B's plane, the distance
    falls by

    .. math:: 2 \operatorname{Re}\bigl( e^{-i\theta} (r g + h / r) \bigr) - r^2 n - k / r^2 ,

    so the angle is that of :math:`r g + h / r`, and the size is found along a line, on a grid and by golden sections to
    machine precision. Where no norms are known, planes are rotated alone.

    Attributes:
        planes: ``"halves"`` or ``"neighbours"`` (see :class:`PlaneRotations`).
        most: bound of a size and of its inverse.

    Raises:
        DataError: unknown planes.

    Source:
        Su 2021 (rotary embeddings); the factors are ours.
    """

    planes: Literal["halves", "neighbours"] = "halves"
    most: float = 100.0
    acts: str = "complex"

    def __post_init__(self) -> None:
        """Check the planes."""
        if self.planes not in ("halves", "neighbours"):
            raise DataError(
                f"ComplexFactors: expected planes 'halves' or 'neighbours', found {self.planes!r}."
            )

    def __call__(self, gain: Sides | Tensor) -> Linear | Rotation:
        """Return the factors as a matrix.

        Raises:
            DataError: an odd number of units.
        """
        sides = as_sides(gain)
        size = len(sides.holders)
        if size % 2:
            raise DataError(f"ComplexFactors: expected an even number of units, found {size}.")
        units = torch.arange(size)
        first, second = units.reshape(2, -1) if self.planes == "halves" else units.reshape(-1, 2).T
        held = _as_complex(sides.holders.cpu() + sides.unmoved.cpu(), first, second)
        read = _as_complex(sides.readers.cpu(), first, second)
        sizes = torch.ones(len(first), dtype=torch.float64)
        if sides.of_b is not None:
            norms = [n.cpu()[first] + n.cpu()[second] for n in sides.norms()]
            sizes = self._sizes(held, read, norms[0], norms[1])
        sum_of_both = sizes * held + read / sizes
        angles = torch.where(sum_of_both.abs() > 0, sum_of_both.angle(), 0.0)
        matrix = torch.zeros(size, size, dtype=torch.float64)
        matrix[first, first] = matrix[second, second] = sizes * angles.cos()
        matrix[first, second], matrix[second, first] = -sizes * angles.sin(), sizes * angles.sin()
        return Rotation(matrix) if bool((sizes == 1).all()) else Linear(matrix)

    def _sizes(self, held: Tensor, read: Tensor, n: Tensor, k: Tensor) -> Tensor:
        """Return the best sizes, as exponentials of the best logarithms."""

        def rise(log: Tensor) -> Tensor:
            r = log.exp()
            return 2 * (r * held + read / r).abs() - r**2 * n - k / r**2

        bound = float(torch.tensor(self.most, dtype=torch.float64).log())
        grid = torch.linspace(-bound, bound, _GRID, dtype=torch.float64)
        best = torch.stack([rise(log.expand(len(n))) for log in grid]).argmax(0)
        low, high = grid[(best - 1).clamp(min=0)], grid[(best + 1).clamp(max=_GRID - 1)]
        for _ in range(_ROUNDS):
            one, two = high - _GOLDEN * (high - low), low + _GOLDEN * (high - low)
            left = rise(one) >= rise(two)
            low, high = torch.where(left, low, one), torch.where(left, two, high)
        log = (low + high) / 2
        settled = self._settled(log, held, read, n, k)
        known = (n > 0) & (k > 0)
        return torch.where(known, settled.clamp(-bound, bound).exp(), 1.0)

    def _settled(self, log: Tensor, held: Tensor, read: Tensor, n: Tensor, k: Tensor) -> Tensor:
        """Return logarithms after Newton steps: sections alone find a flat top to half of all digits."""
        dot = (held * read.conj()).real
        for _ in range(4):
            up, down = (2 * log).exp(), (-2 * log).exp()
            length = (up * held.abs() ** 2 + 2 * dot + down * read.abs() ** 2).clamp(min=1e-300).sqrt()
            inner = up * held.abs() ** 2 - down * read.abs() ** 2
            slope = 2 * inner / length - 2 * up * n + 2 * down * k
            bend = 4 * (up * held.abs() ** 2 + down * read.abs() ** 2) / length - 2 * inner**2 / length**3
            bend = bend - 4 * up * n - 4 * down * k
            step = torch.where(bend < 0, slope / bend, 0.0).clamp(-0.1, 0.1)
            log = log - step
        return log


def _as_complex(gain: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """Return ``z`` of each plane such that ``Re(conj(z) e^{iθ})`` is the gain of turning it by ``θ``."""
    same = gain[first, first] + gain[second, second]
    return torch.complex(same, gain[second, first] - gain[first, second])
