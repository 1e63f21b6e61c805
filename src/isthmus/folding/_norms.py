"""Norms in a graph: native operators, and means or roots of squares as model code writes them out."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from torch import fx

from isthmus.folding._graph import LiveWay, described, kind_of, shape_of
from isthmus.folding._moves import StatePart, is_move, part_of
from isthmus.symmetry import bound_arguments, module_of, operator_of

__all__ = ["Norm", "ignores_mean", "norms_of", "reads_without_mean"]

_LAST = {
    "layer_norm": "LayerNorm",
    "native_layer_norm": "LayerNorm",
    "rms_norm": "RMSNorm",
    "_fused_rms_norm": "RMSNorm",
}
_SECOND = {"group_norm": "GroupNorm", "native_group_norm": "GroupNorm", "instance_norm": "InstanceNorm"}
_GAINS = ("weight", "gamma", "gain", "scale", "g")
_REDUCTIONS = frozenset({"mean", "sum", "var", "std", "linalg_vector_norm", "norm", "var_mean"})
_NEAR = 16
"""Operators between a sum over the channels and the division by it."""


@dataclass(frozen=True)
class Norm:
    """A place where a norm is computed.

    Attributes:
        way: the graph.
        name: path of the module that computes it, else of the graph's node.
        kind: what it is called.
        source: what flows in.
        node: its result.
        axis: of the result, which lists the channels.
        gain: the tensor that multiplies, ``None`` for none.
        bias: the tensor that is added, ``None`` for none.
        gain_user: the operator that is given the gain.
        bias_user: the operator that is given the bias.
        offset: what is added to the gain's tensor: 1 where code multiplies by ``1 + weight``.
        problem: why neither can be moved; empty if nothing is in the way.
    """

    way: LiveWay
    name: str
    kind: str
    source: fx.Node
    node: fx.Node
    axis: int
    gain: StatePart | None
    bias: StatePart | None
    gain_user: fx.Node | None = None
    bias_user: fx.Node | None = None
    offset: float = 0.0
    problem: str = ""


def norms_of(way: LiveWay) -> Iterator[Norm]:
    """Yield the norms of a graph in the order in which they are computed."""
    for node in way.nodes:
        kind = kind_of(node)
        if kind in _LAST or kind in _SECOND:
            yield _native(way, node, kind)
        elif kind == "mul":
            found = _written(way, node)
            if found is not None:
                yield found


def _native(way: LiveWay, node: fx.Node, kind: str) -> Norm:
    bound = bound_arguments(node)
    source = bound.get("input", bound.get("self"))
    assert isinstance(source, fx.Node), "a norm of a tensor"
    result, problem = node, ""
    if isinstance(node.meta.get("val"), (list, tuple)):
        parts = {int(n.args[1]): n for n in way.users(node)}  # pyright: ignore
        problem = "its statistics are used too" if set(parts) - {0} else ""
        result = parts.get(0, node)
    last = kind in _LAST
    if last and len(bound["normalized_shape"]) != 1:
        problem = "it normalises over several axes"
    if kind == "instance_norm" and not bound.get("use_input_stats"):
        problem = "it uses running statistics"
    found: list[StatePart | None] = []
    for word in ("weight", "bias"):
        given = bound.get(word)
        part = part_of(way, given) if isinstance(given, fx.Node) else None
        if isinstance(given, fx.Node) and part is None:
            problem = f"its {'gain' if word == 'weight' else 'bias'} is computed by {described(given)}"
        found.append(part)
    axis = len(shape_of(source)) - 1 if last else 1
    title = (_LAST if last else _SECOND)[kind]
    return Norm(
        way,
        _name(node, found[0]),
        title,
        source,
        result,
        axis,
        found[0],
        found[1],
        node,
        node,
        problem=problem,
    )


def _name(node: fx.Node, gain: StatePart | None) -> str:
    """Return the path of a norm's module, or the name of its gain where that is not all that the module has."""
    if gain is None:
        return module_of(node) or node.name
    path, _, leaf = gain.name.rpartition(".")
    return path if path and leaf in _GAINS and path == module_of(node) else gain.name


def _written(way: LiveWay, node: fx.Node) -> Norm | None:
    """Return a norm that is written out: normalised data times a vector of the state, and a vector added to it."""
    bound = bound_arguments(node)
    pair = (bound["self"], bound["other"])
    for data, factor in (pair, pair[::-1]):
        if not isinstance(data, fx.Node) or not isinstance(factor, fx.Node):
            continue
        gain, offset = _gain(way, factor)
        axis = None if gain is None else _vector_axis(factor, node)
        if axis is None or shape_of(data) != shape_of(node):
            continue
        back = len(shape_of(node)) - axis
        source, result = _normalised(data, back), node
        if source is None:
            source, result = _normalised_later(way, data, node, back)
        if source is not None:
            kind = "LayerNorm" if kind_of(source) == "sub" else "RMSNorm"
            user = node if not offset else _bare(factor)
            return _with_bias(
                Norm(way, _name(node, gain), kind, source, result, axis, gain, None, user, None, offset)
            )
    return None


def _gain(way: LiveWay, factor: fx.Node) -> tuple[StatePart | None, float]:
    """Return the tensor of the state that multiplies, and the one that code adds to it."""
    inner = _bare(factor)
    if kind_of(inner) == "add":
        bound = bound_arguments(inner)
        pair = (bound["self"], bound["other"])
        number = next((n for n in pair if isinstance(n, (int, float))), None)
        tensor = next((n for n in pair if isinstance(n, fx.Node)), None)
        if number == 1 and bound.get("alpha", 1) == 1 and tensor is not None and inner is factor:
            return part_of(way, tensor), 1.0
        return None, 0.0
    return part_of(way, factor), 0.0


def _with_bias(norm: Norm) -> Norm:
    """Return a norm with the vector of the state that alone is added to it, if there is one."""
    node = norm.node
    users = norm.way.users(node)
    while len(users) == 1 and is_move(users[0]) and shape_of(users[0]) == shape_of(node):
        if node in norm.way.kept or kind_of(users[0]) not in ("to", "_to_copy", "type_as"):
            return norm
        node, users = users[0], norm.way.users(users[0])
    if len(users) != 1 or kind_of(users[0]) != "add" or node in norm.way.kept or norm.node in norm.way.kept:
        return norm
    bound = bound_arguments(users[0])
    pair = [n for n in (bound["self"], bound["other"]) if n is not node]
    if len(pair) != 1 or not isinstance(pair[0], fx.Node) or bound.get("alpha", 1) != 1:
        return norm
    bias = part_of(norm.way, pair[0])
    fits = shape_of(users[0]) == shape_of(node) and _vector_axis(pair[0], users[0]) == norm.axis
    return replace(norm, node=users[0], bias=bias, bias_user=users[0]) if bias is not None and fits else norm


def _vector_axis(factor: fx.Node, result: fx.Node) -> int | None:
    """Return the axis of a result along which alone an operand varies, having its full length there."""
    own, shape = shape_of(factor), shape_of(result)
    long = [k for k, n in enumerate(own) if n != 1]
    if len(long) != 1 or len(own) > len(shape):
        return None
    axis = long[0] + len(shape) - len(own)
    return axis if shape[axis] == own[long[0]] else None


def _normalised(data: fx.Node, back: int) -> fx.Node | None:
    """Return what is normalised, where data are divided by a sum over their channels (``back`` axes from the end)."""
    node = _bare(data)
    while kind_of(node) in ("mul", "div"):
        bound = bound_arguments(node)
        pair = (bound["self"], bound["other"])
        if not isinstance(pair[1], fx.Node):
            node = _bare(pair[0])  # by a number
            continue
        for inner, size in (pair, pair[::-1]) if kind_of(node) == "mul" else (pair,):
            if isinstance(inner, fx.Node) and isinstance(size, fx.Node) and _is_size(_bare(size), back):
                return _bare(inner)
        return None
    return None


def _normalised_later(
    way: LiveWay, data: fx.Node, product: fx.Node, back: int
) -> tuple[fx.Node | None, fx.Node]:
    """Return what is normalised, and the result, where data are multiplied by the gain first and divided after that."""
    users = way.users(product)
    if len(users) == 1 and product not in way.kept and kind_of(users[0]) in ("mul", "div"):
        bound = bound_arguments(users[0])
        left = kind_of(users[0]) == "mul" or bound["self"] is product
        size = bound["other"] if bound["self"] is product else bound["self"]
        if left and isinstance(size, fx.Node) and size is not product and _is_size(_bare(size), back):
            return _bare(data), users[0]
    return None, product


def _is_size(node: fx.Node, back: int) -> bool:
    """Whether a value is computed from a sum over the channels, and has one entry along them."""
    shape = shape_of(node)
    if len(shape) < back or shape[len(shape) - back] != 1:
        return False
    waiting, seen = [node], {node}
    while waiting and len(seen) < _NEAR:
        current = waiting.pop()
        if operator_of(current).removeprefix("aten.") in _REDUCTIONS:
            return True
        fresh = [n for n in current.all_input_nodes if n.op == "call_function" and n not in seen]
        seen.update(fresh)
        waiting.extend(fresh)
    return False


def _bare(node: fx.Node) -> fx.Node:
    """Return what a value is, before casts and spreading."""
    while (
        node.op == "call_function"
        and is_move(node)
        and kind_of(node) not in ("getitem", "index", "index_select")
    ):
        node = node.all_input_nodes[0]
    return node


def ignores_mean(norm: Norm) -> bool:
    """Whether a norm is a native one that is the same for an input to all of whose channels one number is added."""
    return kind_of(_maker(norm)) in ("layer_norm", "native_layer_norm") and "several axes" not in norm.problem


def _maker(norm: Norm) -> fx.Node:
    return norm.node.all_input_nodes[0] if kind_of(norm.node) == "getitem" else norm.node


def reads_without_mean(way: LiveWay, node: fx.Node, axis: int, user: fx.Node) -> bool:
    """Whether an operator is the beginning of a written-out LayerNorm: it subtracts the mean, or asks the variance.

    Args:
        way: the graph.
        node: the value.
        axis: its channels.
        user: who reads it.
    """
    rank = len(shape_of(node))
    if user in way.kept:
        return False
    if kind_of(user) == "mean":
        return _over(user, axis, rank) and all(_difference(u, node, user) for u in way.users(user))
    if kind_of(user) in ("var", "std"):
        return _over(user, axis, rank)
    means = (n for n in user.all_input_nodes if kind_of(n) == "mean" and n.all_input_nodes == [node])
    return any(_over(m, axis, rank) and _difference(user, node, m) for m in means)


def _over(node: fx.Node, axis: int, rank: int) -> bool:
    """Whether a reduction runs over one axis and keeps its place."""
    bound: dict[str, Any] = bound_arguments(node)
    dims = bound.get("dim")
    dims = list(dims) if isinstance(dims, (list, tuple)) else [dims]
    return (
        len(dims) == 1 and dims[0] is not None and int(dims[0]) % rank == axis and bool(bound.get("keepdim"))
    )


def _difference(node: fx.Node, value: fx.Node, mean: fx.Node) -> bool:
    if kind_of(node) != "sub":
        return False
    bound = bound_arguments(node)
    return bound["self"] is value and bound["other"] is mean and bound.get("alpha", 1) == 1
