"""Entropically regularised transport, through POT (extra ``ot``)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from isthmus.errors import DataError, MissingExtraError, ShapeError
from isthmus.transport._inputs import as_float64_matrix

__all__ = ["EntropicPlan", "entropic_plan"]


@dataclass(frozen=True, eq=False)
class EntropicPlan:
    """An entropic transport plan and how well it keeps its marginals.

    Attributes:
        plan: masses, float64, shape ``(rows, columns)``, on the device of the cost; sums to 1 when converged.
        value: transport cost ``(plan * cost).sum()``, without the entropy term, in the unit of the cost.
        row_error: largest absolute violation of a row mass.
        column_error: the same for columns.
        iterations: Sinkhorn iterations used.
        status: ``"converged"``, or ``"not converged"``: raise ``regularisation`` first, then
            ``max_iterations``.
    """

    plan: Tensor
    value: float
    row_error: float
    column_error: float
    iterations: int
    status: Literal["converged", "not converged"]


def entropic_plan(
    cost: Any,
    regularisation: float,
    *,
    row_masses: Any = None,
    column_masses: Any = None,
    max_iterations: int = 10_000,
    tolerance: float = 1e-9,
) -> EntropicPlan:
    r"""Transport masses at the least cost plus entropy, by Sinkhorn's iterations in the log domain.

    .. math::
        \min_{P \ge 0} \; \langle P, C \rangle + \varepsilon \sum_{ij} P_{ij} (\log P_{ij} - 1),
        \qquad P 1 = r, \quad P^\top 1 = c

    Args:
        cost: finite costs, shape ``(rows, columns)``; tensor or numpy array.
        regularisation: :math:`\varepsilon`, in the unit of the cost, positive. The plan tends to an optimal
            one as it falls, and the number of iterations grows.
        row_masses: :math:`r`, shape ``(rows,)``, non-negative, summing to 1; uniform by default.
        column_masses: :math:`c`, shape ``(columns,)``; uniform by default.
        max_iterations: iterations after which the status is ``"not converged"``.
        tolerance: largest marginal violation of a converged plan.

    Raises:
        MissingExtraError: POT is not installed.
        ShapeError: an empty cost, or masses of another length.
        DataError: entries that are not finite, a regularisation that is not positive, or masses that are
            negative or do not sum to 1.

    Source:
        Cuturi (2013); POT's ``sinkhorn_log``.
    """
    try:
        import ot
    except ImportError as failure:
        raise MissingExtraError(
            'entropic_plan needs POT. Install it with: pip install "isthmus[ot]"'
        ) from failure
    costs = as_float64_matrix(cost, "entropic_plan: cost")
    if costs.numel() == 0:
        raise ShapeError(f"entropic_plan: expected at least one row and column, found {tuple(costs.shape)}.")
    if not regularisation > 0.0:
        raise DataError(
            f"entropic_plan: expected a positive regularisation, found {regularisation}. "
            "For none at all use isthmus.transport.assign."
        )
    rows = _masses(row_masses, costs.shape[0], "row_masses").to(costs.device)
    columns = _masses(column_masses, costs.shape[1], "column_masses").to(costs.device)
    solution: tuple[Tensor, dict[str, Any]] = ot.sinkhorn(
        rows,
        columns,
        costs,
        regularisation,
        method="sinkhorn_log",
        numItermax=max_iterations,
        stopThr=0.5 * tolerance,
        warn=False,
        log=True,
    )
    plan, log = solution
    row_error = float((plan.sum(1) - rows).abs().max())
    column_error = float((plan.sum(0) - columns).abs().max())
    converged = max(row_error, column_error) <= tolerance
    return EntropicPlan(
        plan=plan,
        value=float((plan * costs).sum()),
        row_error=row_error,
        column_error=column_error,
        iterations=int(log["niter"]) + 1,
        status="converged" if converged else "not converged",
    )


def _masses(masses: Any, length: int, name: str) -> Tensor:
    if masses is None:
        return torch.full((length,), 1.0 / length, dtype=torch.float64)
    values = as_float64_matrix(masses, f"entropic_plan: {name}", ndim=1)
    if values.shape != (length,):
        raise ShapeError(f"entropic_plan: expected {length} {name}, found {len(values)}.")
    if bool((values < 0).any()) or abs(float(values.sum()) - 1.0) > 1e-6:
        raise DataError(
            f"entropic_plan: expected non-negative {name} summing to 1, "
            f"found a sum of {float(values.sum()):.6g}. Divide them by their sum."
        )
    return values / values.sum()
