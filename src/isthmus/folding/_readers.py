"""Who reads what a norm gives: every reader must be a product with a tensor of the state, through moves only."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx

from isthmus.folding._graph import LiveWay, described, kind_of, shape_of
from isthmus.folding._moves import Channels, StatePart, carried, is_move, part_of
from isthmus.folding._pools import POOLS, after_pooling, constant_pooling
from isthmus.folding._products import WeightProduct, product_with
from isthmus.symmetry import bound_arguments

__all__ = ["WeightLengths", "NotLinear", "Reader", "readers_of"]


class NotLinear(Exception):
    """Something that reads a value is not known to be linear in it; the text, which the plan passes on, says what."""


@dataclass(frozen=True)
class WeightLengths:
    """The lengths by which a normalised weight ``g v / |v|`` is multiplied.

    Attributes:
        part: the tensor ``g``.
        dim: the axis of ``v`` along which there is one for each position.
        node: the operator that makes the weight.
        operands: what it is given, ``v`` and ``g``.
    """

    part: StatePart
    dim: int
    node: fx.Node
    operands: tuple[fx.Node, fx.Node]

    def of(self, directions: Tensor) -> Tensor:
        """Return the lengths of directions, with their other axes kept at length 1."""
        others = [k for k in range(directions.ndim) if k != self.dim % directions.ndim]
        return torch.linalg.vector_norm(directions, dim=others, keepdim=True)


@dataclass(frozen=True)
class Reader:
    """A product whose summed axis meets the channels of a norm.

    Attributes:
        product: the operator.
        weight: the part of the state's tensor that it multiplies by; the directions of a normalised weight.
        lengths: of a normalised weight, else ``None``.
        axis: of that part, summed with the channels.
        index: the channel of every position along the axis, int64; with groups, of every position along the channels.
        bias: the part of the state's tensor that it adds, or that the only reader of its result adds; ``None`` if none.
        bias_user: the operator that adds the bias.
        bias_operand: what it is given.
        bias_axes: axis of the weight's part that each axis of the bias's part follows, -1 for one of length 1 that
            follows none.
        constant: whether a constant along the channels can be moved into the bias.
    """

    product: WeightProduct
    weight: StatePart
    lengths: WeightLengths | None
    axis: int
    index: Tensor
    bias: StatePart | None
    bias_user: fx.Node | None
    bias_operand: fx.Node | None
    bias_axes: tuple[int, ...]
    constant: bool

    @property
    def weight_use(self) -> tuple[fx.Node, fx.Node]:
        """The operator that is given the weight, and what it is given."""
        if self.lengths is not None:
            return self.lengths.node, self.lengths.operands[0]
        return self.product.node, self.product.weight

    def matrix(self, look: Callable[[str], Tensor]) -> Tensor:
        """Return what it multiplies by.

        Args:
            look: from the name of a tensor to its value.
        """
        weight = self.weight.of(look(self.weight.name))
        if self.lengths is None:
            return weight
        lengths = self.lengths.part.of(look(self.lengths.part.name))
        return weight * (lengths / self.lengths.of(weight))


def readers_of(way: LiveWay, node: fx.Node, axis: int) -> list[Reader]:
    """Return all readers of a value whose axis lists channels.

    Raises:
        NotLinear: something else reads it; the text names it.
    """
    found: list[Reader] = []
    waiting: list[tuple[fx.Node, object]] = [(node, Channels.of(axis, shape_of(node)[axis]))]
    while waiting:
        value, channels = waiting.pop()
        if value in way.kept:
            raise NotLinear("its output is an output of the network")
        for user in way.users(value):
            if is_move(user):
                moved = carried(user, value, channels)
                if moved is None or (isinstance(moved, list) and None in moved):
                    raise NotLinear(f"where {described(user)} takes its channels cannot be followed")
                waiting.append((user, moved))
                continue
            assert isinstance(channels, Channels), "only moves read several values"
            passed = _passed(user, value, channels)
            if passed is not None:
                waiting.append((user, passed))
            else:
                found.append(_reader(way, user, value, channels))
    if not found:
        raise NotLinear("nothing reads its output")
    return found


def _passed(node: fx.Node, value: fx.Node, channels: Channels) -> Channels | None:
    """Return channels after an operator that treats all of them alike.

    It is padding with zeros, one factor for all channels, or a sum or mean over other axes.
    """
    kind, bound = kind_of(node), {}
    if kind in ("mean", "sum") or kind in POOLS:
        axis = after_pooling(node, value, channels.axis)
        return (
            None
            if axis is None
            else replace(channels, axis=axis, plain=channels.plain and constant_pooling(node))
        )
    if kind in ("constant_pad_nd", "pad", "mul", "div"):
        bound = bound_arguments(node)
    if kind in ("constant_pad_nd", "pad"):
        sides = list(bound["pad"])
        first = len(shape_of(value)) - len(sides) // 2
        kept = channels.axis < first or not any(sides[2 * (len(shape_of(value)) - 1 - channels.axis) :][:2])
        plain = bound.get("mode", "constant") == "constant"
        zero = not plain or bound.get("value") in (None, 0, 0.0)
        between = plain and any(sides)
        return replace(channels, plain=channels.plain and not between) if kept and zero else None
    if kind in ("mul", "div") and bound.get("rounding_mode") is None:
        other = bound["other"] if bound["self"] is value else bound["self"]
        if kind == "div" and bound["self"] is not value:
            return None
        if not isinstance(other, fx.Node):
            return replace(channels, plain=False)
        back = len(shape_of(value)) - channels.axis
        shape = shape_of(other)
        alike = other is not value and shape_of(node) == shape_of(value)
        if alike and (len(shape) < back or shape[len(shape) - back] == 1):
            return replace(channels, plain=False)
    return None


def _reader(way: LiveWay, node: fx.Node, value: fx.Node, channels: Channels) -> Reader:
    product = product_with(node, value)
    if product is None:
        after = " (the residual stream goes on after the norm)" if kind_of(node) in ("add", "sub") else ""
        raise NotLinear(f"{described(node)} reads it{after}, which is not known to be a linear layer")
    weight, lengths = part_of(way, product.weight), None
    if weight is None:
        weight, lengths = _normalised_weight(way, product.weight, node)
    if weight is None:
        raise NotLinear(f"{described(node)} multiplies it by what {described(product.weight)} computes")
    if channels.axis not in product.summed:
        raise NotLinear(f"{described(node)} sums over another axis than its channels")
    bias, user, operand, axes = _bias(way, product)
    constant = channels.plain and product.constant and not product.scaled
    axis = product.summed[channels.axis]
    return Reader(product, weight, lengths, axis, channels.index, bias, user, operand, axes, constant)


def _normalised_weight(
    way: LiveWay, node: fx.Node, user: fx.Node
) -> tuple[StatePart, WeightLengths] | tuple[None, None]:
    """Return directions and lengths of a weight that ``weight_norm`` makes for one operator alone."""
    if kind_of(node) != "_weight_norm" or way.users(node) != [user] or node in way.kept:
        return None, None
    bound = bound_arguments(node)
    directions, lengths = part_of(way, bound["v"]), part_of(way, bound["g"])
    if directions is None or lengths is None:
        return None, None
    return directions, WeightLengths(lengths, int(bound["dim"]), node, (bound["v"], bound["g"]))


_Bias = tuple[StatePart | None, fx.Node | None, fx.Node | None, tuple[int, ...]]


def _bias(way: LiveWay, product: WeightProduct) -> _Bias:
    """Return the tensor that is added to a product's result, by itself or by the result's only reader."""
    node, result = product.bias, product.node
    user: fx.Node | None = result
    if node is None:
        users = way.users(result)
        if len(users) != 1 or kind_of(users[0]) != "add" or result in way.kept:
            return None, None, None, ()
        user, bound = users[0], bound_arguments(users[0])
        node = bound["other"] if bound["self"] is result else bound["self"]
        if bound.get("alpha", 1) != 1 or node is result or shape_of(user) != shape_of(result):
            return None, None, None, ()
    part = part_of(way, node) if isinstance(node, fx.Node) else None
    if part is None:
        return None, None, None, ()
    shape, rank = shape_of(node), len(shape_of(result))
    channels = (
        list(product.kept.values()) if kind_of(result).startswith("conv") and product.bias is node else []
    )
    first = channels[0] if channels else rank - len(shape)
    wanted = {out: axis for axis, out in product.kept.items()}
    places = {first + k: n for k, n in enumerate(shape) if n > 1 or first + k in wanted}
    if places != {out: shape_of(result)[out] for out in wanted}:
        return None, None, None, ()
    return part, user, node, tuple(wanted.get(first + k, -1) for k in range(len(shape)))
