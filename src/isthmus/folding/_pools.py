"""Sums and means over positions, which treat all channels alike."""

from __future__ import annotations

from torch import fx

from isthmus.folding._graph import kind_of, operands, shape_of
from isthmus.symmetry import bound_arguments

__all__ = ["POOLS", "after_pooling", "before_pooling", "constant_pooling"]

_SPACE = {f"{kind}_pool{n}d": n for kind in ("avg", "adaptive_avg") for n in (1, 2, 3)}
POOLS = frozenset({"mean", "sum", *_SPACE})


def after_pooling(node: fx.Node, value: fx.Node, axis: int) -> int | None:
    """Return where a sum or mean over other axes leaves an axis of its operand; ``None`` where it sums over it."""
    rank = len(shape_of(value))
    if operands(node) != [value]:
        return None
    if kind_of(node) in _SPACE:
        return axis if axis < rank - _SPACE[kind_of(node)] else None
    bound = bound_arguments(node)
    dims = bound.get("dim")
    if not dims and dims != 0:
        return None  # over everything
    over = {int(d) % rank for d in (dims if isinstance(dims, (list, tuple)) else [dims])}
    if axis in over:
        return None
    return axis if bound.get("keepdim") else axis - sum(d < axis for d in over)


def before_pooling(node: fx.Node, axis: int) -> tuple[fx.Node, int] | None:
    """Return the operand of a sum or mean, and which axis of it an axis of the result was."""
    value = node.all_input_nodes[0]
    found = (a for a in range(len(shape_of(value))) if after_pooling(node, value, a) == axis)
    source = next(found, None)
    return None if source is None else (value, source)


def constant_pooling(node: fx.Node) -> bool:
    """Whether a constant stays the same constant: in a mean, and not where zeros are counted or entries summed."""
    kind = kind_of(node)
    if kind == "mean" or kind.startswith("adaptive"):
        return True
    if kind not in _SPACE:
        return False
    bound = bound_arguments(node)
    return not any(bound["padding"]) and bound.get("divisor_override") is None
