"""Normalisation layers: statistics do not depend on the order of what is averaged; gains move with their units."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from isthmus.symmetry._axes import ONE
from isthmus.symmetry._operation import Operation, rule
from isthmus.symmetry._values import Value


def _attach(op: Operation, x: Value, axis: int, *vectors: Value | None) -> None:
    for vector in vectors:
        if vector is not None:
            op.unify(x.axes[axis], vector.axes[0])


@rule("aten.batch_norm", "aten.instance_norm")
@rule(
    "aten._native_batch_norm_legit_no_training",
    "aten.native_batch_norm",
    "aten._batch_norm_no_update",
    "aten._native_batch_norm_legit",
)
def batch_norm(
    op: Operation,
    x: Value,
    weight: Value | None = None,
    bias: Value | None = None,
    running_mean: Value | None = None,
    running_var: Value | None = None,
    training: bool = False,
    **_: Any,
) -> Any:
    """Normalise each channel (axis 1) by itself; gain, shift and running statistics move with it."""
    places = [k for k in range(x.ndim) if k != 1]
    op.mix(x, places[1:] if op.name.endswith("instance_norm") else places if training else [])
    _attach(op, x, 1, weight, bias, running_mean, running_var)
    if not isinstance(op.result, (tuple, list)):
        return x
    channels = [x.axes[1]] if op.result[1].numel() else [op.fixed(0, "empty")]
    return (x, *(Value(tuple(channels)) for _ in op.result[1:]))


@rule("aten.layer_norm", "aten.native_layer_norm", "aten.rms_norm", "aten._fused_rms_norm")
def layer_norm(
    op: Operation,
    x: Value,
    normalized_shape: Sequence[int],
    weight: Value | None = None,
    bias: Value | None = None,
    **_: Any,
) -> Any:
    """Normalise over the last axes; gain and shift move with them."""
    op.mix(x, range(-len(normalized_shape), 0))
    last = Value(x.axes[-len(normalized_shape) :])
    joined = op.broadcast([last, *(v for v in (weight, bias) if v is not None)], last.shape)
    result = Value((*x.axes[: x.ndim - len(normalized_shape)], *joined.axes))
    if not isinstance(op.result, (tuple, list)):
        return result
    kept = (*x.axes[: x.ndim - len(normalized_shape)], *(ONE for _ in normalized_shape))
    return (result, *(Value(kept) for _ in op.result[1:]))


@rule("aten.group_norm", "aten.native_group_norm")
def group_norm(
    op: Operation,
    x: Value,
    weight: Value | None = None,
    bias: Value | None = None,
    num_groups: int = 1,
    group: int | None = None,
    **_: Any,
) -> Any:
    """Normalise blocks of channels: blocks move, and the order inside the blocks, the same in all."""
    groups = num_groups if group is None else group
    block, member = op.split_trailing(x.axes[1], x.shape[1] // groups)
    factored = Value((x.axes[0], block, member, *x.axes[2:]))
    op.mix(factored, range(2, factored.ndim))
    _attach(op, x, 1, weight, bias)
    if not isinstance(op.result, (tuple, list)):
        return x
    return (x, *(Value((x.axes[0], block)) for _ in op.result[1:]))
