"""Clusters of groups that are matched together, and the cells into which they cut the axes of a tensor.

Groups that are nested, such as the blocks of a GroupNorm and their members, or heads and the dimensions inside
each, cannot be matched one after the other: which blocks belong together is only seen once their members are
paired, and the other way round. They form a *cluster*. A *facet* is one axis of a tensor on which a cluster acts
(with further axes where a group acts on a block only), and its *grids* cut that axis into cells: positions on which
the same units of the same groups act.

Example:
    A flatten of three channels of two by two: channel ``u`` sits at positions ``4u`` to ``4u + 3`` of the next layer's
    inputs. One cell for each unit, four copies:

    >>> import torch
    >>> from torch import nn
    >>> from isthmus.matching import Problem
    >>> net = nn.Sequential(nn.Conv2d(1, 3, 1), nn.ReLU(), nn.Flatten(), nn.Linear(12, 2)).eval()
    >>> [facet] = Problem(net, args=torch.zeros(1, 1, 2, 2)).layers.facets("3.weight", 1)
    >>> facet.grids[0].positions.tolist()
    [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]

    A GroupNorm of two blocks of three: the blocks may change places, and so may the members within each. The three
    groups are one cluster, the axis has six cells, and block 1 owns cells 3, 4 and 5, which are also the units of the
    group of its members:

    >>> net = nn.Sequential(nn.Linear(2, 6), nn.GroupNorm(2, 6), nn.Linear(6, 1)).eval()
    >>> [facet] = Problem(net, args=torch.zeros(1, 2)).layers.facets("0.weight", 0)
    >>> facet.cluster
    ('0', '0#2[0]', '0#2[1]')
    >>> {name: own.tolist() for name, own in facet.grids[0].members.items()}
    {'0': [[0, 1, 2], [3, 4, 5]], '0#2[0]': [[0], [1], [2]], '0#2[1]': [[3], [4], [5]]}

    The permutation ``[1, 0]`` of the blocks puts cells 3, 4, 5 at 0, 1, 2 and cells 0, 1, 2 at 3, 4, 5; then the ring
    ``[1, 2, 0]`` of the members of block 0 orders what came there: 4, 5, 3.

    >>> from isthmus.matching import Gain
    >>> gain = Gain(torch.zeros(6, 6), facet.grids[0].members)
    >>> gain.index({"0": torch.tensor([1, 0]), "0#2[0]": torch.tensor([1, 2, 0])}).tolist()
    [4, 5, 3, 0, 1, 2]
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from isthmus.couplings import Coupling, as_coupling
from isthmus.symmetry import AxisGroup, Couplings, Relabelling, Slot, SymmetrySpec

__all__ = ["Cluster", "Facet", "Grid", "Structure", "facets_of"]

Cluster = tuple[str, ...]
"""Names of groups that are matched together, outermost first; most groups are alone in theirs."""

Acting = tuple[AxisGroup, Slot]


@dataclass(frozen=True, eq=False)
class Structure:
    """The groups of a network: how many units they have, which are matched together, and in which order.

    Attributes:
        spec: the groups.
        clusters: every group once, in the order of matching.
    """

    spec: SymmetrySpec
    clusters: tuple[Cluster, ...]

    @classmethod
    def flat(cls, sizes: Mapping[str, int]) -> Structure:
        """Return the structure of groups that are matched one by one (for objectives without a network)."""
        groups = {name: AxisGroup(name, size, ()) for name, size in sizes.items()}
        return cls(SymmetrySpec(groups), tuple((name,) for name in groups))

    @cached_property
    def sizes(self) -> Mapping[str, int]:
        """Units per group, in the order of the clusters."""
        return {name: self.spec.groups[name].size for cluster in self.clusters for name in cluster}

    @cached_property
    def cluster_of(self) -> Mapping[str, Cluster]:
        """The cluster of every group."""
        return {name: cluster for cluster in self.clusters for name in cluster}

    @cached_property
    def _parts(self) -> Mapping[Cluster, SymmetrySpec]:
        return {c: self.spec.restrict(c) for c in self.clusters if len(c) > 1}

    def followed(self, at: Couplings, cluster: Cluster, change: Couplings) -> dict[str, Coupling]:
        """Return couplings after moving the groups of a cluster further.

        Args:
            at: current ones; a missing group is where it was.
            cluster: what is moved.
            change: how the groups move from where they are, by name.
        """
        found = {name: as_coupling(coupling) for name, coupling in at.items()}
        steps = {name: as_coupling(coupling) for name, coupling in change.items()}
        if len(cluster) == 1:
            name = cluster[0]
            found[name] = found[name].then(steps[name]) if name in found else steps[name]
            return found
        own = {name: found[name] for name in cluster if name in found}
        inside = Relabelling(self._parts[cluster], own).then(Relabelling(self._parts[cluster], steps))
        return {**found, **inside.couplings}


@dataclass(frozen=True, eq=False)
class Grid:
    """Where the groups of a cluster sit on one axis, or on several axes taken as one.

    Attributes:
        positions: positions of every cell, int64, shape ``(cells, copies)``.
        members: by group, the cells of each of its units, int64, shape ``(size, cells per unit)``. A
            permutation ``p`` of the group places cell ``members[p[u], k]`` at cell ``members[u, k]``.
    """

    positions: Tensor
    members: Mapping[str, Tensor]

    def positions_of(self, group: str) -> Tensor:
        """Return the positions of the units of one group, shape ``(size, copies)``."""
        own = self.members[group]
        return self.positions[own].reshape(len(own), -1)


@dataclass(frozen=True, eq=False)
class Facet:
    """One axis of a tensor on which a cluster acts.

    Attributes:
        cluster: the groups that are matched together.
        axes: the axis, then the axes on which some group acts at one block only; grids count positions
            on the product of these axes, the first slowest.
        grids: how the axes are cut; together they hold all positions on which the cluster acts.
    """

    cluster: Cluster
    axes: tuple[int, ...]
    grids: tuple[Grid, ...]

    @property
    def groups(self) -> frozenset[str]:
        """The groups of the cluster that act here."""
        return frozenset(name for grid in self.grids for name in grid.members)


def clusters_of(spec: SymmetrySpec) -> list[Cluster]:
    """Return the groups of a spec in clusters: nested groups, and groups that overlap on some axis."""
    joined = {name: name for name in spec.groups}

    def root(name: str) -> str:
        while joined[name] != name:
            name = joined[name]
        return name

    for name, group in spec.groups.items():
        for outer, _ in group.within:
            if outer in joined:
                joined[root(name)] = root(outer)
    for by_axis in spec.slots_by_tensor().values():
        for pairs in by_axis.values():
            for one, other in _overlapping(pairs):
                joined[root(one)] = root(other)
    found: dict[str, list[str]] = {}
    for name in spec.groups:
        found.setdefault(root(name), []).append(name)
    return [tuple(names) for names in found.values()]


def _overlapping(pairs: Sequence[tuple[str, Slot]]) -> Iterator[tuple[str, str]]:
    whole = [(name, slot) for name, slot in pairs if not slot.block]
    owner: dict[int, str] = {}
    for name, slot in whole if len(whole) > 1 else ():
        for position in slot.index.positions().flatten().tolist():
            if owner.setdefault(position, name) != name:
                yield owner[position], name


def facets_of(
    spec: SymmetrySpec,
    cluster: Cluster,
    shape: Sequence[int],
    by_axis: Mapping[int, Sequence[tuple[str, Slot]]],
) -> Iterator[Facet]:
    """Yield the facets of one tensor for one cluster.

    Where the groups are no clean nest, so that moving the units of one would tear cells of another apart, each gets
    a facet of its own.

    Args:
        spec: the groups.
        cluster: which of them.
        shape: of the tensor.
        by_axis: what acts on the tensor, outer groups first.
    """
    own = {
        axis: [(spec.groups[name], slot) for name, slot in pairs if name in cluster]
        for axis, pairs in by_axis.items()
    }
    drafts: list[tuple[tuple[int, ...], list[Acting]]] = []
    for axis, pairs in own.items():
        blocks = sorted({k for _, slot in pairs for k, _ in slot.block})
        outer = {name for group, _ in pairs for name, _ in group.within}
        around = [(g, s) for k in blocks for g, s in own.get(k, ()) if g.name in outer]
        if pairs:
            drafts.append(((axis, *blocks), around + pairs))
    for axes, pairs in drafts:
        if any(_inside(axes, pairs, *other) for other in drafts):
            continue
        lengths = [shape[k] for k in axes]
        grids = _grids(pairs, axes, lengths)
        if grids is not None:
            yield Facet(cluster, axes, tuple(grids))
        else:
            for name in dict.fromkeys(group.name for group, _ in pairs):
                alone = _grids([p for p in pairs if p[0].name == name], axes, lengths)
                assert alone is not None
                yield Facet(cluster, axes, tuple(alone))


def _inside(
    axes: tuple[int, ...], pairs: Sequence[Acting], other_axes: tuple[int, ...], other: Sequence[Acting]
) -> bool:
    """Return whether a facet's groups all act on a larger facet too, which then says all that this one would."""
    return set(axes) < set(other_axes) and {g.name for g, _ in pairs} <= {g.name for g, _ in other}


def _flat_positions(slot: Slot, axes: Sequence[int], lengths: Sequence[int]) -> Tensor:
    """Return the positions of a slot's units on the product of axes, shape ``(size, copies)``."""
    blocks = dict(slot.block)
    found = torch.zeros(slot.index.size, 1, dtype=torch.int64)
    for k, axis in enumerate(axes):
        step = math.prod(lengths[k + 1 :])
        if axis == slot.axis:
            here = slot.index.positions()
        elif axis in blocks:
            here = blocks[axis].positions().reshape(1, -1)
        else:
            here = torch.arange(lengths[k]).reshape(1, -1)
        found = (found[:, :, None] + step * here[:, None, :]).flatten(1)
    return found


def _grids(pairs: Sequence[Acting], axes: Sequence[int], lengths: Sequence[int]) -> list[Grid] | None:
    """Cut axes into cells; ``None`` where the groups tear one another's cells apart."""
    placed = [(group, _flat_positions(slot, axes, lengths)) for group, slot in pairs]
    names = list(dict.fromkeys(group.name for group, _ in pairs))
    if len(names) == 1:
        positions = torch.cat([p for _, p in placed], dim=1)
        return [Grid(positions, {names[0]: torch.arange(len(positions)).unsqueeze(1)})]
    order = {name: k for k, name in enumerate(names)}
    acting: dict[int, list[tuple[int, int]]] = {}
    kinds = [group.family or group.name for group, _ in placed]
    kind_of = {order[group.name]: kind for (group, _), kind in zip(placed, kinds, strict=True)}
    for group, positions in placed:
        for unit, row in enumerate(positions.tolist()):
            for position in row:
                acting.setdefault(position, []).append((order[group.name], unit))
    cells: dict[tuple[tuple[int, int], ...], list[int]] = {}
    for position in sorted(acting):
        cells.setdefault(tuple(acting[position]), []).append(position)
    sorts: dict[tuple[str, ...], list[tuple[tuple[int, int], ...]]] = {}
    for signature in sorted(cells):
        sorts.setdefault(tuple(kind_of[k] for k, _ in signature), []).append(signature)
    grids: list[Grid] = []
    for signatures in sorts.values():
        members = _members(names, signatures)
        counts = {len(cells[s]) for s in signatures}
        if members is None or len(counts) > 1:
            return None
        grids.append(Grid(torch.tensor([cells[s] for s in signatures]), members))
    return grids if all(_moves_cells(grids, group.name, positions) for group, positions in placed) else None


def _members(
    names: Sequence[str], signatures: Iterable[tuple[tuple[int, int], ...]]
) -> dict[str, Tensor] | None:
    """Return the cells of each unit of each group, or ``None`` where units have different numbers of them."""
    owned: dict[int, dict[int, list[int]]] = {}
    for cell, signature in enumerate(signatures):
        for group, unit in signature:
            owned.setdefault(group, {}).setdefault(unit, []).append(cell)
    rows = {names[k]: [owned[k][unit] for unit in sorted(owned[k])] for k in sorted(owned)}
    if any(len({len(row) for row in listed}) != 1 for listed in rows.values()):
        return None
    return {name: torch.tensor(listed) for name, listed in rows.items()}


def _moves_cells(grids: Sequence[Grid], group: str, positions: Tensor) -> bool:
    """Return whether a rotation of the group's units moves whole cells, as the grids say."""
    size = len(positions)
    moved = dict(zip(positions.flatten().tolist(), positions.roll(-1, 0).flatten().tolist(), strict=True))
    for grid in grids:
        own = grid.members.get(group)
        if own is None:
            continue
        if len(own) != size:
            return False
        here, expected = grid.positions[own].flatten(), grid.positions[own.roll(-1, 0)].flatten()
        if any(moved.get(a, b) != b for a, b in zip(here.tolist(), expected.tolist(), strict=True)):
            return False
    return True
