"""In which order groups are matched, how often, and when to stop."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import torch
from torch import Tensor

from isthmus.couplings import identity_permutation, moved_fraction
from isthmus.errors import DataError
from isthmus.matching._grids import Cluster
from isthmus.matching._incremental import Incremental, Products
from isthmus.matching._nested import Solver, best_change
from isthmus.matching._objectives import AbstractObjective, TermObjective
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


class _Plain:
    """An objective that remembers nothing, as the schedules see it."""

    def __init__(self, objective: AbstractObjective) -> None:
        self._objective, self.value = objective, objective.value

    def depends(self, cluster: Cluster) -> frozenset[str]:
        """Return all groups: who knows."""
        return frozenset(self._objective.structure.sizes)

    def change(
        self,
        cluster: Cluster,
        permutations: Mapping[str, Tensor],
        solver: Solver,
        *,
        names: Sequence[str] | None = None,
        measured: bool = False,
    ) -> tuple[dict[str, Tensor], float]:
        """Return the best change of a cluster (see :meth:`Incremental.change`)."""
        gains = self._objective.gains(cluster, permutations, all_terms=names is None)
        return best_change(gains, cluster, solver, names=names, measured=measured)

    def rise(
        self,
        cluster: Cluster,
        permutations: Mapping[str, Tensor],
        changed: Mapping[str, Tensor],
        threshold: float,
    ) -> tuple[float, bool]:
        """Return by how much a change raises the value, and that this is exact."""
        return self._objective.value(changed, cluster) - self._objective.value(permutations, cluster), True


def _working(objective: AbstractObjective, solver: Solver, products: Products | None) -> Incremental | _Plain:
    """Return an objective as the schedules use it: with a memory where that changes nothing."""
    if isinstance(objective, Incremental) and products is not None:
        return objective
    if isinstance(objective, TermObjective) and solver is assignment_solver and products is not None:
        return Incremental(objective, products)
    return _Plain(objective)


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
        work = _working(objective, solver, "float32")
        permutations = dict(start or {})
        structure = objective.structure
        total = 0.0
        for cluster in structure.clusters:
            while missing := [name for name in cluster if name not in permutations]:
                change, gain = work.change(cluster, permutations, solver, names=missing, measured=True)
                total += gain
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
        incremental: compute only what a changed neighbour touched, skip clusters for which nothing has changed,
            and start each assignment from the last one. Without, every sweep computes everything again; the
            result is the same up to ties.
        products: precision of the products of groups of more than 128 units, ``"float64"``, ``"float32"`` or
            ``"bfloat16"``. Assignments are optimal for the float64 gains in any case (see
            :mod:`isthmus.matching`), so this only changes the time. Without ``incremental``: float64.
    """

    order: Literal["forward", "random"] = "forward"
    max_sweeps: int = 100
    tolerance: float = 1e-12
    incremental: bool = field(default=True, repr=False)
    products: Products = field(default="float32", repr=False)

    def __post_init__(self) -> None:
        """Check the settings.

        Raises:
            DataError: an unknown order or precision, or a negative number of sweeps.
        """
        if self.order not in ("forward", "random"):
            raise DataError(f"CoordinateDescent: expected order 'forward' or 'random', found {self.order!r}.")
        if self.max_sweeps < 0:
            raise DataError(f"CoordinateDescent: expected max_sweeps of at least 0, found {self.max_sweeps}.")
        if self.products not in ("float64", "float32", "bfloat16"):
            raise DataError(
                "CoordinateDescent: expected products 'float64', 'float32' or 'bfloat16', "
                f"found {self.products!r}."
            )

    def run(
        self,
        objective: AbstractObjective,
        solver: Solver,
        start: Mapping[str, Tensor] | None,
        generator: torch.Generator,
    ) -> Match:
        """Return a fixed point: no cluster's proposal improves the value. Groups not in ``start`` start as they are."""
        work = _working(objective, solver, self.products if self.incremental else None)
        structure = objective.structure
        permutations = {g: identity_permutation(n) for g, n in structure.sizes.items()}
        permutations.update(start or {})
        value = work.value(permutations)
        trace = [value]
        settled: set[Cluster] = set()
        for _ in range(self.max_sweeps):
            improved, exact = False, True
            for cluster in self._ordered(structure.clusters, generator):
                if cluster in settled:
                    continue
                settled.add(cluster)
                change, _gain = work.change(cluster, permutations, solver)
                if all(moved_fraction(p) == 0.0 for p in change.values()):
                    continue
                changed = structure.followed(permutations, cluster, change)
                threshold = self.tolerance * abs(value)
                rise, known = work.rise(cluster, permutations, changed, threshold)
                if rise > threshold:
                    permutations, value, improved = changed, value + rise, True
                    exact = exact and known
                    settled = {c for c in settled if work.depends(c).isdisjoint(cluster)}
            if not exact:
                value = work.value(permutations)
            trace.append(value)
            if not improved:
                return Match(permutations, tuple(trace), "converged")
        return Match(permutations, tuple(trace), "sweep limit reached")

    def _ordered(self, clusters: Sequence[Cluster], generator: torch.Generator) -> Sequence[Cluster]:
        if self.order == "forward":
            return clusters
        return [clusters[int(k)] for k in torch.randperm(len(clusters), generator=generator)]
