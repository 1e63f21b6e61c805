"""What every coupling can do, and what their classes share."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from isthmus.errors import ShapeError

__all__ = ["Coupling", "along", "check_units", "follow", "is_orthogonal", "square_matrix"]


@runtime_checkable
class Coupling(Protocol):
    r"""How the units of B are expressed in the units of A: a matrix :math:`M` and how tensors are carried by it.

    A layer that *holds* the units, :math:`h = W x + b`, becomes :math:`M W x + M b`; a layer that *reads* them,
    :math:`V h`, becomes :math:`V M^{-1} h`. Together they change nothing. Values are immutable; all tensors keep
    the dtype and device of what is carried.
    """

    @property
    def shape(self) -> tuple[int, int]:
        """Number of units of A and of B."""
        ...

    def carry(self, units: Tensor, axis: int = 0) -> Tensor:
        """Return a tensor that holds the units, ``M W`` along ``axis``: length of the axis from B's to A's units."""
        ...

    def carry_readers(self, units: Tensor, axis: int = 0) -> Tensor:
        """Return a tensor that reads the units, ``W M⁻¹`` along ``axis``: length of the axis from B's to A's units."""
        ...

    def then(self, after: Coupling) -> Coupling:
        """Return the coupling equal to this one followed by another: ``after.matrix() @ self.matrix()``."""
        ...

    def inverse(self) -> Coupling:
        """Return the coupling that undoes this one.

        Raises:
            ShapeError: nothing undoes it.
        """
        ...

    def matrix(self) -> Tensor:
        """Return ``M``, float64, shape :attr:`shape`: for gradients and display, never on a fast path."""
        ...


def is_orthogonal(coupling: Coupling) -> bool:
    """Return whether a coupling is its own inverse transposed, so that holders and readers move alike and keep norms.

    Permutations, signs and rotations are, and what nests them. A class of one's own may say so by a property
    ``orthogonal``; without, nothing is assumed.
    """
    return bool(getattr(coupling, "orthogonal", False))


def check_units(coupling: Coupling, units: Tensor, axis: int) -> None:
    """Check that an axis lists B's units.

    Raises:
        ShapeError: it has another length, or does not exist.
    """
    if not -units.ndim <= axis < units.ndim:
        raise ShapeError(f"Carrying units: expected axis {axis} to exist, found shape {tuple(units.shape)}.")
    if units.shape[axis] != coupling.shape[1]:
        raise ShapeError(
            f"Carrying units: expected {coupling.shape[1]} units on axis {axis}, found {units.shape[axis]} in shape "
            f"{tuple(units.shape)}."
        )


def follow(first: Coupling, after: Coupling) -> None:
    """Check that a coupling can follow another.

    Raises:
        ShapeError: it expects another number of units than the first one yields.
    """
    if after.shape[1] != first.shape[0]:
        raise ShapeError(
            f"Composing couplings: the first yields {first.shape[0]} units, the second expects {after.shape[1]}."
        )


def along(matrix: Tensor, units: Tensor, axis: int) -> Tensor:
    """Return ``matrix @ units`` along an axis, in the units' dtype, computed in the wider of both."""
    wide = torch.promote_types(matrix.dtype, units.dtype) if units.is_floating_point() else matrix.dtype
    front = units.movedim(axis, 0)
    product = matrix.to(device=units.device, dtype=wide) @ front.to(wide).reshape(len(front), -1)
    found = product.reshape(len(matrix), *front.shape[1:]).movedim(0, axis)
    return found.to(units.dtype) if units.is_floating_point() else found


def square_matrix(matrix: Tensor, name: str) -> Tensor:
    """Return a matrix as float64, after a look at its shape and entries; gradients pass.

    Raises:
        ShapeError: it is not square, or not finite.
    """
    found = torch.as_tensor(matrix)
    if found.ndim != 2 or found.shape[0] != found.shape[1]:
        raise ShapeError(f"{name}: expected a square matrix, found shape {tuple(found.shape)}.")
    if found.is_complex() or not bool(torch.isfinite(found).all()):
        raise ShapeError(f"{name}: expected finite real numbers, found NaN, infinite or complex entries.")
    return found.double()
