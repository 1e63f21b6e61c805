"""Tables: what units are multiplied by, such as cosines of positions, as numbers that tell which entries are equal."""

from __future__ import annotations

import operator
from collections.abc import Hashable, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from isthmus.symmetry._listed import RESHAPES, SAME_ENTRIES, VIEWS
from isthmus.symmetry._origins import shape_of
from isthmus.symmetry._planes.symbols import Symbols, equal_slices
from isthmus.symmetry._trace import Trace, bound_arguments, operator_of

__all__ = ["LARGEST", "Tables", "moved_by"]

LARGEST = 1 << 21
"""Entries of a tensor beyond which nothing is said of it."""
_DEEPEST = 60
"""Operators that a table is followed back through."""
_ENTRIES_MOVED = (
    RESHAPES
    | VIEWS
    | {
        *("cat", "concat", "concatenate", "stack", "repeat", "repeat_interleave", "flip", "roll", "tile"),
        "slice_scatter",
        "select_scatter",
    }
)
_TAKEN = frozenset({"index", "index_select", "gather", "embedding"})


class Tables:
    """Numbers of the entries of any value of a graph (see :class:`Symbols`).

    What an operator that is not followed makes has numbers of its own, one for each entry, which says nothing of it. So
    has a tensor of the state, whose entries are in general position. Of a constant, slices of equal values are equal.

    Args:
        symbols: shared by all graphs.
        traced: the graph.
    """

    def __init__(self, symbols: Symbols, traced: Trace) -> None:
        self._symbols, self._traced = symbols, traced
        self._inside: dict[fx.Node, Any] = {}
        self._found: dict[fx.Node, Any] = {}
        self._columns: dict[tuple[fx.Node, int], Tensor] = {}
        for node in traced.graph.nodes:
            self._note_body(node)

    def of(self, node: fx.Node, depth: int = 0) -> Any:
        """Return the numbers of a tensor's entries, int64 of its shape; ``None`` where it is too large or none."""
        if node not in self._found:
            self._found[node] = self._numbers(node, depth)
        return self._found[node]

    def _numbers(self, node: fx.Node, depth: int) -> Any:
        example = node.meta.get("val")
        if node in self._inside:
            return self.of(self._inside[node], depth)
        if isinstance(example, Tensor) and example.numel() > LARGEST:
            return None
        if node.op == "placeholder":
            return self._leaf(node)
        if node.op == "call_function" and depth < _DEEPEST:
            found = self._called(node, depth + 1)
            if found is not None:
                return found
        return self._own(node) if isinstance(example, Tensor) else None

    def constant(self, node: fx.Node) -> Tensor | None:
        """Return the values of a constant of the graph that never changes; ``None`` for anything else."""
        while node.op == "call_function" and operator_of(node) in ("aten.clone", "aten.detach", "aten.alias"):
            node = node.all_input_nodes[0]
        found = self._traced.constants.get(node.name) if node.op == "placeholder" else None
        if not isinstance(found, Tensor) or found.is_meta or node.name in self._traced.changing:
            return None
        return found.detach().cpu()

    def _own(self, node: fx.Node) -> Tensor:
        """Return a number for every entry, equal to no other one."""
        shape = shape_of(node)
        number = int(torch.tensor(shape).prod()) if shape else 1
        start = self._symbols.block(("entries", node), number)
        return torch.arange(start, start + number).reshape(shape)

    def _leaf(self, node: fx.Node) -> Tensor:
        own = self._own(node)
        constant = self.constant(node)
        if constant is None or constant.layout != torch.strided or own.numel() == 0:
            return own
        for axis in range(own.ndim):
            own = own.index_select(axis, equal_slices(constant, axis))
        return own

    def _called(self, node: fx.Node, depth: int) -> Any:
        if node.target is operator.getitem:
            source, k = node.args
            inner = self._inside.get(source)  # pyright: ignore[reportArgumentType]
            if isinstance(inner, list):
                return self.of(inner[int(k)], depth)  # pyright: ignore[reportArgumentType]
            several = self.of(source, depth)  # pyright: ignore[reportArgumentType]
            return several[int(k)] if isinstance(several, (list, tuple)) else None  # pyright: ignore
        target = node.target
        if not isinstance(target, torch._ops.OpOverload) or target.namespace != "aten":
            return None
        if torch.Tag.nondeterministic_seeded in target.tags or target._schema.is_mutable:
            return None
        name = operator_of(node).removeprefix("aten.")
        if name in SAME_ENTRIES:
            return self._copied(node, depth)
        if name in _ENTRIES_MOVED:
            parts = {n: self.of(n, depth) for n in node.all_input_nodes}
            return None if any(p is None for p in parts.values()) else moved_by(node, parts)
        if name in _TAKEN:
            return self._taken(node, name, depth)
        if name in ("view_as_complex", "view_as_real"):
            return self._complex(node, name, depth)
        return self._pointwise(node, depth) if torch.Tag.pointwise in target.tags else None

    def _copied(self, node: fx.Node, depth: int) -> Tensor | None:
        source = node.all_input_nodes[0]
        found = self.of(source, depth)
        if found is None:
            return None
        types = [n.meta["val"].dtype for n in (source, node)]  # rounding is a function of entries like others
        return found if types[0] == types[1] else self._symbols.each(("cast", types[1]), [found])

    def _complex(self, node: fx.Node, name: str, depth: int) -> Tensor | None:
        found = self.of(node.all_input_nodes[0], depth)
        if found is None:
            return None
        if name == "view_as_complex":
            return self._symbols.each("complex", [found[..., 0], found[..., 1]])
        return torch.stack([self.part(found, "real"), self.part(found, "imaginary")], -1)

    def part(self, numbers: Tensor, which: str) -> Tensor:
        """Return the numbers of the real or imaginary parts of complex entries."""
        return self._symbols.each(which, [numbers])

    def reciprocal(self, numbers: Tensor) -> Tensor:
        """Return the numbers of one divided by entries."""
        return self._symbols.each("reciprocal", [numbers])

    def _pointwise(self, node: fx.Node, depth: int) -> Tensor | None:
        head: list[Hashable] = [str(node.target)]
        parts: list[Tensor] = []
        for name, given in bound_arguments(node).items():
            if isinstance(given, fx.Node):
                found = self.of(given, depth)
                if not isinstance(found, Tensor):
                    return None
                head.append((name, "tensor"))
                parts.append(found)
            elif isinstance(given, (list, tuple)):
                return None
            else:
                head.append((name, repr(given)))
        if not parts:
            return None
        found = self._symbols.each(tuple(head), parts)
        shape = tuple(shape_of(node))
        return found.expand(shape) if found.shape != shape else found

    # --- Looking entries up ------------------------------------------------------------------------------------

    def _taken(self, node: fx.Node, name: str, depth: int) -> Tensor | None:
        """Number entries that are taken at unknown places: by the place, and by all there is to take."""
        bound = bound_arguments(node)
        source: fx.Node = bound["weight" if name == "embedding" else "self"]
        rank = len(shape_of(source))
        dim = int(bound.get("dim") or 0) % max(rank, 1) if name in ("gather", "index_select") else 0
        given = bound["indices"] if name in ("index", "embedding") else bound["index"]
        if isinstance(given, (list, tuple)):
            if len(given) != 1:
                return None
            given = given[0]
        if not isinstance(given, fx.Node) or given.meta["val"].dtype not in (torch.int32, torch.int64):
            return None
        places, columns = self.of(given, depth), self._of_columns(source, dim, depth)
        if places is None or columns is None:
            return None
        if name == "gather":
            inside = columns[tuple(slice(n) for n in places.shape)] if columns.ndim == rank else None
            return None if inside is None else self._symbols.each("taken", [inside.expand_as(places), places])
        if name == "index_select":
            shape = [1] * rank
            shape[dim] = len(places.reshape(-1))
            return self._symbols.each("taken", [columns, places.reshape(shape)])
        trailing = columns.reshape(columns.shape[1:])
        return self._symbols.each("taken", [trailing, places.reshape(*places.shape, *[1] * (rank - 1))])

    def _of_columns(self, source: fx.Node, dim: int, depth: int) -> Tensor | None:
        """Return a number for every column along an axis, which is left with length 1."""
        if (source, dim) not in self._columns:
            found = self.of(source, depth)
            if not isinstance(found, Tensor) or found.ndim == 0 or found.numel() == 0:
                return None
            rows = found.movedim(dim, -1)
            flat = rows.reshape(-1, rows.shape[-1])
            numbers = [self._symbols.block(("column", row.numpy().tobytes()), 1) for row in flat.contiguous()]
            made = torch.tensor(numbers, dtype=torch.int64).reshape(rows.shape[:-1]).unsqueeze(dim)
            self._columns[source, dim] = made
        return self._columns[source, dim]

    # --- Graphs inside the graph -------------------------------------------------------------------------------

    def _note_body(self, node: fx.Node) -> None:
        """Note what the places of a graph that a wrapper calls stand for, and what it returns."""
        bodies = [a for a in node.args if isinstance(a, fx.Node) and a.op == "get_attr"]
        if (
            node.op != "call_function"
            or not operator_of(node).startswith("wrap_with")
            or len(bodies) != 1
            or node.graph is not self._traced.graph
        ):
            return
        inner: Any = self._traced.program.graph_module
        for part in str(bodies[0].target).split("."):
            inner = getattr(inner, part)
        given = node.args[list(node.args).index(bodies[0]) + 1 :]
        places = inner.graph.find_nodes(op="placeholder")
        self._inside |= {p: g for p, g in zip(places, given, strict=True) if isinstance(g, fx.Node)}
        made = inner.graph.output_node().args[0]
        self._inside[node] = list(made) if isinstance(made, (list, tuple)) else made


def moved_by(node: fx.Node, parts: Mapping[fx.Node, Tensor]) -> Any:
    """Return what an operator that only moves entries makes of numbers in their place; ``None`` if it cannot."""

    def given(n: fx.Node) -> Any:
        return parts[n].contiguous() if n in parts else torch.empty(shape_of(n))

    args, kwargs = fx.map_arg((node.args, node.kwargs), given)
    try:
        with torch.no_grad():
            return node.target(*args, **kwargs)  # type: ignore[operator]
    except (RuntimeError, TypeError, ValueError, IndexError):  # another form of the call
        return None
