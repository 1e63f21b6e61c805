r"""Widths that the bounds ask for: two layers, then layer upon layer. Everything in log space.

A *tolerance per dimension* :math:`\tau^2` is a value of the expected squared transport distance between two
samples of ``m`` neurons in dimension ``d``, divided by ``d``.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

from isthmus.errors import DataError
from isthmus.theory._closed_form import closed_form_log_size, halvings_per_axis
from isthmus.theory._gaussian import isotropic_log_size
from isthmus.theory._inputs import read_integer, read_number
from isthmus.theory._lower import gaussian_log_density, log_ball_volume
from isthmus.theory._subgaussian import sub_gaussian_upper
from isthmus.theory._tower import Tower

__all__ = ["LowDimensionWidth", "entezari_log10_width", "layer_tolerance", "log_width_low_dimension"]
__all__ += ["log_width_lower", "log_width_sub_gaussian", "log_width_upper", "width_recursion"]

_EXACT_DIMENSION = 2000
_FINEST = 1e-24
"""Smallest tolerance per dimension; the quantile cells resolve a few times ``1e-26``."""


class LowDimensionWidth(NamedTuple):
    """A sufficient width for rows of low intrinsic dimension.

    Attributes:
        log_width: natural logarithm of the width.
        regime: ``"signal"`` when matching the signal axes alone is enough, ``"full"`` when the noise forbids
            that, or when matching all axes needs fewer neurons.
    """

    log_width: float
    regime: Literal["signal", "full"]


def log_width_upper(dimension: float, tolerance: float) -> float:
    r"""Return a natural log width that suffices for Gaussian rows: two such samples match within tolerance.

    The smallest :math:`\log m` at which the upper bound on :math:`\omega(m, d) / d` is at most the tolerance.
    **[O]** Assumption: independent rows ``N(0, I)``, both networks independent.

    Args:
        dimension: number of axes ``d``, at least 1; whole, but of any size. Up to 2000 the exact sums of
            :func:`isotropic_gaussian_upper` are inverted, beyond that :func:`closed_form_upper`, which at the
            switch asks for 7 % more digits at tolerance ``1e-3``, 10 % at ``1e-2``, 17 % at ``0.1``.
        tolerance: :math:`\tau^2`, per dimension, at least ``1e-24``; from 2 on one neuron is enough.

    Returns:
        Natural logarithm of the width, at least 0.

    Raises:
        DataError: an argument outside its range.

    Source:
        Theory, sections 2.2, 2.3 and 4.2.
    """
    d = read_number(dimension, "log_width_upper: dimension", least=1)
    tau2 = _read_tolerance(tolerance)
    if d <= _EXACT_DIMENSION:
        whole = read_integer(dimension, "log_width_upper: dimension")
        return isotropic_log_size(whole, whole * tau2)
    return closed_form_log_size(d, tau2)


def log_width_lower(
    dimension: float, tolerance: float, *, log_density: float | None = None, log_det: float = 0.0
) -> float:
    r"""Return the natural log width that is necessary for the matching error to be within tolerance.

    .. math:: \log m \ge \tfrac d2 \log \tfrac1{(d+2) \tau^2} - \log(F_1 V_d) + \tfrac12 \log \det \Sigma

    **[P, Theorem 5.3]**, constants **[O]**; assumptions of :func:`volume_lower`. It bounds the matching
    error, not the error of linear mode connectivity itself.

    Args:
        dimension: number of axes ``d``, at least 1.
        tolerance: :math:`\tau^2`, per dimension, above 0.
        log_density: logarithm of the largest density of a row; by default that of ``N(0, I)``.
        log_det: logarithm of the determinant of the metric.

    Returns:
        Natural logarithm of the width, at least 0.

    Raises:
        DataError: an argument outside its range.

    Source:
        Theory, section 4.3.
    """
    d = read_number(dimension, "log_width_lower: dimension", least=1)
    tau2 = read_number(tolerance, "log_width_lower: tolerance", above=0)
    log_f = gaussian_log_density(d) if log_density is None else read_number(log_density, "log_density")
    log_m = read_number(log_det, "log_det") / 2 - d / 2 * math.log((d + 2) * tau2) - log_f
    return max(log_m - log_ball_volume(d), 0.0)


def log_width_sub_gaussian(dimension: float, tolerance: float, *, proxy: float = 1.0) -> float:
    r"""Return a natural log width that suffices for rows with sub-Gaussian coordinates.

    **[O]** for the constants, **[P, section 5.5]** for the shape; assumptions of :func:`sub_gaussian_upper`.

    Args:
        dimension: number of coordinates, at least 1; whole, but of any size.
        tolerance: :math:`\tau^2`, per dimension, at least ``1e-24``.
        proxy: variance proxy of the coordinates, above 0.

    Returns:
        Natural logarithm of the width, at least 0; the bound holds at the returned value.

    Raises:
        DataError: an argument outside its range.

    Source:
        Theory, section 4.4.
    """
    d = read_number(dimension, "log_width_sub_gaussian: dimension", least=1)
    tau2 = _read_tolerance(tolerance)

    def enough(log_m: float) -> bool:
        return sub_gaussian_upper(log_m, d, proxy=proxy) <= d * tau2

    low, high = 0.0, d
    if enough(low):
        return low
    while not enough(high):
        low, high = high, 2 * high
    while high - low > 1e-12 * high:
        middle = (low + high) / 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high


def log_width_low_dimension(signal: int, dimension: int, tolerance: float, noise: float) -> LowDimensionWidth:
    r"""Return a sufficient natural log width for Gaussian rows with few signal axes and noise on the rest.

    .. math:: w \le [\omega_k(m) + 2 (d - k) \eta^2] / k

    **[P, Theorem 5.4]**, constants **[O]**. Assumptions: ``k`` standard Gaussian axes and, independent of
    them, ``d - k`` of standard deviation :math:`\eta`, all divided by :math:`\sqrt k` so that the signal has
    total variance 1; every coordinate of the layer's input has second moment at most 1.

    Args:
        signal: number ``k`` of signal axes, at least 1.
        dimension: number ``d`` of axes, at least ``k``.
        tolerance: :math:`\tau^2` for ``w``, at least ``1e-24``.
        noise: :math:`\eta`, at least 0.

    Returns:
        The smaller of the widths for matching the signal alone (possible only while the noise floor is below
        the tolerance) and for matching all axes.

    Raises:
        DataError: an argument outside its range.

    Source:
        Theory, section 4.4.
    """
    k = read_integer(signal, "log_width_low_dimension: signal")
    d = read_integer(dimension, "log_width_low_dimension: dimension", least=k)
    tau2 = _read_tolerance(tolerance)
    eta2 = read_number(noise, "log_width_low_dimension: noise", least=0) ** 2
    # By isotropy (Theory, section 1.4) all axes together cost at most their mean variance times the standard.
    full = log_width_upper(d, tau2 * k / (k + (d - k) * eta2))
    left = tau2 - 2 * (d - k) * eta2 / k
    if left < _FINEST or log_width_upper(k, left) > full:
        return LowDimensionWidth(full, "full")
    return LowDimensionWidth(log_width_upper(k, left), "signal")


def layer_tolerance(depth: int, epsilon: float, *, delta: float | None = None, sup_t: bool = True) -> float:
    r"""Return the tolerance per layer, :math:`\tau`, that keeps the whole network within ``epsilon``.

    :math:`\tau = \varepsilon / 2L` at a fixed ``t`` and :math:`2 \varepsilon / (L (L + 5))` for the supremum
    over ``t``. **[O]**, from :func:`gaussian_lmc_bound`. With ``delta`` the error is within ``epsilon`` with
    probability at least ``1 - delta`` (Markov's inequality) instead of in the mean: at a fixed ``t`` the
    second moment is bounded and :math:`\varepsilon` shrinks by :math:`\sqrt\delta`; for the supremum, by
    ``delta``.

    Args:
        depth: number ``L`` of hidden layers, at least 1.
        epsilon: root-mean-square error allowed at the output, above 0.
        delta: probability of failure, in ``(0, 1]``, or None for the expectation.
        sup_t: bound the supremum over ``t`` rather than each ``t``.

    Raises:
        DataError: an argument outside its range.

    Source:
        Theory, sections 4.1 and 4.2.
    """
    layers = read_integer(depth, "layer_tolerance: depth")
    eps = read_number(epsilon, "layer_tolerance: epsilon", above=0)
    if delta is not None:
        failure = read_number(delta, "layer_tolerance: delta", above=0, most=1)
        eps *= failure if sup_t else math.sqrt(failure)
    return 2 * eps / (layers * (layers + 5)) if sup_t else eps / (2 * layers)


def width_recursion(
    input_dimension: int, depth: int, epsilon: float, *, delta: float | None = None, sup_t: bool = True
) -> list[Tower]:
    r"""Return effective widths, layer by layer, that suffice for linear mode connectivity.

    :math:`\tilde m_\ell` is the least width whose neurons match within the tolerance in dimension
    :math:`\tilde m_{\ell-1}`, so :math:`\tilde m_\ell \approx (T / \varepsilon)^{\tilde m_{\ell-1}}`. **[O]**
    with explicit base; the shape is **[P, Lemma 5.1 and Theorem 5.2]**. Assumptions: those of
    :func:`gaussian_lmc_bound` with unit variances; real widths are any multiples of the effective ones.

    Args:
        input_dimension: :math:`m_0`, at least 1.
        depth: number ``L`` of hidden layers, at least 1.
        epsilon: root-mean-square error allowed at the output, above 0, relative to outputs of order 1.
        delta: probability of failure, or None for the expectation; see :func:`layer_tolerance`.
        sup_t: bound the supremum over ``t`` (default) rather than each ``t``.

    Returns:
        One :class:`Tower` per hidden layer.

    Raises:
        DataError: an argument outside its range.

    Notes:
        From two powers of ten on, the digits per neuron no longer change the value at floating-point
        resolution, and only the height grows.

    Source:
        Theory, section 4.2.
    """
    tau2 = layer_tolerance(depth, epsilon, delta=delta, sup_t=sup_t) ** 2
    widths: list[Tower] = []
    previous = Tower(0, read_integer(input_dimension, "width_recursion: input_dimension"))
    for _ in range(depth):
        previous = _next_width(previous, tau2)
        widths.append(previous)
    return widths


def entezari_log10_width(dimension: int, epsilon: float) -> float:
    r"""Return the base-10 log of :math:`\varepsilon^{-(2 m_0 + 4)}`.

    **[L]** Entezari, Sedghi, Saukh and Neyshabur (2022), for a two-layer network at initialisation. Their
    hidden constant is unknown and taken as 1, so only exponents can be compared.

    Args:
        dimension: input dimension :math:`m_0`, at least 1.
        epsilon: error allowed, above 0.

    Raises:
        DataError: an argument outside its range.

    Source:
        Theory, section 4.3; Entezari et al. (2022), arXiv 2110.06296.
    """
    d = read_integer(dimension, "entezari_log10_width: dimension")
    eps = read_number(epsilon, "entezari_log10_width: epsilon", above=0)
    return -(2 * d + 4) * math.log10(eps)


def _read_tolerance(tolerance: float) -> float:
    tau2 = read_number(tolerance, "tolerance per dimension", above=0)
    if tau2 < _FINEST:
        raise DataError(
            f"Width: the tolerance {tolerance} per dimension is finer than the cells resolve ({_FINEST}). "
            "Allow a larger error."
        )
    return tau2


def _next_width(previous: Tower, tau2: float) -> Tower:
    digits = halvings_per_axis(tau2) * math.log10(2)
    if previous.height == 0:
        log10 = log_width_upper(previous.value, tau2) / math.log(10)
        return Tower(0, math.ceil(10**log10)) if log10 < 15 else Tower(1, log10)
    if digits == 0.0:
        return Tower(0, 1.0)
    if previous.height == 1:
        return Tower(2, previous.value + math.log10(digits))
    return Tower(previous.height + 1, previous.value)
