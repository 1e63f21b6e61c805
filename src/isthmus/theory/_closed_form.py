r"""The Gaussian upper bound in closed form: any sample size, any dimension from five on."""

from __future__ import annotations

import math

from isthmus.errors import DataError
from isthmus.theory._cells import C_CONSTANT, N_CONSTANT, V_CONSTANT
from isthmus.theory._inputs import read_number

__all__ = ["closed_form_log_size", "closed_form_upper", "halvings_per_axis"]

_ROUNDS = 60
_LOG2 = math.log(2)


def closed_form_upper(log_sample_size: float, dimension: float) -> float:
    r"""Bound the expected squared distance of two samples of ``N(0, I)`` for astronomic sizes.

    .. math:: \frac{\omega(m,d)}d \le 2 \Bigl[ (1 - \tfrac jd) V_K + \tfrac jd V_{K+1} \Bigr] +
        \frac{c_N / \sqrt 2 + c_C / d}{\sqrt m} \sum_{l < Kd+j} 4^{-\lfloor l/d \rfloor} 2^{l/2}, \qquad
        V_K = \min(1, c_v 4^{-K})

    for every :math:`K \ge 0` and :math:`0 \le j \le d`; the best of them is returned. **[O]** Constants
    :math:`c_v = 3.39`, :math:`c_N = 7.84`, :math:`c_C = 9.70`: their limits are analytic, the monotone
    approach from below was checked numerically for 14 levels. Assumption: as
    :func:`isotropic_gaussian_upper`.

    Args:
        log_sample_size: natural logarithm of the number of rows of each sample, at least 0.
        dimension: number of axes, at least 5; whole, but of any size.

    Returns:
        Mean over atoms of the squared distance (not divided by the dimension), at most ``2 * dimension``.

    Raises:
        DataError: a dimension below 5, where :func:`isotropic_gaussian_upper` is cheap and tighter.

    Source:
        Theory, section 2.3.
    """
    log_m = read_number(log_sample_size, "closed_form_upper: log_sample_size", least=0)
    return read_dimension(dimension) * _per_axis(log_m, float(dimension))


def closed_form_log_size(dimension: float, target: float) -> float:
    """Return the smallest ``log(m)`` at which :func:`closed_form_upper` is at most ``target`` per axis.

    Found by bisection, from above: the bound holds at the returned value.
    """
    d = read_dimension(dimension)
    if target >= 2.0:
        return 0.0
    high = d * _LOG2
    while _per_axis(high, d) > target:
        high *= 2
    low = 0.0
    while high - low > 1e-13 * high:
        middle = (low + high) / 2
        low, high = (low, middle) if _per_axis(middle, d) <= target else (middle, high)
    return high


def halvings_per_axis(target: float) -> float:
    r"""Return :math:`\lim_{d \to \infty} \log_2(m) / d` for a squared distance ``target`` per axis.

    In high dimension the separated pairs cost nothing up to ``2^L`` rows for ``L`` halvings, so this is the
    least number of halvings per axis whose remaining variance is at most half the target.
    """
    goal = target / 2
    if goal >= 1.0:
        return 0.0
    k = next(k for k in range(_ROUNDS * 10) if _left(k + 1) <= goal)
    return k + (_left(k) - goal) / (_left(k) - _left(k + 1))


def read_dimension(dimension: float) -> float:
    """Return the dimension as a float.

    Raises:
        DataError: below 5.
    """
    d = read_number(dimension, "closed form: dimension")
    if d < 5:
        raise DataError(
            f"closed form: expected a dimension of at least 5, found {dimension}. "
            "Use isotropic_gaussian_upper, which is exact there."
        )
    return d


def _left(k: int) -> float:
    """Variance left in an axis halved ``k`` times."""
    return min(1.0, V_CONSTANT * 4.0**-k)


def _per_axis(log_m: float, d: float) -> float:
    """Return the least bound per axis over the number of halvings ``K d + j``."""
    log_factor = math.log(N_CONSTANT / math.sqrt(2) + C_CONSTANT / d)
    best, separated = 2.0, 0.0
    for k in range(_ROUNDS):
        drop = 2 * (_left(k) - _left(k + 1))
        # Log of the cost of the first halving of this round; each further one costs sqrt(2) more.
        log_first = log_factor - k * math.log(4) + (k * d * _LOG2 - log_m) / 2
        # One more halving pays while its cost is below what it takes from the remainder.
        worthwhile = math.floor(2 * (math.log(drop / d) - log_first) / _LOG2) + 1
        j = min(max(worthwhile, 0), d)
        best = min(best, separated + _geometric(log_first, j) + 2 * _left(k) - drop * j / d)
        separated += _geometric(log_first, d)
        if separated > best:
            break
    return best


def _geometric(log_first: float, count: float) -> float:
    """Return the sum of ``count`` terms that start at ``exp(log_first)`` and grow by ``sqrt(2)``."""
    if log_first + count * _LOG2 / 2 > 700:
        return math.inf
    return (math.exp(log_first + count * _LOG2 / 2) - math.exp(log_first)) / (math.sqrt(2) - 1)
