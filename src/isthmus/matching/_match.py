"""``match = objective × coupling solver × schedule``, for those who combine the parts themselves."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from isthmus.matching._objectives import AbstractObjective
from isthmus.matching._schedules import AbstractSchedule, Match, SinglePass, Solver, assignment_solver

__all__ = ["match"]


def match(
    objective: AbstractObjective,
    *,
    solver: Solver = assignment_solver,
    schedule: AbstractSchedule | None = None,
    start: Mapping[str, Tensor] | None = None,
    generator: torch.Generator | None = None,
) -> Match:
    """Run a schedule over an objective with a coupling solver.

    Args:
        objective: turns two networks into one gain matrix per group.
        solver: turns a gain matrix into a permutation; default: exact linear assignment.
        schedule: order of groups, sweeps and stopping; default: a single pass.
        start: permutations to start from (a single pass keeps them as they are).
        generator: for schedules with random orders; default: seed 0.

    Returns:
        Permutations by group, the trace of values and the status.
    """
    used = schedule if schedule is not None else SinglePass()
    source = generator if generator is not None else torch.Generator().manual_seed(0)
    return used.run(objective, solver, start, source)
