r"""Rows with few signal axes and small noise on the others, and concentration around the mean."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from isthmus.errors import ShapeError
from isthmus.theory._gaussian import isotropic_gaussian_upper
from isthmus.theory._inputs import FloatArray, read_integer, read_number
from isthmus.theory._lower import gaussian_volume_lower, nearest_neighbour_lower

__all__ = ["Interval", "concentration_tail", "low_dimension_bounds", "low_dimension_rows"]


class Interval(NamedTuple):
    """A proven interval: ``lower <= value <= upper``."""

    lower: float
    upper: float


def low_dimension_bounds(
    sample_size: float, signal: int, dimension: int, noise: float, *, signal_distance: float | None = None
) -> Interval:
    r"""Bound the expected squared distance of two samples with few signal axes and noise on the rest.

    .. math:: \omega_k(m) \le \mathbb E W_2^2 \le \omega_k(m) + 2 (D - k) \eta^2

    **[P, Theorem 5.4 and Assumption 8]**, constants **[O]**; the "until the scale of the noise" regime is
    that of Weed and Bach (2019) **[L]**. Assumption: ``D - k`` coordinates of variance :math:`\eta^2`
    independent of the ``k`` signal coordinates; without ``signal_distance`` all are Gaussian, the signal
    standard.

    Args:
        sample_size: number of rows ``m`` of each sample, at least 1.
        signal: number ``k`` of signal axes.
        dimension: number ``D`` of axes, at least ``k``.
        noise: standard deviation of the other axes, at least 0.
        signal_distance: :math:`\omega_k(m)` where it is known or measured, any signal law. By default the
            Gaussian bounds stand for it: nearest neighbour (or volume in ``D`` dimensions) below,
            :func:`isotropic_gaussian_upper` above.

    Raises:
        ShapeError: more signal axes than axes.
        DataError: an argument outside its range.

    Source:
        Theory, section 2.6.
    """
    m = read_number(sample_size, "low_dimension_bounds: sample_size", least=1)
    k, full = _read_axes(signal, dimension)
    floor = 2 * (full - k) * read_number(noise, "low_dimension_bounds: noise", least=0) ** 2
    if signal_distance is not None:
        lower = upper = read_number(signal_distance, "low_dimension_bounds: signal_distance", least=0)
    else:
        variances = np.append(np.ones(k), np.full(full - k, noise**2))
        volume = gaussian_volume_lower(math.log(m), variances)
        lower = max(nearest_neighbour_lower(m, k), volume)
        upper = isotropic_gaussian_upper(math.log(m), k)
    return Interval(lower, upper + floor)


def low_dimension_rows(
    rng: np.random.Generator, size: int, signal: int, dimension: int, noise: float
) -> FloatArray:
    """Draw ``size`` Gaussian rows: ``signal`` standard axes, then noise of standard deviation ``noise``.

    The law of **[P, Assumption 8]** with Gaussian axes, for :func:`low_dimension_bounds`.

    Raises:
        ShapeError: more signal axes than axes.

    Source:
        Theory, section 2.6.
    """
    k, full = _read_axes(signal, dimension)
    return np.hstack([rng.standard_normal((size, k)), noise * rng.standard_normal((size, full - k))])


def concentration_tail(excess: float, sample_size: float, *, largest_eigenvalue: float = 1.0) -> float:
    r"""Bound the probability that the distance of two Gaussian samples exceeds its mean by ``excess``.

    .. math:: P\bigl(W_{2,\Sigma} \ge \mathbb E W_{2,\Sigma} + u\bigr) \le e^{-m u^2 / 4
        \lambda_{\max}(\Sigma)}

    **[O]**, from Gaussian concentration **[L]**: the distance is :math:`\sqrt{2 \lambda_{\max} /
    m}`-Lipschitz in the two stacked samples. Assumption: independent rows ``N(0, I)``.

    Args:
        excess: ``u``, at least 0, unit of the distance (not squared).
        sample_size: number of rows ``m`` of each sample, at least 1.
        largest_eigenvalue: of the metric, above 0.

    Raises:
        DataError: an argument outside its range.

    Source:
        Theory, section 2.7.
    """
    u = read_number(excess, "concentration_tail: excess", least=0)
    m = read_number(sample_size, "concentration_tail: sample_size", least=1)
    top = read_number(largest_eigenvalue, "concentration_tail: largest_eigenvalue", above=0)
    return math.exp(-m * u**2 / (4 * top))


def _read_axes(signal: int, dimension: int) -> tuple[int, int]:
    k, full = read_integer(signal, "signal axes"), read_integer(dimension, "dimension")
    if k > full:
        raise ShapeError(f"Low dimension: expected at most {full} signal axes, found {k}.")
    return k, full
