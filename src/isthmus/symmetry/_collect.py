"""From the labels of the parameters to groups and slots: the last step of discovery."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from isthmus.symmetry._axes import (
    Atom,
    Expression,
    Pin,
    Placement,
    Sum,
    merged_copies,
    occurrences,
    placements,
    resolve,
)
from isthmus.symmetry._segments import Stacked
from isthmus.symmetry._slots import AxisGroup, IndexMap, PinnedAxis, Slot
from isthmus.symmetry._spec import SymmetrySpec
from isthmus.symmetry._values import Value

__all__ = ["Label", "collect"]

_MOST_MEMBERS = 4096
"""Families of more nested groups than this stay one group, whose units move alike everywhere."""

Nesting = Mapping[Atom, tuple[Atom, ...]]
Label = Value | Stacked
"""What is known of a tensor of the state, as a whole or in segments."""


@dataclass(frozen=True)
class _PlacedAtom:
    """A placement of an atom on an axis of a parameter, or of one segment of it.

    Attributes:
        tensor: name of the parameter.
        value: its labels, or those of the segment.
        axis: the axis.
        place: where the atom sits on it.
        segment: the axis on which the segment lies, the position where it begins, and the length of the whole.
    """

    tensor: str
    value: Value
    axis: int
    place: Placement
    segment: tuple[int, int, int] | None = None

    def index(self, axis: int, place: Placement, size: int, rest: dict[Atom, int]) -> IndexMap:
        """Return positions on an axis of the whole parameter (see :func:`_index`)."""
        if self.segment is None or self.segment[0] != axis:
            return _index(self.value.axes[axis].size, place, size, rest)
        _, start, length = self.segment
        return _index(length, replace(place, offset=place.offset + start), size, rest)


def collect(
    labels: Mapping[str, Label],
    names: Mapping[str, Sequence[str]],
    nesting: Nesting,
    outputs: tuple[str, ...] | None,
) -> SymmetrySpec:
    """Read the groups off the labels.

    Args:
        labels: of every state tensor.
        names: all names of each of these tensors.
        nesting: for atoms that move independently inside others, these others, outermost first.
        outputs: the outputs that are preserved.
    """
    sites: dict[Atom, list[_PlacedAtom]] = {}
    pinned: list[PinnedAxis] = []
    for tensor, label in labels.items():
        for name in names[tensor]:
            for axis in range(label.ndim):
                for value, segment in _pieces(label):
                    for place in placements(value.axes[axis]):
                        if isinstance(place, Placement) and place.atom.pinned is None:
                            sites.setdefault(place.atom, []).append(
                                _PlacedAtom(name, value, axis, place, segment)
                            )
                pinned += dict.fromkeys(p for e in _axes_of(label, axis) for p in _pinned_axis(name, axis, e))
    shapes = {name: value.shape for tensor, value in labels.items() for name in names[tensor]}
    return SymmetrySpec(_Groups(sites, nesting).build(), tuple(pinned), shapes, outputs)


def _pieces(label: Label) -> Iterator[tuple[Value, tuple[int, int, int] | None]]:
    """Yield the values that make up a tensor, each with the segment where it lies."""
    if isinstance(label, Value):
        yield label, None
        return
    start = 0
    for part, length in zip(label.parts, label.lengths, strict=True):
        yield part, (label.dim, start, label.shape[label.dim])
        start += length


def _axes_of(label: Label, axis: int) -> Iterator[Expression]:
    """Yield what is known of an axis: once, or in every segment."""
    if isinstance(label, Value):
        yield label.axes[axis]
    elif axis != label.dim:
        yield from (part.axes[axis] for part in label.parts)
    else:
        yield resolve(Sum(tuple(p.axes[axis] for p in label.parts))) if label.whole is None else label.whole


def _pinned_axis(name: str, axis: int, expression: Expression) -> Iterator[PinnedAxis]:
    """Yield what is pinned on an axis, unless it is a factor beside one that moves."""
    found = list(occurrences(expression))
    if any(o.copies for o in found if not isinstance(o, tuple)):
        return
    totals: dict[Pin, int] = {}
    for part, positions in (f for f in found if isinstance(f, tuple)):
        totals[part.why] = totals.get(part.why, 0) + positions
    for why, positions in totals.items():
        if positions:
            # Factors of one product each count all of its positions.
            yield PinnedAxis(
                name, axis, min(positions, expression.size), why.reason, why.operator, why.module
            )


class _Groups:
    def __init__(self, sites: Mapping[Atom, list[_PlacedAtom]], nesting: Nesting) -> None:
        self._sites = sites
        self._names = dict(zip(sites, _group_names(list(sites.values())), strict=True))
        self._outer = {atom: self._expressible(atom, nesting.get(atom, ())) for atom in sites}

    def _expressible(self, atom: Atom, outers: tuple[Atom, ...]) -> tuple[Atom, ...]:
        """Return the outer atoms if every slot of every member can be written down, else none."""
        if math.prod(o.size for o in outers) > _MOST_MEMBERS:
            return ()
        first = tuple((o, 0) for o in outers)
        return outers if all(_slot(site, first) is not None for site in self._sites[atom]) else ()

    def build(self) -> dict[str, AxisGroup]:
        """Return all groups, outer ones before inner ones."""
        groups: dict[str, AxisGroup] = {}
        for atom in sorted(self._sites, key=lambda a: len(self._outer[a])):
            for units in itertools.product(*(range(o.size) for o in self._outer[atom])):
                member = self._member(atom, tuple(zip(self._outer[atom], units, strict=True)))
                groups[member.name] = member
        return groups

    def _member(self, atom: Atom, units: tuple[tuple[Atom, int], ...]) -> AxisGroup:
        found = (_slot(site, units) for site in self._sites[atom])
        slots = _joined([slot for slot in found if slot is not None])
        free = [(o, unit) for o, unit in units if o.pinned is None]
        within = tuple((self._name(o, units), unit) for o, unit in free)
        pattern = ",".join("*" if o.pinned is None else str(unit) for o, unit in units)
        family = f"{self._names[atom]}[{pattern}]" if units else ""
        return AxisGroup(self._name(atom, units), atom.size, slots, within, family)

    def _name(self, atom: Atom, units: Iterable[tuple[Atom, int]]) -> str:
        own = [str(unit) for o, unit in units if o in self._outer[atom]]
        return self._names[atom] + (f"[{','.join(own)}]" if own else "")


def _slot(site: _PlacedAtom, units: tuple[tuple[Atom, int], ...]) -> Slot | None:
    """Return the slot of the member of a family at given outer units, or ``None`` if no slot can say it."""
    rest = dict(units)
    index = site.index(site.axis, site.place, site.place.atom.size, rest)
    block: list[tuple[int, IndexMap]] = []
    for axis, expression in enumerate(site.value.axes):
        places = [p for p in placements(expression) if isinstance(p, Placement) and p.atom in rest]
        if axis == site.axis or not places:
            continue
        if len({p.atom for p in places}) < len(places):
            return None
        anchor = places[0]
        unit = rest.pop(anchor.atom)
        moved = Placement(anchor.atom, anchor.offset + unit * anchor.stride, 1, anchor.siblings)
        block.append((axis, site.index(axis, moved, 1, rest)))
    if rest:
        return None
    if site.segment is not None and site.segment[0] not in (site.axis, *(axis for axis, _ in block)):
        dim, start, length = site.segment
        size = site.value.shape[dim]
        block = sorted(
            [*block, (dim, IndexMap(length, 1, start, 1, ((size, 1),) if size > 1 else ()))], key=_axis
        )
    return Slot(site.tensor, site.axis, index, tuple(block))


def _joined(slots: Sequence[Slot]) -> tuple[Slot, ...]:
    """Join slots on the segments of one tensor where the group acts alike on all of them."""
    alike: dict[tuple[str, int, IndexMap, int], list[Slot]] = {}
    for slot in slots:
        if len(slot.block) == 1:
            alike.setdefault((slot.tensor, slot.axis, slot.index, slot.block[0][0]), []).append(slot)
    whole: dict[int, Slot | None] = {}
    for parts in alike.values():
        indices = [part.block[0][1] for part in parts]
        covered = sorted(place for index in indices for place in index.positions().flatten().tolist())
        if covered == list(range(indices[0].length)):
            whole |= {id(part): None for part in parts}
            whole[id(parts[0])] = replace(parts[0], block=())
    found = (whole.get(id(slot), slot) for slot in slots)
    return tuple(slot for slot in found if slot is not None)


def _axis(part: tuple[int, IndexMap]) -> int:
    return part[0]


def _index(length: int, place: Placement, size: int, rest: dict[Atom, int]) -> IndexMap:
    """Return the positions of a placement, restricted to one unit of each sibling in ``rest`` (used up)."""
    offset = place.offset
    copies: list[tuple[int, int]] = []
    for sibling, step in place.siblings:
        form = resolve(sibling)
        if isinstance(form, Atom) and form in rest:
            offset += rest.pop(form) * step
        else:
            copies.append((form.size, step))
    return IndexMap(length, size, offset, place.stride, merged_copies(copies))


def _group_names(groups: Sequence[Sequence[_PlacedAtom]]) -> list[str]:
    """Name each group after the module of its first slot that is an output axis; number repeats."""
    taken: dict[str, int] = {}
    names: list[str] = []
    for sites in groups:
        first = next((s for s in sites if s.axis == 0), sites[0])
        base = first.tensor.rpartition(".")[0] or first.tensor
        taken[base] = taken.get(base, 0) + 1
        names.append(base if taken[base] == 1 else f"{base}#{taken[base]}")
    return names
