"""Gains that are kept between solves: only what a changed neighbour touched is computed anew.

:class:`Incremental` stands for a :class:`TermObjective` while a schedule runs. A group that is matched alone keeps
its gains in the order of B's units, so that its own moves cost nothing; what another group's moves change is added
as a product over the units that moved. Large groups keep float32 gains with a bound on their error; the optimum is
that of the float64 gains, proven by :func:`certified` or else computed in float64. All other clusters recompute the
terms whose tensors have moved.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import torch
from torch import Tensor

from isthmus.couplings import identity_permutation, invert_permutation
from isthmus.matching._certify import ErrorBound, certified
from isthmus.matching._grids import Cluster, Structure
from isthmus.matching._nested import Gain, Solver, best_change
from isthmus.matching._objectives import Comparison, Term, TermObjective, independent
from isthmus.matching._pairs import Order
from isthmus.matching._parts import Part, parts_of
from isthmus.matching._products import SHORT, add_product, blocks, product_error
from isthmus.transport import Assignment, assign

__all__ = ["Incremental", "Products"]

Products = Literal["float64", "float32", "bfloat16"]
_SMALL = 128
"""Units up to which a group's gains are kept in float64."""
_STALE = 8.0
"""Growth of the error bound by updates at which gains are computed anew."""


class Incremental:
    """A term objective with a memory, for one run of a schedule after the other.

    It gives the gains and values of the objective, and besides finds the best change of a cluster itself.

    Args:
        objective: what is matched.
        products: precision of the products of large groups; the assignments are those of float64 in any case.
    """

    def __init__(self, objective: TermObjective, products: Products = "float32") -> None:
        self._objective, self._products = objective, getattr(torch, products)
        self._keepers: dict[Cluster, _Keeper | None] = {}
        self._inner: dict[int, list[tuple[dict[str, Tensor], float]]] = {}
        self._terms: dict[int, tuple[dict[str, Tensor], list[Gain]]] = {}

    @property
    def structure(self) -> Structure:
        """The groups."""
        return self._objective.structure

    def depends(self, cluster: Cluster) -> frozenset[str]:
        """Return the groups whose moves can change what is best for a cluster."""
        groups = frozenset[str]().union(*(t.comparison.groups for t in self._objective.terms(cluster)))
        return groups - frozenset(cluster) if self._keeper(cluster) else groups | frozenset(cluster)

    def change(
        self,
        cluster: Cluster,
        permutations: Mapping[str, Tensor],
        solver: Solver,
        *,
        names: Sequence[str] | None = None,
        measured: bool = False,
    ) -> tuple[dict[str, Tensor], float]:
        """Return the best change of a cluster, and its matched gain if that is to be ``measured``.

        Args:
            cluster: the groups.
            permutations: where all groups are.
            solver: for clusters of several groups.
            names: match only these, by what depends on no group that is not matched yet (a single pass).
            measured: whether the gain is wanted.
        """
        keeper = self._keeper(cluster)
        if keeper is not None:
            return keeper.change(permutations, all_terms=names is None, measured=measured)
        gains = self.gains(cluster, permutations, all_terms=names is None)
        return best_change(gains, cluster, solver, names=names, measured=measured)

    def gains(
        self, cluster: Cluster, permutations: Mapping[str, Tensor], *, all_terms: bool = True
    ) -> Sequence[Gain]:
        """Return the gains of a cluster (see :class:`AbstractObjective`), kept terms not computed again."""
        return self._objective.gains(cluster, permutations, all_terms=all_terms, of_term=self._of_term)

    def _of_term(self, term: Term, permutations: Mapping[str, Tensor]) -> list[Gain]:
        now = _state(term.comparison, permutations)
        kept = self._terms.get(id(term))
        if kept is None or not _unchanged(kept[0], now):
            kept = self._terms[id(term)] = (now, term.gains(permutations))
        return kept[1]

    def rise(
        self,
        cluster: Cluster,
        permutations: Mapping[str, Tensor],
        changed: Mapping[str, Tensor],
        threshold: float,
    ) -> tuple[float, bool]:
        """Return by how much a change of a cluster raises the value, and whether that is exact.

        If not, it is at least on the right side of the threshold.
        """
        keeper = self._keeper(cluster)
        if keeper is not None and keeper.whole:
            return keeper.rise(permutations, changed, threshold)
        return self.value(changed, cluster) - self.value(permutations, cluster), True

    def value(self, permutations: Mapping[str, Tensor], groups: Iterable[str] | None = None) -> float:
        """Return the value of permutations (see :class:`AbstractObjective`)."""
        wanted = None if groups is None else frozenset(groups)
        parts = [c for c in self._objective.compared if wanted is None or wanted & c.groups]
        return sum(self._measured(c, permutations) for c in parts)

    def cost(self, group: str, permutations: Mapping[str, Tensor]) -> float:
        """Return the matched squared distance per unit (see :class:`AbstractObjective`)."""
        return self._objective.cost(group, permutations, inner=self._inner_of)

    def _measured(self, comparison: Comparison, permutations: Mapping[str, Tensor]) -> float:
        if self._objective.measure is Comparison.inner:
            return self._inner_of(comparison, permutations)
        return self._objective.measure(comparison, permutations)

    def _inner_of(self, comparison: Comparison, permutations: Mapping[str, Tensor]) -> float:
        now, kept = _state(comparison, permutations), self._inner.setdefault(id(comparison), [])
        for state, value in kept:
            if _unchanged(state, now):
                return value
        kept.append((now, comparison.inner(permutations)))
        del kept[:-2]
        return kept[-1][1]

    def _keeper(self, cluster: Cluster) -> _Keeper | None:
        if cluster not in self._keepers:
            self._keepers[cluster] = self._new_keeper(cluster)
        return self._keepers[cluster]

    def _new_keeper(self, cluster: Cluster) -> _Keeper | None:
        terms = self._objective.terms(cluster)
        if len(cluster) != 1 or not terms:
            return None
        size = self.structure.sizes[cluster[0]]
        by_term = parts_of(terms, cluster[0], size)
        if by_term is None:
            return None
        listed = [
            _Listed(part, term.neighbours) for term, ps in zip(terms, by_term, strict=True) for part in ps
        ]
        whole = self._covers(cluster[0], terms, by_term)
        scaled = any(item.part.scale is not None for item in listed)
        if size <= _SMALL or scaled or self._products == torch.float64:
            return _Exact(cluster[0], size, listed, whole)
        return _Estimated(cluster[0], size, listed, whole, self._products)

    def _covers(self, group: str, terms: Sequence[Term], by_term: Sequence[Sequence[Part]]) -> bool:
        """Return whether differences of the gains are differences of the value."""
        if self._objective.measure is not Comparison.inner:
            return False
        seen: dict[int, int] = {}
        for term, parts in zip(terms, by_term, strict=True):
            if term.scale is None:
                seen[id(term.comparison)] = seen.get(id(term.comparison), 0) + len(parts)
        moved = {
            id(c): sum(any(g == group for pairs in m.values() for g, _ in pairs) for m in c.movers)
            for c in self._objective.compared
            if group in c.groups
        }
        return seen == moved


@dataclass(eq=False)
class _Listed:
    """A part, the groups that have to be matched before it counts in a single pass, and what is kept of it."""

    part: Part
    neighbours: frozenset[str]
    order: Order | None = None
    matrix: Tensor | None = None
    error: float = 0.0


class _Keeper(Protocol):
    """Keeps the gains of one group in the order of B's units."""

    whole: bool

    def change(
        self, permutations: Mapping[str, Tensor], *, all_terms: bool, measured: bool
    ) -> tuple[dict[str, Tensor], float]: ...

    def rise(
        self, permutations: Mapping[str, Tensor], changed: Mapping[str, Tensor], threshold: float
    ) -> tuple[float, bool]: ...


@dataclass(eq=False)
class _Exact:
    """Float64 gains, one matrix for each part."""

    group: str
    size: int
    listed: list[_Listed]
    whole: bool
    total: Tensor = field(init=False)

    def change(
        self, permutations: Mapping[str, Tensor], *, all_terms: bool, measured: bool
    ) -> tuple[dict[str, Tensor], float]:
        used = _used(self.listed, permutations, all_terms)
        matrices = [self._of(item, permutations) for item in used]
        self.total = sum(matrices[1:], matrices[0])
        own = permutations.get(self.group)
        gains = self.total if own is None else self.total[:, own.to(self.total.device)]
        change = assign(gains, maximize=True).columns.cpu()
        gain = float(gains.cpu()[torch.arange(self.size), change].sum()) if measured else 0.0
        return {self.group: change}, gain

    def rise(
        self, permutations: Mapping[str, Tensor], changed: Mapping[str, Tensor], threshold: float
    ) -> tuple[float, bool]:
        rows = torch.arange(self.size)
        total = self.total.cpu()
        return float((total[rows, changed[self.group]] - total[rows, permutations[self.group]]).sum()), True

    def _of(self, item: _Listed, permutations: Mapping[str, Tensor]) -> Tensor:
        order = item.part.order(permutations)
        if item.matrix is None or item.order is None or not _unchanged(item.order, order):
            a, b = item.part.matrix(order, torch.float64)
            offset = item.part.offset()
            item.matrix = a @ b.T if offset is None else torch.addmm(offset, a, b.T)
            item.order = order
        return item.matrix


@dataclass(eq=False)
class _Estimated:
    """Float32 gains of all parts together, with a bound on their error."""

    group: str
    size: int
    listed: list[_Listed]
    whole: bool
    dtype: torch.dtype
    total: Tensor | None = None
    warm: Assignment | None = None
    first_error: float = 0.0

    def change(
        self, permutations: Mapping[str, Tensor], *, all_terms: bool, measured: bool
    ) -> tuple[dict[str, Tensor], float]:
        used = _used(self.listed, permutations, all_terms)
        total = self._brought_up(used, permutations)
        self.warm = assign(total, maximize=True, warm=self.warm)
        columns = certified(total, self.warm, self._bound(used), self._entries)
        if columns is None:
            columns = self._redone()
        own = permutations.get(self.group, identity_permutation(self.size))
        change = invert_permutation(own)[columns]
        gain = float(self._entries(torch.arange(self.size), columns).sum()) if measured else 0.0
        return {self.group: change}, gain

    def rise(
        self, permutations: Mapping[str, Tensor], changed: Mapping[str, Tensor], threshold: float
    ) -> tuple[float, bool]:
        assert self.total is not None
        old, new = permutations[self.group], changed[self.group]
        rows = torch.nonzero(old != new).flatten()
        if 8 * len(rows) > self.size:
            at = rows.to(self.total.device)
            there, here = (self.total[at, p[rows].to(at.device)].double().sum() for p in (new, old))
            about = float(there - here)
            bound = self._bound([item for item in self.listed if item.order is not None])
            error = float((bound.of_pairs(new) + bound.of_pairs(old))[rows].sum())
            if abs(about - threshold) > error:
                return about, False
        return float((self._entries(rows, new[rows]) - self._entries(rows, old[rows])).sum()), True

    def _brought_up(self, used: Sequence[_Listed], permutations: Mapping[str, Tensor]) -> Tensor:
        """Return the gains of the parts in use at these permutations."""
        stale = sum(item.error for item in used) > _STALE * self.first_error
        if (
            self.total is None
            or stale
            or any(item.order is not None and item not in used for item in self.listed)
        ):
            device = self.listed[0].part.a.device
            self.total = torch.zeros(self.size, self.size, dtype=torch.float32, device=device)
            for item in self.listed:
                item.order, item.error = None, 0.0
        for item in used:
            self._update(item, item.part.order(permutations), self.total)
        return self.total

    def _update(self, item: _Listed, order: Order, total: Tensor) -> None:
        part = item.part
        if item.order is not None and _unchanged(item.order, order):
            return
        length, source = part.length, part.a.dtype
        difference = None if item.order is None else part.change(item.order, order, torch.float32)
        if item.order is None:
            a, b = part.matrix(order, torch.float32)
            item.error = product_error(length, self.dtype, source)
            self.first_error += item.error
        elif difference is not None:
            a, b = difference
            # A difference of two rows of B is at most twice as long as a row, and rounded once more.
            item.error += 2 * (product_error(a.shape[1], self.dtype, source) + 3 * SHORT)
        else:
            a, b = part.matrix(order, torch.float32)
            b = b - part.matrix(item.order, torch.float32)[1]
            item.error += 2 * (product_error(length, self.dtype, source) + 3 * SHORT)
        add_product(total, a, b, self.dtype)
        item.order = order
        for other in self.listed:
            other.error += blocks(a.shape[1]) * SHORT if other.order is not None else 0.0

    def _bound(self, used: Sequence[_Listed]) -> ErrorBound:
        """Return the bound of all parts together, by Cauchy and Schwarz."""
        rows, columns = (
            torch.stack([item.error * item.part.norms[k].square() for item in used]).sum(0).sqrt()
            for k in (0, 1)
        )
        return ErrorBound(rows, columns)

    def _entries(self, rows: Tensor, columns: Tensor) -> Tensor:
        used = [item for item in self.listed if item.order is not None]
        found = [item.part.entries(rows, columns, item.order or {}) for item in used]
        return torch.stack(found).sum(0)

    def _redone(self) -> Tensor:
        """Return the assignment from gains computed in float64."""
        used = [item for item in self.listed if item.order is not None]
        total: Tensor | None = None
        for item in used:
            a, b = item.part.matrix(item.order or {}, torch.float64)
            total = a @ b.T if total is None else total.addmm_(a, b.T)
        assert total is not None
        self.warm = assign(total, maximize=True, warm=self.warm)
        return self.warm.columns.cpu()


def _used(
    listed: Sequence[_Listed], permutations: Mapping[str, Tensor], all_terms: bool
) -> Sequence[_Listed]:
    """Return the parts that count: in a single pass those that depend on no group not matched yet, if any."""
    if all_terms:
        return listed
    return independent(listed, permutations) or listed


def _state(comparison: Comparison, permutations: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: permutations[name] for name in comparison.groups if name in permutations}


def _unchanged(one: Mapping, other: Mapping) -> bool:
    return one.keys() == other.keys() and all(one[k] is x or torch.equal(one[k], x) for k, x in other.items())
