"""One way through the code of a traced network, as folding reads it: what lives, what is kept, what is the state's."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

from torch import fx
from torch.utils import _pytree as pytree

from isthmus.symmetry import Outputs, Trace, module_of, operator_of

__all__ = ["LiveWay", "described", "kind_of", "operands", "shape_of", "ways_of"]


class LiveWay:
    """A graph with the nodes that the outputs depend on; all others may change and are not looked at.

    Args:
        traced: the way.
        outputs: what must be preserved.
    """

    def __init__(self, traced: Trace, outputs: Outputs = None) -> None:
        self.traced = traced
        kept = (*traced.select_outputs(outputs).values(), *traced.asked, *traced.staying.values())
        self.kept = frozenset(kept)
        self.live = _ancestors(kept)

    @cached_property
    def nodes(self) -> tuple[fx.Node, ...]:
        """The living operators, in the order in which they are computed."""
        return tuple(n for n in self.traced.graph.nodes if n in self.live and n.op == "call_function")

    def users(self, node: fx.Node) -> list[fx.Node]:
        """Return the living operators that read a node's value."""
        return [n for n in node.users if n in self.live and n.op == "call_function"]

    def tensor_of(self, node: fx.Node) -> str | None:
        """Return the name of the state's tensor at a placeholder (the first of its names); ``None`` for all else."""
        name = self.traced.tensors.get(node.name) if node.op == "placeholder" else None
        return None if name is None else self.traced.first_name(name)

    @cached_property
    def placeholders(self) -> dict[str, list[fx.Node]]:
        """The living placeholders of every tensor of the state."""
        found: dict[str, list[fx.Node]] = {}
        for node in self.traced.graph.find_nodes(op="placeholder"):
            name = self.tensor_of(node)
            if name is not None and node in self.live:
                found.setdefault(name, []).append(node)
        return found


def ways_of(traced: Trace, outputs: Outputs = None) -> tuple[LiveWay, ...]:
    """Return every way through the code of a traced network."""
    return tuple(LiveWay(way, outputs) for way in (traced, *traced.others))


def _ancestors(nodes: Sequence[fx.Node]) -> frozenset[fx.Node]:
    waiting, found = list(nodes), set(nodes)
    while waiting:
        fresh = [n for n in waiting.pop().all_input_nodes if n not in found]
        found.update(fresh)
        waiting.extend(fresh)
    return frozenset(found)


def kind_of(node: fx.Node) -> str:
    """Return the operator's name without its namespace; empty for placeholders and operators that are not PyTorch's."""
    name = operator_of(node) if node.op == "call_function" else ""
    if name == "getitem":
        return name
    return name.removeprefix("aten.") if name.startswith("aten.") else ""


def shape_of(node: Any) -> tuple[int, ...]:
    """Return the shape of a node's value; empty for numbers and several values."""
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    return tuple(int(n) for n in getattr(value, "shape", ()))


def described(node: fx.Node) -> str:
    """Return how a message calls an operator: its name and the module that calls it."""
    if node.op == "placeholder":
        return f"the input {node.name!r}"
    name, where = operator_of(node).removeprefix("aten."), module_of(node)
    return f"{name} in {where!r}" if where else name


def operands(node: fx.Node) -> list[fx.Node]:
    """Return every node among an operator's arguments, as often as it stands there."""
    leaves = pytree.tree_leaves((node.args, dict(node.kwargs)))
    return [leaf for leaf in leaves if isinstance(leaf, fx.Node)]
