"""Sums of products as letters: which axes of the operands are aligned, and which are summed over."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx

from isthmus.symmetry._listed import CONVOLUTIONS, SUMS
from isthmus.symmetry._origins import shape_of
from isthmus.symmetry._trace import bound_arguments, operator_of

__all__ = ["Contraction", "contraction_of", "convolution_of"]

Letters = Sequence[Any]


@dataclass(frozen=True)
class Contraction:
    """A sum of products of operands over the letters that the result lacks.

    Attributes:
        operands: each with the letters of its axes.
        out: letters of the result.
        bias: what is added, broadcast from the right; None for nothing.
        layer: whether the second operand is the weight of a layer, which the first one flows into.
        mixed: letters along which something else happens too.
    """

    operands: Sequence[tuple[fx.Node, Letters]]
    out: Letters
    bias: fx.Node | None = None
    layer: bool = False
    mixed: Letters = ()

    def sizes(self) -> dict[Any, int]:
        """Return the length of each letter; operands of length 1 are broadcast along it."""
        full: dict[Any, int] = {}
        for n, letters in self.operands:
            for letter, size in zip(letters, shape_of(n), strict=True):
                full[letter] = max(full.get(letter, 1), size)
        return full


def contraction_of(node: fx.Node) -> Contraction | None:
    """Return how an operator sums products, or ``None`` for one that does something else.

    Raises:
        KeyError: the call has another form than the operator's usual one.
    """
    name = operator_of(node).removeprefix("aten.")
    reader = _READERS.get(name)
    return None if reader is None else reader(node, bound_arguments(node), name)


def _node(given: Any) -> fx.Node | None:
    return given if isinstance(given, fx.Node) else None


def _linear(node: fx.Node, bound: Mapping[str, Any], name: str) -> Contraction:
    outer = list(range(len(shape_of(bound["input"])) - 1))
    weight = ["o", "i"][2 - len(shape_of(bound["weight"])) :]
    operands = [(bound["input"], [*outer, "i"]), (bound["weight"], weight)]
    return Contraction(operands, [*outer, *weight[:-1]], _node(bound.get("bias")), layer=True)


def _bilinear(node: fx.Node, bound: Mapping[str, Any], name: str) -> Contraction:
    outer = list(range(len(shape_of(bound["input1"])) - 1))
    operands = [
        (bound["input1"], [*outer, "i"]),
        (bound["weight"], ["o", "i", "j"]),
        (bound["input2"], [*outer, "j"]),
    ]
    return Contraction(operands, [*outer, "o"], _node(bound.get("bias")))


def _product(node: fx.Node, bound: Mapping[str, Any], name: str) -> Contraction:
    left, right = (bound[n] for n in SUMS[name])
    ranks = [len(shape_of(n)) for n in (left, right)]
    letters = [
        [*range(-ranks[0], -2), *(["r"] if ranks[0] > 1 else []), "i"],
        [*range(-ranks[1], -2), "i", *(["c"] if ranks[1] > 1 else [])],
    ]
    outer = list(range(-max(ranks), -2))
    out = [*outer, *(["r"] if ranks[0] > 1 else []), *(["c"] if ranks[1] > 1 else [])]
    bias = _node(bound["self"]) if name in ("addmm", "baddbmm") else None
    return Contraction([(left, letters[0]), (right, letters[1])], out, bias)


def _outer(node: fx.Node, bound: Mapping[str, Any], name: str) -> Contraction:
    return Contraction([(bound["self"], "r"), (bound["vec2"], "c")], "rc")


def _einsum(node: fx.Node, bound: Mapping[str, Any], name: str) -> Contraction:
    equation, tensors = str(node.args[0]).replace(" ", ""), list(node.args[1])  # pyright: ignore
    left, arrow, right = equation.partition("->")
    terms = left.split(",")
    if not arrow:
        counts = left.replace("...", "").replace(",", "")
        right = ("..." if "..." in left else "") + "".join(
            sorted(c for c in set(counts) if counts.count(c) == 1)
        )
    spans = [
        len(shape_of(n)) - len(term.replace("...", "")) if "..." in term else 0
        for n, term in zip(tensors, terms, strict=True)
    ]
    operands = [(n, _letters(term, span)) for n, term, span in zip(tensors, terms, spans, strict=True)]
    return Contraction(operands, _letters(right, max(spans)))


def _attention(node: fx.Node, bound: Mapping[str, Any], name: str) -> Contraction | None:
    query, key, value = bound["query"], bound["key"], bound["value"]
    ranks = [len(shape_of(n)) for n in (query, key, value)]
    if len(set(ranks)) > 1:
        return None
    outer = list(range(ranks[0] - 2))
    operands = [(query, [*outer, "l", "d"]), (key, [*outer, "s", "d"]), (value, [*outer, "s", "v"])]
    return Contraction(operands, [*outer, "l", "v"], mixed=("s",))


def convolution_of(node: fx.Node) -> Contraction | None:
    """Return how a convolution without groups, or a depthwise one, sums over channels; ``None`` for others.

    Spatial axes have a letter of their own in every operand: nothing is aligned along them.
    """
    name = operator_of(node).removeprefix("aten.")
    if name not in CONVOLUTIONS:
        return None
    bound = bound_arguments(node)
    inputs, weight, groups = bound["input"], bound["weight"], int(bound.get("groups") or 1)
    transposed = "transpose" in name or bool(bound.get("transposed"))
    shape, rank = shape_of(weight), len(shape_of(inputs))
    batch = list(range(rank - len(shape) + 1))
    window = range(len(shape) - 2)
    spatial, kernel, moved = ([(word, k) for k in window] for word in ("x", "k", "y"))
    if groups == 1:
        rows = ["i", "o"] if transposed else ["o", "i"]
        channels, made = "i", "o"
    elif shape[:2] == [groups, 1] and shape_of(inputs)[len(batch)] == groups:
        rows, channels, made = ["o", "one"], "o", "o"
    else:
        return None
    operands = [(inputs, [*batch, channels, *spatial]), (weight, [*rows, *kernel])]
    out = [*batch, made, *moved]
    return Contraction(operands, out, _node(bound.get("bias")), layer=True, mixed=(*spatial, *kernel, *moved))


def _letters(term: str, span: int) -> list[Any]:
    """Return the letters of an operand of ``einsum``; axes under dots are counted from the right."""
    head, dots, tail = term.partition("...")
    return [*head, *(range(-span, 0) if dots else ()), *tail]


_READERS: Mapping[str, Callable[[fx.Node, Mapping[str, Any], str], Contraction | None]] = {
    "linear": _linear,
    "bilinear": _bilinear,
    **dict.fromkeys(SUMS, _product),
    **dict.fromkeys(("outer", "ger"), _outer),
    "einsum": _einsum,
    "scaled_dot_product_attention": _attention,
}
