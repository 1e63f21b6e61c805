"""Values kept in segments: a fused projection that is cut again keeps its parts apart.

``qkv.view(batch, tokens, 3, heads, size)`` followed by ``qkv[:, :, 0]`` uses three independent parts. Read as a
product, the axis would tie the order of heads and dimensions in all three. So where a first interpretation finds
that an axis made by a reshape is cut later, a second one reads that reshape as a lazy concatenation
(:class:`Stacked`). Operators that only move entries keep the segments apart; any other one, and any use of the
whole, joins them again, which only removes permutations.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx

from isthmus.symmetry import _axes
from isthmus.symmetry._axes import Atom, Expression, Fixed, Sum, UnsplittableError, resolve
from isthmus.symmetry._interpret import Interpreter
from isthmus.symmetry._operation import Operation, rule_of
from isthmus.symmetry._ties import Ties
from isthmus.symmetry._values import Value, values_in

__all__ = ["Cuts", "SegmentingInterpreter", "joined"]

Cuts = dict[fx.Node, tuple[int, tuple[int, ...]]]
"""From reshape node to the axis of its output that is cut later, and the lengths of the segments."""

_RESHAPES = ("aten.view", "aten.reshape", "aten._unsafe_view", "aten.unflatten", "aten._reshape_alias")
_KEEP = (
    "aten.clone",
    "aten.contiguous",
    "aten.to",
    "aten._to_copy",
    "aten.detach",
    "aten.alias",
    "aten.type_as",
)
_TAKE_SEGMENTS = ("aten.lstm", "aten.gru", "aten.rnn_tanh", "aten.rnn_relu")
_MOST_SEGMENTS = 64


@dataclass(frozen=True)
class Stacked:
    """A lazy concatenation of values along one axis."""

    dim: int
    parts: tuple[Value, ...]

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return self.parts[0].ndim

    @property
    def lengths(self) -> tuple[int, ...]:
        """Length of each segment."""
        return tuple(p.shape[self.dim] for p in self.parts)

    def join(self) -> Value:
        """Return the plain value: all other axes move alike in every segment."""
        first = self.parts[0]
        for part in self.parts[1:]:
            for k in range(self.ndim):
                if k != self.dim:
                    _axes.unify(first.axes[k], part.axes[k])
        axes = list(first.axes)
        axes[self.dim] = resolve(Sum(tuple(p.axes[self.dim] for p in self.parts)))
        return Value(tuple(axes))

    def moved(self, order: Sequence[int]) -> Stacked:
        """Return the value with its axes in another order."""
        parts = tuple(Value(tuple(p.axes[k] for k in order)) for p in self.parts)
        return Stacked(list(order).index(self.dim), parts)

    def range(self, start: int, length: int) -> Stacked | Value | None:
        """Return whole segments from ``start`` on, or ``None`` if the range cuts through one."""
        taken: list[Value] = []
        position = 0
        for part, size in zip(self.parts, self.lengths, strict=True):
            if start <= position and position + size <= start + length:
                taken.append(part)
            elif position < start + length and start < position + size:
                return None
            position += size
        if not taken:
            return None
        return taken[0] if len(taken) == 1 else Stacked(self.dim, tuple(taken))


class SegmentingInterpreter(Interpreter):
    """An interpreter that notes which reshaped axes are cut, and keeps those it was told of in segments.

    Args:
        cuts: what an earlier interpretation of the same graph found.
        ties: proves which entries differ.
    """

    def __init__(self, cuts: Mapping[fx.Node, tuple[int, tuple[int, ...]]], ties: Ties) -> None:
        super().__init__(ties)
        self.known_cuts = cuts
        self._reshaped: dict[fx.Node, Value] = {}

    def cuts(self) -> Cuts:
        """Return the reshapes whose output axes were cut, with the lengths of the segments."""
        found: Cuts = dict(self.known_cuts)
        for node, value in self._reshaped.items():
            for dim, axis in enumerate(value.axes):
                form = resolve(axis)
                inner = math.prod(value.shape[dim + 1 :])
                # a cut into single positions leaves nothing that could move, so it shows as a fixed axis
                if (
                    node not in found
                    and inner > 1
                    and isinstance(axis, Atom)
                    and isinstance(form, (Sum, Fixed))
                ):
                    lengths = _lengths(form)
                    if len(lengths) <= _MOST_SEGMENTS:
                        found[node] = (dim, lengths)
        return found

    def all_values(self) -> list[Value]:
        """Return the labels of all nodes, those of segments too."""
        return [v for value in self.values.values() for v in values_in(value)]

    def _higher_order(self, op: Operation, node: fx.Node, args: Any, kwargs: Any) -> Any:
        return super()._higher_order(op, node, joined(args), joined(kwargs))

    def call(self, node: fx.Node, op: Operation, bound: dict[str, Any]) -> Any:
        """Handle operators on segments; everything else as the plain interpreter does."""
        x = bound.get("x")
        if op.name in _RESHAPES and node in self.known_cuts and isinstance(x, Value) and x.points is None:
            made = _segmented_reshape(op, x, *self.known_cuts[node])
            if made is not None:
                return made
        if isinstance(x, Stacked):
            moved = _move(op, x, bound)
            if moved is not None:
                return moved
        apart = ("hx",) if op.name in _TAKE_SEGMENTS else ()
        bound = {k: v if k in apart else joined(v) for k, v in bound.items()}
        result = super().call(node, op, bound)
        if op.name in _RESHAPES and isinstance(result, Value) and node not in self.known_cuts:
            self._reshaped[node] = _snapshot(bound["x"], result)
        return result


def _snapshot(source: Any, result: Value) -> Value:
    """Return the output of a reshape whose axes are new atoms (an axis that was there before is not made here)."""
    old = {id(resolve(a)) for a in source.axes}
    return Value(tuple(_axes.ONE if id(resolve(a)) in old else a for a in result.axes))


def _lengths(form: Sum | Fixed) -> tuple[int, ...]:
    """Return segment lengths; runs of single positions were fused, so they are taken apart again."""
    lengths: list[int] = []
    for part in form.parts if isinstance(form, Sum) else (form,):
        whole = next(_axes.atoms_of(part), None) is not None
        lengths += [part.size] if whole else [1] * part.size
    return tuple(lengths)


def joined(tree: Any) -> Any:
    """Return arguments or results with all segments joined into plain values."""
    if isinstance(tree, Stacked):
        return tree.join()
    if isinstance(tree, (tuple, list)):
        return type(tree)(joined(t) for t in tree)
    return tree


def _segmented_reshape(op: Operation, x: Value, dim: int, lengths: Sequence[int]) -> Stacked | None:
    shape = op.shape
    inner = math.prod(shape[dim + 1 :])
    try:
        lead, rest = _axes.split_trailing(_axes.product_of(x.axes), shape[dim] * inner)
        segments: list[Expression] = []
        for length in lengths[:-1]:
            head, rest = _axes.cut(rest, length * inner)
            segments.append(head)
        outer = _peeled(lead, shape[:dim])
        inners = [_peeled(s, (n, *shape[dim + 1 :])) for s, n in zip((*segments, rest), lengths, strict=True)]
    except UnsplittableError:
        return None
    return Stacked(dim, tuple(Value((*outer, *part)) for part in inners))


def _peeled(whole: Expression, shape: Sequence[int]) -> list[Expression]:
    axes: list[Expression] = []
    for size in reversed(shape):
        whole, axis = _axes.split_trailing(whole, size)
        axes.insert(0, axis)
    return axes


def _move(op: Operation, x: Stacked, bound: Mapping[str, Any]) -> Any:
    """Return the result of an operator that only moves entries, or ``None``."""
    order = list(range(x.ndim))
    if op.name in _KEEP:
        return x
    if op.name == "aten.permute":
        return x.moved([d % x.ndim for d in bound["dims"]])
    if op.name == "aten.transpose":
        one, two = bound["dim0"] % x.ndim, bound["dim1"] % x.ndim
        order[one], order[two] = two, one
        return x.moved(order)
    if op.name == "aten.movedim" and isinstance(bound["source"], int):
        order.insert(bound["destination"] % x.ndim, order.pop(bound["source"] % x.ndim))
        return x.moved(order)
    if op.name == "aten.unsqueeze":
        place = bound["dim"] % (x.ndim + 1)
        parts = tuple(Value((*p.axes[:place], _axes.ONE, *p.axes[place:])) for p in x.parts)
        return Stacked(x.dim + (place <= x.dim), parts)
    if op.name == "aten.squeeze" and isinstance(bound.get("dim"), int) and bound["dim"] % x.ndim != x.dim:
        place = bound["dim"] % x.ndim
        if x.parts[0].shape[place] != 1:
            return x
        parts = tuple(Value((*p.axes[:place], *p.axes[place + 1 :])) for p in x.parts)
        return Stacked(x.dim - (place < x.dim), parts)
    if op.name == "aten.index":
        places = [k for k, i in enumerate(bound["indices"]) if i is not None]
        start = bound["indices"][places[0]].run if len(places) == 1 else None
        if start is not None and places[0] == x.dim:
            return x.range(start % sum(x.lengths), op.shape[x.dim])
        return None
    if "dim" in bound and isinstance(bound["dim"], int) and bound["dim"] % x.ndim == x.dim:
        return _along(op, x, bound)
    return None


def _along(op: Operation, x: Stacked, bound: Mapping[str, Any]) -> Any:
    """Return whole segments picked by a selection, a slice or a split along the stacked axis."""
    size = sum(x.lengths)
    if op.name in ("aten.select", "aten.select_copy"):
        return _without(x.range(bound["index"] % size, 1), x.dim)
    if op.name in ("aten.unbind", "aten.unbind_copy"):
        single = [_without(x.range(k, 1), x.dim) for k in range(size)]
        return None if None in single else tuple(single)
    if op.name in ("aten.slice", "aten.narrow") and bound.get("step", 1) == 1:
        start = bound.get("start") or 0
        start = max(start + size, 0) if start < 0 else min(start, size)
        return x.range(start, op.shape[x.dim])
    if isinstance(op.result, (tuple, list)) and rule_of(op.name) == rule_of("aten.split"):
        starts = [sum(int(r.shape[x.dim]) for r in op.result[:k]) for k in range(len(op.result))]
        taken = [x.range(s, int(r.shape[x.dim])) for s, r in zip(starts, op.result, strict=True)]
        return None if None in taken else tuple(taken)
    return None


def _without(value: Stacked | Value | None, dim: int) -> Value | None:
    if not isinstance(value, Value) or value.shape[dim] != 1:
        return None
    return Value((*value.axes[:dim], *value.axes[dim + 1 :]))
