"""Sites: the places in a traced network where a weight meets an activation.

A site knows its weight, which axis of it lists the inputs and which the outputs, and how the tensor that flows
in is read as rows that the weight multiplies. Taps, covariance metrics and activations are all defined on sites,
so they work for every traced model, whether its layers are modules or function calls.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx

from isthmus.moments._patches import Convolution
from isthmus.symmetry import Trace
from isthmus.symmetry._trace import bound_arguments, operator_of

__all__ = ["BatchNorm", "Site", "find_sites", "tensors_met"]

_TRANSPOSITIONS = ("aten.t", "aten.transpose", "aten.permute", "aten.numpy_T", "aten.mT")
_BATCH_NORMS = ("aten._native_batch_norm_legit_no_training", "aten.batch_norm")


@dataclass(frozen=True)
class BatchNorm:
    """Batch normalisation in evaluation mode, which is affine and can be folded into the layer before it.

    The four tensors are named as in the state; a name is ``None`` where the layer has no such tensor.
    """

    weight: str | None
    bias: str | None
    running_mean: str
    running_var: str
    eps: float


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
    sites: list[Site] = []
    for node in traced.graph.nodes:
        if node.op == "call_function":
            site = _site(node, traced.tensors)
            if site is not None:
                sites.append(site)
    return tuple(sites)


def tensors_met(traced: Trace) -> tuple[str, ...]:
    """Return the names of the tensors in the order in which operators of a traced model first use them."""
    found: dict[str, None] = {}
    for node in traced.graph.nodes:
        if node.op == "call_function":
            used = (traced.tensors.get(n.name) for n in node.all_input_nodes if n.op == "placeholder")
            found.update(dict.fromkeys(name for name in used if name is not None))
    return tuple(found)


def _site(node: fx.Node, tensors: Mapping[str, str]) -> Site | None:
    operator = operator_of(node)
    if operator == "aten.linear":
        given = bound_arguments(node)
        return _linear(node, tensors, given["input"], given["weight"], given.get("bias"), turned=True)
    if operator == "aten.addmm":
        bias, source, weight = node.args[:3]
        return _linear(node, tensors, source, weight, bias, turned=False)
    if operator in ("aten.mm", "aten.matmul"):
        return _linear(node, tensors, node.args[0], node.args[1], None, turned=False)
    if operator.startswith("aten.conv"):
        return _convolution(node, tensors, operator)
    return None


def _linear(
    node: fx.Node, tensors: Mapping[str, str], source: Any, weight: Any, bias: Any, *, turned: bool
) -> Site | None:
    """Build the site of ``source @ weight``, or ``source @ weight.T`` when ``turned``."""
    while isinstance(weight, fx.Node) and weight.op == "call_function" and _is_transposition(weight):
        weight, turned = weight.args[0], not turned
    name = _state_name(weight, tensors)
    example = weight.meta.get("val") if isinstance(weight, fx.Node) else None
    if name is None or example is None or example.ndim != 2 or not isinstance(source, fx.Node):
        return None
    if _state_name(source, tensors) is not None:
        return None
    axes = (1, 0) if turned else (0, 1)
    target, norm = _following_norm(node, tensors)
    return Site(node.name, name, _state_name(bias, tensors), *axes, source.name, target, None, norm)


def _convolution(node: fx.Node, tensors: Mapping[str, str], operator: str) -> Site | None:
    given = bound_arguments(node)
    name, source = _state_name(given["weight"], tensors), given["input"]
    if name is None or not isinstance(source, fx.Node):
        return None
    weight = given["weight"].meta["val"]
    turned = "transpose" in operator or bool(given.get("transposed", False))
    convolution = Convolution.from_arguments(given, tuple(int(s) for s in weight.shape[2:]), turned)
    if turned and convolution.groups > 1:
        return None
    target, norm = _following_norm(node, tensors)
    axes = (0, 1) if turned else (1, 0)
    return Site(
        node.name,
        name,
        _state_name(given.get("bias"), tensors),
        *axes,
        source.name,
        target,
        convolution,
        norm,
    )


def _is_transposition(node: fx.Node) -> bool:
    example = node.meta.get("val")
    if operator_of(node) not in _TRANSPOSITIONS or example is None or example.ndim != 2:
        return False
    dims: Sequence[Any] = node.args[1:]
    flat = [d % 2 for a in dims for d in (a if isinstance(a, (list, tuple)) else [a]) if isinstance(d, int)]
    return not flat or flat == [1, 0] or (operator_of(node) == "aten.transpose" and sorted(flat) == [0, 1])


def _state_name(node: Any, tensors: Mapping[str, str]) -> str | None:
    return tensors.get(node.name) if isinstance(node, fx.Node) else None


def _following_norm(node: fx.Node, tensors: Mapping[str, str]) -> tuple[str, BatchNorm | None]:
    """Return the batch normalisation that alone uses this node, and the node where its result appears."""
    users = list(node.users)
    if len(users) != 1 or operator_of(users[0]) not in _BATCH_NORMS:
        return node.name, None
    given = bound_arguments(users[0])
    if given["input"] is not node:
        return node.name, None
    mean, var = (_state_name(given[k], tensors) for k in ("running_mean", "running_var"))
    if mean is None or var is None:
        return node.name, None
    norm = BatchNorm(
        _state_name(given.get("weight"), tensors),
        _state_name(given.get("bias"), tensors),
        mean,
        var,
        float(given["eps"]),
    )
    results = list(users[0].users)
    named = results[0].name if operator_of(users[0]) != "aten.batch_norm" and results else users[0].name
    return named, norm
