r"""Matching by what units do: views of activations, rows that are units themselves, and units that never vary.

The gain of pairing unit :math:`u` of A with unit :math:`v` of B is a covariance (or correlation) over rows: examples
and positions. Some rows may be units of another group (learned latents, ensemble members, pooled tokens), which B
lists in another order. Then the pairing of the rows and that of the units are parts of one problem,

.. math:: \max_{\pi, \rho} \sum_{n, r, u} \tilde h^A_{n r u}\, \tilde h^B_{n\, \rho(r)\, \pi(u)} ,

which is solved in turn: each group under the current relabelling of all others, until nothing changes. There are three
starts, and the one that ends at the largest total gain is taken:

* units by the mean over the rows, which does not depend on the order of the rows;
* full weight matching;
* the identity, for networks that share a start.

A group that no layer reads as channels, but which is seen among the rows, is matched there.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

import isthmus.matching._by_class_moments  # noqa: F401, which registers how classes are matched by moments
from isthmus.couplings import Coupling, Monomial, Permutation, index_of
from isthmus.matching._by_class import ByClass
from isthmus.matching._constant import pair_constant_units
from isthmus.matching._grids import Cluster
from isthmus.matching._incremental import Incremental
from isthmus.matching._objectives import MomentObjective
from isthmus.matching._problem import Problem
from isthmus.matching._schedules import CoordinateDescent, Match, Schedule, SinglePass, Status, Then
from isthmus.matching._seen import Views
from isthmus.matching._solvers import Solver, assignment_solver
from isthmus.matching._terms import activation_objective, weight_objective
from isthmus.matching._working import At
from isthmus.moments import CrossMoment, Frame, Tap

__all__ = ["ActivationMatching"]

_log = logging.getLogger(__name__)
MOST_ROUNDS = 20
"""Rounds after which matching rows and units in turn gives up; the status says so."""

JointMoments = dict[Cluster, list[CrossMoment]]


@dataclass(frozen=True, eq=False)
class _Stand:
    """Where a search stands: permutations of all groups, and the moments that they were found from.

    Attributes:
        at: couplings by group.
        moments: by cluster, under these permutations.
        value: total gain of the clusters that are seen.
    """

    at: At
    moments: JointMoments
    objective: MomentObjective
    value: float


@dataclass(eq=False)
class ActivationMatching:
    """Pairs the units of two networks by their activations.

    Args:
        problem: the networks and data.
        correlation: divide every unit by its standard deviation.
        schedule: order of the groups; default: a single pass. Rows and units that are matched in turn always
            take single passes.
        generator: for the schedules.
        solver: couples one gain matrix, or a :class:`ByClass` for each group by its class. Rows and units that are
            matched in turn are permuted, whatever else may act on them.

    Attributes:
        notes: remarks for the reader; complete after :meth:`run`.
    """

    problem: Problem
    correlation: bool
    schedule: Schedule | None
    generator: torch.Generator
    solver: Solver = assignment_solver
    notes: tuple[str, ...] = field(default=(), init=False)

    def run(self) -> tuple[Match, MomentObjective]:
        """Return the couplings and the objective."""
        seen = self.problem.seen
        self.notes = seen.notes
        if seen.rows_move and isinstance(self.solver, ByClass):
            self.solver = assignment_solver
            self.notes += ("rows of activations are units, so all units were permuted, by no larger class",)
        found, match = self._once()
        if seen.rows_move:
            turns = _Turns(self)
            found, match = turns.best(found)
            self.notes += (turns.note(match),)
        if seen.strangers:
            names = ", ".join(sorted(g.removeprefix("@") for g in seen.strangers))
            self.notes += (
                f"rows of activations are units that the spec does not move ({names}): compared by their mean",
            )
        self.notes += tuple(_notes(self.problem, found.moments, _constant_units(found.moments)))
        for note in self.notes:
            _log.info(note)
        return match, found.objective

    def objective(self, moments: JointMoments, views: Views) -> MomentObjective:
        """Return the objective of moments."""
        views = {c: listed for c, listed in views.items() if self._by_moments(c)}
        turned = [
            c for c in views if len(c) == 1 and isinstance(self.solver, ByClass) and self.solver.turns(c[0])
        ]
        return activation_objective(
            self.problem.pair, moments, correlation=self.correlation, views=views, turned=turned
        )

    def joint_moments(self) -> JointMoments:
        """Return the joint moments that the search begins with."""
        return dict(self.problem.joint_moments())

    def moments_of(self, taps: dict[Cluster, list[Tap]], frame: Frame | None) -> JointMoments:
        """Return joint moments at taps under a relabelling of rows."""
        return self.problem.moments_of(taps, frame)

    def _by_moments(self, cluster: Cluster) -> bool:
        """Return whether activations say what is best: not for invertible maps, nor for what mixes within nests."""
        if not isinstance(self.solver, ByClass) or self.solver.permutes(cluster):
            return True
        return len(cluster) == 1 and self.solver.of(cluster[0]).acts != "general"

    def with_constant_units(self, at: At, moments: JointMoments) -> At:
        """Return the permutations with units that never vary paired by their weights."""
        constant = _constant_units(moments)
        weights = weight_objective(self.problem.pair)
        factors = {n: c for n, c in at.items() if isinstance(c, Monomial) and n in constant}
        orders = {n: Permutation.known(at[n].index) if n in factors else c for n, c in at.items()}  # pyright: ignore
        constant = {n: units for n, units in constant.items() if isinstance(orders[n], Permutation)}
        found = pair_constant_units(orders, constant, weights, assignment_solver, self.generator)
        return {n: _with_factors(c, factors[n]) if n in factors else c for n, c in found.items()}

    def _once(self) -> tuple[_Stand, Match]:
        moments = self.joint_moments()
        objective = self.objective(moments, self.problem.seen.views)
        used = SinglePass() if self.schedule is None else self.schedule
        match = used.run(objective, self.solver, None, self.generator)
        at = self.with_constant_units(match.couplings, moments)
        return _Stand(at, moments, objective, 0.0), replace(match, couplings=at)


class _Turns:
    """Rows and units that depend on each other, matched in turn."""

    def __init__(self, matching: ActivationMatching) -> None:
        seen = matching.problem.seen
        views, row_views = seen.views, seen.row_views()
        self._matching, self._views = matching, {**views, **row_views}
        structure = matching.problem.layers.structure
        cluster_of = structure.cluster_of
        self._needs = {
            c: {cluster_of[g] for g in seen.rows_of(listed) if g in cluster_of}
            for c, listed in self._views.items()
        }
        self._rows = sorted({g for found in seen.rows.values() for g in found} & cluster_of.keys())
        self._settled = {c: v for c, v in views.items() if v and not self._needs[c]}
        mutual = [*row_views, *(c for c, v in views.items() if v and self._needs[c])]
        self._classes = self._coloured(mutual)
        self._unseen = [c for c in structure.clusters if not self._views.get(c)]
        self._starts = 0

    def best(self, first: _Stand) -> tuple[_Stand, Match]:
        """Return the best of what is reached from three starts.

        Args:
            first: found from means over the rows; final for the clusters without such rows.
        """
        final = {g: first.at[g] for c in self._settled for g in c}
        moments = {c: first.moments[c] for c in self._settled}
        found: list[tuple[_Stand, Match]] = []
        for start in self._all_starts(first):
            given = {**start, **final}
            if not any(_same(given, stand.at) for stand, _ in found):
                self._starts += 1
                found.append(self._climb(given, moments))
        return max(found, key=lambda pair: pair[0].value)

    def note(self, match: Match) -> str:
        """Return a remark for the reader: that rows and units were matched in turn, in how many rounds and starts."""
        return (
            f"rows of activations are units of {', '.join(self._rows)}: rows and units were matched in turn, "
            f"{len(match.sweeps)} rounds, the best of {self._starts} starts"
        )

    def _all_starts(self, first: _Stand) -> Iterator[At]:
        yield first.at
        objective = Incremental(weight_objective(self._matching.problem.pair))
        weights = Then(SinglePass(), CoordinateDescent())
        yield weights.run(objective, assignment_solver, None, self._matching.generator).couplings
        sizes = self._matching.problem.layers.sizes
        yield {name: Permutation.identity(size) for name, size in sizes.items()}

    def _climb(self, at: At, moments: JointMoments) -> tuple[_Stand, Match]:
        """Match class after class under the permutations of the others until nothing changes."""
        moments, sweeps, status = dict(moments), list[float](), Status.SWEEP_LIMIT
        work = self._matching
        while True:
            before = at
            for clusters in self._classes:
                views = {c: self._views[c] for c in clusters}
                taps = {c: [v.tap for v in listed] for c, listed in views.items() if listed}
                fresh = work.moments_of(taps, Frame(work.problem.spec, at))
                moments.update(fresh)
                at = self._matched(clusters, work.objective(fresh, views), at)
            objective = work.objective(moments, self._views)
            at = self._matched(self._unseen, objective, at)
            at = work.with_constant_units(at, moments)
            sweeps.append(objective.seen_value(at))
            if _same(at, before):
                status = Status.CONVERGED
            if status == Status.CONVERGED or len(sweeps) == MOST_ROUNDS:
                stand = _Stand(at, moments, objective, sweeps[-1])
                return stand, Match(at, tuple(sweeps), status)

    def _matched(self, clusters: Sequence[Cluster], objective: MomentObjective, at: At) -> At:
        moving = {g for c in clusters for g in c}
        known = {g: c for g, c in at.items() if g not in moving}
        return SinglePass().run(objective, assignment_solver, known, self._matching.generator).couplings

    def _coloured(self, clusters: Sequence[Cluster]) -> list[list[Cluster]]:
        """Return classes of clusters none of which needs another one of its class, those seen as rows first."""
        classes: list[list[Cluster]] = []
        for cluster in clusters:
            for other in classes:
                if not any(cluster in self._needs[c] or c in self._needs[cluster] for c in other):
                    other.append(cluster)
                    break
            else:
                classes.append([cluster])
        return classes


def _with_factors(order: Coupling, before: Monomial) -> Monomial:
    """Return a new order of units with the factors that each unit of B had."""
    index = index_of(order)
    of_unit = torch.empty_like(before.factors)
    of_unit[before.index] = before.factors
    return Monomial(index, of_unit[index])


def _same(one: At, other: At) -> bool:
    return all(coupling == other[name] for name, coupling in one.items())


def _constant_units(moments: Mapping[Cluster, Sequence[CrossMoment]]) -> dict[str, tuple[Tensor, Tensor]]:
    """Return the units of A and of B that vary in no view, for the groups that share no axis."""
    found: dict[str, tuple[Tensor, Tensor]] = {}
    for cluster, seen in moments.items():
        a, b = (_in_all([m.constant_units[k] for m in seen]) for k in (0, 1))
        if len(cluster) == 1 and (len(a) or len(b)):
            found[cluster[0]] = (a, b)
    return found


def _in_all(indices: Sequence[Tensor]) -> Tensor:
    values, counts = torch.cat(list(indices)).unique(return_counts=True)
    return values[counts == len(indices)]


def _notes(
    problem: Problem,
    moments: Mapping[Cluster, Sequence[CrossMoment]],
    constant: Mapping[str, tuple[Tensor, Tensor]],
) -> tuple[str, ...]:
    notes = [
        f"{group}: no layer reads or computes its units; matched by its parameters"
        for cluster in problem.layers.structure.clusters
        if cluster not in moments
        for group in cluster
    ]
    notes += [
        f"{group}: {len(a)} units of A and {len(b)} of B never vary: A {_some(a)}, B {_some(b)}; paired by weights"
        for group, (a, b) in constant.items()
    ]
    return tuple(notes)


def _some(indices: Tensor, limit: int = 16) -> str:
    shown = ", ".join(str(k) for k in indices[:limit].tolist())
    return f"[{shown}{', …' if len(indices) > limit else ''}]"
