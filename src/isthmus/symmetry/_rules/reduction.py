"""Reductions and scans along axes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from isthmus.symmetry._axes import ONE, Expression
from isthmus.symmetry._operation import Operation, rule
from isthmus.symmetry._values import Value


def _reduced(op: Operation, x: Value, dim: int | Sequence[int] | None, keepdim: bool) -> Value:
    if dim is None or (not isinstance(dim, int) and len(dim) == 0):
        dims = set(range(x.ndim))
    else:
        dims = {d % max(x.ndim, 1) for d in ([dim] if isinstance(dim, int) else dim)}
    op.mix(x, dims)
    kept = [(ONE if k in dims else a) for k, a in enumerate(x.axes) if keepdim or k not in dims]
    return Value(tuple(kept))


@rule("aten.sum", "aten.mean", "aten.prod", "aten.amax", "aten.amin", "aten.logsumexp", "aten.nansum")
@rule("aten.var", "aten.std", "aten.any", "aten.all", "aten.norm", "aten.linalg_vector_norm", "aten.nanmean")
@rule("aten.count_nonzero")
def reduce(op: Operation, x: Value, dim: Any = None, keepdim: bool = False, **_: Any) -> Value:
    """Reduce by a function that does not see the order."""
    return _reduced(op, x, dim, keepdim)


@rule("aten.var_mean", "aten.std_mean", "aten.aminmax")
def reduce_twice(
    op: Operation, x: Value, dim: Any = None, keepdim: bool = False, **_: Any
) -> tuple[Value, Value]:
    """Reduce by two such functions."""
    value = _reduced(op, x, dim, keepdim)
    return value, value


@rule("aten.max", "aten.min", "aten.median", "aten.nanmedian")
def extremum(
    op: Operation, x: Value, dim: Any = None, keepdim: bool = False, other: Value | None = None, **_: Any
) -> Any:
    """Take the extremum of all, along an axis (with its index, which counts positions), or of two tensors."""
    if other is not None:
        return op.broadcast([x, other])
    if dim is None:
        op.mix(x, range(x.ndim))
        return Value(())
    value = _reduced(op, x, dim, keepdim)
    return value, replace(value, points=op.point(x.axes[dim]))


@rule("aten.argmax", "aten.argmin")
def arg_extremum(op: Operation, x: Value, dim: int | None = None, keepdim: bool = False, **_: Any) -> Value:
    """Return positions, which move with the axis."""
    if dim is not None:
        return replace(_reduced(op, x, dim, keepdim), points=op.point(x.axes[dim]))
    for axis in x.axes:
        op.pin(axis, "its positions are counted by an index")
    return _reduced(op, x, dim, keepdim)


@rule("aten.cumsum", "aten.cumprod", "aten.logcumsumexp", "aten.flip", "aten.roll")
def scan(op: Operation, x: Value, dim: Any = None, dims: Any = None, **_: Any) -> Value:
    """Walk along axes in order."""
    chosen = dim if dims is None else dims
    if chosen is None or (not isinstance(chosen, int) and len(chosen) == 0):
        chosen = range(x.ndim)
    chosen = [chosen] if isinstance(chosen, int) else list(chosen)
    op.mix(x, chosen)
    for d in chosen:
        op.pin(x.axes[d], "the operator depends on the order along this axis")
    return x


@rule("aten.sort", "aten.topk")
def ranked(op: Operation, x: Value, dim: int = -1, sorted: bool = True, **_: Any) -> tuple[Value, Value]:
    """Order entries by their value: what comes out does not depend on the order along the axis."""
    op.mix(x, [dim] if x.ndim else [])
    if x.ndim == 0:
        return x, x
    dim %= x.ndim
    if not sorted:
        op.pin(x.axes[dim], "selected in no particular order")
    axes = list(x.axes)
    axes[dim] = op.fixed(op.shape[dim], "places in a ranking")
    return Value(tuple(axes)), Value(tuple(axes), points=op.point(x.axes[dim]))


@rule("aten.argsort")
def argsort(op: Operation, x: Value, dim: int = -1, **_: Any) -> Value:
    """Return the positions of entries ordered by their value."""
    return ranked(op, x, dim)[1]


@rule("aten.cummax", "aten.cummin", "aten.kthvalue", "aten.mode")
def ordered(op: Operation, x: Value, dim: int = -1, **_: Any) -> tuple[Value, Value]:
    """Select or scan along an axis."""
    axes: list[Expression] = list(x.axes)
    op.mix(x, [dim] if axes else [])
    if axes:
        op.pin(axes[dim], "the operator depends on the order along this axis")
    if len(op.shape) < len(axes):
        del axes[dim]
    elif axes and op.shape[dim] != axes[dim].size:
        axes[dim] = ONE
    value = Value(tuple(axes))
    return value, value
