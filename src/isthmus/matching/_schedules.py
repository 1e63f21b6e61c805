"""In which order groups are matched, how often, and when to stop."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from isthmus.coupling import identity_permutation, moved_fraction
from isthmus.errors import DataError
from isthmus.matching._grids import Cluster
from isthmus.matching._nested import Solver, couple, total_gain
from isthmus.matching._objectives import AbstractObjective
from isthmus.transport import assign

__all__ = ["AbstractSchedule", "CoordinateDescent", "Match", "SinglePass", "assignment_solver"]


def assignment_solver(gain: Tensor) -> Tensor:
    """Return the permutation of largest total gain (exact linear assignment)."""
    return assign(gain, maximize=True).columns.cpu()


@dataclass(frozen=True, eq=False)
class Match:
    """What a schedule found.

    Attributes:
        permutations: by group.
        sweeps: value after each sweep; for a single pass, the sum of the matched gains.
        status: why it stopped.
    """

    permutations: dict[str, Tensor]
    sweeps: tuple[float, ...]
    status: str


class AbstractSchedule(Protocol):
    """Runs an objective and a solver over the groups."""

    def run(
        self,
        objective: AbstractObjective,
        solver: Solver,
        start: Mapping[str, Tensor] | None,
        generator: torch.Generator,
    ) -> Match:
        """Return permutations for all groups of the objective, and those of ``start`` for all others."""
        ...


@dataclass(frozen=True)
class SinglePass:
    """Match each group once, in order; later layers see the groups matched before them.

    Terms that touch groups not matched yet are left out as long as another term remains. Groups of a cluster
    that only such terms are about follow when the rest of the cluster is matched.
    """

    def run(
        self,
        objective: AbstractObjective,
        solver: Solver,
        start: Mapping[str, Tensor] | None,
        generator: torch.Generator,
    ) -> Match:
        """Return one permutation per group; those in ``start`` are already matched."""
        permutations = dict(start or {})
        structure = objective.structure
        total = 0.0
        for cluster in structure.clusters:
            while missing := [name for name in cluster if name not in permutations]:
                gains = objective.gains(cluster, permutations, all_terms=False)
                found = [name for name in missing if any(name in g.members for g in gains)]
                assert found, "gains are about at least one group that is not matched yet"
                change = couple(gains, found, solver)
                total += total_gain(gains, change)
                permutations = structure.followed(permutations, cluster, change)
        return Match(permutations, (total,), "single pass")


@dataclass(frozen=True)
class CoordinateDescent:
    """Sweep over the groups until no group improves the objective's value.

    A proposal is kept only if it raises the value, so the trace never falls, even where a group acts on two
    axes of one tensor and the gain matrix is only a linearisation. Groups that share an axis move together.

    Attributes:
        order: ``"forward"`` (as computed by the network) or ``"random"`` (a new order in every sweep, as in
            Ainsworth et al. 2023).
        max_sweeps: sweeps after which it gives up; the status says so.
        tolerance: smallest rise that counts, relative to the value.
    """

    order: Literal["forward", "random"] = "forward"
    max_sweeps: int = 100
    tolerance: float = 1e-12

    def __post_init__(self) -> None:
        """Check the settings.

        Raises:
            DataError: an unknown order, or a negative number of sweeps.
        """
        if self.order not in ("forward", "random"):
            raise DataError(f"CoordinateDescent: expected order 'forward' or 'random', found {self.order!r}.")
        if self.max_sweeps < 0:
            raise DataError(f"CoordinateDescent: expected max_sweeps of at least 0, found {self.max_sweeps}.")

    def run(
        self,
        objective: AbstractObjective,
        solver: Solver,
        start: Mapping[str, Tensor] | None,
        generator: torch.Generator,
    ) -> Match:
        """Return a fixed point: no cluster's proposal improves the value. Groups not in ``start`` start as they are."""
        structure = objective.structure
        permutations = {g: identity_permutation(n) for g, n in structure.sizes.items()}
        permutations.update(start or {})
        value = objective.value(permutations)
        trace = [value]
        for _ in range(self.max_sweeps):
            improved = False
            for cluster in self._ordered(structure.clusters, generator):
                change = couple(objective.gains(cluster, permutations), cluster, solver, keep=True)
                if all(moved_fraction(p) == 0.0 for p in change.values()):
                    continue
                changed = structure.followed(permutations, cluster, change)
                rise = objective.value(changed, cluster) - objective.value(permutations, cluster)
                if rise > self.tolerance * abs(value):
                    permutations, value, improved = changed, value + rise, True
            trace.append(value)
            if not improved:
                return Match(permutations, tuple(trace), "converged")
        return Match(permutations, tuple(trace), "sweep limit reached")

    def _ordered(self, clusters: Sequence[Cluster], generator: torch.Generator) -> Sequence[Cluster]:
        if self.order == "forward":
            return clusters
        return [clusters[int(k)] for k in torch.randperm(len(clusters), generator=generator)]
