r"""The fast assignment engine: epsilon-scaled auction on shortlists, finished by shortest augmenting paths.

The stages, each handing its column prices to the next (Bertsekas 1988 for the auction and its scaling; Jonker &
Volgenant 1987 for the finish; shortlists, coarse samples and simultaneous trees are ours):

1. *Survey*: column minima are the first prices. If nearly every row then has a favourite of its own, go to 4. A first
   glance at a square matrix sees whether that is so at prices of zero already; then there is no survey.
2. *Coarse sample*, unless rows mostly have different favourites: a scaled auction among every 8th, then every
   2nd row and column. The duals of the sampled rows price all columns.
3. *Scaled auction* over everything with a falling ``epsilon``. A phase has a budget of bids, because duplicate
   and nearly duplicate rows (dead units) start price wars.
4. *Auction without epsilon*: pairs made here are tight, i.e. optimal for the prices. Chains of evictions are cut.
5. *Forest*: rows left over try the tight pairs, then grow shortest-path trees, all at once, until all are paired.
6. *Certificate*: one more scan gives the row duals, and with them the proven gap.

Constant rows (covariances of dead units) compete for nothing. They are taken out at the start and get the columns
that nobody else wants: they are the dummies of :mod:`isthmus.transport._kernels`.
"""

from __future__ import annotations

import math
import time

import numpy as np
from numpy.typing import NDArray

from isthmus.transport import _kernels as kernels
from isthmus.transport._certificate import Infeasible, Solution, certify, finite_range
from isthmus.transport._glance import glance

_EASY = 0.97  # share of rows with a favourite of their own, from which on no scaled auction is needed
_GLANCE = 4  # one row in so many shows whether nearly all have favourites of their own
_VARIED = 0.5  # the same share, from which on no coarse sample is needed
_KEPT = 0.95  # share of a warm start's pairs still optimal, from which on no scaled auction is needed
_COARSE = ((8, (64.0, 16.0, 4.0, 1.0)), (2, (2.0, 0.5)))  # (every which row and column, epsilons)
_FINE = 0.5  # first epsilon after the coarse sample, in units of the mean gap
_DIRECT = 0.1  # first epsilon without it; after a warm start, in units of its mean slack
_FACTOR = 6.0  # from one epsilon to the next
_LAST = 0.002  # no epsilon below this, in units of the mean gap
_LANES = 4  # shortlists of about 8 columns
_BIDS = 40  # bids per column in one phase
_LAST_BIDS = 8  # the same without epsilon
_CHAIN = 200  # evictions in a row without epsilon
_CHUNK = 4096  # bids between two looks at the clock


class _Market:
    """Rows that want columns, at the present prices; holds the arrays that the kernels work on."""

    def __init__(
        self,
        costs: NDArray,
        sign: float,
        active: NDArray,
        prices: NDArray,
        deadline: float,
        *,
        reach: float = 1.0,
        restricted: bool = False,
    ) -> None:
        rows, columns = costs.shape
        self.costs, self.sign, self.active, self.prices = costs, sign, active, prices
        self.reach, self.deadline, self.restricted = reach, deadline, restricted
        self.dummies = columns - len(active)
        self.row_of = np.full(columns, kernels.FREE, np.int32)
        self.column_of = np.full(rows, kernels.FREE, np.int32)
        self.minima = np.empty(kernels.GROUPS)
        self.picked = np.empty(columns + kernels.GROUPS + 2, np.int32)
        self.choices = np.empty((rows, kernels.CAPACITY + 1), np.int32)
        self.offers = np.empty((rows, kernels.CAPACITY + 1))
        self.least = np.empty(rows)
        self.seeded = np.empty(0)  # the prices at which lists were last made anew

    @property
    def late(self) -> bool:
        """Whether the time budget is used up."""
        return self.deadline < math.inf and time.monotonic() >= self.deadline

    @property
    def supply(self) -> int:
        """Number of dummies without a column."""
        return self.dummies - int(np.count_nonzero(self.row_of == kernels.DUMMY)) if self.dummies else 0

    @property
    def complete(self) -> bool:
        """Whether every row has a column."""
        return self.supply == 0 and bool((self.column_of[self.active] >= 0).all())

    def seed(self, *, glance: bool = True) -> tuple[float, float]:
        """Make all shortlists; return the share of rows with a favourite of their own, and the mean gap to the next.

        To be called whenever prices were set anew: lists and bounds only survive falling prices.
        """
        self.row_of.fill(kernels.FREE)
        gaps = np.empty(len(self.active))
        distinct = self._favourites(gaps) if glance else 0
        if distinct < _EASY * len(self.active):
            distinct = kernels.seed_rows(
                self.costs, self.sign, _LANES, self.active, self.prices, self.row_of, self.picked,
                self.choices, self.offers, self.least, gaps, np.zeros(len(self.prices), np.bool_),
            )  # fmt: skip
        self.seeded = self.prices.copy()
        gaps = gaps[np.isfinite(gaps)]
        return distinct / len(self.active), float(gaps.mean()) if len(gaps) else 0.0

    def _favourites(self, gaps: NDArray) -> int:
        """Make lists of one; return how many favourites differ, 0 when few do among the first rows already."""
        taken, distinct = np.zeros(len(self.prices), np.bool_), 0
        first = len(self.active) // _GLANCE
        for part in (slice(0, first), slice(first, None)):
            distinct += kernels.favourites(
                self.costs, self.sign, self.active[part], self.prices, self.choices, self.offers, self.least,
                gaps[part], taken,
            )  # fmt: skip
            if distinct < _EASY * first:
                return 0
        return distinct

    def row_duals(self) -> NDArray[np.float64]:
        """Return the smallest reduced cost of each row at the present prices."""
        if self.known() is None:
            kernels.row_minima(self.costs, self.sign, self.prices, self.least)
        return self.least

    def known(self) -> NDArray[np.float64] | None:
        """Return the smallest reduced cost of each row if it was computed at the present prices."""
        same = len(self.active) == len(self.least) and np.array_equal(self.prices, self.seeded)
        return self.least if same else None

    def auction(self, epsilon: float, *, kept: NDArray | None = None) -> bool:
        """Auction all columns anew, but for the pairs ``kept``; return whether every row was served."""
        self.row_of.fill(kernels.FREE)
        self.column_of.fill(kernels.FREE)
        if self.dummies:
            first = len(self.prices) - self.dummies
            self.row_of[np.argpartition(self.prices, first)[first:]] = kernels.DUMMY
            kernels.level_dummies(self.prices, self.row_of, exact=False)
        if kept is not None:
            rows = self.active[kept[self.active] >= 0]
            rows = rows[self.row_of[kept[rows]] == kernels.FREE]
            self.row_of[kept[rows]] = rows
            rows = rows[self.row_of[kept[rows]] == rows]
            self.column_of[rows] = kept[rows]
        waiting = self.active[self.column_of[self.active] == kernels.FREE]
        stack = np.empty(len(self.column_of), np.int32)
        stack[: len(waiting)] = waiting[::-1]
        progress = np.array([len(waiting), 0, 0, 0])
        limit = len(self.prices) * (_BIDS if epsilon > 0.0 else _LAST_BIDS)
        chunk = limit if self.deadline == math.inf else _CHUNK
        chain = limit if epsilon > 0.0 else _CHAIN
        while progress[:2].any() and progress[2] < limit and not self.late:
            if not kernels.auction(
                self.costs, self.sign, epsilon, self.reach, _LANES if epsilon > 0.0 else 2 * _LANES, chunk, chain,
                stack, progress, self.prices, self.row_of, self.column_of, self.minima, self.picked,
                self.choices, self.offers,
            ):  # fmt: skip
                raise Infeasible
        if self.dummies:
            kernels.level_dummies(self.prices, self.row_of, exact=epsilon == 0.0)
        return self.complete

    def finish(self, *, punctual: bool = True) -> bool:
        """Augment until complete; with ``punctual`` return False if time is over before."""
        rows, columns = self.costs.shape
        seen, steps, duals = (
            np.empty(columns, np.bool_),
            np.empty((3, rows + 1), np.int32),
            np.empty(rows + 1),
        )
        lengths, links = np.empty((3, rows + columns)), np.empty((6, rows + columns), np.int32)
        while not self.complete:
            if punctual and self.late:
                return False
            if kernels.match_tight(
                self.costs, self.sign, self.active, self.prices, self.row_of, self.column_of, self.minima,
                seen, steps, duals,
            ):  # fmt: skip
                continue
            if not kernels.forest(
                self.costs, self.sign, _LANES, self.active, self.supply, self.prices, self.row_of, self.column_of,
                self.minima, self.picked, self.choices, self.offers, lengths, links,
            ):  # fmt: skip
                raise Infeasible
        return True

    def fill(self) -> NDArray | None:
        """Return the pairing completed greedily, None if some row finds no allowed column left."""
        column_of = self.column_of.copy()
        done = kernels.fill(self.costs, self.sign, self.active, self.prices, self.row_of.copy(), column_of)
        return column_of if done else None

    def cost(self, column_of: NDArray) -> float:
        """Return the cost of the pairs of the active rows."""
        return self.sign * float(self.costs[self.active, column_of[self.active]].astype(np.float64).sum())


def solve(
    costs: NDArray,
    sign: float,
    *,
    prices: NDArray[np.float64] | None = None,
    pairs: NDArray | None = None,
    deadline: float = math.inf,
) -> Solution:
    """Pair all rows at the least ``sign * cost``.

    Args:
        costs: C-contiguous float32 or float64, shape ``(rows, columns)``, no more rows than columns, not empty.
        sign: 1 to minimise, -1 to maximise.
        prices: column duals to start from, in the sense of ``sign * costs``.
        pairs: the column of each row to start from, where it suits ``prices``; -1 for none.
        deadline: moment of ``time.monotonic()`` from which on the best pairing so far is returned. A pairing that
            avoids forbidden pairs is searched for beyond it.

    Raises:
        Infeasible: every complete pairing has an infinite cost.
        DataError: NaN, or an infinite entry of the attractive sign.
    """
    rows, total = costs.shape
    market = _glanced(costs, sign, deadline) if prices is None and rows == total else None
    if market is not None:
        _finish(market)
        return certify(costs, sign, market.column_of, market.prices, kernels.prove, market.known())
    least, constant = np.empty(total), np.empty(rows, np.bool_)
    finite = kernels.survey(costs, sign, least, constant) == 0.0
    reach = 1.0 if finite else finite_range(costs, sign)
    if not finite:
        least[~np.isfinite(least)] = 0.0
    active = np.flatnonzero(~constant).astype(np.int32)
    start = least if prices is None else prices.copy()
    market = _Market(costs, sign, active, start, deadline, reach=reach, restricted=not finite)
    if len(active):
        _run(market, pairs)
    columns = market.column_of.astype(np.int64)
    if len(active) < rows:
        free = np.ones(total, np.bool_)
        free[columns[active]] = False
        columns[constant] = np.flatnonzero(free)[: rows - len(active)]
    return certify(costs, sign, columns, market.prices, kernels.prove, market.known())


def _run(market: _Market, pairs: NDArray | None) -> None:
    """Pair all active rows of a market, on time if it can."""
    share, gap = market.seed(glance=pairs is None)
    kept = best = None
    if pairs is not None:
        kept, slack = _tight(market, pairs)
        if np.count_nonzero(kept >= 0) < _KEPT * len(market.active):
            best = _scale(market, _DIRECT * slack, gap if gap > 0.0 else slack, kept=kept)
            kept = None
    elif share < _VARIED or (share < _EASY and gap > 0.0):
        if share >= _VARIED and market.auction(_DIRECT * gap):
            best = _scale(market, _DIRECT / _FACTOR * gap, gap)
        else:
            unit = market.reach if market.restricted else _sample(market)
            gap = market.seed()[1]
            unit = gap if gap > 0.0 else unit
            best = _scale(market, _FINE * unit, unit)
    _finish(market, kept=kept, best=best)


def _glanced(costs: NDArray, sign: float, deadline: float) -> _Market | None:
    """Return a market at prices of zero with lists of one column, if nearly every row has a favourite of its own."""
    rows = len(costs)
    market = _Market(costs, sign, np.arange(rows, dtype=np.int32), np.zeros(rows), deadline)
    patience, taken = int((1.0 - _EASY) * rows), np.zeros(rows, np.bool_)
    if not glance(costs, sign, patience, market.choices, market.offers, market.least, taken):
        return None
    market.seeded = market.prices.copy()
    return market


def _finish(market: _Market, *, kept: NDArray | None = None, best: NDArray | None = None) -> None:
    """Make all pairs optimal; when time is over before, fill up greedily, or take the ``best`` pairing if better."""
    market.auction(0.0, kept=kept)
    if market.finish():
        return
    filled = market.fill()
    if filled is None:
        market.finish(punctual=False)
    else:
        market.column_of = filled if best is None else min(filled, best, key=market.cost)


def _tight(market: _Market, pairs: NDArray) -> tuple[NDArray, float]:
    """Return the pairs that are optimal for the prices of a seeded market, -1 elsewhere, and the mean slack."""
    kept = np.full(len(market.column_of), kernels.FREE, np.int32)
    rows = market.active[pairs[market.active] >= 0]
    columns = pairs[rows]
    reduced = market.sign * market.costs[rows, columns].astype(np.float64) - market.prices[columns]
    slack = reduced - market.least[rows]
    tight = slack <= 0.0
    kept[rows[tight]] = columns[tight]
    slack = slack[np.isfinite(slack)]
    return kept, float(slack.mean()) if len(slack) else 0.0


def _scale(market: _Market, epsilon: float, unit: float, *, kept: NDArray | None = None) -> NDArray | None:
    """Run auctions for falling epsilons, the first with some pairs ``kept``; return the last complete pairing."""
    best = None
    while epsilon > _LAST * unit:
        if market.auction(epsilon, kept=kept):
            best = market.column_of.copy()
        kept = None
        epsilon /= _FACTOR
    return best


def _sample(market: _Market) -> float:
    """Set the prices of a market by auctions among samples of its rows and columns; return their unit of cost."""
    unit = 0.0
    for step, epsilons in _COARSE:
        rows = market.active[::step].copy()
        part = kernels.sample(market.costs, rows, step)
        active = np.arange(len(rows), dtype=np.int32)
        small = _Market(part, market.sign, active, np.zeros(part.shape[1]), market.deadline)
        if unit == 0.0:
            # Prices at which no row regrets: relative to its favourite, so that dead columns fall in line.
            kernels.transform(part, market.sign, active, small.row_duals(), small.prices)
            unit = small.seed()[1] or finite_range(part, market.sign) / epsilons[0]
        else:
            small.prices[:] = market.prices[::step]
            small.seed()
        for epsilon in epsilons:
            small.auction(epsilon * unit)
        kernels.transform(market.costs, market.sign, rows, small.row_duals(), market.prices)
    return unit
