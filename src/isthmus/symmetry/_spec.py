"""What a symmetry is, as values: index maps, slots, groups, and the spec that lists them all."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from isthmus.couplings import Coupling, Permutation, validate_permutation
from isthmus.errors import SymmetryError
from isthmus.symmetry._nested import nested_composition, nested_inverse
from isthmus.symmetry._overlaps import check_overlaps, distinct_positions
from isthmus.symmetry._permutation_spec import AxesToPerm, PermToAxes, PermutationSpec, axes_of_permutations
from isthmus.symmetry._shares import fraction_moved, outputs_note, pinned_shares, pinned_summary

__all__ = ["AxisGroup", "IndexMap", "PinnedAxis", "Role", "Slot", "SymmetrySpec"]

_FORMAT = 2
_READABLE = (1, 2)
Role = Literal["holds", "reads", "both", "scales", ""]
_ROLES: tuple[Role, ...] = get_args(Role)


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
    """

    tensor: str
    axis: int
    index: IndexMap = field(compare=False)
    block: tuple[tuple[int, IndexMap], ...] = field(default=(), compare=False)
    role: Role = field(default="", compare=False)

    def __str__(self) -> str:
        """Return ``tensor[axis]`` and, unless it is the whole axis, the index map and the block."""
        part = "" if self.index.is_whole else f" ({self.index})"
        where = ", ".join(f"[{axis}] {','.join(map(str, _where(index)))}" for axis, index in self.block)
        return f"{self.tensor}[{self.axis}]{part}" + (f" at {where}" if where else "")


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

    Raises:
        SymmetryError: a slot has another number of units than the group.
    """

    name: str
    size: int
    slots: tuple[Slot, ...]
    within: tuple[tuple[str, int], ...] = ()
    family: str = ""

    def __post_init__(self) -> None:
        """Check the slots against the group's size."""
        for slot in self.slots:
            if slot.index.size != self.size:
                raise SymmetryError(
                    f"group {self.name!r} has {self.size} units, but its slot {slot} has {slot.index.size}."
                )

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


@dataclass(frozen=True)
class SymmetrySpec:
    """All permutation symmetries found in a network, plus what is pinned and why.

    Attributes:
        groups: from group name to :class:`AxisGroup`.
        pinned: axes that cannot move.
        shapes: shape of every parameter and buffer of the network.
        outputs: the outputs that are preserved, ``None`` for all.
        experiments: operators without a rule that were seen to pass axes on when they were run by themselves.
    """

    groups: Mapping[str, AxisGroup]
    pinned: tuple[PinnedAxis, ...] = ()
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict[str, tuple[int, ...]])
    outputs: tuple[str, ...] | None = None
    experiments: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Check every slot against the shapes and the other slots.

        Raises:
            SymmetryError: a slot names an unknown tensor, a missing axis or a wrong length, a group has another name
                than its entry, or slots move the same positions and not independently.
        """
        for name, group in self.groups.items():
            if group.name != name:
                raise SymmetryError(f"group {name!r}: its own name is {group.name!r}; expected the same.")
            for slot in group.slots:
                shape = self.shapes.get(slot.tensor)
                if shape is None:
                    raise SymmetryError(f"group {name!r}: the network has no tensor {slot.tensor!r}.")
                for axis, index in ((slot.axis, slot.index), *slot.block):
                    if not 0 <= axis < len(shape) or shape[axis] != index.length:
                        raise SymmetryError(
                            f"group {name!r}: slot {slot} expects axis {axis} of length {index.length}, "
                            f"but {slot.tensor!r} has shape {shape}."
                        )
        check_overlaps(self.groups)

    @property
    def fraction_moved(self) -> float:
        """Share of all parameter and buffer entries that some group moves, between 0 and 1."""
        return fraction_moved(self)

    @property
    def pinned_shares(self) -> dict[str, float]:
        """From everything that holds entries in their places to the share of all entries it holds, largest first.

        An entry held along several axes by different causes counts for each of them.
        """
        return pinned_shares(self)

    def pinned_summary(self) -> str:
        """Return one sentence: which share of the entries stays where it is, and what holds most of them.

        Example:
            >>> import torch, isthmus
            >>> net = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
            >>> isthmus.discover(net, torch.zeros(1, 3)).pinned_summary()
            "4 % of 50 entries are pinned: 4 % by the model's output 'output'."
        """
        return pinned_summary(self)

    @property
    def notes(self) -> tuple[str, ...]:
        """What is easily overlooked: that several outputs are preserved, and how much the largest of them holds."""
        note = outputs_note(self)
        return (note,) if note else ()

    def invert(self, permutations: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the permutations that undo these: those of nested groups follow their outer units.

        Args:
            permutations: from group name to index tensor, int64; a missing group stays as it is.

        Raises:
            SymmetryError: an unknown group.
        """
        return _indices(nested_inverse(self, _couplings(self, permutations)))

    def compose(self, first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the permutations equal to applying ``first`` and then ``second``.

        Raises:
            SymmetryError: an unknown group.
        """
        both = (_couplings(self, permutations) for permutations in (first, second))
        return _indices(nested_composition(self, *both))

    def slots_by_tensor(self) -> dict[str, dict[int, list[tuple[str, Slot]]]]:
        """Return, per tensor and axis, the ``(group name, slot)`` pairs that act there, outer groups first."""
        table: dict[str, dict[int, list[tuple[str, Slot]]]] = {}
        for name, group in self.groups.items():
            for slot in group.slots:
                table.setdefault(slot.tensor, {}).setdefault(slot.axis, []).append((name, slot))
        return table

    def without_slot(self, group: str, slot: Slot) -> SymmetrySpec:
        """Return the spec with one slot removed (to test that verification notices)."""
        old = self.groups[group]
        slots = tuple(s for s in old.slots if s != slot or s.index != slot.index or s.block != slot.block)
        return self.with_group(replace(old, slots=slots))

    def with_group(self, group: AxisGroup) -> SymmetrySpec:
        """Return the spec with a group added or replaced."""
        return replace(self, groups={**self.groups, group.name: group})

    def restrict(self, names: Sequence[str]) -> SymmetrySpec:
        """Return the spec with only the named groups.

        Raises:
            SymmetryError: a name is unknown.
        """
        unknown = [n for n in names if n not in self.groups]
        if unknown:
            raise SymmetryError(f"unknown groups {unknown}; the spec has {list(self.groups)}.")
        return replace(self, groups={n: self.groups[n] for n in names})

    def to_json(self) -> str:
        """Return the spec as JSON text (see :meth:`from_json`)."""
        data = {
            "format": _FORMAT,
            "groups": [
                {
                    "name": g.name,
                    "size": g.size,
                    "slots": [_slot_to_json(s) for s in g.slots],
                    **({"within": [list(w) for w in g.within], "family": g.family} if g.family else {}),
                }
                for g in self.groups.values()
            ],
            "pinned": [vars(p) for p in self.pinned],
            "shapes": {k: list(v) for k, v in self.shapes.items()},
            "outputs": None if self.outputs is None else list(self.outputs),
            **({"experiments": list(self.experiments)} if self.experiments else {}),
        }
        return json.dumps(data, indent=1)

    @classmethod
    def from_json(cls, text: str) -> SymmetrySpec:
        """Read a spec written by :meth:`to_json`.

        Raises:
            SymmetryError: the text is not such a spec.
        """
        try:
            data = json.loads(text)
            if data["format"] not in _READABLE:
                raise SymmetryError(f"expected symmetry spec format {_FORMAT}, found {data['format']!r}.")
            shapes = {str(k): tuple(_whole(n) for n in v) for k, v in data["shapes"].items()}
            listed = [_group_from_json(g, shapes) for g in data["groups"]]
            groups = {g.name: g for g in listed}
            if len(groups) < len(listed):
                raise SymmetryError("not a symmetry spec in JSON: two groups have the same name.")
            pinned = tuple(PinnedAxis(**p) for p in data["pinned"])
            outputs = None if data["outputs"] is None else tuple(data["outputs"])
            experiments = tuple(str(name) for name in data.get("experiments", ()))
        except SymmetryError:
            raise
        except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
            raise SymmetryError(f"not a symmetry spec in JSON: {type(error).__name__}: {error}.") from error
        return cls(groups, pinned, shapes, outputs, experiments)

    def to_permutation_spec(self) -> PermutationSpec:
        """Return the spec in the field's form, which knows whole axes only.

        Raises:
            SymmetryError: a slot acts on part of an axis, or two groups act on one axis.
        """
        places: dict[str, list[tuple[str, int]]] = {}
        for name, group in self.groups.items():
            for slot in group.slots:
                if not slot.index.is_whole or slot.block:
                    raise SymmetryError(
                        f"a PermutationSpec moves whole axes only, but group {name!r} acts on a part: slot {slot}. "
                        "Leave the group out with spec.restrict([...])."
                    )
            places[name] = [(s.tensor, s.axis) for s in group.slots]
        return PermutationSpec.from_places(places, self.shapes)

    @classmethod
    def from_permutation_spec(
        cls, pair: PermutationSpec | PermToAxes | AxesToPerm, shapes: Mapping[str, Sequence[int]]
    ) -> SymmetrySpec:
        """Read a symmetry written by hand for weight-matching code.

        Args:
            pair: a :class:`PermutationSpec`, or either of its dictionaries: ``{permutation: [(tensor, axis), …]}``
                or ``{tensor: (permutation or None, …)}``.
            shapes: shape of every tensor of the network.

        Raises:
            SymmetryError: an unknown tensor, a missing axis, or one permutation on axes of unequal length.
        """
        known = {name: tuple(int(n) for n in shape) for name, shape in shapes.items()}
        groups: dict[str, AxisGroup] = {}
        for name, places in axes_of_permutations(pair, known).items():
            lengths = {known[tensor][axis] for tensor, axis in places}
            if len(lengths) > 1:
                listed = ", ".join(f"{t}[{a}] of {known[t][a]}" for t, a in places)
                raise SymmetryError(f"permutation {name!r} acts on axes of unequal length: {listed}.")
            slots = tuple(Slot(t, a, IndexMap(known[t][a], known[t][a])) for t, a in places)
            groups[name] = AxisGroup(name, lengths.pop(), slots)
        return cls(groups, (), known)

    def __repr__(self) -> str:
        """Return one line: how many groups, and how much they move."""
        return f"SymmetrySpec(groups={len(self.groups)}, moved={self.fraction_moved:.1%}, pinned={len(self.pinned)})"

    def __str__(self) -> str:
        """Return a readable table of the groups and of what is pinned."""
        plural = "" if len(self.groups) == 1 else "s"
        lines = [
            f"{len(self.groups)} group{plural}, {self.fraction_moved:.1%} of {_entries(self.shapes)} entries move",
            *([self.pinned_summary()] if self.pinned else []),
            "",
        ]
        width = max([5, *(len(n) for n in self.groups)])
        roles = any(slot.role for group in self.groups.values() for slot in group.slots)
        lines.append(f"{'group':<{width}}  units  {'role    ' if roles else ''}moves")
        for name, group in self.groups.items():
            for k, slot in enumerate(group.slots):
                head = f"{name:<{width}}  {group.size:>5}" if k == 0 else " " * (width + 7)
                lines.append(f"{head}  {slot.role:<6}  {slot}" if roles else f"{head}  {slot}")
        if self.experiments:
            lines += ["", f"passed by experiment, not by a rule: {', '.join(self.experiments)}"]
        if self.pinned:
            lines += ["", "pinned", *(f"  {p}" for p in self.pinned)]
        return "\n".join(lines)


def _couplings(spec: SymmetrySpec, permutations: Mapping[str, Tensor]) -> dict[str, Coupling]:
    """Return index tensors as permutations; that their groups exist is left to those who use them."""
    return {
        name: Permutation(validate_permutation(p, spec.groups[name].size if name in spec.groups else len(p)))
        for name, p in permutations.items()
    }


def _indices(couplings: Mapping[str, Coupling]) -> dict[str, Tensor]:
    return {name: c.index for name, c in couplings.items() if isinstance(c, Permutation)}


def _entries(shapes: Mapping[str, tuple[int, ...]]) -> str:
    return f"{sum(math.prod(s) for s in shapes.values()):,}"


def _where(index: IndexMap) -> list[int]:
    return index.positions().reshape(-1).tolist()


def _slot_to_json(slot: Slot) -> dict[str, Any]:
    data = {"tensor": slot.tensor, "axis": slot.axis, **_index_to_json(slot.index)}
    if slot.block:
        data["block"] = [{"axis": axis, **_index_to_json(index)} for axis, index in slot.block]
    if slot.role:
        data["role"] = slot.role
    return data


def _index_to_json(index: IndexMap) -> dict[str, Any]:
    return {"offset": index.offset, "stride": index.stride, "copies": [list(c) for c in index.copies]}


def _whole(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise SymmetryError(
            f"not a symmetry spec in JSON: expected whole numbers from 0 on, found {value!r}."
        )
    return value


def _index_from_json(data: Mapping[str, Any], shape: Sequence[int], size: int) -> IndexMap:
    copies = tuple((_whole(n), _whole(step)) for n, step in data["copies"])
    return IndexMap(shape[_whole(data["axis"])], size, _whole(data["offset"]), _whole(data["stride"]), copies)


def _group_from_json(data: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> AxisGroup:
    size = _whole(data["size"])
    slots: list[Slot] = []
    for s in data["slots"]:
        shape = shapes[s["tensor"]]
        block = tuple((_whole(b["axis"]), _index_from_json(b, shape, 1)) for b in s.get("block", ()))
        role = s.get("role", "")
        if role not in _ROLES:
            raise SymmetryError(
                f"not a symmetry spec in JSON: expected a role of {', '.join(map(repr, _ROLES))}, found {role!r}."
            )
        slots.append(Slot(s["tensor"], _whole(s["axis"]), _index_from_json(s, shape, size), block, role))
    within = tuple((str(name), _whole(unit)) for name, unit in data.get("within", ()))
    return AxisGroup(str(data["name"]), size, tuple(slots), within, str(data.get("family", "")))
