"""Sites: the places in a traced network where a weight meets an activation.

A site knows its weight, which axis of it lists the inputs and which the outputs, and how the tensor that flows
in is read as rows that the weight multiplies. Taps, covariance metrics and activations are all defined on sites,
so they work for every traced model, whether its layers are modules or function calls.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import Tensor, fx

from isthmus.layers._batch_norm import BatchNorm, following_norm
from isthmus.layers._convolution import Convolution
from isthmus.layers._operands import operands_of
from isthmus.symmetry import Trace

__all__ = ["Site", "affine_layer", "find_sites", "matrix_of", "tensor_of", "tensors_met"]


@dataclass(frozen=True)
class Site:
    """A weight applied to an activation.

    Attributes:
        name: the graph node that applies it.
        weight: name of the weight.
        bias: name of the bias, if any.
        in_axis: axis of the weight that is contracted with the activation.
        out_axis: axis of the weight that lists the outputs.
        source: the graph node whose value flows in.
        target: the node of the result (after folded normalisation).
        convolution: how patches are cut, ``None`` for linear layers.
        norm: batch normalisation that directly follows, if any.
    """

    name: str
    weight: str
    bias: str | None
    in_axis: int
    out_axis: int
    source: str
    target: str
    convolution: Convolution | None = None
    norm: BatchNorm | None = None

    @property
    def channels_listed(self) -> bool:
        """Whether the weight's input axis lists all channels of the activation (not so in grouped ones)."""
        return self.convolution is None or self.convolution.groups == 1

    def channel_axis(self, activation: Tensor) -> int:
        """Return the axis of an inflowing or outflowing activation that lists its channels."""
        return self.channel_axis_of(activation.ndim)

    def channel_axis_of(self, rank: int) -> int:
        """Return the axis that lists the channels, given the number of axes of an activation."""
        return rank - 1 - (0 if self.convolution is None else self.convolution.dimensions)


def find_sites(traced: Trace) -> tuple[Site, ...]:
    """Return the sites of a traced model in the order in which they are computed."""
    found = (_site(node, traced.tensors) for node in traced.graph.nodes)
    return tuple(site for site in found if site is not None)


def tensors_met(traced: Trace) -> tuple[str, ...]:
    """Return the names of the tensors in the order in which operators of a traced model first use them."""
    found: dict[str, None] = {}
    for node in traced.graph.nodes:
        if node.op == "call_function":
            used = (traced.tensors.get(n.name) for n in node.all_input_nodes if n.op == "placeholder")
            found.update(dict.fromkeys(name for name in used if name is not None))
    return tuple(found)


def _site(node: fx.Node, tensors: Mapping[str, str]) -> Site | None:
    given = operands_of(node)
    if given is None or not isinstance(given.source, fx.Node) or not isinstance(given.weight, fx.Node):
        return None
    cut, name = given.convolution, tensors.get(given.weight.name)
    if cut is None:
        known = given.weight.meta["val"].ndim == 2 and given.source.name not in tensors
    else:
        known = not (cut.turned and cut.groups > 1)
    if name is None or not known:
        return None
    site = Site(node.name, name, None, given.in_axis, given.out_axis, given.source.name, node.name, cut)
    value, bias = node.meta["val"], given.bias
    axis = site.channel_axis_of(value.ndim)
    if isinstance(bias, fx.Node) and bias.meta["val"].shape == value.shape[axis : axis + 1]:
        site = replace(site, bias=tensors.get(bias.name))
    if given.scaled or (site.bias is None and bias is not None):
        return site  # this layer is more than a weight and a bias of the state, so no normalisation folds into them
    found = following_norm(node, tensors, axis)
    return site if found is None else replace(site, norm=found[0], target=found[1])


def affine_layer(state: Mapping[str, Tensor], site: Site) -> tuple[Tensor, Tensor | None]:
    """Return weight (in its own shape) and bias ``(outputs,)`` of a site, its normalisation folded in, float64."""
    weight = state[site.weight].double()
    bias = None if site.bias is None else state[site.bias].double()
    return (weight, bias) if site.norm is None else site.norm.fold(state, weight, bias, axis=site.out_axis)


def matrix_of(weight: Tensor, site: Site) -> Tensor:
    """Return a site's weight as a matrix that multiplies its input rows from the left.

    Shape ``(outputs, features)``; for transposed convolutions ``(outputs · kernel, channels)``.
    """
    front = weight.movedim((site.out_axis, site.in_axis), (0, 1))
    if site.convolution is not None and site.convolution.turned:
        return front.movedim(1, -1).reshape(-1, front.shape[1])
    return front.reshape(front.shape[0], -1)


def tensor_of(matrix: Tensor, like: Tensor, site: Site) -> Tensor:
    """Undo :func:`matrix_of`: return the matrix in the shape of the weight."""
    front = like.movedim((site.out_axis, site.in_axis), (0, 1))
    if site.convolution is not None and site.convolution.turned:
        back = matrix.reshape(front.shape[0], *front.shape[2:], front.shape[1]).movedim(-1, 1)
    else:
        back = matrix.reshape(front.shape)
    return back.movedim((0, 1), (site.out_axis, site.in_axis))
