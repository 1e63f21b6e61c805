"""Which operators of a graph are layers, and what each is given: an activation, a weight, a bias."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import fx

from isthmus.layers._convolution import Convolution
from isthmus.symmetry import bound_arguments, operator_of

__all__ = ["CONVOLUTIONS", "Operands", "operands_of"]

CONVOLUTIONS = frozenset(f"aten.conv{turned}{n}d" for turned in ("", "_transpose") for n in (1, 2, 3))
"""Operators of convolutions and transposed convolutions along one to three axes of space."""

_PRODUCTS = {
    "aten.linear": ("input", "weight", "bias"),
    "aten.addmm": ("mat1", "mat2", "self"),
    "aten.mm": ("self", "mat2", ""),
    "aten.matmul": ("self", "other", ""),
}
"""Names of activation, weight and bias in the schema of every product of matrices; only ``linear`` transposes."""


@dataclass(frozen=True)
class Operands:
    """What the operator of a layer is given: nodes of the graph, or values that the code holds.

    Attributes:
        source: what flows in.
        weight: the weight, before any transposition.
        bias: what is added, if anything.
        in_axis: axis of ``weight`` that is contracted with the activation.
        out_axis: axis of ``weight`` that lists the outputs.
        convolution: how patches are cut, ``None`` for products of matrices.
        transposed: whether the operator sees the transpose of ``weight``.
        scaled: whether it multiplies the product or the bias by a number other than one.
    """

    source: Any
    weight: Any
    bias: Any
    in_axis: int
    out_axis: int
    convolution: Convolution | None = None
    transposed: bool = False
    scaled: bool = False


def operands_of(node: fx.Node) -> Operands | None:
    """Return what a layer's operator is given, ``None`` for any other operator.

    Layers are ``linear``, ``addmm``, ``mm``, ``matmul`` and convolutions. Whether the weight is a parameter is left to
    the caller.
    """
    name = operator_of(node) if node.op == "call_function" else ""
    if name in CONVOLUTIONS or name == "aten.convolution":
        given = bound_arguments(node)
        turned = "transpose" in name or bool(given.get("transposed", False))
        kernel = tuple(int(n) for n in given["weight"].meta["val"].shape[2:])
        axes = (0, 1) if turned else (1, 0)
        cut = Convolution.from_arguments(given, kernel, turned)
        return Operands(given["input"], given["weight"], given["bias"], *axes, cut)
    if name not in _PRODUCTS:
        return None
    given = bound_arguments(node)
    source, weight, bias = (given.get(key) for key in _PRODUCTS[name])
    transposed = False
    while isinstance(weight, fx.Node) and _is_transposition(weight):
        weight, transposed = weight.all_input_nodes[0], not transposed
    axes = (0, 1) if transposed == (name == "aten.linear") else (1, 0)
    scaled = given.get("alpha", 1) != 1 or given.get("beta", 1) != 1
    return Operands(source, weight, bias, *axes, None, transposed, scaled)


def _is_transposition(node: fx.Node) -> bool:
    """Whether a node is the transpose of a matrix."""
    if node.op != "call_function" or getattr(node.meta.get("val"), "ndim", 0) != 2:
        return False
    name = operator_of(node)
    if name == "aten.transpose":
        given = bound_arguments(node)
        return int(given["dim0"]) % 2 != int(given["dim1"]) % 2
    if name == "aten.permute":
        return int(bound_arguments(node)["dims"][0]) % 2 == 1
    return name in ("aten.t", "aten.numpy_T", "aten.mT")
