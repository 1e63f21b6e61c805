"""Quantisation as training sees it: entries are rounded one by one, with a scale for all or one for each channel."""

from __future__ import annotations

from typing import Any

from isthmus.symmetry._operation import Operation, rule
from isthmus.symmetry._values import Value

_PER_TENSOR = ("fake_quantize_per_tensor_affine", "_fake_quantize_learnable_per_tensor_affine")
_PER_CHANNEL = ("fake_quantize_per_channel_affine", "_fake_quantize_learnable_per_channel_affine")


def _results(op: Operation, x: Value) -> Any:
    return tuple(x for _ in op.result) if isinstance(op.result, (tuple, list)) else x


@rule(*(f"aten.{name}" for name in _PER_TENSOR), kind="local")
@rule(
    "aten.fake_quantize_per_tensor_affine_cachemask",
    "aten._fake_quantize_per_tensor_affine_cachemask_tensor_qparams",
    kind="local",
)
def per_tensor(op: Operation, x: Value, **_: Any) -> Any:
    """Round all entries with one scale and one zero point."""
    return _results(op, x)


@rule(*(f"aten.{name}" for name in _PER_CHANNEL), kind="local")
@rule("aten.fake_quantize_per_channel_affine_cachemask", kind="local")
def per_channel(op: Operation, x: Value, scale: Value, zero_point: Value, axis: int, **_: Any) -> Any:
    """Round the entries of every channel with a scale and a zero point of its own."""
    for own in (scale, zero_point):
        op.unify(x.axes[axis], own.axes[0])
    return _results(op, x)


@rule("aten._fused_moving_avg_obs_fq_helper_functional", "aten._fused_moving_avg_obs_fq_helper")
def observed(
    op: Operation,
    x: Value,
    running_min: Value,
    running_max: Value,
    scale: Value,
    zero_point: Value,
    ch_axis: int,
    per_row_fake_quant: bool = False,
    **_: Any,
) -> Any:
    """Observe the range of the entries, of all or of each channel, and round with it."""
    channel = ch_axis % max(x.ndim, 1) if per_row_fake_quant else None
    op.mix(x, [k for k in range(x.ndim) if k != channel])
    states = (running_min, running_max, scale, zero_point)
    if channel is not None:
        for own in states:
            if own.ndim and own.shape[0] == x.shape[channel]:
                op.unify(x.axes[channel], own.axes[0])
    return (x, x, *states)[: len(op.result)]
