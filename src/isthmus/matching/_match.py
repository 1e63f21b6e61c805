"""``match = objective × coupling solver × schedule``, for those who combine the parts themselves."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from isthmus.matching._objectives import Objective
from isthmus.matching._schedules import Match, Schedule, SinglePass
from isthmus.matching._solvers import Solver, as_solver, assignment_solver
from isthmus.symmetry import Couplings

__all__ = ["match"]


def match(
    objective: Objective,
    *,
    solver: Solver | Callable[[Tensor], Tensor] = assignment_solver,
    schedule: Schedule | None = None,
    start: Couplings | None = None,
    generator: torch.Generator | None = None,
) -> Match:
    """Run a schedule over an objective with a coupling solver.

    Args:
        objective: turns two networks into one gain matrix per group.
        solver: turns a gain matrix into a coupling, or into an index tensor; default: exact linear assignment.
        schedule: order of groups, sweeps and stopping; default: a single pass.
        start: couplings or index tensors to start from (a single pass keeps them as they are).
        generator: for schedules with random orders; default: seed 0.

    Returns:
        Couplings by group, the trace of values and the status.
    """
    used = schedule if schedule is not None else SinglePass()
    source = generator if generator is not None else torch.Generator().manual_seed(0)
    return used.run(objective, as_solver(solver), start, source)
