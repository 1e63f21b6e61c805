r"""Number of directions that a cloud fills: approximate dimension, stable rank, entropy rank.

All three are functions of the eigenvalues :math:`\lambda` of a second moment ``S`` and are free of scale.
They come in two forms: from a factor ``X`` (``S = X.T @ X`` or ``X @ X.T``: both have the same non-zero
eigenvalues, and the smaller one is built) and, with the ending ``_of_moment``, from ``S`` itself. They
satisfy ``stable rank <= approximate dimension <= entropy rank <= rank``.

Source: Theory, section 8; Ferbach et al. (2024), section 6.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from isthmus.errors import DataError, ShapeError
from isthmus.transport._inputs import as_float64_matrix

__all__ = [
    "approximate_dimension",
    "approximate_dimension_of_moment",
    "approximate_dimension_unbiased",
    "entropy_rank",
    "entropy_rank_of_moment",
    "ranks_of_moment",
    "stable_rank",
    "stable_rank_of_moment",
]

_SYMMETRY_TOLERANCE = 1e-6
_NAN = float("nan")


def approximate_dimension(matrix: Any, *, center: bool = False) -> float:
    r"""Return :math:`\mathrm{tr}(S)^2 / \mathrm{tr}(S^2)` of a factor; see the module for what ``S`` is.

    **[P, section 6]**. No assumption on the matrix.

    Args:
        matrix: units by features, or samples by units: shape ``(rows, columns)``, tensor or numpy array.
        center: subtract the mean row first. The paper does not; on activations the uncentred value mostly
            measures the mean direction.

    Returns:
        A number between 1 and the rank; NaN when the (centred) matrix is zero.

    Raises:
        ShapeError: not a matrix, or an empty one.
        DataError: NaN or infinite entries.
    """
    return _dimension(_gram(matrix, center=center))


def approximate_dimension_of_moment(second_moment: Any) -> float:
    r"""Return :math:`\mathrm{tr}(S)^2 / \lVert S \rVert_F^2` of a second moment or covariance ``S``.

    Args:
        second_moment: symmetric, shape ``(units, units)``, in any scale; tensor or numpy array.

    Returns:
        A number between 1 and the rank; NaN for the zero matrix.

    Raises:
        ShapeError: not square, or empty.
        DataError: not symmetric, or NaN or infinite entries.
    """
    return _dimension(_read_moment(second_moment))


def approximate_dimension_unbiased(samples: Any) -> float:
    r"""Estimate the uncentred approximate dimension of the law behind i.i.d. samples.

    .. math:: \frac{(\sum_i k_{ii})^2 - \sum_i k_{ii}^2}{\sum_{i \ne j} k_{ij}^2}, \qquad K = H H^\top

    The plug-in value of :func:`approximate_dimension` is biased low with few samples; numerator and
    denominator here are each unbiased (U-statistics). **[O]**, Theory, section 8.3.

    Args:
        samples: :math:`H`, shape ``(samples, units)``, at least two rows; tensor or numpy array.

    Returns:
        The estimate; NaN when all samples are orthogonal to one another (or zero).

    Raises:
        ShapeError: not a matrix, empty, or fewer than two samples.
        DataError: NaN or infinite entries.
    """
    rows = _scaled(_read(samples))
    if len(rows) < 2:
        raise ShapeError(f"Unbiased dimension: expected at least 2 samples, found {len(rows)}.")
    norms = rows.square().sum(1)
    self_terms = float(norms.square().sum())
    pair_terms = float(_smaller_product(rows).square().sum()) - self_terms
    if pair_terms <= len(rows) * torch.finfo(torch.float64).eps * self_terms:
        return _NAN
    return (float(norms.sum()) ** 2 - self_terms) / pair_terms


def stable_rank(matrix: Any, *, center: bool = False) -> float:
    r"""Return :math:`\lVert X \rVert_F^2 / \lVert X \rVert_2^2` of a factor; NaN when it is zero.

    **[L]**. Arguments and errors as :func:`approximate_dimension`.
    """
    moment = _gram(matrix, center=center)
    return _stable(moment, _spectrum(moment))


def stable_rank_of_moment(second_moment: Any) -> float:
    r"""Return :math:`\mathrm{tr}(S) / \lambda_{\max}(S)`; NaN for the zero matrix.

    Arguments and errors as :func:`approximate_dimension_of_moment`.
    """
    moment = _read_moment(second_moment)
    return _stable(moment, _spectrum(moment))


def entropy_rank(matrix: Any, *, center: bool = False) -> float:
    r"""Return :math:`\exp(-\sum p \log p)`, :math:`p = \lambda / \mathrm{tr}(S)`; NaN for a zero factor.

    **[L]**. Arguments and errors as :func:`approximate_dimension`.
    """
    return _entropy(_spectrum(_gram(matrix, center=center)))


def entropy_rank_of_moment(second_moment: Any) -> float:
    """Return the entropy rank of a second moment; NaN for the zero matrix.

    Arguments and errors as :func:`approximate_dimension_of_moment`.
    """
    return _entropy(_spectrum(_read_moment(second_moment)))


def ranks_of_moment(second_moment: Any) -> tuple[float, float]:
    """Return stable rank and entropy rank of a second moment from one computation of its eigenvalues.

    Arguments and errors as :func:`approximate_dimension_of_moment`.
    """
    moment = _read_moment(second_moment)
    eigenvalues = _spectrum(moment)
    return _stable(moment, eigenvalues), _entropy(eigenvalues)


def _dimension(moment: Tensor) -> float:
    squares = float(moment.square().sum())
    return float(moment.trace()) ** 2 / squares if squares > 0.0 else _NAN


def _spectrum(moment: Tensor) -> Tensor:
    """Return the eigenvalues, rising."""
    return torch.linalg.eigvalsh(moment)


def _stable(moment: Tensor, eigenvalues: Tensor) -> float:
    largest = float(eigenvalues[-1])
    return float(moment.trace()) / largest if largest > 0.0 else _NAN


def _entropy(eigenvalues: Tensor) -> float:
    eigenvalues = eigenvalues.clamp(min=0.0)
    total = float(eigenvalues.sum())
    if total == 0.0:
        return _NAN
    shares = eigenvalues / total
    return float(torch.exp(torch.special.entr(shares).sum()))


def _read(matrix: Any) -> Tensor:
    values = as_float64_matrix(matrix, "dimension: matrix")
    if values.numel() == 0:
        raise ShapeError(f"Dimension: expected a non-empty matrix, found shape {tuple(values.shape)}.")
    return values


def _scaled(values: Tensor) -> Tensor:
    """Divide by the largest absolute entry, so that no square overflows or vanishes; zero stays zero."""
    largest = values.abs().max()
    return values / largest if float(largest) > 0.0 else values


def _gram(matrix: Any, *, center: bool = False) -> Tensor:
    """Return the smaller Gram matrix, up to scale."""
    values = _scaled(_read(matrix))
    if center:
        values = values - values.mean(0, keepdim=True)
        # Equal rows leave only the rounding of their mean, which is no direction.
        if float(values.abs().max()) <= 4 * torch.finfo(torch.float64).eps:
            values = torch.zeros_like(values)
        values = _scaled(values)
    return _scaled(_smaller_product(values))


def _smaller_product(values: Tensor) -> Tensor:
    """Return whichever of ``X @ X.T`` and ``X.T @ X`` is smaller: they share their non-zero eigenvalues."""
    return values @ values.T if values.shape[0] < values.shape[1] else values.T @ values


def _read_moment(second_moment: Any) -> Tensor:
    moment = _scaled(_read(second_moment))
    if moment.shape[0] != moment.shape[1]:
        raise ShapeError(
            f"Dimension: expected a square second moment, found shape {tuple(moment.shape)}. "
            "For a factor use the function without '_of_moment'."
        )
    if float((moment - moment.T).abs().max()) > _SYMMETRY_TOLERANCE:
        raise DataError("Dimension: the second moment is not symmetric. For a factor drop '_of_moment'.")
    return moment
