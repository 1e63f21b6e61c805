"""Operators that only move entries, and where the channels of a value go.

A move copies entries to places that do not depend on their values. So where they go is *computed*, by letting it move
the numbers of the channels; nothing is concluded from an experiment with values.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from isthmus.folding._graph import LiveWay, kind_of, operands, shape_of
from isthmus.symmetry import DROPOUTS, SAME_ENTRIES, bound_arguments

__all__ = [
    "Channels",
    "StatePart",
    "carried",
    "is_move",
    "part_of",
    "uses_of",
    "whole_axis",
    "whole_source_axis",
]

_VIEWS = frozenset(
    [
        *("view", "_unsafe_view", "reshape", "flatten", "unflatten", "unsqueeze", "squeeze"),
        *("t", "transpose", "permute", "numpy_T", "mT", "movedim", "swapaxes", "swapdims"),
        *("select", "slice", "narrow", "unbind", "split", "split_with_sizes", "chunk", "tensor_split"),
    ]
)
"""Their results are views of the operand, each entry once (where memory allows; that is asked)."""
_SAME = SAME_ENTRIES | DROPOUTS  # traced in evaluation mode, where dropout passes entries along
"""Every entry stays where it is; another floating dtype may hold it."""
_SPREADING = frozenset(["expand", "broadcast_to", "repeat", "tile", "flip", "roll"])
_LOOKUPS = frozenset(["index", "index_select"])
"""Positions along some axes are chosen by numbers; the other axes are as before, whatever the numbers are."""


@dataclass(frozen=True)
class Channels:
    """Which channel every entry of a value belongs to: ``index[p]`` for position ``p`` along ``axis``.

    Attributes:
        axis: of the value.
        index: channel of each position, int64.
        plain: whether entries are those of the source, unscaled and with nothing between them: what is constant in
            the source (a norm's bias) is then the same constant everywhere.
    """

    axis: int
    index: Tensor
    plain: bool = True

    @classmethod
    def of(cls, axis: int, count: int) -> Channels:
        """Return those of a value whose axis lists all channels in order."""
        return cls(axis, torch.arange(count))


def is_move(node: fx.Node) -> bool:
    """Whether an operator only moves (or copies) entries of its first operand."""
    kind = kind_of(node)
    if kind == "getitem":
        return True
    if kind in _SAME:
        value = node.meta.get("val")
        return isinstance(value, Tensor) and value.is_floating_point()
    if kind in _LOOKUPS:
        return True
    return kind in _VIEWS | _SPREADING and len(node.all_input_nodes) == 1


def carried(node: fx.Node, source: fx.Node, channels: Any) -> Any:
    """Return where a move takes channels; ``None`` if they do not end up along one axis.

    Args:
        node: the move.
        source: the operand that they sit on.
        channels: of the operand; a list of them for an operand that is several values.

    Returns:
        Channels of the result, or a list where it is several values.
    """
    kind = kind_of(node)
    if kind == "getitem":
        return channels[int(node.args[1])] if isinstance(channels, list) else None  # pyright: ignore
    if not isinstance(channels, Channels) or operands(node)[0] is not source:
        return None
    if kind in _SAME:
        return channels
    if kind in _LOOKUPS and not _looks_elsewhere(node, channels.axis):
        return None
    numbers = _along(shape_of(source), channels.axis, channels.index)
    moved = _run(node, source, numbers)
    if isinstance(moved, (list, tuple)):
        return [_sitting(m, channels) for m in moved]
    return _sitting(moved, channels)


def _sitting(numbers: Tensor, channels: Channels) -> Channels | None:
    """Read off a tensor of channel numbers the one axis along which they vary."""
    varying = [k for k in range(numbers.ndim) if _varies(numbers, k)]
    if len(varying) != 1 or not numbers.numel():
        return None
    row = numbers.movedim(varying[0], -1).reshape(-1, numbers.shape[varying[0]])[0]
    return replace(channels, axis=varying[0], index=row.clone())


def whole_axis(node: fx.Node, source: fx.Node, axis: int) -> Any:
    """Return the axis of a move's result along which the entries of every fibre of the operand lie together, whole.

    A fibre is what lies along an axis, all other places fixed. ``None`` where fibres are cut, joined or mixed; a list
    for a move with several results.
    """
    shape = shape_of(source)
    if kind_of(node) == "getitem":
        return None
    moved = carried(node, source, Channels.of(axis, shape[axis]))
    several = isinstance(moved, list)
    found: list[int | None] = []
    for k, channels in enumerate(moved if several else [moved]):
        if channels is None or not _all_of(channels.index, shape[axis]):
            found.append(None)
            continue
        others = (o for o in range(len(shape)) if o != axis and shape[o] > 1)
        same = kind_of(node) in _SAME | _LOOKUPS
        together = same or all(not _varies(_result(node, source, o, k), channels.axis) for o in others)
        found.append(channels.axis if together else None)
    return found if several else found[0]


def _result(node: fx.Node, source: fx.Node, axis: int, which: int) -> Tensor:
    """Return the positions along an axis of a move's operand, in one of its results."""
    shape = shape_of(source)
    places = _run(node, source, _along(shape, axis, torch.arange(shape[axis])))
    return places[which] if isinstance(places, (list, tuple)) else places


def _all_of(index: Tensor, count: int) -> bool:
    """Whether channels are all of them, each once."""
    return torch.equal(index.sort().values, torch.arange(count))


def whole_source_axis(node: fx.Node, source: fx.Node, axis: int, result: int | None = None) -> int | None:
    """Return the axis of a move's operand whose fibres are those of the result along ``axis``; ``None`` if none is.

    Args:
        node: the move.
        source: its operand.
        axis: of the result.
        result: which of several results.
    """
    for candidate in range(len(shape_of(source))):
        found = whole_axis(node, source, candidate)
        if (found if result is None else found[result] if isinstance(found, list) else None) == axis:
            return candidate
    return None


def _looks_elsewhere(node: fx.Node, axis: int) -> bool:
    """Whether a look-up chooses positions along other axes than this one."""
    bound = bound_arguments(node)
    if "indices" in bound:
        chosen = list(bound["indices"])
        if any(isinstance(n, fx.Node) and n.meta["val"].dtype == torch.bool for n in chosen):
            return False  # a mask, which chooses how many
        return axis >= len(chosen) or chosen[axis] is None
    return int(bound["dim"]) % len(shape_of(bound["self"])) != axis


def _along(shape: tuple[int, ...], axis: int, numbers: Tensor) -> Tensor:
    return numbers.reshape([-1 if k == axis else 1 for k in range(len(shape))]).expand(shape)


def _run(node: fx.Node, source: fx.Node, value: Tensor) -> Any:
    """Run a move on whole numbers; positions that it looks up are taken to be the first ones."""

    def given(other: fx.Node) -> Tensor:
        return value if other is source else torch.zeros(shape_of(other), dtype=torch.int64)

    if kind_of(node) in ("view", "_unsafe_view"):
        return value.reshape(list(node.args[1]))  # pyright: ignore
    args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), given)
    return node.target(*args, **kwargs)  # pyright: ignore


def _varies(numbers: Tensor, axis: int) -> bool:
    if numbers.shape[axis] < 2 or numbers.stride(axis) == 0:
        return False
    return bool((numbers != numbers.narrow(axis, 0, 1)).any())


@dataclass(frozen=True)
class StatePart:
    """A tensor of the state, or the part of it that an operator is given: a view that can be written.

    Attributes:
        name: of the tensor (the first of its names).
        steps: the moves that make the part, each an operator and its other arguments.
    """

    name: str
    steps: tuple[fx.Node, ...] = ()

    def of(self, tensor: Tensor) -> Tensor:
        """Return the part of a tensor, sharing its memory.

        Raises:
            RuntimeError: the moves make a copy.
        """
        value: Any = tensor
        for node in self.steps:
            value = _viewed(node, value)
        return value

    def key(self, shape: tuple[int, ...]) -> tuple[Any, ...] | None:
        """Return what two parts of one tensor have in common exactly if they are the same entries in one layout.

        ``None`` where the part is no view in which every entry stands once.
        """
        try:
            view = self.of(torch.empty(shape, device="meta"))
        except (RuntimeError, TypeError, ValueError, IndexError):
            return None
        if any(n > 1 and s == 0 for n, s in zip(view.shape, view.stride(), strict=True)):
            return None
        return (view.storage_offset(), tuple(view.shape), tuple(view.stride()))

    def entries(self, shape: tuple[int, ...]) -> Tensor:
        """Return the positions in the flattened tensor of all entries of the part."""
        return self.of(torch.arange(torch.Size(shape).numel()).reshape(shape)).flatten()


def _viewed(node: fx.Node, value: Any) -> Any:
    kind = kind_of(node)
    if kind in _SAME:
        return value
    if kind == "getitem":
        return value[int(node.args[1])]  # pyright: ignore
    if kind in ("reshape", "_unsafe_view"):
        return value.view(list(node.args[1]))  # pyright: ignore
    if kind == "flatten":
        bound = bound_arguments(node)
        joined = value.flatten(int(bound["start_dim"]), int(bound["end_dim"]))
        return value.view(joined.shape)
    args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), lambda n: value)
    return node.target(*args, **kwargs)  # pyright: ignore


def part_of(way: LiveWay, node: Any) -> StatePart | None:
    """Return which part of a tensor of the state an operand is; ``None`` if it is computed otherwise."""
    steps: list[fx.Node] = []
    while isinstance(node, fx.Node) and node.op == "call_function":
        if not is_move(node) or kind_of(node) in _SPREADING | _LOOKUPS or len(node.all_input_nodes) != 1:
            return None
        steps.append(node)
        node = node.all_input_nodes[0]
    name = way.tensor_of(node) if isinstance(node, fx.Node) else None
    return None if name is None else StatePart(name, tuple(reversed(steps)))


def uses_of(way: LiveWay, name: str) -> Iterable[tuple[fx.Node, fx.Node]]:
    """Yield who uses a tensor of the state: an operator that is no view of it, and the operand that it is given."""
    waiting = list(way.placeholders.get(name, ()))
    while waiting:
        operand = waiting.pop()
        if operand in way.kept:
            yield operand, operand
        for user in way.users(operand):
            if (
                kind_of(user) not in _SPREADING | _LOOKUPS
                and is_move(user)
                and len(user.all_input_nodes) == 1
            ):
                waiting.append(user)
            else:
                yield user, operand
