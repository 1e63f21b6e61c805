"""Parameters of several layers in one tensor: ``w[0]``, ``w[1]``, or one tensor for queries, keys and values.

Where a first interpretation finds that an axis of a parameter is cut, the next one reads the parameter as a lazy
concatenation (``Stacked``), so that the layers in it need not move alike. Any use of the whole joins them again. A
segment that the computation never looks at would then be free of the others, although an input of another length may
reach it (the rows of a table of positions): such a parameter is read as one again.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from isthmus.symmetry import _axes
from isthmus.symmetry._axes import Fixed, Pin, Sum, resolve
from isthmus.symmetry._interpret import bind
from isthmus.symmetry._segments import MOST_SEGMENTS, Stacked, lengths_of
from isthmus.symmetry._trace import Trace, operator_of
from isthmus.symmetry._values import Value

__all__ = ["Segments", "cut_parameters", "in_segments", "unread_parameters"]

Segments = dict[str, tuple[int, tuple[int, ...]]]
"""From parameter to the axis that is cut and the lengths of its segments."""

_USE_THE_WHOLE = frozenset(
    f"aten.{name}"
    for name in (
        *(
            "linear",
            "addmm",
            "embedding",
            "conv1d",
            "conv2d",
            "conv3d",
            "conv_transpose1d",
            "conv_transpose2d",
        ),
        *("batch_norm", "layer_norm", "group_norm", "instance_norm", "lstm", "gru", "rnn_tanh", "rnn_relu"),
    )
)
"""Operators that join the segments at once, so that nothing is gained by reading their operands in segments."""
_PICK = frozenset(
    f"aten.{name}"
    for name in (
        *("select", "slice", "narrow", "unbind", "split", "split_with_sizes", "chunk", "tensor_split"),
        *("unsafe_chunk", "unsafe_split", "unsafe_split_with_sizes", "flip"),
    )
)


def cut_parameters(traced: Trace, labels: Mapping[str, Value | Stacked]) -> Segments:
    """Return the parameters on which a cut axis lies beside one that moves.

    Args:
        traced: the model.
        labels: of every state tensor after an interpretation.
    """
    useful = {
        way.first_name(way.tensors[node.name])
        for way in (traced, *traced.others)
        for node in way.graph.find_nodes(op="placeholder")
        if node.name in way.tensors and any(operator_of(user) not in _USE_THE_WHOLE for user in node.users)
    }
    found: Segments = {}
    for name, value in labels.items():
        if name in useful and isinstance(value, Value):
            cut = {k: lengths for k, axis in enumerate(value.axes) if len(lengths := _lengths(axis)) > 1}
            movable = {
                k for k, axis in enumerate(value.axes) if any(a.pinned is None for a in _axes.atoms_of(axis))
            }
            fitting = {k: n for k, n in cut.items() if len(n) <= MOST_SEGMENTS and movable - {k}}
            if fitting:
                # single positions before longer segments: layers in one tensor, then parts of a fused projection
                dim = min(fitting, key=lambda k: (max(fitting[k]) > 1, k))
                found[name] = dim, fitting[dim]
    return found


def _lengths(axis: _axes.Expression) -> tuple[int, ...]:
    form = resolve(axis)
    return lengths_of(form) if isinstance(form, (Sum, Fixed)) else ()


def in_segments(shape: tuple[int, ...], dim: int, lengths: Iterable[int]) -> Stacked:
    """Return the labels of a parameter of which nothing is known but that it is cut."""
    lengths = tuple(lengths)
    single = all(n == 1 for n in lengths)
    whole = _axes.immovable(len(lengths), Pin("its positions are different layers")) if single else None
    parts = ((*shape[:dim], n, *shape[dim + 1 :]) for n in lengths)
    return Stacked(dim, tuple(Value(tuple(_axes.fresh(n) for n in part)) for part in parts), whole)


def unread_parameters(traced: Trace, values: Mapping[fx.Node, Any]) -> set[str]:
    """Return the parameters read in segments of which some may never be looked at.

    Args:
        traced: the model.
        values: the labels of every node.
    """
    found: set[str] = set()
    for way in (traced, *traced.others):
        read: dict[fx.Node, set[int]] = {}
        for node in reversed(way.graph.nodes):
            value = values.get(node)
            if isinstance(value, Stacked):
                read[node] = _read(node, value, values, read)
                if node.name in way.tensors and len(read[node]) < sum(value.lengths):
                    found.add(way.first_name(way.tensors[node.name]))
    return found


def _read(
    node: fx.Node, value: Stacked, values: Mapping[fx.Node, Any], read: Mapping[fx.Node, set[int]]
) -> set[int]:
    """Return the positions of the axis in segments that the users of a node look at, given what is read of theirs."""
    seen: set[int] = set()
    for user in node.users:
        taken = _taken(node, user, value)
        results = [n for n in user.users if n.users] if isinstance(taken, dict) else [user]
        for result in results:
            places: list[int] | None = taken[result.args[1]] if isinstance(taken, dict) else taken
            made = values.get(result)
            if not isinstance(made, Stacked):
                seen |= set(range(sum(value.lengths)) if places is None else places)
            elif places is not None:
                seen |= {places[k] for k in read[result]} if places else set()
            else:
                seen |= _of_parts(value, made, read[result])
    return seen


def _of_parts(value: Stacked, made: Stacked, read: set[int]) -> set[int]:
    """Return the positions of the segments that are looked at whole after an operator that keeps their order."""
    if len(made.parts) != len(value.parts):
        return set()
    seen: set[int] = set()
    old = new = 0
    for before, after in zip(value.lengths, made.lengths, strict=True):
        if read.issuperset(range(new, new + after)):
            seen |= set(range(old, old + before))
        old, new = old + before, new + after
    return seen


def _taken(node: fx.Node, user: fx.Node, value: Stacked) -> Any:
    """Return the positions that a user takes from the axis, in order, or a dictionary of them for several results.

    ``None`` stands for a use that picks nothing. An index whose values are not known counts for nothing, and so does an
    operator that writes into some of the positions.
    """
    name, target = operator_of(user), user.target
    if name in ("aten.index", "aten.select_scatter", "aten.slice_scatter"):
        return []
    if name not in _PICK or user.args[0] is not node or not isinstance(target, torch._ops.OpOverload):
        return None
    size, bound = sum(value.lengths), bind(target, user.args, user.kwargs)
    if "dim" in bound and bound["dim"] % value.ndim != value.dim:
        return None
    positions = torch.arange(size).reshape([size if k == value.dim else 1 for k in range(value.ndim)])
    made: Any = target(positions, *user.args[1:], **user.kwargs)
    if isinstance(made, Tensor):
        return made.flatten().tolist()
    return {k: part.flatten().tolist() for k, part in enumerate(made)}
