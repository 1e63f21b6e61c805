"""Elementwise operators: labels of broadcast operands are joined.

Most elementwise operators need no entry here: ATen tags them, and the interpreter reads the tag.
"""

from __future__ import annotations

from typing import Any

from isthmus.symmetry._operation import Operation, rule
from isthmus.symmetry._values import Value


@rule(
    "aten.where", "aten.masked_fill", "aten.lerp", "aten.addcmul", "aten.addcdiv", "aten.clamp", kind="local"
)
@rule(
    "aten.complex",
    "aten.polar",
    "aten.real",
    "aten.imag",
    "aten.conj_physical",
    "aten.resolve_conj",
    kind="local",
)
def elementwise(op: Operation, **arguments: Any) -> Value:
    """Join all tensor operands."""
    return op.broadcast([v for v in arguments.values() if isinstance(v, Value)])


@rule(
    "aten.clone",
    "aten.contiguous",
    "aten.detach",
    "aten.alias",
    "aten.dropout",
    "aten.feature_dropout",
    "aten.alpha_dropout",
    "aten.native_dropout",
    "aten._to_copy",
    "aten.to",
    "aten.type_as",
    "aten.lift_fresh_copy",
    "aten.lift_fresh",
    "aten.lift",
    "aten.rrelu",
    "aten.positive",
    "aten.conj",
    "aten.resolve_neg",
    kind="moves",
)
def unchanged(op: Operation, x: Value, **_: Any) -> Value:
    """Copy, cast, or drop nothing: labels stay (training mode was refused before)."""
    return x


@rule("aten.copy", kind="local")
def copy(op: Operation, x: Value, src: Value, **_: Any) -> Value:
    """Overwrite a tensor: the result carries the labels of the source."""
    return op.broadcast([src, x])


@rule("aten.prelu", "aten._prelu_kernel", kind="local")
def prelu(op: Operation, x: Value, weight: Value) -> Value:
    """Join the slopes with the channel axis (axis 1)."""
    if weight.ndim != 1:
        return op.broadcast([x, weight])
    if weight.shape[0] > 1:
        op.unify(weight.axes[0], x.axes[1 if x.ndim >= 2 else 0])
    return x


@rule("aten.glu", kind="local")
def glu(op: Operation, x: Value, dim: int = -1) -> Value:
    """Gate one half of an axis by the other half: both halves move together."""
    dim %= x.ndim
    half = x.shape[dim] // 2
    value, gate = op.segments(x.axes[dim], [half, half])
    op.unify(value, gate)
    return Value((*x.axes[:dim], value, *x.axes[dim + 1 :]))


@rule("aten.softmax", "aten.log_softmax", "aten._softmax", "aten._log_softmax", "aten._safe_softmax")
def softmax(op: Operation, x: Value, dim: int, **_: Any) -> Value:
    """Normalise along an axis: the same for every order of its positions."""
    op.mix(x, [dim])
    return x
