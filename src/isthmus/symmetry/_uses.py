"""How a network uses the tensors of its state: which axes it keeps, sums over, or multiplies one by one.

The graph is run on *origins*. For every axis of a value that is computed from the state alone, they are the axes of the
tensors that vary along it, and whether the value is linear in them. For every axis of a value that depends on the
inputs, they only say whether units sit on it, as the layers before have made them, or entries that somebody copied
there. Where a tensor of the state meets data, the operator says a word about each of its axes:

- ``holds``: the result has one unit for each position, linear in the tensor;
- ``reads``: it is summed over against the units of the data, linear in the tensor;
- ``scales``: each unit of the data is multiplied (or divided) by its own entry;
- ``unknown``: anything else, and every operator that is not listed here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from isthmus.symmetry._contractions import Contraction, contraction_of
from isthmus.symmetry._listed import (
    CONVOLUTIONS,
    COPIES,
    NORM_WORDS,
    NORMS,
    RECURRENT,
    REDUCTIONS,
    RESHAPES,
    SAME_AXES,
    SUMS,
    VIEWS,
)
from isthmus.symmetry._origins import (
    DATA,
    NOTHING,
    Along,
    Origins,
    Uses,
    Word,
    bent,
    part_of,
    shape_of,
    spread,
    strided,
)
from isthmus.symmetry._strict import report_failure
from isthmus.symmetry._trace import Trace, bound_arguments, flat, operator_of

__all__ = ["find_uses"]


def find_uses(traced: Trace, uses: Uses) -> None:
    """Add what one graph says about the tensors of the state."""
    _OriginWalk(traced, uses).walk()


class _OriginWalk:
    """Runs one graph on origins."""

    def __init__(self, traced: Trace, uses: Uses) -> None:
        self._traced, self._uses = traced, uses
        self._found: dict[fx.Node, Any] = {}
        self._data: set[fx.Node] = set()
        self._rules = self._all_rules()

    def walk(self) -> None:
        """Run the graph."""
        for node in self._traced.graph.nodes:
            if node.op == "placeholder":
                self._placeholder(node)
            elif node.op == "call_function":
                if any(n in self._data for n in node.all_input_nodes):
                    self._data.add(node)
                self._found[node] = self._settled(node, self._result(node))

    def _placeholder(self, node: fx.Node) -> None:
        shape = shape_of(node)
        if node.name in self._traced.tensors:
            name = self._traced.first_name(self._traced.tensors[node.name])
            self._found[node] = tuple(frozenset({Along(name, a, 1, n)}) for a, n in enumerate(shape))
        elif node.name in self._traced.constants:
            self._found[node] = (NOTHING,) * len(shape)
        else:
            self._data.add(node)
            self._found[node] = (frozenset({DATA}),) * len(shape)

    def _result(self, node: fx.Node) -> Any:
        operator = operator_of(node)
        if operator == "getitem":
            of = self._found.get(node.args[0])  # pyright: ignore[reportArgumentType]
            return of[int(node.args[1])] if isinstance(of, list) else None  # pyright: ignore[reportArgumentType]
        known = isinstance(node.target, torch._ops.OpOverload)
        name = operator.removeprefix("aten.") if known and operator.startswith("aten.") else ""
        rule = self._rules.get(name)
        if rule is None and known and torch.Tag.pointwise in node.target.tags:  # type: ignore[union-attr]
            rule = self._pointwise
        try:
            made = None if rule is None else rule(node)
        except (TypeError, ValueError, IndexError, KeyError, AttributeError) as failure:
            report_failure(node, failure)
            made = None  # a call that the rule cannot read says nothing
        if made is None:
            for n in node.all_input_nodes:
                self._say_all(n, "unknown")
        return made

    def _settled(self, node: fx.Node, made: Any) -> Any:
        """Return origins as they are passed on: data only say where units sit; whole numbers come from nowhere."""
        values = node.meta.get("val")
        if isinstance(values, (list, tuple)):
            parts = made if isinstance(made, list) else [None] * len(values)
            return [
                self._settled_one(node, v, m) if isinstance(v, Tensor) else None
                for v, m in zip(values, parts, strict=True)
            ]
        return self._settled_one(node, values, made) if isinstance(values, Tensor) else None

    def _settled_one(self, node: fx.Node, value: Tensor, made: Origins | None) -> Origins:
        if made is None or len(made) != value.ndim:
            return (NOTHING,) * value.ndim
        if not value.is_floating_point():
            for alongs in made:
                self._say(alongs, "unknown")
            return (NOTHING,) * value.ndim
        if node in self._data:
            return tuple(frozenset({DATA}) if alongs else NOTHING for alongs in made)
        return made

    def _of(self, node: fx.Node) -> Origins:
        found = self._found.get(node)
        return found if isinstance(found, tuple) else (NOTHING,) * len(shape_of(node))

    def _say(self, alongs: Iterable[Along], word: Word) -> None:
        for along in alongs:
            self._uses.say(along, word)

    def _say_all(self, node: fx.Node, word: Word) -> None:
        found = self._found.get(node)
        for origins in found if isinstance(found, list) else [found]:
            for alongs in origins or ():
                self._say(alongs, word)

    def _all_rules(self) -> dict[str, Callable[[fx.Node], Any]]:
        return {
            **dict.fromkeys(RESHAPES | VIEWS, self._moved),
            **dict.fromkeys(COPIES, self._copied),
            **dict.fromkeys(SAME_AXES, self._kept),
            **dict.fromkeys(REDUCTIONS, self._reduced),
            **dict.fromkeys(NORMS, self._norm),
            **dict.fromkeys(RECURRENT, self._recurrent),
            **dict.fromkeys(CONVOLUTIONS, self._convolution),
            **dict.fromkeys((*SUMS, "linear", "bilinear", "einsum", "outer", "ger"), self._sum_of_products),
            **dict.fromkeys(("cat", "concat", "stack"), self._joined),
            **dict.fromkeys(("embedding", "index_select"), self._looked_up),
            "prelu": self._norm,
            "_weight_norm": self._normalised_weight,
            "repeat": self._repeated,
            "scaled_dot_product_attention": self._attention,
        }

    # Moving entries

    def _moved(self, node: fx.Node) -> Any:
        source = node.all_input_nodes[0]
        values = node.meta["val"]
        several = isinstance(values, (list, tuple))
        results: Sequence[Tensor] = values if several else [values]
        made: list[list[set[Along]]] = [[set() for _ in r.shape] for r in results]
        reshapes = operator_of(node).removeprefix("aten.") in RESHAPES
        shape = shape_of(source)
        for axis, alongs in enumerate(self._of(source)):
            if not alongs:
                continue
            places = (
                [spread(shape, axis, [int(n) for n in results[0].shape])]
                if reshapes
                else strided(node, source, axis)
            )
            for axes, where in zip(made, places, strict=True):
                for place, step, number in where:
                    axes[place] |= {part_of(along, step, number) for along in alongs}
        found = [tuple(frozenset(alongs) for alongs in axes) for axes in made]
        return found if several else found[0]

    def _copied(self, node: fx.Node) -> Any:
        return self._of(node.all_input_nodes[0])

    def _kept(self, node: fx.Node) -> Origins | None:
        """Return the axes of the first operand; a tensor of the state is not followed through."""
        for n in node.all_input_nodes:
            self._say_all(n, "unknown")
        source = node.all_input_nodes[0]
        return self._of(source) if source in self._data else None

    def _repeated(self, node: fx.Node) -> Origins | None:
        source = node.all_input_nodes[0]
        shape, result = shape_of(source), shape_of(node)
        own = self._of(source)
        made = [NOTHING] * (len(result) - len(shape))
        for size, new, alongs in zip(shape, result[len(made) :], own, strict=True):
            if size != new:
                self._say(alongs, "unknown")
            made.append(alongs if size == new else NOTHING)
        return tuple(made)

    def _reduced(self, node: fx.Node) -> Origins | None:
        """Return what a sum over some axes leaves; only sums and means are linear."""
        bound = bound_arguments(node)
        source = node.all_input_nodes[0]
        dims = bound.get("dim")
        if dims is None or len(node.all_input_nodes) > 1:
            return None
        rank = len(shape_of(source))
        over = {int(d) % rank for d in (dims if isinstance(dims, (list, tuple)) else [dims])}
        over = over or set(range(rank))
        linear = operator_of(node) in ("aten.sum", "aten.mean")
        made: list[frozenset[Along]] = []
        for axis, alongs in enumerate(self._of(source)):
            if axis in over:
                self._say(alongs, "unknown")
                made += [NOTHING] if bound.get("keepdim") else []
            else:
                made.append(alongs if linear else bent(alongs))
        return tuple(made)

    def _joined(self, node: fx.Node) -> Origins:
        """Put tensors one after another; those of the state hold what they bring to data."""
        bound = bound_arguments(node)
        parts: list[fx.Node] = list(bound["tensors"])
        shape = shape_of(node)
        made = [set[Along]() for _ in shape]
        stacked = operator_of(node) == "aten.stack"
        place = int(bound.get("dim") or 0) % len(shape)
        for n in parts:
            if node in self._data:
                self._say_all(n, "holds")
            axes = [k for k in range(len(shape)) if not stacked or k != place]
            if len(self._of(n)) < len(axes):
                continue  # an empty tensor of one axis, which is left out (a cache that holds nothing yet)
            for k, alongs in zip(axes, self._of(n), strict=True):
                made[k] |= alongs
        return tuple(frozenset(alongs) for alongs in made)

    def _looked_up(self, node: fx.Node) -> Origins | None:
        """Take rows of a table: the other axes hold; how rows are chosen is no matter of units."""
        bound = bound_arguments(node)
        table = bound.get("weight", bound.get("self"))
        index = bound["indices"] if "indices" in bound else bound["index"]
        if not isinstance(table, fx.Node) or not isinstance(index, fx.Node):
            return None
        own = self._of(table)
        dim = int(bound.get("dim") or 0) % len(own)
        self._say(own[dim], "unknown")
        others = [alongs for k, alongs in enumerate(own) if k != dim]
        if node in self._data and table not in self._data:
            for alongs in others:
                self._say(alongs, "holds")
        places = (NOTHING,) * len(shape_of(index))
        return (*own[:dim], *places, *own[dim + 1 :])

    # Entry by entry

    def _pointwise(self, node: fx.Node) -> Origins | None:
        if not isinstance(node.meta.get("val"), Tensor):
            return None
        bound = bound_arguments(node)
        operands = [v for v in flat(bound.values()) if isinstance(v, fx.Node)]
        kind = operator_of(node).removeprefix("aten.")
        if kind in ("add", "sub", "rsub") and not isinstance(bound.get("other"), fx.Node):
            kind = "shifted"
        if bound.get("rounding_mode") is not None:
            kind = "rounded"
        shape = shape_of(node)
        made = [set[Along]() for _ in shape]
        for k, n in enumerate(operands):
            others = operands[:k] + operands[k + 1 :]
            for axis, alongs in enumerate(self._of(n)):
                place = axis + len(shape) - len(shape_of(n))
                varying = [o for o in others if _varies(o, shape, place)]
                word, linear = self._word(kind, k, others, varying, len(shape) - place)
                if shape_of(n)[axis] != shape[place]:
                    word, linear, alongs = "unknown", False, alongs - {DATA}
                if node in self._data:
                    self._say(alongs, word)
                made[place] |= alongs if linear else bent(alongs)
        return tuple(frozenset(alongs) for alongs in made)

    def _word(
        self, kind: str, k: int, others: Sequence[fx.Node], varying: Sequence[fx.Node], back: int
    ) -> tuple[Word, bool]:
        """Return what an operator says of one axis of its ``k``-th operand, and whether the result is linear in it."""
        units = [bool(self._of(o)[len(shape_of(o)) - back]) for o in varying]
        if kind in ("add", "sub", "rsub"):
            fits = len(varying) == len(others) and all(units)
            return ("holds", True) if fits else ("unknown", False)
        if kind == "mul" or (kind == "div" and len(others) <= 1):
            if not varying and (kind == "mul" or k == 0):
                return "holds", True
            single = len(varying) == 1 and all(units) and varying[0] in self._data
            return ("scales" if single else "unknown"), False
        return "unknown", False

    # Sums of products

    def _contracted(self, node: fx.Node, form: Contraction) -> Origins:
        """Sum products of operands over the letters that the result lacks."""
        full, operands, out = form.sizes(), form.operands, form.out
        made: dict[Any, set[Along]] = {letter: set() for letter in out}
        for k, (n, letters) in enumerate(operands):
            for axis, letter in enumerate(letters):
                alongs = self._of(n)[axis]
                others = [
                    (j, o, self._of(o)[other.index(letter)])
                    for j, (o, other) in enumerate(operands)
                    if j != k and letter in other and shape_of(o)[other.index(letter)] == full[letter]
                ]
                if (
                    letter in form.mixed
                    or list(letters).count(letter) > 1
                    or shape_of(n)[axis] != full[letter]
                ):
                    self._say(alongs, "unknown")
                    alongs = alongs & {DATA} if shape_of(n)[axis] == full[letter] else NOTHING
                elif letter not in made:
                    self._summed(alongs, k, n, others, layer=form.layer)
                elif others:
                    single = len(others) == 1 and others[0][1] in self._data and bool(others[0][2])
                    if node in self._data:
                        self._say(alongs, "scales" if single else "unknown")
                    alongs = bent(alongs)
                elif node in self._data or (form.layer and k == 1):
                    self._say(alongs, "holds")
                if letter in made:
                    made[letter] |= alongs
        return tuple(frozenset(made[letter]) for letter in out)

    def _summed(
        self,
        alongs: frozenset[Along],
        k: int,
        node: fx.Node,
        others: Sequence[tuple[int, fx.Node, frozenset[Along]]],
        *,
        layer: bool,
    ) -> None:
        """Say what a sum over an axis makes of an operand."""
        if node in self._data:
            return
        if len(others) != 1 or not others[0][2]:
            self._say(alongs, "unknown")
            return
        j, other, theirs = others[0]
        if other in self._data:
            self._say(alongs, "reads")
        elif layer:
            self._say(alongs, "reads" if k == 1 else "holds")
        elif not all(along.linear for along in (*alongs, *theirs)):
            self._say((*alongs, *theirs), "unknown")
        elif k < j:
            self._uses.products.append((alongs, theirs))

    def _shifted(self, node: fx.Node, bias: Any, made: Origins) -> Origins:
        """Add a bias that is broadcast from the right."""
        if not isinstance(bias, fx.Node):
            return made
        shape, own = shape_of(node), shape_of(bias)
        found = list(made)
        for axis, alongs in enumerate(self._of(bias)):
            place = axis + len(shape) - len(own)
            fits = own[axis] == shape[place] and bool(made[place])
            self._say(alongs, "holds" if fits else "unknown")
            found[place] = found[place] | alongs
        return tuple(found)

    def _sum_of_products(self, node: fx.Node) -> Origins | None:
        form = contraction_of(node)
        if form is None:
            return None
        made = self._contracted(node, form)
        return self._shifted(node, form.bias, made)

    def _attention(self, node: fx.Node) -> Origins | None:
        form, mask = contraction_of(node), bound_arguments(node).get("attn_mask")
        if isinstance(mask, fx.Node):
            self._say_all(mask, "unknown")
        if form is None or not any(n in self._data for n, _ in form.operands):
            return None
        return self._contracted(node, form)

    # Layers

    def _convolution(self, node: fx.Node) -> Origins | None:
        bound = bound_arguments(node)
        inputs, weight, groups = bound["input"], bound["weight"], int(bound.get("groups") or 1)
        transposed = "transpose" in operator_of(node) or bool(bound.get("transposed"))
        source, own, shape = self._of(inputs), self._of(weight), shape_of(weight)
        channel = len(source) - len(shape) + 1
        if groups > 1 and node not in self._data:
            return None
        if inputs not in self._data:  # what is learned and filtered is held by its channels
            for axis, alongs in enumerate(source):
                self._say(alongs, "holds" if axis == channel else "unknown")
        units = bool(source[channel])
        for axis, alongs in enumerate(own):
            word: Word = "holds" if axis == int(transposed) else "reads" if units else "unknown"
            word = word if axis < 2 else "unknown"
            if axis == 0 and groups > 1:
                members = shape[0] // groups
                self._say(
                    {part_of(along, members, groups) for along in alongs}, "scales" if units else "unknown"
                )
                alongs = frozenset(part_of(along, 1, members) for along in alongs)
                if members == 1:
                    continue
            self._say(alongs, word)
        if isinstance(bound.get("bias"), fx.Node):
            self._say_all(bound["bias"], "holds")
        made = list(source)
        made[channel] = own[int(transposed)]
        return tuple(made)

    def _norm(self, node: fx.Node) -> Any:
        """Say of gains and variances that they scale, of biases and means that they hold."""
        bound = bound_arguments(node)
        source = bound.get("input", bound.get("self"))
        if not isinstance(source, fx.Node) or source not in self._data:
            return None
        units, rank = self._of(source), len(shape_of(source))
        trailing = any(word in operator_of(node) for word in ("layer_norm", "rms_norm"))
        for name, word in NORM_WORDS.items():
            tensor = bound.get(name)
            if not isinstance(tensor, fx.Node):
                continue
            for axis, alongs in enumerate(self._of(tensor)):
                place = rank - len(shape_of(tensor)) + axis if trailing else 1
                fits = (
                    place < rank and shape_of(tensor)[axis] == shape_of(source)[place] and bool(units[place])
                )
                self._say(alongs, word if fits else "unknown")
        several = isinstance(node.meta["val"], (list, tuple))
        return [units, *[None] * (len(node.meta["val"]) - 1)] if several else units

    def _normalised_weight(self, node: fx.Node) -> Origins:
        """Return the axes of ``g v / |v|``, which is linear in neither along any axis."""
        bound = bound_arguments(node)
        values, lengths = self._of(bound["v"]), self._of(bound["g"])
        return tuple(bent(one | other) for one, other in zip(values, lengths, strict=True))

    def _recurrent(self, node: fx.Node) -> list[Origins | None] | None:
        """Say of the matrices of a recurrence that rows hold and columns read; its biases and first states hold."""
        bound = bound_arguments(node)
        given = bound.get("input", bound.get("data"))
        if not isinstance(given, fx.Node) or given not in self._data:
            return None
        for n in flat(bound["params"]):
            for axis, alongs in enumerate(self._of(n)):
                self._say(alongs, "holds" if axis == 0 else "reads")
        for n in flat([bound["hx"]]):
            for axis, alongs in enumerate(self._of(n)):
                self._say(alongs, "holds" if axis == len(shape_of(n)) - 1 else "unknown")
        results: list[Tensor] = list(node.meta["val"])
        made: list[Origins | None] = []
        for result in results:
            made.append((*[NOTHING] * (result.ndim - 1), frozenset({DATA})))
        return made


def _varies(node: fx.Node, shape: Sequence[int], place: int) -> bool:
    """Return whether an operand has entries of its own along an axis of the result."""
    axis = place - len(shape) + len(shape_of(node))
    return axis >= 0 and shape_of(node)[axis] == shape[place]
