"""Rows of an activation that are the same rows in both networks.

The activation that flows into a layer has an axis of channels; everything else counts as rows: examples, positions,
tokens. Some of these may be units themselves: learned latents, members of an ensemble, pooled tokens. Two networks list
such units in different orders, so row ``i`` of A is not row ``i`` of B. :class:`Actions` says, from the labels that
discovery propagates through the network, how every group moves an activation; :class:`Frame` says what is known of
the relabelling of B. Rows of groups whose relabelling is known are put in A's order. Those of all others are
replaced by their mean over the units, which no relabelling changes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from isthmus.layers import Site
from isthmus.symmetry import (
    AxisGroup,
    Couplings,
    Slot,
    SymmetrySpec,
    Trace,
    activation_name,
    carry_tensor,
    discover_from_trace,
)

__all__ = ["Actions", "Frame", "Tap", "framed_rows", "unit_rows"]

Movers = Mapping[int, Sequence[tuple[str, Slot]]]
"""All ``(group, slot)`` pairs that move a tensor, by axis."""


@dataclass(frozen=True, eq=False)
class Tap:
    """Where the activations of a set of units can be seen.

    Attributes:
        site: name of the site.
        inflow: whether they flow into the site (else they come out of it).
        positions: where the units sit on the channel axis, int64, shape ``(units, copies)``.
        rows_of: for units that are rows: their group; the channels are then samples, and ``positions`` only counts
            the units.
    """

    site: str
    inflow: bool
    positions: Tensor
    rows_of: str | None = None

    @property
    def units(self) -> int:
        """Number of units."""
        return len(self.positions)

    def node(self, site: Site) -> str:
        """Return the node of the graph whose value is seen."""
        return site.source if self.inflow else site.target


@dataclass(frozen=True, eq=False)
class Frame:
    """The part of the relabelling of B that is known while the moments of a pair are taken.

    Attributes:
        spec: the groups.
        permutations: by group, the unit of B at each place of A; groups that are missing are not known.
    """

    spec: SymmetrySpec
    permutations: Couplings

    def knows(self, group: str) -> bool:
        """Return whether it is known how B lists a group's units, those of the groups around it included."""
        if group not in self.permutations:
            return False
        return all(outer in self.permutations for outer, _ in self.spec.groups[group].within)


class Actions:
    """The slots through which groups move the activations at the sites of a traced network.

    Args:
        traced: the network, for inputs of certain shapes.
        sites: where activations are seen.
        spec: the groups. Groups of the network that it lacks act under a name that begins with ``@``.
    """

    def __init__(self, traced: Trace, sites: Sequence[Site], spec: SymmetrySpec) -> None:
        nodes = {s.source for s in sites} | {s.target for s in sites}
        found = discover_from_trace(traced, outputs=spec.outputs, watched=sorted(nodes))
        names = _names(found, spec)
        self._known = {node for node in nodes if activation_name(node) in found.shapes}
        self._ranks = {node: len(found.shapes[activation_name(node)]) for node in self._known}
        self._movers: dict[str, dict[int, list[tuple[str, Slot]]]] = {}
        table = found.slots_by_tensor()
        for node in self._known:
            acting = table.get(activation_name(node), {})
            pairs = {k: [(names[g], s) for g, s in listed if g in names] for k, listed in acting.items()}
            self._movers[node] = {k: listed for k, listed in pairs.items() if listed}
        listed = set(names.values())
        self.unplaced = frozenset(name for name in spec.groups if name not in listed)
        """Groups of the spec that the network's own symmetries lack: where they act on activations is not known."""

    def movers(self, node: str) -> Movers | None:
        """Return the groups and slots that move the value of a node, ``None`` if they are not known."""
        return self._movers[node] if node in self._known else None

    def on_rows(self, site: Site, tap: Tap) -> list[str]:
        """Return the groups that move the rows of a tap."""
        by_axis = self._movers.get(tap.node(site), {})
        if tap.rows_of is None:
            own = site.channel_axis_of(self._ranks.get(tap.node(site), 0))
        else:
            slot = self.row_slot(tap.node(site), tap.rows_of)
            own = None if slot is None else slot.axis
        found = (name for axis, pairs in by_axis.items() if axis != own for name, _ in pairs)
        return list(dict.fromkeys(found))

    def row_slot(self, node: str, group: str) -> Slot | None:
        """Return where a group sits among the rows of a node's value, if on a single axis and alone there."""
        pairs = [(name, slot) for listed in self._movers.get(node, {}).values() for name, slot in listed]
        own = [slot for name, slot in pairs if name == group]
        if len(own) != 1 or own[0].block:
            return None
        where = set(own[0].index.positions().flatten().tolist())
        others = (slot for name, slot in pairs if name != group and slot.axis == own[0].axis)
        return None if any(where & set(s.index.positions().flatten().tolist()) for s in others) else own[0]


def _names(found: SymmetrySpec, spec: SymmetrySpec) -> dict[str, str]:
    """Return the name in a spec of every group that was found and moves a parameter, or one of its own."""
    known = {_slots(group, spec): name for name, group in spec.groups.items()}
    keys = {name: _slots(group, spec) for name, group in found.groups.items()}
    return {name: known.get(key, f"@{name}") for name, key in keys.items() if key}


def _slots(group: AxisGroup, spec: SymmetrySpec) -> frozenset[tuple[object, ...]]:
    """Return the slots of a group on the network's own tensors, in a form that can be compared.

    Gains and biases that folding has made ones and zeros take no part: what mixes units does not move them.
    """
    still = {*spec.ones, *spec.zeros}
    own = (s for s in group.slots if not s.tensor.startswith(activation_name("")) and s.tensor not in still)
    return frozenset((s.tensor, s.axis, s.index, s.block) for s in own)


def unit_rows(activation: Tensor, site: Site, tap: Tap) -> Tensor:
    """Return the activations of units, shape ``(samples, units)``; positions in space and copies are samples.

    Args:
        activation: what flows in or out, any shape with a channel axis.
        site: where.
        tap: where the units sit on the channel axis.
    """
    return _rows(activation, site.channel_axis(activation), tap.positions)


def _rows(activation: Tensor, axis: int, positions: Tensor) -> Tensor:
    rows = activation.movedim(axis, -1).reshape(-1, activation.shape[axis])
    chosen = positions.T.reshape(-1)
    if torch.equal(chosen, torch.arange(rows.shape[1])):
        return rows.reshape(-1, len(positions))
    return rows[:, chosen.to(rows.device)].reshape(-1, len(positions))


def framed_rows(
    activation: Tensor, site: Site, tap: Tap, actions: Actions, frame: Frame, *, moves: bool
) -> Tensor:
    """Return the activations of units as :func:`unit_rows` does, with rows that both networks have in common.

    Args:
        activation: of A or of B.
        site: where.
        tap: which units.
        actions: how groups move the activation.
        frame: what is known of the relabelling of B.
        moves: whether this is B, whose rows move.
    """
    movers = actions.movers(tap.node(site)) or {}
    if tap.rows_of is None:
        axis, positions = site.channel_axis(activation), tap.positions
    else:
        slot = actions.row_slot(tap.node(site), tap.rows_of)
        assert slot is not None, "views of rows are made where a group has one slot"
        axis, positions = slot.axis, slot.index.positions()
    around = {k: pairs for k, pairs in movers.items() if k != axis}
    if moves:
        known = {k: [(g, s) for g, s in pairs if frame.knows(g)] for k, pairs in around.items()}
        activation = carry_tensor(activation, known, frame.permutations)
    for k, pairs in around.items():
        unknown = [slot for name, slot in pairs if not frame.knows(name)]
        if unknown:
            activation = _averaged(activation, k, unknown)
    return _rows(activation, axis, positions)


def _averaged(activation: Tensor, axis: int, slots: Iterable[Slot]) -> Tensor:
    """Return the activation with positions of an axis that may change places replaced by their mean."""
    length = activation.shape[axis]
    orbit = _Orbits(length)
    for slot in slots:
        for copy in slot.index.positions().T.tolist():
            orbit.join(copy)
    places, index = orbit.numbered
    sums = activation.new_zeros(
        [places if k == axis else n for k, n in enumerate(activation.shape)],
        dtype=torch.promote_types(activation.dtype, torch.float32),
    )
    sums.index_add_(axis, index.to(activation.device), activation.to(sums.dtype))
    counts = index.bincount(minlength=places).to(sums)
    return sums / counts.reshape([-1 if k == axis else 1 for k in range(activation.ndim)])


class _Orbits:
    """Positions of an axis, joined where a relabelling may exchange them."""

    def __init__(self, length: int) -> None:
        self._first = list(range(length))

    def join(self, positions: Sequence[int]) -> None:
        """Put positions, and all that each was joined with, into one orbit."""
        roots = {self._root(p) for p in positions}
        for root in roots:
            self._first[root] = min(roots)

    def _root(self, position: int) -> int:
        while self._first[position] != position:
            position = self._first[position]
        return position

    @cached_property
    def numbered(self) -> tuple[int, Tensor]:
        """The number of orbits, and the orbit of each position, int64."""
        roots = torch.tensor([self._root(p) for p in range(len(self._first))], dtype=torch.int64)
        values, index = roots.unique(return_inverse=True)
        return len(values), index
