"""What moves in the files: the index of every moved axis of every stored tensor, and reading in that order."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from isthmus.errors import ShapeError, SymmetryError
from isthmus.pretrained._lazy import LazyState
from isthmus.pretrained._open import OpenedModel
from isthmus.symmetry import Couplings, Reordering, SymmetrySpec, as_couplings, reordering

__all__ = ["BLOCK_BYTES", "STILL", "blocks", "gathers", "gathers_by_key"]


BLOCK_BYTES = 64 * 2**20
"""Bytes of a tensor that are worked on at a time."""


STILL = Reordering()
"""Nothing moves."""


def gathers(spec: SymmetrySpec, permutations: Couplings) -> dict[str, Reordering]:
    """Return how every tensor that permutations move is put in order.

    Raises:
        SymmetryError: a permutation names an unknown group.
        ShapeError: a permutation has the wrong shape.
    """
    checked = as_couplings(spec, permutations)
    found = {n: reordering(slots, checked) for n, slots in spec.slots_by_tensor().items()}
    return {name: order for name, order in found.items() if order}


def gathers_by_key(spec: SymmetrySpec, permutations: Couplings, opened: OpenedModel) -> dict[str, Reordering]:
    """Return how the stored tensors are put in order, by their names in the files.

    Raises:
        SymmetryError: the spec is of another network, or moves tied tensors differently.
        ShapeError: a tensor's shape differs from the spec's.
    """
    moves = gathers(spec, permutations)
    for name in moves:
        if name not in opened.state:
            raise SymmetryError(
                f"{opened.path}: has no tensor {name!r}, which the alignment moves. Was it made for this network?"
            )
        shape = opened.state.stored(name).shape
        if shape != spec.shapes[name]:
            raise ShapeError(
                f"{opened.path}: {name!r} has shape {shape}, the alignment expects {spec.shapes[name]}. Was it made "
                "for this network?"
            )
    found: dict[str, Reordering] = {}
    for key, names in opened.names.items():
        wanted = [moves.get(name, STILL) for name in names]
        if any(not wanted[0].same(other) for other in wanted[1:]):
            raise SymmetryError(
                f"{opened.path}: {', '.join(map(repr, names))} are one tensor, but the alignment moves them "
                "differently. Make the alignment from this model folder."
            )
        if wanted and wanted[0]:
            found[key] = wanted[0]
    return found


def blocks(state: LazyState, key: str, gather: Reordering, limit: int = BLOCK_BYTES) -> Iterator[Tensor]:
    """Yield a tensor, put in order, in blocks of rows of about ``limit`` bytes.

    Only a tensor whose axis 0 or whose parts move is ever read whole; of any other no more than a block is in
    memory.
    """
    stored = state.stored(key)
    if not stored.shape:
        yield state[key]
        return
    length = stored.shape[0]
    step = max(1, limit * length // max(stored.nbytes, 1))
    within = Reordering(gather.without(0).axes)
    rows = gather.axes.get(0)
    whole = None if rows is None else state[key]
    if gather.parts:
        whole, rows, within = gather.apply(state[key]), None, STILL
    for start in range(0, length, step):
        stop = min(start + step, length)
        if whole is None:
            block = state.rows(key, start, stop)
        else:
            block = whole[start:stop] if rows is None else whole.index_select(0, rows[start:stop])
        yield within.apply(block)
