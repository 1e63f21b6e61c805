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
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, fx

from isthmus.batches import Batch, Batches
from isthmus.coupling import identity_permutation
from isthmus.evaluation import relative_difference
from isthmus.layers import Site
from isthmus.matching._constant import pair_constant_units
from isthmus.matching._grids import Cluster, Grid
from isthmus.matching._incremental import Incremental
from isthmus.matching._layers import View
from isthmus.matching._methods import Pair, activation_objective, weight_objective
from isthmus.matching._objectives import MomentObjective
from isthmus.matching._schedules import (
    AbstractSchedule,
    CoordinateDescent,
    Match,
    SinglePass,
    assignment_solver,
)
from isthmus.moments import Actions, CrossMoment, Frame, SiteRunner, Tap, cross_moments
from isthmus.symmetry import Trace, apply
from isthmus.symmetry._apply import permute_tensor

__all__ = ["ActivationMatching"]

_log = logging.getLogger(__name__)
MOST_ROUNDS = 20
"""Rounds after which matching rows and units in turn gives up; the status says so."""
FOLLOWED = 1e-2
"""Most that a relabelled network's activations may differ from the relabelled ones, relative to the largest."""

Moments = dict[Cluster, list[CrossMoment]]
Permutations = dict[str, Tensor]


Views = Mapping[Cluster, Sequence[View]]


@dataclass(frozen=True, eq=False)
class _Stand:
    """Where a search stands: permutations of all groups, and the moments that they were found from.

    Attributes:
        permutations: by group.
        moments: by cluster, under these permutations.
        value: total gain of the clusters that are seen.
    """

    permutations: Permutations
    moments: Moments
    objective: MomentObjective
    value: float


@dataclass(eq=False)
class ActivationMatching:
    """Pairs the units of two networks by their activations.

    Args:
        pair: the networks.
        runner: their architecture.
        data: a reusable iterable of batches.
        correlation: divide every unit by its standard deviation.
        schedule: order of the groups; default: a single pass. Rows and units that are matched in turn always
            take single passes.
        generator: for the schedules.

    Attributes:
        notes: what a reader should know; complete after :meth:`run`.
    """

    pair: Pair
    runner: SiteRunner
    data: Batches
    correlation: bool
    schedule: AbstractSchedule | None
    generator: torch.Generator
    notes: tuple[str, ...] = field(default=(), init=False)

    def run(self, traced: Trace, example: Batch) -> tuple[Match, MomentObjective]:
        """Return the permutations and the objective.

        Args:
            traced: the architecture.
            example: inputs of the traced shapes; on these the relabelled network is run, to see that its activations
                are the relabelled ones.
        """
        sites = tuple(self.runner.sites.values())
        actions = Actions(traced, sites, self.pair.layers.spec)
        trusted = _followed(traced, self.pair, sites, actions, example)
        views, self.notes = self._trusted(self.pair.layers.views(), trusted)
        rows = {c: self._rows_of(listed, actions) for c, listed in views.items()}
        strangers = {g for found in rows.values() for g in found if g.startswith("@")}
        moving = any(set(found) - strangers for found in rows.values())
        found, match = self._once(views, Frame(self.pair.layers.spec, {}) if any(rows.values()) else None)
        if moving:
            turns = _Turns(self, views, _row_views(self.pair, sites, actions, views, trusted), actions)
            found, match = turns.best(found)
            self.notes += (turns.note(match),)
        if strangers:
            names = ", ".join(sorted(g.removeprefix("@") for g in strangers))
            self.notes += (
                f"rows of activations are units that the spec does not move ({names}): compared by their mean",
            )
        self.notes += tuple(_notes(self.pair, found.moments, _constant_units(found.moments)))
        for note in self.notes:
            _log.info(note)
        return match, found.objective

    def seen(self, views: Views, frame: Frame | None) -> Moments:
        """Return the moments of views in one pass over the data."""
        taps = {c: [v.tap for v in listed] for c, listed in views.items() if listed}
        return cross_moments(self.runner, self.pair.state_a, self.pair.state_b, self.data, taps, frame)

    def objective(self, moments: Moments, views: Views) -> MomentObjective:
        """Return the objective of moments."""
        return activation_objective(self.pair, moments, correlation=self.correlation, views=views)

    def with_constant_units(self, permutations: Permutations, moments: Moments) -> Permutations:
        """Return the permutations with units that never vary paired by their weights."""
        constant = _constant_units(moments)
        weights = weight_objective(self.pair)
        return pair_constant_units(permutations, constant, weights, assignment_solver, self.generator)

    def _once(self, views: Views, frame: Frame | None) -> tuple[_Stand, Match]:
        moments = self.seen(views, frame)
        objective = self.objective(moments, views)
        used = SinglePass() if self.schedule is None else self.schedule
        match = used.run(objective, assignment_solver, None, self.generator)
        permutations = self.with_constant_units(match.permutations, moments)
        return _Stand(permutations, moments, objective, 0.0), replace(match, permutations=permutations)

    def _trusted(self, views: Views, trusted: set[str]) -> tuple[dict[Cluster, list[View]], tuple[str, ...]]:
        """Return the views of nodes that move as expected, and notes about the others."""
        kept: dict[Cluster, list[View]] = {}
        notes: list[str] = []
        for cluster, listed in views.items():
            kept[cluster] = [v for v in listed if v.tap.node(self.runner.sites[v.tap.site]) in trusted]
            if len(kept[cluster]) < len(listed):
                missing = f"{len(listed) - len(kept[cluster])} of {len(listed)}"
                notes.append(
                    f"{', '.join(cluster)}: activations at {missing} layers do not move as its units do, so they "
                    "were not compared"
                )
        return kept, tuple(notes)

    def _rows_of(self, views: Sequence[View], actions: Actions) -> list[str]:
        found = (g for v in views for g in actions.on_rows(self.runner.sites[v.tap.site], v.tap))
        return list(dict.fromkeys(found))


class _Turns:
    """Rows and units that depend on each other, matched in turn.

    Args:
        matching: of the pair.
        views: where clusters are seen as channels.
        row_views: where clusters that are not are seen as rows.
        actions: how groups move activations.
    """

    def __init__(
        self, matching: ActivationMatching, views: Views, row_views: Views, actions: Actions
    ) -> None:
        self._matching, self._views = matching, {**views, **row_views}
        cluster_of = matching.pair.layers.structure.cluster_of
        self._needs = {
            c: {cluster_of[g] for g in matching._rows_of(listed, actions) if g in cluster_of}
            for c, listed in self._views.items()
        }
        found = {g for listed in views.values() for g in matching._rows_of(listed, actions)}
        self._rows = sorted(found & cluster_of.keys())
        self._settled = {c: v for c, v in views.items() if v and not self._needs[c]}
        mutual = [*row_views, *(c for c, v in views.items() if v and self._needs[c])]
        self._classes = self._coloured(mutual)
        self._unseen = [c for c in matching.pair.layers.structure.clusters if not self._views.get(c)]
        self._starts = 0

    def best(self, first: _Stand) -> tuple[_Stand, Match]:
        """Return the best of what is reached from three starts.

        Args:
            first: found from means over the rows; final for the clusters without such rows.
        """
        final = {g: first.permutations[g] for c in self._settled for g in c}
        moments = {c: first.moments[c] for c in self._settled}
        found: list[tuple[_Stand, Match]] = []
        for start in self._all_starts(first):
            given = {**start, **final}
            if not any(_same(given, stand.permutations) for stand, _ in found):
                self._starts += 1
                found.append(self._climb(given, moments))
        return max(found, key=lambda pair: pair[0].value)

    def note(self, match: Match) -> str:
        """Return what a reader should know."""
        return (
            f"rows of activations are units of {', '.join(self._rows)}: rows and units were matched in turn, "
            f"{len(match.sweeps)} rounds, the best of {self._starts} starts"
        )

    def _all_starts(self, first: _Stand) -> Iterator[Permutations]:
        yield first.permutations
        objective = Incremental(weight_objective(self._matching.pair))
        generator = self._matching.generator
        match = SinglePass().run(objective, assignment_solver, None, generator)
        yield (
            CoordinateDescent().run(objective, assignment_solver, match.permutations, generator).permutations
        )
        sizes = self._matching.pair.layers.sizes
        yield {name: identity_permutation(size) for name, size in sizes.items()}

    def _climb(self, permutations: Permutations, moments: Moments) -> tuple[_Stand, Match]:
        """Match class after class under the permutations of the others until nothing changes."""
        moments, sweeps, status = dict(moments), list[float](), "sweep limit reached"
        work = self._matching
        while True:
            before = permutations
            for clusters in self._classes:
                views = {c: self._views[c] for c in clusters}
                fresh = work.seen(views, Frame(work.pair.layers.spec, permutations))
                moments.update(fresh)
                permutations = self._matched(clusters, work.objective(fresh, views), permutations)
            objective = work.objective(moments, self._views)
            permutations = self._matched(self._unseen, objective, permutations)
            permutations = work.with_constant_units(permutations, moments)
            sweeps.append(objective.seen_value(permutations))
            if _same(permutations, before):
                status = "converged"
            if status == "converged" or len(sweeps) == MOST_ROUNDS:
                stand = _Stand(permutations, moments, objective, sweeps[-1])
                return stand, Match(permutations, tuple(sweeps), status)

    def _matched(
        self, clusters: Sequence[Cluster], objective: MomentObjective, permutations: Permutations
    ) -> Permutations:
        moving = {g for c in clusters for g in c}
        known = {g: p for g, p in permutations.items() if g not in moving}
        return SinglePass().run(objective, assignment_solver, known, self._matching.generator).permutations

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


def _same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return all(torch.equal(p, other[name]) for name, p in one.items())


def _row_views(
    pair: Pair, sites: Sequence[Site], actions: Actions, views: Views, trusted: set[str]
) -> dict[Cluster, list[View]]:
    """Return where the groups that no layer reads or computes as channels are seen as rows."""
    found: dict[Cluster, list[View]] = {}
    for cluster in pair.layers.structure.clusters:
        group = pair.layers.spec.groups[cluster[0]]
        if views.get(cluster) or len(cluster) > 1 or group.within:
            continue
        units = torch.arange(group.size)[:, None]
        seen: dict[str, View] = {}
        for inflow in (True, False):
            for site in sites if not seen or inflow else ():
                tap = Tap(site.name, inflow, units, rows_of=group.name)
                if tap.node(site) in trusted and actions.row_slot(tap.node(site), group.name) is not None:
                    seen.setdefault(tap.node(site), View(tap, Grid(units, {group.name: units})))
        if seen:
            found[cluster] = list(seen.values())
    return found


def _followed(traced: Trace, pair: Pair, sites: Sequence[Site], actions: Actions, example: Batch) -> set[str]:
    """Return the nodes whose values, in A relabelled at random, are those of A relabelled."""
    spec = pair.layers.spec
    generator = torch.Generator().manual_seed(0)
    permutations = {name: torch.randperm(g.size, generator=generator) for name, g in spec.groups.items()}
    plain = _values(traced, pair.state_a, sites, example)
    moved = _values(traced, apply(spec, permutations, pair.state_a), sites, example)
    found: set[str] = set()
    for node, value in plain.items():
        movers = actions.movers(node)
        if movers is not None:
            expected = permute_tensor(value, movers, permutations)
            limit = max(FOLLOWED, 16 * torch.finfo(value.dtype).eps)
            if relative_difference(expected, moved[node]) <= limit:
                found.add(node)
    return found


def _values(
    traced: Trace, state: Mapping[str, Tensor], sites: Sequence[Site], example: Batch
) -> dict[str, Tensor]:
    """Return what flows into the sites and comes out of them, by node."""
    sources, targets = {s.name: s.source for s in sites}, {s.target for s in sites}
    seen: dict[str, Tensor] = {}

    def watch(node: fx.Node, look_up: Callable[[fx.Node], Tensor], result: Tensor) -> None:
        if node.name in sources:
            source = next(n for n in node.all_input_nodes if n.name == sources[node.name])
            seen[source.name] = look_up(source).clone()
        if node.name in targets:
            seen[node.name] = result.clone()

    traced.run(state, example.args, example.kwargs, on_node=watch)
    return seen


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
    pair: Pair,
    moments: Mapping[Cluster, Sequence[CrossMoment]],
    constant: Mapping[str, tuple[Tensor, Tensor]],
) -> tuple[str, ...]:
    notes = [
        f"{group}: no layer reads or computes its units; matched by its parameters"
        for cluster in pair.layers.structure.clusters
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
