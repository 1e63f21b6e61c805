r"""Sums over the quantile cells of a Gaussian axis: the ingredients of the Gaussian upper bound.

A standard Gaussian axis is cut at the quantiles ``c / 2^k`` of ``N(0, scale)``. A cell ``c`` has Gaussian
mass ``mu_c``, variance ``var_c`` and, for the cut into its two children, the share ``p_c`` of the left one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from scipy.special import ndtri

from isthmus.theory._inputs import FloatArray

__all__ = ["C_CONSTANT", "N_CONSTANT", "SCALES", "V_CONSTANT", "CellSums", "cell_sums"]

SCALES = (1.0, 2.0, 3.0, 4.0, 5.0, 6.0)
"""Variances of the laws whose quantiles cut the axis; every bound takes the best of them."""

V_CONSTANT, N_CONSTANT, C_CONSTANT = 3.39, 7.84, 9.70
"""For scale 5: bounds on ``4^k v_k``, ``2^(3k/2) N_k`` and ``2^(3k/2) C_k``."""

EXACT_LEVELS = 15
"""Levels 0..14 are summed cell by cell; from 15 on scale 5 continues with the constants above."""

TOTAL_LEVELS = 45


@dataclass(frozen=True, eq=False)
class CellSums:
    r"""Sums over the cells of level ``k`` (index of every array), for one scale.

    Attributes:
        scale: variance of the Gaussian whose quantiles are the cuts.
        S: :math:`\sum \sqrt{\mu_c}`.
        v: :math:`\sum \mu_c \mathrm{var}_c`, what is left of the variance.
        N: :math:`\sum 2 \sqrt{\mu_c} \mathrm{var}_c`.
        H: :math:`\sum h_c` with :math:`h_c = \sqrt{2 \mu_c p_c (1 - p_c)}`.
        C: :math:`\sum h_c (\mathrm{var}_{left} + \mathrm{var}_{right} + (\text{gap of means})^2)`.
    """

    scale: float
    S: FloatArray
    v: FloatArray
    N: FloatArray
    H: FloatArray
    C: FloatArray


@lru_cache(maxsize=16)
def cell_sums(scale: float) -> CellSums:
    """Return the sums for ``scale``, from level 0 on (read-only arrays).

    Levels up to 14 are exact up to quadrature (relative error below 1e-10). Scale 5 continues with proven or
    checked upper bounds (:data:`V_CONSTANT` and its companions) up to level 44.
    """
    mass, mean, var = _half_cells(scale, EXACT_LEVELS)
    rows: list[tuple[float, ...]] = []
    for level in reversed(range(EXACT_LEVELS)):
        if level == 0:
            # The left half line and its mirror image are the two children of the whole axis.
            mass, mean, var = (np.append(a, s * a) for a, s in ((mass, 1), (mean, -1), (var, 1)))
        rows.append(_level_sums(mass, mean, var, mirrored=level > 0))
        mass, mean, var = _merge(mass, mean, var)
    table = np.array(rows[::-1])
    if scale == 5.0:
        table = np.vstack([table, _continuation(float(table[-1, 0]))])
    table.setflags(write=False)
    return CellSums(scale, *table.T)


def _half_cells(scale: float, level: int) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Return mass, mean and variance of the cells of the negative half line, from the left."""
    edges = math.sqrt(scale) * ndtri(np.arange(1, 2 ** (level - 1) + 1) / 2**level)
    # Left of the last cut the density falls by exp(-40) before the replaced edge.
    left = np.append(edges[0] - (edges[0] + math.hypot(edges[0], math.sqrt(80.0))), edges[:-1])
    nodes, weights = np.polynomial.legendre.leggauss(40)
    width = edges - left
    steps = np.outer(width, (nodes - 1) / 2)
    density = np.exp(-steps * (edges[:, None] + steps / 2)) * weights
    total = density.sum(1)
    offset = (density * steps).sum(1) / total
    var = (density * (steps - offset[:, None]) ** 2).sum(1) / total
    mass = np.exp(-(edges**2) / 2) / math.sqrt(2 * math.pi) * total * width / 2
    return mass, edges + offset, var


def _merge(mass: FloatArray, mean: FloatArray, var: FloatArray) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Join neighbouring cells two by two."""
    both = mass[::2] + mass[1::2]
    p = mass[::2] / both
    gap = mean[1::2] - mean[::2]
    centre = mean[::2] + (1 - p) * gap
    return both, centre, p * var[::2] + (1 - p) * var[1::2] + p * (1 - p) * gap**2


def _level_sums(mass: FloatArray, mean: FloatArray, var: FloatArray, *, mirrored: bool) -> tuple[float, ...]:
    """Return ``S, v, N, H, C`` of a level from the cells of the next, doubled when only half is listed."""
    both, _, joint = _merge(mass, mean, var)
    p = mass[::2] / both
    split = np.sqrt(2 * both * p * (1 - p))
    apart = var[::2] + var[1::2] + (mean[1::2] - mean[::2]) ** 2
    root = np.sqrt(both)
    sums = (root.sum(), (both * joint).sum(), (2 * root * joint).sum(), split.sum(), (split * apart).sum())
    return tuple(float(s) * (2 if mirrored else 1) for s in sums)


def _continuation(last_root: float) -> FloatArray:
    """Bound the sums of scale 5 beyond the exact levels, of which the last has ``S = last_root``.

    Halving a cell multiplies its square root of mass by at most sqrt(2), whence ``S``; and ``p (1 - p) <=
    1/4`` gives ``H``.
    """
    k = np.arange(EXACT_LEVELS, TOTAL_LEVELS)
    root, quarter = 2.0 ** (k / 2), 4.0**-k
    columns = [
        last_root * 2.0 ** ((k - EXACT_LEVELS + 1) / 2),
        V_CONSTANT * quarter,
        N_CONSTANT * quarter * root,
        last_root * 2.0 ** ((k - EXACT_LEVELS) / 2),
        C_CONSTANT * quarter * root,
    ]
    return np.array(columns).T
