"""Applying permutations to a state: a pure function, one gather per moved axis."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from isthmus.couplings import validate_permutation
from isthmus.errors import ShapeError, SymmetryError
from isthmus.states import with_versions_of
from isthmus.symmetry._spec import Slot, SymmetrySpec

__all__ = ["apply", "check_permutations", "permute_tensor"]


def apply(
    spec: SymmetrySpec, permutations: Mapping[str, Tensor], state: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Relabel the units of a network: return a new state, the input stays untouched.

    Args:
        spec: the symmetries of the network.
        permutations: from group name to index tensor, int, shape ``(group.size,)``: entry ``i`` is the unit of
            ``state`` placed at position ``i``. A missing group stays as it is.
        state: tensors by name; any device (meta too) and dtype.

    Returns:
        All tensors of ``state``, with the versions of modules that it carries. Tensors that no given group moves are
        the same objects.

    Raises:
        SymmetryError: a permutation names an unknown group, or the state lacks a tensor of the spec.
        ShapeError: a permutation or a tensor has the wrong shape.
    """
    checked = check_permutations(spec, permutations)
    result = with_versions_of(state, dict(state))
    for name, by_axis in spec.slots_by_tensor().items():
        moving = {
            axis: [(group, slot) for group, slot in slots if group in checked]
            for axis, slots in by_axis.items()
        }
        if not any(moving.values()):
            continue
        if name not in state:
            raise SymmetryError(
                f"the state has no tensor {name!r}, which the spec moves. Is it a checkpoint of this network?"
            )
        if tuple(state[name].shape) != spec.shapes[name]:
            raise ShapeError(
                f"{name!r}: the spec expects shape {spec.shapes[name]}, the state has {tuple(state[name].shape)}."
            )
        result[name] = permute_tensor(state[name], moving, checked)
    return result


def permute_tensor(
    tensor: Tensor,
    slots_by_axis: Mapping[int, Sequence[tuple[str, Slot]]],
    permutations: Mapping[str, Tensor],
) -> Tensor:
    """Move one tensor: one gather per slot, those that act on whole rows of an axis composed into a single one.

    Args:
        tensor: any shape.
        slots_by_axis: per axis, the ``(group name, slot)`` pairs that act there, outer groups first.
        permutations: checked permutations by group name; groups without one do not move.
    """
    moved = tensor
    blocks: list[tuple[str, Slot]] = []
    for axis, slots in slots_by_axis.items():
        index = None
        for group, slot in slots:
            if group not in permutations:
                continue
            if slot.block:
                blocks.append((group, slot))
                continue
            step = slot.index.gather_index(permutations[group])
            index = step if index is None else index[step]
        if index is not None and not torch.equal(index, torch.arange(len(index))):
            moved = moved.index_select(axis, index.to(moved.device))
    if blocks and moved is tensor:
        moved = tensor.clone()
    for group, slot in blocks:
        _move_block(moved, slot, slot.index.gather_index(permutations[group]).to(moved.device))
    return moved


def _move_block(tensor: Tensor, slot: Slot, index: Tensor) -> None:
    """Move, in place, the part of a tensor that a slot with a block acts on."""
    grids = [torch.arange(n, device=tensor.device) for n in tensor.shape]
    for axis, where in slot.block:
        grids[axis] = where.positions().reshape(-1).to(tensor.device)
    target = _open_grid(grids)
    grids[slot.axis] = index
    tensor[target] = tensor[_open_grid(grids)]


def _open_grid(grids: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Return index tensors that address the product of the given positions of each axis."""
    rank = len(grids)
    return tuple(g.reshape([-1 if k == axis else 1 for k in range(rank)]) for axis, g in enumerate(grids))


def check_permutations(spec: SymmetrySpec, permutations: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the permutations as int64 tensors on the CPU, each checked against its group.

    Raises:
        SymmetryError: a group is unknown.
        ShapeError: an entry is not a permutation of the group's units.
    """
    unknown = [name for name in permutations if name not in spec.groups]
    if unknown:
        raise SymmetryError(f"no group named {unknown[0]!r}; the spec has {list(spec.groups)}.")
    return {
        name: validate_permutation(p, spec.groups[name].size, f"permutation of group {name!r}")
        for name, p in permutations.items()
    }
