"""The walk over a graph that grades every value, and what rules for operators say it with."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, fx

from isthmus.symmetry._acts import Acts
from isthmus.symmetry._axes import Atom
from isthmus.symmetry._demands import ZERO, Cause, Demands, Grade
from isthmus.symmetry._listed import COPIES, RESHAPES, VIEWS
from isthmus.symmetry._origins import shape_of
from isthmus.symmetry._powers import plus
from isthmus.symmetry._spots import Place, Spot, aligned, between, spots_of
from isthmus.symmetry._strict import report_failure
from isthmus.symmetry._trace import Trace, bound_arguments, flat, module_of, operator_of

__all__ = ["Graded", "Grading", "Operator", "GradeRule"]

_ZEROS = frozenset({"zeros", "new_zeros", "zeros_like"})
_FULL = frozenset({"full", "new_full", "full_like"})
_MOVED = RESHAPES | VIEWS | COPIES
_PERMUTED = Acts.PERMUTATION
GradeRule = Callable[["Operator"], "bool | None"]
"""Grades the results of an operator; returns False for a call that it does not know."""


@dataclass
class Graded:
    """A value: its spots, and the grade of each."""

    spots: Sequence[Spot]
    grades: list[Grade]


@dataclass
class Grading:
    """Grades of the values of all graphs of a network, and what they demand.

    Args:
        rules: by operator.
        ones: tensors of the state that are known to hold nothing but ones (gains after folding).
        zeros: tensors of the state that are known to hold nothing but zeros.

    Attributes:
        demands: by atom.
        unknowns: by tensor of the state, the unknown of each of its spots.
    """

    rules: Mapping[str, GradeRule]
    ones: frozenset[str] = frozenset()
    zeros: frozenset[str] = frozenset()
    demands: dict[Atom, Demands] = field(default_factory=dict[Atom, Demands])
    unknowns: dict[str, list[tuple[Spot, int]]] = field(default_factory=dict[str, list[tuple[Spot, int]]])
    _graded: dict[tuple[fx.Node, int], Graded] = field(default_factory=dict[tuple[fx.Node, int], Graded])
    _of_data: set[fx.Node] = field(default_factory=set[fx.Node])
    _count: int = 0

    def of_atom(self, atom: Atom) -> Demands:
        """Return what is demanded of an atom."""
        return self.demands.setdefault(atom, Demands())

    def run(self, traced: Trace, values: Mapping[fx.Node, Any]) -> None:
        """Grade one graph.

        Args:
            traced: the graph.
            values: labels of its nodes, and of those of the graphs in it.
        """
        self._names = {place: traced.first_name(name) for place, name in traced.tensors.items()}
        self._values = values
        for node in traced.graph.find_nodes(op="placeholder"):
            name = self._names.get(node.name)
            if name is not None:
                self._graded[node, 0] = self._of_state(name, values[node], node.meta.get("val"))
            elif node.name not in traced.constants:
                self._of_data.add(node)
        self._walk(traced.graph, traced.program.graph_module)
        for name in sorted(traced.rewritten):
            self._rewritten(traced.first_name(name), traced.staying[name])

    def _rewritten(self, name: str, node: fx.Node) -> None:
        """Demand that what a call makes of a parameter changes as the parameter does."""
        made = self.graded(node)
        own = {(spot.atom, spot.key): unknown for spot, unknown in self.unknowns[name]}
        one, cause = Fraction(1), Cause("written by the model", name.rpartition(".")[0])
        for spot, grade in zip(made.spots, made.grades, strict=True):
            unknown = own.get((spot.atom, spot.key))
            before = ZERO if unknown is None else Grade({unknown: one}, {unknown: one}, {unknown: one})
            self.of_atom(spot.atom).equal(grade, before, cause)

    def state_name(self, node: Any) -> str:
        """Return the name of a tensor of the state, empty for any other value."""
        return (
            self._names.get(node.name, "") if isinstance(node, fx.Node) and node.op == "placeholder" else ""
        )

    def _of_state(self, name: str, value: Any, example: Any) -> Graded:
        one = Fraction(1)
        if name not in self.unknowns:
            self.unknowns[name] = []
            for spot in spots_of(value):
                demands, unknown = self.of_atom(spot.atom), self._count
                self.unknowns[name].append((spot, unknown))
                demands.unknowns.append(unknown)
                self._count += 1
                grade = Grade({unknown: one}, {unknown: one}, {unknown: one})
                if isinstance(example, Tensor) and not example.is_floating_point():
                    demands.zero(grade, Cause(str(example.dtype), name))  # holds no other numbers
                elif name in self.ones:  # must hold nothing but ones afterwards
                    demands.sizes.append((grade.size, Cause("ones", name)))
                    demands.signs.append((grade.sign, Cause("ones", name)))
        known = self.unknowns[name]
        return Graded([s for s, _ in known], [Grade({u: one}, {u: one}, {u: one}) for _, u in known])

    def _walk(self, graph: fx.Graph, modules: Any) -> None:
        for node in graph.nodes:
            if node.op == "call_function":
                if any(n in self._of_data for n in node.all_input_nodes):
                    self._of_data.add(node)
                self._call(node, modules)

    def _call(self, node: fx.Node, modules: Any) -> None:
        if node.target is operator.getitem:
            source, k = node.args
            found = self._graded.get((source, int(k)))  # pyright: ignore[reportArgumentType]
            if found is not None:
                self._graded[node, 0] = found
            return
        if node.meta.get("val") is None and not node.users:
            return  # an assertion: it computes nothing
        bodies = [a for a in node.args if isinstance(a, fx.Node) and a.op == "get_attr"]
        if operator_of(node).startswith("wrap_with") and len(bodies) == 1:
            self._inside(node, bodies[0], modules)
            return
        op = Operator(self, node)
        name = op.name.removeprefix("aten.")
        rule = self.rules.get(name) if op.name.startswith("aten.") else None
        known = False
        if rule is not None:
            try:
                known = rule(op) is not False
            except (TypeError, ValueError, IndexError, KeyError, AttributeError, RuntimeError) as error:
                report_failure(node, error)  # else: a call that the rule cannot read
        op.finish(known)

    def _inside(self, node: fx.Node, body: fx.Node, modules: Any) -> None:
        """Walk the graph that a wrapper calls."""
        inner: Any = modules
        for part in str(body.target).split("."):
            inner = getattr(inner, part)
        given = node.args[list(node.args).index(body) + 1 :]
        places = inner.graph.find_nodes(op="placeholder")
        for place, source in zip(places, given, strict=True):
            if not isinstance(source, fx.Node):
                continue
            if source in self._of_data:
                self._of_data.add(place)
            if (source, 0) in self._graded:
                self._graded[place, 0] = self._graded[source, 0]
        self._walk(inner.graph, inner)
        made = inner.graph.output_node().args[0]
        for k, result in enumerate(made if isinstance(made, (list, tuple)) else [made]):
            found = self._graded.get((result, 0)) if isinstance(result, fx.Node) else None
            if found is not None:
                self._graded[node, k] = found

    def graded(self, node: fx.Node) -> Graded:
        """Return the grades of a value; those of a value of unknown origin are zero, and nothing may mix it."""
        found = self._graded.get((node, 0))
        if found is None:
            spots = spots_of(self._values.get(node))
            for spot in spots:
                self.of_atom(spot.atom).limit(_PERMUTED, Cause("constant", module_of(node)))
            found = self._graded[node, 0] = Graded(spots, [ZERO for _ in spots])
        return found

    def put(self, node: fx.Node, k: int, found: Graded) -> None:
        """Keep the grades of a result."""
        self._graded[node, k] = found

    def is_data(self, node: fx.Node) -> bool:
        """Return whether a value depends on the inputs."""
        return node in self._of_data

    def labels(self, node: fx.Node) -> Any:
        """Return what is known of the axes of a node."""
        return self._values.get(node)


class Operator:
    """One call of an operator, as rules see it."""

    def __init__(self, grading: Grading, node: fx.Node) -> None:
        self.grading, self.node, self.name = grading, node, operator_of(node)
        self.cause = Cause(self.name, module_of(node))
        self._seen: set[tuple[fx.Node, int]] = set()
        self._excused: set[fx.Node] = set()
        self._made: dict[int, list[Grade]] = {}
        labels = grading.labels(node)
        listed = labels if isinstance(labels, (list, tuple)) else [labels]
        self.results = [spots_of(one) for one in listed]
        several = node.meta.get("val")
        values = several if isinstance(several, (list, tuple)) else [several]
        self.shapes = [tuple(int(n) for n in getattr(v, "shape", ())) for v in values]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the (first) result."""
        return self.shapes[0]

    @property
    def bound(self) -> dict[str, Any]:
        """Arguments by name."""
        return bound_arguments(self.node)

    @property
    def operands(self) -> list[fx.Node]:
        """Tensors among the arguments, in order, as often as they stand there."""
        return [n for n in flat(self.bound.values()) if isinstance(n, fx.Node)]

    def demands(self, atom: Atom) -> Demands:
        """Return what is demanded of an atom."""
        return self.grading.of_atom(atom)

    # --- Where units come from ---------------------------------------------------------------------------------

    def carried(self, operand: Any, atom: Atom, ends: tuple[Place, Place]) -> Grade | None:
        """Return the grade of an operand between two of its entries; ``None`` where it has no units there."""
        if not isinstance(operand, fx.Node):
            return None
        known = self.grading.graded(operand)
        found = between(known.spots, atom, ends)
        if not found:
            return None
        grades = [known.grades[k] for k in found]
        self._seen.update((operand, k) for k in found)
        if (
            self.grading.state_name(operand) in self.grading.ones
        ):  # no matrix moves it, whatever moves the units
            self.demands(atom).limit(_PERMUTED, self.cause)
        if len(grades) == 1:
            return grades[0]
        self.demands(atom).limit(_PERMUTED, self.cause)
        return Grade(plus(*(g.size for g in grades)), plus(*(g.sign for g in grades)))

    def beside(self, operand: Any, spot: Spot) -> Grade | None:
        """Return the grade of an operand that is broadcast against the result, where a spot of the result is."""
        if not isinstance(operand, fx.Node):
            return None
        shape = shape_of(operand)
        one, two = (aligned(at, shape) for at in spot.ends())
        return self.carried(operand, spot.atom, (one, two))

    def graded(self, operand: fx.Node) -> Graded:
        """Return the spots of an operand with their grades."""
        return self.grading.graded(operand)

    def is_nothing(self, node: Any) -> bool:
        """Return whether a value is known to be zero everywhere: made so, then at most moved, copied or cast."""
        while isinstance(node, fx.Node):
            name = operator_of(node).removeprefix("aten.")
            if self.grading.state_name(node) in self.grading.zeros or name in _ZEROS:
                return True
            if name in _FULL:
                return bound_arguments(node).get("fill_value") == 0
            if name == "mul":
                return any(self.is_nothing(n) for n in node.all_input_nodes)
            moved = name in _MOVED and len(node.all_input_nodes) > 0
            node = node.all_input_nodes[0] if moved else None
        return False

    # --- What rules say ----------------------------------------------------------------------------------------

    def each(self, grade: Callable[[Spot], Grade | None], k: int = 0) -> None:
        """Grade the spots of a result; where a rule returns nothing, only permutations are left."""
        made: list[Grade] = []
        for spot in self.results[k]:
            found = grade(spot)
            if found is None:
                self.demands(spot.atom).limit(_PERMUTED, self.cause)
            made.append(ZERO if found is None else found)
        self._made[k] = made

    def made(self, k: int) -> list[Grade]:
        """Return the grades that a result has got so far."""
        return self._made[k]

    def stay(self, operand: Any) -> None:
        """Demand that factors do not show in an operand, and that nothing mixes its units."""
        if isinstance(operand, fx.Node):
            known = self.grading.graded(operand)
            for k, (spot, grade) in enumerate(zip(known.spots, known.grades, strict=True)):
                self._seen.add((operand, k))
                self.demands(spot.atom).zero(grade, self.cause)

    def excuse(self, operand: Any) -> None:
        """Say that what the result does not show of an operand plays no role."""
        if isinstance(operand, fx.Node):
            self._excused.add(operand)

    def finish(self, known: bool) -> None:
        """Demand zero of all that no rule has looked at, and keep the grades of the results."""
        overlooked: set[Atom] = set()
        for operand in dict.fromkeys(self.node.all_input_nodes):
            if known and operand in self._excused:
                continue
            graded = self.grading.graded(operand)
            for k, (spot, grade) in enumerate(zip(graded.spots, graded.grades, strict=True)):
                if known and (operand, k) in self._seen:
                    continue
                twin = self._twin(operand, spot) if known else None
                if twin is not None and twin.squared == grade.squared:
                    self.demands(spot.atom).equal(twin, grade, self.cause)
                else:
                    self.demands(spot.atom).zero(grade, self.cause)
                    overlooked.add(spot.atom)
        for k, spots in enumerate(self.results):
            grades = self._made.get(k) if known else None
            if grades is None:
                grades = [self._unknown(spot) for spot in spots]
            for spot, grade in zip(spots, grades, strict=True):
                if spot.atom in overlooked or not self._is_floating(k):
                    self.demands(spot.atom).zero(grade, self.cause)
            if not self._is_floating(k):
                grades = [ZERO for _ in spots]
            self.grading.put(self.node, k, Graded(spots, grades))

    def _twin(self, operand: fx.Node, spot: Spot) -> Grade | None:
        """Return how another segment of an operand changes that a rule has looked at for all of them.

        Segments lie side by side along an axis that the rule mixes, such as the tokens that a sum runs over.
        """
        if spot.segment is None or spot.segment[0] == spot.axis:
            return None
        graded = self.grading.graded(operand)
        for k, (other, grade) in enumerate(zip(graded.spots, graded.grades, strict=True)):
            same = other.atom is spot.atom and other.axis == spot.axis and other.placement == spot.placement
            if same and (operand, k) in self._seen and (other.segment or ())[:1] == spot.segment[:1]:
                return grade
        return None

    def _unknown(self, spot: Spot) -> Grade:
        """Grade what an operator without a rule makes: as zero, which is what its operands must be, too.

        An entry-by-entry function hands on the grade that must be zero, so that one can see what would be without it.
        """
        self.demands(spot.atom).limit(_PERMUTED, self.cause)
        if torch.Tag.pointwise in getattr(self.node.target, "tags", ()):
            carrying = [g for g in (self.beside(n, spot) for n in self.operands) if g is not None]
            if len(carrying) == 1:
                return carrying[0]
        return ZERO

    def _is_floating(self, k: int) -> bool:
        value = self.node.meta.get("val")
        value = value[k] if isinstance(value, (list, tuple)) else value
        return not isinstance(value, Tensor) or value.is_floating_point()
