"""In which order groups are matched, how often, and when to stop."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Literal, Protocol

import torch
from torch import Tensor

from isthmus.couplings import Coupling, Permutation, as_coupling, index_of
from isthmus.errors import DataError
from isthmus.matching._grids import Cluster
from isthmus.matching._objectives import Objective
from isthmus.matching._solvers import Solver
from isthmus.matching._working import Products, working
from isthmus.symmetry import Couplings

__all__ = ["CoordinateDescent", "Match", "Schedule", "SinglePass", "Status", "Then"]

_APPROACHED = 1e-6
"""Smallest rise that counts where couplings are continuous, relative to the value."""


class Status(StrEnum):
    """Why a schedule stopped."""

    ROUNDED = "rounded"
    TRAINED = "steps done"
    CONVERGED = "converged"
    SINGLE_PASS = "single pass"
    SWEEP_LIMIT = "sweep limit reached"
    BUDGET = "budget spent"


@dataclass(frozen=True, eq=False)
class Match:
    """The result of a schedule.

    Attributes:
        couplings: by group.
        sweeps: value before the first sweep and after each one; for a single pass, the sum of the matched gains.
        status: why it stopped.
    """

    couplings: Mapping[str, Coupling]
    sweeps: tuple[float, ...]
    status: Status

    def __post_init__(self) -> None:
        """Take index tensors as their permutations."""
        object.__setattr__(self, "couplings", {n: as_coupling(c) for n, c in self.couplings.items()})

    @property
    def permutations(self) -> dict[str, Tensor]:
        """Index tensors by group.

        Raises:
            ShapeError: a coupling is no permutation.
        """
        return {name: index_of(coupling) for name, coupling in self.couplings.items()}


class Schedule(Protocol):
    """The order in which clusters are matched by an objective and a solver, and when to stop."""

    def run(
        self,
        objective: Objective,
        solver: Solver,
        start: Couplings | None,
        generator: torch.Generator,
    ) -> Match:
        """Return the match: couplings of all groups, their value over time, and why the schedule stopped.

        Args:
            objective: what is maximised.
            solver: couples the units of one gain matrix.
            start: couplings to start from; groups of the objective that are missing start as the schedule says, and
                groups that the objective does not have are returned as they are.
            generator: source of randomness.
        """
        ...


@dataclass(frozen=True)
class SinglePass:
    """Match each group once, in order; later layers see the groups matched before them.

    Terms that touch groups not matched yet are left out as long as another term remains. Groups of a cluster
    that only such terms are about follow when the rest of the cluster is matched.
    """

    def run(
        self,
        objective: Objective,
        solver: Solver,
        start: Couplings | None,
        generator: torch.Generator,
    ) -> Match:
        """Return one coupling per group; those in ``start`` are already matched."""
        work = working(objective, solver, "float32")
        at = started(start)
        structure = objective.structure
        total = 0.0
        for cluster in structure.clusters:
            while missing := [name for name in cluster if name not in at]:
                change, gain = work.change(cluster, at, names=missing, measured=True)
                total += gain
                at = structure.followed(at, cluster, change)
        return Match(at, (total,), Status.SINGLE_PASS)


@dataclass(frozen=True)
class CoordinateDescent:
    """Sweep over the groups until no group improves the objective's value.

    A proposal is kept only if it raises the value, so the trace never falls, even where a group acts on two
    axes of one tensor and the gain matrix is only a linearisation. Groups that share an axis move together.

    Attributes:
        order: ``"forward"`` (as computed by the network) or ``"random"`` (a new order in every sweep, as in
            Ainsworth et al. 2023).
        max_sweeps: sweeps after which it gives up; the status says so.
        tolerance: smallest rise that counts, relative to the value; at least 1e-6 where units are multiplied or mixed,
            whose couplings approach their best without ever being there.
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
        objective: Objective,
        solver: Solver,
        start: Couplings | None,
        generator: torch.Generator,
    ) -> Match:
        """Return a fixed point: no cluster's proposal improves the value. Groups not in ``start`` start as they are."""
        work = working(objective, solver, self.products if self.incremental else None)
        structure = objective.structure
        tolerance = self.tolerance if _settles(solver) else max(self.tolerance, _APPROACHED)
        at: dict[str, Coupling] = {g: Permutation.identity(n) for g, n in structure.sizes.items()}
        at.update(started(start))
        value = work.value(at)
        trace = [value]
        settled: set[Cluster] = set()
        for _ in range(self.max_sweeps):
            improved, exact = False, True
            for cluster in self._ordered(structure.clusters, generator):
                if cluster in settled:
                    continue
                settled.add(cluster)
                change, _gain = work.change(cluster, at)
                if all(isinstance(c, Permutation) and not c.moves for c in change.values()):
                    continue
                changed = structure.followed(at, cluster, change)
                threshold = tolerance * abs(value)
                rise, known = work.rise(cluster, at, changed, threshold)
                if rise > threshold:
                    at, value, improved = changed, value + rise, True
                    exact = exact and known
                    settled = {c for c in settled if work.depends(c).isdisjoint(cluster)}
            if not exact:
                value = work.value(at)
            trace.append(value)
            if not improved:
                return Match(at, tuple(trace), Status.CONVERGED)
        return Match(at, tuple(trace), Status.SWEEP_LIMIT)

    def _ordered(self, clusters: Sequence[Cluster], generator: torch.Generator) -> Sequence[Cluster]:
        if self.order == "forward":
            return clusters
        return [clusters[int(k)] for k in torch.randperm(len(clusters), generator=generator)]


@dataclass(frozen=True)
class Then:
    """One schedule after the other: the second starts from what the first one found.

    Attributes:
        first: runs from the start.
        second: goes on; its trace and status are those of the whole.
    """

    first: Schedule
    second: Schedule

    def run(
        self,
        objective: Objective,
        solver: Solver,
        start: Couplings | None,
        generator: torch.Generator,
    ) -> Match:
        """Return the match of the second schedule, which starts from the couplings of the first."""
        found = self.first.run(objective, solver, start, generator)
        return self.second.run(objective, solver, found.couplings, generator)


def _settles(solver: Solver) -> bool:
    """Return whether a solver chooses among finitely many couplings, so that a descent comes to an end."""
    solvers = getattr(solver, "solvers", {}).values() or [solver]
    return all(s.acts in ("permutation", "signed", "by class") for s in solvers)


def started(start: Couplings | None) -> dict[str, Coupling]:
    """Return the start of a schedule as couplings; an index tensor stands for its permutation."""
    return {name: as_coupling(coupling) for name, coupling in (start or {}).items()}
