"""Compiled loops of incremental matching (numba, extra ``fast``); imported only for large tensors.

Self-contained: numba's cache of a function does not notice changes in another file.
"""

from __future__ import annotations

import numpy as np
from numba import njit

_LANES = 128  # columns are dealt to lanes in turn, so that a look at a row vectorises


@njit(cache=True, nogil=True, error_model="numpy", fastmath={"reassoc", "contract"})
def pair_sums(a, b, rows, columns, outer, inner, straight, found):
    """Add the sums over ``o`` and ``m`` of ``a[o, rows[k], m] * b[outer[o], columns[k], inner[m]]`` to ``found[k]``.

    Products and sums are float64. ``straight`` says that ``inner`` changes nothing.
    """
    length = a.shape[2]
    for o in range(a.shape[0]):
        p = outer[o]
        if length == 1:  # a loop of its own, for an inner loop of one turn nearly doubles the time
            for k in range(rows.shape[0]):
                found[k] += np.float64(a[o, rows[k], 0]) * np.float64(b[p, columns[k], 0])
            continue
        for k in range(rows.shape[0]):
            i, j = rows[k], columns[k]
            total = 0.0
            if straight:
                for m in range(length):
                    total += np.float64(a[o, i, m]) * np.float64(b[p, j, m])
            else:
                for m in range(length):
                    total += np.float64(a[o, i, m]) * np.float64(b[p, j, inner[m]])
            found[k] += total


@njit(cache=True, nogil=True, error_model="numpy")
def near_pairs(estimate, row_level, column_level, found):
    """Fill ``found`` with the places where ``estimate[i, j] - column_level[j] >= row_level[i]``, all float32.

    Returns how many there are; the search stops when they no longer fit. Places of one row are in no order.
    """
    rows, columns = estimate.shape
    highest = np.empty(_LANES, np.float32)
    whole = columns - columns % _LANES
    count = 0
    for i in range(rows):
        level = row_level[i]
        for g in range(_LANES):
            highest[g] = -np.inf
        for start in range(0, whole, _LANES):
            for g in range(_LANES):
                x = estimate[i, start + g] - column_level[start + g]
                highest[g] = x if x > highest[g] else highest[g]
        for g in range(columns - whole):
            x = estimate[i, whole + g] - column_level[whole + g]
            highest[g] = x if x > highest[g] else highest[g]
        for g in range(_LANES):
            if highest[g] < level:
                continue
            for j in range(g, columns, _LANES):
                if estimate[i, j] - column_level[j] >= level:
                    if count == found.shape[0]:
                        return count + 1
                    found[count] = i * columns + j
                    count += 1
    return count
