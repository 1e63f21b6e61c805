"""Writes that reduce, quantiles and diagonals: what they do to labels follows from simpler operators."""

from __future__ import annotations

from typing import Any

from isthmus.symmetry._axes import ONE, Expression
from isthmus.symmetry._operation import Operation, rule
from isthmus.symmetry._rules.contraction import mm
from isthmus.symmetry._rules.indexing import index_write, scatter
from isthmus.symmetry._values import Value


@rule("aten.scatter_reduce", kind="local")
def scatter_reduce(op: Operation, x: Value, dim: int, index: Value, src: Value, **_: Any) -> Value:
    """Reduce entries into positions of one axis; no reduction (sum, product, mean, extremum) sees their order."""
    return scatter(op, x, dim, index, src=src)


@rule("aten.index_reduce", kind="local")
def index_reduce(op: Operation, x: Value, dim: int, index: Value, source: Value, **_: Any) -> Value:
    """Reduce slices of a source into positions of one axis, by a reduction that does not see their order."""
    return index_write(op, x, dim, index, source)


@rule("aten.quantile", "aten.nanquantile")
def quantile(
    op: Operation, x: Value, q: Any, dim: int | None = None, keepdim: bool = False, **_: Any
) -> Value:
    """Take one or several quantiles of all entries, or along an axis: the same in any order."""
    dims = range(x.ndim) if dim is None else [dim % max(x.ndim, 1)]
    op.mix(x, dims)
    kept = [ONE if k in dims else a for k, a in enumerate(x.axes) if keepdim or k not in dims]
    several = [op.fixed(q.shape[0], "quantiles")] if isinstance(q, Value) and q.ndim else []
    if several:
        op.pin(q.axes[0], "quantiles")
    return Value((*several, *kept))


@rule("aten._sparse_mm", "aten._sparse_sparse_matmul")
def sparse_mm(op: Operation, **operands: Any) -> Value:
    """Multiply matrices of which one is sparse."""
    first, second = (v for v in operands.values() if isinstance(v, Value))
    return mm(op, first, second)


@rule("aten.diag_embed", kind="moves")
def diag_embed(op: Operation, x: Value, offset: int = 0, dim1: int = -2, dim2: int = -1) -> Value:
    """Write the last axis on a diagonal: both axes of the matrix then count its units."""
    rank = x.ndim + 1
    dim1, dim2 = dim1 % rank, dim2 % rank
    unit = x.axes[-1]
    if offset:
        op.pin(unit, "shifted diagonal")
        op.mix(x, [-1])
    rest = iter(x.axes[:-1])
    axes: list[Expression] = []
    for k in range(rank):
        on = k in (dim1, dim2)
        axes.append((op.fixed(op.shape[k], "shifted diagonal") if offset else unit) if on else next(rest))
    return Value(tuple(axes))
