"""The walk over a graph that follows units of the state through what is linear in them, up to inner products."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, fx

from isthmus.symmetry._contractions import Contraction
from isthmus.symmetry._listed import DROPOUTS, RESHAPES, SAME_ENTRIES, VIEWS
from isthmus.symmetry._origins import shape_of
from isthmus.symmetry._planes.forms import UnitForm, joined, mapped, summed
from isthmus.symmetry._planes.layers import PlaneLayer, PlaneLayers
from isthmus.symmetry._planes.scores import ScoreProduct
from isthmus.symmetry._planes.symbols import Coefficients, Symbols
from isthmus.symmetry._planes.tables import LARGEST, Tables, moved_by
from isthmus.symmetry._planes.units import Units
from isthmus.symmetry._trace import Trace, bound_arguments, operator_of

__all__ = ["Walk"]

_MOVED = (
    RESHAPES
    | VIEWS
    | {
        *("repeat", "repeat_interleave", "flip", "roll", "tile"),
    }
)
_MADE = frozenset(
    f"{way}" for kind in ("empty", "zeros", "ones", "full") for way in (f"new_{kind}", f"{kind}_like")
)
"""What takes nothing but a shape from its operand."""
_JOINED = frozenset({"cat", "concat", "concatenate", "stack", "slice_scatter", "select_scatter"})
_FOLLOWED = (
    _MOVED
    | _JOINED
    | SAME_ENTRIES
    | {"copy", "index", "mul", "div", "neg", "add", "sub", "view_as_complex", "view_as_real"}
)


class Walk:
    """Follows the units of one graph.

    Args:
        traced: the graph.
        units: shared by all graphs.
        symbols: shared by all graphs.
        numbers: of coefficients, shared by all graphs.
    """

    def __init__(self, traced: Trace, units: Units, symbols: Symbols, numbers: Coefficients) -> None:
        self._traced, self._units, self._numbers = traced, units, numbers
        self._symbols = symbols
        self._tables = Tables(symbols, traced)
        self._layers = PlaneLayers(traced, units)
        self._forms: dict[fx.Node, Any] = {}

    def run(self, inner_products: Sequence[tuple[fx.Node, Contraction]]) -> None:
        """Follow the units of the layers that some inner products go back to, and examine all of these.

        Args:
            inner_products: nodes, with the letters of their two operands.
        """
        starts: dict[fx.Node, PlaneLayer] = {}
        for _, form in inner_products:
            for node, _ in form.operands[:2]:
                starts |= self._sources(node)
        scores = dict(inner_products)
        for node in self._traced.graph.nodes:
            if node in starts:
                self._start(node, starts[node])
            elif node.op == "call_function" and any(n in self._forms for n in node.all_input_nodes):
                self._follow(node, scores)
        kept = [*self._traced.asked, *self._traced.staying.values()]
        for node in kept:
            self._spoil(self._forms.get(node))

    def account(self) -> None:
        """Spoil what is followed in any graph and used in this one in any other way."""
        self._layers.finish()

    def spoil_outputs(self, nodes: Sequence[fx.Node]) -> None:
        """Spoil the units of what is returned."""
        for node in nodes:
            self._spoil(self._forms.get(node))

    def _sources(self, node: fx.Node) -> dict[fx.Node, PlaneLayer]:
        """Return the layers that a value goes back to through what is followed."""
        found: dict[fx.Node, PlaneLayer] = {}
        waiting, seen = [node], {node}
        while waiting:
            current = waiting.pop()
            layer = self._layers.of(current)
            if layer is not None:
                found[current] = layer
                continue
            name = operator_of(current).removeprefix("aten.") if current.op == "call_function" else ""
            if current.target is not operator.getitem and name not in _FOLLOWED | DROPOUTS:
                continue
            fresh = [n for n in current.all_input_nodes if n not in seen]
            seen.update(fresh)
            waiting += fresh
        return found

    def _start(self, node: fx.Node, layer: PlaneLayer) -> None:
        for n in node.all_input_nodes:  # what flows into a layer is no inner product
            self._spoil(self._forms.get(n))
        size = 1
        for n in shape_of(node):
            size *= n
        if size <= LARGEST:
            self._forms[node] = self._layers.started(node, layer, self._symbols, self._numbers)

    # --- Operators ---------------------------------------------------------------------------------------------

    def _follow(self, node: fx.Node, scores: Mapping[fx.Node, Contraction]) -> None:
        if node.meta.get("val") is None and not node.users:
            return  # an assertion: it computes nothing
        if operator_of(node).removeprefix("aten.") in _MADE:
            return
        if node in scores:
            self._score(node, scores[node])
            return
        found = self._made(node)
        if found is None:
            for n in node.all_input_nodes:
                self._spoil(self._forms.get(n))
        else:
            self._forms[node] = found

    def _made(self, node: fx.Node) -> Any:
        """Return the form of a result, or of each of several; ``None`` where it is none."""
        if node.target is operator.getitem:
            several = self._forms[node.all_input_nodes[0]]
            return several[int(node.args[1])] if isinstance(several, list) else None  # pyright: ignore
        target = node.target
        if not isinstance(target, torch._ops.OpOverload) or target.namespace != "aten":
            return None
        name = operator_of(node).removeprefix("aten.")
        bound = bound_arguments(node)
        if name in _JOINED:
            return self._joined(node)
        if name in ("add", "sub"):
            return self._added(node, bound, name)
        if name in ("mul", "div"):
            return self._multiplied(bound, name)
        source = bound["src"] if name == "copy" else node.all_input_nodes[0]
        form = self._forms.get(source)
        if not isinstance(form, UnitForm):
            return None
        if name == "copy":  # what is overwritten plays no role; whole numbers hold no units
            kept = node.meta["val"].is_floating_point() and not form.is_complex
            return form.expanded(shape_of(node)) if kept else None
        if name == "neg":
            return form.negated(self._numbers)
        if name == "index":
            return self._picked(node, bound, form)
        if name == "view_as_complex":
            return None if form.is_complex else UnitForm(form.units, form.coefficients, is_complex=True)
        if name == "view_as_real":
            return UnitForm(form.units, form.coefficients) if form.is_complex else None
        if form.is_complex:
            return None
        if name in SAME_ENTRIES or (name in DROPOUTS and not bound.get("train")):
            return form if node.meta["val"].is_floating_point() else None
        if name in _MOVED:
            return mapped(form, lambda entries: moved_by(node, {source: entries}))
        return None

    def _picked(self, node: fx.Node, bound: Mapping[str, Any], form: UnitForm) -> Any:
        """Take entries by constant numbers."""
        places = {n: self._tables.constant(n) for n in bound["indices"] if n is not None}
        known = {n: value for n, value in places.items() if value is not None}
        if form.is_complex or len(known) < len(places):
            return None
        return mapped(form, lambda entries: moved_by(node, {**known, bound["self"]: entries}))

    def _joined(self, node: fx.Node) -> Any:
        parts = node.all_input_nodes
        found = [self._forms.get(n) for n in parts]
        if any(isinstance(f, list) or (f is not None and f.is_complex) for f in found):
            return None
        forms = dict(zip(parts, joined(found, [shape_of(n) for n in parts]), strict=True))
        made: list[tuple[Tensor, Tensor]] = []
        for t in range(len(next(iter(forms.values())).units)):
            units = moved_by(node, {n: f.units[t] for n, f in forms.items()})
            coefficients = moved_by(node, {n: f.coefficients[t] for n, f in forms.items()})
            if not isinstance(units, Tensor) or not isinstance(coefficients, Tensor):
                return None
            made.append((units, coefficients))
        return UnitForm(torch.stack([u for u, _ in made]), torch.stack([c for _, c in made]))

    def _added(self, node: fx.Node, bound: Mapping[str, Any], name: str) -> UnitForm | None:
        one, two = (self._term(bound[key]) for key in ("self", "other"))
        if one is None or two is None or bound.get("alpha", 1) != 1 or one.is_complex or two.is_complex:
            return None
        made = summed(one, two if name == "add" else two.negated(self._numbers), shape_of(node))
        if made is not None:
            biases = [n for n in node.all_input_nodes if n not in self._forms]
            self._layers.note_use(node, *biases)
        return made

    def _term(self, operand: Any) -> UnitForm | None:
        """Return an operand of a sum as a form: one that is followed, or a tensor of the state, as biases are."""
        if not isinstance(operand, fx.Node):
            return None
        found = self._forms.get(operand)
        return found if isinstance(found, UnitForm) else self._layers.bias(operand)

    def _multiplied(self, bound: Mapping[str, Any], name: str) -> UnitForm | None:
        one, two = bound["self"], bound["other"]
        if bound.get("rounding_mode") is not None:
            return None
        if name == "mul" and one not in self._forms:
            one, two = two, one
        form = self._forms.get(one)
        if not isinstance(form, UnitForm) or two in self._forms:
            return None
        if isinstance(two, (int, float)) and not isinstance(two, bool):
            return None if form.is_complex else self._scaled(form, two, name)
        table = self._tables.of(two) if isinstance(two, fx.Node) else None
        if not isinstance(table, Tensor) or not isinstance(two, fx.Node):
            return None
        if form.is_complex or two.meta["val"].is_complex():
            both = form.is_complex and two.meta["val"].is_complex() and name == "mul"
            parts = [self._tables.part(table, which) for which in ("real", "imaginary")]
            return form.turned(self._numbers, parts[0], parts[1]) if both else None
        return form.multiplied(self._numbers, table if name == "mul" else self._tables.reciprocal(table))

    def _scaled(self, form: UnitForm, by: float, name: str) -> UnitForm | None:
        factor = Fraction(by) if by == by and abs(by) != float("inf") else Fraction(0)
        if not factor:
            return None
        made = self._numbers.scaled(form.coefficients, factor if name == "mul" else 1 / factor)
        return UnitForm(form.units, torch.where(form.units >= 0, made, 0))

    # --- Inner products ----------------------------------------------------------------------------------------

    def _score(self, node: fx.Node, form: Contraction) -> None:
        (query, first), (key, second) = form.operands[:2]
        sides = [self._forms.get(n) for n in (query, key)]
        others = _beside(node, query, key)
        listed = [form.operands[2][0]] if len(form.operands) > 2 else []
        for n in (*others, *listed):
            self._spoil(self._forms.get(n))
        plain = [s for s in sides if isinstance(s, UnitForm) and not s.is_complex]
        if len(plain) < 2:
            for side in sides:
                self._spoil(side)
            return
        aligned = self._aligned(node, form, (plain[0], plain[1]), (list(first), list(second)))
        if aligned is None:
            for side in plain:
                self._units.spoil(side.units)
            return
        ScoreProduct(self._units, self._numbers, aligned, node).examine()

    def _aligned(
        self,
        node: fx.Node,
        form: Contraction,
        sides: tuple[UnitForm, UnitForm],
        letters: tuple[list[Any], list[Any]],
    ) -> tuple[UnitForm, UnitForm] | None:
        """Return both sides as ``(common, own, summed)``; ``None`` where letters are summed over on one side alone."""
        repeated = _repeats(node, sides)
        if repeated is None:
            return None
        sizes: dict[Any, int] = {}
        for side, own in zip(repeated, letters, strict=True):
            if len(set(own)) < len(own):
                return None
            for letter, size in zip(own, side.shape, strict=True):
                sizes[letter] = max(sizes.get(letter, 1), size)
        out = [*form.out, "s"] if operator_of(node) == "aten.scaled_dot_product_attention" else list(form.out)
        both = [letter for letter in letters[0] if letter in letters[1]]
        common, over = [c for c in both if c in out], [c for c in both if c not in out]
        if any(letter not in out and letter not in over for own in letters for letter in own):
            return None
        made: list[UnitForm] = []
        for side, own in zip(repeated, letters, strict=True):
            alone = [letter for letter in own if letter not in both]
            order = [0, *(1 + own.index(letter) for letter in (*common, *alone, *over))]
            shape = [sizes[letter] for letter in (*common, *alone, *over)]
            parts = [
                part.permute(order).expand(len(part), *shape) for part in (side.units, side.coefficients)
            ]
            ends = [_product([sizes[letter] for letter in listed]) for listed in (common, alone, over)]
            made.append(
                UnitForm(parts[0].reshape(len(parts[0]), *ends), parts[1].reshape(len(parts[1]), *ends))
            )
        return made[0], made[1]

    def _spoil(self, form: Any) -> None:
        for one in form if isinstance(form, list) else [form]:
            if isinstance(one, UnitForm):
                self._units.spoil(one.units)


def _beside(node: fx.Node, *factors: fx.Node) -> list[fx.Node]:
    """Return what an inner product takes beside its factors; a factor that is a summand or a mask, too, is among it."""
    given: list[fx.Node] = []
    fx.map_arg((node.args, node.kwargs), given.append)
    for factor in factors:
        given.remove(factor)
    return given


def _product(sizes: Sequence[int]) -> int:
    found = 1
    for size in sizes:
        found *= size
    return found


def _repeats(node: fx.Node, sides: tuple[UnitForm, UnitForm]) -> tuple[UnitForm, UnitForm] | None:
    """Return both sides with one number of heads: grouped attention repeats those of the keys inside the operator."""
    query, key = sides
    if operator_of(node) != "aten.scaled_dot_product_attention":
        return sides
    heads = [side.shape[-3] if len(side.shape) > 2 else 1 for side in sides]
    if heads[0] == heads[1] or (1 in heads and not bound_arguments(node).get("enable_gqa")):
        return sides
    if heads[1] == 0 or heads[0] % heads[1]:
        return None
    times = heads[0] // heads[1]
    parts = [part.repeat_interleave(times, -3) for part in (key.units, key.coefficients)]
    return query, UnitForm(parts[0], parts[1])
