"""Operators that move or copy entries: every entry of the result is graded like the one that it comes from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import fx

from isthmus.symmetry._demands import Grade
from isthmus.symmetry._grading.walk import GradeRule, Operator
from isthmus.symmetry._listed import DROPOUTS, RESHAPES, SAME_ENTRIES, VIEWS
from isthmus.symmetry._origins import shape_of
from isthmus.symmetry._spots import Place, Spot, aligned, seen_through, unravelled

__all__ = ["MOVES"]


def _viewed(op: Operator) -> None:
    """Follow strides: the result is a view of its operand, laid out row by row."""
    source = op.node.all_input_nodes[0]
    shape = shape_of(source)
    for (
        operand
    ) in op.node.all_input_nodes:  # what is left out, or lends its shape or type alone, plays no role
        op.excuse(operand)
    for k, (strides, offset) in enumerate(seen_through(op.node, source)):

        def grade(spot: Spot, strides: Any = strides, offset: int = offset) -> Grade | None:
            flat = [offset + sum(i * s for i, s in zip(at, strides, strict=True)) for at in spot.ends()]
            one, two = (unravelled(f, shape) for f in flat)
            return op.carried(source, spot.atom, (one, two))

        op.each(grade, k)


def _copied(op: Operator) -> None:
    source, *others = op.node.all_input_nodes
    for other in others:  # lends its type
        op.excuse(other)
    op.each(lambda spot: op.carried(source, spot.atom, spot.ends()))


def _dropped(op: Operator) -> bool | None:
    """Pass entries on where nothing is dropped, as in evaluation."""
    if op.bound.get("train"):
        return False
    _copied(op)
    return None


def _joined(op: Operator) -> None:
    """Put tensors one after another, or beside one another along a new axis."""
    bound = op.bound
    stacked = op.name == "aten.stack"
    parts = [n for n in bound["tensors"] if stacked or len(shape_of(n)) == len(op.shape)]
    dim = int(bound.get("dim") or 0) % len(op.shape)
    starts = [0]
    for n in parts:
        starts.append(starts[-1] + (1 if stacked else shape_of(n)[dim]))

    def grade(spot: Spot) -> Grade | None:
        one, two = spot.ends()
        if spot.axis != dim and spot.segment is None:
            ends = _without(one), _without(two)
            return alike([op.carried(n, spot.atom, ends) for n in parts if not op.is_nothing(n)], spot)
        k = next(k for k in range(len(parts)) if starts[k] <= one[dim] < starts[k + 1])
        if not starts[k] <= two[dim] < starts[k + 1]:
            return None
        if spot.axis != dim and not all(_has(n, spot) or op.is_nothing(n) for n in parts):
            # beside it stands what is the same for all units: whatever runs over both would mix them
            found = op.carried(parts[k], spot.atom, (_within(one, starts[k]), _within(two, starts[k])))
            return None if found is None else op.demands(spot.atom).zero(found, op.cause)
        return op.carried(parts[k], spot.atom, (_within(one, starts[k]), _within(two, starts[k])))

    def alike(found: Sequence[Grade | None], spot: Spot) -> Grade | None:
        """Demand that all parts change alike."""
        grades = [g for g in found if g is not None]
        for other in grades[1:]:
            op.demands(spot.atom).equal(grades[0], other, op.cause)
        if grades and len(grades) < len(found):
            op.demands(spot.atom).zero(grades[0], op.cause)
        return grades[0] if grades else None

    def _has(part: fx.Node, spot: Spot) -> bool:
        axis = spot.axis - (stacked and spot.axis > dim)
        return any(own.axis == axis for own in op.graded(part).spots)

    def _without(at: Place) -> Place:
        return _within(at, at[dim])

    def _within(at: Place, start: int) -> Place:
        own = () if stacked else (at[dim] - start,)
        return (*at[:dim], *own, *at[dim + 1 :])

    op.each(grade)


def _repeated(op: Operator) -> None:
    source = op.node.all_input_nodes[0]
    shape = shape_of(source)

    def grade(spot: Spot) -> Grade | None:
        one, two = (
            tuple(k % n for k, n in zip(at[len(at) - len(shape) :], shape, strict=True)) for at in spot.ends()
        )
        return op.carried(source, spot.atom, (one, two))

    op.each(grade)


def _interleaved(op: Operator) -> bool | None:
    """Repeat every entry a number of times along an axis."""
    source, times, dim = op.node.all_input_nodes[0], op.bound.get("repeats"), op.bound.get("dim")
    if not isinstance(times, int) or not isinstance(dim, int):
        return False
    place = dim % len(op.shape)

    def grade(spot: Spot) -> Grade | None:
        one, two = ((*at[:place], at[place] // times, *at[place + 1 :]) for at in spot.ends())
        return op.carried(source, spot.atom, (one, two))

    op.each(grade)
    return None


def _along(dims: Any, rank: int) -> set[int]:
    listed = dims if isinstance(dims, (list, tuple)) else [dims]
    return {int(d) % rank for d in listed}


def _aside(op: Operator, own: set[int]) -> None:
    """Grade an operator that works along some axes, linearly, and lets all others pass."""
    source = op.node.all_input_nodes[0]

    def grade(spot: Spot) -> Grade | None:
        if spot.axis in own:
            return None
        one, two = (tuple(0 if d in own else k for d, k in enumerate(at)) for at in spot.ends())
        return op.carried(source, spot.atom, (one, two))

    op.each(grade)


def _flipped(op: Operator) -> None:
    _aside(op, _along(op.bound["dims"] or range(len(op.shape)), len(op.shape)))


def _summed_up(op: Operator) -> None:
    _aside(op, _along(op.bound["dim"], len(op.shape)))


def _padded(op: Operator) -> bool | None:
    """Pad some of the last axes; what is padded is zero, or a copy."""
    bound = op.bound
    value = bound.get("value")
    if bound.get("mode", "constant") == "constant" and value not in (None, 0, 0.0):
        return False
    number = len(bound["pad"]) // 2
    _aside(op, set(range(len(op.shape) - number, len(op.shape))))
    return None


def _picked(op: Operator) -> None:
    """Take positions of one axis by numbers."""
    bound = op.bound
    op.excuse(bound["index"])
    _aside(op, _along(bound["dim"], len(op.shape)))


def _indexed(op: Operator) -> bool | None:
    """Take entries by tensors of numbers on leading axes; the others pass."""
    bound = op.bound
    source, indices = bound["self"], list(bound["indices"])
    shape = shape_of(source)
    if any(n is None for n in indices[: len(indices) - 1]) or not indices or indices[-1] is None:
        return False
    kept = len(shape) - len(indices)
    for n in indices:
        op.stay(n)

    def grade(spot: Spot) -> Grade | None:
        if spot.axis < len(op.shape) - kept:
            return None
        one, two = ((*[0] * len(indices), *at[len(at) - kept :]) for at in spot.ends())
        return op.carried(source, spot.atom, (one, two))

    op.each(grade)
    return None


def _looked_up(op: Operator) -> None:
    """Take rows of a table; its columns pass."""
    bound = op.bound
    table: fx.Node = bound["weight"]

    def grade(spot: Spot) -> Grade | None:
        if spot.axis != len(op.shape) - 1:
            return None
        one, two = (aligned(at, [1, shape_of(table)[1]]) for at in spot.ends())
        return op.carried(table, spot.atom, (one, two))

    op.each(grade)


MOVES: dict[str, GradeRule] = {
    **dict.fromkeys(RESHAPES | VIEWS | {"view_as", "reshape_as", "broadcast_to", "swapaxes"}, _viewed),
    **dict.fromkeys(SAME_ENTRIES, _copied),
    **dict.fromkeys(DROPOUTS, _dropped),
    **dict.fromkeys(("cat", "concat", "concatenate", "stack"), _joined),
    "repeat": _repeated,
    "repeat_interleave": _interleaved,
    **dict.fromkeys(("flip", "roll"), _flipped),
    "cumsum": _summed_up,
    **dict.fromkeys(("constant_pad_nd", "pad"), _padded),
    "index_select": _picked,
    "index": _indexed,
    "embedding": _looked_up,
}
