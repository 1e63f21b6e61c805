"""Abstract interpretation: run the graph on axis labels instead of numbers.

Rules for single operators live in ``_rules``; each takes labelled inputs and returns labelled outputs, joining,
refining or pinning labels on the way. An operator without a rule is decomposed alone; if that is impossible
or still leads to an unknown operator, every axis it touches is pinned and the reason recorded.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import count
from typing import Any, Literal

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from isthmus.symmetry import _axes
from isthmus.symmetry._axes import ONE, Expression, Pin, UnsplittableError
from isthmus.symmetry._ties import RANKINGS, Ties
from isthmus.symmetry._trace import module_of, operator_of

__all__ = ["Interpreter", "Mixing", "Operation", "Selection", "Step", "Value", "rule", "rule_of", "values_in"]


@dataclass(frozen=True)
class Pointer:
    """What the entries of an index tensor count: positions of an axis (``token`` tells two tensors apart).

    ``tied`` is true when the ranked entries may be equal, so that their order decides which position is taken.
    """

    axis: Expression
    token: int
    tied: bool = False


@dataclass(frozen=True)
class Value:
    """A tensor as the interpreter sees it: one label expression per axis.

    Attributes:
        axes: the labels.
        run: for a constant that holds the integers ``run, run + 1, …`` (an index such as ``[-2, -1]``): the first.
        uniform: whether all entries are known to be equal.
        points: for entries that count positions of an axis which may move (the choice of a router): that axis.
    """

    axes: tuple[Expression, ...]
    run: int | None = None
    uniform: bool = False
    points: Pointer | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Lengths of the axes."""
        return tuple(a.size for a in self.axes)

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return len(self.axes)


Rule = Callable[..., Any]
Kind = Literal["moves", "local", "mixes"]
_RULES: dict[str, tuple[Rule, Kind]] = {}
_tokens = count()
_TIED = "equal entries are told apart by their order"
_UNREADABLE = "the rule does not know this form of the operator"
_TAKE_INDICES = frozenset(
    f"aten.{name}"
    for name in ("index", "gather", "index_select", "embedding", "one_hot", "scatter", "scatter_add")
)


_GATHER_TENSORS = ("aten.cat", "aten.concat", "aten.concatenate", "aten.stack")


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


def rule_of(name: str) -> Rule | None:
    """Return the rule of an operator."""
    known = _RULES.get(name)
    return None if known is None else known[0]


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
class Step:
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
        whose choice may be a tie. A fixed index brings entries to other positions, so it mixes along the axis.
        """
        axis = x.axes[dim]
        points = index.points
        if points is None or points.axis.size != axis.size or points.tied:
            self.pin(axis, reason if points is None or not points.tied else _TIED)
            self.use_as_numbers([index])
            self.mix(x, [dim])
        else:
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


class Interpreter:
    """Runs a functional graph on labels; ``values`` then holds the label of every node."""

    def __init__(self) -> None:
        self.values: dict[fx.Node, Any] = {}
        self.steps: list[Step] = []
        self._ties = Ties()

    def run(self, graph: fx.Graph, inputs: Mapping[str, Any], modules: Any = None, module: str = "") -> Any:
        """Interpret a graph.

        Args:
            graph: functional ATen graph with ``meta["val"]`` on its nodes.
            inputs: from placeholder name to :class:`Value` or constant.
            modules: the graph module, for higher-order operators that call sub-graphs.
            module: path to report when a node does not say to which module it belongs.

        Returns:
            The labelled outputs.
        """
        result: Any = None
        for node in graph.nodes:
            if node.op == "placeholder":
                self.values[node] = inputs[node.name]
            elif node.op == "get_attr":
                self.values[node] = self._attribute(node, modules)
            elif node.op == "output":
                result = self._look_up(node.args[0])
            else:
                self.values[node] = self._call(node, modules, module)
        return result

    def _attribute(self, node: fx.Node, modules: Any) -> Any:
        value: Any = modules
        for part in str(node.target).split("."):
            value = getattr(value, part)
        if isinstance(value, Tensor):
            why = Pin("constant of the model", "", module_of(node))
            return constant_value(value, why)
        return value

    def _look_up(self, argument: Any) -> Any:
        return fx.map_arg(argument, lambda n: self.values[n])

    def _call(self, node: fx.Node, modules: Any, module: str) -> Any:
        args, kwargs = self._look_up(node.args), self._look_up(node.kwargs)
        self._ties.note(node)
        if node.target is operator.getitem:
            return args[0][args[1]]
        op = Operation(node, module)
        if op.result is None and not node.users:
            return None  # an assertion: it computes nothing
        if not isinstance(node.target, torch._ops.OpOverload):
            return self._higher_order(op, node, args, kwargs)
        return self.call(node, op, _bind(node.target, args, kwargs))

    def call(self, node: fx.Node, op: Operation, bound: dict[str, Any]) -> Any:
        """Return the labelled result of an operator, given its arguments by name."""
        values = values_in(bound)
        known = _RULES.get(op.name)
        if known is not None:
            function, kind = known
            result = _attempt(function, op, bound, values)
            if op.name in RANKINGS and self._ties.may_tie(node):
                result = _tied(result)
            pointing = [v for v in values if v.points is not None]
            if pointing and kind == "moves" and len(pointing) == len(values) == 1:
                result = _with_points(result, pointing[0].points)
            elif len(pointing) == len(values) and op.name in _GATHER_TENSORS:
                result = _with_points(result, op.common_axis(pointing))
            elif pointing and op.name not in _TAKE_INDICES:
                op.use_as_numbers(pointing)
            self._remember(op, kind, values)
            return result
        op.use_as_numbers(values)
        pointwise = torch.Tag.pointwise in getattr(node.target, "tags", ())
        if pointwise and isinstance(op.result, Tensor):
            self._remember(op, "local", values)
            return op.broadcast(values)
        return self._decompose(op, node, values)

    def _remember(self, op: Operation, kind: Kind, values: Sequence[Value]) -> None:
        mixings = tuple(op.mixings)
        if kind == "mixes" and not mixings:
            operands = tuple(tuple((str(k), a) for k, a in enumerate(v.axes)) for v in values)
            mixings = (Mixing(operands, frozenset(), total=True),)
        self.steps.append(Step(kind, tuple(values), mixings, tuple(op.selections)))

    def _higher_order(self, op: Operation, node: fx.Node, args: Any, kwargs: Any) -> Any:
        bodies = [a for a in args if isinstance(a, fx.GraphModule)]
        if len(bodies) == 1 and op.name.startswith("wrap_with"):
            body = bodies[0]
            operands = args[next(k for k, a in enumerate(args) if a is body) + 1 :]
            names = [n.name for n in body.graph.find_nodes(op="placeholder")]
            return self.run(body.graph, dict(zip(names, operands, strict=True)), body, op.module)
        return self._unknown(op, values_in([args, kwargs]))

    def _unknown(self, op: Operation, values: list[Value]) -> Any:
        op.use_as_numbers(values)
        self._remember(op, "mixes", values)
        return op.unknown(values)

    def _decompose(self, op: Operation, node: fx.Node, values: list[Value]) -> Any:
        """Decompose one unknown operator into known ones, or pin all it touches."""
        body = _decomposition(node)
        if body is None or not _all_known(body):
            return self._unknown(op, values)
        names = [n.name for n in body.graph.find_nodes(op="placeholder")]
        operands = [self.values[n] for n in node.all_input_nodes]
        if len(names) != len(operands):
            return self._unknown(op, values)
        result = self.run(body.graph, dict(zip(names, operands, strict=True)), body, op.module)
        return tuple(result) if isinstance(op.result, (tuple, list)) else result


def _attempt(function: Rule, op: Operation, bound: Mapping[str, Any], values: Sequence[Value]) -> Any:
    """Return what a rule says; pin everything if it cannot read the call or its answer has another shape."""
    try:
        result = function(op, **bound)
        if _fits(result, op.result):
            return result
    except (TypeError, ValueError, IndexError, AttributeError, UnsplittableError):
        pass
    op.mixings.clear()
    op.selections.clear()
    op.use_as_numbers(values)
    op.pin_all(values, _UNREADABLE)
    return op.fixed_result(_UNREADABLE)


def _fits(result: Any, expected: Any) -> bool:
    """Return whether labels have the shapes that were traced (segments of a recurrent state are not looked at)."""
    if isinstance(result, (tuple, list)):
        return isinstance(expected, (tuple, list)) and all(map(_fits, result, expected))
    if isinstance(result, Value) and isinstance(expected, Tensor):
        return result.shape == tuple(int(s) for s in expected.shape)
    return True


def _tied(result: Any) -> Any:
    """Mark the positions that a ranking of entries found as possible ties."""
    if isinstance(result, Value):
        points = result.points
        return result if points is None else replace(result, points=replace(points, tied=True))
    return tuple(_tied(r) for r in result) if isinstance(result, (tuple, list)) else result


def _with_points(result: Any, points: Pointer | None) -> Any:
    if isinstance(result, Value):
        return replace(result, points=points)
    return tuple(_with_points(r, points) for r in result) if isinstance(result, (tuple, list)) else result


def constant_value(tensor: Tensor, why: Pin) -> Value:
    """Return the labels of a constant: free along axes on which all entries are equal, else fixed for a reason."""
    equal = [_is_equal_along(tensor, k) for k in range(tensor.ndim)]
    axes = (
        _axes.equal_copies(int(s)) if same else _axes.immovable(int(s), why)
        for s, same in zip(tensor.shape, equal, strict=True)
    )
    return Value(tuple(axes), _run_of(tensor), uniform=not tensor.is_meta and all(equal))


def _is_equal_along(tensor: Tensor, axis: int) -> bool:
    if tensor.is_meta or tensor.numel() == 0:
        return False
    return bool((tensor == tensor.narrow(axis, 0, 1)).all())


def _run_of(tensor: Tensor) -> int | None:
    """Return the first entry of a constant that counts upwards by ones, else ``None``."""
    if tensor.is_meta or tensor.dtype != torch.int64 or tensor.ndim != 1 or not 0 < len(tensor) <= 64:
        return None
    first = int(tensor[0])
    counts = torch.equal(tensor.cpu(), torch.arange(first, first + len(tensor)))
    return first if counts and (first >= 0 or first + len(tensor) <= 0) else None


def _bind(target: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    bound: dict[str, Any] = {}
    for k, argument in enumerate(target._schema.arguments):
        name = "x" if argument.name in ("self", "input") else argument.name
        if k < len(args):
            bound[name] = args[k]
        elif argument.name in kwargs:
            bound[name] = kwargs[argument.name]
        elif argument.has_default_value():
            bound[name] = argument.default_value
    return bound


def values_in(tree: Any) -> list[Value]:
    """Return all labelled tensors in arguments or results, those of segments too."""
    if isinstance(tree, Value):
        return [tree]
    if isinstance(tree, Mapping):
        return [v for item in tree.values() for v in values_in(item)]
    if isinstance(tree, (tuple, list)):
        return [v for item in tree for v in values_in(item)]
    return list(getattr(tree, "parts", ()))


def _decomposition(node: fx.Node) -> fx.GraphModule | None:
    """Return the operator written in simpler operators, or ``None`` when it has no decomposition."""
    sources = node.all_input_nodes
    fakes = [n.meta.get("val") for n in sources]
    if not all(isinstance(f, Tensor) for f in fakes):
        return None

    def call(*tensors: Tensor) -> Any:
        table = dict(zip(sources, tensors, strict=True))
        args = fx.map_arg(node.args, table.__getitem__)
        kwargs = fx.map_arg(node.kwargs, table.__getitem__)
        return node.target(*args, **kwargs)  # type: ignore[operator]

    from torch._decomp import core_aten_decompositions

    try:
        table: Any = core_aten_decompositions()
        body = make_fx(call, decomposition_table=table, tracing_mode="fake")(*fakes)
    except Exception:  # any failure to decompose means: no decomposition; the caller pins
        return None
    calls = [n for n in body.graph.nodes if n.op == "call_function"]
    return None if len(calls) == 1 and calls[0].target is node.target else body


def _all_known(body: fx.GraphModule) -> bool:
    for node in body.graph.nodes:
        if node.op == "call_function" and node.target is not operator.getitem:
            target = node.target
            if not isinstance(target, torch._ops.OpOverload):
                return False
            if operator_of(node) not in _RULES and torch.Tag.pointwise not in target.tags:
                return False
    return True
