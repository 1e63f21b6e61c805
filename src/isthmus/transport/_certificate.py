r"""Proofs of optimality for assignments: dual prices, and the gap between a pairing and its dual bound.

For costs :math:`C` and any duals with :math:`u_i + v_j \le C_{ij}` (and :math:`v_j \le 0` where columns may stay
free), no pairing costs less than :math:`\sum u + \sum v`. Both engines report pairings together with such duals.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from isthmus.errors import DataError

_ROUNDING = 16 * np.finfo(np.float64).eps
"""Slack of a pair, relative to its cost and duals, that is rounding in their differences; also that of a value."""


@dataclass(frozen=True, eq=False)
class Solution:
    """A pairing of all rows of a minimisation problem (rows no more than columns) and its dual bound.

    Attributes:
        columns: the column of each row, int64.
        row_duals: one per row, float64.
        column_duals: one per column, float64; zero for columns left over, else at most that.
        gap: cost of the pairing minus the dual bound; zero when optimal up to rounding of the duals or of the value.
    """

    columns: NDArray[np.int64]
    row_duals: NDArray[np.float64]
    column_duals: NDArray[np.float64]
    gap: float


class Infeasible(Exception):
    """Every complete pairing uses a forbidden pair."""


def finite_range(costs: NDArray, sign: float) -> float:
    """Return the spread of the finite entries, 1 if there is none; forbidden pairs cost plus infinity.

    Raises:
        DataError: NaN, or infinite entries that would be chosen at any price.
    """
    if np.isnan(costs).any():
        raise DataError(
            f"assign: {int(np.isnan(costs).sum())} of {costs.size} entries are NaN. "
            "Look for a network that diverged or a division by zero upstream."
        )
    if (costs == -sign * np.inf).any():
        raise DataError(
            f"assign: found {-sign * np.inf} entries, which would be chosen at any price. Forbid a pair with "
            f"{sign * np.inf} when {'minimising' if sign > 0 else 'maximising'}."
        )
    finite = costs[np.isfinite(costs)]
    spread = float(finite.max()) - float(finite.min()) if finite.size else 0.0
    return spread if spread > 0.0 else 1.0


def certify(
    costs: NDArray,
    sign: float,
    columns: NDArray,
    prices: NDArray[np.float64],
    least: NDArray[np.float64],
) -> Solution:
    """Complete a pairing and its prices to a :class:`Solution`.

    Args:
        costs: entries, to be multiplied by ``sign``, shape ``(rows, columns)``.
        sign: 1 to minimise, -1 to maximise.
        columns: the column of each row.
        prices: any column duals.
        least: smallest reduced cost of each row at these prices, computed as ``sign * cost - price``.
    """
    chosen = sign * costs[np.arange(len(columns)), columns].astype(np.float64)
    slack = (chosen - prices[columns]) - least
    size = np.abs(chosen) + np.abs(prices[columns]) + np.abs(least)
    spare = np.ones(len(prices), np.bool_)
    spare[columns] = False
    level = float(prices.max()) if spare.any() else 0.0
    slack = np.concatenate([slack, level - prices[spare]])
    # Prices are differences of costs, and rounded like them.
    scale = abs(level) + np.abs(chosen).max(initial=0.0)
    size = np.concatenate([size, scale + np.abs(prices[spare])])
    gap = float(slack.sum())
    # Where pairs differ much in size, small ones inherit the rounding of large ones, which is that of the value.
    if bool((slack <= _ROUNDING * size).all()) or gap <= _ROUNDING * float(np.abs(chosen).sum()):
        gap = 0.0
    duals = prices - level
    duals[spare] = np.minimum(duals[spare], 0.0)
    return Solution(columns.astype(np.int64), least + level, duals, gap)


def prices_of(costs: NDArray, sign: float, columns: NDArray) -> NDArray[np.float64]:
    """Return column duals that prove an optimal pairing, by relaxing the prices of the paired columns.

    The pair ``(i, columns[i])`` is tight and no other pair of row ``i`` is better once
    ``price[columns[i]] >= cost[i, columns[i]] - cost[i, j] + price[j]`` for all ``j``: longest paths, found by
    Bellman and Ford's rounds over the prices that rose in the round before.
    """
    rows, total = costs.shape
    scaled = sign * costs.astype(np.float64)
    chosen = scaled[np.arange(rows), columns]
    spare = np.ones(total, np.bool_)
    spare[columns] = False
    lead = (
        chosen - scaled[:, columns].T
    )  # lead[k, i]: by how much the price of k must be exceeded by that of i
    levels = np.zeros(rows)
    if spare.any():
        # Low enough for a row that may take none of the columns left over.
        lowest = -rows * finite_range(costs, sign)
        levels = (chosen[:, None] - scaled[:, spare]).max(1).clip(min=lowest)
    magnitude = np.abs(chosen).max(initial=0.0)
    rose = np.arange(rows)
    for _ in range(rows):
        needed = (lead[rose] + levels[rose, None]).max(0, initial=-np.inf)
        rose = np.flatnonzero(needed - levels > _ROUNDING * (np.abs(levels) + magnitude))
        if len(rose) == 0:
            break
        levels[rose] = needed[rose]
    prices = np.zeros(total)
    prices[columns] = levels
    return prices
