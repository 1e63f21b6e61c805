r"""Propagating the error of linear connectivity through a network, operator by operator.

On a segment between two networks, with :math:`x_t` the value of a node at the network :math:`\theta_t` and
:math:`\bar x_t` the chord of its **computed** values at the ends, every node carries a bound
:math:`r(x) \ge \sup_t \|x_t - \bar x_t\|_2` per example. [O] Theory, sections 3.1 to 3.5:

* a layer with weights: :math:`r' = \nu r + \tfrac14 \|\Delta W\, \Delta x\|`, with :math:`\nu` the larger spectral norm
  of the two ends;
* an activation: :math:`r' = \lambda r + \|\sup_t J\|`;
* a fixed linear operator: :math:`r' = \|L\| r`; a sum: :math:`r' = r_1 + r_2`; a concatenation: root of squares.

Beyond these: every step adds what rounding may have done to the computed values of the node (the standard model
of floating point, a few units in the last place for activations), so that the bound speaks of the exact network. The
same recursion without the other terms bounds how far computed values are from exact ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional

from isthmus.certificates._activations import ACTIVATIONS, kink_gap
from isthmus.certificates._examples import ELEMENTWISE, PARTS, PIECES, RESHAPES, TURNS, mixes_examples
from isthmus.certificates._layers import (
    Magnitude,
    argument,
    batch_norm_scale,
    is_layer,
    layer_weight,
    out_of_scope,
)
from isthmus.certificates._norms import ROUNDOFF, pooling_norm, row_norms
from isthmus.layers import BATCH_NORMS, per_axis
from isthmus.symmetry import Trace, bound_arguments, operator_of

__all__ = ["Ends", "Norms", "segment_bound"]

_MOVES = ELEMENTWISE | RESHAPES | TURNS
_ENLARGING = ("upsample_nearest", "_upsample_nearest_exact")
_TINY = torch.finfo(torch.float64).tiny
"""Far above what one operation can lose to underflow, however many terms an entry has."""

_ELEMENTARY = 64.0
"""Roundings allowed for the value of an activation, a sum or a scaled value, in units of its arguments and itself."""

Norms = Mapping[str, float]
"""Spectral norm of every layer with weights, by node name."""


@dataclass(frozen=True, eq=False)
class Ends:
    """Everything known at one end of a segment: the state, and the value of every node on a batch."""

    state: Mapping[str, Tensor]
    values: Mapping[str, Any]
    norms: Norms
    magnitudes: Mapping[str, Magnitude]
    _sizes: dict[str, Tensor] = field(default_factory=dict[str, Tensor])

    def size(self, name: str) -> Tensor:
        """Return the norm of a node's value for every example."""
        if name not in self._sizes:
            self._sizes[name] = row_norms(self.values[name])
        return self._sizes[name]


def segment_bound(trace: Trace, first: Ends, last: Ends, output: fx.Node) -> Tensor:
    r"""Bound the error of every example on a segment; float64, shape ``(2, examples)``.

    Row 0 is :math:`R(x) \ge \sup_t \|f_t(x) - \bar f_t(x)\|_2` with :math:`f_t` exact and :math:`\bar f_t` the chord of
    the computed outputs; row 1 bounds how far the computed outputs at the ends are from exact ones.

    Args:
        trace: the network.
        first: values at the start of the segment.
        last: values at its end.
        output: the node of the output.

    Raises:
        ModelError: an operator is out of scope.
    """
    given = {name: first.values[name] for name in trace.inputs}
    data = {k: v for k, v in given.items() if isinstance(v, Tensor) and v.ndim > 0}
    examples = len(next(iter(data.values())))
    bounds: dict[str, Tensor | None] = {}
    for node in trace.graph.nodes:
        if node.op == "placeholder":
            value = data.get(node.name)  # an input of another length is a constant: it moves along no path
            if value is None or len(value) != examples:
                bounds[node.name] = None
            else:
                bounds[node.name] = value.new_zeros(2, examples, dtype=torch.float64)
        elif node.op == "call_function":
            bounds[node.name] = _SegmentStep(node, trace, first, last, bounds, examples).bound()
        if node is output:
            break
    found = bounds[output.name]
    if found is None:
        raise out_of_scope(output, "the output does not depend on the input")
    return found


class _SegmentStep:
    """One operator on a segment."""

    def __init__(
        self,
        node: fx.Node,
        trace: Trace,
        first: Ends,
        last: Ends,
        bounds: Mapping[str, Tensor | None],
        examples: int,
    ) -> None:
        self.node, self.trace, self.first, self.last, self.bounds = node, trace, first, last, bounds
        self.examples = examples
        self.name = operator_of(node)

    def bound(self) -> Tensor | None:
        if self.name == "getitem":
            return self._item()
        varying = [n for n in self.node.all_input_nodes if self._varies(n)]
        if not varying:
            return None
        if self.name == "aten._assert_tensor_metadata":
            return None
        rule = self._rule()
        for source in varying:
            if why := mixes_examples(self.node, source):
                raise out_of_scope(self.node, why)
        found = rule()
        self._check_values()
        return found

    def _item(self) -> Tensor | None:
        """Take the bound of a piece from that of all pieces; other lists have one entry that is known."""
        source, place = self.node.args[:2]
        assert isinstance(source, fx.Node)
        known = source.op == "call_function" and (operator_of(source) in PIECES or place == 0)
        if self._varies(source) and not known:
            raise out_of_scope(source, f"its result number {place} is used")
        return self.bounds.get(source.name)

    def _rule(self) -> Callable[[], Tensor]:
        if self.name in BATCH_NORMS:
            return self._batch_norm
        if is_layer(self.node):
            return self._layer
        if self.name in ACTIVATIONS:
            return self._activation
        for names, rule in self._rules():
            if self.name in names:
                return rule
        raise out_of_scope(self.node)

    def _rules(self) -> Sequence[tuple[set[str], Callable[[], Tensor]]]:
        spatial = ("1d", "2d", "3d")
        return (
            (_MOVES | PARTS | PIECES, self._carried),
            ({"aten.add", "aten.sub"}, self._sum),
            ({"aten.mul", "aten.div"}, self._scaled),
            ({"aten.cat", "aten.stack"}, self._joined),
            ({"aten.mean", "aten.sum"}, self._reduced),
            ({"aten.prelu"}, self._learned_slope),
            ({f"aten.max_pool{n}" for n in spatial}, self._max_pool),
            ({f"aten.avg_pool{n}" for n in spatial}, self._average_pool),
            ({f"aten.adaptive_avg_pool{n}" for n in spatial}, self._adaptive_pool),
            ({f"aten.{kind}{n}" for n in spatial for kind in _ENLARGING}, self._repeated),
            ({"aten.constant_pad_nd", "aten.pad"}, self._padded),
        )

    def _check_values(self) -> None:
        """Refuse a value that is not float64, not finite, or has lost the axis of the examples."""
        for ends in (self.first, self.last):
            value = ends.values[self.node.name]
            for part in value if isinstance(value, (list, tuple)) else [value]:
                if not isinstance(part, Tensor) or part.numel() == 0:
                    continue
                if part.dtype != torch.float64:
                    raise out_of_scope(
                        self.node, f"it makes {part.dtype}, and the bound is proven in float64"
                    )
                if part.ndim == 0 or part.shape[0] != self.examples:
                    raise out_of_scope(self.node, "it mixes examples")
                if not bool(torch.isfinite(part).all()):
                    raise out_of_scope(self.node, "some of its values are NaN or infinite")

    def _varies(self, node: fx.Node) -> bool:
        """Return whether a node depends on the data (parameters, constants and what is made from them do not)."""
        return self.bounds.get(node.name) is not None

    def _source(self) -> fx.Node:
        given = argument(self.node, "input")
        found = given if isinstance(given, fx.Node) else argument(self.node, "self")
        if not isinstance(found, fx.Node) or not self._varies(found):
            raise out_of_scope(self.node, "it does not act on an activation")
        return found

    def _ends(self, node: fx.Node) -> tuple[Tensor, Tensor]:
        return self.first.values[node.name], self.last.values[node.name]

    def _of(self, node: fx.Node) -> Tensor:
        found = self.bounds[node.name]
        assert found is not None
        return found

    def _size(self, node: fx.Node) -> Tensor:
        return torch.maximum(self.first.size(node.name), self.last.size(node.name))

    def _moved(self, carried: Tensor, gap: Tensor | None, rounding: Tensor) -> Tensor:
        """Add a step's own gap (to the bound) and rounding (to both rows), and what underflow may have taken."""
        value = self.first.values[self.node.name]
        value = value if isinstance(value, Tensor) else value[0]  # batch normalisation, with its statistics
        lost = _TINY * (value.numel() / max(self.examples, 1))
        found = carried + (rounding + lost)
        if gap is not None:
            found[0] += gap + lost
        return found

    def _elementary(self, factor: float, *sources: fx.Node, terms: float = 0.0) -> Tensor:
        """Return the rounding of an operator that multiplies norms by at most ``factor``."""
        before = torch.stack([self._size(source) for source in sources]).sum(0)
        return (_ELEMENTARY + terms) * ROUNDOFF * (factor * before + self._size(self.node))

    def _layer(self) -> Tensor:
        given, weight_first = layer_weight(self.node, self.trace, self.first.state)
        weight_last = layer_weight(self.node, self.trace, self.last.state)[1]
        source, bias = given.source, given.bias
        if not self._varies(source) or (isinstance(bias, fx.Node) and self._varies(bias)):
            raise out_of_scope(self.node, "its weights depend on the data")
        if bias is not None and (not isinstance(bias, fx.Node) or bias.name not in self.trace.tensors):
            raise out_of_scope(self.node, "its bias is not a parameter of the network")
        if given.scaled:
            raise out_of_scope(self.node, "only alpha = beta = 1")
        first, last = self._ends(source)
        norm = max(self.first.norms[self.node.name], self.last.norms[self.node.name])
        rounding = self._layer_rounding(source)
        if torch.equal(first, last):  # the first layer: no bilinear term
            return self._moved(norm * self._of(source), None, rounding)
        bilinear = 0.25 * row_norms(self._apply(weight_last - weight_first, last - first))
        # once more for the bilinear term, whose entries may cancel
        return self._moved(norm * self._of(source), bilinear, 2 * rounding)

    def _layer_rounding(self, source: fx.Node) -> Tensor:
        magnitude = self.first.magnitudes[self.node.name]
        return magnitude.weight * self._size(source) + magnitude.bias

    def _apply(self, weight: Tensor, x: Tensor) -> Tensor:
        """Apply the layer with another weight and no bias."""
        if self.name == "aten.linear":
            return functional.linear(x, weight)
        if self.name == "aten.addmm":
            return x @ weight
        given = bound_arguments(self.node)
        new = {"input": x, "weight": weight, "bias": None}
        return self.node.target(*(new.get(k, a) for k, a in given.items()))  # type: ignore[operator]

    def _batch_norm(self) -> Tensor:
        source = self._source()
        scale_first, scale_last = (
            batch_norm_scale(self.node, self.trace, ends.state) for ends in (self.first, self.last)
        )
        first, last = self._ends(source)
        shape = [1, -1] + [1] * (first.ndim - 2)
        change = (scale_last - scale_first).reshape(shape) * (last - first)
        norm = max(self.first.norms[self.node.name], self.last.norms[self.node.name])
        return self._moved(norm * self._of(source), 0.25 * row_norms(change), self._layer_rounding(source))

    def _activation(self) -> Tensor:
        given, known, source = bound_arguments(self.node), ACTIVATIONS[self.name], self._source()
        if len(self.node.all_input_nodes) > 1:
            raise out_of_scope(self.node, "its settings are tensors")
        if known.refused(given):
            raise out_of_scope(self.node, known.refused(given))
        first, last = self._ends(source)
        gap = row_norms(known.gap(first, last, *self._ends(self.node), given))
        steepest, jump = known.lipschitz(given), known.jump(given)
        if jump > 0:
            gap = gap + jump * math.sqrt(first[0].numel())
        rounding = self._elementary(max(steepest, 1.0), source)
        return self._moved(steepest * self._of(source), gap, rounding)

    def _learned_slope(self) -> Tensor:
        r"""Bound :math:`\mathrm{relu}(z) - w\,\mathrm{relu}(-z)` with a parameter ``w`` per channel.

        [O] Both parts have the gap of ReLU, of one sign and the same size :math:`J`: together at most
        :math:`|1-w_t| J`. The product with ``w`` is bilinear as in a layer.
        """
        source, slope = self._source(), argument(self.node, "weight")
        if not isinstance(slope, fx.Node) or slope.name not in self.trace.tensors:
            raise out_of_scope(self.node, "its slopes are not a parameter of the network")
        first, last = self._ends(source)
        shape = [1, -1] + [1] * (first.ndim - 2) if first.ndim > 1 else [-1]
        name = self.trace.tensors[slope.name]
        one, other = (ends.state[name].reshape(shape) for ends in (self.first, self.last))
        steepest = max(1.0, float(one.abs().max()), float(other.abs().max()))
        change = (other - one) * ((-last).clamp_min(0) - (-first).clamp_min(0))
        gap = torch.maximum((1 - one).abs(), (1 - other).abs()) * kink_gap(first, last) + 0.25 * change.abs()
        return self._moved(steepest * self._of(source), row_norms(gap), self._elementary(steepest, source))

    def _carried(self) -> Tensor:
        return self._of(self._source())

    def _sum(self) -> Tensor:
        """Add activations; parameters and constants added without data are chords themselves."""
        bound = bound_arguments(self.node)
        factors = (("self", 1.0), ("other", abs(float(bound["alpha"]))))
        given = [(bound[k], f) for k, f in factors if isinstance(bound[k], fx.Node)]
        terms = [(a, f) for a, f in given if self._varies(a)]
        if not all(self._is_affine_in_weights(a) for a, _ in given if not self._varies(a)):
            raise out_of_scope(self.node, "what is added is a nonlinear function of the weights")
        if any(self._enlarged(a) for a, _ in terms):
            raise out_of_scope(self.node, "an activation is broadcast")
        carried = torch.stack([f * self._of(a) for a, f in terms]).sum(0)
        return self._moved(carried, None, self._elementary(max(f for _, f in terms), *(a for a, _ in terms)))

    def _is_affine_in_weights(self, node: fx.Node) -> bool:
        """Return whether a node without data is a constant, a parameter, or a parameter moved."""
        while node.op == "call_function" and operator_of(node) in _MOVES | PARTS | {"aten.expand"}:
            source = node.args[0]
            if not isinstance(source, fx.Node) or node.meta["val"].dtype != source.meta["val"].dtype:
                return False
            node = source
        return node.op in ("placeholder", "get_attr") or self._is_constant(node)

    def _is_constant(self, node: fx.Node) -> bool:
        """Return whether no tensor of the state is behind a node without data."""
        if node.op == "placeholder":
            return node.name not in self.trace.tensors
        return all(self._is_constant(n) for n in node.all_input_nodes)

    def _enlarged(self, node: fx.Node) -> bool:
        return node.meta["val"].shape != self.node.meta["val"].shape

    def _scaled(self) -> Tensor:
        bound = bound_arguments(self.node)
        source, number = bound["self"], bound["other"]
        if not isinstance(number, (int, float)) or not isinstance(source, fx.Node):
            raise out_of_scope(self.node, "a product of activations")
        if bound.get("rounding_mode") is not None:
            raise out_of_scope(self.node, "it rounds")
        if self.name == "aten.div" and number == 0:
            raise out_of_scope(self.node, "it divides by zero")
        factor = abs(float(number)) if self.name == "aten.mul" else 1 / abs(float(number))
        return self._moved(factor * self._of(source), None, self._elementary(factor, source))

    def _joined(self) -> Tensor:
        parts = self.node.args[0]
        assert isinstance(parts, (list, tuple))
        nodes = [p for p in parts if isinstance(p, fx.Node)]
        if not all(self._varies(p) or self._is_affine_in_weights(p) for p in nodes):
            raise out_of_scope(self.node, "what is joined is a nonlinear function of the weights")
        return torch.stack([self._of(p).square() for p in nodes if self._varies(p)]).sum(0).sqrt()

    def _reduced(self) -> Tensor:
        source = self._source()
        before, after = self.first.values[source.name], self.first.values[self.node.name]
        count = before.numel() / max(after.numel(), 1)
        factor = 1 / math.sqrt(count) if self.name == "aten.mean" else math.sqrt(count)
        return self._moved(factor * self._of(source), None, self._elementary(factor, source, terms=count))

    def _max_pool(self) -> Tensor:
        r"""Bound the gap of a maximum exactly from the winners at both ends.

        [O] With :math:`i, j` the winners at the two ends, :math:`p = a_i - a_j \ge 0` and
        :math:`q = b_j - b_i \ge 0`, the maximum lies between the larger of the two lines and the chord, so
        :math:`|J| \le \min(tq, (1-t)p) \le pq/(p+q)`.
        """
        source = self._source()
        first, last = self._ends(source)
        rank = int(self.name[-2])
        kernel = per_axis(argument(self.node, "kernel_size"), rank)
        stride = per_axis(argument(self.node, "stride") or kernel, rank)
        padding, dilation = (per_axis(argument(self.node, k), rank) for k in ("padding", "dilation"))
        pool: Any = getattr(functional, f"max_pool{rank}d")
        options = {"ceil_mode": bool(argument(self.node, "ceil_mode")), "return_indices": True}
        best_first, index_first = pool(first, kernel, stride, padding, dilation, **options)
        best_last, index_last = pool(last, kernel, stride, padding, dilation, **options)

        def at(values: Tensor, index: Tensor) -> Tensor:
            return values.flatten(-rank).gather(-1, index.flatten(-rank)).reshape(index.shape)

        p, q = best_first - at(first, index_last), best_last - at(last, index_first)
        steps = zip(kernel, stride, dilation, strict=True)
        reuse = math.prod(k if d > 1 else math.ceil(k / s) for k, s, d in steps)  # windows that see one input
        # choosing is exact, and only the two differences above are rounded
        rounding = self._elementary(math.sqrt(reuse), source)
        return self._moved(math.sqrt(reuse) * self._of(source), row_norms(kink_gap(p, -q)), rounding)

    def _average_pool(self) -> Tensor:
        source, rank = self._source(), int(self.name[-2])
        kernel = per_axis(argument(self.node, "kernel_size"), rank)
        stride = per_axis(argument(self.node, "stride") or kernel, rank)
        if argument(self.node, "divisor_override") is not None:
            raise out_of_scope(self.node, "a divisor of its own")
        if any(per_axis(argument(self.node, "padding"), rank)) and not argument(
            self.node, "count_include_pad"
        ):
            raise out_of_scope(self.node, "padding that is not counted")
        if bool(argument(self.node, "ceil_mode")):
            raise out_of_scope(self.node, "ceil_mode")
        factor = pooling_norm(kernel, stride)
        rounding = self._elementary(1.0, source, terms=math.prod(kernel))
        return self._moved(factor * self._of(source), None, rounding)

    def _adaptive_pool(self) -> Tensor:
        source, rank = self._source(), int(self.name[-2])
        before = self.first.values[source.name].shape[-rank:]
        after = self.first.values[self.node.name].shape[-rank:]
        if any(b % a for b, a in zip(before, after, strict=True)):
            raise out_of_scope(self.node, "windows of unequal length")
        count = math.prod(before) / math.prod(after)
        return self._moved(
            self._of(source) / math.sqrt(count), None, self._elementary(1.0, source, terms=count)
        )

    def _repeated(self) -> Tensor:
        """Repeat entries: as often as the operator, run on the numbers of the positions, repeats the most frequent.

        Factors whose product with the length is not whole repeat some entries more often than the lengths tell.
        """
        source, rank = self._source(), int(self.name[-2])
        value = self.first.values[source.name]
        places = torch.arange(value[0, 0].numel(), dtype=value.dtype, device=value.device)
        image = torch.empty_like(value).copy_(places.reshape(value.shape[-rank:]).expand_as(value))
        given = bound_arguments(self.node)
        key = "self" if "self" in given else "input"
        found = self.node.target(*(image if k == key else a for k, a in given.items()))  # type: ignore[operator]
        if not torch.equal(found, found[:1, :1].expand_as(found)):
            raise out_of_scope(self.node, "it enlarges channels differently")
        times = int(torch.bincount(found[0, 0].flatten().long()).max())
        return math.sqrt(times) * self._of(source)

    def _padded(self) -> Tensor:
        if self.name == "aten.pad" and argument(self.node, "mode") != "constant":
            raise out_of_scope(self.node, "only constant padding")
        return self._carried()
