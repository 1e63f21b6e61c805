"""Writing a network with batch normalisation so that every layer is affine in its tensors."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, fx

from isthmus.errors import ModelError
from isthmus.symmetry import Trace, bound_arguments, module_of, operator_of

__all__ = ["fold_normalisation"]

_BATCH_NORMS = ("aten.batch_norm", "aten._native_batch_norm_legit_no_training")


def fold_normalisation(trace: Trace, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a state of the same function whose batch normalisations are ``scale · x + shift``, exactly.

    Where a layer feeds one normalisation alone, the scale is multiplied into the layer's weight and the
    normalisation keeps only the shift; elsewhere the normalisation keeps both. Running means become zero and
    running variances ``1 - eps``, so that interpolating two such states interpolates scales and shifts.

    Args:
        trace: the network.
        state: its tensors, float64.

    Raises:
        ModelError: a normalisation without gain and shift, which cannot hold them, or with shared tensors.
    """
    folded = dict(state)
    norms = [n for n in trace.graph.nodes if n.op == "call_function" and operator_of(n) in _BATCH_NORMS]
    for node in norms:
        _fold(node, trace, state, folded)
    return folded


def _fold(node: fx.Node, trace: Trace, state: Mapping[str, Tensor], folded: dict[str, Tensor]) -> None:
    given = bound_arguments(node)
    names: dict[str, str] = {}
    for key in ("weight", "bias", "running_mean", "running_var"):
        argument = given.get(key)
        if (
            not isinstance(argument, fx.Node)
            or argument.name not in trace.tensors
            or len(argument.users) != 1
        ):
            raise ModelError(
                f"certify: the batch normalisation in {module_of(node)!r} has no {key} of its own. Only "
                "affine normalisation with running statistics, used once, can be folded."
            )
        names[key] = trace.tensors[argument.name]
    eps = float(given["eps"])
    scale = state[names["weight"]] * (state[names["running_var"]] + eps).rsqrt()
    shift = state[names["bias"]] - state[names["running_mean"]] * scale
    before = _sole_layer(given["input"], trace)
    if before is not None:
        weight, bias, axis = before
        shape = [-1 if k == axis else 1 for k in range(state[weight].ndim)]
        folded[weight] = state[weight] * scale.reshape(shape)
        if bias is not None:
            shift = shift + scale * state[bias]
            folded[bias] = torch.zeros_like(state[bias])
        scale = torch.ones_like(scale)
    folded[names["weight"]], folded[names["bias"]] = scale, shift
    folded[names["running_mean"]] = torch.zeros_like(scale)
    folded[names["running_var"]] = torch.full_like(scale, 1 - eps)


def _sole_layer(source: fx.Node, trace: Trace) -> tuple[str, str | None, int] | None:
    """Return weight, bias and output axis of a layer that feeds one normalisation alone."""
    name = operator_of(source) if source.op == "call_function" else ""
    if name not in ("aten.linear", "aten.conv1d", "aten.conv2d", "aten.conv3d") or len(source.users) != 1:
        return None
    if name == "aten.linear" and source.meta["val"].ndim != 2:
        return None  # the normalisation acts on axis 1, the layer's units lie on the last
    given = bound_arguments(source)
    weight, bias = given["weight"], given.get("bias")
    tensors = [t for t in (weight, bias) if t is not None]
    if any(t.name not in trace.tensors or len(t.users) != 1 for t in tensors):
        return None
    return trace.tensors[weight.name], None if bias is None else trace.tensors[bias.name], 0
