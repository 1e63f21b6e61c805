"""Layers whose weights hold units: where rows of tensors of the state become entries of a value."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from isthmus.symmetry._contractions import Contraction, contraction_of
from isthmus.symmetry._listed import RESHAPES, SAME_ENTRIES, VIEWS
from isthmus.symmetry._origins import shape_of
from isthmus.symmetry._planes.forms import UnitForm, summed
from isthmus.symmetry._planes.symbols import Coefficients, Symbols
from isthmus.symmetry._planes.tables import LARGEST, moved_by
from isthmus.symmetry._planes.units import Units
from isthmus.symmetry._trace import Trace, operator_of

__all__ = ["PlaneLayer", "PlaneLayers"]

_Chain = tuple[str, Sequence[fx.Node]]


@dataclass(frozen=True)
class PlaneLayer:
    """A product of data with one tensor of the state, and a bias.

    Attributes:
        form: its letters.
        weight: which operand the tensor is.
        data: letters of the other operand.
    """

    form: Contraction
    weight: int
    data: Sequence[Any]


class PlaneLayers:
    """The layers of one graph, and an account of every use of the tensors that are followed.

    Args:
        traced: the graph.
        units: of all tensors.
    """

    def __init__(self, traced: Trace, units: Units) -> None:
        self._traced, self._units = traced, units
        self._names = {place: traced.first_name(name) for place, name in traced.tensors.items()}
        self._overlapping = {traced.first_name(name) for name in traced.overlapping}
        self._used: dict[str, set[fx.Node]] = {}

    def of(self, node: fx.Node) -> PlaneLayer | None:
        """Return a node as a layer: the product of one value that is no tensor of the state with one that is."""
        if node.op != "call_function":
            return None
        try:
            form = contraction_of(node)
        except (KeyError, TypeError, ValueError, IndexError):
            return None
        if form is None or len(form.operands) != 2 or form.mixed:
            return None
        chains = [self._chain(n) for n, _ in form.operands]
        which = [k for k, chain in enumerate(chains) if chain is not None]
        if len(which) != 1 or (form.bias is not None and self._chain(form.bias) is None):
            return None
        if operator_of(node) in ("aten.addmm", "aten.baddbmm") and _scaled(node):
            return None
        return PlaneLayer(form, which[0], list(form.operands[1 - which[0]][1]))

    def started(
        self, node: fx.Node, layer: PlaneLayer, symbols: Symbols, numbers: Coefficients
    ) -> UnitForm | None:
        """Return a layer's result as a form in the units of its weight and bias."""
        operand, own = layer.form.operands[layer.weight]
        out = list(layer.form.out)
        chain = self._chain(operand)
        kept = [letter for letter in own if letter in out]
        if chain is None or len(set(own)) < len(own) or not kept:
            return None
        rows = self._rows(operand, chain, [letter in out for letter in own])
        if rows is None:
            return None
        shape = shape_of(node)
        held = rows[tuple(slice(None) if letter in out else 0 for letter in own)]
        order = sorted(range(len(kept)), key=lambda k: out.index(kept[k]))
        units = held.permute(order).reshape(
            [n if letter in kept else 1 for letter, n in zip(out, shape, strict=True)]
        )
        given = [n if letter in layer.data else 1 for letter, n in zip(out, shape, strict=True)]
        number = int(torch.tensor(given).prod()) if given else 1
        start = symbols.block(("layer", node), number)
        values = numbers.of_symbols(torch.arange(start, start + number)).reshape(given)
        made = UnitForm(units.expand(shape).unsqueeze(0), values.expand(shape).unsqueeze(0))
        if layer.form.bias is not None:
            bias = self.bias(layer.form.bias)
            made = None if bias is None else summed(made, bias, shape)
        if made is not None:
            self.note_use(node, operand, *([layer.form.bias] if layer.form.bias is not None else []))
        return made

    def note_use(self, node: fx.Node, *operands: fx.Node) -> None:
        """Note that an operator uses tensors of the state in a way that is followed."""
        for operand in operands:
            chain = self._chain(operand)
            if chain is not None:
                self._used.setdefault(chain[0], set()).add(node)

    def bias(self, operand: fx.Node) -> UnitForm | None:
        """Return a tensor of the state that is added as a form in its own units."""
        chain = self._chain(operand)
        rows = None if chain is None else self._rows(operand, chain, [True] * len(shape_of(operand)))
        if rows is None:
            return None
        return UnitForm(rows.unsqueeze(0), torch.zeros_like(rows).unsqueeze(0))

    def finish(self) -> None:
        """Spoil the tensors that are followed and used in any other way, or written."""
        for tensor in self._units.tensors:
            places = [
                p
                for p in self._traced.graph.find_nodes(op="placeholder")
                if self._names.get(p.name) == tensor
            ]
            if any(self._used_otherwise(place, tensor) for place in places):
                self._units.spoil_tensor(tensor)
        for name in self._traced.staying:
            self._units.spoil_tensor(self._traced.first_name(name))

    def _used_otherwise(self, node: fx.Node, tensor: str) -> bool:
        for user in node.users:
            asserted = user.meta.get("val") is None and not user.users and user.op == "call_function"
            if asserted or user in self._used.get(tensor, ()):
                continue
            if not _hands_on(user) or self._used_otherwise(user, tensor):
                return True
        return False

    # --- Tensors of the state ----------------------------------------------------------------------------------

    def _chain(self, node: fx.Node) -> _Chain | None:
        """Return the tensor of the state that a value is, and the operators that moved its entries, last one first."""
        moves: list[fx.Node] = []
        while node.op == "call_function" and _hands_on(node):
            moves.append(node)
            node = node.all_input_nodes[0]
        name = self._names.get(node.name) if node.op == "placeholder" else None
        value = node.meta.get("val")
        if name is None or name in self._overlapping or not isinstance(value, Tensor):
            return None
        return (name, moves) if value.is_floating_point() and value.numel() <= LARGEST * 8 else None

    def _rows(self, operand: fx.Node, chain: _Chain, kept: Sequence[bool]) -> Tensor | None:
        """Return the numbers of the units of an operand's entries: those of the tensor's axes that it keeps."""
        name, moves = chain
        place = moves[-1].all_input_nodes[0] if moves else operand
        shape = tuple(shape_of(place))
        digits = [self._moved(torch.arange(n), k, len(shape), shape, moves) for k, n in enumerate(shape)]
        if any(d is None for d in digits):
            return None
        axes: list[int] = []
        for k, digit in enumerate(digits):
            varies = [a for a in range(digit.ndim) if bool((digit != digit.narrow(a, 0, 1)).any())]
            if any(kept[a] for a in varies):
                axes.append(k)
            if len({kept[a] for a in varies}) > 1:
                return None
        steps = [
            int(torch.tensor(shape[k + 1 :]).prod()) if k + 1 < len(shape) else 1 for k in range(len(shape))
        ]
        start = self._units.start(name, shape, tuple(axes))
        units = torch.full(tuple(shape_of(operand)), start)
        for k in axes:
            units = units + digits[k] * steps[k]
        return units

    def _moved(
        self, digits: Tensor, axis: int, rank: int, shape: Sequence[int], moves: Sequence[fx.Node]
    ) -> Any:
        """Return the coordinate on one axis of the tensor that every entry of an operand had there."""
        found: Any = digits.reshape([-1 if k == axis else 1 for k in range(rank)]).expand(tuple(shape))
        for node in reversed(moves):
            if operator_of(node).removeprefix("aten.") not in SAME_ENTRIES:
                found = moved_by(node, {node.all_input_nodes[0]: found})
            if not isinstance(found, Tensor):
                return None
        return found


def _hands_on(node: fx.Node) -> bool:
    """Return whether an operator only moves entries of one tensor into another."""
    name = operator_of(node).removeprefix("aten.") if node.op == "call_function" else ""
    value = node.meta.get("val")
    moved = name in RESHAPES | VIEWS | SAME_ENTRIES and len(node.all_input_nodes) == 1
    return moved and isinstance(value, Tensor) and value.is_floating_point()


def _scaled(node: fx.Node) -> bool:
    """Return whether a product or what is added to it is multiplied by a number."""
    return any(node.kwargs.get(key, 1) != 1 for key in ("alpha", "beta"))
