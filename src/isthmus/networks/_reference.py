"""Hand-written symmetry references: what moves with what, and how to compare it with a discovered spec.

Notation. A *place* is an axis of a tensor, ``("conv1.weight", 0)``. An *axis layout* is a tuple of
:class:`Segment`: which units of which group sit where on an axis of activations. A :class:`Ledger` collects
"this layout moves these places", line by line, and turns the lines into groups.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import nn

from isthmus.errors import SymmetryError
from isthmus.symmetry import AxisGroup, IndexMap, Slot, SymmetrySpec

__all__ = [
    "Ledger",
    "ReferenceComparison",
    "ReferenceGroup",
    "ReferenceSlot",
    "Segment",
    "as_symmetry_spec",
    "blocks",
    "columns",
    "compare_with_reference",
    "concatenated",
    "flattened",
    "norm",
    "rows",
    "whole",
]

TensorAxis = tuple[str, int]


@dataclass(frozen=True)
class Segment:
    """Units of a group on an axis: unit ``u``, copy ``(i, …)`` at ``offset + u*stride + Σ i*copy_stride``."""

    group: str
    size: int
    offset: int = 0
    stride: int = 1
    copies: tuple[tuple[int, int], ...] = ()


Layout = tuple[Segment, ...]


@dataclass(frozen=True)
class ReferenceSlot:
    """One place where a group acts: tensor, axis and index map (as in :class:`isthmus.symmetry.IndexMap`)."""

    tensor: str
    axis: int
    offset: int = 0
    stride: int = 1
    copies: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True)
class ReferenceGroup:
    """Units that a person says must move together: ``size`` units in ``slots``."""

    name: str
    size: int
    slots: tuple[ReferenceSlot, ...]


def whole(group: str, size: int) -> Layout:
    """Return the layout of an axis that holds the ``size`` units of one group in order."""
    return (Segment(group, size),)


def blocks(group: str, count: int, size: int) -> Layout:
    """Return the layout of ``count`` equal blocks of ``size`` positions, as group normalisation makes them.

    The group ``group.block`` permutes the blocks, and ``group.member[k]`` the positions inside block ``k``.
    """
    members = (Segment(f"{group}.member[{k}]", size, k * size) for k in range(count))
    return (Segment(f"{group}.block", count, 0, size, ((size, 1),)), *members)


def concatenated(*parts: tuple[Layout, int]) -> Layout:
    """Return the layout of a concatenation of ``(layout, length of its axis)`` parts."""
    joined: list[Segment] = []
    start = 0
    for layout, length in parts:
        joined += [replace(s, offset=s.offset + start) for s in layout]
        start += length
    return tuple(joined)


def flattened(layout: Layout, positions: int) -> Layout:
    """Return the layout after flattening ``channels × positions`` into one axis, channels slowest."""
    return tuple(
        Segment(
            s.group,
            s.size,
            s.offset * positions,
            s.stride * positions,
            (*((n, step * positions) for n, step in s.copies), (positions, 1)),
        )
        for s in layout
    )


def rows(layer: str, *, bias: bool = True, axis: int = 0) -> tuple[TensorAxis, ...]:
    """Return the output places of a linear or convolution layer (``axis=1`` for a transposed convolution)."""
    weight = (f"{layer}.weight", axis)
    return (weight, (f"{layer}.bias", 0)) if bias else (weight,)


def columns(layer: str, *, axis: int = 1) -> tuple[TensorAxis, ...]:
    """Return the input place of a linear or convolution layer (``axis=0`` for a transposed convolution)."""
    return ((f"{layer}.weight", axis),)


def norm(layer: str, *, statistics: bool = True) -> tuple[TensorAxis, ...]:
    """Return the places of a norm: gain and bias and, for BatchNorm, its running statistics."""
    names = ("weight", "bias", "running_mean", "running_var") if statistics else ("weight", "bias")
    return tuple((f"{layer}.{name}", 0) for name in names)


class Ledger:
    """Collects which places each group moves, in the order written."""

    def __init__(self) -> None:
        self._sizes: dict[str, int] = {}
        self._slots: dict[str, list[ReferenceSlot]] = {}

    def move(self, layout: Layout, *places: Iterable[TensorAxis]) -> None:
        """Write down that an axis with this layout moves all these places."""
        for segment in layout:
            self._sizes[segment.group] = segment.size
            self._slots.setdefault(segment.group, []).extend(
                ReferenceSlot(tensor, axis, segment.offset, segment.stride, segment.copies)
                for some in places
                for tensor, axis in some
            )

    def groups(self) -> list[ReferenceGroup]:
        """Return the groups; one of fewer than two units has nothing to permute and is left out."""
        return [
            ReferenceGroup(name, size, tuple(self._slots[name]))
            for name, size in self._sizes.items()
            if size > 1
        ]


def as_symmetry_spec(groups: Sequence[ReferenceGroup], model: nn.Module) -> SymmetrySpec:
    """Turn a reference into a :class:`~isthmus.symmetry.SymmetrySpec` of ``model``, pinned axes left out.

    Raises:
        SymmetryError: a slot names a tensor or an axis that the model does not have.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    names = {g.name for g in groups}
    return SymmetrySpec({g.name: _nested(_axis_group(g, shapes), names) for g in groups}, (), shapes)


def _nested(group: AxisGroup, names: set[str]) -> AxisGroup:
    """Say of the members of a block (see :func:`blocks`) that they live in it."""
    stem, found, rest = group.name.partition(".member[")
    if not found or f"{stem}.block" not in names:
        return group
    return replace(group, within=((f"{stem}.block", int(rest.rstrip("]"))),), family=f"{stem}.member")


def _axis_group(group: ReferenceGroup, shapes: Mapping[str, tuple[int, ...]]) -> AxisGroup:
    slots: list[Slot] = []
    for s in group.slots:
        shape = shapes.get(s.tensor, ())
        if s.axis >= len(shape):
            raise SymmetryError(
                f"reference group {group.name!r} moves axis {s.axis} of {s.tensor!r}, but the model has "
                f"{'shape ' + str(shape) if s.tensor in shapes else 'no such tensor'} there. "
                "Build the reference with the settings of the model."
            )
        try:
            index = IndexMap(shape[s.axis], group.size, s.offset, s.stride, s.copies)
        except SymmetryError as error:
            raise SymmetryError(
                f"reference group {group.name!r} does not fit axis {s.axis} of {s.tensor!r}, shape {shape}: "
                f"{error} Build the reference with the settings of the model."
            ) from error
        slots.append(Slot(s.tensor, s.axis, index))
    return AxisGroup(group.name, group.size, tuple(slots))


@dataclass(frozen=True)
class ReferenceComparison:
    """What differs between a reference and a discovered spec, up to the names of the groups.

    Attributes:
        missing: reference groups without an equal in the spec.
        unexpected: names of groups of the spec without an equal in the reference.
        report: a readable account, empty when the two agree.
    """

    missing: tuple[ReferenceGroup, ...]
    unexpected: tuple[str, ...]
    report: str

    @property
    def equal(self) -> bool:
        """Whether the two list the same groups with the same slots."""
        return not self.missing and not self.unexpected

    def __str__(self) -> str:
        """Return the report."""
        return self.report or "The spec equals the reference."


# For every (tensor, axis): the set of positions of each unit, in the order of the units.
_Canonical = frozenset[tuple[str, int, tuple[frozenset[int], ...]]]


def compare_with_reference(groups: Sequence[ReferenceGroup], spec: SymmetrySpec) -> ReferenceComparison:
    """Compare a discovered spec with a reference up to naming, order, and ways to write an index map.

    Two groups are equal when every unit has the same positions on every axis; how these positions are split
    into slots, strides and copies makes no difference. Groups of fewer than two units are ignored.

    Raises:
        SymmetryError: a reference slot names a tensor or an axis that the spec's network does not have.
    """
    wanted = {g.name: _canonical(_axis_group(g, spec.shapes)) for g in groups}
    found = {name: _canonical(g) for name, g in spec.groups.items() if g.size > 1}
    missing = tuple(g for g in groups if wanted[g.name] not in found.values())
    unexpected = tuple(name for name, c in found.items() if c not in wanted.values())
    lines = [_explain(g, wanted[g.name], {n: found[n] for n in unexpected}) for g in missing]
    if unexpected:
        lines.append("Groups of the spec that the reference does not have:")
        lines += [f"  {spec.groups[name]}" for name in unexpected]
    return ReferenceComparison(missing, unexpected, "\n".join(lines))


def _canonical(group: AxisGroup) -> _Canonical:
    units: dict[tuple[str, int], list[set[int]]] = {}
    for slot in group.slots:
        sets = units.setdefault((slot.tensor, slot.axis), [set() for _ in range(group.size)])
        for unit, positions in zip(sets, slot.index.positions().tolist(), strict=True):
            unit.update(positions)
    return frozenset((*place, tuple(map(frozenset, sets))) for place, sets in units.items())


def _explain(group: ReferenceGroup, wanted: _Canonical, candidates: Mapping[str, _Canonical]) -> str:
    head = f"No group of the spec equals the reference's {group.name!r} ({group.size} units)."
    name = max(candidates, key=lambda n: len(wanted & candidates[n]), default=None)
    if name is None or not wanted & candidates[name]:
        return f"{head} It should move {_places(wanted)}."
    lacks, adds = wanted - candidates[name], candidates[name] - wanted
    return f"{head} Nearest is {name!r}: it lacks {_places(lacks)} and adds {_places(adds)}."


def _places(canonical: _Canonical) -> str:
    return (
        ", ".join(f"{tensor}[{axis}]" for tensor, axis, _ in sorted(canonical, key=lambda c: c[:2]))
        or "nothing"
    )
