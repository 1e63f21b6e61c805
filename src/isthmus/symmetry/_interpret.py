"""Abstract interpretation: run the graph on axis labels instead of numbers.

Rules for single operators live in ``_rules``; each takes labelled inputs and returns labelled outputs, joining,
refining or pinning labels on the way. An operator without a rule is decomposed alone; if that is impossible
or still leads to an unknown operator, every axis it touches is pinned and the reason recorded.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

from isthmus.symmetry._axes import Pin, UnsplittableError
from isthmus.symmetry._experiment import Passing, passing_axes
from isthmus.symmetry._operation import Kind, Mixing, Operation, OperatorStep, Rule, rule_of
from isthmus.symmetry._segments import joined
from isthmus.symmetry._strict import report_failure
from isthmus.symmetry._ties import Ties
from isthmus.symmetry._trace import module_of, operator_of
from isthmus.symmetry._values import Pointer, Value, constant_value, is_scaled_identity, values_in

__all__ = ["Interpreter", "bind"]


_BY_EXPERIMENT = "operator without a rule; running it shows that this axis does not pass"
_UNREADABLE = "the rule does not know this form of the operator"
_TAKE_INDICES = frozenset(
    f"aten.{name}"
    for name in ("index", "gather", "index_select", "embedding", "one_hot", "scatter", "scatter_add")
)
_MOST_COMPUTED = 1 << 16
_GATHER_TENSORS = ("aten.cat", "aten.concat", "aten.concatenate", "aten.stack")


class Interpreter:
    """Runs a functional graph on labels; ``values`` then holds the label of every node."""

    def __init__(self, ties: Ties) -> None:
        self.values: dict[fx.Node, Any] = {}
        self.steps: list[OperatorStep] = []
        self.experiments: dict[str, None] = {}
        self.known: dict[fx.Node, Tensor] = {}
        self._ties = ties

    def prove_with(self, ties: Ties) -> None:
        """Use another prover of distinct entries from now on: that of the next graph."""
        self._ties = ties

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

    def _computed(self, node: fx.Node) -> bool:
        """Compute a small tensor that depends on constants alone; return whether its entries are regular."""
        example, target = node.meta.get("val"), node.target
        if (
            not isinstance(target, torch._ops.OpOverload)
            or not isinstance(example, Tensor)
            or target._schema.is_mutable
        ):
            return False
        small = math.prod(int(n) for n in example.shape) <= _MOST_COMPUTED
        constant = all(n in self.known for n in node.all_input_nodes)
        if (
            not small
            or not constant
            or torch.Tag.nondeterministic_seeded in target.tags
            or "empty" in operator_of(node)
        ):
            return False
        args, kwargs = fx.map_arg((node.args, node.kwargs), self.known.__getitem__)
        if kwargs.get("device") is not None:
            kwargs = {**kwargs, "device": "cpu"}
        try:
            with torch.no_grad():
                made = target(*args, **kwargs)
        except Exception:  # what cannot be computed here is left to the rules
            return False
        if isinstance(made, Tensor) and not made.is_meta and made.layout == torch.strided:
            self.known[node] = made
            return is_scaled_identity(made)
        return False

    def _attribute(self, node: fx.Node, modules: Any) -> Any:
        value: Any = modules
        for part in str(node.target).split("."):
            value = getattr(value, part)
        if isinstance(value, Tensor):
            why = Pin("constant of the model", "", module_of(node))
            if not value.is_meta:
                self.known[node] = value.detach()
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
        if self._computed(node):
            return constant_value(
                self.known[node], Pin("made inside the model from positions", op.name, op.module)
            )
        if not isinstance(node.target, torch._ops.OpOverload):
            return self._higher_order(op, node, args, kwargs)
        return self.call(node, op, bind(node.target, args, kwargs))

    def call(self, node: fx.Node, op: Operation, bound: dict[str, Any]) -> Any:
        """Return the labelled result of an operator, given its arguments by name."""
        values = values_in(bound)
        known = rule_of(op.name)
        if known is not None:
            function, kind = known
            result = _attempt(function, op, bound, values)
            if any(v.points is not None and v.points.tied for v in values_in(result)) and (
                not any(v.points is not None for v in values) and self._ties.are_distinct(node)
            ):
                result = _unique(result)
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
        self.steps.append(OperatorStep(kind, tuple(values), mixings, tuple(op.selections)))

    def _higher_order(self, op: Operation, node: fx.Node, args: Any, kwargs: Any) -> Any:
        bodies = [a for a in args if isinstance(a, fx.GraphModule)]
        if len(bodies) == 1 and op.name.startswith("wrap_with"):
            body = bodies[0]
            place = next(k for k, a in enumerate(args) if a is body) + 1
            return self._inside(body, node, args[place:], node.args[place:], op.module)
        return self._unknown(op, values_in([args, kwargs]))

    def _unknown(self, op: Operation, values: list[Value]) -> Any:
        op.use_as_numbers(values)
        self._remember(op, "mixes", values)
        passing = passing_axes(op.node) if isinstance(op.node.target, torch._ops.OpOverload) else None
        return op.unknown(values) if not passing else self._passed(op, passing)

    def _passed(self, op: Operation, passing: Sequence[Passing]) -> Any:
        """Pass on the axes that an experiment lets pass, and pin all others."""
        operands = [joined(self.values[n]) for n in op.node.all_input_nodes]
        results = pytree.tree_leaves(op.result)
        axes = [[op.fixed(int(n), _BY_EXPERIMENT) for n in r.shape] for r in results]
        moving: set[tuple[int, int]] = set()
        for one in passing:
            together = [(k, d) for k, d in enumerate(one.operands) if d is not None]
            moving.update(together)
            labels = [operands[k].axes[d] for k, d in together]
            for other in labels[1:]:
                op.unify(labels[0], other)
            for made, place in zip(axes, one.results, strict=True):
                if place is not None:
                    made[place] = labels[0]
        for k, operand in enumerate(operands):
            for d, axis in enumerate(operand.axes):
                if (k, d) not in moving:
                    op.pin(axis, _BY_EXPERIMENT)
        self.experiments[op.name] = None
        made = [Value(tuple(a)) for a in axes]
        return pytree.tree_unflatten(made, pytree.tree_structure(op.result))

    def _decompose(self, op: Operation, node: fx.Node, values: list[Value]) -> Any:
        """Decompose one unknown operator into known ones, or pin all it touches."""
        body = _decomposition(node)
        if body is None or not _all_known(body):
            return self._unknown(op, values)
        sources = node.all_input_nodes
        if len(body.graph.find_nodes(op="placeholder")) != len(sources):
            return self._unknown(op, values)
        operands = [self.values[n] for n in sources]
        result = self._inside(body, node, operands, sources, op.module)
        return tuple(result) if isinstance(op.result, (tuple, list)) else result

    def _inside(
        self,
        body: fx.GraphModule,
        node: fx.Node,
        operands: Sequence[Any],
        sources: Sequence[Any],
        module: str,
    ) -> Any:
        """Interpret the graph that stands for one node of another graph."""
        inner = body.graph.find_nodes(op="placeholder")
        for place, source in zip(inner, sources, strict=True):
            self._ties.same(place, source)
        given = dict(zip((n.name for n in inner), operands, strict=True))
        result = self.run(body.graph, given, body, module)
        made = body.graph.output_node().args[0]
        if isinstance(made, fx.Node):
            self._ties.same(node, made)
        return result


def _attempt(function: Rule, op: Operation, bound: Mapping[str, Any], values: Sequence[Value]) -> Any:
    """Return what a rule says; pin everything if it cannot read the call or its answer has another shape."""
    try:
        result = function(op, **bound)
    except UnsplittableError:  # the labels do not allow what the operator does
        pass
    except (TypeError, ValueError, IndexError, AttributeError) as failure:
        report_failure(op.node, failure)
    else:
        if _fits(result, op.result):
            return result
        report_failure(op.node, None)
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


def _unique(result: Any) -> Any:
    """Mark the positions that a ranking of different entries found as the only ones possible."""
    if isinstance(result, Value):
        points = result.points
        return result if points is None else replace(result, points=replace(points, tied=False))
    return tuple(_unique(r) for r in result) if isinstance(result, (tuple, list)) else result


def _with_points(result: Any, points: Pointer | None) -> Any:
    if isinstance(result, Value):
        return replace(result, points=points)
    return tuple(_with_points(r, points) for r in result) if isinstance(result, (tuple, list)) else result


def bind(target: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of an operator by name, the first tensor as ``x``."""
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


def _decomposition(node: fx.Node) -> fx.GraphModule | None:
    """Return the operator written in simpler operators, or ``None`` when it has no decomposition."""
    sources = node.all_input_nodes
    fakes = [n.meta.get("val") for n in sources]
    if not all(isinstance(f, Tensor) for f in fakes):
        return None

    target: Any = node.target

    def call(*tensors: Tensor) -> Any:
        table = dict(zip(sources, tensors, strict=True))
        args = fx.map_arg(node.args, table.__getitem__)
        kwargs = fx.map_arg(node.kwargs, table.__getitem__)
        return target(*args, **kwargs)

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
            if rule_of(operator_of(node)) is None and torch.Tag.pointwise not in target.tags:
                return False
    return True
