"""Terms taken apart: rows of A against rows of B, whose other axes other groups reorder.

What a term adds to the gains of a group is a product of two matrices: A's tensor and B's, with one row per unit.
Other groups reorder the columns of B's matrix. Kept in this form, a term can be updated when a few units of
another group have moved, and single entries can be had in float64 without the whole product.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from isthmus.matching._objectives import InnerProduct, Term, cells_of
from isthmus.matching._pairs import order_of, ordered, pair_products, slices
from isthmus.matching._sources import PIECE, Order, TensorSource, device_of_source, entries_of, pieces, read
from isthmus.symmetry import Couplings, Slots

__all__ = ["Part", "parts_of"]


@dataclass(frozen=True, eq=False)
class Part:
    """One tensor of a term, seen along the one axis on which a group acts.

    Attributes:
        a: A's tensor.
        b: B's, in its own order.
        axis: where the group acts.
        positions: of the group's units on that axis, shape ``(units, copies)``.
        movers: by axis, the ``(group, slot)`` pairs that act on the other axes.
        scale: weight of each position of ``axis``, if the term has one (see :class:`Term`).

    Example:
        Two units of three inputs. As B lists them, the inputs are A's, and the gains are ``A Bᵀ``:

        >>> from isthmus.symmetry import IndexMap, Slot
        >>> w = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
        >>> part = Part(w, w, 0, torch.tensor([[0], [1]]), {1: [("inputs", Slot("w", 1, IndexMap(3, 3)))]})
        >>> sum(x @ y.T for x, y in part.products({}, torch.float64)).tolist()
        [[14.0, 32.0], [32.0, 77.0]]

        When inputs 0 and 1 of B change places, two of three columns have moved, and only these are multiplied: the
        gains change by ``A[:, [0, 1]] (B[:, [1, 0]] - B[:, [0, 1]])ᵀ``.

        >>> order = part.order({"inputs": torch.tensor([1, 0, 2])})
        >>> [(x, y)] = part.products(order, torch.float64, old={})
        >>> x.tolist(), y.tolist(), (x @ y.T).tolist()
        ([[1.0, 2.0], [4.0, 5.0]], [[1.0, -1.0], [1.0, -1.0]], [[-1.0, -1.0], [-1.0, -1.0]])
        >>> sum(x @ y.T for x, y in part.products(order, torch.float64)).tolist()
        [[13.0, 31.0], [31.0, 76.0]]
    """

    a: Tensor | TensorSource
    b: Tensor | TensorSource
    axis: int
    positions: Tensor
    movers: Slots
    scale: Tensor | None = field(default=None)

    @cached_property
    def groups(self) -> frozenset[str]:
        """Groups that reorder the other axes."""
        return frozenset(name for pairs in self.movers.values() for name, _ in pairs)

    @property
    def length(self) -> int:
        """Terms of the sum that an entry of the gain is."""
        return entries_of(self.a) // max(self.a.shape[self.axis], 1) * self.positions.shape[1]

    def order(self, at: Couplings) -> Order:
        """Return how the other axes of B's tensor are reordered."""
        device = device_of_source(self.b)
        return {axis: index.to(device) for axis, index in order_of(self.movers, at).items()}

    def products(
        self, order: Order, dtype: torch.dtype, old: Order | None = None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield rows of A, scaled, and rows of B, one for each unit, whose products add up to the gains.

        Args:
            order: of the other axes of B's tensor.
            dtype: of the rows.
            old: yield what the order adds to the gains of this one instead.
        """
        a, b = read(self.a), read(self.b)
        if old is None:
            for x, y, rest in pieces(a, b, order, (self.axis,)):
                yield self._rows(x, dtype, self.scale), self._rows(ordered(y, rest), dtype)
            return
        moved = [axis for axis in old.keys() | order.keys() if not _same(old.get(axis), order.get(axis))]
        few = self._few(moved[0], old, order) if len(moved) == 1 else None
        if few is not None:
            yield from self._changed(a, b, moved[0], few, order, dtype)
            return
        both = (pieces(a, b, one, (self.axis,)) for one in (order, old))
        for (x, y, rest), (_, z, before) in zip(*both, strict=True):
            here, there = self._rows(ordered(y, rest), dtype), self._rows(ordered(z, before), dtype)
            yield self._rows(x, dtype, self.scale), here - there

    def _few(self, axis: int, old: Order, new: Order) -> tuple[Tensor, Tensor, Tensor] | None:
        """Return which positions of an axis moved, from where and to where; ``None`` if most of them did."""
        here = torch.arange(self.b.shape[axis], device=device_of_source(self.b))
        before, after = old.get(axis, here), new.get(axis, here)
        changed = torch.nonzero(before != after).flatten()
        return (changed, before[changed], after[changed]) if 4 * len(changed) <= 3 * len(here) else None

    def _changed(
        self,
        a: Tensor,
        b: Tensor,
        axis: int,
        few: tuple[Tensor, Tensor, Tensor],
        order: Order,
        dtype: torch.dtype,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the rows at the positions that moved, and the differences of B's there."""
        rest = {k: index for k, index in order.items() if k != axis}
        step = max(1, PIECE * b.shape[axis] // max(b.numel(), 1))
        for at, before, after in zip(*(index.split(step) for index in few), strict=True):
            difference = b.index_select(axis, after).to(dtype) - b.index_select(axis, before).to(dtype)
            rows = self._rows(a.index_select(axis, at), dtype, self.scale)
            yield rows, self._rows(ordered(difference, rest), dtype)

    def offset(self) -> Tensor | None:
        r"""Return the summand :math:`-\tfrac12 s_p \lVert b_q \rVert^2` of scaled gains, shape ``(units, units)``."""
        if self.scale is None:
            return None
        device = device_of_source(self.a)
        scale = self.scale.double().to(device)[self.positions.to(device)]
        return -0.5 * scale @ cells_of(read(self.b), (self.axis,), self.positions).double().square().sum(2).T

    @cached_property
    def norms(self) -> tuple[Tensor, Tensor]:
        """Upper bounds on the norms of the rows of A and of B, float64, on the CPU; they hold in every order."""
        return self._norms(read(self.a)), self._norms(read(self.b))

    def _norms(self, tensor: Tensor) -> Tensor:
        where = self.positions.flatten()
        squares = pair_products(tensor, tensor, self.axis, where, where, {}).reshape(self.positions.shape)
        return squares.sum(1).sqrt() * (1 + 2.0**-40)

    def entries(self, rows: Tensor, columns: Tensor, order: Order) -> Tensor:
        """Return single gains of an unscaled part in float64: of units ``rows`` of A and ``columns`` of B."""
        where_a, where_b = (self.positions[units].flatten() for units in (rows, columns))
        found = pair_products(read(self.a), read(self.b), self.axis, where_a, where_b, order)
        return found.reshape(len(rows), -1).sum(1)

    def gains(self, rows: Tensor, columns: Tensor, order: Order) -> Tensor:
        """Return the gains of an unscaled part for all pairs of some units of A with some of B, float64."""
        a = slices(read(self.a), self.axis, self.positions[rows].flatten(), {})
        b = slices(read(self.b), self.axis, self.positions[columns].flatten(), order)
        return a.reshape(len(rows), -1) @ b.reshape(len(columns), -1).T

    def _rows(self, tensor: Tensor, dtype: torch.dtype, scale: Tensor | None = None) -> Tensor:
        cells = cells_of(tensor.to(dtype), (self.axis,), self.positions)
        if scale is not None:
            cells = scale.to(cells)[self.positions.to(cells.device)][:, :, None] * cells
        return cells.flatten(1)


def parts_of(terms: Iterable[Term], group: str, size: int) -> list[list[Part]] | None:
    """Return the parts of each term of a group that is matched alone, ``None`` where a term is no plain product.

    It is one if the group acts on a single axis of each tensor and moves whole units there, and nothing else
    acts on blocks of the tensor.
    """
    found: list[list[Part]] = []
    for term in terms:
        grids = term.facet.grids
        if len(grids) != 1 or len(term.facet.axes) != 1 or list(grids[0].members) != [group]:
            return None
        if not torch.equal(grids[0].members[group], torch.arange(size)[:, None]):
            return None
        parts = [
            _part(term.inner_product, k, axes, group, term)
            for k, (axes, _) in enumerate(zip(term.axes, term.inner_product.a, strict=False))
        ]
        if any(part is None for part in parts):
            return None
        found.append([part for part in parts if part is not None])
    return found


def _part(inner_product: InnerProduct, k: int, axes: tuple[int, ...], group: str, term: Term) -> Part | None:
    movers = inner_product.movers[k]
    acting = {axis for axis, pairs in movers.items() for name, _ in pairs if name == group}
    if len(axes) != 1 or acting != {axes[0]} or any(s.block for p in movers.values() for _, s in p):
        return None
    others = {axis: pairs for axis, pairs in movers.items() if axis != axes[0]}
    positions = term.facet.grids[0].positions
    return Part(inner_product.a[k], inner_product.b[k], axes[0], positions, others, term.scale)


def _same(one: Tensor | None, other: Tensor | None) -> bool:
    return one is other or (one is not None and other is not None and torch.equal(one, other))
