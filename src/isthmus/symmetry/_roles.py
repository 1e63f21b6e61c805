"""Whether a tensor holds or reads the units on each of its axes.

A layer :math:`W h + b` *holds* its outputs on the axis of ``W`` that it keeps, and *reads* its inputs on the
axis that it sums over; ``b``, gains and tables hold. Each use of a tensor in the graph is looked at: the tensor
is followed through operators that only move its entries, or that combine it with other tensors of the state
entry by entry (weight normalisation), and where it meets data the operator says which axes it sums over. An
operator that is not listed says nothing, and the role stays empty.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from isthmus.symmetry._spec import AxisGroup, Role, Slot, SymmetrySpec
from isthmus.symmetry._trace import Trace, bound_arguments, operator_of

__all__ = ["with_roles"]

_RESHAPES = frozenset({"view", "reshape", "_unsafe_view", "flatten", "unflatten"})
_STILL = frozenset(
    {
        *("contiguous", "clone", "detach", "alias", "to", "_to_copy", "type_as", "dropout", "lift_fresh"),
        *("lift_fresh_copy", "flip", "roll", "repeat", "index_select"),
    }
)
"""Operators after which the last axes are those of the operand."""
_VIEWS = frozenset(
    {
        *(
            "t",
            "transpose",
            "permute",
            "numpy_T",
            "mT",
            "movedim",
            "unsqueeze",
            "squeeze",
            "expand",
            "expand_as",
        ),
        *("select", "slice", "narrow", "unbind", "split", "split_with_sizes", "chunk"),
    }
)
_MOVES = frozenset(f"aten.{name}" for name in _RESHAPES | _STILL | _VIEWS)
"""Operators after which every entry is an entry of the first operand."""
_SUMS_OVER: dict[str, Mapping[str, tuple[int, ...]]] = {
    "aten.linear": {"weight": (-1,), "bias": ()},
    "aten.matmul": {"self": (-1,), "other": (-2,)},
    "aten.mm": {"self": (-1,), "mat2": (-2,)},
    "aten.bmm": {"self": (-1,), "mat2": (-2,)},
    "aten.mv": {"self": (-1,), "vec": (-1,)},
    "aten.dot": {"self": (-1,), "tensor": (-1,)},
    "aten.addmm": {"self": (), "mat1": (-1,), "mat2": (-2,)},
    "aten.baddbmm": {"self": (), "batch1": (-1,), "batch2": (-2,)},
    "aten.embedding": {"weight": (0,)},
    "aten.bilinear": {"weight": (-2, -1), "bias": ()},
    "aten.scaled_dot_product_attention": {"query": (-1,), "key": (-1,), "value": (-2,)},
    **{f"aten.conv{n}d": {"weight": (1,), "bias": ()} for n in (1, 2, 3)},
    **{f"aten.conv_transpose{n}d": {"weight": (0,), "bias": ()} for n in (1, 2, 3)},
    **{
        f"aten.{name}": dict.fromkeys(("weight", "bias", "running_mean", "running_var"), ())
        for name in (
            *("batch_norm", "layer_norm", "group_norm", "instance_norm", "rms_norm", "prelu"),
            *(
                "_native_batch_norm_legit_no_training",
                "native_layer_norm",
                "native_group_norm",
                "_fused_rms_norm",
            ),
        )
    },
    **{f"aten.{name}": dict.fromkeys(("tensors", "input"), ()) for name in ("cat", "stack", "concat")},
}
"""Axes that an operator sums over, by the name of the operand; every other axis is kept."""
_RECURRENT = frozenset(f"aten.{name}" for name in ("lstm", "gru", "rnn_tanh", "rnn_relu"))
_GROUPED = frozenset({f"aten.conv{n}d" for n in (1, 2, 3)} | {f"aten.conv_transpose{n}d" for n in (1, 2, 3)})

_Key = tuple[str, int]
"""A tensor of the state and one of its axes."""
_Origins = tuple[frozenset[_Key], ...]
"""For every axis of a value, the axes of state tensors that vary along it."""


def with_roles(spec: SymmetrySpec, traced: Trace) -> SymmetrySpec:
    """Return a spec whose slots say whether they hold or read their units.

    Args:
        spec: as discovered.
        traced: the network.
    """
    found: dict[_Key, set[str]] = {}
    for way in (traced, *traced.others):
        _Uses(way, found).look()
    first = {name: names[0] for names in traced.aliases.values() for name in names}

    def role(group: AxisGroup, slot: Slot) -> Role:
        said = set(found.get((first.get(slot.tensor, slot.tensor), slot.axis), ()))
        if "grouped" in said:  # its blocks are read and held at once, the members of a block are held
            said = said - {"grouped"} | ({"holds"} if group.within else {"holds", "reads"})
        if not said or "unknown" in said:
            return ""
        return "both" if len(said) == 2 else "holds" if "holds" in said else "reads"

    groups = {
        name: replace(group, slots=tuple(replace(slot, role=role(group, slot)) for slot in group.slots))
        for name, group in spec.groups.items()
    }
    return replace(spec, groups=groups)


class _Uses:
    """Follows the tensors of the state through one graph."""

    def __init__(self, traced: Trace, found: dict[_Key, set[str]]) -> None:
        self._traced, self._found = traced, found
        self._origins: dict[fx.Node, Any] = {}

    def look(self) -> None:
        """Note the role of every axis at every use."""
        first = {name: names[0] for names in self._traced.aliases.values() for name in names}
        for node in self._traced.graph.nodes:
            if node.op == "placeholder" and node.name in self._traced.tensors:
                name = first.get(self._traced.tensors[node.name], self._traced.tensors[node.name])
                rank = node.meta["val"].ndim
                self._origins[node] = tuple(frozenset({(name, axis)}) for axis in range(rank))
            elif node.op == "call_function":
                self._call(node)

    def _call(self, node: fx.Node) -> None:
        own = [n for n in node.all_input_nodes if n in self._origins]
        if not own:
            return
        operator = operator_of(node)
        if operator == "getitem":
            origins = self._origins[own[0]]
            if isinstance(origins, list):
                self._origins[node] = origins[int(node.args[1])]  # pyright: ignore[reportArgumentType]
            return
        if operator in _MOVES:
            self._origins[node] = _moved(node, own[0], self._origins[own[0]])
            return
        if len(own) == len(node.all_input_nodes) and _is_pointwise(node):
            self._origins[node] = _broadcast(node, [self._origins[n] for n in own])
            return
        if len(own) == len(node.all_input_nodes) and operator in (
            "aten.norm",
            "aten.linalg_vector_norm",
            "aten.sum",
        ):
            return  # a length of what is followed on the other way
        for name, n in _operands(node):
            if n in self._origins:
                self._note(node, operator, name, self._origins[n])

    def _note(self, node: fx.Node, operator: str, name: str, origins: _Origins | list[_Origins]) -> None:
        """Note the roles of an operand's axes where it meets data."""
        for one in origins if isinstance(origins, list) else [origins]:
            summed = _summed(node, operator, name, len(one))
            for axis, keys in enumerate(one):
                grouped = axis == 0 and operator in _GROUPED and name == "weight" and _groups(node) > 1
                word = "unknown" if summed is None else "reads" if axis in summed else "holds"
                for key in keys:
                    self._found.setdefault(key, set()).add("grouped" if grouped else word)


def _summed(node: fx.Node, operator: str, name: str, rank: int) -> frozenset[int] | None:
    """Return the axes of an operand that an operator sums over, ``None`` if that is not known."""
    if _is_pointwise(node):
        return frozenset()
    if operator == "aten.einsum":
        return _letters_summed(node, int(name), rank)
    if operator in _RECURRENT:
        return frozenset({1} if rank == 2 else ())
    table = _SUMS_OVER.get(operator)
    name = {"x": "self"}.get(name, name)
    if table is None or name not in table:
        return None
    return frozenset(axis % rank for axis in table[name] if -rank <= axis < rank)


def _letters_summed(node: fx.Node, operand: int, rank: int) -> frozenset[int] | None:
    """Return the axes whose letters the result of an ``einsum`` does not have."""
    left, arrow, right = str(node.args[0]).replace(" ", "").partition("->")
    if not arrow:
        return None
    head, _, tail = left.split(",")[operand].partition("...")
    places = [*enumerate(head), *enumerate(tail, start=rank - len(tail))]
    return frozenset(place for place, letter in places if letter not in right)


def _operands(node: fx.Node) -> Iterable[tuple[str, fx.Node]]:
    """Yield the nodes that an operator is given, by the names of its arguments."""
    if operator_of(node) == "aten.einsum":
        tensors: Sequence[Any] = node.args[1]  # pyright: ignore[reportAssignmentType]
        yield from ((str(k), n) for k, n in enumerate(tensors) if isinstance(n, fx.Node))
        return
    if not isinstance(node.target, torch._ops.OpOverload):
        yield from (("", n) for n in node.all_input_nodes)
        return
    for name, value in bound_arguments(node).items():
        listed = value if isinstance(value, (list, tuple)) else [value]
        yield from ((name, n) for n in listed if isinstance(n, fx.Node))


def _groups(node: fx.Node) -> int:
    return int(bound_arguments(node).get("groups") or 1)


def _is_pointwise(node: fx.Node) -> bool:
    return torch.Tag.pointwise in getattr(node.target, "tags", ())


def _broadcast(node: fx.Node, origins: Sequence[Any]) -> _Origins:
    """Return the origins of a result of tensors of the state, entry by entry."""
    rank = node.meta["val"].ndim
    axes: list[frozenset[_Key]] = [frozenset()] * rank
    for one in origins:
        for k, keys in enumerate(one if isinstance(one, tuple) else ()):
            place = rank - len(one) + k
            axes[place] = axes[place] | keys
    return tuple(axes)


def _moved(node: fx.Node, source: fx.Node, origins: Any) -> Any:
    """Return the origins after an operator that only moves entries."""
    if not isinstance(origins, tuple):
        return origins
    shape = [int(n) for n in source.meta["val"].shape]
    results = node.meta["val"]
    several = isinstance(results, (list, tuple))
    name = operator_of(node).removeprefix("aten.")
    if not several and name in _STILL:
        return tuple(frozenset[_Key]() for _ in range(results.ndim - len(shape))) + origins
    found: list[list[set[_Key]]] = [[set() for _ in r.shape] for r in (results if several else [results])]
    for axis, keys in enumerate(origins):
        varying = (
            [_overlaps(shape, axis, list(results.shape))]
            if name in _RESHAPES
            else _strided(node, source, axis)
        )
        for axes, places in zip(found, varying, strict=True):
            for place in places:
                axes[place] |= keys
    made = [tuple(frozenset(keys) for keys in axes) for axes in found]
    return made if several else made[0]


def _overlaps(shape: Sequence[int], axis: int, target: Sequence[int]) -> list[int]:
    """Return the axes of a reshaped tensor along which one of its axes varies: those that count the same steps."""
    inner = math.prod(shape[axis + 1 :])
    outer = inner * shape[axis]
    steps = [math.prod(target[k + 1 :]) for k in range(len(target))]
    return [k for k, step in enumerate(steps) if max(inner, step) < min(outer, step * target[k])]


def _strided(node: fx.Node, source: fx.Node, axis: int) -> list[list[int]]:
    """Return, for each result of a view, the axes along which one axis of its source varies."""
    value = source.meta["val"]
    steps = [int(k == axis) for k in range(value.ndim)]
    seen = torch.empty_strided(tuple(int(n) for n in value.shape), steps, device="meta")

    def given(n: fx.Node) -> Any:
        return seen if n is source else torch.empty(n.meta["val"].shape, device="meta")

    args, kwargs = fx.map_arg((node.args, node.kwargs), given)
    with torch.no_grad():
        made: Any = node.target(*args, **kwargs)  # type: ignore[operator]
    results = made if isinstance(made, (list, tuple)) else [made]
    return [[d for d, step in enumerate(r.stride()) if step and r.shape[d] > 1] for r in results]
