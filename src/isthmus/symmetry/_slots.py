"""Where units sit, as values: index maps, slots, groups and pinned axes, and how they are written as JSON."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from isthmus.couplings import validate_permutation
from isthmus.errors import SymmetryError
from isthmus.symmetry._acts import Acts
from isthmus.symmetry._overlaps import distinct_positions

__all__ = [
    "AxisGroup",
    "IndexMap",
    "Limit",
    "PinnedAxis",
    "Planes",
    "Role",
    "Slot",
    "group_from_json",
    "group_to_json",
    "whole",
]

Role = Literal["holds", "reads", "both", "scales", ""]
_ROLES: tuple[Role, ...] = get_args(Role)
Planes = Literal["", "halves", "neighbours"]
_PLANES: tuple[Planes, ...] = get_args(Planes)


@dataclass(frozen=True)
class IndexMap:
    """Where the units of a group sit on one tensor axis.

    Unit ``u``, copy ``(i, j, …)`` sits at ``offset + u * stride + i * s_i + j * s_j + …`` for
    ``copies = ((n_i, s_i), (n_j, s_j), …)``. A whole axis is ``IndexMap(n, n)``; a channel of a flattened
    ``channels × height × width`` axis is ``IndexMap(c*h*w, c, 0, h*w, ((h*w, 1),))``; a segment of a
    concatenation has an offset.

    Attributes:
        length: length of the tensor axis.
        size: number of units.
        offset: position of unit 0, copy 0.
        stride: distance between neighbouring units.
        copies: ``(count, stride)`` of each direction along which a unit has several positions.
    """

    length: int
    size: int
    offset: int = 0
    stride: int = 1
    copies: tuple[tuple[int, int], ...] = ()

    def __post_init__(self) -> None:
        """Check that every unit and copy has a position of its own on the axis.

        Raises:
            SymmetryError: they do not, a number is negative, or not whole.
        """
        steps = [(self.size, self.stride), *self.copies]
        for value in (self.length, self.offset, *(v for step in steps for v in step)):
            if type(value) is not int:
                raise SymmetryError(
                    f"index map {self}: expected whole numbers, found {value!r} of type {type(value).__name__}."
                )
        last = self.offset + sum((n - 1) * s for n, s in steps)
        if min((self.length, self.size, self.offset, *(v for step in steps for v in step))) < 0:
            raise SymmetryError(f"index map {self}: lengths, offsets and strides must not be negative.")
        if self.size and last >= self.length:
            raise SymmetryError(
                f"index map {self}: its last position {last} lies outside an axis of {self.length}."
            )
        if not distinct_positions(self):
            raise SymmetryError(
                f"index map {self}: two of its {self.covered} units and copies share a position, so moving them would "
                "destroy entries. Every unit and copy needs a position of its own: see the strides."
            )

    @property
    def is_whole(self) -> bool:
        """Whether unit ``u`` is simply position ``u`` of the axis."""
        return (self.size, self.offset, self.stride, self.copies) == (self.length, 0, 1, ())

    @property
    def covered(self) -> int:
        """Number of positions of the axis that belong to the group."""
        return self.size * math.prod(n for n, _ in self.copies)

    def positions(self) -> Tensor:
        """Return the position of every unit and copy, int64, shape ``(size, copies)``."""
        grid = self.offset + self.stride * torch.arange(self.size).unsqueeze(1)
        for number, stride in self.copies:
            grid = (grid.unsqueeze(-1) + stride * torch.arange(number)).reshape(self.size, -1)
        return grid

    def gather_index(self, permutation: Tensor) -> Tensor:
        """Return ``index``, shape ``(length,)``, such that ``x[index]`` is the moved axis ``x``.

        Raises:
            ShapeError: ``permutation`` is none of the units.
        """
        return self.moved_by(validate_permutation(permutation, self.size))

    def moved_by(self, permutation: Tensor) -> Tensor:
        """Return what :meth:`gather_index` returns, for a permutation that is known to be one, on the CPU."""
        if self.is_whole:
            return permutation
        index = torch.arange(self.length)
        positions = self.positions()
        index[positions.reshape(-1)] = positions[permutation].reshape(-1)
        return index

    def __str__(self) -> str:
        """Return a short form: ``all``, or the segment, factor and offset in use."""
        if self.is_whole:
            return "all"
        where = f"{self.offset}+" if self.offset else ""
        copies = "".join(f" ×{n}/{s}" for n, s in self.copies)
        return f"{where}{self.size}/{self.stride}{copies} of {self.length}"


@dataclass(frozen=True, order=True)
class Slot:
    """One place where a group acts: a parameter or buffer, an axis of it, and the index map on that axis.

    Attributes:
        tensor: name of the parameter or buffer.
        axis: axis number.
        index: where the units sit on the axis.
        block: other axes on which the group acts at some positions only (the hidden units of one expert, in a
            tensor of all experts): ``(axis, index map with one unit)`` pairs.
        role: whether the tensor ``"holds"`` the units (a weight that computes them, a bias), ``"reads"`` them (a weight
            that they flow into), does ``"both"`` (a tied embedding), or ``"scales"`` them one by one (a gain, a
            depthwise filter); empty where that is not known.
        power: how the tensor changes when the group's class (:attr:`AxisGroup.acts`) is more than permutations: factors
            of the units are raised to this power, and matrices act as on what holds the units (1) or as on what reads
            them (-1); 0 for a tensor that only changes its order, ``None`` where nothing but permutations may act.
    """

    tensor: str
    axis: int
    index: IndexMap = field(compare=False)
    block: tuple[tuple[int, IndexMap], ...] = field(default=(), compare=False)
    role: Role = field(default="", compare=False)
    power: int | None = field(default=None, compare=False)

    def __str__(self) -> str:
        """Return ``tensor[axis]`` and, unless it is the whole axis, the index map and the block."""
        part = "" if self.index.is_whole else f" ({self.index})"
        where = ", ".join(f"[{axis}] {','.join(map(str, _where(index)))}" for axis, index in self.block)
        return f"{self.tensor}[{self.axis}]{part}" + (f" at {where}" if where else "")


@dataclass(frozen=True)
class Limit:
    """What would act on the units of a group, were it not for an operator.

    Attributes:
        acts: the class without it.
        operator: its name.
        modules: paths of the modules that call it, empty for the model itself.
    """

    acts: Acts
    operator: str
    modules: tuple[str, ...] = ("",)

    def __str__(self) -> str:
        """Return the class and the operator in words."""
        named = [m for m in self.modules if m]
        more = f" and {len(named) - 1} more" if len(named) > 1 else ""
        where = f" in {named[0]}{more}" if named else ""
        return f"{self.acts.words}, were it not for {self.operator.removeprefix('aten.')}{where}"


@dataclass(frozen=True)
class AxisGroup:
    """The slots that must be permuted together: ``size`` interchangeable units.

    Groups can be nested: each head has its own group of dimensions, and the heads move too. Then the outer
    permutation acts first and the inner one is written at the new place of its outer unit:
    ``new[i, j] = old[outer[i], inner_i[j]]``.

    Attributes:
        name: name of the group.
        size: number of units.
        slots: where they sit.
        within: ``(name of the outer group, its unit)`` pairs, outermost first, for a nested group.
        family: common name of the nested groups that stand for one another when outer units move.
        acts: the largest class of couplings that may act on the units.
        limits: the larger classes that operators prevent.
        planes: which units make a pair, where pairs are acted on (:attr:`isthmus.symmetry.Acts.pairs`): ``"halves"``,
            unit ``i`` with ``i + size / 2``, or ``"neighbours"``, units ``2i`` and ``2i + 1``; empty elsewhere.

    Raises:
        SymmetryError: a slot has another number of units than the group, or it acts on pairs and does not say which.
    """

    name: str
    size: int
    slots: tuple[Slot, ...]
    within: tuple[tuple[str, int], ...] = ()
    family: str = ""
    acts: Acts = Acts.PERMUTATION
    limits: tuple[Limit, ...] = ()
    planes: Planes = ""

    def __post_init__(self) -> None:
        """Check the slots against the group's size, and the pairs."""
        if self.acts.pairs != bool(self.planes) or (self.planes and self.size % 2):
            raise SymmetryError(
                f"group {self.name!r} of {self.size} units: expected an even number of units and planes 'halves' or "
                f"'neighbours' where {Acts.COMPLEX.words} act, and none elsewhere, found {self.acts.words} and "
                f"planes {self.planes!r}."
            )
        for slot in self.slots:
            if slot.index.size != self.size:
                raise SymmetryError(
                    f"group {self.name!r} has {self.size} units, but its slot {slot} has {slot.index.size}."
                )

    @property
    def pairs(self) -> Tensor:
        """The two units of each plane, int64, shape ``(planes, 2)``; none where single units are acted on."""
        units = torch.arange(self.size if self.planes else 0)
        return units.reshape(2, -1).T if self.planes == "halves" else units.reshape(-1, 2)

    def __str__(self) -> str:
        """Return one line: name, size and slots."""
        return f"{self.name}: {self.size} units in {', '.join(map(str, self.slots))}"


@dataclass(frozen=True)
class PinnedAxis:
    """Positions of a tensor axis that cannot move, and what prevents it.

    Attributes:
        tensor: parameter or buffer name.
        axis: axis number.
        size: how many positions of the axis are pinned.
        reason: in words.
        operator: the operator that pinned them, empty for inputs, outputs and unused tensors.
        module: path of the module that called the operator.
    """

    tensor: str
    axis: int
    size: int
    reason: str
    operator: str = ""
    module: str = ""

    def __str__(self) -> str:
        """Return one line: where, how many, why, by which operator."""
        by = f" [{self.operator}{' in ' + self.module if self.module else ''}]" if self.operator else ""
        return f"{self.tensor}[{self.axis}]: {self.size} positions: {self.reason}{by}"


def _where(index: IndexMap) -> list[int]:
    return index.positions().reshape(-1).tolist()


def group_to_json(group: AxisGroup) -> dict[str, Any]:
    data: dict[str, Any] = {
        "name": group.name,
        "size": group.size,
        "slots": [_slot_to_json(s) for s in group.slots],
    }
    if group.family:
        data |= {"within": [list(w) for w in group.within], "family": group.family}
    if group.acts is not Acts.PERMUTATION:
        data["acts"] = str(group.acts)
    if group.planes:
        data["planes"] = group.planes
    if group.limits:
        data["limits"] = [
            {"acts": str(limit.acts), "operator": limit.operator, "modules": list(limit.modules)}
            for limit in group.limits
        ]
    return data


def _slot_to_json(slot: Slot) -> dict[str, Any]:
    data = {"tensor": slot.tensor, "axis": slot.axis, **_index_to_json(slot.index)}
    if slot.block:
        data["block"] = [{"axis": axis, **_index_to_json(index)} for axis, index in slot.block]
    if slot.role:
        data["role"] = slot.role
    if slot.power is not None:
        data["power"] = slot.power
    return data


def _index_to_json(index: IndexMap) -> dict[str, Any]:
    return {"offset": index.offset, "stride": index.stride, "copies": [list(c) for c in index.copies]}


def whole(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise SymmetryError(
            f"not a symmetry spec in JSON: expected whole numbers from 0 on, found {value!r}."
        )
    return value


def _index_from_json(data: Mapping[str, Any], shape: Sequence[int], size: int) -> IndexMap:
    copies = tuple((whole(n), whole(step)) for n, step in data["copies"])
    return IndexMap(shape[whole(data["axis"])], size, whole(data["offset"]), whole(data["stride"]), copies)


def group_from_json(data: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> AxisGroup:
    size = whole(data["size"])
    slots: list[Slot] = []
    for s in data["slots"]:
        shape = shapes[s["tensor"]]
        block = tuple((whole(b["axis"]), _index_from_json(b, shape, 1)) for b in s.get("block", ()))
        role = s.get("role", "")
        if role not in _ROLES:
            raise SymmetryError(
                f"not a symmetry spec in JSON: expected a role of {', '.join(map(repr, _ROLES))}, found {role!r}."
            )
        index, power = _index_from_json(s, shape, size), s.get("power")
        if power is not None and type(power) is not int:
            raise SymmetryError(
                f"not a symmetry spec in JSON: expected a whole number as the power of a slot, found {power!r}."
            )
        slots.append(Slot(s["tensor"], whole(s["axis"]), index, block, role, power))
    within = tuple((str(name), whole(unit)) for name, unit in data.get("within", ()))
    limits = tuple(
        Limit(Acts(limit["acts"]), str(limit["operator"]), tuple(str(m) for m in limit["modules"]))
        for limit in data.get("limits", ())
    )
    family, acts = str(data.get("family", "")), Acts(data.get("acts", Acts.PERMUTATION))
    planes = data.get("planes", "")
    if planes not in _PLANES:
        raise SymmetryError(
            f"not a symmetry spec in JSON: expected planes of {', '.join(map(repr, _PLANES))}, found {planes!r}."
        )
    return AxisGroup(str(data["name"]), size, tuple(slots), within, family, acts, limits, planes)
