r"""Upper bounds on the expected transport distance between two Gaussian samples.

Both functions halve quantile cells as :mod:`isthmus.theory._box` halves a box, but a pair that is separated
pays its true conditional second moment instead of a diameter (Theory, section 2.2).
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from isthmus.errors import DataError
from isthmus.theory._cells import SCALES, CellSums, cell_sums
from isthmus.theory._inputs import FloatArray, read_array, read_integer, read_number

__all__ = ["gaussian_upper", "isotropic_gaussian_upper", "isotropic_log_size"]


def gaussian_upper(sample_size: float, variances: Sequence[float] | FloatArray) -> float:
    r"""Bound the expected squared distance of two samples of a centred Gaussian with independent axes.

    .. math:: \mathbb E W_2^2(\hat\mu_m, \hat\nu_m) \le \min_L \Bigl[ \sum_{l<L} A_l + 2 \sum_i \lambda_i
        v_{k_i(L)} \Bigr]

    with the terms of section 2.2. **[O]** Assumption: two independent samples of ``m`` i.i.d. rows of
    ``N(0, diag(variances))``. The isotropic bound of equal trace holds too (section 1.4); the smallest is returned.

    Args:
        sample_size: number of rows ``m`` of each sample, at least 1.
        variances: variance of every axis, at least 0, shape ``(dimension,)``; for rows in a metric, the
            eigenvalues of the product.

    Returns:
        Mean over atoms of the squared distance, in units of the variances; at most twice their sum.

    Raises:
        DataError: a sample size below 1 or a negative variance.

    Notes:
        Measured against simulation it is 4 to 8 times too large for ``m <= 512``, and no better than the
        trivial ``2 * sum(variances)`` while ``log2(m)`` is far below the number of axes.

    Source:
        Theory, section 2.2.
    """
    log_m = math.log(read_number(sample_size, "gaussian_upper: sample_size", least=1))
    axes = read_array(variances, "gaussian_upper: variances", ndim=1)
    if (axes < 0).any():
        raise DataError(f"gaussian_upper: expected variances of at least 0, found {axes.min()}.")
    total = float(axes.sum())
    isotropic = isotropic_gaussian_upper(log_m, len(axes)) * total / len(axes)
    return min(isotropic, *(_best_split(log_m, axes.tolist(), cell_sums(scale)) for scale in SCALES))


def isotropic_gaussian_upper(log_sample_size: float, dimension: int) -> float:
    r"""Return :func:`gaussian_upper` for ``N(0, I)``, in log space.

    **[O]**, same assumptions. Exact sums over cells up to 14 halvings per axis, then the constants of
    :func:`closed_form_upper`; the work grows with the dimension, so beyond a few thousand axes use that one.

    Args:
        log_sample_size: natural logarithm of the number of rows of each sample, at least 0.
        dimension: number of axes, at least 1.

    Returns:
        Mean over atoms of the squared distance, at most ``2 * dimension``.

    Raises:
        DataError: an argument outside its range.

    Source:
        Theory, section 2.2, with the axes halved in turn.
    """
    log_m = read_number(log_sample_size, "isotropic_gaussian_upper: log_sample_size", least=0)
    d = read_integer(dimension, "isotropic_gaussian_upper: dimension")
    best = math.inf
    for scale in SCALES:
        log_cost, remainder = _round_robin(d, scale)
        best = min(best, float((np.exp(np.minimum(log_cost - log_m / 2, 700.0)) + remainder).min()))
    return best


def isotropic_log_size(dimension: int, target: float) -> float:
    """Return the smallest ``log(m)`` at which :func:`isotropic_gaussian_upper` is at most ``target``.

    Infinite if the target is below the resolution of the finest cells (about ``1e-26`` per axis).
    """
    best = math.inf
    for scale in SCALES:
        log_cost, remainder = _round_robin(dimension, scale)
        slack = target - remainder
        if slack[0] >= 0:
            return 0.0
        reached = slack > 0
        if reached.any():
            best = min(best, float((2 * (log_cost[reached] - np.log(slack[reached]))).min()))
    return max(best, 0.0)


@lru_cache(maxsize=64)
def _round_robin(d: int, scale: float) -> tuple[FloatArray, FloatArray]:
    r"""Halve ``d`` equal axes in turn.

    Returns, for ``L`` = 0, 1, ... halvings, the logarithm of :math:`\sqrt m \sum_{l<L} A_l` and the remainder
    :math:`2 \sum_i v_{k_i(L)}`.
    """
    cells = cell_sums(scale)
    i = np.arange(d)
    logs, remainders = [], [np.array([2.0 * d])]
    for k in range(len(cells.v) - 1):
        # `i` axes are already at level k + 1, one is being halved, the others are at level k.
        others = i * cells.N[k + 1] / cells.S[k + 1] + (d - 1 - i) * cells.N[k] / cells.S[k]
        log_cells = i * math.log(cells.S[k + 1]) + (d - 1 - i) * math.log(cells.S[k])
        logs.append(log_cells + np.log(cells.C[k] + cells.H[k] * others))
        remainders.append(2 * ((i + 1) * cells.v[k + 1] + (d - 1 - i) * cells.v[k]))
    log_cost = np.append(-np.inf, np.logaddexp.accumulate(np.concatenate(logs)))
    return log_cost, np.concatenate(remainders)


def _best_split(log_m: float, axes: list[float], cells: CellSums) -> float:
    """Halve the axis that loses most variance, until the separated pairs alone cost more than the best."""
    gains = cells.v[:-1] - cells.v[1:]
    ratio = cells.N / cells.S
    levels = np.zeros(len(axes), dtype=int)
    queue = [(-lam * gains[0], j) for j, lam in enumerate(axes)]
    heapq.heapify(queue)
    log_cells, spread = 0.0, sum(axes) * ratio[0]
    separated, remainder = 0.0, 2 * sum(axes)
    best = remainder
    while separated < best and queue:
        gain, j = heapq.heappop(queue)
        k, lam = levels[j], axes[j]
        others = max(spread - lam * ratio[k], 0.0)
        cost = lam * cells.C[k] + cells.H[k] * others
        log_others = log_cells - math.log(cells.S[k])
        separated += math.exp(min(log_others - log_m / 2, 700.0)) * cost
        remainder += 2 * gain
        best = min(best, separated + max(remainder, 0.0))
        levels[j] = k + 1
        log_cells = log_others + math.log(cells.S[k + 1])
        spread = others + lam * ratio[k + 1]
        if k + 1 < len(gains):
            heapq.heappush(queue, (-lam * gains[k + 1], j))
    return float(best)
