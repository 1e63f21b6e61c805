"""Matrix products of every form: contracted axes are joined, batch axes broadcast, the others pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from isthmus.symmetry._axes import ONE, Expression
from isthmus.symmetry._operation import Operation, rule
from isthmus.symmetry._values import Value

_RUNS = "runs of rows, one for each expert"


def _names(count: int) -> list[str]:
    """Return letters for ``count`` batch axes, aligned at their end."""
    return [f"b{count - k}" for k in range(count)]


@rule("aten.linear")
def linear(op: Operation, x: Value, weight: Value, bias: Value | None = None) -> Value:
    """Contract the last axis of ``x`` with axis 1 of the weight."""
    op.unify(x.axes[-1], weight.axes[-1])
    op.contract([(x, [*_names(x.ndim - 1), "in"]), (weight, ["out", "in"][-weight.ndim :])], ["in"])
    if weight.ndim == 1:
        return Value(x.axes[:-1])
    if bias is not None:
        op.unify(weight.axes[0], bias.axes[-1])
    return Value((*x.axes[:-1], weight.axes[0]))


def _matmul(op: Operation, x: Value, y: Value) -> Value:
    rows = [*_names(x.ndim - 2), "row", "in"][-x.ndim :] if x.ndim > 1 else ["in"]
    columns = [*_names(y.ndim - 2), "in", "column"] if y.ndim > 1 else ["in"]
    op.contract([(x, rows), (y, columns)], ["in"])
    if x.ndim == 1 and y.ndim == 1:
        op.unify(x.axes[0], y.axes[0])
        return Value(())
    if y.ndim == 1:
        op.unify(x.axes[-1], y.axes[0])
        return Value(x.axes[:-1])
    if x.ndim == 1:
        op.unify(x.axes[0], y.axes[-2])
        return Value((*y.axes[:-2], y.axes[-1]))
    op.unify(x.axes[-1], y.axes[-2])
    batch = op.broadcast([Value(x.axes[:-2]), Value(y.axes[:-2])], op.shape[:-2])
    return Value((*batch.axes, x.axes[-2], y.axes[-1]))


@rule("aten.matmul")
def matmul(op: Operation, x: Value, other: Value) -> Value:
    """Multiply with NumPy's rules for vectors and batches."""
    return _matmul(op, x, other)


@rule("aten.mm", "aten.bmm")
def mm(op: Operation, x: Value, mat2: Value, **_: Any) -> Value:
    """Multiply (batches of) matrices."""
    return _matmul(op, x, mat2)


@rule("aten.mv")
def mv(op: Operation, x: Value, vec: Value) -> Value:
    """Multiply a matrix with a vector."""
    return _matmul(op, x, vec)


@rule("aten.dot", "aten.vdot")
def dot(op: Operation, x: Value, tensor: Value | None = None, other: Value | None = None) -> Value:
    """Multiply two vectors."""
    second = tensor if tensor is not None else other
    assert second is not None
    return _matmul(op, x, second)


@rule("aten.addmm")
def addmm(op: Operation, x: Value, mat1: Value, mat2: Value, **_: Any) -> Value:
    """Multiply and add a bias."""
    return op.broadcast([_matmul(op, mat1, mat2), x])


@rule("aten.baddbmm")
def baddbmm(op: Operation, x: Value, batch1: Value, batch2: Value, **_: Any) -> Value:
    """Multiply batches and add."""
    return op.broadcast([_matmul(op, batch1, batch2), x])


@rule("aten.outer")
def outer(op: Operation, x: Value, vec2: Value) -> Value:
    """Multiply all pairs of entries."""
    op.contract([(x, ["row"]), (vec2, ["column"])], [])
    return Value((x.axes[0], vec2.axes[0]))


@rule("aten.einsum")
def einsum(op: Operation, equation: str, tensors: Sequence[Value], **_: Any) -> Value:
    """Join all axes that carry one letter."""
    left, _arrow, right = equation.replace(" ", "").partition("->")
    subscripts = left.split(",")
    if "->" not in equation:
        letters = sorted(c for c in set(left) - {",", "."} if left.count(c) == 1)
        right = ("..." if "..." in left else "") + "".join(letters)
    rank = max(
        (v.ndim - len(s.replace("...", "")) for v, s in zip(tensors, subscripts, strict=True)), default=0
    )
    dots = [f"<{k}>" for k in range(rank)]
    by_letter: dict[str, list[Expression]] = {}
    operands: list[tuple[Value, list[str]]] = []
    for value, subscript in zip(tensors, subscripts, strict=True):
        own = value.ndim - len(subscript.replace("...", ""))
        operands.append((value, _letters(subscript, dots[rank - own :])))
        for letter, axis in zip(operands[-1][1], value.axes, strict=True):
            by_letter.setdefault(letter, []).append(axis)
    op.contract(operands, set(by_letter) - set(_letters(right, dots)))
    joined = {c: op.join(axes, max(a.size for a in axes)) for c, axes in by_letter.items()}
    return Value(tuple(joined[c] for c in _letters(right, dots)))


def _letters(subscript: str, dots: list[str]) -> list[str]:
    before, found, after = subscript.partition("...")
    return [*before, *dots, *after] if found else list(before)


@rule("aten.scaled_dot_product_attention")
def attention(
    op: Operation,
    query: Value,
    key: Value,
    value: Value,
    attn_mask: Value | None = None,
    is_causal: bool = False,
    enable_gqa: bool = False,
    **_: Any,
) -> Value:
    """Attend: query and key dimensions are joined, and so are the tokens of keys and values.

    With grouped queries the query heads are key heads times the queries of one group.
    """
    op.unify(query.axes[-1], key.axes[-1])
    op.unify(key.axes[-2], value.axes[-2])
    if is_causal:
        op.pin(query.axes[-2], "causal mask")
        op.pin(key.axes[-2], "causal mask")
    lead = _names(query.ndim - 2)
    heads, grouped = lead, query
    if enable_gqa and query.shape[-3] != key.shape[-3]:
        groups, each = op.split_trailing(query.axes[-3], query.shape[-3] // key.shape[-3])
        op.unify(groups, key.axes[-3])
        op.unify(groups, value.axes[-3])
        shared = [Value(v.axes[:-3]) for v in (query, key, value)]
        batch = (*op.broadcast(shared, op.shape[:-3]).axes, query.axes[-3])
        grouped = Value((*query.axes[:-3], groups, each, *query.axes[-2:]))
        heads = [*lead, "each"]
    else:
        batch = op.broadcast([Value(v.axes[:-2]) for v in (query, key, value)], op.shape[:-2]).axes
    scores = Value((*batch, query.axes[-2], key.axes[-2]))
    factored = Value((*batch[: len(lead) - 1], *grouped.axes[len(lead) - 1 : -1], key.axes[-2]))
    if attn_mask is not None:
        scores = op.broadcast([scores, attn_mask], scores.shape)
    op.contract([(grouped, [*heads, "query", "in"]), (key, [*_names(key.ndim - 2), "key", "in"])], ["in"])
    op.contract(
        [(factored, [*heads, "query", "key"]), (value, [*_names(value.ndim - 2), "key", "out"])], ["key"]
    )
    return Value((*scores.axes[:-1], value.axes[-1]))


@rule("aten._grouped_mm", "transformers.grouped_mm_fallback")
def grouped_mm(op: Operation, x: Value, offs: Value | None = None, **arguments: Any) -> Value:
    """Multiply each run of rows (S, in) with its own matrix of (experts, in, out); offsets say where runs end.

    The order of the experts is fixed by the offsets. Every row belongs to one expert, so what lies inside an expert
    still moves by itself: under the same offsets, a row says which expert it is at.
    """
    weight = arguments["weight"] if "weight" in arguments else arguments["mat2"]
    if x.ndim != 2 or weight.ndim != 3 or offs is None or arguments.get("bias") is not None:
        return op.unknown([x, *(v for v in (weight, offs, arguments.get("bias")) if isinstance(v, Value))])
    op.pin_all([offs], _RUNS)
    op.unify(weight.axes[0], offs.axes[0])
    op.pin(x.axes[0], _RUNS)
    op.unify(x.axes[1], weight.axes[1])
    offsets = next(n for n in op.node.all_input_nodes if n.meta["val"].ndim == 1)
    op.belong(weight.axes[0], id(offsets), x.axes[0])
    op.contract([(x, ["row", "in"]), (weight, ["row", "in", "out"])], ["in"])
    return Value((x.axes[0], weight.axes[2]))


@rule("aten.bilinear")
def bilinear(op: Operation, input1: Value, input2: Value, weight: Value, bias: Value | None = None) -> Value:
    """Contract two inputs with axes 1 and 2 of the weight."""
    lead = _names(input1.ndim - 1)
    op.contract([(input1, [*lead, "x"]), (input2, [*lead, "y"]), (weight, ["out", "x", "y"])], ["x", "y"])
    op.unify(input1.axes[-1], weight.axes[1])
    op.unify(input2.axes[-1], weight.axes[2])
    if bias is not None:
        op.unify(weight.axes[0], bias.axes[0])
    batch = op.broadcast([Value(input1.axes[:-1]), Value(input2.axes[:-1])], op.shape[:-1])
    return Value((*batch.axes, weight.axes[0]))


@rule("aten.cdist", "aten._cdist_forward")
def cdist(op: Operation, x1: Value, x2: Value, **_: Any) -> Value:
    """Measure distances between rows: the feature axes are joined."""
    op.unify(x1.axes[-1], x2.axes[-1])
    op.contract(
        [(x1, [*_names(x1.ndim - 2), "row", "in"]), (x2, [*_names(x2.ndim - 2), "column", "in"])], ["in"]
    )
    batch = op.broadcast([Value(x1.axes[:-2]), Value(x2.axes[:-2])], op.shape[:-2])
    return Value((*batch.axes, x1.axes[-2], x2.axes[-2]))


@rule("aten.cosine_similarity", "aten.pairwise_distance")
def similarity(op: Operation, x1: Value, x2: Value, dim: int = 1, **_: Any) -> Value:
    """Compare along one axis, which vanishes unless kept."""
    shape = torch.broadcast_shapes(x1.shape, x2.shape)
    joined = op.broadcast([x1, x2], shape)
    dim = (-1 if op.name.endswith("distance") else dim) % joined.ndim
    letters = [str(k) for k in range(joined.ndim)]
    op.contract([(v, letters[joined.ndim - v.ndim :]) for v in (x1, x2)], [str(dim)])
    kept = (ONE,) if len(op.shape) == joined.ndim else ()
    return Value((*joined.axes[:dim], *kept, *joined.axes[dim + 1 :]))
