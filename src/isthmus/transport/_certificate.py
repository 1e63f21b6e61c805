r"""Proofs of optimality for assignments: dual prices, and the gap between a pairing and its dual bound.

For costs :math:`C` and any duals with :math:`u_i + v_j \le C_{ij}` (and :math:`v_j \le 0` where columns may stay
free), no pairing costs less than :math:`\sum u + \sum v`. Both engines report pairings together with such duals.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from isthmus.errors import DataError

_ROUNDING = 32 * np.finfo(np.float64).eps
"""The most that a proof may lack, relative to the sum of the absolute chosen entries: the rounding of these."""

_RETURNED = 2.0**-30
"""The same for the duals as returned, whose rounding is that of prices and may be larger. Beyond it, prices dwarf the
chosen entries, and what is returned proves nothing about them."""

_STEP = 4 * np.finfo(np.float64).eps
"""Relative rounding of one step along a path of prices."""

_UNEVEN = 2.0**20
"""Chosen entries this many times their median are penalties, in whose rounding the others must not be lost."""

_ROWS = 256
"""Rows looked at together by numpy, so that what is kept beside the matrix stays small."""


@dataclass(frozen=True, eq=False)
class Solution:
    """A pairing of all rows of a minimisation problem (rows no more than columns) and its dual bound.

    Attributes:
        columns: the column of each row, int64.
        row_duals: one per row, float64.
        column_duals: one per column, float64; zero for columns left over, else at most that.
        gap: cost of the pairing minus the dual bound, computed as if without rounding; zero when what is missing is
            rounding of the chosen entries.
        settled: whether nothing better can be hoped for: the gap is zero even by the measure of the smaller entries,
            if some are penalties.
    """

    columns: NDArray[np.int64]
    row_duals: NDArray[np.float64]
    column_duals: NDArray[np.float64]
    gap: float
    settled: bool

    def cost(self, costs: NDArray, sign: float) -> float:
        """Return the sum of the chosen entries times ``sign``, rounded once."""
        return math.fsum(sign * costs[np.arange(len(self.columns)), self.columns].astype(np.float64))


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
    prove: Prove | None = None,
    least: NDArray[np.float64] | None = None,
) -> Solution:
    """Complete a pairing and its prices to a :class:`Solution`.

    Args:
        costs: entries, to be multiplied by ``sign``, shape ``(rows, columns)``.
        sign: 1 to minimise, -1 to maximise.
        columns: the column of each row.
        prices: any column duals.
        prove: fills row duals, slacks and losses, as :func:`prove_rows` does.
        least: smallest reduced cost of each row at these prices as float64 rounds it, if known already: mostly that
            is proof enough, and the matrix need not be read again.
    """
    chosen = sign * costs[np.arange(len(columns)), columns].astype(np.float64)
    spare = np.ones(len(prices), np.bool_)
    spare[columns] = False
    if least is not None and not spare.any():
        # One step down is below the smallest reduced cost as a real number; at prices of zero nothing was rounded.
        rows = np.nextafter(least, -np.inf) if prices.any() else least
        slack = (chosen - prices[columns] - rows) + rounded_off(chosen, prices[columns])
        found = _judged(chosen, columns, (rows, prices), slack, np.zeros(0))
        if found.settled:
            return found
    duals = prices - float(prices.max()) if spare.any() else prices
    rows, slack, loss = (np.empty(len(columns)) for _ in range(3))
    (prove or prove_rows)(costs, sign, duals, columns, rows, slack, loss)
    return _judged(chosen, columns, (rows, duals), np.concatenate([slack, -duals[spare]]), loss)


def _judged(
    chosen: NDArray[np.float64],
    columns: NDArray,
    duals: tuple[NDArray[np.float64], NDArray[np.float64]],
    slack: NDArray[np.float64],
    loss: NDArray[np.float64],
) -> Solution:
    """Return the solution with its gap, from all that is missing from a proof before and by rounding the row duals."""
    sizes = np.abs(chosen)
    proven = math.fsum(slack)
    gap = proven + math.fsum(loss)
    scale = math.fsum(sizes)
    even = math.fsum(np.minimum(sizes, _UNEVEN * np.median(sizes))) if len(sizes) else 0.0
    done = gap <= _RETURNED * scale
    settled = done and proven <= _ROUNDING * even
    gap = 0.0 if done and proven <= _ROUNDING * scale else gap
    return Solution(columns.astype(np.int64), *duals, gap, settled)


Prove = Callable[[NDArray, float, NDArray, NDArray, NDArray, NDArray, NDArray], None]


def prove_rows(
    costs: NDArray,
    sign: float,
    prices: NDArray[np.float64],
    columns: NDArray,
    duals: NDArray[np.float64],
    slack: NDArray[np.float64],
    loss: NDArray[np.float64],
) -> None:
    """Fill row duals that are feasible without any rounding, and how far each row's pair is from tight.

    Args:
        costs: entries, to be multiplied by ``sign``.
        sign: 1 to minimise, -1 to maximise.
        prices: column duals.
        columns: the column of each row.
        duals: for each row, the largest float64 that is at most the smallest reduced cost as a real number.
        slack: what the row's pair costs above the smallest reduced cost.
        loss: what rounding took from the dual.
    """
    for start in range(0, len(columns), _ROWS):
        part = slice(start, start + _ROWS)
        entries = sign * costs[part].astype(np.float64)
        reduced = entries - prices
        best = reduced.min(1)
        # Rounding keeps the order, so the smallest real number is among those that round to the smallest.
        row, column = np.nonzero(reduced == best[:, None])
        rest = np.full(len(best), np.inf)
        np.minimum.at(rest, row, rounded_off(entries[row, column], prices[column]))
        duals[part] = np.where(rest >= 0.0, best, np.nextafter(best, -np.inf))
        loss[part] = (best - duals[part]) + rest
        at = np.arange(len(best)), columns[part]
        slack[part] = (reduced[at] - best) + (rounded_off(entries[at], prices[columns[part]]) - rest)


def rounded_off(entries: NDArray[np.float64], prices: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the rounding error of ``entries - prices`` (Knuth's two-sum)."""
    reduced = entries - prices
    back = reduced - entries
    return (entries - (reduced - back)) + (-prices - back)


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
    rose, everyone = np.arange(rows), np.arange(rows)
    for _ in range(rows):
        offers = lead[rose] + levels[rose, None]
        best = offers.argmax(0)
        needed = offers[best, everyone]
        # What this sum may owe to rounding; entries of other rows, penalties among them, have no say.
        size = np.abs(needed) + np.abs(levels) + np.abs(lead[rose[best], everyone])
        rose = np.flatnonzero(needed - levels > _STEP * size)
        if len(rose) == 0:
            break
        levels[rose] = needed[rose]
    prices = np.zeros(total)
    prices[columns] = levels
    return prices
