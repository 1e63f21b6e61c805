"""Terms of two networks' parameters and layers, and the objectives made of them.

=====================  ==================================================================
objective              gain matrix (rows: units of A, columns: units of B)
=====================  ==================================================================
incoming weights       ``W_A W_Bᵀ``, the paper's naive weight matching
weights                incoming + bias + outgoing
covariance             ``W_A Σ W_Bᵀ`` with the bias as one more input, the paper's own
activations            ``Cov(h_A, h_B)``, or ``Corr(h_A, h_B)``
=====================  ==================================================================
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations

import torch
from torch import Tensor

from isthmus.layers import Site, affine_layer, matrix_of, tensor_of
from isthmus.matching._grids import Cluster, Facet
from isthmus.matching._layers import Layers, View
from isthmus.matching._nested import Gain
from isthmus.matching._objectives import (
    InnerProduct,
    MomentObjective,
    Term,
    TermObjective,
    UnitSpreads,
    negative_cost,
)
from isthmus.matching._pieces import Piece
from isthmus.matching._sources import narrowed, read, source_of
from isthmus.moments import CrossMoment, InputStatistics
from isthmus.symmetry import Slot

__all__ = [
    "LayeredPair",
    "activation_objective",
    "covariance_objective",
    "in_metric",
    "incoming_weight_objective",
    "layer_terms",
    "uncovered_terms",
    "weight_objective",
]


@dataclass(frozen=True)
class LayeredPair:
    """Two networks of one architecture: their layers and states."""

    layers: Layers
    state_a: Mapping[str, Tensor]
    state_b: Mapping[str, Tensor]

    def relative(self) -> LayeredPair:
        """Return the pair with every weight divided by its size, so that all layers count alike, and biases left out.

        A parameter is divided by the root of the product of its norms in both networks. Units are carried by the same
        couplings as before.
        """
        sizes: dict[str, float] = {}
        for name in self.layers.parameters:
            norms = [float(state[name].double().norm()) for state in (self.state_a, self.state_b)]
            size = math.sqrt(norms[0] * norms[1])
            sizes[name] = 1 / size if size and self.state_a[name].ndim > 1 else 0.0
        states = (
            {
                name: tensor.double() * sizes[name] if name in sizes else tensor
                for name, tensor in state.items()
            }
            for state in (self.state_a, self.state_b)
        )
        return LayeredPair(self.layers, *states)

    def plain(
        self,
        tensor: str,
        piece: Piece,
        count: float = 1.0,
        through: tuple[int, ...] | None = None,
        among: frozenset[str] | None = None,
    ) -> InnerProduct:
        """Compare a piece of a parameter in the identity metric, divided by ``count``.

        Args:
            tensor: name of the parameter.
            piece: which part of it.
            count: divides the metric.
            through: axes whose slots count in the gains; all if None.
            among: groups whose slots count; all if None.
        """
        seen = None if through is None else (through,)
        own, other = (narrowed(source_of(state, tensor), piece.cut) for state in (self.state_a, self.state_b))
        movers = (piece.table,)
        if count == 1.0:
            return InnerProduct((own,), (other,), movers, through=seen, among=among)
        whole = read(own).double()
        norm = float(whole.square().sum()) / count
        return InnerProduct(
            (whole / count,),
            (other,),
            movers,
            norm,
            lambda moved: tuple(x / count for x in moved),
            seen,
            among=among,
            own=(own,),
        )

    def plain_terms(self, tensor: str, axis: int | None = None) -> list[Term]:
        """Return the terms of one parameter in the identity metric, seen along one axis or all."""
        terms: list[Term] = []
        for piece, listed in self.layers.pieces(tensor):
            facets = [f for f in listed if axis is None or f.axes[0] == axis]
            if facets:
                inner_product = self.plain(tensor, piece, through=None if axis is None else (axis,))
                terms += [Term(facet, inner_product, (facet.axes,)) for facet in facets]
        return terms

    def plain_terms_by_axes(
        self, tensor: str, piece: Piece, facets: Sequence[Facet], *, averaged: bool = False
    ) -> list[Term]:
        """Return the terms of facets in the identity metric, with an inner product of its own for each set of axes.

        So a group that acts on several facets counts on each, and gains stay the gradients of what is compared.

        Args:
            tensor: name of the parameter.
            piece: which part of it.
            facets: of that part.
            averaged: whether to divide by the number of entries of one position of the first axis.
        """
        by_axes: dict[tuple[int, ...], list[Facet]] = {}
        for facet in facets:
            by_axes.setdefault(facet.axes, []).append(facet)
        terms: list[Term] = []
        for axes, listed in by_axes.items():
            count = math.prod(piece.shape) / piece.shape[axes[0]] if averaged else 1.0
            among = frozenset[str]().union(*(facet.groups for facet in listed))
            inner_product = self.plain(tensor, piece, count, axes, among)
            terms += [Term(facet, inner_product, (axes,)) for facet in listed]
        return terms

    def incoming_terms(self, tensor: str) -> list[Term]:
        """Return the terms of a parameter that no layer reads, for the objective that knows incoming weights alone.

        All facets count, since what the parameter is to a group is not known. Only where a slot would count on two
        facets (the blocks of a grouped transposed convolution, whose inputs and outputs lie on two axes of the filter),
        and roles are known, the facets along which units are held do.
        """
        terms: list[Term] = []
        for piece, facets in self.layers.pieces(tensor):
            if _counted_twice(piece, facets):
                held = [facet for facet in facets if _holds(piece, facet)]
                terms += self.plain_terms_by_axes(tensor, piece, held or facets)
            else:
                whole = self.plain(tensor, piece)
                terms += [Term(facet, whole, (facet.axes,)) for facet in facets]
        return terms

    def objective(self, terms: Sequence[Term], *, costs: bool = False) -> TermObjective:
        """Return the sum of terms, valued by inner products or, with ``costs``, by squared distances."""
        return TermObjective(self.layers.structure, terms, negative_cost if costs else InnerProduct.inner)


def _counted_twice(piece: Piece, facets: Sequence[Facet]) -> bool:
    """Return whether some slot of a group lies on the axes of two facets on which the group acts."""
    return any(
        name in one.groups and name in other.groups
        for one, other in combinations(facets, 2)
        for axis in set(one.axes).intersection(other.axes)
        for name, _ in piece.table[axis]
    )


def _holds(piece: Piece, facet: Facet) -> bool:
    """Return whether the first axis of a facet holds units of some group that acts there."""
    return any(
        slot.role in ("holds", "both") for name, slot in piece.table[facet.axes[0]] if name in facet.groups
    )


def weight_objective(pair: LayeredPair) -> TermObjective:
    """Build full weight matching: every parameter a group moves counts, incoming, bias and outgoing."""
    return pair.objective([t for name in pair.layers.parameters for t in pair.plain_terms(name)])


def incoming_weight_objective(pair: LayeredPair) -> TermObjective:
    """Build the paper's naive weight matching: incoming weights alone, no bias.

    Weights that no layer reads (embeddings, stacked experts) count too: what they are to a group is not known.
    Groups without any of these, and what is matched together with them, are matched by all their parameters.
    """
    layers = pair.layers
    incoming = dict.fromkeys((site.weight, site.out_axis) for site in layers.sites)
    terms = [t for name, axis in incoming for t in pair.plain_terms(name, axis)]
    for name in layers.parameters:
        if name not in layers.covered and len(source_of(pair.state_a, name).shape) > 1:
            terms += pair.incoming_terms(name)
    found = {name for t in terms for name in t.facet.groups}
    rest = {c for c in layers.structure.clusters if not found.issuperset(c)}
    everything = [t for name in layers.parameters for t in pair.plain_terms(name)]
    return pair.objective(
        [t for t in terms if t.facet.cluster not in rest] + [t for t in everything if t.facet.cluster in rest]
    )


def covariance_objective(
    pair: LayeredPair, statistics: Mapping[str, InputStatistics], *, tie_outgoing: bool = False
) -> TermObjective:
    r"""Build weight matching in the metric of the layer's input second moment.

    .. math:: \min_P \; \mathrm{tr}\,(W_A - P W_B)\, \Sigma\, (W_A - P W_B)^\top

    with :math:`\Sigma = E[h h^\top]` of network A and the bias as one more input of constant one; BatchNorm is
    folded in. Parameters outside such layers (embeddings, gains of other norms) enter with the identity as
    metric, averaged over their other entries.

    The value is the summed squared error of all pre-activations, and of the parameters outside.

    Args:
        pair: the networks.
        statistics: second moments of what flows into each site of A. Those of a grouped convolution are
            pooled over its channel groups.
        tie_outgoing: whether the weights that read a group count too, each unit with weight
            :math:`E[h_i^2]` (the diagonal approximation of the quadratic assignment problem).
    """
    terms: list[Term] = []
    for site in pair.layers.sites:
        terms += layer_terms(pair, site, statistics[site.name])
        if tie_outgoing and site.channels_listed:
            terms += _outgoing_terms(pair, site, statistics[site.name])
    return pair.objective(terms + uncovered_terms(pair), costs=True)


def layer_terms(
    pair: LayeredPair, site: Site, statistics: InputStatistics, *, centred: bool = False
) -> list[Term]:
    """Compare a folded layer, weight and bias, in the second moment of what flows into A's layer.

    With the bias as one more input of constant one, the moment is ``[[Σ, μ], [μᵀ, 1]]``.

    Args:
        pair: the networks.
        site: the layer.
        statistics: of what flows into A's layer.
        centred: take the covariance for ``Σ``; the bias then plays no part.
    """
    inner_product = in_metric(pair, site, statistics, centred)
    return [
        # Where a group acts on a block of inputs only, its outputs cannot be read off the bias.
        Term(facet, inner_product, (facet.axes, (0,)) if len(facet.axes) == 1 else (facet.axes,))
        for facet in pair.layers.facets(site.weight, site.out_axis)
    ]


def in_metric(
    pair: LayeredPair, site: Site, statistics: InputStatistics, centred: bool = False
) -> InnerProduct:
    """Return the inner product of a folded layer in the second moment of its inputs (see :func:`layer_terms`)."""
    weight_a, bias_a = affine_layer(pair.state_a, site)
    weight_b, bias_b = affine_layer(pair.state_b, site)
    mean = statistics.mean.to(weight_a.device)

    def metric(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        weight = tensors[0]
        matrix = matrix_of(weight, site)
        lifted = statistics.multiply(matrix)
        if centred:
            lifted = lifted - torch.outer(matrix @ mean, mean)
        if len(tensors) == 1:
            return (tensor_of(lifted, weight, site),)
        bias = tensors[1]
        # A transposed convolution has one row per output and kernel position: each carries its share.
        each = len(matrix) // len(bias)
        lifted = lifted + torch.outer(bias.repeat_interleave(each) / each, mean)
        through = (matrix @ mean).reshape(len(bias), each).mean(1)
        return tensor_of(lifted, weight, site), through + bias

    own: tuple[Tensor, ...] = (weight_a,)
    other: tuple[Tensor, ...] = (weight_b,)
    if bias_a is not None and bias_b is not None and not centred:
        own, other = (weight_a, bias_a), (weight_b, bias_b)
    a = metric(own)
    table = pair.layers.table.get(site.weight, {})
    movers = {
        axis: _folded(pair, site, slots) if axis == site.out_axis else slots for axis, slots in table.items()
    }
    rows = {0: [(g, replace(s, axis=0, block=())) for g, s in movers.get(site.out_axis, ())]}
    norm = sum(float((x * y).sum()) for x, y in zip(a, own, strict=True))
    through = ((site.out_axis,), (0,))[: len(own)]
    return InnerProduct(a, other, (movers, rows)[: len(own)], norm, metric, through, own=own)


def _folded(pair: LayeredPair, site: Site, slots: Sequence[tuple[str, Slot]]) -> list[tuple[str, Slot]]:
    """Return the slots of a layer's outputs with its norm folded in: factors that the gain took, the layer takes."""
    gain = None if site.norm is None else site.norm.weight
    powers = {g: s.power for g, s in pair.layers.table.get(gain or "", {}).get(0, ())}
    return [(g, replace(s, power=powers[g]) if g in powers else s) for g, s in slots]


def _outgoing_terms(pair: LayeredPair, site: Site, statistics: InputStatistics) -> list[Term]:
    """Return the terms of the groups that flow into a site, each unit weighted by its mean square."""
    weight_a, _ = affine_layer(pair.state_a, site)
    weight_b, _ = affine_layer(pair.state_b, site)
    movers = (pair.layers.table.get(site.weight, {}),)
    inner_product = InnerProduct((weight_a,), (weight_b,), movers, float(weight_a.square().sum()))
    energy = statistics.second_moment_diagonal.reshape(weight_a.shape[site.in_axis], -1).mean(1)
    return [
        Term(facet, inner_product, (facet.axes,), energy)
        for facet in pair.layers.facets(site.weight, site.in_axis)
        if len(facet.axes) == 1
    ]


def uncovered_terms(pair: LayeredPair) -> list[Term]:
    """Return terms for parameters that no layer reads, averaged over their other entries."""
    terms: list[Term] = []
    for name in (n for n in pair.layers.parameters if n not in pair.layers.covered):
        for piece, facets in pair.layers.pieces(name):
            terms += pair.plain_terms_by_axes(name, piece, facets, averaged=True)
    return terms


def activation_objective(
    pair: LayeredPair,
    moments: Mapping[Cluster, Sequence[CrossMoment]],
    *,
    correlation: bool,
    views: Mapping[Cluster, Sequence[View]] | None = None,
    turned: Collection[Cluster] = (),
) -> MomentObjective:
    """Build activation matching: cross-covariances (or correlations) of the units, averaged over the views.

    The gains of units that never vary are zero. A cluster some of whose groups are seen nowhere is matched by
    its parameters.

    Args:
        pair: the networks.
        moments: by cluster, one for each view.
        correlation: whether units are divided by their standard deviations.
        views: where clusters are seen; default: :meth:`Layers.views`.
        turned: clusters that are rotated: their units have no scale of their own, so they are compared by covariances.
    """
    gains: dict[Cluster, list[Gain]] = {}
    spreads: dict[Cluster, float] = {}
    units: dict[Cluster, UnitSpreads] = {}
    for cluster, listed in (pair.layers.views() if views is None else views).items():
        if all(any(name in v.grid.members for v in listed) for name in cluster):
            seen, scaled = moments[cluster], correlation and cluster not in turned
            gains[cluster] = [
                Gain(_gain(m, scaled) / len(listed), v.grid.members)
                for m, v in zip(seen, listed, strict=True)
            ]
            spreads[cluster] = sum(_spread(m, scaled) for m in seen) / len(listed)
            if len(cluster) == 1:
                units[cluster] = _spread_of_units(seen, scaled)
    everything = (t for name in pair.layers.parameters for t in pair.plain_terms(name))
    fallback = pair.objective([t for t in everything if t.facet.cluster not in gains])
    return MomentObjective(pair.layers.structure, gains, spreads, fallback, units)


def _gain(moment: CrossMoment, correlation: bool) -> Tensor:
    if correlation:
        return moment.correlation
    gain = moment.covariance.clone()
    constant_a, constant_b = moment.constant_units
    gain[constant_a] = 0.0
    gain[:, constant_b] = 0.0
    return gain


def _spread_of_units(seen: Sequence[CrossMoment], correlation: bool) -> UnitSpreads:
    """Return the mean over the views of how much each unit varies."""
    variances = [
        torch.stack(v).mean(0) for v in zip(*((m.variance_a, m.variance_b) for m in seen), strict=True)
    ]
    means = [torch.stack(v).square().mean(0) for v in zip(*((m.mean_a, m.mean_b) for m in seen), strict=True)]
    energies = [v + mean for v, mean in zip(variances, means, strict=True)]
    if correlation:
        varying = [torch.ones_like(v) for v in variances]
        for k, ones in enumerate(varying):
            for moment in seen:
                ones[moment.constant_units[k]] -= 1 / len(seen)
        variances = varying
    return UnitSpreads(*variances, *energies)


def _spread(moment: CrossMoment, correlation: bool) -> float:
    if not correlation:
        return float(moment.variance_a.sum() + moment.variance_b.sum())
    constant_a, constant_b = moment.constant_units
    return float(moment.units_a - len(constant_a) + moment.units_b - len(constant_b))
