"""A first look at a square matrix, one read long: does nearly every row have a column of its own, at prices of zero?

If so, as for planted pairs, these favourites are lists of one for :mod:`isthmus.transport._kernels` (whose layout this
file shares), and neither column minima nor longer lists are needed. Self-contained: numba's cache of a function does
not notice changes in another file.
"""

from __future__ import annotations

import numpy as np
from numba import njit

_GROUPS = 128  # columns of a scan are dealt to groups in turn, so that it vectorises
_SIZE = _BOUND = 32  # as in the kernels: where a list keeps its size and its bound


_compiled = njit(cache=True, nogil=True, error_model="numpy")


@_compiled
def _least(minima):
    """Return the smallest of the groups' minima; eight chains, for one would wait for itself."""
    a, b, c, d = minima[0], minima[1], minima[2], minima[3]
    e, f, g, h = minima[4], minima[5], minima[6], minima[7]
    for t in range(8, _GROUPS, 8):
        a = minima[t] if minima[t] < a else a
        b = minima[t + 1] if minima[t + 1] < b else b
        c = minima[t + 2] if minima[t + 2] < c else c
        d = minima[t + 3] if minima[t + 3] < d else d
        e = minima[t + 4] if minima[t + 4] < e else e
        f = minima[t + 5] if minima[t + 5] < f else f
        g = minima[t + 6] if minima[t + 6] < g else g
        h = minima[t + 7] if minima[t + 7] < h else h
    return min(min(min(a, b), min(c, d)), min(min(e, f), min(g, h)))


@_compiled
def _scan(costs, sign, i, k, l, m, minima, zeros):  # noqa: E741
    """Fill the group minima of four rows, one after the other; add zeros, or NaN for what is not finite."""
    columns = costs.shape[1]
    for g in range(4 * _GROUPS):
        minima[g] = np.inf
    whole = columns // _GROUPS
    for t in range(whole):
        start = t * _GROUPS
        for g in range(_GROUPS):
            a, b = sign * costs[i, start + g], sign * costs[k, start + g]
            c, d = sign * costs[l, start + g], sign * costs[m, start + g]
            zeros[g] += (a * 0.0 + b * 0.0) + (c * 0.0 + d * 0.0)
            minima[g] = a if a < minima[g] else minima[g]
            minima[_GROUPS + g] = b if b < minima[_GROUPS + g] else minima[_GROUPS + g]
            minima[2 * _GROUPS + g] = c if c < minima[2 * _GROUPS + g] else minima[2 * _GROUPS + g]
            minima[3 * _GROUPS + g] = d if d < minima[3 * _GROUPS + g] else minima[3 * _GROUPS + g]
    start = whole * _GROUPS
    for g in range(columns - start):
        a, b = sign * costs[i, start + g], sign * costs[k, start + g]
        c, d = sign * costs[l, start + g], sign * costs[m, start + g]
        zeros[g] += (a * 0.0 + b * 0.0) + (c * 0.0 + d * 0.0)
        minima[g] = a if a < minima[g] else minima[g]
        minima[_GROUPS + g] = b if b < minima[_GROUPS + g] else minima[_GROUPS + g]
        minima[2 * _GROUPS + g] = c if c < minima[2 * _GROUPS + g] else minima[2 * _GROUPS + g]
        minima[3 * _GROUPS + g] = d if d < minima[3 * _GROUPS + g] else minima[3 * _GROUPS + g]


@_compiled
def glance(costs, sign, patience, choices, offers, least, taken):
    """Fill lists of one column and the smallest costs of all rows; stop once favourites repeat too often.

    Returns whether no more than ``patience`` rows had favourites taken by earlier ones, and all entries are finite.
    """
    rows, columns = costs.shape
    four, minima, zeros = np.empty(4 * _GROUPS), np.empty(_GROUPS), np.zeros(_GROUPS)
    for i in range(rows):
        if i % 4 == 0:
            _scan(
                costs, sign, i, min(i + 1, rows - 1), min(i + 2, rows - 1), min(i + 3, rows - 1), four, zeros
            )
        for g in range(_GROUPS):
            minima[g] = four[(i % 4) * _GROUPS + g]
        best = _least(minima)
        home = 0
        while minima[home] != best:
            home += 1
        minima[home] = np.inf
        second = _least(minima)
        choice = -1
        for j in range(home, columns, _GROUPS):
            cost = sign * costs[i, j]
            if cost == best and choice < 0:
                choice = j
            else:
                second = cost if cost < second else second
        if choice < 0:
            return False  # no finite entry
        patience -= 1 if taken[choice] else 0
        if patience < 0:
            return False
        taken[choice] = True
        least[i] = best
        choices[i, 0] = choice
        offers[i, 0] = best
        choices[i, _SIZE] = 1
        offers[i, _BOUND] = second
    return zeros.sum() == 0.0
