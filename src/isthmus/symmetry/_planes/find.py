"""The planes of a network: which inner products are looked at, and what is said of the spec."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import fx

from isthmus.symmetry._axes import Fixed, atoms_of, resolve
from isthmus.symmetry._contractions import Contraction, contraction_of
from isthmus.symmetry._planes.groups import groups_of
from isthmus.symmetry._planes.symbols import Coefficients, Symbols
from isthmus.symmetry._planes.units import Units
from isthmus.symmetry._planes.walk import Walk
from isthmus.symmetry._segments import Stacked
from isthmus.symmetry._spec import SymmetrySpec
from isthmus.symmetry._trace import Trace, operator_of
from isthmus.symmetry._values import Value

__all__ = ["with_planes"]


def with_planes(
    spec: SymmetrySpec, traced: Trace, values: Mapping[fx.Node, Any], outputs: Any = None
) -> SymmetrySpec:
    """Return a spec with the planes that turn under inner products.

    Args:
        spec: as discovered.
        traced: the network.
        values: labels of all nodes: only inner products over positions that cannot change places are looked at.
        outputs: what must be preserved.
    """
    ways = [(way, _inner_products(way, values)) for way in (traced, *traced.others)]
    if not any(found for _, found in ways):
        return spec
    units, symbols, numbers = Units(), Symbols(), Coefficients()
    walks = [(Walk(way, units, symbols, numbers), way, found) for way, found in ways]
    for walk, way, found in walks:
        walk.run(found)
        walk.spoil_outputs(list(way.select_outputs(outputs).values()))
    for walk, _, _ in walks:  # a tensor that one way follows may be used otherwise in another
        walk.account()
    return replace(spec, planes=groups_of(spec, units, traced.aliases))


def _inner_products(traced: Trace, values: Mapping[fx.Node, Any]) -> list[tuple[fx.Node, Contraction]]:
    """Return the sums of products of two values over positions that cannot change places."""
    found: list[tuple[fx.Node, Contraction]] = []
    for node in traced.graph.nodes:
        if node.op != "call_function":
            continue
        try:
            form = contraction_of(node)
        except (KeyError, TypeError, ValueError, IndexError):
            continue
        attention = operator_of(node) == "aten.scaled_dot_product_attention"
        if form is None or form.layer or not (attention or len(form.operands) == 2):
            continue
        (one, own), (_, other) = form.operands[:2]
        over = [
            k for k, letter in enumerate(own) if letter in other and (attention or letter not in form.out)
        ]
        if attention:
            over = [len(own) - 1]
        if over and any(_is_fixed(values.get(one), k) for k in over):
            found.append((node, form))
    return found


def _is_fixed(value: Any, axis: int) -> bool:
    """Return whether some positions of an axis cannot change places."""
    parts: Sequence[Value] = (
        value.parts if isinstance(value, Stacked) else [value] if isinstance(value, Value) else ()
    )
    return any(_some_fixed(part.axes[axis]) for part in parts)


def _some_fixed(expression: Any) -> bool:
    form = resolve(expression)
    if isinstance(form, Fixed):
        return form.size > 1
    parts: Iterable[Any] = getattr(form, "factors", None) or getattr(form, "parts", None) or ()
    return any(_some_fixed(part) for part in parts) or any(
        atom.pinned is not None and atom.size > 1 for atom in atoms_of(form)
    )
