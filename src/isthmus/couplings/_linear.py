"""Couplings that mix units: rotations and invertible maps."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from isthmus.couplings._coupling import Coupling, along, check_units, follow, is_orthogonal, square_matrix
from isthmus.couplings._plan import Plan
from isthmus.errors import ShapeError

__all__ = ["Linear", "Rotation"]

ROUNDING = 1e-8
"""Most that a product with the inverse may differ from the identity, in float64; bad conditioning gets more."""


@dataclass(frozen=True, eq=False, repr=False)
class Rotation:
    """Units of B rotated or reflected: an orthogonal matrix.

    Attributes:
        values: the matrix, float64, shape ``(size, size)``; gradients pass.

    Raises:
        ShapeError: it is not square or not finite, or its rows are not orthonormal to 1e-8.
    """

    values: Tensor

    def __post_init__(self) -> None:
        """Check that the rows are orthonormal."""
        values = square_matrix(self.values, "Rotation")
        error = _from_identity(values.detach() @ values.detach().T)
        if error > ROUNDING:
            raise ShapeError(
                f"Rotation: expected orthonormal rows, found products off by {error:.1e}. Take the nearest rotation "
                "(U Vᵀ of its singular value decomposition), or Linear for an invertible matrix."
            )
        object.__setattr__(self, "values", values)

    @classmethod
    def known(cls, values: Tensor) -> Rotation:
        """Return the rotation of a matrix that is known to be orthogonal, unchecked, in the matrix's dtype."""
        found = object.__new__(cls)
        object.__setattr__(found, "values", values)
        return found

    @property
    def shape(self) -> tuple[int, int]:
        """Number of units, twice."""
        return len(self.values), len(self.values)

    @property
    def orthogonal(self) -> bool:
        """Whether the inverse is the transpose: always."""
        return True

    def carry(self, units: Tensor, axis: int = 0) -> Tensor:
        """Return ``Q W`` along the axis."""
        check_units(self, units, axis)
        return along(self.values, units, axis)

    def carry_readers(self, units: Tensor, axis: int = 0) -> Tensor:
        """Return ``W Qᵀ`` along the axis, which is the same sum: the inverse of a rotation is its transpose."""
        return self.carry(units, axis)

    def then(self, after: Coupling) -> Coupling:
        """Return this rotation followed by another coupling."""
        follow(self, after)
        if is_orthogonal(after):
            return Rotation(after.matrix().to(self.values.device) @ self.values)
        return Linear(self.values, self.values.T).then(after)

    def inverse(self) -> Rotation:
        """Return the transposed rotation."""
        return Rotation(self.values.T)

    def matrix(self) -> Tensor:
        """Return the matrix."""
        return self.values

    def __repr__(self) -> str:
        """Return one line."""
        return f"Rotation({len(self.values)} units)"


@dataclass(frozen=True, eq=False, repr=False)
class Linear:
    """Units of B mixed by an invertible matrix.

    Attributes:
        values: the matrix, float64, shape ``(size, size)``; gradients pass.
        undone: its inverse; computed where it is not given.

    Raises:
        ShapeError: it is not square, not finite or not invertible, or the inverse given is another matrix's.
    """

    values: Tensor
    undone: Tensor | None = None

    def __post_init__(self) -> None:
        """Check or compute the inverse."""
        values = square_matrix(self.values, "Linear")
        undone = _inverted(values) if self.undone is None else square_matrix(self.undone, "Inverse of Linear")
        if undone.shape != values.shape:
            raise ShapeError(
                f"Linear: expected an inverse of shape {tuple(values.shape)}, found {tuple(undone.shape)}."
            )
        error = _from_identity(values.detach() @ undone.detach())
        size = float(values.detach().norm() * undone.detach().norm()) if len(values) else 0.0
        if not error <= ROUNDING + 1e-15 * size:
            raise ShapeError(
                f"Linear: the product with its inverse differs from the identity by {error:.1e}; expected an "
                "invertible matrix that is not nearly singular, and its own inverse."
            )
        object.__setattr__(self, "values", values)
        object.__setattr__(self, "undone", undone)

    @classmethod
    def known(cls, values: Tensor, undone: Tensor) -> Linear:
        """Return the map of a matrix and what is known to be its inverse, unchecked, in the matrix's dtype."""
        found = object.__new__(cls)
        object.__setattr__(found, "values", values)
        object.__setattr__(found, "undone", undone)
        return found

    @property
    def shape(self) -> tuple[int, int]:
        """Number of units, twice."""
        return len(self.values), len(self.values)

    def carry(self, units: Tensor, axis: int = 0) -> Tensor:
        """Return ``M W`` along the axis."""
        check_units(self, units, axis)
        return along(self.values, units, axis)

    def carry_readers(self, units: Tensor, axis: int = 0) -> Tensor:
        """Return ``W M⁻¹`` along the axis."""
        check_units(self, units, axis)
        return along(self._back.T, units, axis)

    def then(self, after: Coupling) -> Coupling:
        """Return this map followed by another coupling."""
        follow(self, after)
        if isinstance(after, Plan):
            raise ShapeError(
                "Composing couplings: a transport plan averages units, so mixing them before has no mass of its own. "
                "Carry the tensors by one after the other."
            )
        return Linear(after.matrix() @ self.values, self._back @ after.inverse().matrix())

    def inverse(self) -> Linear:
        """Return the inverse map."""
        return Linear(self._back, self.values)

    def matrix(self) -> Tensor:
        """Return the matrix."""
        return self.values

    @property
    def _back(self) -> Tensor:
        assert self.undone is not None
        return self.undone

    def __repr__(self) -> str:
        """Return one line."""
        condition = float(torch.linalg.cond(self.values.detach())) if len(self.values) else 1.0
        return f"Linear({len(self.values)} units, condition number {condition:.3g})"


def _inverted(values: Tensor) -> Tensor:
    found, code = torch.linalg.inv_ex(values)
    if int(code) != 0:
        raise ShapeError(
            "Linear: expected an invertible matrix, found a singular one. Plan holds soft couplings."
        )
    return found


def _from_identity(product: Tensor) -> float:
    if not product.numel():
        return 0.0
    return float((product - torch.eye(len(product), dtype=product.dtype, device=product.device)).abs().max())
