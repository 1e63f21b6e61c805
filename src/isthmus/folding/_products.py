"""Sums of products of data with a tensor of the state: which axes are summed, kept and carried."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx

from isthmus.folding._graph import kind_of, operands, shape_of
from isthmus.layers import CONVOLUTIONS, Convolution
from isthmus.symmetry import SUMS, bound_arguments, contraction_of, operator_of

__all__ = ["WeightProduct", "product_with", "product_writing"]

_SUMMED = frozenset({"linear", "einsum", *SUMS} - {"dot"})
"""Products of two factors, besides convolutions."""


@dataclass(frozen=True)
class WeightProduct:
    """An operator that multiplies data by a tensor and sums.

    Attributes:
        node: the operator.
        data: the operand that flows in.
        weight: the operand that it is multiplied by.
        bias: what is added, a node or ``None``.
        summed: from axis of the data to the axis of the weight that it is summed with.
        kept: from axis of the weight to axis of the result, for those that the data lack.
        groups: number of groups of channels, in a convolution.
        constant: whether a constant along the summed axis adds a constant to every unit of the result: not where
            zeros are put around the data, and not where each position meets other entries of the weight.
        scaled: whether product or bias are multiplied by a number.
    """

    node: fx.Node
    data: fx.Node
    weight: fx.Node
    bias: Any
    summed: Mapping[int, int]
    kept: Mapping[int, int]
    groups: int = 1
    constant: bool = True
    scaled: bool = False


def product_with(node: fx.Node, data: fx.Node) -> WeightProduct | None:
    """Return the product in which a node's value is the data; ``None`` for any other operator, or both factors."""
    if operands(node).count(data) != 1:
        return None
    return next((p for p in _products(node) if p.data is data), None)


def product_writing(node: fx.Node) -> Sequence[WeightProduct]:
    """Return both ways of reading an operator as a product, either factor as the weight; none for other operators."""
    return _products(node)


def _products(node: fx.Node) -> list[WeightProduct]:
    kind = kind_of(node)
    bound = bound_arguments(node) if kind and kind != "getitem" else {}
    if operator_of(node) in CONVOLUTIONS or kind == "convolution":
        return [_convolution(node, bound)]
    form = contraction_of(node) if kind in _SUMMED else None
    if form is None or (kind == "einsum" and not _is_plain(str(node.args[0]), len(form.operands))):
        return []
    scaled = bound.get("alpha", 1) != 1 or bound.get("beta", 1) != 1
    one, two = ((n, list(letters)) for n, letters in form.operands)
    found = (_product(node, x, w, form.out, form.bias, scaled) for x, w in ((one, two), (two, one)))
    return [p for p in found if p is not None]


def _is_plain(equation: str, factors: int) -> bool:
    """Return whether an ``einsum`` names every axis of two factors, and of its result."""
    return factors == 2 and "->" in equation and "." not in equation


def _convolution(node: fx.Node, bound: Mapping[str, Any]) -> WeightProduct:
    turned = "transpose" in operator_of(node) or bool(bound.get("transposed"))
    shape, rank = shape_of(bound["weight"]), len(shape_of(bound["input"]))
    cut = Convolution.from_arguments(bound, shape[2:], turned)
    channel, groups = rank - len(shape) + 1, cut.groups
    padded = any(side for pair in cut.padding for side in pair)
    kept = {1: channel} if turned else {0: channel}
    return WeightProduct(
        node,
        bound["input"],
        bound["weight"],
        bound.get("bias"),
        {channel: 0 if turned else 1},
        kept,
        groups,
        constant=not (padded or turned),
    )


_Factor = tuple[fx.Node, list[Any]]


def _product(
    node: fx.Node, data: _Factor, weight: _Factor, out: Sequence[Any], bias: Any, scaled: bool
) -> WeightProduct | None:
    (x, own), (w, theirs) = data, weight
    if len(set(own)) != len(own) or len(set(theirs)) != len(theirs):
        return None  # a diagonal
    summed = {k: theirs.index(n) for k, n in enumerate(own) if n in theirs and n not in out}
    if any(shape_of(x)[k] != shape_of(w)[a] for k, a in summed.items()):
        return None  # one is broadcast
    kept = {a: out.index(n) for a, n in enumerate(theirs) if n in out and n not in own}
    # an axis that both have and the result too: a product entry by entry, so the weight differs from place to place
    lone = any(n not in theirs and n not in out for n in own)  # summed over by itself
    constant = len(summed) + len(kept) == len(theirs) and not lone
    return WeightProduct(node, x, w, bias, summed, kept, constant=constant, scaled=scaled)
