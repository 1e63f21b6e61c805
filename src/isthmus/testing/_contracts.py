"""What every objective and schedule must keep, as a check that third-party parts can run too."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from isthmus.couplings import random_permutation
from isthmus.matching import (
    Match,
    Objective,
    Schedule,
    Solver,
    assignment_solver,
    total_gain,
)

__all__ = ["check_alignment_contract"]

_TOLERANCE = 1e-9


def check_alignment_contract(
    objective: Objective,
    schedule: Schedule,
    *,
    solver: Solver = assignment_solver,
    seed: int = 0,
) -> Match:
    """Run a schedule over an objective and check what every pair of them promises.

    * Gains are finite float64 square matrices whose members list each cell of a unit once, and they are
      relative: with permutations in place, the gain of staying equals the absolute gain of those permutations
      up to what does not depend on the cluster's change.
    * The result has one permutation per group; groups given in full as a start of a single pass stay.
    * The same seed gives the same result, whatever torch's global generator is.
    * Where a value is traced, it never falls, and the last one is the value of the result.
    * A converged result is a fixed point: starting from it changes nothing.

    Args:
        objective: what is matched.
        schedule: the order of matching.
        solver: couples one gain matrix.
        seed: of the generator.

    Returns:
        What the schedule found.

    Raises:
        AssertionError: naming the promise that was broken.
    """
    _check_gains(objective, seed)
    found = schedule.run(objective, solver, None, torch.Generator().manual_seed(seed))
    _check_permutations(objective, found.permutations)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed + 1)
        again = schedule.run(objective, solver, None, torch.Generator().manual_seed(seed))
    _require(_same(found.permutations, again.permutations), "the result depends on torch's global generator")
    _check_trace(objective, found)
    if found.status == "converged":
        fixed = schedule.run(objective, solver, found.permutations, torch.Generator().manual_seed(seed + 1))
        _require(_same(found.permutations, fixed.permutations), "a converged result is no fixed point")
    elif len(found.sweeps) == 1:
        kept = schedule.run(objective, solver, found.permutations, torch.Generator().manual_seed(seed))
        _require(_same(found.permutations, kept.permutations), "permutations given as a start were changed")
    return found


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise AssertionError(f"alignment contract: {message}.")


def _same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(p, other[name]) for name, p in one.items())


def _check_gains(objective: Objective, seed: int) -> None:
    structure = objective.structure
    generator = torch.Generator().manual_seed(seed)
    draw = {name: random_permutation(size, generator) for name, size in structure.sizes.items()}
    for cluster in structure.clusters:
        others = {name: p for name, p in draw.items() if name not in cluster}
        absolute, relative = objective.gains(cluster, others), objective.gains(cluster, draw)
        for gain in absolute:
            size = len(gain.matrix)
            _require(
                gain.matrix.dtype == torch.float64 and gain.matrix.shape == (size, size),
                f"gains of {cluster} are no square float64 matrix",
            )
            _require(bool(torch.isfinite(gain.matrix).all()), f"gains of {cluster} are not finite")
            for name, own in gain.members.items():
                _require(
                    len(own) == structure.sizes[name] and len(own.unique()) == own.numel(),
                    f"gains of {cluster} do not list the cells of each unit of {name!r} once",
                )
        missing = [name for name in cluster if not any(name in g.members for g in absolute)]
        _require(not missing, f"no gain of {cluster} is about {missing}")
        if len(cluster) == 1:
            chosen = {cluster[0]: draw[cluster[0]]}
            here, there = total_gain(relative, {}), total_gain(absolute, chosen)
            scale = sum(float(g.matrix.abs().sum()) for g in absolute)
            linear = not _acts_twice(objective, cluster[0])
            _require(
                not linear or abs(here - there) <= _TOLERANCE * max(scale, 1.0),
                f"gains of {cluster} are not relative to the current permutations",
            )


def _acts_twice(objective: Objective, group: str) -> bool:
    """Return whether a group moves two axes of one tensor, so that its gain is a linearisation."""
    slots = objective.structure.spec.groups[group].slots
    return len({s.tensor for s in slots}) < len({(s.tensor, s.axis) for s in slots})


def _check_permutations(objective: Objective, permutations: Mapping[str, Tensor]) -> None:
    sizes = objective.structure.sizes
    _require(set(permutations) == set(sizes), "not every group has a permutation")
    for name, permutation in permutations.items():
        _require(
            torch.equal(permutation.sort().values, torch.arange(sizes[name])),
            f"the result for {name!r} is no permutation",
        )


def _check_trace(objective: Objective, found: Match) -> None:
    if len(found.sweeps) < 2:
        return
    steps = torch.tensor(found.sweeps).diff()
    _require(bool((steps >= 0).all()), "the traced value falls")
    value = objective.value(found.permutations)
    scale = max(abs(value), abs(found.sweeps[0]), 1.0)
    _require(abs(value - found.sweeps[-1]) <= _TOLERANCE * scale, "the trace is not the value of the result")
