"""Gains that are kept between solves: only what a changed neighbour touched is computed anew.

:class:`Incremental` stands for a :class:`TermObjective` while a schedule runs. A group that is matched alone keeps
its gains in the order of B's units, so that its own moves cost nothing; what another group's moves change is added
as a product over the units that moved. Large groups keep float32 gains with a bound on their error; the optimum is
that of the float64 gains, proven by :func:`certified` or else computed in float64. All other clusters recompute the
terms whose tensors have moved.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from isthmus.couplings import Coupling, Permutation, index_of
from isthmus.matching._by_class import ByClass, Sided
from isthmus.matching._certify import ErrorBound, certified
from isthmus.matching._grids import Cluster, Structure
from isthmus.matching._nested import Gain, best_change
from isthmus.matching._objectives import InnerProduct, Term, TermObjective, independent
from isthmus.matching._parts import Part, parts_of
from isthmus.matching._products import SHORT, add_product, blocks, product_error
from isthmus.matching._solvers import Assignment, Solver, assignment_solver
from isthmus.matching._sources import Order, device_of_source
from isthmus.matching._working import At, Plain, Products, Working, working
from isthmus.symmetry import Couplings
from isthmus.transport import Assigned, assign

__all__ = ["Incremental"]

_SMALL = 128
"""Units up to which a group's gains are kept in float64."""
_ROOM = 2**27
"""Bytes of gains that are kept where the networks themselves are too large to be in memory."""
_STALE = 8.0
"""Growth of the error bound by updates at which gains are computed anew."""


class Incremental:
    """A term objective with a memory, for one run of a schedule after the other.

    It gives the gains and values of the objective, and besides finds the best change of a cluster itself.

    Args:
        objective: what is matched.
        products: precision of the products of large groups; the assignments are those of float64 in any case.
        room: bytes of gains that are kept; others are formed anew each time. Default: all are kept, or 128 MiB where
            the tensors are read from files.
    """

    def __init__(
        self, objective: TermObjective, products: Products = "float32", *, room: float | None = None
    ) -> None:
        self._objective, self._products = objective, getattr(torch, products)
        stored = any(not isinstance(tensor, Tensor) for c in objective.compared for tensor in c.a)
        self._room = room if room is not None else _ROOM if stored else math.inf
        self._last: _Keeper | None = None
        self._keepers: dict[Cluster, _Keeper | None] = {}
        self._inner: dict[int, list[tuple[dict[str, Tensor], float]]] = {}
        self._terms: dict[int, tuple[dict[str, Tensor], list[Gain]]] = {}

    @property
    def structure(self) -> Structure:
        """The groups."""
        return self._objective.structure

    @property
    def compared(self) -> Sequence[InnerProduct]:
        """The inner products that the value is a sum over (see :class:`TermObjective`)."""
        return self._objective.compared

    @property
    def plain(self) -> TermObjective:
        """The objective without a memory."""
        return self._objective

    def depends(self, cluster: Cluster) -> frozenset[str]:
        """Return the groups whose moves can change what is best for a cluster."""
        groups = frozenset[str]().union(*(t.inner_product.groups for t in self._objective.terms(cluster)))
        return groups - frozenset(cluster) if self._keeper(cluster) else groups | frozenset(cluster)

    def change(
        self, cluster: Cluster, at: At, *, names: Sequence[str] | None = None, measured: bool = False
    ) -> tuple[dict[str, Coupling], float]:
        """Return the best change of a cluster (see :class:`Working`)."""
        keeper = self._keeper(cluster)
        if self._last is not None and self._last is not keeper and self._kept_bytes() > self._room:
            self._last.forget()
        self._last = keeper
        if keeper is not None:
            return keeper.change(at, all_terms=names is None, measured=measured)
        gains = self.gains(cluster, at, all_terms=names is None)
        return best_change(gains, cluster, assignment_solver, names=names, measured=measured)

    def gains(self, cluster: Cluster, at: Couplings, *, all_terms: bool = True) -> Sequence[Gain]:
        """Return the gains of a cluster (see :class:`Objective`), kept terms not computed again."""
        return self._objective.gains(cluster, at, all_terms=all_terms, of_term=self._of_term)

    def _of_term(self, term: Term, at: Couplings) -> list[Gain]:
        if not _permuted(term.inner_product, at):
            return term.gains(at)
        now = _state(term.inner_product, at)
        kept = self._terms.get(id(term))
        if kept is None or not _unchanged(kept[0], now):
            self._terms.pop(id(term), None)
            kept = (now, term.gains(at))
            if self._kept_bytes() + sum(g.matrix.nbytes for g in kept[1]) <= self._room:
                self._terms[id(term)] = kept
        return kept[1]

    def _kept_bytes(self) -> int:
        """Return the bytes of all gains that are kept."""
        of_terms = sum(g.matrix.nbytes for _, gains in self._terms.values() for g in gains)
        return of_terms + sum(k.nbytes for k in self._keepers.values() if k is not None)

    def rise(self, cluster: Cluster, at: At, changed: At, threshold: float) -> tuple[float, bool]:
        """Return by how much a change of a cluster raises the value (see :class:`Working`)."""
        keeper = self._keeper(cluster)
        if keeper is not None and keeper.whole:
            return keeper.rise(at, changed, threshold)
        return self.value(changed, cluster) - self.value(at, cluster), True

    def value(self, at: Couplings, groups: Iterable[str] | None = None) -> float:
        """Return the value of permutations (see :class:`Objective`)."""
        wanted = None if groups is None else frozenset(groups)
        parts = [c for c in self._objective.compared if wanted is None or wanted & c.groups]
        return sum(self._measured(c, at) for c in parts)

    def cost(self, group: str, at: Couplings) -> float:
        """Return the matched squared distance per unit (see :class:`Objective`)."""
        return self._objective.cost(group, at, inner=self._inner_of)

    def _measured(self, inner_product: InnerProduct, at: Couplings) -> float:
        if self._objective.measure is InnerProduct.inner:
            return self._inner_of(inner_product, at)
        return self._objective.measure(inner_product, at)

    def _inner_of(self, inner_product: InnerProduct, at: Couplings) -> float:
        if not _permuted(inner_product, at):
            return inner_product.inner(at)
        now, kept = _state(inner_product, at), self._inner.setdefault(id(inner_product), [])
        for state, value in kept:
            if _unchanged(state, now):
                return value
        kept.append((now, inner_product.inner(at)))
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
        if self._objective.measure is not InnerProduct.inner:
            return False
        seen: dict[int, int] = {}
        for term, parts in zip(terms, by_term, strict=True):
            if term.scale is None:
                seen[id(term.inner_product)] = seen.get(id(term.inner_product), 0) + len(parts)
        moved = {
            id(c): sum(any(g == group for pairs in m.values() for g, _ in pairs) for m in c.movers)
            for c in self._objective.compared
            if group in c.groups
        }
        return seen == moved


@dataclass(eq=False)
class _Listed:
    """A part of a term, the groups matched before it counts in a single pass, and the gains kept of it."""

    part: Part
    neighbours: frozenset[str]
    order: Order | None = None
    matrix: Tensor | None = None
    error: float = 0.0


class _Keeper(Protocol):
    """Keeps the gains of one group in the order of B's units."""

    whole: bool

    @property
    def nbytes(self) -> int: ...

    def forget(self) -> None: ...

    def change(self, at: At, *, all_terms: bool, measured: bool) -> tuple[dict[str, Coupling], float]: ...

    def rise(self, at: At, changed: At, threshold: float) -> tuple[float, bool]: ...


@dataclass(eq=False)
class _Exact:
    """Float64 gains, one matrix for each part."""

    group: str
    size: int
    listed: list[_Listed]
    whole: bool
    total: Tensor = field(init=False)

    @property
    def nbytes(self) -> int:
        return sum(item.matrix.nbytes for item in self.listed if item.matrix is not None)

    def forget(self) -> None:
        for item in self.listed:
            item.matrix = None

    def change(self, at: At, *, all_terms: bool, measured: bool) -> tuple[dict[str, Coupling], float]:
        used = _used(self.listed, at, all_terms)
        matrices = [self._of(item, at) for item in used]
        self.total = sum(matrices[1:], matrices[0])
        own = at.get(self.group)
        gains = self.total if own is None else self.total[:, index_of(own).to(self.total.device)]
        change = assign(gains, maximize=True, proof=False).columns.cpu()
        gain = float(gains.cpu()[torch.arange(self.size), change].sum()) if measured else 0.0
        return {self.group: Permutation.known(change)}, gain

    def rise(self, at: At, changed: At, threshold: float) -> tuple[float, bool]:
        rows = torch.arange(self.size)
        total = self.total.cpu()
        new, old = index_of(changed[self.group]), index_of(at[self.group])
        return float((total[rows, new] - total[rows, old]).sum()), True

    def _of(self, item: _Listed, at: Couplings) -> Tensor:
        order = item.part.order(at)
        if item.matrix is None or item.order is None or not _unchanged(item.order, order):
            total = item.part.offset()
            for a, b in item.part.products(order, torch.float64):
                total = a @ b.T if total is None else torch.addmm(total, a, b.T)
            item.matrix, item.order = total, order
        assert item.matrix is not None
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
    warm: Assigned | None = None
    first_error: float = 0.0

    @property
    def nbytes(self) -> int:
        return 0 if self.total is None else self.total.nbytes

    def forget(self) -> None:
        self.total = None

    def change(self, at: At, *, all_terms: bool, measured: bool) -> tuple[dict[str, Coupling], float]:
        used = _used(self.listed, at, all_terms)
        total = self._brought_up(used, at)
        self.warm = assign(total, maximize=True, warm=self.warm)
        columns = certified(total, self.warm, self._bound(used), self._entries)
        if columns is None:
            columns = self._redone()
        own = at.get(self.group, Permutation.identity(self.size))
        gain = float(self._entries(torch.arange(self.size), columns).sum()) if measured else 0.0
        return {self.group: own.inverse().then(Permutation.known(columns))}, gain

    def rise(self, at: At, changed: At, threshold: float) -> tuple[float, bool]:
        assert self.total is not None
        old, new = index_of(at[self.group]), index_of(changed[self.group])
        rows = torch.nonzero(old != new).flatten()
        if 8 * len(rows) > self.size:
            moved = rows.to(self.total.device)
            there, here = (self.total[moved, p[rows].to(moved.device)].double().sum() for p in (new, old))
            about = float(there - here)
            bound = self._bound([item for item in self.listed if item.order is not None])
            error = float((bound.of_pairs(new) + bound.of_pairs(old))[rows].sum())
            if abs(about - threshold) > error:
                return about, False
        return float((self._entries(rows, new[rows]) - self._entries(rows, old[rows])).sum()), True

    def _brought_up(self, used: Sequence[_Listed], at: Couplings) -> Tensor:
        """Return the gains of the parts in use at these permutations."""
        stale = sum(item.error for item in used) > _STALE * self.first_error
        if (
            self.total is None
            or stale
            or any(item.order is not None and item not in used for item in self.listed)
        ):
            device = device_of_source(self.listed[0].part.a)
            self.first_error = 0.0
            self.total = torch.zeros(self.size, self.size, dtype=torch.float32, device=device)
            for item in self.listed:
                item.order, item.error = None, 0.0
        for item in used:
            self._update(item, item.part.order(at), self.total)
        return self.total

    def _update(self, item: _Listed, order: Order, total: Tensor) -> None:
        part = item.part
        if item.order is not None and _unchanged(item.order, order):
            return
        source = torch.float64 if torch.float64 in (part.a.dtype, part.b.dtype) else part.a.dtype
        width = count = 0
        for a, b in part.products(order, torch.float32, item.order):
            add_product(total, a, b, self.dtype)
            width, count = max(width, a.shape[1]), count + blocks(a.shape[1])
        error = product_error(width, self.dtype, source)
        if item.order is None:
            item.error = error
            self.first_error += error
        else:
            # A difference of two rows of B is at most twice as long as a row, and rounded once more.
            item.error += 2 * (error + 3 * SHORT)
        item.order = order
        for other in self.listed:
            other.error += count * SHORT if other.order is not None else 0.0

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
            for a, b in item.part.products(item.order or {}, torch.float64):
                total = a @ b.T if total is None else total.addmm_(a, b.T)
        assert total is not None
        self.warm = assign(total, maximize=True, warm=self.warm)
        return self.warm.columns.cpu()


def _used(listed: Sequence[_Listed], at: Couplings, all_terms: bool) -> Sequence[_Listed]:
    """Return the parts that count: in a single pass those that depend on no group not matched yet, if any."""
    if all_terms:
        return listed
    return independent(listed, at) or listed


def _permuted(inner_product: InnerProduct, at: Couplings) -> bool:
    """Return whether all that moves an inner product are permutations, whose results are remembered."""
    return all(isinstance(at[name], Permutation | Tensor) for name in inner_product.groups if name in at)


def _state(inner_product: InnerProduct, at: Couplings) -> dict[str, Tensor]:
    return {name: index_of(at[name]) for name in inner_product.groups if name in at}


def _unchanged(one: Mapping, other: Mapping) -> bool:
    return one.keys() == other.keys() and all(one[k] is x or torch.equal(one[k], x) for k, x in other.items())


@working.register(Incremental)
@working.register(TermObjective)
def _(objective: Incremental | TermObjective, solver: Solver, products: Products | None) -> Working:
    if isinstance(solver, ByClass):
        return Sided(objective.plain if isinstance(objective, Incremental) else objective, solver)
    if not isinstance(solver, Assignment) or products is None:
        return Plain(objective, solver)
    return objective if isinstance(objective, Incremental) else Incremental(objective, products)
