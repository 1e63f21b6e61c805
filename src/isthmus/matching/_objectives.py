r"""Objectives: gain matrices of two networks, and the value of couplings.

Every weight-based objective is a sum of inner products between a tensor of A and the relabelled tensor of B,
seen along one axis on which a cluster of groups acts (:class:`Term`). Matching by weights takes A's own tensor;
matching in the metric of the layer's input takes :math:`W_A \Sigma`, so that the gain is the paper's
:math:`W_A \Sigma W_B^\top`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from isthmus.couplings import Monomial, is_orthogonal
from isthmus.matching._grids import Cluster, Facet, Grid, Structure
from isthmus.matching._nested import Gain, total_gain
from isthmus.matching._pairs import in_order, ordered, pair_products
from isthmus.matching._sources import TensorSource, device_of_source, pieces, read
from isthmus.symmetry import Couplings, Slot, Slots, carry_tensor

__all__ = [
    "InnerProduct",
    "MomentObjective",
    "Objective",
    "Term",
    "TermObjective",
    "UnitSpreads",
    "independent",
]


class Objective(Protocol):
    """A number to be maximised over the couplings of all groups, and its gain matrices."""

    @property
    def structure(self) -> Structure:
        """The groups, those that are matched together, and their order."""
        ...

    def gains(self, cluster: Cluster, at: Couplings, *, all_terms: bool = True) -> Sequence[Gain]:
        """Return the gains (to be summed) of pairing units of A (rows) with units of B (columns).

        B's units are taken where the permutations have moved them, so that a coupling found from the gains is
        a change, to be added by :meth:`Structure.followed`.

        Args:
            cluster: the groups that are matched.
            at: current permutations; a group that is not listed is not matched yet.
            all_terms: whether what depends on groups not matched yet counts too (with the identity there).
                If not, only a part of the cluster may take part; at least one group not matched yet does.

        Returns:
            float64 gains; larger is better.
        """
        ...

    def value(self, at: Couplings, groups: Iterable[str] | None = None) -> float:
        """Return the value of permutations (maximised); a group that is not listed counts as the identity.

        Args:
            at: by group.
            groups: leave out all that does not depend on any of these; default: everything counts.
        """
        ...

    def cost(self, group: str, at: Couplings) -> float:
        """Return the matched cost of a group: mean squared distance per unit in the objective's metric."""
        ...


_WHOLE = 2**18
"""Entries of a tensor that is compared as a whole: 2 MB in float64."""


@dataclass(frozen=True, eq=False)
class InnerProduct:
    r"""A few tensors of A against the same tensors of B, in one inner product :math:`\langle x, M y \rangle`.

    Attributes:
        a: A's tensors with the metric :math:`M` applied: float64, or what the state holds. All sums are float64.
            Where they lie in files, they are read when they are needed.
        b: B's tensors in their own order, same shapes.
        movers: what moves each tensor of B.
        norm_a: squared norm of A's tensors in the metric; default: in the identity metric, formed when needed.
        metric: applies :math:`M` to (relabelled) tensors of B; ``None`` for the identity.
        through: by tensor, the axes whose slots count in the gains; ``None`` for all slots. A layer is seen along the
            axis of its outputs alone.
        among: the groups whose slots count in the gains; ``None`` for all that move a tensor. Blocks whose members lie
            on another axis of a filter are not what moves it along the axis of their own.
        own: A's tensors without the metric, where there is one: what their norms are asked of.
    """

    a: tuple[Tensor | TensorSource, ...]
    b: tuple[Tensor | TensorSource, ...]
    movers: tuple[Slots, ...]
    norm_a: float | None = None
    metric: Callable[[tuple[Tensor, ...]], tuple[Tensor, ...]] | None = None
    through: tuple[tuple[int, ...], ...] | None = None
    among: frozenset[str] | None = None
    own: tuple[Tensor | TensorSource, ...] | None = None

    def counted(self, group: str) -> list[list[Slot]]:
        """Return, by tensor, the slots of a group through which gains are gradients of the inner product."""
        if self.among is not None and group not in self.among:
            return [[] for _ in self.movers]
        return [
            [
                slot
                for axis, pairs in movers.items()
                for name, slot in pairs
                if name == group and (through is None or axis in through)
            ]
            for movers, through in zip(self.movers, self.through or (None,) * len(self.movers), strict=True)
        ]

    @property
    def groups(self) -> frozenset[str]:
        """Groups that move some tensor."""
        return frozenset(g for m in self.movers for pairs in m.values() for g, _ in pairs)

    def moved(self, at: Couplings) -> tuple[Tensor, ...]:
        """Return B's tensors relabelled, float64."""
        return tuple(carry_tensor(read(b), m, at).double() for b, m in zip(self.b, self.movers, strict=True))

    def inner(self, at: Couplings) -> float:
        """Return the inner product of A's tensors with the relabelled ones of B."""
        return sum(_inner(*x, at) for x in zip(self.a, self.b, self.movers, strict=True))

    def cost(self, at: Couplings, inner: Measure | None = None) -> float:
        """Return the squared distance of A's tensors to the relabelled ones of B, in the metric.

        Args:
            at: by group.
            inner: computes :meth:`inner` where that is needed, or remembers it.
        """
        if self.metric is None:
            product = self.inner(at) if inner is None else inner(self, at)
            return self._norms[0] + self._norm_of_b(at) - 2 * product
        moved = self.moved(at)
        norm_b = sum(float((x * y).sum()) for x, y in zip(self.metric(moved), moved, strict=True))
        product = sum(float((read(x) * y).sum()) for x, y in zip(self.a, moved, strict=True))
        return self._norms[0] + norm_b - 2 * product

    @cached_property
    def _norms(self) -> tuple[float, float]:
        """The squared norms of A's tensors, and of B's in the identity metric, which no rotation changes."""
        own = self.norm_a if self.norm_a is not None else _squared_norm(self.a)
        return own, 0.0 if self.metric else _squared_norm(self.b)

    def _norm_of_b(self, at: Couplings) -> float:
        """Return the squared norm of B's tensors relabelled, in the identity metric."""
        moving = [at[name] for name in self.groups if name in at]
        if all(isinstance(c, Tensor) or is_orthogonal(c) for c in moving):
            return self._norms[1]
        return sum(float(y.square().sum()) for y in self.moved(at))


def _squared_norm(tensors: Iterable[Tensor | TensorSource]) -> float:
    return sum(_inner(x, x, {}, {}) for x in map(read, tensors))


def _inner(a: Tensor | TensorSource, b: Tensor | TensorSource, movers: Slots, at: Couplings) -> float:
    """Return the inner product of a tensor with another one relabelled."""
    a, b = read(a), read(b)
    if a.ndim == 0 or a.numel() <= _WHOLE:
        return float((a.double() * carry_tensor(b, movers, at).double()).sum())
    if any(slot.block for pairs in movers.values() for _, slot in pairs):
        return sum(float((x * y).sum()) for x, y in _moved_pieces(a, b, movers, at, ()))
    b, order = in_order(b, movers, at)
    rows, rest = torch.arange(len(b)), {axis: index for axis, index in order.items() if axis}
    return float(pair_products(a, b, 0, rows, order.get(0, rows), rest).sum())


def _moved_pieces(
    a: Tensor, b: Tensor, movers: Slots, at: Couplings, without: Sequence[int]
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield pieces of a tensor and of another one relabelled, float64, which are whole along some axes."""
    b, order = in_order(b, movers, at)
    for x, y, rest in pieces(a, b, order, without):
        yield x.double(), ordered(y, rest).double()


@dataclass(frozen=True, eq=False)
class Term:
    r"""An inner product seen along a facet: its contribution to the gain of the cluster that acts there.

    Attributes:
        facet: the cluster, and where it sits.
        inner_product: the tensors.
        axes: by tensor, the axes that the facet cuts. It may be shorter than the list of tensors: those at the end (a
            bias, where a group acts on a block of the weight only) then add nothing to the gains.
        scale: ``None`` for inner products alone; or :math:`s_p \ge 0` of each position of the facet, shape
            ``(length,)``, for the pair cost :math:`s_p \lVert a_p - b_q \rVert^2`, whose gain is
            :math:`s_p (\langle a_p, b_q \rangle - \tfrac12 \lVert b_q \rVert^2)`. Such a term adds gains that are the
            gradient of no value (see :func:`isthmus.testing.check_gain_law`).

    Example:
        Three units of two weights each; B has A's units in a ring, unit 0 of B being unit 1 of A. Entry ``(i, j)`` of
        the gains is the product of row ``i`` of A and row ``j`` of B:

        >>> from isthmus.symmetry import IndexMap, Slot
        >>> a = torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 3.0]])
        >>> b = a[[1, 2, 0]]
        >>> weights = InnerProduct((a,), (b,), ({0: [("units", Slot("w", 0, IndexMap(3, 3)))]},))
        >>> units = torch.arange(3)[:, None]
        >>> term = Term(Facet(("units",), (0,), (Grid(units, {"units": units}),)), weights, ((0,),))
        >>> term.gains({})[0].matrix.tolist()
        [[0.0, 3.0, 1.0], [4.0, 6.0, 0.0], [6.0, 18.0, 3.0]]

        The best is ``[2, 0, 1]``, of gain 1 + 4 + 18: at position 0 of A goes unit 2 of B. Once it has been applied,
        gains are relative to it, so that the identity is best:

        >>> found = {"units": torch.tensor([2, 0, 1])}
        >>> weights.inner(found)
        23.0
        >>> term.gains(found)[0].matrix.tolist()
        [[1.0, 0.0, 3.0], [0.0, 4.0, 6.0], [3.0, 6.0, 18.0]]
    """

    facet: Facet
    inner_product: InnerProduct
    axes: tuple[tuple[int, ...], ...]
    scale: Tensor | None = None

    @property
    def neighbours(self) -> frozenset[str]:
        """Groups that move the same tensors along other axes."""
        return self.inner_product.groups - self.facet.groups

    def gains(self, at: Couplings) -> list[Gain]:
        """Return the gain matrices of the grids' cells when B's tensors have been moved."""
        c, grids = self.inner_product, self.facet.grids
        nothing = torch.zeros((), dtype=torch.float64, device=device_of_source(c.a[0]))
        found = [nothing for _ in grids]
        for axes, own, other, movers in zip(self.axes, c.a, c.b, c.movers, strict=False):
            for a, b in _moved_pieces(read(own), read(other), movers, at, axes):
                found = [g + self._part(grid, axes, a, b) for g, grid in zip(found, grids, strict=True)]
        return [Gain(total, grid.members) for total, grid in zip(found, grids, strict=True)]

    def _part(self, grid: Grid, axes: tuple[int, ...], a: Tensor, b: Tensor) -> Tensor:
        """Return the gain of the cells for one tensor, shape ``(cells, cells)``."""
        cells_a, cells_b = (cells_of(t.double(), axes, grid.positions) for t in (a, b))
        if self.scale is None:
            return cells_a.flatten(1) @ cells_b.flatten(1).T
        scale = self.scale.to(a.device)[grid.positions.to(a.device)]
        product = (scale[:, :, None] * cells_a).flatten(1) @ cells_b.flatten(1).T
        return product - 0.5 * scale @ cells_b.square().sum(2).T


def cells_of(tensor: Tensor, axes: tuple[int, ...], positions: Tensor) -> Tensor:
    """Return a tensor with one row per cell, shape ``(cells, copies, all other entries)``.

    Example:
        Two outputs read a flatten of two channels of three positions. Cell 1 holds the columns 3, 4 and 5:

        >>> weight = torch.arange(12).reshape(2, 6)
        >>> cells_of(weight, (1,), torch.tensor([[0, 1, 2], [3, 4, 5]]))[1].tolist()
        [[3, 9], [4, 10], [5, 11]]
    """
    front = tensor.movedim(axes, tuple(range(len(axes)))).flatten(0, len(axes) - 1)
    rows = front.flatten(1) if front.ndim > 1 else front[:, None]
    if positions.shape == (len(rows), 1) and torch.equal(positions[:, 0], torch.arange(len(rows))):
        return rows[:, None]
    return rows[positions.to(rows.device)]


class _Dependent(Protocol):
    @property
    def neighbours(self) -> frozenset[str]: ...


_DependentT = TypeVar("_DependentT", bound=_Dependent)


def independent(parts: Sequence[_DependentT], at: Couplings) -> list[_DependentT]:
    """Return the parts that depend on no group not matched yet: a single pass goes by these where there are any."""
    return [part for part in parts if part.neighbours <= at.keys()]


Measure = Callable[[InnerProduct, Couplings], float]


def negative_cost(inner_product: InnerProduct, at: Couplings) -> float:
    """Return minus half the squared distance: equal to the inner product up to what does not change."""
    return -0.5 * inner_product.cost(at)


class TermObjective:
    """An objective that is a sum of terms.

    Args:
        structure: the groups.
        terms: all terms.
        measure: value of an inner product under permutations (maximised): :meth:`InnerProduct.inner` where gains are
            all there is to a term, else :func:`negative_cost`. Terms with a scale add nothing to the value.
    """

    def __init__(
        self, structure: Structure, terms: Iterable[Term], measure: Measure = InnerProduct.inner
    ) -> None:
        self._structure, self._measure = structure, measure
        self._terms: dict[Cluster, list[Term]] = {c: [] for c in structure.clusters}
        compared: dict[int, InnerProduct] = {}
        for term in terms:
            self._terms[term.facet.cluster].append(term)
            if term.scale is None:
                compared[id(term.inner_product)] = term.inner_product
        self._compared = tuple(compared.values())

    @property
    def structure(self) -> Structure:
        """The groups."""
        return self._structure

    @property
    def measure(self) -> Measure:
        """The value of one inner product."""
        return self._measure

    @property
    def compared(self) -> Sequence[InnerProduct]:
        """The inner products that the value is a sum over: those of all terms without a scale, each once."""
        return self._compared

    def with_costs(self) -> TermObjective:
        """Return the same terms valued by minus half the squared distances, which also measure what changes norms."""
        every = [t for terms in self._terms.values() for t in terms]
        return (
            self if self._measure is negative_cost else TermObjective(self._structure, every, negative_cost)
        )

    def terms(self, cluster: Cluster) -> Sequence[Term]:
        """Return the terms of a cluster."""
        return self._terms[cluster]

    def gains(
        self,
        cluster: Cluster,
        at: Couplings,
        *,
        all_terms: bool = True,
        of_term: Callable[[Term, Couplings], Sequence[Gain]] = Term.gains,
    ) -> Sequence[Gain]:
        """Return the gains of a cluster (see :class:`Objective`); ``of_term`` computes those of a term."""
        terms, needed = self._terms[cluster], list(cluster)
        if not all_terms:
            needed = [name for name in cluster if name not in at]
            known = independent(terms, at)
            if any(t.facet.groups.intersection(needed) for t in known):
                terms, needed = known, []
        found = _added([g for t in terms for g in of_term(t, at)])
        return found + [self._nothing(n) for n in needed if not any(n in g.members for g in found)]

    def _nothing(self, group: str) -> Gain:
        """Return the gain of a group without any term."""
        size = self._structure.sizes[group]
        return Gain(torch.zeros(size, size, dtype=torch.float64), {group: torch.arange(size)[:, None]})

    def cost(self, group: str, at: Couplings, *, inner: Measure = InnerProduct.inner) -> float:
        """Return the matched squared distance per unit, over the unscaled terms of the group's cluster.

        Args:
            group: which.
            at: by group.
            inner: computes, or remembers, :meth:`InnerProduct.inner`.
        """
        terms = self._terms[self._structure.cluster_of[group]]
        compared = {id(t.inner_product): t.inner_product for t in terms if t.scale is None}
        return sum(c.cost(at, inner) for c in compared.values()) / max(self._structure.sizes[group], 1)

    def value(self, at: Couplings, groups: Iterable[str] | None = None) -> float:
        """Return the value of permutations (see :class:`Objective`)."""
        wanted = None if groups is None else frozenset(groups)
        return sum(self._measure(c, at) for c in self._compared if wanted is None or wanted & c.groups)


def _added(gains: Sequence[Gain]) -> list[Gain]:
    """Add the gains that cut their axes into the same cells."""
    found: list[Gain] = []
    for gain in gains:
        for k, other in enumerate(found):
            if _same_cells(gain, other):
                found[k] = Gain(other.matrix + gain.matrix.to(other.matrix.device), other.members)
                break
        else:
            found.append(gain)
    return found


def _same_cells(one: Gain, other: Gain) -> bool:
    return list(one.members) == list(other.members) and all(
        torch.equal(own, other.members[name]) for name, own in one.members.items()
    )


@dataclass(frozen=True, eq=False)
class UnitSpreads:
    """How much the units of both networks vary, for a group that shares no axis, averaged over the views.

    Attributes:
        a: mean squares of the units of A in the scale of the gains, shape ``(units,)``.
        b: the same for B.
        energy_a: mean squares of the units of A as they are, uncentred.
        energy_b: the same for B.
    """

    a: Tensor
    b: Tensor
    energy_a: Tensor
    energy_b: Tensor


class MomentObjective:
    """Gains that do not depend on other groups: cross-covariances or correlations of activations.

    Args:
        structure: the groups.
        gains: by cluster.
        spreads: by cluster, sum of the mean squares of all units of A and of B, in the gains' scale.
        fallback: matches the clusters whose activations are seen nowhere, and is about these only.
        units: by cluster of one group, how much each unit varies: what factors are found from.
    """

    def __init__(
        self,
        structure: Structure,
        gains: Mapping[Cluster, Sequence[Gain]],
        spreads: Mapping[Cluster, float],
        fallback: Objective,
        units: Mapping[Cluster, UnitSpreads] | None = None,
    ) -> None:
        self.units = dict(units or {})
        self._gains, self._spreads, self._fallback = dict(gains), dict(spreads), fallback
        seen = [c for c in structure.clusters if c in self._gains]
        self._structure = replace(
            structure, clusters=(*seen, *(c for c in structure.clusters if c not in self._gains))
        )

    @property
    def structure(self) -> Structure:
        """The groups; those whose activations are seen come first."""
        return self._structure

    def gains(self, cluster: Cluster, at: Couplings, *, all_terms: bool = True) -> Sequence[Gain]:
        """Return the gains of a cluster; what the other groups do plays no part where activations are seen."""
        if cluster in self._gains:
            return [g.moved(at) for g in self._gains[cluster]]
        return self._fallback.gains(cluster, at, all_terms=all_terms)

    def cost(self, group: str, at: Couplings) -> float:
        """Return the mean squared distance per unit under permutations, identity where missing."""
        cluster = self._structure.cluster_of[group]
        if cluster not in self._gains:
            return self._fallback.cost(group, at)
        gain = total_gain(self._gains[cluster], at)
        return (self._spread(cluster, at) - 2 * gain) / max(self._structure.sizes[group], 1)

    def _spread(self, cluster: Cluster, at: Couplings) -> float:
        """Return the sum of the mean squares of all units, those of B under their factors."""
        factors = at.get(cluster[0])
        if cluster not in self.units or not isinstance(factors, Monomial):
            return self._spreads[cluster]
        units = self.units[cluster]
        moved = units.b.cpu()[factors.index] * factors.factors.detach().cpu().square()
        return float(units.a.sum() + moved.sum())

    def value(self, at: Couplings, groups: Iterable[str] | None = None) -> float:
        """Return the value of permutations (see :class:`Objective`)."""
        wanted = frozenset(self._structure.sizes if groups is None else groups)
        total = sum(total_gain(g, at) for c, g in self._gains.items() if wanted.intersection(c))
        return total + self._fallback.value(at, groups)

    @property
    def seen(self) -> frozenset[Cluster]:
        """The clusters whose activations are seen; the others are matched by the fallback."""
        return frozenset(self._gains)

    @property
    def fallback(self) -> Objective:
        """The objective of the clusters whose activations are seen nowhere."""
        return self._fallback

    def seen_value(self, at: Couplings) -> float:
        """Return the total gain of the clusters whose activations are seen."""
        return sum(total_gain(gains, at) for gains in self._gains.values())
