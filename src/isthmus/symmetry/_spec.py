"""All symmetries of a network as one value: its groups, and what is pinned and why."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor

from isthmus.couplings import Coupling, Permutation, validate_permutation
from isthmus.errors import SymmetryError
from isthmus.symmetry._acts import Acts
from isthmus.symmetry._nested import nested_composition, nested_inverse
from isthmus.symmetry._overlaps import check_overlaps
from isthmus.symmetry._permutation_spec import AxesToPerm, PermToAxes, PermutationSpec, axes_of_permutations
from isthmus.symmetry._shares import fraction_moved, outputs_note, pinned_shares, pinned_summary
from isthmus.symmetry._slots import (
    AxisGroup,
    IndexMap,
    PinnedAxis,
    Slot,
    group_from_json,
    group_to_json,
    whole,
)

__all__ = ["SymmetrySpec"]

_FORMAT = 2
_READABLE = (1, 2)


@dataclass(frozen=True)
class SymmetrySpec:
    """All permutation symmetries found in a network, plus what is pinned and why.

    Attributes:
        groups: from group name to :class:`AxisGroup`.
        pinned: axes that cannot move.
        shapes: shape of every parameter and buffer of the network.
        outputs: the outputs that are preserved, ``None`` for all.
        experiments: operators without a rule that were seen to pass axes on when they were run by themselves.
        ones: tensors that hold nothing but ones, by which classes were found (see :func:`isthmus.discover`).
        zeros: the same of zeros.
        planes: groups whose units do not change places: pairs of them turn (:attr:`isthmus.symmetry.Acts.pairs`), as
            rotary embeddings let the dimensions of heads. They stand beside ``groups``, so that whoever permutes these
            need not know of them; :meth:`with_planes` puts them together.
    """

    groups: Mapping[str, AxisGroup]
    pinned: tuple[PinnedAxis, ...] = ()
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict[str, tuple[int, ...]])
    outputs: tuple[str, ...] | None = None
    experiments: tuple[str, ...] = ()
    ones: tuple[str, ...] = ()
    zeros: tuple[str, ...] = ()
    planes: Mapping[str, AxisGroup] = field(default_factory=dict[str, AxisGroup])

    def __post_init__(self) -> None:
        """Check every slot against the shapes and the other slots.

        Raises:
            SymmetryError: a slot names an unknown tensor, a missing axis or a wrong length, a group has another name
                than its entry, or slots move the same positions and not independently.
        """
        for name, group in (*self.groups.items(), *self.planes.items()):
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
        twice = sorted(self.groups.keys() & self.planes.keys())
        moving = sorted(name for name, group in self.planes.items() if not group.acts.pairs)
        if twice or moving:
            raise SymmetryError(
                f"group {(twice or moving)[0]!r} among the planes: expected another name than those of the other "
                "groups, and a class that acts on pairs."
            )
        check_overlaps({**self.groups, **self.planes})

    def with_planes(self) -> SymmetrySpec:
        """Return the spec with its planes among the groups, after the others: for couplings of all of them.

        Their units stay in order: a permutation of them is refused.
        """
        return replace(self, groups={**self.groups, **self.planes}, planes={}) if self.planes else self

    @property
    def larger(self) -> tuple[str, ...]:
        """Names of the groups on whose units more than permutations may act."""
        return tuple(name for name, group in self.groups.items() if group.acts is not Acts.PERMUTATION)

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
        old = self.groups[group] if group in self.groups else self.planes[group]
        slots = tuple(s for s in old.slots if s != slot or s.index != slot.index or s.block != slot.block)
        return self.with_group(replace(old, slots=slots))

    def with_group(self, group: AxisGroup) -> SymmetrySpec:
        """Return the spec with a group added or replaced."""
        where = "planes" if group.name in self.planes else "groups"
        return replace(self, **{where: {**getattr(self, where), group.name: group}})

    def restrict(self, names: Sequence[str]) -> SymmetrySpec:
        """Return the spec with only the named groups.

        Raises:
            SymmetryError: a name is unknown.
        """
        unknown = [n for n in names if n not in self.groups and n not in self.planes]
        if unknown:
            raise SymmetryError(f"unknown groups {unknown}; the spec has {[*self.groups, *self.planes]}.")
        groups, planes = ({n: of[n] for n in names if n in of} for of in (self.groups, self.planes))
        return replace(self, groups=groups, planes=planes)

    def to_json(self) -> str:
        """Return the spec as JSON text (see :meth:`from_json`)."""
        data = {
            "format": _FORMAT,
            "groups": [group_to_json(g) for g in self.groups.values()],
            "pinned": [vars(p) for p in self.pinned],
            "shapes": {k: list(v) for k, v in self.shapes.items()},
            "outputs": None if self.outputs is None else list(self.outputs),
            **({"experiments": list(self.experiments)} if self.experiments else {}),
            **({"ones": list(self.ones)} if self.ones else {}),
            **({"zeros": list(self.zeros)} if self.zeros else {}),
            **({"planes": [group_to_json(g) for g in self.planes.values()]} if self.planes else {}),
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
            shapes = {str(k): tuple(whole(n) for n in v) for k, v in data["shapes"].items()}
            listed = [group_from_json(g, shapes) for g in data["groups"]]
            turning = [group_from_json(g, shapes) for g in data.get("planes", ())]
            groups, planes = {g.name: g for g in listed}, {g.name: g for g in turning}
            if len(groups) + len(planes) < len(listed) + len(turning):
                raise SymmetryError("not a symmetry spec in JSON: two groups have the same name.")
            pinned = tuple(PinnedAxis(**p) for p in data["pinned"])
            outputs = None if data["outputs"] is None else tuple(data["outputs"])
            experiments, ones, zeros = (
                tuple(str(name) for name in data.get(key, ())) for key in ("experiments", "ones", "zeros")
            )
        except SymmetryError:
            raise
        except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
            raise SymmetryError(f"not a symmetry spec in JSON: {type(error).__name__}: {error}.") from error
        return cls(groups, pinned, shapes, outputs, experiments, ones, zeros, planes)

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
        listed = {**self.groups, **self.planes}
        width = max([5, *(len(n) for n in listed)])
        roles = any(slot.role for group in listed.values() for slot in group.slots)
        larger = any(group.acts is not Acts.PERMUTATION for group in listed.values())
        classes = max(len(g.acts.words) for g in listed.values()) if larger else 0
        acts = f"{'acts':<{classes}}  " if classes else ""
        lines.append(f"{'group':<{width}}  units  {acts}{'role    ' if roles else ''}moves")
        for name, group in listed.items():
            own = f"{group.acts.words:<{classes}}  " if classes else ""
            for k, slot in enumerate(group.slots):
                head = f"{name:<{width}}  {group.size:>5}  {own}" if k == 0 else " " * (width + 9 + len(own))
                lines.append(f"{head}{slot.role:<6}  {slot}" if roles else f"{head}{slot}")
            lines += [f"{' ' * (width + 9)}({limit})" for limit in group.limits]
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
