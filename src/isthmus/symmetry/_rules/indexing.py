"""Look-ups by index tensors: the axis that is indexed by numbers cannot move, the others pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from isthmus.symmetry._axes import are_copies
from isthmus.symmetry._operation import TIED, Operation, rule
from isthmus.symmetry._values import Value

_INDEXED = "its positions are addressed by an index"
_LAST = "the last of several entries for one position stays"


@rule("aten.embedding", kind="local")
def embedding(op: Operation, weight: Value, indices: Value, **_: Any) -> Value:
    """Look rows up: the vocabulary is fixed by the input, the embedding axis passes."""
    op.look_up(weight, 0, indices, indices.axes, _INDEXED)
    return Value((*indices.axes, *weight.axes[1:]), points=weight.points)


@rule("aten.embedding_bag", "aten._embedding_bag", "aten._embedding_bag_forward_only")
def embedding_bag(
    op: Operation,
    weight: Value,
    indices: Value,
    offsets: Value,
    per_sample_weights: Value | None = None,
    **_: Any,
) -> Any:
    """Look rows up and pool them in bags: vocabulary and bags are fixed, the embedding axis passes."""
    given = [v for v in (indices, offsets, per_sample_weights) if v is not None]
    op.use_as_numbers([weight, *given])
    op.pin_all(given, _INDEXED)
    op.pin(weight.axes[0], _INDEXED)
    op.mix(weight, [0])
    pooled = Value((op.fixed(op.shape[0], "bags"), weight.axes[1]))
    return (pooled, *op.fixed_result("bags")[1:])


@rule("aten.index_select", kind="local")
def index_select(op: Operation, x: Value, dim: int, index: Value) -> Value:
    """Select positions of one axis."""
    chosen = index.axes[0] if index.ndim else op.fixed(1, _INDEXED)
    op.look_up(x, dim, index, [chosen], _INDEXED)
    dim %= max(x.ndim, 1)
    return Value((*x.axes[:dim], chosen, *x.axes[dim + 1 :]), points=x.points)


@rule("aten.index", kind="local")
def index(op: Operation, x: Value, indices: Sequence[Value | None]) -> Value:
    """Index with tensors, as NumPy does: indexed axes are fixed, slices pass."""
    used = [k for k, i in enumerate(indices) if i is not None]
    tensors = [indices[k] for k in used]
    start = tensors[0].run if len(used) == 1 and tensors[0] is not None else None
    if start is not None:
        return _range(op, x, used[0], start % x.shape[used[0]])
    shape = op.shape
    kept = [a for k, a in enumerate(x.axes) if k not in used]
    rank = len(shape) - len(kept)
    adjacent = bool(used) and used == list(range(used[0], used[-1] + 1))
    place = used[0] if adjacent else 0
    values = [t for t in tensors if t is not None]
    if any(t.ndim > rank for t in values):
        op.use_as_numbers([x, *values])
        return op.unknown([x, *values])
    block = op.broadcast(values, shape[place : place + rank])
    axes = (*kept[:place], *block.axes, *kept[place:])
    if tuple(a.size for a in axes) != shape:
        op.use_as_numbers([x, *values])
        return op.unknown([x, *values])
    for k, tensor in zip(used, values, strict=True):
        op.look_up(x, k, tensor, block.axes, _INDEXED)
    return Value(axes, points=x.points)


def _range(op: Operation, x: Value, dim: int, start: int) -> Value:
    """Index by a known run of neighbouring positions: a slice."""
    length = op.shape[dim]
    kept = op.segments(x.axes[dim], [start, length, x.shape[dim] - start - length])[1]
    return Value((*x.axes[:dim], kept, *x.axes[dim + 1 :]), points=x.points)


def _beside(op: Operation, x: Value, index: Value, dim: int) -> None:
    """Join the axes along which an index tensor of the same rank addresses equal positions."""
    for k in range(x.ndim):
        if k == dim:
            continue
        if x.shape[k] == index.shape[k]:
            op.unify(x.axes[k], index.axes[k])
        else:
            op.pin(x.axes[k], _INDEXED)
            op.pin(index.axes[k], _INDEXED)


@rule("aten.gather", kind="local")
def gather(op: Operation, x: Value, dim: int, index: Value, **_: Any) -> Value:
    """Gather along one axis; the other axes address equal positions in both tensors."""
    if x.ndim == 0:
        op.use_as_numbers([index])
        return Value(index.axes)
    dim %= x.ndim
    _beside(op, x, index, dim)
    op.look_up(x, dim, index, index.axes, _INDEXED)
    return Value(index.axes, points=x.points)


@rule("aten.scatter", "aten.scatter_add", kind="local")
def scatter(
    op: Operation, x: Value, dim: int, index: Value, src: Value | None = None, value: Any = None, **_: Any
) -> Value:
    """Write (or add) at positions of one axis; the other axes address equal positions in all tensors."""
    given = [v for v in (src, value) if isinstance(v, Value)]
    if x.ndim == 0 or any(v.shape != index.shape for v in given if v.ndim):
        op.use_as_numbers([x, index, *given])
        return op.unknown([x, index, *given])
    dim %= x.ndim
    op.use_as_numbers([x, *given])
    for v in given:
        for one, two in zip(v.axes, index.axes, strict=False):
            op.unify(one, two)
        if op.name == "aten.scatter" and v.ndim and not are_copies(v.axes[dim]):
            op.pin(v.axes[dim], _LAST)
    _beside(op, x, index, dim)
    op.look_up(x, dim, index, index.axes, _INDEXED)
    return Value(x.axes)


@rule("aten.index_add", "aten.index_copy", kind="local")
def index_write(op: Operation, x: Value, dim: int, index: Value, source: Value, **_: Any) -> Value:
    """Write (or add) slices of a source at positions of one axis; the other axes are joined."""
    dim %= max(x.ndim, 1)
    if x.ndim != source.ndim or x.ndim == 0:
        op.use_as_numbers([x, index, source])
        return op.unknown([x, index, source])
    op.use_as_numbers([x, source])
    for k in range(x.ndim):
        if k != dim:
            op.unify(x.axes[k], source.axes[k])
    places = index.axes if index.ndim else (op.fixed(1, _INDEXED),)
    op.unify(source.axes[dim], places[0])
    if op.name == "aten.index_copy":
        op.pin(source.axes[dim], _LAST)
    op.look_up(x, dim, index, source.axes, _INDEXED)
    return Value(x.axes)


@rule("aten.index_fill", kind="local")
def index_fill(op: Operation, x: Value, dim: int, index: Value, **_: Any) -> Value:
    """Write one number at positions of one axis."""
    op.use_as_numbers([x])
    op.look_up(x, dim % x.ndim, index, [a for k, a in enumerate(x.axes) if k != dim % x.ndim], _INDEXED)
    return Value(x.axes)


@rule("aten.index_put", "aten._unsafe_index_put", kind="local")
def index_put(op: Operation, x: Value, indices: Sequence[Value | None], values: Value, **_: Any) -> Value:
    """Write (or add) at positions given by index tensors or by a mask: the indexed axes are fixed, slices joined.

    A mask under which one number is written moves with what it covers.
    """
    used = [k for k, i in enumerate(indices) if i is not None]
    tensors = [i for i in indices if i is not None]
    op.use_as_numbers([x, *tensors, values])
    nodes: Any = op.node.args[1]
    masks = [_is_boolean(i) for i in nodes if i is not None]
    if masks == [True] and used == [0]:
        return _masked_write(op, x, tensors[0], values)
    if any(masks):
        return op.unknown([x, *tensors, values])
    rank = max(t.ndim for t in tensors)
    place = used[0] if used == list(range(used[0], used[-1] + 1)) else 0
    kept = [a for k, a in enumerate(x.axes) if k not in used]
    op.pin_all(tensors, _INDEXED)
    for k in used:
        op.pin(x.axes[k], _INDEXED)
    op.mix(x, used)
    written = [*kept[:place], *(op.fixed(2, _INDEXED),) * rank, *kept[place:]]
    for k, (axis, target) in enumerate(zip(reversed(values.axes), reversed(written), strict=False)):
        if place <= len(written) - 1 - k < place + rank:
            op.pin(axis, _INDEXED)
        elif axis.size == target.size and not are_copies(axis):
            op.unify(axis, target)
    return Value(x.axes)


def _is_boolean(index: Any) -> bool:
    return index.meta["val"].dtype in (torch.bool, torch.uint8)


def _masked_write(op: Operation, x: Value, mask: Value, values: Value) -> Value:
    """Write rows where a mask of the leading axes is true; several rows are told apart by their order."""
    for one, two in zip(mask.axes, x.axes, strict=False):
        op.unify(one, two)
    rest = x.axes[mask.ndim :]
    inner, outer = values.axes[max(values.ndim - len(rest), 0) :], values.axes[: values.ndim - len(rest)]
    for one, two in zip(reversed(inner), reversed(rest), strict=False):
        if one.size == two.size:
            op.unify(one, two)
    if any(axis.size > 1 for axis in outer):
        op.pin_all([mask, Value(outer)], _INDEXED)
        op.mix(x, range(mask.ndim))
    return Value(x.axes)


@rule("aten.one_hot", kind="local")
def one_hot(op: Operation, x: Value, **_: Any) -> Value:
    """Write numbers as positions on a new axis: fixed, unless they count the positions of one that moves."""
    if x.points is not None and x.points.axis.size == op.shape[-1]:
        if x.points.tied:
            op.pin(x.points.axis, TIED)
        return Value((*x.axes, x.points.axis))
    op.use_as_numbers([x])
    return Value((*x.axes, op.fixed(op.shape[-1], "positions of a one-hot code")))
