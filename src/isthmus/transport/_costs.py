r"""Ground costs between clouds of units, and their optimal matching.

Source: Theory, sections 1.1 and 1.3; Birkhoff (1946): with equal masses an optimal plan is a permutation.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from isthmus.errors import DataError, ShapeError
from isthmus.transport._assignment import assign
from isthmus.transport._inputs import as_float64_matrix

__all__ = ["ground_cost", "w2_matching"]

_SYMMETRY_TOLERANCE = 1e-6
"""Largest asymmetry of a metric, relative to its largest entry, taken for float32 rounding."""


def ground_cost(a: Any, b: Any, sigma: Any = None) -> Tensor:
    r"""Return all squared distances between two clouds in a positive semidefinite metric.

    .. math:: C_{ij} = (a_i - b_j)^\top \Sigma\, (a_i - b_j), \qquad \Sigma = I \text{ by default}

    Args:
        a: cloud of A, one unit a row, shape ``(units_a, features)``; tensor or numpy array.
        b: cloud of B, shape ``(units_b, features)``.
        sigma: metric, symmetric positive semidefinite, shape ``(features, features)``. It may be singular:
            the cost is then a pseudo-metric.

    Returns:
        Float64, shape ``(units_a, units_b)``, on the device of ``a``; rounding below zero is clipped.

    Raises:
        ShapeError: the numbers of features disagree.
        DataError: NaN or infinite entries, or an asymmetric metric.

    Notes:
        O(units_a · units_b · features). Both clouds are first moved to a common centre, which leaves the cost
        as it is and avoids the cancellation of large means.
    """
    a, b, sigma = _read_clouds(a, b, sigma)
    if len(a) + len(b) == 0:
        return a.new_zeros((0, 0))
    centre = (a.sum(0) + b.sum(0)) / (len(a) + len(b))
    a, b = a - centre, b - centre
    a_metric, b_metric = (a, b) if sigma is None else (a @ sigma, b @ sigma)
    squares_a, squares_b = (a_metric * a).sum(1), (b_metric * b).sum(1)
    cost = torch.addmm(squares_a[:, None] + squares_b[None, :], a_metric, b.T, alpha=-2.0)
    return cost.clamp_(min=0.0)


def w2_matching(a: Any, b: Any, sigma: Any = None, features: Any = None) -> tuple[float, Tensor]:
    r"""Match two clouds of equally many units at the least mean squared distance.

    .. math::
        W_{2,\Sigma}^2 = \min_{\pi \in S_m} \frac1m \sum_i \lVert a_i - b_{\pi(i)} \rVert_\Sigma^2

    The value is the *mean over atoms*, neither a sum nor divided by the number of features. **[P, Lemma B.3; Birkhoff
    1946]**: a permutation is an optimal transport plan. No assumption on the clouds.

    Args:
        a: cloud of A, shape ``(units, features)``; tensor or numpy array.
        b: cloud of B, same shape.
        sigma: metric, symmetric positive semidefinite, shape ``(features, features)``.
        features: layer inputs, shape ``(samples, features)``, standing for the uncentred second moment
            ``features.T @ features / samples`` as metric, which is only formed when that is the cheaper way.
            Give this or ``sigma``, not both.

    Returns:
        The value, in squared units of the clouds, and the permutation (int64, shape ``(units,)``, on the
        device of ``a``): ``b[permutation]`` lies on ``a``. With a singular metric or repeated atoms several
        permutations reach the value; compare values, not permutations.

    Raises:
        ShapeError: the clouds differ in shape, are empty, or do not fit the metric.
        DataError: NaN or infinite entries, an asymmetric metric, or both ``sigma`` and ``features``.

    Example:
        >>> value, permutation = w2_matching([[0.0], [3.0]], [[3.0], [1.0]])
        >>> value, permutation.tolist()
        (0.5, [1, 0])

    Source:
        Ferbach et al. (2024), Lemma B.3 and section 6.
    """
    if features is not None:
        if sigma is not None:
            raise DataError(
                "w2_matching: expected sigma or features, found both. They are two ways to one metric."
            )
        a, b, sigma = _read_features(a, b, features)
    a, b, sigma = _read_clouds(a, b, sigma)
    if len(a) != len(b) or len(a) == 0:
        raise ShapeError(
            f"w2_matching: expected two clouds of equally many units (at least 1), "
            f"found {len(a)} and {len(b)}. For unequal widths assign a rectangular cost or use a plan."
        )
    permutation = assign(ground_cost(a, b, sigma)).columns
    difference = a - b[permutation]
    moved = difference if sigma is None else difference @ sigma
    value = float((moved * difference).sum(1).clamp(min=0.0).mean())
    return value, permutation


def _read_clouds(a: Any, b: Any, sigma: Any) -> tuple[Tensor, Tensor, Tensor | None]:
    a = as_float64_matrix(a, "cloud a")
    b = as_float64_matrix(b, "cloud b").to(a.device)
    if a.shape[1] != b.shape[1]:
        raise ShapeError(
            f"Ground cost: cloud a has {a.shape[1]} features, cloud b has {b.shape[1]}. "
            "Both clouds must live in the same space."
        )
    if sigma is None:
        return a, b, None
    sigma = as_float64_matrix(sigma, "metric sigma").to(a.device)
    if sigma.shape != (a.shape[1], a.shape[1]):
        raise ShapeError(
            f"Ground cost: expected a metric of shape {(a.shape[1], a.shape[1])}, "
            f"found {tuple(sigma.shape)}. Append a constant 1 to the layer input when biases are matched."
        )
    scale = float(sigma.abs().max()) if sigma.numel() else 0.0
    if scale > 0.0 and float((sigma - sigma.T).abs().max()) > _SYMMETRY_TOLERANCE * scale:
        raise DataError(
            "Ground cost: the metric sigma is not symmetric. Pass a second moment or a covariance."
        )
    return a, b, sigma


def _read_features(a: Any, b: Any, features: Any) -> tuple[Tensor, Tensor, Tensor | None]:
    """Turn ``features`` into a metric, or with few samples into projected clouds that need none."""
    a, b = as_float64_matrix(a, "cloud a"), as_float64_matrix(b, "cloud b")
    inputs = as_float64_matrix(features, "features").to(a.device)
    samples, width = inputs.shape
    if samples == 0 or width != a.shape[1] or width != b.shape[1]:
        raise ShapeError(
            f"w2_matching: expected features of shape (samples >= 1, {a.shape[1]}), "
            f"found {tuple(inputs.shape)}. One row is one layer input."
        )
    if samples < width:
        root = (inputs / samples**0.5).T
        return a @ root, b.to(a.device) @ root, None
    return a, b, inputs.T @ inputs / samples
