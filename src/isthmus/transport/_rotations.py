"""Rotations of largest gain: the orthogonal Procrustes problem, also with a fixed mean, and in planes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from isthmus.errors import ShapeError
from isthmus.transport._inputs import as_float64_matrix

__all__ = ["plane_rotations", "procrustes"]

_NOTHING = 2.0**-44
"""Singular values up to this, relative to the largest and for each unit, are rounding of a gain that is singular."""


def procrustes(gain: Any, *, fix_mean: bool = False) -> Tensor:
    r"""Return the orthogonal matrix of largest inner product with a gain.

    .. math:: \max_{Q Q^\top = 1} \; \langle Q, G \rangle = \sum_k \sigma_k(G), \qquad
              G = U S V^\top \;\Rightarrow\; Q = U V^\top

    With ``fix_mean`` only matrices with :math:`Q \mathbf 1 = \mathbf 1` count: the symmetries of what subtracts the
    mean. They rotate the complement of :math:`\mathbf 1`, so the gain is first restricted to it.

    Reflections count: the determinant may be :math:`-1`. Where the gain is singular, many matrices are best, and the
    nearest to the identity among them is taken, so that directions without a gain stay where they are.

    Args:
        gain: rows are units of A, columns units of B, shape ``(units, units)``; tensor or numpy array.
        fix_mean: whether the mean of the units is to stay.

    Returns:
        Float64, shape ``(units, units)``, on the device of the gain.

    Raises:
        ShapeError: not a square matrix.
        DataError: NaN or infinite entries.

    Notes:
        O(units³). For a gain of full rank the answer is unique.

    Source:
        Schönemann 1966; the restriction to a fixed mean and the choice among equals are ours.

    Example:
        >>> procrustes(torch.tensor([[0.0, 2.0], [3.0, 0.0]]))
        tensor([[0., 1.],
                [1., 0.]], dtype=torch.float64)
    """
    values = _square(gain, "procrustes")
    if fix_mean and len(values):
        frame = _complement_of_ones(len(values), values.device)
        inside = _nearest(frame.T @ values @ frame)
        return frame @ inside @ frame.T + 1 / len(values)
    return _nearest(values)


def plane_rotations(gain: Any, planes: Any) -> Tensor:
    r"""Return the rotation of largest gain among those that turn each plane of two units in itself.

    A plane with the units :math:`i, j` and the gain :math:`g` turns by :math:`\theta`, which adds
    :math:`(g_{ii} + g_{jj}) \cos\theta + (g_{ji} - g_{ij}) \sin\theta`; the best angle is the argument of these two
    numbers. Such rotations, and no reflections, commute with a rotary embedding of the same planes.

    Args:
        gain: rows are units of A, columns units of B, shape ``(units, units)``.
        planes: the two units of each plane, whole numbers, shape ``(planes, 2)``, none twice. Other units stay.

    Returns:
        Float64, shape ``(units, units)``; a plane without a gain stays.

    Raises:
        ShapeError: not a square matrix, or planes that share units or name units that are not there.
        DataError: NaN or infinite entries.

    Example:
        >>> plane_rotations([[0.0, -1.0], [1.0, 0.0]], [[0, 1]]).round(decimals=6)
        tensor([[ 0., -1.],
                [ 1.,  0.]], dtype=torch.float64)
    """
    values = _square(gain, "plane_rotations")
    pairs = torch.as_tensor(planes, dtype=torch.int64, device=values.device).reshape(-1, 2)
    units = pairs.flatten()
    inside = bool(((units >= 0) & (units < len(values))).all())
    if not inside or len(units.unique()) < len(units):
        raise ShapeError(
            f"plane_rotations: expected planes of different units below {len(values)}, found {pairs.tolist()}."
        )
    i, j = pairs.unbind(1)
    # Adding zero turns -0.0 into 0.0, whose argument is no half turn.
    even, odd = values[i, i] + values[j, j] + 0.0, values[j, i] - values[i, j] + 0.0
    angle = torch.atan2(odd, even)
    found = torch.eye(len(values), dtype=torch.float64, device=values.device)
    found[i, i], found[j, j] = angle.cos(), angle.cos()
    found[j, i], found[i, j] = angle.sin(), -angle.sin()
    return found


def _square(gain: Any, name: str) -> Tensor:
    values = as_float64_matrix(gain, f"{name}: gain")
    if values.shape[0] != values.shape[1]:
        raise ShapeError(
            f"{name}: expected a square gain, as many units of A as of B, found shape {tuple(values.shape)}."
        )
    return values


def _nearest(gain: Tensor) -> Tensor:
    """Return the orthogonal matrix of largest gain, where there are several the one nearest to the identity."""
    left, sizes, right = torch.linalg.svd(gain)
    rank = _rank(sizes)
    if rank == len(sizes):
        return left @ right
    # On what the gain says nothing about, the trace decides: U₀ W V₀ᵀ with W the nearest to U₀ᵀ V₀.
    rest_left, rest_right = left[:, rank:], right[rank:]
    inner_left, _, inner_right = torch.linalg.svd(rest_left.T @ rest_right.T)
    return left[:, :rank] @ right[:rank] + rest_left @ inner_left @ inner_right @ rest_right


def _rank(sizes: Tensor) -> int:
    if not len(sizes):
        return 0
    return int((sizes > _NOTHING * len(sizes) * sizes[0]).sum())


def _complement_of_ones(size: int, device: torch.device) -> Tensor:
    """Return an orthonormal basis of the vectors whose entries sum to zero, shape ``(size, size - 1)`` (Helmert)."""
    k = torch.arange(1, size, dtype=torch.float64, device=device)
    rows = torch.arange(size, device=device)[:, None]
    steps = torch.arange(1, size, device=device)
    basis = torch.where(rows < steps, 1.0, 0.0).double()
    basis = torch.where(rows == steps, -k, basis)
    return basis / (k * (k + 1)).sqrt()
