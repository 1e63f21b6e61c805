"""Streams: values that are added up and read through norms that ignore their mean over the channels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import fx

from isthmus.folding._graph import LiveWay, described, kind_of, operands, shape_of
from isthmus.folding._moves import StatePart, is_move, part_of, whole_axis, whole_source_axis
from isthmus.folding._norms import Norm, ignores_mean, reads_without_mean
from isthmus.folding._pools import POOLS, after_pooling, before_pooling
from isthmus.folding._products import product_writing
from isthmus.symmetry import bound_arguments, module_of

__all__ = ["NotCentred", "ResidualStream", "Writer", "stream_of"]

_SHAPES_ONLY = frozenset(
    [
        *("zeros_like", "ones_like", "empty_like", "full_like", "rand_like", "randn_like"),
        *("new_zeros", "new_ones", "new_full", "new_empty"),
    ]
)
_ZEROS = frozenset({"zeros", "zeros_like", "new_zeros"})
_SUMS = frozenset({"add", "sub", "rsub"})


class NotCentred(Exception):
    """The mean over the channels of a stream cannot be taken out of what writes it; the text says why."""


@dataclass(frozen=True)
class Writer:
    """A tensor of the state that writes a stream, linear in it along one axis: what it writes is its channels.

    Attributes:
        part: the part of the tensor that an operator is given.
        axis: of the part, which lists the channels.
        user: the operator.
        operand: what it is given.
    """

    part: StatePart
    axis: int
    user: fx.Node
    operand: fx.Node


@dataclass
class ResidualStream:
    """Values of one graph that are added, moved and multiplied by numbers, and nothing else.

    Attributes:
        way: the graph.
        axes: the axis of every value that lists the channels.
        writers: tensors of the state that write it.
    """

    way: LiveWay
    axes: dict[fx.Node, int] = field(default_factory=dict)
    writers: list[Writer] = field(default_factory=list)


def stream_of(way: LiveWay, node: fx.Node, axis: int, norms: Mapping[fx.Node, Norm]) -> ResidualStream:
    """Return the stream that a value belongs to.

    Args:
        way: the graph.
        node: the value.
        axis: of the value, its channels.
        norms: the norms of the graph, by the node of their result.

    Raises:
        NotCentred: something else reads it, or writes it; the text names it.
    """
    walk = _StreamWalk(way, ResidualStream(way), norms)
    walk.waiting.append((node, axis))
    while walk.waiting or walk.unread:
        if walk.waiting:
            walk.take(*walk.waiting.pop(0))
        else:
            walk.read(walk.unread.pop(0))
    return walk.stream


@dataclass
class _StreamWalk:
    way: LiveWay
    stream: ResidualStream
    norms: Mapping[fx.Node, Norm]
    waiting: list[tuple[fx.Node, int]] = field(default_factory=list)
    unread: list[fx.Node] = field(default_factory=list)

    def take(self, node: fx.Node, axis: int) -> None:
        """Add a value, and what makes it."""
        known = self.stream.axes.get(node)
        if known == axis:
            return
        if known is not None:
            raise NotCentred(f"{described(node)} mixes its channels with positions")
        self.stream.axes[node] = axis
        if node in self.way.kept:
            raise NotCentred(f"{described(node)} is an output of the network")
        self._made(node, axis)
        self.unread.append(node)

    def read(self, node: fx.Node) -> None:
        """Add what reads a value."""
        for user in self.way.users(node):
            self._read(user, node, self.stream.axes[node])

    # What makes a value

    def _made(self, node: fx.Node, axis: int) -> None:
        part = part_of(self.way, node)
        kind = kind_of(node)
        if part is not None:
            self._written(part, axis, None, node)
        elif node.op == "placeholder":
            raise NotCentred(f"{_outside(self.way, node)} is added to it")
        elif node in self.norms:
            raise NotCentred(
                f"the norm {self.norms[node].name!r} writes into it without a layer in between (post-norm)"
            )
        elif kind in _ZEROS:
            return
        elif kind == "getitem" or is_move(node):
            self._moved_here(node, axis)
        elif kind in _SUMS or kind in ("mul", "div", "cat", "masked_fill", "neg"):
            self._combined(node, kind, axis)
        elif kind in POOLS:
            before = before_pooling(node, axis)
            if before is None:
                raise NotCentred(f"{described(node)} sums over its channels")
            self.waiting.append(before)
        elif kind == "embedding":
            self._looked_up(node, axis)
        else:
            self._multiplied(node, axis)

    def _written(self, part: StatePart, axis: int, user: fx.Node | None, operand: fx.Node) -> None:
        users = self.way.users(operand) if user is None else [user]
        self.stream.writers += [Writer(part, axis, u, operand) for u in users]

    def _moved_here(self, node: fx.Node, axis: int) -> None:
        source, result, move = operands(node)[0], None, node
        if kind_of(node) == "getitem":
            move, result = source, int(node.args[1])  # pyright: ignore
            if not is_move(move):
                raise NotCentred(
                    f"{described(move)} writes it, which is not a layer that is known to be linear"
                )
            source = operands(move)[0]
        found = whole_source_axis(move, source, axis, result)
        if found is None:
            raise NotCentred(f"{described(move)} makes it from parts of other channels")
        self.waiting.append((source, found))

    def _combined(self, node: fx.Node, kind: str, axis: int) -> None:
        back, count = len(shape_of(node)) - axis, shape_of(node)[axis]
        bound = bound_arguments(node)
        if kind == "cat":
            if int(bound["dim"]) % len(shape_of(node)) == axis:
                raise NotCentred(f"{described(node)} puts parts of its channels together")
            self.waiting += [(n, axis) for n in bound["tensors"] if len(shape_of(n)) == len(shape_of(node))]
            return
        first, second = bound["self"], bound.get("other")
        if kind in _SUMS:
            for operand in (first, second):
                if not isinstance(operand, fx.Node) or _length(operand, back) != count:
                    raise NotCentred(f"{described(node)} adds one number to all of its channels")
                self.waiting.append((operand, len(shape_of(operand)) - back))
            return
        if kind == "masked_fill" and (bound["value"] != 0 or _length(bound["mask"], back) != 1):
            raise NotCentred(f"{described(node)} fills in numbers")
        if bound.get("rounding_mode") is not None:
            raise NotCentred(f"{described(node)} rounds")
        whole = [
            n for n in (first, second) if isinstance(n, fx.Node) and _length(n, back) == count and count > 1
        ]
        if whole != [first] and (kind == "div" or len(whole) != 1):
            raise NotCentred(f"{described(node)} multiplies its channels by factors of their own")
        self.waiting.append((whole[0], len(shape_of(whole[0])) - back))

    def _looked_up(self, node: fx.Node, axis: int) -> None:
        bound = bound_arguments(node)
        part = part_of(self.way, bound["weight"])
        if part is None or axis != len(shape_of(node)) - 1:
            raise NotCentred(f"{described(node)} writes it from a table that is not a tensor of the state")
        self._written(part, 1, node, bound["weight"])

    def _multiplied(self, node: fx.Node, axis: int) -> None:
        computed = ""
        for product in product_writing(node):
            part = part_of(self.way, product.weight)
            if part is None and any(out == axis for out in product.kept.values()):
                computed = f" with a weight that {described(product.weight)} computes"
            own = [a for a, out in product.kept.items() if out == axis]
            if part is None or not own:
                continue
            if product.groups > 1:
                raise NotCentred(f"{described(node)} writes it in groups of channels")
            self._written(part, own[0], node, product.weight)
            if product.bias is not None:
                self._added(product.bias, node, axis)
            return
        what = computed or ", which is not a layer that is known to be linear"
        raise NotCentred(f"{described(node)} writes it{what}")

    def _added(self, bias: Any, node: fx.Node, axis: int) -> None:
        part = part_of(self.way, bias) if isinstance(bias, fx.Node) else None
        shape, count = shape_of(bias), shape_of(node)[axis]
        last = len(shape) - 1 if not kind_of(node).startswith("conv") else 0
        behind = len(shape_of(node)) - 1 - axis if not kind_of(node).startswith("conv") else 0
        own = last - behind
        if part is None or own < 0 or shape[own] != count:
            raise NotCentred(
                f"{described(node)} adds a bias that is not a tensor of the state along its channels"
            )
        self._written(part, own, node, bias)

    # What reads a value

    def _read(self, user: fx.Node, node: fx.Node, axis: int) -> None:
        kind = kind_of(user)
        norm = self._norm_at(user)
        last = axis == len(shape_of(node)) - 1 and operands(user).count(node) == 1
        if norm is not None and ignores_mean(norm) and norm.source is node and last:
            return
        if reads_without_mean(self.way, node, axis, user):
            return
        if kind in _SHAPES_ONLY:
            return
        if kind == "getitem":
            return  # taken with the operator that splits
        if is_move(user):
            self._moved_on(user, node, axis)
            return
        if kind in _SUMS or kind in ("mul", "div", "cat", "masked_fill", "neg"):
            back = len(shape_of(node)) - axis
            self.waiting.append((user, len(shape_of(user)) - back))
            return
        if kind in POOLS and (after := after_pooling(user, node, axis)) is not None:
            self.waiting.append((user, after))
            return
        where = module_of(user)
        raise NotCentred(
            f"{kind or described(user)}{f' in {where!r}' if where else ''} reads it, which is no such norm"
        )

    def _norm_at(self, user: fx.Node) -> Norm | None:
        results = (user, *(n for n in user.users if kind_of(n) == "getitem"))
        return next((self.norms[n] for n in results if n in self.norms), None)

    def _moved_on(self, user: fx.Node, node: fx.Node, axis: int) -> None:
        found = whole_axis(user, node, axis)
        for k, own in enumerate(found if isinstance(found, list) else [found]):
            results = (
                [user] if not isinstance(found, list) else [n for n in self.way.users(user) if n.args[1] == k]
            )
            if own is None and results:
                raise NotCentred(f"{described(user)} reads parts of its channels")
            self.waiting += [(result, own) for result in results if own is not None]


def _length(node: fx.Node, back: int) -> int:
    """Return the length of an axis counted from the end, 1 where an operand lacks it."""
    shape = shape_of(node)
    return shape[len(shape) - back] if len(shape) >= back else 1


def _outside(way: LiveWay, node: fx.Node) -> str:
    if node.name in way.traced.constants:
        held = way.traced.held.get(node.name)
        place = ".".join(p for p in held if p) if held else node.name
        return f"the constant {place!r}, which is not in the state,"
    return f"the input {node.name!r}"
