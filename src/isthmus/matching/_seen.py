"""Where the units of two networks are seen, and which rows of their activations are units themselves."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from isthmus.batches import Batch
from isthmus.evaluation import relative_difference
from isthmus.layers import Site
from isthmus.matching._grids import Cluster, Grid
from isthmus.matching._layers import Layers, View
from isthmus.moments import Actions, Frame, Tap
from isthmus.symmetry import Trace, apply, carry_tensor

__all__ = ["Seen", "Views", "seen_units"]

FOLLOWED = 1e-2
"""Most that a relabelled network's activations may differ from the relabelled ones, relative to the largest."""

Views = Mapping[Cluster, Sequence[View]]


@dataclass(frozen=True, eq=False)
class Seen:
    """Where the units of a network are seen.

    Attributes:
        layers: how groups meet layers.
        sites: where activations can be seen.
        actions: how groups move activations.
        trusted: nodes whose values move as the groups say, as was seen by running.
        views: by cluster, where its units are channels, at trusted nodes.
        rows: by cluster, the groups whose units are rows of its views; those that the spec does not move begin with
            ``@``.
        notes: remarks for the reader.
    """

    layers: Layers
    sites: tuple[Site, ...]
    actions: Actions
    trusted: frozenset[str]
    views: Mapping[Cluster, Sequence[View]]
    rows: Mapping[Cluster, Sequence[str]]
    notes: tuple[str, ...]

    @property
    def strangers(self) -> frozenset[str]:
        """Groups among the rows that the spec does not move."""
        return frozenset(g for found in self.rows.values() for g in found if g.startswith("@"))

    @property
    def rows_move(self) -> bool:
        """Whether units of the spec's groups are among the rows."""
        return any(set(found) - self.strangers for found in self.rows.values())

    @property
    def frame(self) -> Frame | None:
        """The known relabelling of the rows before anything is matched: None where no row is a unit."""
        return Frame(self.layers.spec, {}) if any(self.rows.values()) else None

    def rows_of(self, views: Sequence[View]) -> list[str]:
        """Return the groups whose units are rows of views."""
        sites = {s.name: s for s in self.sites}
        found = (g for v in views for g in self.actions.on_rows(sites[v.tap.site], v.tap))
        return list(dict.fromkeys(found))

    def row_views(self) -> dict[Cluster, list[View]]:
        """Return where the groups that no layer reads or computes as channels are seen as rows."""
        found: dict[Cluster, list[View]] = {}
        for cluster in self.layers.structure.clusters:
            group = self.layers.spec.groups[cluster[0]]
            if self.views.get(cluster) or len(cluster) > 1 or group.within:
                continue
            units = torch.arange(group.size)[:, None]
            seen: dict[str, View] = {}
            for inflow in (True, False):
                for site in self.sites if not seen or inflow else ():
                    tap = Tap(site.name, inflow, units, rows_of=group.name)
                    node = tap.node(site)
                    if node in self.trusted and self.actions.row_slot(node, group.name) is not None:
                        seen.setdefault(node, View(tap, Grid(units, {group.name: units})))
            if seen:
                found[cluster] = list(seen.values())
        return found


def seen_units(
    layers: Layers, sites: Sequence[Site], traced: Trace, state: Mapping[str, Tensor], example: Batch
) -> Seen:
    """Return where the units of a network are seen.

    Args:
        layers: how groups meet layers.
        sites: where activations can be seen.
        traced: the architecture.
        state: A's tensors.
        example: inputs of the traced shapes; on these the network is run relabelled, to see that its activations
            are the relabelled ones.
    """
    actions = Actions(traced, tuple(sites), layers.spec)
    trusted = _followed(traced, layers, state, sites, actions, example)
    by_name = {s.name: s for s in sites}
    kept: dict[Cluster, list[View]] = {}
    notes: list[str] = []
    for cluster, listed in layers.views().items():
        kept[cluster] = [v for v in listed if v.tap.node(by_name[v.tap.site]) in trusted]
        if len(kept[cluster]) < len(listed):
            missing = f"{len(listed) - len(kept[cluster])} of {len(listed)}"
            notes.append(
                f"{', '.join(cluster)}: activations at {missing} layers do not move as its units do, so they "
                "were not compared"
            )
    found = Seen(layers, tuple(sites), actions, frozenset(trusted), kept, {}, tuple(notes))
    rows = {cluster: found.rows_of(views) for cluster, views in kept.items()}
    return Seen(layers, tuple(sites), actions, frozenset(trusted), kept, rows, tuple(notes))


def _followed(
    traced: Trace,
    layers: Layers,
    state: Mapping[str, Tensor],
    sites: Sequence[Site],
    actions: Actions,
    example: Batch,
) -> set[str]:
    """Return the nodes whose values move as the spec says when A is relabelled at random."""
    spec = layers.spec
    generator = torch.Generator().manual_seed(0)
    moving = {name: group for name, group in spec.groups.items() if not group.planes}
    permutations = {name: torch.randperm(g.size, generator=generator) for name, g in moving.items()}
    plain = _values(traced, state, sites, example)
    moved = _values(traced, apply(spec, permutations, state), sites, example)
    found: set[str] = set()
    for node, value in plain.items():
        movers = actions.movers(node)
        if movers is not None:
            expected = carry_tensor(value, movers, permutations)
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
