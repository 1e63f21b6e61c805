r"""The float64 optimum of an assignment whose gains are known only up to an error bound.

Let :math:`\tilde G` be the estimated gains with :math:`\lvert G_{ij} - \tilde G_{ij}\rvert \le r_i c_j`, let
:math:`\pi` be optimal for them and :math:`u_i + v_j \ge \tilde G_{ij}` its duals. For a margin :math:`\mu` the
*rivals* are the pairs outside :math:`\pi` with :math:`u_i + v_j - \tilde G_{ij} \le r_i c_j + \mu`; all others have a
true slack above :math:`\mu`. Rivals form a graph on the rows: :math:`(i, j)` is an edge from row :math:`i` to the row
that :math:`\pi` pairs with column :math:`j`. A better assignment moves along cycles. The gains of rivals on a cycle,
and of those that may be better than their row's pair, are computed exactly, and the assignment is put right among them
if need be; elsewhere the bounds serve. Then duals :math:`u + x, v + y` are sought that are tight on :math:`\pi` and
feasible on all rivals whatever the true gains within their bounds. When :math:`-x_i - y_j \le \mu` they are feasible on
all other pairs too, so :math:`\pi` is optimal for :math:`G`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse import csr_array
from scipy.sparse.csgraph import connected_components, min_weight_full_bipartite_matching
from torch import Tensor

from isthmus.couplings import invert_permutation
from isthmus.matching._pairs import kernels_for
from isthmus.matching._products import rounding_of
from isthmus.transport import Assigned

__all__ = ["ErrorBound", "certified"]

ExactPairs = Callable[[Tensor, Tensor], Tensor]
"""Returns the float64 gains of pairs, given by their rows and their columns."""

_MARGINS = (1.5, 6.0, 48.0)
"""Margins that are tried, in units of the largest bound of a pair."""
_MOST = 16
"""Rivals per row beyond which the products are redone in float64 instead."""
_CHUNK = 2**18
_ROUNDS = 1000
_TIE = 2.0**-46
"""Differences of exact gains below this, relative to the gains, are rounding of float64 sums."""


@dataclass(frozen=True, eq=False)
class ErrorBound:
    """Bounds on the distance of estimated gains from the true ones: ``rows[i] * columns[j]``, both float64."""

    rows: Tensor
    columns: Tensor

    def of_pairs(self, columns: Tensor) -> Tensor:
        """Return the bound of each row's pair."""
        return self.rows * self.columns[columns]


def certified(estimate: Tensor, found: Assigned, bound: ErrorBound, exact: ExactPairs) -> Tensor | None:
    """Return the column of each row in an assignment that is optimal for the true gains, or ``None`` if unproven.

    Args:
        estimate: gains, float32, shape ``(size, size)``.
        found: the optimal assignment of the estimate (maximising).
        bound: distance of the true gains.
        exact: the true gains.
    """
    columns, u, v = (x.cpu() for x in (found.columns, found.row_duals, found.column_duals))
    error = bound.of_pairs(columns)
    if found.gap != 0.0 or not bool(torch.isfinite(error).all()):
        return None
    for factor in _MARGINS:
        margin = factor * float(error.max())
        near = _rivals(estimate, columns, u, v, bound, margin)
        if near is None:
            return None
        if not len(near[0]):
            return columns
        settled = _settled(estimate, columns, (u, v), bound, exact, near, margin)
        if settled is not None:
            return settled
    return None


def _settled(
    estimate: Tensor,
    columns: Tensor,
    duals: tuple[Tensor, Tensor],
    bound: ErrorBound,
    exact: ExactPairs,
    rivals: tuple[Tensor, Tensor],
    margin: float,
) -> Tensor | None:
    """Return the assignment that is best among its pairs and their rivals, ``None`` if the margin is too small."""
    size = len(columns)
    owner, everyone = invert_permutation(columns), torch.arange(size)
    start, end = torch.cat([everyone, rivals[0]]), torch.cat([columns, rivals[1]])
    at = start.to(estimate.device), end.to(estimate.device)
    level = duals[0][start] + duals[1][end]
    error = bound.rows[start] * bound.columns[end]
    # The most that the slack of a pair can be, the least that of a rival can be.
    slack = level - estimate[at].cpu().double() + torch.where(torch.arange(len(start)) < size, error, -error)
    close = slack[size:] < slack[rivals[0]]
    graph = csr_array(
        (np.ones(len(close)), (rivals[0].numpy(), owner[rivals[1]].numpy())), shape=(size, size)
    )
    kinds = torch.from_numpy(connected_components(graph, connection="strong")[1])
    close |= kinds[rivals[0]] == kinds[owner[rivals[1]]]
    known = torch.cat([torch.isin(everyone, rivals[0][close]), close])
    if bool(known.any()):
        slack[known] = level[known] - exact(start[known], end[known])
    tie = _TIE * float((duals[0][start].abs() + duals[1][end].abs()).max())
    pairs = _settle(start.numpy(), owner[end].numpy(), slack.numpy(), known.numpy(), margin, tie)
    return None if pairs is None else columns[torch.from_numpy(pairs)]


def _rivals(
    estimate: Tensor, chosen: Tensor, u: Tensor, v: Tensor, bound: ErrorBound, margin: float
) -> tuple[Tensor, Tensor] | None:
    """Return the pairs, apart from those chosen, whose slack may be below the margin; ``None`` if they are many."""
    widest = bound.rows * bound.columns.max()
    margin += rounding_of(float(u.abs().max() + v.abs().max() + widest.max()))
    short_u, short_v = (
        (x - y).to(estimate.device, torch.float32) for x, y in ((u, widest + margin), (v, 0.0))
    )
    places = _near(estimate, short_u, short_v, _MOST * len(estimate))
    if places is None:
        return None
    rows, columns = places // len(estimate), places % len(estimate)
    rival = chosen[rows] != columns
    return rows[rival], columns[rival]


def _near(estimate: Tensor, u: Tensor, v: Tensor, most: int) -> Tensor | None:
    """Return the places of the entries with ``entry - v[j] >= u[i]``, or ``None`` if they are more than ``most``."""
    kernels = kernels_for(estimate)
    if kernels is not None:
        places = np.empty(most, np.int64)
        count = kernels.near_pairs(estimate.numpy(), u.numpy(), v.numpy(), places)
        return torch.from_numpy(np.sort(places[:count])) if count <= most else None
    step = max(1, _CHUNK // len(estimate))
    found: list[Tensor] = []
    count, above = 0, torch.empty(0)
    for start in range(0, len(estimate), step):
        own = slice(start, start + step)
        above = torch.sub(estimate[own], v, out=above if len(above) == len(u[own]) else None)
        # NumPy finds the few that are true several times faster than torch.
        near = np.flatnonzero((above >= u[own, None]).cpu().numpy())
        found.append(torch.from_numpy(near) + start * len(estimate))
        count += len(near)
        if count > most:
            return None
    return torch.cat(found)


def _settle(
    start: NDArray, end: NDArray, slack: NDArray, known: NDArray, margin: float, tie: float
) -> NDArray | None:
    """Return the best assignment among pairs and rivals, by which row's former column each row gets.

    Args:
        start: row of each edge; the first ones are the pairs as they are, in order.
        end: the row whose column the edge leads to.
        slack: of the edges under the duals at hand; may be negative.
        known: the edges whose slack is exact; only they may be exchanged.
        margin: most by which the duals may move together.
        tie: rounding.

    Returns:
        The assignment, or ``None`` if the duals would have to move too far.
    """
    size = int(start.max()) + 1
    pairs = np.arange(size)
    if _prices(start, end, slack, pairs, margin, tie):
        return pairs
    rows = np.flatnonzero(known[:size])
    if not len(rows):
        return None
    place = np.zeros(size, np.int64)
    place[rows] = np.arange(len(rows))
    inside = slack[known]
    weights = inside - inside.min() + max(float(np.ptp(inside)), np.finfo(np.float64).tiny)
    graph = csr_array((weights, (place[start[known]], place[end[known]])), shape=(len(rows), len(rows)))
    order, best = min_weight_full_bipartite_matching(graph)
    pairs[rows[order]] = rows[best]
    return pairs if _prices(start, end, slack, pairs, margin, tie) else None


def _prices(start: NDArray, end: NDArray, slack: NDArray, pairs: NDArray, margin: float, tie: float) -> bool:
    """Return whether duals within the margin prove that pairs are best among the edges (Bellman and Ford)."""
    own = np.zeros(len(pairs))
    chosen = pairs[start] == end
    own[start[chosen]] = slack[chosen]
    lead = own[start] - slack
    raised = np.zeros(len(pairs))
    for _ in range(_ROUNDS):
        needed = raised[pairs[start]] + lead
        if bool((needed <= raised[end] + tie).all()):
            return bool((own + raised[pairs]).max() <= margin)
        np.maximum.at(raised, end, needed)
        if float(raised.max()) > 2 * margin:
            return False
    return False
