"""Exact linear assignment of rows to columns, with a proof: the front door to two engines."""

from __future__ import annotations

import functools
import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from isthmus.errors import DataError, ShapeError
from isthmus.transport._certificate import (
    Infeasible,
    Solution,
    certify,
    finite_range,
    prices_of,
)
from isthmus.transport._inputs import as_real

__all__ = ["Assigned", "assign"]

_LOGGER = logging.getLogger("isthmus.transport")

_LARGE = 256 * 256 + 1
"""Entries from which on the compiled engine is used. Up to there, and so for the demo's 256 units, SciPy takes a few
milliseconds, and no one has to wait for the engine: 0.4 seconds to load in each process, 10 and more to compile when
used for the first time."""


_SHORT = (torch.float16, torch.bfloat16, torch.bool, torch.uint8, torch.int8, torch.int16)
"""Dtypes whose numbers float32 holds exactly."""

_LARGEST = 2.0**960
"""Entries up to here are far from overflow, whatever the number of rows."""


@dataclass(frozen=True, eq=False)
class Assigned:
    """The best pairing of rows with columns found, and what proves it.

    For a batch, tensors have a leading batch axis; ``value`` and ``gap`` are totals, as if the matrices were the
    blocks of one block-diagonal problem.

    Attributes:
        columns: the column given to each row, int64, shape ``(rows,)``, on the device of the matrix; ``-1`` for
            the rows left over when there are more rows than columns.
        value: sum of the chosen entries, in float64, in the unit of the matrix.
        row_duals: float64, shape ``(rows,)``.
        column_duals: float64, shape ``(columns,)``. The two are feasible: no entry is less than the sum of its
            duals as a real number (greater when maximising), so the sum of all duals bounds the value of any pairing.
        gap: distance from ``value`` to that bound, never negative. It is exactly 0 when the pairing is proven optimal:
            with row duals before rounding, no pairing is better by more than 32 machine epsilons (7e-15) times the
            sum of the absolute chosen entries, and with the row duals as returned by no more than 1e-9 times that
            sum. The size of the duals plays no role.
    """

    columns: Tensor
    value: float
    row_duals: Tensor
    column_duals: Tensor
    gap: float


def assign(
    matrix: Any,
    *,
    maximize: bool = False,
    warm: Assigned | None = None,
    budget: float | None = None,
    proof: bool = True,
) -> Assigned:
    r"""Pair rows with columns so that the sum of the chosen entries is the least (or the greatest).

    .. math:: \min_{\pi} \sum_i C_{i\pi(i)} \;=\; \max_{u_i + v_j \le C_{ij}} \sum_i u_i + \sum_j v_j

    over injective maps of the shorter side into the longer one (with :math:`v \le 0` on the longer side when the
    sides differ). The duals come with the pairing and prove it.

    Args:
        matrix: costs (or gains with ``maximize``), shape ``(rows, columns)``, or ``(batch, rows, columns)`` for a
            batch of small problems; tensor or numpy array, of any real dtype. An infinite entry forbids its pair:
            ``+inf`` as a cost, ``-inf`` as a gain. Prefer it to a large penalty: pairs that cannot be avoided then
            are an error, not a sum in whose rounding the other entries are lost.
        maximize: read the entries as gains.
        warm: the assignment of an earlier, similar matrix of the same shape, to start from. It changes the time
            taken, not the value.
        budget: seconds, counted from the call. When they are over, the best pairing so far is returned with its
            proven ``gap``. Two scans of the matrix are made in any case, and forbidden pairs are avoided even at
            the cost of more time. By default the optimum is found however long it takes.
        proof: whether the duals are wanted. Without, they and the gap of a small problem are NaN, and it takes less
            than half the time.

    Returns:
        The optimal :class:`Assigned`; exact for the entries as given: float32 and shorter entries are used as
        they are, with duals and sums in float64.

    Raises:
        ShapeError: not a matrix or a batch of them, or ``warm`` belongs to another shape.
        DataError: NaN or complex entries, an infinite entry of the attractive sign, no pairing without a
            forbidden pair, integers that float64 would round, sums beyond the range of float64, a warm start that
            is damaged, or a budget that is not positive.

    Notes:
        Large problems run in a compiled engine when numba is installed (``pip install "isthmus[fast]"``), else in
        SciPy, which uses neither ``warm`` nor ``budget``; the logger ``isthmus.transport`` says which, once. The
        first call compiles for ten seconds (for each of float32 and float64) and caches the result; the first of a
        process loads it in 0.4. Time is O(rows² · columns) at worst and mostly near O(rows · columns);
        ``docs/assignment.md`` has measurements, ``docs/decisions/0004-assignment-engine.md`` the reasons.
        Deterministic, except under a budget. CUDA matrices are copied to the CPU, results back.

    Example:
        >>> found = assign([[4.0, 1.0, 3.0], [2.0, 0.0, 5.0], [3.0, 2.0, 2.0]])
        >>> found.columns.tolist(), found.value, found.gap
        ([1, 0, 2], 5.0, 0.0)

    Source:
        Bertsekas (1988) for the auction, Jonker & Volgenant (1987) for augmenting paths; see the engine's notes.
    """
    if budget is not None and not budget > 0.0:
        raise DataError(f"assign: expected a budget of more than 0 seconds, found {budget}.")
    deadline = math.inf if budget is None else time.monotonic() + budget
    entries = as_real(matrix, "assign: matrix")
    if entries.ndim not in (2, 3):
        raise ShapeError(
            f"assign: matrix: expected 2 axes (or 3 for a batch), found shape {tuple(entries.shape)}. "
            "Rows list the units of A, columns those of B."
        )
    shape = tuple(entries.shape)
    if warm is not None:
        _check_warm(warm, shape)
    if entries.ndim == 2:
        return _assign_one(entries, maximize, warm, deadline, proof)
    parts = []
    for k, block in enumerate(entries):
        start = None
        if warm is not None:
            start = Assigned(warm.columns[k], 0.0, warm.row_duals[k], warm.column_duals[k], 0.0)
        parts.append(_assign_one(block, maximize, start, deadline, proof))
    return _batch(parts, entries)


def _check_warm(warm: Assigned, shape: tuple[int, ...]) -> None:
    sizes = tuple(warm.row_duals.shape), tuple(warm.column_duals.shape)
    if sizes != (shape[:-1], (*shape[:-2], shape[-1])) or warm.columns.shape != warm.row_duals.shape:
        raise ShapeError(
            f"assign: the warm start has duals of shapes {sizes[0]} and {sizes[1]}, the matrix has shape {shape}. "
            "Start from an assignment of the same shape."
        )
    if not bool(torch.isfinite(warm.row_duals).all() and torch.isfinite(warm.column_duals).all()):
        raise DataError("assign: the warm start has NaN or infinite duals. Start from a result of assign.")
    whole = not (warm.columns.is_floating_point() or warm.columns.is_complex())
    if not whole or bool(((warm.columns < -1) | (warm.columns >= shape[-1])).any()):
        raise DataError(
            f"assign: the warm start pairs rows with columns outside 0..{shape[-1] - 1} (-1 for none). Start from a "
            "result of assign."
        )


def _assign_one(
    entries: Tensor, maximize: bool, warm: Assigned | None, deadline: float, proof: bool
) -> Assigned:
    costs = _as_costs(entries)
    sign = -1.0 if maximize else 1.0
    prices = pairs = None
    if warm is not None:
        prices, pairs = sign * _float64(warm.column_duals), warm.columns.cpu().numpy()
    square = costs.shape[0] == costs.shape[1]
    # The engines want rows no longer than columns, and rows contiguous; a square matrix may be turned for free.
    turned = costs.shape[0] > costs.shape[1] or (square and not costs.flags.c_contiguous)
    if turned:
        costs = costs.T
        if warm is not None:
            prices = sign * _float64(warm.row_duals)
            pairs = _inverse(pairs, costs.shape[0])
    costs = np.ascontiguousarray(costs)
    solution = _solved(costs, sign, prices, pairs, deadline, proof)
    value = sign * solution.cost(costs, sign)
    columns, rows_dual, columns_dual = solution.columns, solution.row_duals, solution.column_duals
    if turned:
        columns = _inverse(columns, costs.shape[1])
        rows_dual, columns_dual = columns_dual, rows_dual
    device = entries.device
    return Assigned(
        columns=torch.from_numpy(columns).to(device),
        value=value,
        row_duals=torch.from_numpy(sign * rows_dual).to(device),
        column_duals=torch.from_numpy(sign * columns_dual).to(device),
        gap=solution.gap,
    )


def _solved(
    costs: NDArray,
    sign: float,
    prices: NDArray | None,
    pairs: NDArray | None,
    deadline: float,
    proof: bool,
) -> Solution:
    """Solve one problem of rows no longer than columns, or say why it has no solution."""
    try:
        with np.errstate(over="ignore", invalid="ignore"):
            solution = _solve(costs, sign, prices, pairs, deadline, proof)
    except Infeasible:
        _check_range(costs)
        raise DataError(
            "assign: every complete pairing uses a forbidden (infinite) pair. "
            "Allow more pairs for the rows or columns that have few."
        ) from None
    except OverflowError:  # of a sum
        _check_range(costs)
        raise
    if proof and not np.isfinite(solution.gap):
        _check_range(costs)
    return solution


def _check_range(costs: NDArray) -> None:
    """Raise if entries are so large that sums of some of them leave the range of float64."""
    largest = float(np.abs(costs[np.isfinite(costs)]).max(initial=0.0))
    if largest > _LARGEST:
        raise DataError(
            f"assign: entries reach {largest:g}, and sums of them leave the range of float64. Divide the matrix by a "
            "power of two; forbid a pair with an infinite entry, not with a huge one."
        )


def _solve(
    costs: NDArray,
    sign: float,
    prices: NDArray | None,
    pairs: NDArray | None,
    deadline: float,
    proof: bool,
) -> Solution:
    solve = _compiled() if costs.size >= _LARGE else None
    if solve is None:
        return _solve_scipy(costs, sign, proof)
    found = solve(costs, sign, prices=prices, pairs=pairs, deadline=deadline)
    # Prices far above the entries round them away, and the engine trusts its prices: those of a start from another
    # scale, or those that penalties have driven. The proof notices; then another way is taken.
    if not found.settled and prices is not None and time.monotonic() < deadline:
        found = _better(costs, sign, found, solve(costs, sign, deadline=deadline))
    if not found.settled and deadline == math.inf:
        found = _better(costs, sign, found, _solve_scipy(costs, sign))
    return found


def _better(costs: NDArray, sign: float, one: Solution, other: Solution) -> Solution:
    """Return the solution of less cost; of equal ones, that with the better proof."""
    return min(one, other, key=lambda s: (s.cost(costs, sign), not s.settled, s.gap))


@functools.cache
def _compiled() -> Callable[..., Solution] | None:
    """Return the compiled solver, or None where it cannot be used; say which, once."""
    try:
        from isthmus.transport import _engine
    except (ImportError, RuntimeError) as failure:  # numba is missing, or finds no place for its cache
        _LOGGER.info('Large assignments use SciPy (%s); "isthmus[fast]" brings a faster engine.', failure)
        return None
    _LOGGER.info("Large assignments use the compiled engine; its first use may take some seconds.")
    return _engine.solve


def _solve_scipy(costs: NDArray, sign: float, proof: bool = True) -> Solution:
    if not np.isfinite(costs).all():
        finite_range(costs, sign)
    try:
        _, columns = linear_sum_assignment(costs, maximize=sign < 0)
    except ValueError:
        raise Infeasible from None
    if not proof:
        nothing = np.full(len(columns), np.nan), np.full(costs.shape[1], np.nan)
        return Solution(columns.astype(np.int64), *nothing, np.nan, True)
    prices = prices_of(costs, sign, columns)
    return certify(costs, sign, columns, prices)


def _as_costs(entries: Tensor) -> NDArray:
    """Return the entries on the CPU, as float32 where that holds them exactly, else as float64.

    Raises:
        DataError: integers that float64 does not hold.
    """
    if entries.dtype in _SHORT:
        return entries.float().cpu().numpy()
    if entries.dtype in (torch.int64, torch.uint64):
        _check_integers(entries)
    if entries.dtype not in (torch.float32, torch.float64):
        entries = entries.double()
    return entries.cpu().numpy()


def _check_integers(entries: Tensor) -> None:
    whole = entries.cpu().numpy()
    wide = whole.astype(np.float64)
    # 2**63 and 2**64 are floats of no such integer; below them the way back is exact.
    top = wide >= float(2 ** (63 if entries.dtype == torch.int64 else 64))
    rounded = top | (np.where(top, 0.0, wide).astype(whole.dtype) != whole)
    if bool(rounded.any()):
        example = int(whole[rounded][0])
        raise DataError(
            f"assign: {int(rounded.sum())} of {whole.size} integers are beyond 2**53 and would be rounded, such as "
            f"{example}. Subtract a common number from all entries, forbid pairs with infinite entries of a floating "
            "matrix, or pass matrix.double() if rounding does no harm."
        )


def _float64(duals: Tensor) -> NDArray[np.float64]:
    return duals.detach().cpu().double().numpy()


def _inverse(columns: Any, length: int) -> NDArray[np.int64]:
    """Return the row of each of ``length`` columns, -1 for those left over."""
    rows = np.full(length, -1, dtype=np.int64)
    paired = columns >= 0
    rows[columns[paired]] = np.flatnonzero(paired)
    return rows


def _batch(parts: list[Assigned], entries: Tensor) -> Assigned:
    if not parts:
        rows = torch.zeros(entries.shape[:2], device=entries.device)
        columns = torch.zeros(entries.shape[::2], device=entries.device)
        return Assigned(rows.long(), 0.0, rows.double(), columns.double(), 0.0)
    return Assigned(
        columns=torch.stack([p.columns for p in parts]),
        value=math.fsum(p.value for p in parts),
        row_duals=torch.stack([p.row_duals for p in parts]),
        column_duals=torch.stack([p.column_duals for p in parts]),
        gap=math.fsum(p.gap for p in parts),
    )
