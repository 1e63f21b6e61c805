r"""Upper bounds on the transport distance between two samples of a law living in a box."""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence

import numpy as np

from isthmus.errors import DataError
from isthmus.theory._inputs import FloatArray, read_array, read_number

__all__ = ["box_upper", "cube_upper"]


def box_upper(sample_size: float, sides: Sequence[float] | FloatArray, *, one_sample: bool = False) -> float:
    r"""Bound the expected squared distance of two samples of any law supported in a box.

    .. math:: \mathbb E W_2^2(\hat\mu_m, \hat\nu_m) \le \sum_{l \ge 0} D_l^2 s_l^*, \qquad
        s_l^* = \min\bigl(\sqrt{2^l / 2m},\; 1 - \textstyle\sum_{j<l} s_j^*\bigr)

    where the box is halved ``l`` times, always along its longest side, and :math:`D_l` is the diameter of the
    cells. **[O]** The method is that of Dereich, Scheutzow and Schottstedt (2013), Fournier and Guillin
    (2015) and Weed and Bach (2019, Proposition 1). Assumption: two independent samples of ``m`` i.i.d.
    points.

    Args:
        sample_size: number of points ``m`` of each sample, at least 1.
        sides: lengths of the box's sides, at least 0, shape ``(dimension,)``.
        one_sample: bound the distance of one sample to its law instead.

    Returns:
        Mean over atoms of the squared distance, squared unit of the sides; at most half the sum of the
        squared sides (twice the largest trace of a covariance in the box), the bound without any splitting.

    Raises:
        DataError: a sample size below 1 or a negative side.

    Source:
        Theory, section 2.1.
    """
    log_m = math.log(read_number(sample_size, "box_upper: sample_size", least=1))
    lengths = read_array(sides, "box_upper: sides", ndim=1)
    if (lengths < 0).any():
        raise DataError(f"box_upper: expected sides of at least 0, found {lengths.min()}.")
    squares = lengths**2
    queue = [-square for square in squares]
    heapq.heapify(queue)
    shares: list[float] = []
    dropped: list[float] = []
    left = 1.0
    while left > 0.0:
        share = math.exp((len(shares) * math.log(2) - _log_scale(log_m, one_sample)) / 2)
        shares.append(min(left, share))
        left -= shares[-1]
        longest = heapq.heappop(queue)
        heapq.heappush(queue, longest / 4)
        dropped.append(-0.75 * longest)
    # Squared diameters, summed from the smallest so that the late ones keep their digits.
    diameters = np.cumsum([-sum(queue), *dropped[::-1]])[:0:-1]
    return min(float(diameters @ shares), float(squares.sum()) / 2)


def cube_upper(log_sample_size: float, dimension: float, *, one_sample: bool = False) -> float:
    r"""Return :func:`box_upper` of the unit cube **per dimension**, in log space.

    **[O]**, same assumptions. For a given sum of squared sides the cube has the largest bound of all boxes
    (the best split is at least as good as the average over all choices of the sides to halve). Needs a number
    of operations that grows with ``log2(m) / dimension`` only.

    Args:
        log_sample_size: natural logarithm of the number of points of each sample, at least 0.
        dimension: number of sides, at least 1; whole, but of any size.
        one_sample: bound the distance of one sample to its law instead.

    Returns:
        Mean over atoms of the squared distance divided by the dimension, at most 1/2.

    Raises:
        DataError: an argument outside its range.

    Source:
        Theory, section 2.1.
    """
    log_m = read_number(log_sample_size, "cube_upper: log_sample_size", least=0)
    d = read_number(dimension, "cube_upper: dimension", least=1)
    log_scale = _log_scale(log_m, one_sample)
    # The shares are geometric with ratio sqrt(2) and sum to one after `last` whole levels and a remainder.
    last = math.floor(2 * _log1p_exp(math.log(math.sqrt(2) - 1) + log_scale / 2) / math.log(2))
    spent = total = 0.0
    for k in range(int(last // d) + 1):
        count = min(d, last - k * d)
        whole, weighted = _geometric((k * d * math.log(2) - log_scale) / 2, count)
        total += 4.0**-k * (whole - 0.75 * weighted / d)
        spent += whole
    k, j = divmod(last, d)
    total += max(1.0 - spent, 0.0) * 4.0**-k * (1 - 0.75 * j / d)
    return min(total, 0.5)


def _log_scale(log_m: float, one_sample: bool) -> float:
    """Return the logarithm of ``2 m`` (two samples) or ``4 m``: shares are ``sqrt(2^l / scale)``."""
    return log_m + math.log(4 if one_sample else 2)


def _log1p_exp(x: float) -> float:
    return float(np.logaddexp(0.0, x))


def _geometric(log_first: float, count: float) -> tuple[float, float]:
    """Return the sums of ``first r^j`` and of ``j first r^j`` over ``j < count``, for ``r = sqrt(2)``."""
    r = math.sqrt(2)
    first = math.exp(log_first)
    # The shares sum to at most one; the limit only matters for the rounding of astronomic levels.
    end = min(math.exp(min(log_first + count * math.log(2) / 2, 0.0)), first + r - 1)
    whole = (end - first) / (r - 1)
    return whole, (count * end - r * whole) / (r - 1)
