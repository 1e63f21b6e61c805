r"""Weight matching in the curvature of the outputs: the Kronecker form of what a relabelling changes.

A change :math:`\Delta W` of a layer's weights, its bias among them, changes the outputs, to second order and with the
usual factorisation, by

.. math:: \mathbb E\, \lVert \Delta f \rVert^2 \approx \mathrm{tr}(G\, \Delta W\, \Sigma\, \Delta W^\top), \qquad
          G = \mathbb E\, J^\top J, \quad \Sigma = \mathbb E\, h h^\top,

where :math:`J` is the Jacobian of the outputs by the layer's pre-activations and :math:`h` what flows in, with a one
for the bias. With gradients of the loss in place of :math:`J` this is the Kronecker-factored curvature of Martens and
Grosse 2015, which fades as training ends. The sum over all layers, :math:`\Delta W = W_A - P W_B Q^\top`, is a
quadratic assignment problem, and both its halves move norms, so no term drops out of the value.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor

from isthmus.errors import ModelError
from isthmus.layers import Site
from isthmus.matching._objectives import InnerProduct, Term, TermObjective
from isthmus.matching._terms import LayeredPair, in_metric
from isthmus.moments import InputStatistics, Moment

__all__ = ["kronecker_objective"]


def kronecker_objective(
    pair: LayeredPair, statistics: Mapping[str, InputStatistics], slopes: Mapping[str, Moment]
) -> TermObjective:
    """Build weight matching in the metric of inputs and of outputs of every layer.

    The value is minus half the summed change of the outputs. Gains are the gradients of the inner products; what
    changes norms is seen by the value, by which :class:`isthmus.matching.FrankWolfe` goes.

    Args:
        pair: the networks.
        statistics: second moments of what flows into each site of A.
        slopes: second moments of the slopes of the outputs by what comes out of each site of A.

    Raises:
        ModelError: a group moves a parameter that no layer reads, whose curvature is not known.
    """
    layers = pair.layers
    for name in layers.parameters:
        movers = [g for pairs in layers.table.get(name, {}).values() for g, _ in pairs]
        if movers and name not in layers.covered:
            raise ModelError(
                f"kronecker: {movers[0]!r} moves {name!r}, which is no weight or bias of a linear layer or "
                "convolution, so what it does to the outputs is not known. Use contributions, which compares units."
            )
    terms = [term for site in layers.sites for term in _layer_terms(pair, site, statistics, slopes)]
    return pair.objective(terms, costs=True)


def _layer_terms(
    pair: LayeredPair,
    site: Site,
    statistics: Mapping[str, InputStatistics],
    slopes: Mapping[str, Moment],
) -> list[Term]:
    inner_product = _in_both_metrics(in_metric(pair, site, statistics[site.name]), site, slopes[site.name])
    bias = ((0,),) if len(inner_product.a) > 1 else ()
    outputs = [
        Term(facet, inner_product, (facet.axes, *bias) if len(facet.axes) == 1 else (facet.axes,))
        for facet in pair.layers.facets(site.weight, site.out_axis)
    ]
    read = pair.layers.facets(site.weight, site.in_axis) if site.channels_listed else ()
    return outputs + [Term(facet, inner_product, (facet.axes,)) for facet in read if len(facet.axes) == 1]


def _in_both_metrics(inner_product: InnerProduct, site: Site, slopes: Moment) -> InnerProduct:
    """Return an inner product of a layer with the metric of its outputs too."""
    inputs, own, moment = inner_product.metric, inner_product.own, slopes.second_moment
    assert inputs is not None
    assert own is not None

    def metric(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        axes = (site.out_axis, 0)[: len(tensors)]
        return tuple(_along(moment, x, axis) for x, axis in zip(inputs(tensors), axes, strict=True))

    a = metric(tuple(x if isinstance(x, Tensor) else x.read() for x in own))
    norm = sum(float((x * y).sum()) for x, y in zip(a, own, strict=True))  # pyright: ignore
    return replace(inner_product, a=a, norm_a=norm, metric=metric, through=None)


def _along(matrix: Tensor, tensor: Tensor, axis: int) -> Tensor:
    front = tensor.movedim(axis, 0)
    return (matrix.to(tensor) @ front.reshape(len(front), -1)).reshape(front.shape).movedim(0, axis)
