"""Where equal entries are to be expected: positions found by ranking them depend on the order of the axis.

The position of a maximum moves with its axis as long as it is unique. Entries that come out of a saturating
operator (``relu``, ``clamp``, rounding, comparisons) are often equal, and then ``argmax`` and its kin take the first
one: which unit that is depends on the order. Generic arithmetic gives equal entries with probability zero, and
masks are taken to hide what is not to be chosen, so neither counts here.
"""

from __future__ import annotations

import operator

import torch
from torch import Tensor, fx

from isthmus.symmetry._trace import operator_of

__all__ = ["RANKINGS", "Ties"]

RANKINGS = frozenset(
    f"aten.{name}"
    for name in (
        "argmax",
        "argmin",
        "max",
        "min",
        "median",
        "nanmedian",
        "kthvalue",
        "sort",
        "argsort",
        "topk",
    )
)
_SATURATING = frozenset(
    f"aten.{name}"
    for name in (
        "relu", "relu6", "threshold", "hardtanh", "hardsigmoid", "hardswish", "hardshrink", "softshrink", "clamp",
        "clamp_min", "clamp_max", "clip", "round", "floor", "ceil", "trunc", "fix", "sign", "sgn", "heaviside",
        "eq", "ne", "lt", "le", "gt", "ge", "logical_and", "logical_or", "logical_not", "isnan", "floor_divide",
        "bucketize", "searchsorted", "one_hot",
    )
)  # fmt: skip
_KEEPING = frozenset(
    f"aten.{name}"
    for name in (
        "view", "reshape", "_unsafe_view", "flatten", "unflatten", "permute", "transpose", "t", "squeeze",
        "unsqueeze", "expand", "slice", "select", "clone", "contiguous", "detach", "alias", "to", "_to_copy",
        "type_as", "split", "chunk", "unbind", "index", "gather", "softmax", "log_softmax", "_softmax", "dropout",
    )
)  # fmt: skip
_ANY = frozenset(("aten.mul", "aten.div"))


class Ties:
    """Remembers the nodes of a graph whose entries may be equal."""

    def __init__(self) -> None:
        self._equal: set[fx.Node] = set()

    def note(self, node: fx.Node) -> None:
        """Decide for one more node, after those it reads."""
        name, sources = operator_of(node), node.all_input_nodes
        known = [source in self._equal for source in sources]
        pointwise = torch.Tag.pointwise in getattr(node.target, "tags", ())
        if name in _SATURATING or _counts(node, sources):
            self._equal.add(node)
        elif node.target is operator.getitem or name in _KEEPING or name in _ANY:
            if any(known):
                self._equal.add(node)
        elif pointwise and known and all(known):
            self._equal.add(node)

    def may_tie(self, ranking: fx.Node) -> bool:
        """Return whether the entries that an operator ranks may be equal."""
        return any(source in self._equal for source in ranking.all_input_nodes)


def _counts(node: fx.Node, sources: list[fx.Node]) -> bool:
    """Return whether an operator turns real numbers into integers or truth values."""
    made, read = node.meta.get("val"), [s.meta.get("val") for s in sources]
    if not isinstance(made, Tensor) or made.is_floating_point() or made.is_complex():
        return False
    if operator_of(node) in RANKINGS:
        return False
    return any(isinstance(r, Tensor) and r.is_floating_point() for r in read)
