r"""A certificate from weights alone: what covariance-weighted matching minimises, layer by layer."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from isthmus.batches import Batch, Batches, device_of, iterate, reusable
from isthmus.certificates._examples import mixes_examples
from isthmus.certificates._norms import ROUNDOFF, matrix_norm, row_norms
from isthmus.errors import ModelError
from isthmus.evaluation import require_evaluation
from isthmus.layers import Site, find_sites
from isthmus.replica import in_double
from isthmus.states import check_finite, check_same_architecture, state_of
from isthmus.symmetry import Trace, bound_arguments, module_of, operator_of, trace

__all__ = ["WeightsOnlyBound", "certify_weights_only"]

_ROUNDING = 1e-9
"""Allowance for the arithmetic of the bound itself, relative and absolute."""

_ELEMENTARY = 64.0
"""Roundings allowed for the value of an activation, in units of its argument and itself."""

_EXTRA_TERMS = 16
"""Roundings of a layer besides the products it sums: of weights on the line, and of differences of weights."""

_RESHAPES = {"aten.view", "aten.reshape", "aten.flatten", "aten._to_copy", "aten.to", "aten.dropout"}
_RESHAPES |= {"aten.clone", "aten.contiguous", "aten.detach", "aten.alias"}

_UNIT_SLOPES = {"aten.relu", "aten.tanh", "aten.sigmoid", "aten.softplus", "aten.elu", "aten.hardtanh"}
_UNIT_SLOPES |= {"aten.relu6", "aten.hardsigmoid", "aten.clamp", "aten.leaky_relu"}
"""Activations with slopes in [0, 1] (with their usual settings, which are checked)."""


@dataclass(frozen=True)
class WeightsOnlyBound:
    r"""A proven bound from weights and the second moments of network A; one entry per layer, the head last.

    Attributes:
        lmc_error: bound on the root mean square over the data of :math:`\sup_t \lVert e(t, x) \rVert_2`, hence on
            :math:`\sup_t` of its mean.
        barrier: :math:`\sqrt2` times that: bound on the barrier of the cross-entropy, in nats.
        matching: :math:`Z_\ell = \lVert [\Delta W_\ell\, \Delta b_\ell] \rVert_{\Sigma_{\ell-1}}`, what
            covariance-weighted matching makes small.
        distances: :math:`D_\ell`, bounds on the root mean square of :math:`\lVert \Delta z_\ell \rVert`.
        errors: :math:`\rho_\ell`, bounds on the error of the layer's output on the line.
        examples: number of examples.
    """

    lmc_error: float
    barrier: float
    matching: tuple[float, ...]
    distances: tuple[float, ...]
    errors: tuple[float, ...]
    examples: int


def certify_weights_only(
    model_a: nn.Module, model_b: nn.Module | Mapping[str, Tensor], batches: Batches
) -> WeightsOnlyBound:
    r"""Bound the error of linear connectivity of two multi-layer perceptrons without ever running B.

    .. math:: Z_\ell = \lVert [\Delta W_\ell\, \Delta b_\ell] \rVert_{\Sigma_{\ell-1}}, \quad
        D_\ell = Z_\ell + \lVert W_{\ell,B} \rVert D_{\ell-1}, \quad
        \rho_\ell = \nu_\ell \rho_{\ell-1} + \tfrac14 \lVert \Delta W_\ell \rVert D_{\ell-1} + \tfrac14 D_\ell

    without the last term at the output. **[O]**; it is the theorem behind covariance-weighted matching (section 6
    and Theorem D.2 of the paper **[P]**): :math:`Z_\ell` is exactly what that minimises, one layer at a time. No
    assumption on the weights; activations with slopes in [0, 1]. It is coarser than
    :func:`~isthmus.theory.certify` with one segment: use it to understand, not to decide.

    Args:
        model_a: network A, in evaluation mode: linear layers, activations and reshaping only; not mutated.
        model_b: network B or its state, **already relabelled**.
        batches: the data that define :math:`\Sigma_\ell`, the second moments of A's layer inputs.

    Returns:
        The bound, float64, rounding included: what float64 may have done to the values of A that are measured and to
        the outputs of any network on the line is bounded and added, and ``1e-9 (1 + value)`` for the arithmetic of the
        bound itself.

    Raises:
        ModelError: another operator (the message names it), training mode, or not traceable.
        DataError: no data.
        CheckpointError: different architectures, NaN or infinite weights.

    Notes:
        One pass of A over the data, two spectral norms per layer. Measured 4.7 and 7.2 times the largest error on
        a grid for one hidden layer of 128 and 512 units, 211 times for five of 64 (Theory, section 10).

    Source:
        Theory, sections 3.4 and 10.
    """
    require_evaluation(model_a, "Network A")
    a, b = state_of(model_a, "A"), state_of(model_b, "B")
    check_same_architecture(a, b)
    check_finite(a, "A")
    check_finite(b, "B")
    model = in_double(model_a)
    a, b = ({k: v.double() if v.is_floating_point() else v for k, v in s.items()} for s in (a, b))
    squares: list[tuple[float, float]] = []
    layers: list[_LinearLayer] = []
    traces: dict[tuple[int, ...], Trace] = {}
    examples = 0
    for batch in iterate(reusable(batches)):
        batch = batch.to(device_of(model), torch.float64)
        if len(batch.args) != 1 or batch.kwargs or not isinstance(batch.args[0], Tensor):
            raise ModelError(
                "certify_weights_only: expected one input tensor; wrap the model so that it takes one."
            )
        shape = tuple(batch.args[0].shape)
        if shape not in traces:
            traces[shape] = trace(model, batch.args).require_of_state()
        layers = _layers(traces[shape])
        found = _matching(traces[shape], layers, a, b, batch)
        known = squares or [(0.0, 0.0)] * len(found)
        squares = [(s[0] + f[0], s[1] + f[1]) for s, f in zip(known, found, strict=True)]
        examples += batch.size
    measured = [
        _RootMeanSquares(math.sqrt(change / examples), math.sqrt(size / examples)) for change, size in squares
    ]
    return _bound(measured, layers, a, b, examples)


@dataclass(frozen=True)
class _RootMeanSquares:
    """Root mean squares over the data at one layer of A: of the change of its output, and of its input."""

    change: float
    size: float


_LinearLayer = tuple[fx.Node, Site]
"""A linear layer, and its node."""


def _layers(traced: Trace) -> list[_LinearLayer]:
    """Read a multi-layer perceptron off its graph; every operator must continue one chain."""
    if len(traced.inputs) != 1 or len(traced.outputs) != 1:
        raise ModelError("certify_weights_only: expected a network with one input and one output tensor.")
    chain: list[fx.Node] = []
    node = next(iter(traced.outputs.values()))
    while node.name != traced.inputs[0]:
        source = next(iter(node.all_input_nodes), None) if node.op == "call_function" else None
        if source is None or source.name in traced.tensors:
            raise _refused(node)
        chain.append(node)
        node = source
    sites = {site.name: site for site in find_sites(traced)}
    layers: list[_LinearLayer] = []
    previous = ""
    for node in reversed(chain):
        name, site = operator_of(node), sites.get(node.name)
        if name == "aten.linear" and site is not None and _plain(node, site):
            layers.append((node, site))
        elif name in _UNIT_SLOPES and previous == "aten.linear" and _usual(node):
            pass
        elif name in _RESHAPES and _keeps_examples(node):
            continue
        else:
            raise _refused(node)
        previous = name
    if not layers or previous != "aten.linear":
        raise ModelError("certify_weights_only: expected the network to end in a linear layer.")
    return layers


def _plain(node: fx.Node, site: Site) -> bool:
    """Whether a linear layer multiplies by its weight as stored, adds a bias of the state, and keeps examples apart."""
    whole = site.bias is not None or bound_arguments(node)["bias"] is None
    return whole and site.out_axis == 0 and not mixes_examples(node, node.all_input_nodes[0])


def _usual(node: fx.Node) -> bool:
    """Return whether the settings of an activation are numbers that keep its slopes in [0, 1]."""
    given = bound_arguments(node)
    if len(node.all_input_nodes) != 1:
        return False
    if operator_of(node) == "aten.elu":
        return all(float(given.get(k, 1.0)) == 1.0 for k in ("alpha", "scale", "input_scale"))
    if operator_of(node) == "aten.leaky_relu":
        return 0 <= float(given["negative_slope"]) <= 1
    # softplus jumps at its threshold: by 2e-9 at the usual one, visibly below
    usual = float(given.get("beta", 1.0)) == 1.0 and float(given.get("threshold", 20.0)) >= 20.0
    return operator_of(node) != "aten.softplus" or usual


def _keeps_examples(node: fx.Node) -> bool:
    source = node.args[0]
    assert isinstance(source, fx.Node)
    value, before = node.meta["val"], source.meta["val"]
    return value.shape[0] == before.shape[0] and value.dtype == before.dtype


def _refused(node: fx.Node) -> ModelError:
    where = module_of(node)
    return ModelError(
        f"certify_weights_only: operator {operator_of(node) if node.op == 'call_function' else node.op}"
        f"{' in ' + repr(where) if where else ''} is out of scope. The weights-only bound is for multi-layer "
        "perceptrons with slopes in [0, 1] (one activation after each hidden layer); use certify for other networks."
    )


def _matching(
    traced: Trace, layers: list[_LinearLayer], a: Mapping[str, Tensor], b: Mapping[str, Tensor], batch: Batch
) -> list[tuple[float, float]]:
    """Return, for every layer, the sums over the batch of the squared change of A's output and of A's input."""
    values: dict[str, Any] = {traced.inputs[0]: batch.args[0]}

    def keep(node: fx.Node, _: Any, result: Any) -> None:
        values[node.name] = result

    traced.run(a, batch.args, on_node=keep)
    sums = []
    for _, layer in layers:
        source = values[layer.source]
        change = source @ (a[layer.weight] - b[layer.weight]).T
        if layer.bias is not None:
            change = change + (a[layer.bias] - b[layer.bias])
        sums.append(tuple(float(row_norms(x).square().sum()) for x in (change, source)))
    return sums


def _bound(
    measured: list[_RootMeanSquares],
    layers: list[_LinearLayer],
    a: Mapping[str, Tensor],
    b: Mapping[str, Tensor],
    examples: int,
) -> WeightsOnlyBound:
    distance = error = rounding = size = 0.0
    distances, errors = [], []
    for found, (node, layer) in zip(measured, layers, strict=True):
        norm_a, norm_b = matrix_norm(a[layer.weight]), matrix_norm(b[layer.weight])
        change = matrix_norm(a[layer.weight] - b[layer.weight])
        steepest = max(norm_a, norm_b)
        # the input of this layer, as computed for any network of the line, by way of A's
        size = found.size + distance + error + 2 * rounding
        weights, shift = _sizes(node, layer, (a, b))
        own = (a[layer.weight].shape[1] + _EXTRA_TERMS) * ROUNDOFF * (weights * size + shift)
        error = steepest * error + change * distance / 4
        # the change was measured on computed values, by a product with the difference of two weights
        distance = found.change + change * rounding + 2 * own + norm_b * distance
        rounding = steepest * rounding + own
        if node is not layers[-1][0]:
            error += distance / 4
            # slopes of at most 1: a value is no further from that at zero, at most 1, than its argument from zero
            units = math.sqrt(node.meta["val"][0].numel())
            rounding += _ELEMENTARY * ROUNDOFF * (2 * (steepest * size + shift + rounding) + units)
        distances.append(distance)
        errors.append(error)
    # what is computed differs from the exact outputs: on the line, and at both ends
    total = error + 2 * rounding
    total = total + _ROUNDING * (1 + total)
    return WeightsOnlyBound(
        total,
        math.sqrt(2) * total,
        tuple(m.change for m in measured),
        tuple(distances),
        tuple(errors),
        examples,
    )


def _sizes(node: fx.Node, layer: Site, states: tuple[Mapping[str, Tensor], ...]) -> tuple[float, float]:
    """Bound the norms of weights between two states: of the matrix (Frobenius), and of the biases at all positions."""

    def between(name: str) -> float:
        return math.hypot(*(float(row_norms(s[name].reshape(1, -1))) for s in states))

    positions = node.meta["val"][0].numel() / states[0][layer.weight].shape[0]
    shift = 0.0 if layer.bias is None else math.sqrt(positions) * between(layer.bias)
    return between(layer.weight), shift
