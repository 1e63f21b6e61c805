"""Values kept in segments: a lazy concatenation, and the operators that leave its segments apart.

A stack, a concatenation of unlike values and a reshape of a concatenation (the first step of a channel shuffle) hold
parts that have nothing to do with each other. :class:`Stacked` keeps them so for as long as operators only move
entries or compute them one by one. Any other use joins the segments, which only removes permutations.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from isthmus.symmetry import _axes
from isthmus.symmetry._axes import ONE, Expression, Fixed, Product, Sum, UnsplittableError, Woven, resolve
from isthmus.symmetry._operation import Operation, rule_of
from isthmus.symmetry._values import Value

__all__ = [
    "MOST_SEGMENTS",
    "RESHAPES",
    "Stacked",
    "joined",
    "lengths_of",
    "moved",
    "peeled",
    "regrouped",
    "segmented",
    "stacked",
]

MOST_SEGMENTS = 64

_KEEP = (
    "aten.clone",
    "aten.contiguous",
    "aten.to",
    "aten._to_copy",
    "aten.detach",
    "aten.alias",
    "aten.type_as",
)
RESHAPES = (
    "aten.view",
    "aten.reshape",
    "aten._unsafe_view",
    "aten.unflatten",
    "aten._reshape_alias",
    "aten.flatten",
    "aten.view_as",
    "aten.reshape_as",
)
_SLICES = ("aten.slice", "aten.narrow", "aten.slice_copy")
_CONCATENATIONS = ("aten.cat", "aten.concat", "aten.concatenate")


@dataclass(frozen=True)
class Stacked:
    """A lazy concatenation of values along one axis.

    Attributes:
        dim: the axis.
        parts: the values, all of one shape but for this axis.
        whole: label of the axis where every part has length 1 on it (a stack), else ``None``.
    """

    dim: int
    parts: tuple[Value, ...]
    whole: Expression | None = None

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return self.parts[0].ndim

    @property
    def shape(self) -> tuple[int, ...]:
        """Lengths of the axes, all segments together."""
        first = self.parts[0].shape
        return (*first[: self.dim], sum(self.lengths), *first[self.dim + 1 :])

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
        segments = resolve(Sum(tuple(p.axes[self.dim] for p in self.parts)))
        axes[self.dim] = segments if self.whole is None else self.whole
        return Value(tuple(axes))

    def moved(self, order: Sequence[int]) -> Stacked:
        """Return the value with its axes in another order."""
        parts = tuple(Value(tuple(p.axes[k] for k in order)) for p in self.parts)
        return Stacked(list(order).index(self.dim), parts, self.whole)

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

    def pick(self, positions: Sequence[int]) -> Stacked | None:
        """Return parts of length 1 in another order or number, or ``None`` if some part is longer."""
        if not positions or any(n != 1 for n in self.lengths):
            return None
        return Stacked(self.dim, tuple(self.parts[k] for k in positions))


def lengths_of(form: Sum | Fixed) -> tuple[int, ...]:
    """Return segment lengths; runs of single positions were fused, so they are taken apart again."""
    lengths: list[int] = []
    for part in form.parts if isinstance(form, Sum) else (form,):
        whole = next(_axes.atoms_of(part), None) is not None
        lengths += [part.size] if whole else [1] * part.size
    return tuple(lengths)


def peeled(whole: Expression, shape: Sequence[int]) -> list[Expression]:
    """Write one axis as several, row-major.

    Raises:
        UnsplittableError: the structure of the axis does not allow it.
    """
    axes: list[Expression] = []
    for size in reversed(shape):
        whole, axis = _axes.split_trailing(whole, size)
        axes.insert(0, axis)
    return axes


def joined(tree: Any) -> Any:
    """Return arguments or results with all segments joined into plain values."""
    if isinstance(tree, Stacked):
        return tree.join()
    if isinstance(tree, (tuple, list)):
        return type(tree)(joined(t) for t in tree)
    return tree


def moved(op: Operation, x: Stacked, bound: Mapping[str, Any]) -> Any:
    """Return the result of an operator that only moves entries, or ``None``."""
    order = list(range(x.ndim))
    if op.name in _KEEP:
        return x
    if op.name in RESHAPES:
        return _reshaped(op, x)
    if op.name == "aten.flip" and [d % x.ndim for d in bound["dims"]] == [x.dim]:
        return x.pick(range(len(x.parts))[::-1])
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
        return Stacked(x.dim + (place <= x.dim), parts, x.whole)
    if op.name == "aten.squeeze" and isinstance(bound.get("dim"), int) and bound["dim"] % x.ndim != x.dim:
        place = bound["dim"] % x.ndim
        if x.parts[0].shape[place] != 1:
            return x
        parts = tuple(Value((*p.axes[:place], *p.axes[place + 1 :])) for p in x.parts)
        return Stacked(x.dim - (place < x.dim), parts, x.whole)
    if op.name == "aten.index":
        places = [k for k, i in enumerate(bound["indices"]) if i is not None]
        index = bound["indices"][places[0]] if len(places) == 1 else None
        start = index.run if isinstance(index, Value) else None
        if start is not None and places[0] == x.dim:
            return x.range(start % sum(x.lengths), op.shape[x.dim])
        return None
    if op.name in _SLICES and bound.get("step", 1) == 1 and op.shape == x.shape:
        return x
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
    if op.name in _SLICES:
        start, step = bound.get("start") or 0, bound.get("step", 1)
        start = max(start + size, 0) if start < 0 else min(start, size)
        length = op.shape[x.dim]
        return x.range(start, length) if step == 1 else x.pick(range(start, start + step * length, step))
    if isinstance(op.result, (tuple, list)) and rule_of(op.name) == rule_of("aten.split"):
        starts = [sum(int(r.shape[x.dim]) for r in op.result[:k]) for k in range(len(op.result))]
        taken = [x.range(s, int(r.shape[x.dim])) for s, r in zip(starts, op.result, strict=True)]
        return None if None in taken else tuple(taken)
    return None


def _without(value: Stacked | Value | None, dim: int) -> Value | None:
    if not isinstance(value, Value) or value.shape[dim] != 1:
        return None
    return Value((*value.axes[:dim], *value.axes[dim + 1 :]))


def stacked(op: Operation, bound: Mapping[str, Any]) -> Stacked | None:
    """Return a stack, or a concatenation of values that differ beside it, as segments; ``None`` for all else."""
    if op.name == "aten.select_scatter":
        return _rewritten(op, bound)
    if op.name == "aten.slice_scatter" and isinstance(bound["src"], Stacked):
        return bound["src"] if bound["src"].shape == bound["x"].shape and bound.get("step", 1) == 1 else None
    if op.name not in (*_CONCATENATIONS, "aten.stack"):
        return None
    tensors = [t for t in bound["tensors"] if t.ndim == len(op.shape) or op.name == "aten.stack"]
    if not 1 < len(tensors) <= MOST_SEGMENTS or any(isinstance(t, Value) and t.points for t in tensors):
        return None
    dim = int(bound.get("dim", 0)) % len(op.shape)
    if op.name == "aten.stack":
        plain = [joined(t) for t in tensors]
        parts = tuple(Value((*t.axes[:dim], ONE, *t.axes[dim:])) for t in plain)
        return Stacked(dim, parts, op.fixed(len(parts), "stacked tensors"))
    parts = tuple(
        part
        for t in tensors
        for part in (t.parts if isinstance(t, Stacked) and t.dim == dim else (joined(t),))
    )
    alike = all(
        _axes.same(part.axes[k], parts[0].axes[k]) for part in parts for k in range(len(op.shape)) if k != dim
    )
    return None if alike or len(parts) > MOST_SEGMENTS else Stacked(dim, parts)


def _rewritten(op: Operation, bound: Mapping[str, Any]) -> Stacked | None:
    """Write into one position of an axis on which nothing moves: from then on its positions are segments."""
    x, src = bound["x"], joined(bound["src"])
    dim, size = bound["dim"] % x.ndim, op.shape[bound["dim"]]
    if isinstance(x, Value) and x.points is None and 1 < size <= MOST_SEGMENTS:
        if any(atom.pinned is None and not atom.copies for atom in _axes.atoms_of(x.axes[dim])):
            return None
        rest = (*x.axes[:dim], ONE, *x.axes[dim + 1 :])
        x = Stacked(dim, (Value(rest),) * size, op.fixed(size, "positions written one by one"))
    if not isinstance(x, Stacked) or x.dim != dim or any(n != 1 for n in x.lengths) or src.points is not None:
        return None
    place = bound["index"] % size
    shape = [n for k, n in enumerate(op.shape) if k != dim]
    written = src if src.shape == tuple(shape) else op.broadcast([src], shape)
    new = Value((*written.axes[:dim], ONE, *written.axes[dim:]))
    return Stacked(dim, (*x.parts[:place], new, *x.parts[place + 1 :]), x.whole)


def regrouped(source: Sequence[int], target: Sequence[int]) -> Iterator[tuple[range, range]]:
    """Yield which neighbouring axes a reshape turns into which: the smallest runs of one number of entries."""
    i = j = 0
    while i < len(source) or j < len(target):
        first_i, first_j = i, j
        i, j = min(i + 1, len(source)), min(j + 1, len(target))
        while (left := math.prod(source[first_i:i])) != (right := math.prod(target[first_j:j])):
            i, j = (i + 1, j) if left < right else (i, j + 1)
        # axes of length 1 at the end belong to the last run
        if math.prod(source[i:]) == 1:
            i, j = len(source), len(target)
        yield range(first_i, i), range(first_j, j)


def _reshaped(op: Operation, x: Stacked) -> Stacked | Value | None:
    """Reshape segments: they stay apart where a new axis still counts them, or are woven into one axis."""
    source, target = x.shape, op.shape
    if math.prod(source) == 0:
        return None
    groups = list(regrouped(source, target))
    old, new = next(g for g in groups if x.dim in g[0])
    before, after = math.prod(source[old.start : x.dim]), math.prod(source[x.dim + 1 : old.stop])
    place = _counting_axis(target, new, before, [n * after for n in x.lengths])
    if place is None and before == 1:
        return None
    parts = [list(p.axes) for p in x.parts]
    try:
        if place is None:
            return _woven(op, x, groups, (old, new))
        inner = math.prod(target[place + 1 : new.stop])
        whole = x.whole if target[place] == len(x.parts) else None
        shapes = [(*target[:place], n * after // inner, *target[place + 1 :]) for n in x.lengths]
        made = [
            [
                a
                for o, n in groups
                for a in peeled(_axes.product_of(axes[o.start : o.stop]), [shape[k] for k in n])
            ]
            for axes, shape in zip(parts, shapes, strict=True)
        ]
    except UnsplittableError:
        return None
    return Stacked(place, tuple(Value(tuple(axes)) for axes in made), whole)


def _counting_axis(target: Sequence[int], new: range, before: int, blocks: Sequence[int]) -> int | None:
    """Return the new axis along which segments still follow one another, if there is one."""
    fitting = [
        k
        for k in new
        if math.prod(target[new.start : k]) == before
        and all(block % math.prod(target[k + 1 : new.stop]) == 0 for block in blocks)
    ]
    return next((k for k in fitting if target[k] > 1), None)


def _woven(
    op: Operation, x: Stacked, groups: Sequence[tuple[range, range]], at: tuple[range, range]
) -> Value:
    """Merge the axis of the segments with slower ones: their blocks take turns."""
    old, _ = at
    strands = tuple(
        (_axes.product_of(p.axes[old.start : x.dim]), _axes.product_of(p.axes[x.dim : old.stop]))
        for p in x.parts
    )
    whole = resolve(Woven(strands))
    first = x.parts[0]
    for part in x.parts[1:]:
        for k in range(x.ndim):
            if k not in old:
                _axes.unify(first.axes[k], part.axes[k])
    axes: list[Expression] = []
    for o, n in groups:
        merged = whole if o == old else _axes.product_of(first.axes[o.start : o.stop])
        made: list[Expression] = []
        for k in reversed(n):
            merged, axis = op.split_trailing(merged, op.shape[k])
            made.insert(0, axis)
        axes += made
    return Value(tuple(axes))


def segmented(op: Operation, x: Value) -> Stacked | None:
    """Reshape a concatenated or woven axis so that each of its parts stays by itself, or return ``None``.

    That is so where the parts are the positions of one new axis; or where a part is no whole number of them, so that
    they could not be read as units of one kind.
    """
    if op.name not in RESHAPES or x.points is not None or math.prod(x.shape) == 0:
        return None
    for old, new in regrouped(x.shape, op.shape):
        if sum(op.shape[k] > 1 for k in new) < 2:
            continue
        whole = _axes.product_of(x.axes[old.start : old.stop])
        form = _strands(whole)
        if form is None or all(atom.pinned for atom in _axes.atoms_of(whole)):
            continue
        place = next(
            (k for k in new if math.prod(op.shape[k : new.stop]) == form.period and op.shape[k] > 1), None
        )
        if (
            place is not None
            and op.shape[place] <= MOST_SEGMENTS
            and _counts_parts(form, op.shape, place, new)
        ):
            try:
                return _apart(op, x, form, (old, new), place)
            except UnsplittableError:
                return None
    return None


def _strands(e: Expression) -> Woven | None:
    """Return an axis as strands if it is a concatenation or woven, also beside other factors."""
    e = resolve(e)
    if isinstance(e, Product):
        first, last = e.factors[0], e.factors[-1]
        if isinstance(first, Sum):
            return Woven(tuple((ONE, Product((part, *e.factors[1:]))) for part in first.parts))
        if isinstance(last, Sum):
            return Woven(tuple((Product(e.factors[:-1]), part) for part in last.parts))
        return None
    if isinstance(e, Sum):
        return Woven(tuple((ONE, part) for part in e.parts))
    return e if isinstance(e, Woven) and e.complete else None


def _counts_parts(form: Woven, shape: Sequence[int], place: int, new: range) -> bool:
    block = math.prod(shape[place + 1 : new.stop])
    sizes = [trail.size for _, trail in form.strands]
    ends = {sum(sizes[: k + 1]) for k in range(len(sizes))}
    whole = all((k + 1) * block in ends for k in range(shape[place]))
    return whole or (form.turns == 1 and any(size % block for size in sizes))


def _apart(op: Operation, x: Value, form: Woven, at: tuple[range, range], place: int) -> Stacked:
    shape, (old, new) = op.shape, at
    block = shape[place + 1 : new.stop]
    pending = list(form.strands)
    parts: list[list[Expression]] = []
    for _ in range(shape[place]):
        taken: list[tuple[Expression, Expression]] = []
        while (missing := math.prod(block) - sum(trail.size for _, trail in taken)) > 0:
            lead, trail = pending.pop(0)
            if trail.size > missing:
                trail, rest = _axes.cut(trail, missing)
                pending.insert(0, (lead, rest))
            taken.append((lead, trail))
        for lead, _ in taken[1:]:
            _axes.unify(taken[0][0], lead)
        segment = resolve(Sum(tuple(trail for _, trail in taken)))
        parts.append([*peeled(taken[0][0], shape[new.start : place]), ONE, *peeled(segment, block)])
    made: list[list[Expression]] = [[] for _ in parts]
    for o, n in regrouped(x.shape, shape):
        common = [] if o == old else peeled(_axes.product_of(x.axes[o.start : o.stop]), [shape[k] for k in n])
        for axes, own in zip(made, parts, strict=True):
            axes += own if o == old else common
    return Stacked(place, tuple(Value(tuple(axes)) for axes in made))
