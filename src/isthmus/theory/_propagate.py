r"""Propagating the error of linear connectivity through a network, operator by operator.

On a segment between two networks, with :math:`x_t` the value of a node at the network :math:`\theta_t` and
:math:`\bar x_t` the chord of its values at the ends, every node carries a bound
:math:`r(x) \ge \sup_t \|x_t - \bar x_t\|_2` per example. [O] theory note 3.1-3.5:

* a layer with weights: :math:`r' = \nu r + \tfrac14 \|\Delta W\, \Delta x\|`, with :math:`\nu` the larger spectral norm
  of the two ends;
* an activation: :math:`r' = \lambda r + \|\sup_t J\|`;
* a fixed linear operator: :math:`r' = \|L\| r`; a sum: :math:`r' = r_1 + r_2`; a concatenation: root of squares.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional

from isthmus.errors import ModelError
from isthmus.symmetry import Trace
from isthmus.symmetry._trace import bound_arguments, module_of, operator_of
from isthmus.theory._activations import ACTIVATIONS, kink_gap
from isthmus.theory._norms import convolution_norm, matrix_norm, pooling_norm

__all__ = ["Ends", "Norms", "layer_norms", "segment_bound"]

_MOVES = {
    "aten.view", "aten.reshape", "aten._unsafe_view", "aten.flatten", "aten.unflatten", "aten.permute",
    "aten.transpose", "aten.t", "aten.squeeze", "aten.unsqueeze", "aten.clone", "aten.contiguous", "aten.detach",
    "aten.alias", "aten.dropout", "aten.feature_dropout", "aten._to_copy", "aten.to", "aten.neg", "aten.movedim",
}  # fmt: skip
_PARTS = {"aten.slice", "aten.select", "aten.narrow"}
_BATCH_NORMS = {"aten.batch_norm", "aten._native_batch_norm_legit_no_training"}

Norms = Mapping[str, float]
"""Spectral norm of every layer with weights, by node name."""


@dataclass(frozen=True)
class Ends:
    """Everything known at one end of a segment: the state, and the value of every node on a batch."""

    state: Mapping[str, Tensor]
    values: Mapping[str, Any]
    norms: Norms


def _argument(node: fx.Node, name: str) -> Any:
    return bound_arguments(node).get(name)


def _out_of_scope(node: fx.Node, why: str = "") -> ModelError:
    where = module_of(node)
    return ModelError(
        f"certify: operator {operator_of(node)}{' in ' + repr(where) if where else ''} is out of scope"
        f"{': ' + why if why else ''}. Certified are linear and convolution layers, BatchNorm in evaluation mode, "
        "elementwise activations with known slopes, pooling, sums, concatenation and reshaping; measure this "
        "network with isthmus.line instead."
    )


def weighted(node: fx.Node, trace: Trace) -> bool:
    """Tell whether a node applies weights of the state to an activation."""
    name = operator_of(node)
    return name in ("aten.linear", "aten.addmm") or name in _BATCH_NORMS or name.startswith("aten.conv")


def _weights(node: fx.Node, trace: Trace, state: Mapping[str, Tensor]) -> tuple[fx.Node, Tensor]:
    """Return the input node of a layer with weights, and its weight."""
    name = operator_of(node)
    if name == "aten.addmm":
        source, weight = node.args[1], node.args[2]
    else:
        source, weight = _argument(node, "input"), _argument(node, "weight")
    turned = False
    while isinstance(weight, fx.Node) and operator_of(weight) in ("aten.t", "aten.transpose", "aten.permute"):
        weight, turned = weight.args[0], not turned
    if not isinstance(weight, fx.Node) or weight.name not in trace.tensors or not isinstance(source, fx.Node):
        raise _out_of_scope(node, "its weight is not a parameter of the network")
    found = state[trace.tensors[weight.name]]
    return source, found.T if turned else found


def batch_norm_scale(node: fx.Node, trace: Trace, state: Mapping[str, Tensor]) -> tuple[fx.Node, Tensor]:
    """Return the input node of a BatchNorm and the factor by which it multiplies each channel."""

    def tensor(name: str) -> Tensor | None:
        found = _argument(node, name)
        return state[trace.tensors[found.name]] if isinstance(found, fx.Node) else None

    variance, weight, source = tensor("running_var"), tensor("weight"), _argument(node, "input")
    if variance is None or not isinstance(source, fx.Node):
        raise _out_of_scope(node, "batch statistics")
    scale = (variance.double() + float(_argument(node, "eps"))).rsqrt()
    return source, scale if weight is None else scale * weight.double()


def layer_norms(trace: Trace, state: Mapping[str, Tensor]) -> dict[str, float]:
    """Return an upper bound on the spectral norm of every layer with weights.

    Raises:
        ModelError: a layer's weights are no parameters.
    """
    norms: dict[str, float] = {}
    for node in trace.graph.nodes:
        if node.op != "call_function" or not weighted(node, trace):
            continue
        name = operator_of(node)
        if name in _BATCH_NORMS:
            norms[node.name] = float(batch_norm_scale(node, trace, state)[1].abs().max())
        elif name.startswith("aten.conv"):
            norms[node.name] = _convolution_norm(node, trace, state)
        else:
            norms[node.name] = matrix_norm(_weights(node, trace, state)[1])
    return norms


def _spread(value: Any, rank: int) -> list[int]:
    values = [value] if isinstance(value, int) else list(value)
    return [int(v) for v in (values * rank if len(values) == 1 else values)]


def _convolution_norm(node: fx.Node, trace: Trace, state: Mapping[str, Tensor]) -> float:
    source, kernel = _weights(node, trace, state)
    rank = kernel.ndim - 2
    turned = "transpose" in operator_of(node)
    space = (node if turned else source).meta["val"].shape[-rank:]
    dilation = _spread(_argument(node, "dilation"), rank)
    groups = int(_argument(node, "groups"))
    return convolution_norm(kernel, [int(s) for s in space], dilation=dilation, groups=groups, turned=turned)


def segment_bound(trace: Trace, first: Ends, last: Ends, output: fx.Node) -> Tensor:
    r"""Return :math:`R(x) \ge \sup_t \|f_t(x) - \bar f_t(x)\|_2` on a segment, float64, shape ``(examples,)``.

    Args:
        trace: the network.
        first: values at the start of the segment.
        last: values at its end.
        output: the node of the output.

    Raises:
        ModelError: an operator is out of scope.
    """
    bounds: dict[str, Any] = {}
    for node in trace.graph.nodes:
        if node.op == "placeholder":
            value = first.values.get(node.name)
            bounds[node.name] = value.new_zeros(value.shape[0]) if isinstance(value, Tensor) else None
        elif node.op == "call_function":
            bounds[node.name] = _Step(node, trace, first, last, bounds).bound()
        if node is output:
            break
    return bounds[output.name]


def _norm(values: Tensor) -> Tensor:
    return values.reshape(values.shape[0], -1).norm(dim=1)


class _Step:
    """One operator on a segment."""

    def __init__(
        self, node: fx.Node, trace: Trace, first: Ends, last: Ends, bounds: Mapping[str, Any]
    ) -> None:
        self.node, self.trace, self.first, self.last, self.bounds = node, trace, first, last, bounds
        self.name = operator_of(node)

    def bound(self) -> Any:
        if self.name == "getitem":
            return self.bounds[self.node.args[0].name]  # type: ignore[union-attr]
        if not any(self._varies(n) for n in self.node.all_input_nodes):
            return None
        if self.name in _BATCH_NORMS:
            return self._batch_norm()
        if weighted(self.node, self.trace):
            return self._layer()
        if self.name in ACTIVATIONS:
            return self._activation()
        for names, rule in self._rules():
            if self.name in names:
                return rule()
        raise _out_of_scope(self.node)

    def _rules(self) -> Sequence[tuple[set[str], Callable[[], Tensor]]]:
        return (
            (_MOVES | _PARTS, self._carried),
            ({"aten.add", "aten.sub"}, self._sum),
            ({"aten.mul", "aten.div"}, self._scaled),
            ({"aten.cat", "aten.stack"}, self._joined),
            ({"aten.mean", "aten.sum"}, self._reduced),
            ({"aten.max_pool2d", "aten.max_pool1d"}, self._max_pool),
            ({"aten.avg_pool1d", "aten.avg_pool2d"}, self._average_pool),
            ({"aten.adaptive_avg_pool1d", "aten.adaptive_avg_pool2d"}, self._adaptive_pool),
            ({"aten.constant_pad_nd", "aten.pad"}, self._padded),
        )

    def _varies(self, node: fx.Node) -> bool:
        """Whether a node depends on the data (parameters, constants and what is made from them do not)."""
        return self.bounds.get(node.name) is not None and node.name not in self.trace.tensors

    def _source(self) -> fx.Node:
        given = _argument(self.node, "input") if self.name != "aten.addmm" else self.node.args[1]
        found = given if isinstance(given, fx.Node) else _argument(self.node, "self")
        if not isinstance(found, fx.Node) or not self._varies(found):
            raise _out_of_scope(self.node, "it does not act on an activation")
        return found

    def _ends(self, node: fx.Node) -> tuple[Tensor, Tensor]:
        return self.first.values[node.name], self.last.values[node.name]

    def _layer(self) -> Tensor:
        source, weight_first = _weights(self.node, self.trace, self.first.state)
        weight_last = _weights(self.node, self.trace, self.last.state)[1]
        others = [n for n in self.node.all_input_nodes if n is not source and self._varies(n)]
        if others or not self._varies(source):
            raise _out_of_scope(self.node, "its weights depend on the data")
        first, last = self._ends(source)
        norm = max(self.first.norms[self.node.name], self.last.norms[self.node.name])
        carried = norm * self.bounds[source.name]
        if torch.equal(first, last):  # the first layer: no bilinear term
            return carried
        return carried + 0.25 * _norm(self._apply(weight_last - weight_first, last - first))

    def _apply(self, weight: Tensor, x: Tensor) -> Tensor:
        """Apply the layer with another weight and no bias."""
        if self.name == "aten.linear":
            return functional.linear(x, weight)
        if self.name == "aten.addmm":
            return x @ weight
        given = bound_arguments(self.node)
        source = _weights(self.node, self.trace, self.first.state)[0]
        arguments = [
            x if a is source else (weight if k == "weight" else (None if k == "bias" else a))
            for k, a in given.items()
        ]
        return self.node.target(*arguments)  # type: ignore[operator]

    def _batch_norm(self) -> Tensor:
        source, scale_first = batch_norm_scale(self.node, self.trace, self.first.state)
        scale_last = batch_norm_scale(self.node, self.trace, self.last.state)[1]
        first, last = self._ends(source)
        shape = [1, -1] + [1] * (first.ndim - 2)
        change = (scale_last - scale_first).reshape(shape) * (last - first)
        norm = max(self.first.norms[self.node.name], self.last.norms[self.node.name])
        return norm * self.bounds[source.name] + 0.25 * _norm(change)

    def _activation(self) -> Tensor:
        given = bound_arguments(self.node)
        if float(given.get("alpha", 1.0) or 1.0) != 1.0 and self.name == "aten.elu":
            raise _out_of_scope(self.node, "only alpha = 1 has known slopes")
        if self.name == "aten.softplus" and float(given.get("beta", 1.0)) != 1.0:
            raise _out_of_scope(self.node, "only beta = 1 has known slopes")
        source = self._source()
        first, last = self._ends(source)
        known = ACTIVATIONS[self.name]
        return known.lipschitz(given) * self.bounds[source.name] + _norm(known.gap(first, last, given))

    def _carried(self) -> Tensor:
        source = self._source()
        value: Any = self.first.values[self.node.name]
        same = isinstance(value, Tensor) and value.shape[0] == self.first.values[source.name].shape[0]
        if not same or not self._keeps_first_axis(value.ndim):
            raise _out_of_scope(self.node, "it mixes examples")
        return self.bounds[source.name]

    def _keeps_first_axis(self, rank: int) -> bool:
        if self.name == "aten.permute":
            return int(_argument(self.node, "dims")[0]) % rank == 0
        if self.name == "aten.transpose":
            return 0 not in {int(_argument(self.node, k)) % rank for k in ("dim0", "dim1")}
        return self.name not in ("aten.t", "aten.movedim")

    def _sum(self) -> Tensor:
        """Add activations; parameters and constants added without data are chords themselves."""
        factor = abs(float(self.node.kwargs.get("alpha", 1) or 1))  # type: ignore[arg-type]
        terms = [a for a in self.node.args[:2] if isinstance(a, fx.Node) and self._varies(a)]
        fixed = [a for a in self.node.args[:2] if isinstance(a, fx.Node) and a not in terms]
        if not all(self._is_affine_in_weights(a) for a in fixed):
            raise _out_of_scope(self.node, "what is added is a nonlinear function of the weights")
        weights = [1.0 if a is self.node.args[0] else factor for a in terms]
        if any(self._enlarged(a) for a in terms):
            raise _out_of_scope(self.node, "an activation is broadcast")
        return torch.stack([w * self.bounds[a.name] for w, a in zip(weights, terms, strict=True)]).sum(0)

    def _is_affine_in_weights(self, node: fx.Node) -> bool:
        """Whether a node without data is a parameter or constant, or such a one moved."""
        while node.op == "call_function" and operator_of(node) in _MOVES | _PARTS | {"aten.expand"}:
            source = node.args[0]
            if not isinstance(source, fx.Node):
                return False
            node = source
        return node.op in ("placeholder", "get_attr")

    def _enlarged(self, node: fx.Node) -> bool:
        return node.meta["val"].numel() != self.node.meta["val"].numel()

    def _scaled(self) -> Tensor:
        number = next((a for a in self.node.args[:2] if isinstance(a, (int, float))), None)
        if number is None or not isinstance(self.node.args[0], fx.Node):
            raise _out_of_scope(self.node, "a product of activations")
        factor = abs(float(number)) if self.name == "aten.mul" else 1 / abs(float(number))
        return factor * self.bounds[self.node.args[0].name]

    def _joined(self) -> Tensor:
        parts = self.node.args[0]
        assert isinstance(parts, (list, tuple))
        if int(_argument(self.node, "dim")) == 0:
            raise _out_of_scope(self.node, "it joins examples")
        squares = [self.bounds[p.name].square() for p in parts if isinstance(p, fx.Node) and self._varies(p)]
        return torch.stack(squares).sum(0).sqrt()

    def _reduced(self) -> Tensor:
        source = self._source()
        first = self.first.values[source.name]
        value = self.first.values[self.node.name]
        dims = _argument(self.node, "dim")
        if dims is None or 0 in {d % first.ndim for d in ([dims] if isinstance(dims, int) else dims)}:
            raise _out_of_scope(self.node, "it mixes examples")
        count = first.numel() / max(value.numel(), 1)
        factor = 1 / math.sqrt(count) if self.name == "aten.mean" else math.sqrt(count)
        return factor * self.bounds[source.name]

    def _max_pool(self) -> Tensor:
        r"""Bound the gap of a maximum exactly from the winners at both ends.

        [O] With :math:`i, j` the winners at the two ends, :math:`p = a_i - a_j \ge 0` and
        :math:`q = b_j - b_i \ge 0`, the maximum lies between the larger of the two lines and the chord, so
        :math:`|J| \le \min(tq, (1-t)p) \le pq/(p+q)`.
        """
        source = self._source()
        first, last = self._ends(source)
        rank = 1 if self.name.endswith("1d") else 2
        kernel = _spread(_argument(self.node, "kernel_size"), rank)
        stride = _spread(_argument(self.node, "stride") or kernel, rank)
        padding, dilation = (_spread(_argument(self.node, k), rank) for k in ("padding", "dilation"))
        pool: Any = functional.max_pool1d if rank == 1 else functional.max_pool2d
        options = {"ceil_mode": bool(_argument(self.node, "ceil_mode")), "return_indices": True}
        best_first, index_first = pool(first, kernel, stride, padding, dilation, **options)
        best_last, index_last = pool(last, kernel, stride, padding, dilation, **options)

        def at(values: Tensor, index: Tensor) -> Tensor:
            return values.flatten(-rank).gather(-1, index.flatten(-rank)).reshape(index.shape)

        p, q = best_first - at(first, index_last), best_last - at(last, index_first)
        gap = kink_gap(p, -q)
        steps = zip(kernel, stride, dilation, strict=True)
        reuse = math.prod(k if d > 1 else math.ceil(k / s) for k, s, d in steps)  # windows that see one input
        return math.sqrt(reuse) * self.bounds[source.name] + _norm(gap)

    def _average_pool(self) -> Tensor:
        rank = 1 if self.name.endswith("1d") else 2
        kernel = _spread(_argument(self.node, "kernel_size"), rank)
        stride = _spread(_argument(self.node, "stride") or kernel, rank)
        if _argument(self.node, "divisor_override") is not None or any(
            _spread(_argument(self.node, "padding"), rank)
        ):
            raise _out_of_scope(self.node, "padding or a divisor of its own")
        if bool(_argument(self.node, "ceil_mode")):
            raise _out_of_scope(self.node, "ceil_mode")
        return pooling_norm(kernel, stride) * self.bounds[self._source().name]

    def _adaptive_pool(self) -> Tensor:
        source = self._source()
        rank = 1 if self.name.endswith("1d") else 2
        before = self.first.values[source.name].shape[-rank:]
        after = self.first.values[self.node.name].shape[-rank:]
        if any(b % a for b, a in zip(before, after, strict=True)):
            raise _out_of_scope(self.node, "windows of unequal length")
        return self.bounds[source.name] / math.sqrt(math.prod(before) / math.prod(after))

    def _padded(self) -> Tensor:
        if self.name == "aten.pad" and _argument(self.node, "mode") != "constant":
            raise _out_of_scope(self.node, "only constant padding")
        return self._carried()
