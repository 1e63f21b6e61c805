r"""Layers with weights in a traced network: where their weights are, and how large they are."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx

from isthmus.errors import ModelError
from isthmus.symmetry import Trace
from isthmus.symmetry._trace import bound_arguments, module_of, operator_of
from isthmus.theory._norms import ROUNDOFF, convolution_norm, matrix_norm, row_norms

__all__ = [
    "BATCH_NORMS",
    "Magnitude",
    "argument",
    "batch_norm_scale",
    "is_layer",
    "layer_magnitudes",
    "layer_norms",
    "layer_weight",
    "out_of_scope",
    "spread",
]

BATCH_NORMS = {"aten.batch_norm", "aten._native_batch_norm_legit_no_training"}

_CONVOLUTIONS = {f"aten.conv{turned}{n}d" for turned in ("", "_transpose") for n in (1, 2, 3)}

_EXTRA_TERMS = 16
"""Roundings of an entry before it is multiplied: interpolation, and the folding of batch normalisation."""


@dataclass(frozen=True)
class Magnitude:
    r"""How large the rounding of a layer can be, anywhere on the path.

    The computed output of a layer is off by at most ``weight`` times the norm of its input plus ``bias``: the standard
    model of floating point, :math:`\gamma_k (|W|\,|x| + |b|)` with ``k`` products summed [L, Higham 2002, section 3.1],
    with Frobenius norms in place of the norm of :math:`|W|`.
    """

    weight: float
    bias: float


def argument(node: fx.Node, name: str) -> Any:
    """Return an argument of an operator by the name of its schema; None if it has none."""
    return bound_arguments(node).get(name)


def spread(value: Any, rank: int) -> list[int]:
    """Return one number per axis of space."""
    values = [value] if isinstance(value, int) else list(value)
    return [int(v) for v in (values * rank if len(values) == 1 else values)]


def out_of_scope(node: fx.Node, why: str = "") -> ModelError:
    """Return the error that names an operator."""
    where = module_of(node)
    return ModelError(
        f"certify: operator {operator_of(node)}{' in ' + repr(where) if where else ''} is out of scope"
        f"{': ' + why if why else ''}. Certified are linear and convolution layers, BatchNorm in evaluation mode, "
        "elementwise activations with known slopes, pooling, sums, concatenation and reshaping; measure this "
        "network with isthmus.line instead."
    )


def is_layer(node: fx.Node) -> bool:
    """Tell whether a node applies weights to an activation."""
    if node.op != "call_function":
        return False
    name = operator_of(node)
    return name in ("aten.linear", "aten.addmm") or name in BATCH_NORMS or name in _CONVOLUTIONS


def layer_weight(node: fx.Node, trace: Trace, state: Mapping[str, Tensor]) -> tuple[fx.Node, Tensor]:
    """Return the input node of a layer, and its weight as the operator sees it.

    Raises:
        ModelError: the weight is no parameter (or a transposed one).
    """
    if operator_of(node) == "aten.addmm":
        source, weight = node.args[1], node.args[2]
    else:
        source, weight = argument(node, "input"), argument(node, "weight")
    turned = False
    while isinstance(weight, fx.Node) and _swaps_two_axes(weight):
        weight, turned = weight.args[0], not turned
    if not isinstance(weight, fx.Node) or weight.name not in trace.tensors or not isinstance(source, fx.Node):
        raise out_of_scope(node, "its weight is not a parameter of the network")
    if weight.meta["val"].ndim < 2:
        raise out_of_scope(node, "its weight is a vector")
    found = state[trace.tensors[weight.name]]
    return source, found.T if turned else found


def _swaps_two_axes(node: fx.Node) -> bool:
    """Return whether a node is the transpose of a matrix."""
    if node.op != "call_function" or node.meta["val"].ndim != 2:
        return False
    name = operator_of(node)
    if name == "aten.transpose":
        return int(argument(node, "dim0")) % 2 != int(argument(node, "dim1")) % 2
    if name == "aten.permute":
        return int(argument(node, "dims")[0]) % 2 == 1
    return name == "aten.t"


def batch_norm_scale(node: fx.Node, trace: Trace, state: Mapping[str, Tensor]) -> tuple[fx.Node, Tensor]:
    """Return the input node of a BatchNorm and the factor by which it multiplies each channel.

    Raises:
        ModelError: it uses the statistics of the batch.
    """

    def tensor(name: str) -> Tensor | None:
        found = argument(node, name)
        return state[trace.tensors[found.name]] if isinstance(found, fx.Node) else None

    variance, weight, source = tensor("running_var"), tensor("weight"), argument(node, "input")
    if variance is None or not isinstance(source, fx.Node):
        raise out_of_scope(node, "batch statistics")
    scale = (variance.double() + float(argument(node, "eps"))).rsqrt()
    return source, scale if weight is None else scale * weight.double()


def layer_norms(trace: Trace, state: Mapping[str, Tensor]) -> dict[str, float]:
    """Return an upper bound on the spectral norm of every layer, by the name of its node.

    Raises:
        ModelError: a layer's weights are no parameters.
    """
    norms: dict[str, float] = {}
    for node in filter(is_layer, trace.graph.nodes):
        name = operator_of(node)
        if name in BATCH_NORMS:
            norms[node.name] = float(batch_norm_scale(node, trace, state)[1].abs().max())
        elif name in _CONVOLUTIONS:
            norms[node.name] = _convolution_norm(node, trace, state)
        else:
            norms[node.name] = matrix_norm(layer_weight(node, trace, state)[1])
    return norms


def layer_magnitudes(
    trace: Trace, first: Mapping[str, Tensor], last: Mapping[str, Tensor]
) -> dict[str, Magnitude]:
    """Bound the rounding of every layer between two states, by the name of its node.

    Raises:
        ModelError: a layer's weights are no parameters.
    """
    found: dict[str, Magnitude] = {}
    for node in filter(is_layer, trace.graph.nodes):
        value = node.meta["val"]
        value = value[0] if isinstance(value, tuple) else value
        if operator_of(node) in BATCH_NORMS:
            terms, uses, units = 1, 1, value.shape[1]
            weights = [batch_norm_scale(node, trace, s)[1].abs().max() for s in (first, last)]
        else:
            weights = [layer_weight(node, trace, s)[1] for s in (first, last)]
            shape = weights[0].shape
            terms = math.prod(shape) // min(shape[:2])  # products summed for one output, or more
            uses = math.prod(shape[2:])  # how often an input is read
            units = value.shape[1 if len(shape) > 2 else -1]
        rate = (terms + _EXTRA_TERMS) * ROUNDOFF
        bias = argument(node, "self" if operator_of(node) == "aten.addmm" else "bias")
        shift = 0.0
        if isinstance(bias, fx.Node) and bias.name in trace.tensors:
            positions = value[0].numel() / units
            shift = math.sqrt(positions) * math.hypot(
                *(_size(s[trace.tensors[bias.name]]) for s in (first, last))
            )
        size = math.hypot(*(_size(w) for w in weights))
        found[node.name] = Magnitude(rate * math.sqrt(uses) * size, rate * shift)
    return found


def _size(values: Tensor) -> float:
    return float(row_norms(values.double().reshape(1, -1)))


def _convolution_norm(node: fx.Node, trace: Trace, state: Mapping[str, Tensor]) -> float:
    source, kernel = layer_weight(node, trace, state)
    rank = kernel.ndim - 2
    turned = "transpose" in operator_of(node)
    space = (node if turned else source).meta["val"].shape[-rank:]
    dilation = spread(argument(node, "dilation"), rank)
    groups = int(argument(node, "groups"))
    return convolution_norm(kernel, [int(s) for s in space], dilation=dilation, groups=groups, turned=turned)
