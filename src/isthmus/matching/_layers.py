"""The layers of a network and its groups: the slots on each weight, and the places where units are seen."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from isthmus.layers import Site
from isthmus.matching._grids import Cluster, Facet, Grid, Structure, clusters_of, facets_of
from isthmus.matching._pieces import Piece, chained, pieces_of
from isthmus.moments import Tap
from isthmus.symmetry import Slot, SymmetrySpec

__all__ = ["Layers", "View"]


@dataclass(frozen=True, eq=False)
class View:
    """Where the activations of a cluster of groups are seen: a tap, and how the groups move what it sees."""

    tap: Tap
    grid: Grid


_Pieces = list[tuple[Piece, list[Facet]]]


@dataclass(frozen=True)
class Layers:
    """The sites of a traced network, and the groups of a spec that act on them.

    Attributes:
        spec: the symmetries.
        sites: the sites in the order of computation.
        parameters: names of the parameters, each tied one once.
        met: names of tensors in the order in which the network first uses them; empty if that is not known.
    """

    spec: SymmetrySpec
    sites: Sequence[Site]
    parameters: Sequence[str]
    met: Sequence[str] = ()
    _pieces: dict[str, _Pieces] = field(default_factory=dict[str, _Pieces], repr=False, compare=False)

    @cached_property
    def table(self) -> Mapping[str, Mapping[int, Sequence[tuple[str, Slot]]]]:
        """Per tensor and axis, the ``(group, slot)`` pairs that act there."""
        return self.spec.slots_by_tensor()

    @cached_property
    def structure(self) -> Structure:
        """All groups; their clusters are ordered as sites and parameters outside them first meet them."""
        found = clusters_of(self.spec)
        cluster_of = {name: cluster for cluster in found for name in cluster}
        axes: dict[str, list[int]] = {}
        for site in self.sites:
            axes.setdefault(site.weight, []).extend((site.in_axis, site.out_axis))
        order: dict[Cluster, None] = {}
        for tensor in (*self.met, *axes):
            by_axis = self.table.get(tensor, {})
            if tensor in axes:
                names = [name for axis in axes[tensor] for name, _ in by_axis.get(axis, ())]
            else:
                known = {name for cluster in order for name in cluster}
                pieces = pieces_of(by_axis, self.spec.shapes.get(tensor, ()))
                names = [] if tensor in self.covered else chained(pieces, known)
            order.update(dict.fromkeys(cluster_of[name] for name in names))
        order.update(dict.fromkeys(found))
        return Structure(self.spec, tuple(order))

    @property
    def sizes(self) -> Mapping[str, int]:
        """Units per group, in the order of matching."""
        return self.structure.sizes

    def pieces(self, tensor: str) -> Sequence[tuple[Piece, Sequence[Facet]]]:
        """Return the pieces in which a tensor is compared, each with its facets."""
        if tensor not in self._pieces:
            self._pieces[tensor] = [
                (piece, list(self._facets_of(piece)))
                for piece in pieces_of(self.table.get(tensor, {}), self.spec.shapes[tensor])
            ]
        return self._pieces[tensor]

    def _facets_of(self, piece: Piece) -> Iterator[Facet]:
        present = {self.structure.cluster_of[g] for pairs in piece.table.values() for g, _ in pairs}
        for cluster in self.structure.clusters:
            if cluster in present:
                yield from facets_of(self.spec, cluster, piece.shape, piece.table)

    def facets(self, tensor: str, axis: int) -> Sequence[Facet]:
        """Return the facets of a tensor that is compared as a whole, of one axis."""
        (_, found), *others = self.pieces(tensor)
        return [] if others else [facet for facet in found if facet.axes[0] == axis]

    @cached_property
    def covered(self) -> frozenset[str]:
        """Names of the parameters that sites read: weights, biases and folded norms."""
        norms = [site.norm for site in self.sites if site.norm is not None]
        return frozenset(n for p in (*self.sites, *norms) for n in (p.weight, p.bias) if n is not None)

    def views(self) -> dict[Cluster, list[View]]:
        """Return where each cluster's activations are seen: what flows into the layers that read it.

        Groups that no layer reads (queries and keys, say) are seen where layers compute them; a cluster without any
        layer has no view.
        """
        read: dict[Cluster, list[View]] = {c: [] for c in self.structure.clusters}
        made: dict[Cluster, list[View]] = {c: [] for c in self.structure.clusters}
        sources: dict[Cluster, list[tuple[str, Tensor]]] = {c: [] for c in self.structure.clusters}
        for site in self.sites:
            for cluster, grid in self._channels(site, site.in_axis) if site.channels_listed else ():
                seen = sources[cluster]
                if not any(s == site.source and torch.equal(p, grid.positions) for s, p in seen):
                    seen.append((site.source, grid.positions))
                    read[cluster].append(View(Tap(site.name, True, grid.positions), grid))
            for cluster, grid in self._channels(site, site.out_axis):
                made[cluster].append(View(Tap(site.name, False, grid.positions), grid))
        for cluster, views in read.items():
            known = {name for view in views for name in view.grid.members}
            views += [v for v in made[cluster] if not known.issuperset(v.grid.members)]
        return read

    def _channels(self, site: Site, axis: int) -> list[tuple[Cluster, Grid]]:
        """Return the clusters and grids on an axis of a site's weight that lists channels."""
        facets = self.facets(site.weight, axis)
        return [(f.cluster, grid) for f in facets if len(f.axes) == 1 for grid in f.grids]

    def taps(self) -> dict[str, list[Tap]]:
        """Return where each group's activations are seen, one by one (see :meth:`views`)."""
        return {
            name: [
                Tap(v.tap.site, v.tap.inflow, v.grid.positions_of(name))
                for v in listed
                if name in v.grid.members
            ]
            for cluster, listed in self.views().items()
            for name in cluster
        }
