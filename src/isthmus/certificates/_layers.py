r"""Layers with weights in a traced network: where their weights are, and how large they are."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx

from isthmus.certificates._norms import ROUNDOFF, convolution_norm, matrix_norm, row_norms
from isthmus.errors import ModelError
from isthmus.layers import BATCH_NORMS, CONVOLUTIONS, BatchNorm, Operands, operands_of
from isthmus.symmetry import Trace, bound_arguments, module_of, operator_of

__all__ = [
    "Magnitude",
    "argument",
    "batch_norm_scale",
    "is_layer",
    "layer_magnitudes",
    "layer_norms",
    "layer_weight",
    "out_of_scope",
]

_LAYERS = {"aten.linear", "aten.addmm"} | BATCH_NORMS | CONVOLUTIONS

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
    return node.op == "call_function" and operator_of(node) in _LAYERS


def layer_weight(node: fx.Node, trace: Trace, state: Mapping[str, Tensor]) -> tuple[Operands, Tensor]:
    """Return what the operator of a layer with a weight is given, and that weight as the operator sees it.

    Raises:
        ModelError: the weight is no parameter (or a transposed one).
    """
    given = operands_of(node)
    assert given is not None
    if getattr(given.weight, "name", None) not in trace.tensors or not isinstance(given.source, fx.Node):
        raise out_of_scope(node, "its weight is not a parameter of the network")
    if given.weight.meta["val"].ndim < 2:
        raise out_of_scope(node, "its weight is a vector")
    found = state[trace.tensors[given.weight.name]]
    return given, found.T if given.transposed else found


def batch_norm_scale(node: fx.Node, trace: Trace, state: Mapping[str, Tensor]) -> Tensor:
    """Return the factor by which a BatchNorm multiplies each channel."""
    norm = BatchNorm.from_node(node, trace.tensors)
    if norm is None:
        raise out_of_scope(node, "it uses computed tensors, or the statistics of the batch")
    return norm.scale(state)


def layer_norms(trace: Trace, state: Mapping[str, Tensor]) -> dict[str, float]:
    """Return an upper bound on the spectral norm of every layer, by the name of its node.

    Raises:
        ModelError: a layer's weights are no parameters.
    """
    norms: dict[str, float] = {}
    for node in filter(is_layer, trace.graph.nodes):
        name = operator_of(node)
        if name in BATCH_NORMS:
            norms[node.name] = float(batch_norm_scale(node, trace, state).abs().max())
        elif name in CONVOLUTIONS:
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
            weights = [batch_norm_scale(node, trace, s).abs().max() for s in (first, last)]
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
    given, kernel = layer_weight(node, trace, state)
    cut = given.convolution
    assert cut is not None
    space = [int(s) for s in (node if cut.turned else given.source).meta["val"].shape[-cut.dimensions :]]
    return convolution_norm(kernel, space, dilation=cut.dilation, groups=cut.groups, turned=cut.turned)
