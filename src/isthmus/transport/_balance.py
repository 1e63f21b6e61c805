"""Balancing: the change of units in which what holds them and what reads them have the same inner products."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from isthmus.errors import DataError, ShapeError
from isthmus.transport._inputs import as_float64_matrix

__all__ = ["balancing"]

_ROUNDING = 1e-12
"""Eigenvalues of inner products below this share of the largest one are rounding."""


def balancing(holders: Any, readers: Any, *, most: float = 100.0) -> Tensor:
    r"""Return the symmetric positive map of units that balances the two factors of a circuit.

    A circuit :math:`R H` (outputs of a head by its values, attention scores by queries and keys) is unchanged by
    :math:`H \to T H, R \to R T^{-1}`. There is one symmetric positive :math:`T` under which both factors have the same
    inner products, :math:`T H H^\top T = T^{-1} R^\top R\, T^{-1}`: with :math:`N = H H^\top` and :math:`M = R^\top R`,

    .. math:: T^2 = N^{-1} \,\#\, M = N^{-1/2} \bigl(N^{1/2} M N^{1/2}\bigr)^{1/2} N^{-1/2} .

    The balanced factors are those of the circuit's singular value decomposition, up to a rotation of the units, which
    :func:`procrustes` finds; they are also the factors of least norm.

    Args:
        holders: inner products :math:`N` of what holds the units, shape ``(units, units)``.
        readers: inner products :math:`M` of what reads them, same shape.
        most: largest factor between a direction's change of size and that of the median direction, up or down.
            Directions in which a factor all but vanishes are balanced as far as that allows.

    Returns:
        :math:`T`, float64, symmetric; the identity where one of the factors is zero.

    Raises:
        ShapeError: no square matrices of one shape.
        DataError: NaN or infinite entries, or a bound below one.

    Source:
        Bhatia 2007, chapter 4 (the geometric mean of positive matrices); balanced factorisations are those of the
        circuit's singular value decomposition.
    """
    own, other = (
        as_float64_matrix(holders, "balancing: holders"),
        as_float64_matrix(readers, "balancing: readers"),
    )
    if own.shape != other.shape or own.shape[0] != own.shape[1]:
        raise ShapeError(
            "balancing: expected inner products of the same units with one another, found shapes "
            f"{tuple(own.shape)} and {tuple(other.shape)}."
        )
    if not most >= 1:
        raise DataError(f"balancing: expected a largest factor of at least 1, found {most}.")
    if not len(own) or not bool(own.any()) or not bool(other.any()):
        return torch.eye(len(own), dtype=torch.float64, device=own.device)
    root, back = _roots(own)
    middle, _ = _roots(root @ _positive(other) @ root)
    squared = back @ middle @ back
    sizes, axes = torch.linalg.eigh(0.5 * (squared + squared.T))
    # Around the median, so that one direction that vanishes does not decide over all others.
    centre = float(sizes.median())
    return (axes * sizes.clamp(centre / most**2, centre * most**2).sqrt()) @ axes.T


def _positive(gram: Tensor) -> Tensor:
    sizes, axes = _axes(gram)
    return (axes * sizes) @ axes.T


def _roots(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Return the square root of a positive matrix and its inverse."""
    sizes, axes = _axes(gram)
    return (axes * sizes.sqrt()) @ axes.T, (axes / sizes.sqrt()) @ axes.T


def _axes(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Return eigenvalues and axes; what is rounding beside the largest is raised, so that it has an inverse."""
    sizes, axes = torch.linalg.eigh(0.5 * (gram + gram.T))
    return sizes.clamp(min=_ROUNDING * float(sizes[-1])), axes
