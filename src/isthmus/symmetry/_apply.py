"""Carrying tensors by couplings: in another order where units are permuted, by their matrices elsewhere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from isthmus.couplings import Coupling, Monomial, Permutation, Rotation, index_of, validate_permutation
from isthmus.errors import ShapeError, SymmetryError
from isthmus.states import with_versions_of
from isthmus.symmetry._elements import class_of, is_of_pairs
from isthmus.symmetry._slots import AxisGroup, Slot
from isthmus.symmetry._spec import SymmetrySpec

__all__ = [
    "Couplings",
    "Reordering",
    "Slots",
    "apply",
    "as_couplings",
    "carry_tensor",
    "check_permutations",
    "reordering",
]

Slots = Mapping[int, Sequence[tuple[str, Slot]]]
"""By axis of a tensor, the ``(group, slot)`` pairs that act there, outer groups first."""
Couplings = Mapping[str, Coupling | Tensor]
"""By group; an index tensor stands for its permutation."""


def apply(spec: SymmetrySpec, permutations: Couplings, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Relabel the units of a network: return a new state, the input stays untouched.

    Args:
        spec: the symmetries of the network.
        permutations: from group name to index tensor, int, shape ``(group.size,)``: entry ``i`` is the unit of
            ``state`` placed at position ``i``; or to a :class:`isthmus.couplings.Coupling`. A missing group stays as
            it is.
        state: tensors by name; any device (meta too) and dtype.

    Returns:
        All tensors of ``state``, with the versions of modules that it carries. Tensors that no given group moves are
        the same objects.

    Raises:
        SymmetryError: a permutation names an unknown group, the state lacks a tensor of the spec, or a coupling needs
            to know whether a slot holds or reads its units.
        ShapeError: a permutation or a tensor has the wrong shape.
    """
    checked = as_couplings(spec, permutations)
    spec = spec.with_planes() if any(name in spec.planes for name in checked) else spec
    result = with_versions_of(state, dict(state))
    for name, by_axis in spec.slots_by_tensor().items():
        if not any(group in checked for slots in by_axis.values() for group, _ in slots):
            continue
        if name not in state:
            raise SymmetryError(
                f"the state has no tensor {name!r}, which the spec moves. Is it a checkpoint of this network?"
            )
        if tuple(state[name].shape) != spec.shapes[name]:
            raise ShapeError(
                f"{name!r}: the spec expects shape {spec.shapes[name]}, the state has {tuple(state[name].shape)}."
            )
        result[name] = carry_tensor(state[name], by_axis, checked)
    return result


def carry_tensor(tensor: Tensor, slots_by_axis: Slots, at: Couplings) -> Tensor:
    """Return one tensor carried by couplings.

    Args:
        tensor: any shape.
        slots_by_axis: per axis, the ``(group name, slot)`` pairs that act there, outer groups first.
        at: couplings by group name, checked; groups without one do not move.

    Raises:
        SymmetryError: a coupling treats what holds units and what reads them differently, and a slot does not say
            which it is, or is both.
    """
    own = [(g, slot) for slots in slots_by_axis.values() for g, slot in slots if g in at]
    if all(isinstance(at[group], Permutation | Tensor) for group, _ in own):
        return reordering(slots_by_axis, at).apply(tensor)
    for group, slot in own:
        coupling = at[group]
        tensor = _carried(
            tensor, slot, coupling if isinstance(coupling, Coupling) else Permutation(coupling), group
        )
    return tensor


@dataclass(frozen=True, eq=False)
class Reordering:
    """How permutations put one tensor in order: one gather per axis, those of several slots composed.

    Attributes:
        axes: by axis, where its entries come from, int64 on the CPU; axes that stay are left out.
        parts: ``(slot, index)`` of the slots that move a part of the tensor only (one expert's units), after the axes.
    """

    axes: Mapping[int, Tensor] = field(default_factory=dict[int, Tensor])
    parts: tuple[tuple[Slot, Tensor], ...] = ()

    def __bool__(self) -> bool:
        """Whether anything moves."""
        return bool(self.axes or self.parts)

    def apply(self, tensor: Tensor) -> Tensor:
        """Return the tensor in order; the same tensor where nothing moves."""
        moved = tensor
        for axis, index in self.axes.items():
            moved = moved.index_select(axis, index.to(moved.device))
        if self.parts and moved is tensor:
            moved = tensor.clone()
        for slot, index in self.parts:
            target, source = _open_grid(moved, slot, None), _open_grid(moved, slot, index)
            moved[target] = moved[source]
        return moved

    def without(self, axis: int) -> Reordering:
        """Return the same without one axis."""
        return Reordering({k: index for k, index in self.axes.items() if k != axis}, self.parts)

    def same(self, other: Reordering) -> bool:
        """Whether two tensors are ordered alike."""
        if self.axes.keys() != other.axes.keys() or len(self.parts) != len(other.parts):
            return False
        pairs = [(index, other.axes[axis]) for axis, index in self.axes.items()]
        for (slot, index), (other_slot, other_index) in zip(self.parts, other.parts, strict=True):
            if (slot.axis, slot.index, slot.block) != (other_slot.axis, other_slot.index, other_slot.block):
                return False
            pairs.append((index, other_index))
        return all(torch.equal(one, two) for one, two in pairs)


def reordering(slots_by_axis: Slots, at: Couplings) -> Reordering:
    """Return how permutations put a tensor in order.

    Args:
        slots_by_axis: per axis, the ``(group name, slot)`` pairs that act on the tensor, outer groups first.
        at: checked permutations by group name; groups without one do not move.

    Raises:
        ShapeError: a coupling is no permutation.
    """
    axes: dict[int, Tensor] = {}
    parts: list[tuple[Slot, Tensor]] = []
    for axis, slots in slots_by_axis.items():
        index = None
        for group, slot in slots:
            if group not in at:
                continue
            permutation = index_of(at[group])
            step = slot.index.moved_by(permutation)
            if slot.block:
                if not torch.equal(permutation, torch.arange(len(permutation))):
                    parts.append((slot, step))
                continue
            index = step if index is None else index[step]
        if index is not None and not torch.equal(index, torch.arange(len(index))):
            axes[axis] = index
    return Reordering(axes, tuple(parts))


def _open_grid(tensor: Tensor, slot: Slot, index: Tensor | None) -> tuple[Tensor, ...]:
    """Return index tensors that address the part of a tensor that a slot with a block acts on, its axis reordered."""
    grids = [torch.arange(n) for n in tensor.shape]
    for axis, where in slot.block:
        grids[axis] = where.positions().reshape(-1)
    if index is not None:
        grids[slot.axis] = index
    return tuple(
        g.to(tensor.device).reshape([-1 if k == axis else 1 for k in range(tensor.ndim)])
        for axis, g in enumerate(grids)
    )


_ALLOWED: Mapping[str, tuple[tuple[type, ...], str]] = {
    "both": ((Permutation, Rotation), "holds and reads"),
    "scales": ((Permutation, Monomial), "multiplies one by one"),
    "": ((Permutation, Rotation), "does not say whether it holds or reads"),
}
"""What may act on slots of each role, and why nothing else; slots that hold or read their units take anything."""


def _carried(tensor: Tensor, slot: Slot, coupling: Coupling, group: str) -> Tensor:
    """Return a tensor of which the units of one slot were carried by any coupling."""
    coupling, readers = _acting(slot, coupling, group)
    if slot.index.is_whole and not slot.block:
        return (coupling.carry_readers if readers else coupling.carry)(tensor, slot.axis)
    inside = _open_grid(tensor, slot, None)
    part, where = tensor[inside], slot.index.positions()
    units = part.index_select(slot.axis, where.flatten().to(part.device)).unflatten(slot.axis, where.shape)
    carry = coupling.carry_readers if readers else coupling.carry
    moved = carry(units, slot.axis).flatten(slot.axis, slot.axis + 1)
    part = part.index_copy(slot.axis, where.flatten().to(part.device), moved.to(part.dtype))
    return torch.index_put(tensor, inside, part)


def _acting(slot: Slot, coupling: Coupling, group: str) -> tuple[Coupling, bool]:
    """Return what acts on a slot, and whether it acts as on what reads the units.

    The power of a slot says it where it is known; elsewhere its role does.
    """
    if isinstance(coupling, Monomial) and slot.power is not None:
        return coupling.powered(slot.power), False
    if slot.power in (1, -1):
        return coupling, slot.power < 0
    if slot.role == "scales" and isinstance(coupling, Monomial):
        # factors pass through what multiplies one by one
        return Permutation.known(coupling.index), False
    allowed, which = _ALLOWED.get(slot.role, ((), ""))
    if slot.power == 0 and not allowed:
        allowed, which = (Permutation, Monomial), "keeps the size of"
    if allowed and not isinstance(coupling, allowed):
        listed = " or a ".join(kind.__name__ for kind in allowed)
        raise SymmetryError(
            f"group {group!r}: slot {slot} {which} its units, so only a {listed} can act on it, found {coupling!r}."
        )
    return coupling, slot.role == "reads"


def _check_class(group: AxisGroup, coupling: Coupling) -> None:
    """Refuse a coupling of a larger class than may act on a group; a group without powers is left to its roles."""
    if group.planes:
        if not is_of_pairs(group.acts, coupling, group.pairs):
            raise SymmetryError(
                f"group {group.name!r}: only {group.acts.words} ({group.planes}) leave the function alone, found "
                f"{coupling!r}."
            )
        return
    if isinstance(coupling, Permutation) or all(slot.power is None for slot in group.slots):
        return
    found = class_of(coupling)
    if found is not None and not group.acts.contains(found):
        raise SymmetryError(
            f"group {group.name!r}: only {group.acts.words} leave the function alone, found {found.words}: "
            f"{coupling!r}."
        )


def as_couplings(spec: SymmetrySpec, permutations: Couplings) -> dict[str, Coupling]:
    """Return couplings by group, each checked against its group; an index tensor stands for its permutation.

    Raises:
        SymmetryError: a group is unknown, or a coupling is of a larger class than may act on its group.
        ShapeError: an entry is not a permutation of the group's units, or a coupling of other units.
    """
    groups = {**spec.groups, **spec.planes}
    unknown = [name for name in permutations if name not in groups]
    if unknown:
        raise SymmetryError(f"no group named {unknown[0]!r}; the spec has {list(groups)}.")
    found: dict[str, Coupling] = {}
    for name, given in permutations.items():
        size = groups[name].size
        if not isinstance(given, Coupling):
            given = Permutation.known(validate_permutation(given, size, f"permutation of group {name!r}"))
        elif given.shape != (size, size):
            raise ShapeError(
                f"coupling of group {name!r}: expected one of {size} units with themselves, found {given!r}."
            )
        _check_class(groups[name], given)
        found[name] = given
    return found


def check_permutations(spec: SymmetrySpec, permutations: Couplings) -> dict[str, Tensor]:
    """Return the permutations as int64 tensors on the CPU, each checked against its group.

    Raises:
        SymmetryError: a group is unknown, or a coupling is no permutation.
        ShapeError: an entry is not a permutation of the group's units.
    """
    found: dict[str, Tensor] = {}
    for name, coupling in as_couplings(spec, permutations).items():
        if not isinstance(coupling, Permutation):
            raise SymmetryError(f"group {name!r}: expected a permutation, found {coupling!r}.")
        found[name] = coupling.index
    return found
