r"""How fast clouds of neurons approach each other: empirical rates and the dimension behind them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.optimize import root_scalar

from isthmus.errors import DataError, ShapeError
from isthmus.theory._inputs import FloatArray, read_array, read_integer
from isthmus.theory._lower import nearest_neighbour_lower
from isthmus.transport import w2_matching

__all__ = ["DimensionFit", "RateCurve", "fit_dimension", "rate_curve", "rate_curve_of_rows"]

_WEIGHT_CAP = 200.0
"""Largest weight (mean over standard error) of one size in the fit."""

_ENOUGH_PAIRS = 4
"""Disjoint pairs of subsamples from which their spread is trusted."""

_DIMENSIONS = (0.5, 4096.0)
"""Range searched for the calibrated dimension."""

Sampler = Callable[[np.random.Generator, int], Any]


@dataclass(frozen=True, eq=False)
class RateCurve:
    """Mean squared transport distance between two samples, against their size.

    Attributes:
        sizes: rows ``m`` of each sample, rising, shape ``(points,)``.
        means: mean over replicates of the squared distance (mean over atoms), shape ``(points,)``.
        errors: standard error of each mean, shape ``(points,)``; NaN where it cannot be known.
        replicates: replicate pairs behind each mean.
        source: ``"sampler"`` (independent samples) or ``"rows"`` (disjoint subsamples of one matrix).
    """

    sizes: tuple[int, ...]
    means: FloatArray
    errors: FloatArray
    replicates: tuple[int, ...]
    source: str


@dataclass(frozen=True, eq=False)
class DimensionFit:
    """A power law through a rate curve, and the dimensions it stands for.

    Attributes:
        slope: of the log of the mean against the log of the size.
        slope_error: its standard error, from the standard errors of the means.
        local_slopes: slope between neighbouring sizes, shape ``(points - 1,)``.
        local_errors: their standard errors.
        dim_asymptotic: ``-2 / slope``, the law for large samples; too small at usual sizes (measured 4.9,
            7.4, 10.3, 15.2 for 5, 8, 12, 20 Gaussian axes and 64 to 1024 rows). Infinite for a slope of 0 or
            more.
        dim_calibrated: dimension whose Gaussian nearest-neighbour law has this slope on these sizes; for
            Gaussian-like clouds. NaN if not asked for, infinite if no dimension up to 4096 is as flat.
    """

    slope: float
    slope_error: float
    local_slopes: FloatArray
    local_errors: FloatArray
    dim_asymptotic: float
    dim_calibrated: float


def rate_curve(
    sampler: Sampler, sizes: Sequence[int], replicates: int | Sequence[int] = 10, *, seed: int = 0
) -> RateCurve:
    r"""Measure :math:`\mathbb E W_2^2` of two independent samples of a law at several sizes.

    **[L]** The slope to expect is :math:`-2/d` above four dimensions; at four there is an extra logarithm,
    below the worst case is :math:`m^{-1/2}`, and regular densities are faster (Fournier and Guillin 2015,
    Theorem 1).

    Args:
        sampler: ``sampler(rng, m)`` returns ``m`` i.i.d. rows, array or tensor of shape ``(m, features)``.
        sizes: strictly rising numbers of rows, at least 1; a geometric grid is best.
        replicates: pairs of samples per size, one number or one per size.
        seed: replicate ``r`` of size ``m`` draws from ``default_rng((seed, m, r, 0))`` and
            ``default_rng((seed, m, r, 1))``.

    Raises:
        ShapeError: the sampler returns another number of rows, or the numbers of replicates do not fit.
        DataError: sizes that do not rise, or unusable rows.

    Notes:
        One exact assignment per pair: cubic in the size, about 0.2 s at 1024 rows.

    Source:
        Theory, section 5.
    """
    grid, counts = _read_grid(sizes, replicates)

    def draw(m: int, r: int) -> float:
        pair = [read_array(sampler(np.random.default_rng((seed, m, r, i)), m), "sampler") for i in (0, 1)]
        if any(len(rows) != m for rows in pair):
            raise ShapeError(f"rate_curve: asked the sampler for {m} rows, found {[len(p) for p in pair]}.")
        return w2_matching(*pair)[0]

    values = [np.array([draw(m, r) for r in range(count)]) for m, count in zip(grid, counts, strict=True)]
    errors = np.array([_spread(v) / math.sqrt(len(v)) for v in values])
    return RateCurve(grid, np.array([v.mean() for v in values]), errors, counts, "sampler")


def rate_curve_of_rows(
    rows: Any, sizes: Sequence[int] | None = None, replicates: int | Sequence[int] = 10, *, seed: int = 0
) -> RateCurve:
    r"""Measure the squared distance of two disjoint random subsamples of the rows of one matrix.

    **[O]** For the neurons of one trained layer. The rows need not be independent; what is estimated is the
    rate at which parts of this very cloud approach each other. Random splits of the same ``M`` rows are
    dependent, so the standard error is Hoeffding's for an incomplete U-statistic, ``sd * sqrt(1/k + 1/R)``
    with ``k = floor(M / 2m)`` disjoint pairs and ``R`` splits: if the rows were i.i.d. draws of a law, it
    would cover the error about that law. Where fewer than four disjoint pairs exist, splits alone hide the
    variation between sets of rows; ``sd`` is then at least that of the largest size with four, shrunk by the
    square root of the ratio of sizes.

    Args:
        rows: one neuron a row, shape ``(M, features)``, array or tensor.
        sizes: strictly rising subsample sizes, at most ``M / 2``; by default powers of two from 8, or from 2
            for fewer than 32 rows.
        replicates: random splits per size, one number or one per size.
        seed: split ``r`` of size ``m`` is drawn from ``default_rng((seed, m, r))``.

    Raises:
        ShapeError: a size above half the number of rows, or fewer than four rows.
        DataError: sizes that do not rise, or unusable rows.

    Source:
        Theory, section 5; Hoeffding (1963), section 5, for the variance.
    """
    cloud = read_array(rows, "rate_curve_of_rows: rows")
    half = len(cloud) // 2
    if half < 2:
        raise ShapeError(f"rate_curve_of_rows: expected at least 4 rows, found {len(cloud)}.")
    if sizes is None:
        first = 3 if half >= 16 else 1
        sizes = [2**i for i in range(first, half.bit_length()) if 2**i <= half]
    grid, counts = _read_grid(sizes, replicates)
    if grid[-1] > half:
        raise ShapeError(
            f"rate_curve_of_rows: two disjoint subsamples of {grid[-1]} need {2 * grid[-1]} rows, "
            f"found {len(cloud)}. Use sizes up to {half}."
        )

    def split(m: int, r: int) -> float:
        order = np.random.default_rng((seed, m, r)).permutation(len(cloud))
        return w2_matching(cloud[order[:m]], cloud[order[m : 2 * m]])[0]

    values = [np.array([split(m, r) for r in range(count)]) for m, count in zip(grid, counts, strict=True)]
    pairs = [len(cloud) // (2 * m) for m in grid]
    spreads = [_spread(v) for v in values]
    trusted = [(sd, m) for sd, m, k in zip(spreads, grid, pairs, strict=True) if k >= _ENOUGH_PAIRS]
    if trusted:
        last, base = trusted[-1]
        spreads = [
            max(sd, last * math.sqrt(base / m)) if m > base else sd
            for sd, m in zip(spreads, grid, strict=True)
        ]
    errors = np.array(
        [sd * math.sqrt(1 / k + 1 / r) for sd, k, r in zip(spreads, pairs, counts, strict=True)]
    )
    return RateCurve(grid, np.array([v.mean() for v in values]), errors, counts, "rows")


def fit_dimension(curve: RateCurve, *, calibrate: bool = True) -> DimensionFit:
    r"""Fit a power law to a rate curve by weighted least squares and read off the dimension.

    **[O]** for the calibration. Weights are ``mean / error``, at most 200, on the log-log scale; the standard
    error is that of the unscaled covariance. A finite sample is flatter or steeper than :math:`-2/d`, so the
    slope is also compared with that of :func:`nearest_neighbour_lower` on the same sizes, whose error for
    Gaussian rows is at most 0.025.

    Args:
        curve: at least two sizes, every mean above 0.
        calibrate: also solve for the Gaussian dimension of the same slope.

    Raises:
        ShapeError: fewer than two sizes.
        DataError: a mean of 0: the two samples coincide.

    Source:
        Theory, section 5.
    """
    if len(curve.sizes) < 2:
        raise ShapeError(f"fit_dimension: expected at least two sizes, found {len(curve.sizes)}.")
    if (curve.means <= 0).any():
        raise DataError("fit_dimension: a mean distance is 0, so it has no logarithm. Are all rows equal?")
    log_m, log_w = np.log(np.array(curve.sizes)), np.log(curve.means)
    relative = np.where(np.isfinite(curve.errors), curve.errors, curve.means) / curve.means
    weights = 1 / np.maximum(relative, 1 / _WEIGHT_CAP)
    slope, slope_error = _weighted_slope(log_m, log_w, weights)
    steps = np.diff(log_m)
    return DimensionFit(
        slope=slope,
        slope_error=slope_error,
        local_slopes=np.diff(log_w) / steps,
        local_errors=np.hypot(relative[:-1], relative[1:]) / steps,
        dim_asymptotic=-2 / slope if slope < 0 else math.inf,
        dim_calibrated=_calibrated(curve.sizes, log_m, weights, slope) if calibrate else math.nan,
    )


def _calibrated(sizes: Sequence[int], log_m: FloatArray, weights: FloatArray, slope: float) -> float:
    def excess(log_d: float) -> float:
        reference = [nearest_neighbour_lower(m, math.exp(log_d)) for m in sizes]
        return _weighted_slope(log_m, np.log(reference), weights)[0] - slope

    low, high = (math.log(d) for d in _DIMENSIONS)
    if excess(high) <= 0:
        return math.inf
    if excess(low) >= 0:
        return _DIMENSIONS[0]
    return math.exp(root_scalar(excess, bracket=(low, high), xtol=1e-4).root)


def _weighted_slope(x: FloatArray, y: FloatArray, weights: FloatArray) -> tuple[float, float]:
    """Return the slope of weighted least squares (weights are inverse standard errors) and its error."""
    squares = weights**2
    centred = x - np.average(x, weights=squares)
    scale = float((squares * centred**2).sum())
    return float((squares * centred * y).sum()) / scale, 1 / math.sqrt(scale)


def _spread(values: FloatArray) -> float:
    """Standard deviation of the replicates, NaN for one."""
    return float(values.std(ddof=1)) if len(values) > 1 else math.nan


def _read_grid(
    sizes: Sequence[int], replicates: int | Sequence[int]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    grid = tuple(read_integer(m, "rate curve: sizes") for m in sizes)
    if not grid or any(b <= a for a, b in itertools.pairwise(grid)):
        raise DataError(f"Rate curve: expected strictly rising sizes, found {list(sizes)}.")
    listed = [replicates] * len(grid) if isinstance(replicates, int) else list(replicates)
    if len(listed) != len(grid):
        raise ShapeError(f"Rate curve: expected {len(grid)} numbers of replicates, found {len(listed)}.")
    return grid, tuple(read_integer(r, "rate curve: replicates") for r in listed)
