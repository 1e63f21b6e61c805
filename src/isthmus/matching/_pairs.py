"""Single entries of products, in float64, and sums of them: what proofs and values need without the whole product."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

from isthmus.couplings import Coupling, Permutation
from isthmus.matching._sources import Order, pieces
from isthmus.symmetry import Couplings, Slots, carry_tensor, reordering

__all__ = ["in_order", "kernels_for", "order_of", "ordered", "pair_products", "slices"]

_CHUNK = 2**18
"""Entries of each tensor that are gathered at once: 2 MB in float64."""
_COMPILED = 2**18
"""Entries from which on compiled loops are used: below, no one should wait for them to load."""


def order_of(movers: Slots, at: Couplings) -> Order:
    """Return how the axes of a tensor of B are reordered, on the CPU; axes that stay as they are do not appear."""
    return reordering(movers, at).axes


def in_order(tensor: Tensor, movers: Slots, at: Couplings) -> tuple[Tensor, Order]:
    """Return a tensor of B, and how its axes are still to be reordered.

    Where a coupling is more than a permutation of whole axes, the tensor is carried at once and no axis is left.
    """
    acting = [(at[group], slot) for pairs in movers.values() for group, slot in pairs if group in at]
    if any(slot.block or (isinstance(c, Coupling) and not isinstance(c, Permutation)) for c, slot in acting):
        return carry_tensor(tensor, movers, at), {}
    return tensor, order_of(movers, at)


def ordered(tensor: Tensor, order: Order) -> Tensor:
    """Return a tensor with its axes reordered."""
    for axis, index in order.items():
        tensor = tensor.index_select(axis, index.to(tensor.device))
    return tensor


def pair_products(a: Tensor, b: Tensor, axis: int, rows: Tensor, columns: Tensor, order: Order) -> Tensor:
    """Return inner products of slices of two tensors of one shape, in float64, on the CPU.

    Args:
        a: A's tensor.
        b: B's tensor.
        axis: along which slices are taken.
        rows: positions of A's slices, int64, shape ``(pairs,)``, on the CPU.
        columns: positions of B's.
        order: reorders the other axes of B's.
    """
    kernels = kernels_for(a, b)
    if kernels is not None:
        return _compiled(kernels, a, b, axis, rows, columns, order)
    if _short_and_large(a, b):  # entries widened to float32 are the same numbers
        return torch.stack(
            [
                pair_products(x.float().contiguous(), y.float().contiguous(), axis, rows, columns, rest)
                for x, y, rest in pieces(a, b, order, (axis,))
            ]
        ).sum(0)
    length = a.numel() // max(a.shape[axis], 1)
    step = max(1, _CHUNK // max(length, 1))
    found = [
        (slices(a, axis, i, {}) * slices(b, axis, j, order)).sum(1)
        for i, j in zip(rows.split(step), columns.split(step), strict=True)
    ]
    return torch.cat(found).cpu() if found else torch.zeros(0, dtype=torch.float64)


def _short_and_large(*tensors: Tensor) -> bool:
    """Return whether compiled loops would serve these tensors if they were wider."""
    short = any(t.dtype.is_floating_point and t.dtype.itemsize < 4 for t in tensors)
    wide = any(t.dtype == torch.float64 for t in tensors)
    return short and not wide and all(t.device.type == "cpu" and t.numel() >= _COMPILED for t in tensors)


def slices(tensor: Tensor, axis: int, where: Tensor, order: Order) -> Tensor:
    """Return slices of a tensor along an axis, their entries reordered: float64, one row each."""
    chosen = ordered(tensor.index_select(axis, where.to(tensor.device)), order)
    return chosen.movedim(axis, 0)[..., None].flatten(1).double()


def kernels_for(*tensors: Tensor) -> ModuleType | None:
    """Return the compiled loops if they serve these tensors: large ones of float32 or float64 on the CPU."""
    fit = all(
        t.device.type == "cpu" and t.dtype in (torch.float32, torch.float64) and t.is_contiguous()
        for t in tensors
    )
    return _kernels() if fit and max(t.numel() for t in tensors) >= _COMPILED else None


@cache
def _kernels() -> ModuleType | None:
    try:
        from isthmus.matching import _kernels as found
    except (ImportError, RuntimeError):  # numba is missing, or finds no place for its cache
        return None
    return found


def _compiled(
    kernels: ModuleType, a: Tensor, b: Tensor, axis: int, rows: Tensor, columns: Tensor, order: Order
) -> Tensor:
    outer, inner = _flat(b.shape[:axis], order, 0), _flat(b.shape[axis + 1 :], order, axis + 1)
    shape = (len(outer), b.shape[axis], len(inner))
    found = np.zeros(len(rows))
    kernels.pair_sums(
        a.detach().reshape(shape).numpy(),
        b.detach().reshape(shape).numpy(),
        rows.numpy(),
        columns.numpy(),
        outer.numpy(),
        inner.numpy(),
        not any(k > axis for k in order),
        found,
    )
    return torch.from_numpy(found)


def _flat(shape: Sequence[int], order: Order, first: int) -> Tensor:
    """Return where the entries of some axes come from, as places in them flattened; ``first`` is their first axis."""
    places = torch.zeros(1, dtype=torch.int64)
    for k, size in enumerate(shape, first):
        index = order[k].cpu() if k in order else torch.arange(size)
        places = (places[:, None] * size + index).flatten()
    return places
