"""Couplings that send each unit to one unit: permutations, and permutations with a factor for each unit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from isthmus.couplings._coupling import Coupling, check_units, follow, is_orthogonal
from isthmus.couplings._indices import invert_permutation, moved_fraction, validate_permutation
from isthmus.couplings._linear import Linear, Rotation
from isthmus.couplings._plan import Plan
from isthmus.errors import ShapeError

__all__ = ["Monomial", "Permutation", "as_coupling", "index_of"]


@dataclass(frozen=True, eq=False)
class Permutation:
    """Units of B in another order.

    Attributes:
        index: entry ``i`` is the unit of B placed at position ``i`` of A, int64 on the CPU, shape ``(size,)``; its
            matrix has a one at ``(i, index[i])``.

    Raises:
        ShapeError: an index is missing, repeated or out of range, or not whole.

    Example:
        >>> Permutation(torch.tensor([2, 0, 1])).carry(torch.tensor([10.0, 20.0, 30.0]))
        tensor([30., 10., 20.])
    """

    index: Tensor

    def __post_init__(self) -> None:
        """Check the index."""
        object.__setattr__(
            self, "index", validate_permutation(self.index, torch.as_tensor(self.index).numel())
        )

    @classmethod
    def identity(cls, size: int) -> Permutation:
        """Return the permutation that moves nothing."""
        return cls.known(torch.arange(size))

    @classmethod
    def known(cls, index: Tensor) -> Permutation:
        """Return the permutation of an int64 index on the CPU that is known to be one, unchecked."""
        found = object.__new__(cls)
        object.__setattr__(found, "index", index)
        return found

    @property
    def shape(self) -> tuple[int, int]:
        """Number of units, twice."""
        return len(self.index), len(self.index)

    @property
    def orthogonal(self) -> bool:
        """Whether the inverse is the transpose: always."""
        return True

    @property
    def moves(self) -> bool:
        """Whether any unit changes place."""
        return not torch.equal(self.index, torch.arange(len(self.index)))

    @property
    def moved_fraction(self) -> float:
        """Share of the units that change place, between 0 and 1."""
        return moved_fraction(self.index)

    def carry(self, units: Tensor, axis: int = 0) -> Tensor:
        """Return the units in order (see :class:`Coupling`)."""
        check_units(self, units, axis)
        return units.index_select(axis, self.index.to(units.device))

    def carry_readers(self, units: Tensor, axis: int = 0) -> Tensor:
        """Return the readers in the same order: the inverse of a permutation is its transpose."""
        return self.carry(units, axis)

    def then(self, after: Coupling) -> Coupling:
        """Return this permutation followed by another coupling."""
        follow(self, after)
        if isinstance(after, Permutation):
            return Permutation.known(self.index[after.index])
        if isinstance(after, Plan):
            return Plan(after.mass[:, invert_permutation(self.index)])
        return _as_monomial(self).then(after)

    def inverse(self) -> Permutation:
        """Return the permutation that undoes this one."""
        return Permutation.known(invert_permutation(self.index))

    def matrix(self) -> Tensor:
        """Return the permutation matrix, float64."""
        return torch.eye(len(self.index), dtype=torch.float64)[self.index]

    def __eq__(self, other: object) -> bool:
        """Return whether both place every unit alike."""
        return isinstance(other, Permutation) and (
            self is other or self.index is other.index or torch.equal(self.index, other.index)
        )

    def __hash__(self) -> int:
        """Return a hash of the index."""
        return hash(self.index.numpy().tobytes())

    def __repr__(self) -> str:
        """Return one line."""
        return f"Permutation({len(self.index)} units, {self.moved_fraction:.0%} moved)"


@dataclass(frozen=True, eq=False, repr=False)
class Monomial:
    """Units of B in another order, each multiplied by a factor: signs, positive scales, or both.

    Attributes:
        index: as in :class:`Permutation`.
        factors: of the units at A's places, not zero, float64, shape ``(size,)``; gradients pass.

    Raises:
        ShapeError: the index is no permutation, or a factor is zero, not finite, or missing.

    Example:
        >>> Monomial(torch.tensor([1, 0]), torch.tensor([2.0, -1.0])).carry(torch.tensor([10.0, 20.0]))
        tensor([ 40., -10.])
    """

    index: Tensor
    factors: Tensor

    def __post_init__(self) -> None:
        """Check the index and the factors."""
        index = validate_permutation(self.index, torch.as_tensor(self.index).numel())
        factors = torch.as_tensor(self.factors)
        if factors.shape != index.shape or factors.is_complex():
            raise ShapeError(
                f"Monomial: expected {len(index)} real factors, one for each unit, found shape {tuple(factors.shape)} "
                f"of {factors.dtype}."
            )
        if not bool((torch.isfinite(factors) & (factors != 0)).all()):
            raise ShapeError(
                "Monomial: expected factors that are finite and not zero; nothing undoes a zero."
            )
        object.__setattr__(self, "index", index)
        object.__setattr__(self, "factors", factors.double())

    @classmethod
    def known(cls, index: Tensor, factors: Tensor) -> Monomial:
        """Return the coupling of an order and factors that are known to be some, unchecked, in the factors' dtype."""
        found = object.__new__(cls)
        object.__setattr__(found, "index", index)
        object.__setattr__(found, "factors", factors)
        return found

    @property
    def shape(self) -> tuple[int, int]:
        """Number of units, twice."""
        return len(self.index), len(self.index)

    @property
    def orthogonal(self) -> bool:
        """Whether the inverse is the transpose: where all factors are signs."""
        return bool((self.factors.detach().abs() == 1).all())

    def carry(self, units: Tensor, axis: int = 0) -> Tensor:
        """Return the units in order, each times its factor."""
        return self._times(units, axis, self.factors)

    def carry_readers(self, units: Tensor, axis: int = 0) -> Tensor:
        """Return the readers in order, each divided by its unit's factor."""
        return self._times(units, axis, 1 / self.factors)

    def powered(self, power: int) -> Monomial:
        """Return the same order with the factors raised to a power."""
        if abs(power) > 1:  # which may leave the range of numbers
            return Monomial(self.index, self.factors**power)
        return self if power == 1 else Monomial.known(self.index, self.factors**power)

    def _times(self, units: Tensor, axis: int, factors: Tensor) -> Tensor:
        check_units(self, units, axis)
        shape = [-1 if k == axis % units.ndim else 1 for k in range(units.ndim)]
        moves = not torch.equal(self.index, torch.arange(len(self.index)))
        ordered = units.index_select(axis, self.index.to(units.device)) if moves else units
        if not units.is_floating_point():
            return ordered * factors.to(units.device).reshape(shape)
        wide = torch.promote_types(units.dtype, factors.dtype)
        return (ordered.to(wide) * factors.to(device=units.device, dtype=wide).reshape(shape)).to(units.dtype)

    def then(self, after: Coupling) -> Coupling:
        """Return this coupling followed by another."""
        follow(self, after)
        if isinstance(after, Permutation | Monomial):
            second = _as_monomial(after)
            return Monomial(self.index[second.index], self.factors[second.index] * second.factors)
        if self.orthogonal and is_orthogonal(after):
            return Rotation(self.matrix()).then(after)
        return Linear(self.matrix(), self.inverse().matrix()).then(after)

    def inverse(self) -> Monomial:
        """Return the coupling that undoes this one."""
        back = invert_permutation(self.index)
        return Monomial(back, 1 / self.factors[back])

    def matrix(self) -> Tensor:
        """Return the matrix with ``factors[i]`` at ``(i, index[i])``, float64."""
        return torch.eye(len(self.index), dtype=torch.float64)[self.index] * self.factors[:, None].cpu()

    def __repr__(self) -> str:
        """Return one line."""
        sizes = self.factors.detach().abs()
        low, high = (float(sizes.min()), float(sizes.max())) if len(sizes) else (1.0, 1.0)
        flipped = int((self.factors < 0).sum())
        return f"Monomial({len(self.index)} units, sizes {low:.3g} to {high:.3g}, {flipped} signs changed)"


def _as_monomial(coupling: Any) -> Monomial:
    if isinstance(coupling, Monomial):
        return coupling
    return Monomial(coupling.index, torch.ones(len(coupling.index), dtype=torch.float64))


def as_coupling(given: Coupling | Tensor) -> Coupling:
    """Return a coupling; an index tensor stands for its permutation.

    Raises:
        ShapeError: the tensor is no permutation.
    """
    return given if isinstance(given, Coupling) else Permutation(given)


def index_of(coupling: Coupling | Tensor) -> Tensor:
    """Return the index tensor of a permutation, int64; an index tensor stands for itself, unchecked.

    Raises:
        ShapeError: the coupling is no permutation.
    """
    if isinstance(coupling, Permutation):
        return coupling.index
    if isinstance(coupling, Tensor):
        return coupling
    raise ShapeError(f"Expected a Permutation, which has an index tensor, found {coupling!r}.")
