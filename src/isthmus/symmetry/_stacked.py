"""Interpretation that keeps segments apart: a fused projection that is cut again, stacks, concatenations, shuffles.

``qkv.view(batch, tokens, 3, heads, size)`` followed by ``qkv[:, :, 0]`` uses three independent parts. Read as a
product, the axis would tie the order of heads and dimensions in all three. So where a first interpretation finds
that an axis made by a reshape is cut later, a second one reads that reshape as a lazy concatenation
(:class:`Stacked`). Operators that only move entries, or compute them one by one, keep the segments apart; any other
one, and any use of the whole, joins them again, which only removes permutations.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx

from isthmus.symmetry import _axes
from isthmus.symmetry._axes import Atom, Expression, Fixed, Sum, UnsplittableError, resolve
from isthmus.symmetry._interpret import Interpreter
from isthmus.symmetry._operation import Operation, rule_of
from isthmus.symmetry._segments import (
    MOST_SEGMENTS,
    RESHAPES,
    Stacked,
    joined,
    lengths_of,
    moved,
    peeled,
    regrouped,
    segmented,
    stacked,
)
from isthmus.symmetry._ties import Ties
from isthmus.symmetry._values import Value, values_in

__all__ = ["Cuts", "SegmentingInterpreter", "joined"]

Cuts = dict[fx.Node, tuple[int, tuple[int, ...]]]
"""From reshape node to the axis of its output that is cut later, and the lengths of the segments."""

_TAKE_SEGMENTS = ("aten.lstm", "aten.gru", "aten.rnn_tanh", "aten.rnn_relu")


class SegmentingInterpreter(Interpreter):
    """An interpreter that notes which reshaped axes are cut, and keeps those it was told of in segments.

    Args:
        cuts: what an earlier interpretation of the same graph found.
        ties: proves which entries differ.
    """

    def __init__(self, cuts: Mapping[fx.Node, tuple[int, tuple[int, ...]]], ties: Ties) -> None:
        super().__init__(ties)
        self.known_cuts = cuts
        self._reshaped: dict[fx.Node, tuple[tuple[int, ...], tuple[int, ...], Value]] = {}

    def cuts(self) -> Cuts:
        """Return the reshapes whose output axes were cut, with the lengths of the segments."""
        found: Cuts = dict(self.known_cuts)
        for node, (source, target, value) in self._reshaped.items():
            for dim, axis in enumerate(value.axes):
                form = resolve(axis)
                beside = next(new for _, new in regrouped(source, target) if dim in new)
                # a cut into single positions leaves nothing that could move, so it shows as a fixed axis
                if (
                    node not in found
                    and math.prod(target[k] for k in beside) > axis.size
                    and isinstance(axis, Atom)
                    and isinstance(form, (Sum, Fixed))
                ):
                    lengths = lengths_of(form)
                    if len(lengths) <= MOST_SEGMENTS:
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
        if op.name in RESHAPES and node in self.known_cuts and isinstance(x, Value) and x.points is None:
            made = _segmented_reshape(op, x, *self.known_cuts[node])
            if made is not None:
                return made
        if (stack := stacked(op, bound)) is not None:
            return stack
        if isinstance(x, Stacked) and (result := moved(op, x, bound)) is not None:
            return result
        plain = joined(x) if isinstance(x, Stacked) and op.name in RESHAPES else x
        if (
            isinstance(plain, Value)
            and node not in self.known_cuts
            and (apart := segmented(op, plain)) is not None
        ):
            return apart
        if (result := self._part_by_part(node, op, bound)) is not None:
            return result
        kept = ("hx",) if op.name in _TAKE_SEGMENTS else ()
        bound = {k: v if k in kept else joined(v) for k, v in bound.items()}
        result = super().call(node, op, bound)
        if op.name in RESHAPES and isinstance(result, Value) and node not in self.known_cuts:
            self._reshaped[node] = bound["x"].shape, op.shape, _snapshot(bound["x"], result)
        return result

    def _part_by_part(self, node: fx.Node, op: Operation, bound: dict[str, Any]) -> Stacked | None:
        """Compute the segments one by one where an operator does not look from one to another."""
        operands = {name: v for name, v in bound.items() if isinstance(v, (Value, Stacked))}
        listed = bound.get("tensors") if op.name == "aten.einsum" else None
        operands |= {f"tensors {k}": v for k, v in enumerate(listed or ())}
        segments = [v for v in operands.values() if isinstance(v, Stacked)]
        if (
            not segments
            or not isinstance(op.result, Tensor)
            or any(isinstance(v, Value) and v.points for v in operands.values())
        ):
            return None
        aligned = False
        if listed is not None:
            dim = _lettered(bound["equation"], listed)
        elif _is_entrywise(node, op) or _is_batched(op, operands.values(), segments):
            dim, aligned = _aligned(operands.values(), segments, len(op.shape)), True
        elif isinstance(operands.get("x"), Stacked) and len(segments) == 1:
            dim = _beside(op, segments[0], bound)
        else:
            dim = None
        if dim is None:
            return None
        parts: list[Value] = []
        place, start = segments[0].dim - segments[0].ndim, 0
        for k, length in enumerate(segments[0].lengths):
            own = {
                name: v.parts[k]
                if isinstance(v, Stacked)
                else _section(v, place, start, length)
                if aligned
                else v
                for name, v in operands.items()
            }
            start += length
            part = Operation(node, op.module)
            part.result = torch.empty((*op.shape[:dim], length, *op.shape[dim + 1 :]), device="meta")
            given = {**bound, **own} if listed is None else {**bound, "tensors": list(own.values())}
            made = super().call(node, part, given)
            if not isinstance(made, Value):
                return None
            parts.append(made)
        wholes = [s.whole for s in segments if s.whole is not None]
        for other in wholes[1:]:
            _axes.unify(wholes[0], other)
        return Stacked(dim, tuple(parts), wholes[0] if wholes else None)


_BESIDE = (
    "aten.index_select",
    "aten.softmax",
    "aten.log_softmax",
    "aten.sum",
    "aten.mean",
    "aten.amax",
    "aten.amin",
    "aten.logsumexp",
)


def _is_entrywise(node: fx.Node, op: Operation) -> bool:
    known = rule_of(op.name)
    if known is None:
        return torch.Tag.pointwise in getattr(node.target, "tags", ())
    return known in (rule_of("aten.where"), rule_of("aten.clone"))


def _is_batched(op: Operation, operands: Iterable[Value | Stacked], segments: Sequence[Stacked]) -> bool:
    """Return whether an operator multiplies matrices and the segments are matrices of a batch."""
    return (
        op.name in ("aten.matmul", "aten.bmm")
        and all(v.ndim >= 2 for v in operands)
        and all(s.dim < s.ndim - 2 for s in segments)
    )


def _aligned(operands: Iterable[Value | Stacked], segments: Sequence[Stacked], rank: int) -> int | None:
    """Return the axis of the result that holds the segments of all operands, if they agree."""
    places = {(s.dim - s.ndim, s.lengths) for s in segments}
    if len(places) > 1:
        return None
    place = next(iter(places))[0]
    whole = all(
        isinstance(v, Stacked) or v.ndim < -place or v.shape[place] == 1 or _at_rest(v.axes[place])
        for v in operands
    )
    return rank + place if whole else None


def _at_rest(axis: Expression) -> bool:
    """Return whether nothing moves on an axis, so that it may be cut anywhere."""
    return all(atom.pinned is not None and not atom.copies for atom in _axes.atoms_of(axis))


def _section(v: Value, place: int, start: int, length: int) -> Value:
    """Return what of a plain operand meets one segment of the others."""
    if v.ndim < -place or v.shape[place] == 1:
        return v
    size, dim = v.shape[place], v.ndim + place
    _, kept = _axes.cut(v.axes[dim], start) if start else (_axes.ONE, v.axes[dim])
    kept = _axes.cut(kept, length)[0] if start + length < size else kept
    return replace(v, axes=(*v.axes[:dim], kept, *v.axes[dim + 1 :]), run=None)


def _lettered(equation: str, operands: Sequence[Value | Stacked]) -> int | None:
    """Return where the letter of the segments stands in the result of an ``einsum``, if it is not summed over."""
    left, arrow, right = equation.replace(" ", "").partition("->")
    subscripts = left.split(",")
    if not arrow or "." in equation:
        return None
    found = {
        (s[v.dim], v.lengths) for s, v in zip(subscripts, operands, strict=True) if isinstance(v, Stacked)
    }
    letter = next(iter(found))[0]
    alone = all(
        s.count(letter) == (1 if isinstance(v, Stacked) else 0)
        for s, v in zip(subscripts, operands, strict=True)
    )
    return right.index(letter) if len(found) == 1 and alone and letter in right else None


def _beside(op: Operation, x: Stacked, bound: Mapping[str, Any]) -> int | None:
    """Return where the segments stand after an operator along other axes, or ``None``."""
    dims = bound.get("dim")
    if op.name not in _BESIDE or dims is None:
        return None
    along = {d % x.ndim for d in ([dims] if isinstance(dims, int) else dims)}
    if not along or x.dim in along:
        return None
    removed = len(op.shape) < x.ndim
    return x.dim - (sum(d < x.dim for d in along) if removed else 0)


def _snapshot(source: Any, result: Value) -> Value:
    """Return the output of a reshape whose axes are new atoms (an axis that was there before is not made here)."""
    old = {id(resolve(a)) for a in source.axes}
    return Value(tuple(_axes.ONE if id(resolve(a)) in old else a for a in result.axes))


def _segmented_reshape(op: Operation, x: Value, dim: int, lengths: Sequence[int]) -> Stacked | None:
    """Reshape so that the segments of one new axis stay by themselves."""
    shape = op.shape
    made: list[list[Expression]] = [[] for _ in lengths]
    try:
        for old, new in regrouped(x.shape, shape):
            whole = _axes.product_of(x.axes[old.start : old.stop])
            if dim not in new:
                common = peeled(whole, [shape[k] for k in new])
                parts = [common] * len(lengths)
            else:
                outer, inner = shape[new.start : dim], shape[dim + 1 : new.stop]
                strands = _axes.weave(whole, math.prod(outer), [n * math.prod(inner) for n in lengths])
                parts = [
                    [*peeled(lead, outer), *peeled(trail, (n, *inner))]
                    for (lead, trail), n in zip(strands, lengths, strict=True)
                ]
            for axes, part in zip(made, parts, strict=True):
                axes += part
    except UnsplittableError:
        return None
    return Stacked(dim, tuple(Value(tuple(axes)) for axes in made))
