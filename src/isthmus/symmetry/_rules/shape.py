"""Operators that only move entries: views, permutations, concatenation, cutting, padding, expansion."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from isthmus.symmetry import _axes
from isthmus.symmetry._axes import ONE, Expression, Sum
from isthmus.symmetry._operation import Operation, rule
from isthmus.symmetry._values import Value


@rule(
    "aten.view",
    "aten.reshape",
    "aten._unsafe_view",
    "aten.flatten",
    "aten.unflatten",
    "aten.view_as",
    kind="moves",
)
@rule("aten.reshape_as", "aten._reshape_alias", kind="moves")
def reshape(op: Operation, x: Value, **_: Any) -> Value:
    """Merge and split axes: read all as one row-major product and peel the new axes off its end."""
    if math.prod(x.shape) == 0:
        return op.fixed_result("an empty tensor")
    whole = _axes.product_of(x.axes)
    axes: list[Expression] = []
    for size in reversed(op.shape):
        whole, axis = op.split_trailing(whole, size)
        axes.insert(0, axis)
    return Value(tuple(axes))


@rule("aten.permute", kind="moves")
def permute(op: Operation, x: Value, dims: Sequence[int], **_: Any) -> Value:
    """Reorder axes."""
    return Value(tuple(x.axes[d] for d in dims))


@rule("aten.transpose", kind="moves")
def transpose(op: Operation, x: Value, dim0: int, dim1: int, **_: Any) -> Value:
    """Exchange two axes."""
    axes = list(x.axes)
    if axes:
        axes[dim0], axes[dim1] = axes[dim1], axes[dim0]
    return Value(tuple(axes))


@rule("aten.t", "aten.numpy_T", "aten.mT", kind="moves")
def matrix_transpose(op: Operation, x: Value) -> Value:
    """Reverse the axes of a matrix."""
    return Value((*x.axes[:-2], *reversed(x.axes[-2:])))


@rule("aten.movedim", kind="moves")
def movedim(op: Operation, x: Value, source: Any, destination: Any) -> Value:
    """Move axes to other places."""
    one = isinstance(source, int)
    origin = [s % x.ndim for s in ([source] if one else source)]
    target = [d % x.ndim for d in ([destination] if one else destination)]
    order = [k for k in range(x.ndim) if k not in origin]
    for place, start in sorted(zip(target, origin, strict=True)):
        order.insert(place, start)
    return Value(tuple(x.axes[k] for k in order))


@rule("aten.unsqueeze", kind="moves")
def unsqueeze(op: Operation, x: Value, dim: int) -> Value:
    """Insert an axis of length 1."""
    dim %= x.ndim + 1
    return Value((*x.axes[:dim], ONE, *x.axes[dim:]))


@rule("aten.squeeze", kind="moves")
def squeeze(op: Operation, x: Value, dim: Any = None) -> Value:
    """Remove axes of length 1."""
    chosen = range(x.ndim) if dim is None else [d % x.ndim for d in ([dim] if isinstance(dim, int) else dim)]
    return Value(tuple(a for k, a in enumerate(x.axes) if not (k in chosen and a.size == 1)))


@rule("aten.expand", "aten.expand_as", "aten.broadcast_to", kind="moves")
def expand(op: Operation, x: Value, **_: Any) -> Value:
    """Repeat axes of length 1: the copies are equal, so the new axis is free."""
    shape = op.shape
    old = (ONE,) * (len(shape) - x.ndim) + x.axes
    return Value(tuple(a if a.size == s else _axes.equal_copies(s) for a, s in zip(old, shape, strict=True)))


@rule("aten.repeat", "aten.tile", kind="moves")
def repeat(op: Operation, x: Value, **_: Any) -> Value:
    """Repeat whole axes: equal copies, so the copies are free among themselves."""
    shape = op.shape
    old = (ONE,) * (len(shape) - x.ndim) + x.axes
    return Value(
        tuple(_axes.product_of((_axes.equal_copies(s // a.size), a)) for a, s in zip(old, shape, strict=True))
    )


@rule("aten.repeat_interleave", kind="moves")
def repeat_interleave(
    op: Operation, x: Value | None = None, repeats: Any = None, dim: Any = None, **_: Any
) -> Value:
    """Repeat every entry of an axis the same number of times."""
    if x is None or not isinstance(repeats, int) or dim is None:
        return op.unknown([v for v in (x, repeats) if isinstance(v, Value)])
    axes = list(x.axes)
    axes[dim] = _axes.product_of((axes[dim], _axes.equal_copies(repeats)))
    return Value(tuple(axes))


@rule("aten.cat", "aten.concat", "aten.concatenate", kind="moves")
def cat(op: Operation, tensors: Sequence[Value], dim: int = 0) -> Value:
    """Concatenate: the axis becomes a sum of segments, all other axes are joined."""
    shape = op.shape
    parts = [t for t in tensors if t.ndim == len(shape)]
    dim %= len(shape)
    joined = [op.join([t.axes[k] for t in parts], s) if k != dim else ONE for k, s in enumerate(shape)]
    joined[dim] = _axes.resolve(Sum(tuple(t.axes[dim] for t in parts)))
    return Value(tuple(joined))


@rule("aten.stack", kind="moves")
def stack(op: Operation, tensors: Sequence[Value], dim: int = 0) -> Value:
    """Stack along a new axis whose positions are different tensors."""
    dim %= tensors[0].ndim + 1
    joined = op.broadcast(tensors, tensors[0].shape)
    new = op.fixed(len(tensors), "stacked tensors")
    return Value((*joined.axes[:dim], new, *joined.axes[dim:]))


def _cut(op: Operation, x: Value, lengths: Sequence[int], dim: int) -> tuple[Value, ...]:
    dim %= x.ndim
    segments = op.segments(x.axes[dim], lengths)
    return tuple(Value((*x.axes[:dim], s, *x.axes[dim + 1 :])) for s in segments)


@rule(
    "aten.split",
    "aten.chunk",
    "aten.split_with_sizes",
    "aten.tensor_split",
    "aten.unsafe_chunk",
    kind="moves",
)
@rule(
    "aten.unsafe_split",
    "aten.unsafe_split_with_sizes",
    "aten.split_with_sizes_copy",
    "aten.split_copy",
    kind="moves",
)
def split(op: Operation, x: Value, dim: int = 0, **_: Any) -> tuple[Value, ...]:
    """Cut an axis into consecutive segments."""
    return _cut(op, x, [int(r.shape[dim]) for r in op.result], dim)


@rule("aten.unbind", "aten.unbind_copy", kind="moves")
def unbind(op: Operation, x: Value, dim: int = 0) -> tuple[Value, ...]:
    """Cut an axis into single positions, which are then distinguished."""
    dim %= x.ndim
    op.segments(x.axes[dim], [1] * x.shape[dim])
    rest = Value((*x.axes[:dim], *x.axes[dim + 1 :]))
    return (rest,) * x.shape[dim]


@rule("aten.select", "aten.select_copy", kind="moves")
def select(op: Operation, x: Value, dim: int, index: int) -> Value:
    """Take one position of an axis, which is then distinguished from the others."""
    dim %= x.ndim
    size = x.shape[dim]
    index %= size
    op.segments(x.axes[dim], [index, 1, size - index - 1])
    return Value((*x.axes[:dim], *x.axes[dim + 1 :]))


def _bounds(start: int | None, end: int | None, size: int) -> tuple[int, int]:
    first, last, _ = slice(start, end).indices(size)
    return first, max(first, last)


@rule("aten.slice", "aten.narrow", "aten.slice_copy", kind="moves")
def slice_(
    op: Operation,
    x: Value,
    dim: int = 0,
    start: int | None = None,
    end: int | None = None,
    step: int = 1,
    length: int | None = None,
    **_: Any,
) -> Value:
    """Keep a range of an axis: the kept and the dropped positions no longer mix."""
    dim %= x.ndim
    size = x.shape[dim]
    if length is not None and start is not None:
        start %= max(size, 1)
        end = start + length
    first = _bounds(start, end, size)[0]
    if step == 1 or op.shape[dim] < 2:
        kept = op.shape[dim]
        axis = op.segments(x.axes[dim], [first, kept, size - first - kept])[1]
    else:
        phase, skipped = op.phases(x.axes[dim], step)[first % step], first // step
        axis = op.segments(phase, [skipped, op.shape[dim], phase.size - skipped - op.shape[dim]])[1]
    return Value((*x.axes[:dim], axis, *x.axes[dim + 1 :]))


@rule("aten.slice_scatter", kind="moves")
def slice_scatter(
    op: Operation,
    x: Value,
    src: Value,
    dim: int = 0,
    start: int | None = None,
    end: int | None = None,
    step: int = 1,
) -> Value:
    """Overwrite a range of an axis: the new entries take the labels of their source."""
    dim %= x.ndim
    size = x.shape[dim]
    first, last = _bounds(start, end, size)
    axes = [op.join([x.axes[k], src.axes[k]], x.shape[k]) if k != dim else ONE for k in range(x.ndim)]
    if step == 1:
        before, _old, after = op.segments(x.axes[dim], [first, last - first, size - last])
        axes[dim] = _axes.resolve(Sum((before, src.axes[dim], after)))
    else:
        axes[dim] = _overwritten(op, x.axes[dim], src.axes[dim], first, step)
    return Value(tuple(axes))


def _overwritten(op: Operation, old: Expression, new: Expression, first: int, step: int) -> Expression:
    """Return an axis of which every ``step``-th position, from ``first`` on, comes from another axis."""
    phases = op.phases(old, step)
    place, skipped = first % step, first // step
    before, _old, after = op.segments(
        phases[place], [skipped, new.size, phases[place].size - skipped - new.size]
    )
    phases[place] = Sum((before, new, after))
    return _axes.woven(phases)


@rule("aten.select_scatter", kind="moves")
def select_scatter(op: Operation, x: Value, src: Value, dim: int, index: int) -> Value:
    """Overwrite one position of an axis."""
    dim %= x.ndim
    op.segments(x.axes[dim], [index % x.shape[dim], 1, x.shape[dim] - index % x.shape[dim] - 1])
    rest = Value((*x.axes[:dim], *x.axes[dim + 1 :]))
    joined = op.broadcast([rest, src], rest.shape)
    return Value((*joined.axes[:dim], x.axes[dim], *joined.axes[dim:]))


@rule("aten.constant_pad_nd", kind="moves")
def constant_pad(op: Operation, x: Value, pad: Sequence[int], **_: Any) -> Value:
    """Add equal entries at the ends of axes (or cut, where the amount is negative)."""
    axes = list(x.axes)
    for k in range(len(pad) // 2):
        place = len(axes) - 1 - k
        low, high = pad[2 * k], pad[2 * k + 1]
        size = axes[place].size
        low_cut, high_cut = max(-low, 0), max(-high, 0)
        kept = op.segments(axes[place], [low_cut, size - low_cut - high_cut, high_cut])[1]
        ends = [_axes.fresh(n) if n > 0 else op.fixed(0, "empty") for n in (low, high)]
        axes[place] = _axes.resolve(Sum((ends[0], kept, ends[1])))
    op.use_as_numbers([x])
    return Value(tuple(axes))


@rule("aten.pad", kind="moves")
def pad(op: Operation, x: Value, pad: Sequence[int], mode: str = "constant", **_: Any) -> Value:
    """Pad; every mode but the constant one copies entries by their position."""
    if mode == "constant":
        return constant_pad(op, x, pad)
    axes = list(x.axes)
    for k in range(len(pad) // 2):
        place = len(axes) - 1 - k
        if pad[2 * k] or pad[2 * k + 1]:
            op.mix(x, [place])
            op.pin(axes[place], f"{mode} padding")
            axes[place] = op.fixed(op.shape[place], f"{mode} padding")
    return Value(tuple(axes))


@rule("aten.diagonal", kind="moves")
def diagonal(op: Operation, x: Value, offset: int = 0, dim1: int = 0, dim2: int = 1) -> Value:
    """Read the diagonal of two axes, which must then move together."""
    dim1, dim2 = dim1 % x.ndim, dim2 % x.ndim
    one, two = x.axes[dim1], x.axes[dim2]
    rest = [a for k, a in enumerate(x.axes) if k not in (dim1, dim2)]
    if offset == 0 and one.size == two.size:
        op.unify(one, two)
        return Value((*rest, one))
    op.mix(x, [dim1, dim2])
    op.pin(one, "shifted diagonal")
    op.pin(two, "shifted diagonal")
    return Value((*rest, op.fixed(op.shape[-1], "shifted diagonal")))


@rule("aten.tril", "aten.triu", kind="moves")
def triangle(op: Operation, x: Value, **_: Any) -> Value:
    """Keep one triangle of the last two axes."""
    for axis in x.axes[-2:]:
        op.pin(axis, "triangular mask")
    op.use_as_numbers([x])
    return x
