r"""Lower bounds on the expected transport distance of two samples: a matching pays the nearest neighbour."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from scipy.special import gammaln
from scipy.stats import chi2, ncx2

from isthmus.errors import DataError
from isthmus.theory._inputs import FloatArray, read_array, read_number

__all__ = ["gaussian_log_density", "gaussian_volume_lower", "log_ball_volume", "nearest_neighbour_lower"]
__all__ += ["volume_lower"]


def log_ball_volume(dimension: float) -> float:
    """Return the logarithm of the volume of the unit ball of ``dimension`` axes."""
    d = read_number(dimension, "log_ball_volume: dimension", least=1)
    return d / 2 * math.log(math.pi) - float(gammaln(d / 2 + 1))


def gaussian_log_density(dimension: float) -> float:
    """Return the logarithm of the largest density of ``N(0, I)``."""
    return -dimension / 2 * math.log(2 * math.pi)


def volume_lower(
    log_sample_size: float,
    dimension: float,
    *,
    log_density: float | None = None,
    log_det: float = 0.0,
    power: float = 2.0,
) -> float:
    r"""Bound from below the expected cost of matching two samples of a law with bounded density.

    .. math:: \mathbb E \min_\Pi \tfrac1m \lVert W_A - \Pi W_B \rVert_\Sigma^p \ge \frac d{d+p}
        (m F_1 V_d)^{-p/d} \det(\Sigma)^{p/2d}

    **[P, Theorem 5.3]**, constants **[O]**. Assumptions: ``W_B`` has i.i.d. rows of density at most ``F_1``,
    independent of ``W_A``; full-rank metric.

    Args:
        log_sample_size: natural logarithm of the number of rows ``m``, at least 0.
        dimension: number of coordinates ``d``, at least 1.
        log_density: logarithm of ``F_1``; by default that of ``N(0, I)``.
        log_det: logarithm of the determinant of the metric; minus infinity is allowed and gives 0.
        power: exponent ``p`` of the distance, above 0.

    Returns:
        Mean over atoms of the distance to the power ``p``.

    Raises:
        DataError: an argument outside its range.

    Source:
        Theory, section 2.5.
    """
    log_m = read_number(log_sample_size, "volume_lower: log_sample_size", least=0)
    d = read_number(dimension, "volume_lower: dimension", least=1)
    p = read_number(power, "volume_lower: power", above=0)
    log_f = gaussian_log_density(d) if log_density is None else read_number(log_density, "log_density")
    if log_det == -math.inf:
        return 0.0
    log_radius = read_number(log_det, "log_det") / 2 - (log_m + log_f + log_ball_volume(d))
    return d / (d + p) * math.exp(p / d * log_radius)


def gaussian_volume_lower(log_sample_size: float, variances: Sequence[float] | FloatArray) -> float:
    r"""Return the best :func:`volume_lower` over projections of ``N(0, diag(variances))`` on axes.

    **[P, Theorem 5.3]**, constants **[O]**: projecting never raises a transport cost, so the bound of the
    ``k`` largest axes holds for every ``k``. Needed when the spectrum decays or the metric is nearly
    singular.

    Args:
        log_sample_size: natural logarithm of the number of rows of each sample, at least 0.
        variances: variance of every axis, at least 0, shape ``(dimension,)``; for ``N(0, I)`` rows in a
            metric, its eigenvalues.

    Returns:
        Mean over atoms of the squared distance, in units of the variances.

    Raises:
        DataError: an argument outside its range.

    Source:
        Theory, section 2.5.
    """
    axes = np.sort(read_array(variances, "gaussian_volume_lower: variances", ndim=1))[::-1]
    if (axes < 0).any():
        raise DataError(f"gaussian_volume_lower: expected variances of at least 0, found {axes[-1]}.")
    with np.errstate(divide="ignore"):
        log_det = np.cumsum(np.log(axes))
    return max(volume_lower(log_sample_size, k + 1, log_det=float(log_det[k])) for k in range(len(axes)))


def nearest_neighbour_lower(sample_size: float, dimension: float, *, nodes: int = 48) -> float:
    r"""Bound from below the expected squared distance of two samples of ``N(0, I)``, sharply.

    .. math:: \omega(m, d) \ge \mathbb E_x \int_0^\infty \bigl(1 - F_{\chi'^2_d(|x|^2)}(u)\bigr)^m \, du

    **[O]** The right side is the expected squared distance of a Gaussian point to the nearest of ``m``
    others, by the law of their squared distance (non-central chi-squared). Assumption: two independent
    samples of ``m`` i.i.d. rows. The outer expectation is a midpoint rule over the quantiles of
    :math:`|x|^2`, the inner integral Gauss-Legendre. The midpoint rule errs to the safe side, downwards: by
    0.5 % at 5 axes and 64 rows, by 4 % at 5 axes and ``1e9`` rows, by less in more dimensions (48 against
    2000 nodes).

    Args:
        sample_size: number of rows ``m``, at least 1.
        dimension: number of axes, above 0; need not be whole.
        nodes: quantile nodes of the outer expectation.

    Returns:
        Mean over atoms of the squared distance.

    Raises:
        DataError: an argument outside its range.

    Notes:
        Measured, the truth is 1.05 to 1.42 times this bound for five dimensions or more.

    Source:
        Theory, section 2.5.
    """
    m = read_number(sample_size, "nearest_neighbour_lower: sample_size", least=1)
    d = read_number(dimension, "nearest_neighbour_lower: dimension", above=0)
    centres = chi2.ppf((np.arange(nodes) + 0.5) / nodes, d)[:, None]
    # Up to `low` the integrand is 1, beyond `high` it is 0, both to 1e-14.
    low, high = (np.sqrt(ncx2.ppf(-np.expm1(-t / m), d, centres)) for t in (1e-14, 32.0))
    points, weights = np.polynomial.legendre.leggauss(64)
    radius = low + (high - low) * (points + 1) / 2
    survival = np.exp(m * np.log1p(-ncx2.cdf(radius**2, d, centres)))
    inner = low**2 + (high - low) * (radius * survival * weights).sum(1, keepdims=True)
    return float(inner.mean())
