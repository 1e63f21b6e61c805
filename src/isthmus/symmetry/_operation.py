"""What a rule for an operator works with, how it is registered, and what is remembered of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import count
from typing import Any, Literal

from torch import Tensor, fx

from isthmus.symmetry import _axes
from isthmus.symmetry._axes import ONE, Expression, Pin, UnsplittableError
from isthmus.symmetry._trace import module_of, operator_of
from isthmus.symmetry._values import Pointer, Value

__all__ = ["TIED", "Kind", "Mixing", "Operation", "Rule", "Selection", "OperatorStep", "rule", "rule_of"]

Rule = Callable[..., Any]
Kind = Literal["moves", "local", "mixes"]
_RULES: dict[str, tuple[Rule, Kind]] = {}
_tokens = count()
TIED = "equal entries are told apart by their order"


def rule(*names: str, kind: Kind = "mixes") -> Callable[[Rule], Rule]:
    """Register a rule for operators, named without overload (``aten.linear``).

    Args:
        names: the operators.
        kind: ``"moves"`` if entries are only moved or copied, ``"local"`` if an entry depends only on entries at
            the same coordinates (or on entries that an index picks), ``"mixes"`` for all others. A rule that mixes
            says by :meth:`Operation.mix` or :meth:`Operation.contract` what it mixes; if it does not, it is
            taken to mix everything, and nothing it touches can move differently from unit to unit.
    """

    def register(function: Rule) -> Rule:
        for name in names:
            if name in _RULES:
                raise RuntimeError(f"two rules for {name}")
            _RULES[name] = (function, kind)
        return function

    return register


def rule_of(name: str) -> tuple[Rule, Kind] | None:
    """Return the rule of an operator and its kind, or ``None``."""
    return _RULES.get(name)


@dataclass(frozen=True)
class Mixing:
    """Axes (by letter) of one or several operands along which entries are mixed.

    Attributes:
        operands: the axes of each operand; operands are aligned along equal letters.
        joint: letters that are mixed, together.
        total: nothing is known: everything may be mixed with everything.
    """

    operands: tuple[tuple[tuple[str, Expression], ...], ...]
    joint: frozenset[str]
    total: bool = False


@dataclass(frozen=True)
class Selection:
    """An axis was looked up by an index tensor: its coordinate is known wherever all places are.

    ``moved`` says what the look-up mixes if the places turn out to be on that very axis.
    """

    pointer: Pointer
    places: tuple[Expression, ...]
    moved: Mixing


@dataclass(frozen=True)
class OperatorStep:
    """What the interpreter remembers of an operator: its kind, its inputs, and what it mixes."""

    kind: Kind
    inputs: tuple[Value, ...]
    mixings: tuple[Mixing, ...]
    selections: tuple[Selection, ...] = ()


def _mixing(value: Value, dims: Iterable[int]) -> Mixing:
    mixed = {d % max(value.ndim, 1) for d in dims}
    operand = tuple((str(k), axis) for k, axis in enumerate(value.axes))
    return Mixing((operand,), frozenset(str(d) for d in mixed))


class Operation:
    """The operator a rule is looking at: its output shapes, and the ways to constrain labels."""

    def __init__(self, node: fx.Node, module: str) -> None:
        self.node = node
        self.name = operator_of(node)
        self.module = module_of(node) or module
        self.result: Any = node.meta.get("val")
        self.mixings: list[Mixing] = []
        self.selections: list[Selection] = []

    def point(self, axis: Expression) -> Pointer:
        """Return a new pointer to an axis: the positions found by this operator move with the axis."""
        return Pointer(axis, next(_tokens))

    def look_up(self, x: Value, dim: int, index: Value, places: Sequence[Expression], reason: str) -> None:
        """Address axis ``dim`` of ``x`` by an index tensor, whose axes become ``places``.

        Positions that the index found on this very axis move along; any other index fixes them, and so does one
        whose choice may be a tie. A fixed index brings entries to other positions, so it mixes along the axis; one
        that counts the positions of this axis still says at which of them an entry was found.
        """
        axis = x.axes[dim]
        points = index.points
        if points is None or points.axis.size != axis.size:
            self.pin(axis, reason)
            self.use_as_numbers([index])
            self.mix(x, [dim])
            return
        if points.tied:
            self.pin(axis, TIED)
            self.pin(points.axis, TIED)
        self.unify(axis, points.axis)
        self.selections.append(Selection(points, tuple(places), _mixing(x, [dim])))

    def common_axis(self, values: Sequence[Value]) -> Pointer | None:
        """Return a pointer for entries that all count positions of one axis, or ``None`` after fixing them."""
        pointers = [v.points for v in values if v.points is not None]
        if len({p.axis.size for p in pointers}) > 1:
            self.use_as_numbers(values)
            return None
        for other in pointers[1:]:
            self.unify(pointers[0].axis, other.axis)
        return replace(self.point(pointers[0].axis), tied=any(p.tied for p in pointers))

    def belong(self, axis: Expression, table: int, place: Expression) -> None:
        """Say that every position of ``place`` belongs to one position of ``axis``, as a table (by number) says."""
        pointer = Pointer(axis, -2 - table)
        self.selections.append(Selection(pointer, (place,), Mixing((), frozenset())))

    def use_as_numbers(self, values: Iterable[Value]) -> None:
        """Fix the axes that the entries of index tensors count."""
        for value in values:
            if value.points is not None:
                self.pin(value.points.axis, "its positions are used as numbers")

    def mix(self, value: Value, dims: Iterable[int]) -> None:
        """Say that entries are mixed along some axes of one operand, in a way that does not see their order."""
        self.mixings.append(_mixing(value, dims))

    def contract(self, operands: Sequence[tuple[Value, Sequence[str]]], joint: Iterable[str]) -> None:
        """Say that operands are aligned along equal letters, multiplied, and mixed along the joint letters."""
        aligned = tuple(tuple(zip(letters, v.axes, strict=True)) for v, letters in operands)
        self.mixings.append(Mixing(aligned, frozenset(joint)))

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the (first) output tensor."""
        result = self.result[0] if isinstance(self.result, (tuple, list)) else self.result
        return tuple(int(s) for s in result.shape)

    def why(self, reason: str) -> Pin:
        """Return the record of a pin made by this operator."""
        return Pin(reason, self.name, self.module)

    def fixed(self, size: int, reason: str) -> Expression:
        """Return a new axis whose positions cannot move."""
        return _axes.immovable(size, self.why(reason))

    def pin(self, axis: Expression, reason: str) -> None:
        """Forbid every movement along an axis."""
        _axes.pin(axis, self.why(reason))

    def pin_all(self, values: Sequence[Value], reason: str) -> None:
        """Forbid every movement along all axes of several values."""
        for value in values:
            for axis in value.axes:
                self.pin(axis, reason)

    def join(self, axes: Sequence[Expression], size: int) -> Expression:
        """Broadcast axes against each other to length ``size``: those that have it move together.

        Axes of equal copies follow the others and demand nothing.
        """
        full = [a for a in axes if a.size == size]
        full = [a for a in full if not _axes.are_copies(a)] or full[:1]
        for other in full[1:]:
            _axes.unify(full[0], other)
        if not full:
            return ONE if size == 1 else self.fixed(size, "axes of unequal length meet")
        return full[0]

    def broadcast(self, values: Sequence[Value], shape: Sequence[int] | None = None) -> Value:
        """Return the value of an elementwise operation over several values, with NumPy broadcasting."""
        shape = self.shape if shape is None else shape
        axes: list[Expression] = []
        for k, size in enumerate(shape):
            place = k - len(shape)
            axes.append(self.join([v.axes[place] for v in values if v.ndim >= -place], size))
        return Value(tuple(axes))

    def split_trailing(self, axis: Expression, size: int) -> tuple[Expression, Expression]:
        """Factor an axis with a fastest factor of ``size``; pins it when its structure forbids that."""
        try:
            return _axes.split_trailing(axis, size)
        except UnsplittableError:
            self.pin(axis, f"a factor of {size} does not fit the structure of the axis")
            return _axes.split_trailing(axis, size)

    def segments(self, axis: Expression, lengths: Sequence[int]) -> list[Expression]:
        """Cut an axis into consecutive segments; pins it when a cut runs through units."""
        parts: list[Expression] = []
        for length in lengths[:-1]:
            if length == 0:
                parts.append(self.fixed(0, "empty"))
                continue
            if length == axis.size:
                parts.append(axis)
                axis = self.fixed(0, "empty")
                continue
            try:
                head, axis = _axes.cut(axis, length)
            except UnsplittableError:
                self.pin(axis, f"a segment of {length} cuts through the units of the axis")
                head, axis = _axes.cut(axis, length)
            parts.append(head)
        return [*parts, axis]

    def phases(self, axis: Expression, step: int) -> list[Expression]:
        """Write an axis as ``step`` woven ones; pins it when its structure forbids that."""
        try:
            return _axes.phases(axis, step)
        except UnsplittableError:
            self.pin(axis, f"every {step}th position is read apart")
            return _axes.phases(axis, step)

    def unify(self, x: Expression, y: Expression) -> None:
        """Demand that two axes of one length move together."""
        _axes.unify(x, y)

    def unknown(self, values: Sequence[Value]) -> Any:
        """Pin everything that an operator without a rule touches, and return fixed outputs."""
        self.pin_all(values, "operator without a rule")
        return self.fixed_result("operator without a rule")

    def fixed_result(self, reason: str) -> Any:
        """Return values for all outputs in which nothing can move."""

        def one(result: Any) -> Any:
            if isinstance(result, Tensor):
                return Value(tuple(self.fixed(int(s), reason) for s in result.shape))
            if isinstance(result, (tuple, list)):
                return tuple(one(r) for r in result)
            return result

        return one(self.result)
