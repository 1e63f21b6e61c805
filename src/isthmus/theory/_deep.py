r"""Linear mode connectivity of deep Gaussian networks: the theorem, the paper's recursion, the experiment."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from isthmus.errors import ShapeError
from isthmus.theory._identities import equipartition
from isthmus.theory._inputs import FloatArray, read_array, read_integer, read_number

__all__ = ["GroupedError", "LmcBound", "gaussian_lmc_bound", "grouped_lmc_error", "property1_recursion"]


class LmcBound(NamedTuple):
    """Bounds on the root-mean-square error of linear mode connectivity (over outputs and data).

    Attributes:
        fixed_t: bound at any fixed ``t``, root of the expected squared error.
        sup_t: bound on the expected supremum over ``t``.
        layers: quantisation error of each hidden layer, ``eta_1 .. eta_L``.
    """

    fixed_t: float
    sup_t: float
    layers: tuple[float, ...]


def gaussian_lmc_bound(
    distances: Sequence[float],
    *,
    variances: Sequence[float] | None = None,
    bias_variance: float = 0.0,
    activation_gain: float = 1.0,
    input_second_moment: float = 1.0,
) -> LmcBound:
    r"""Bound the error of linear mode connectivity of two independent Gaussian networks after matching.

    .. math:: \eta_\ell = \sqrt{v_\ell}\, \eta_{\ell-1} + \sqrt{(v_\ell B_{\ell-1} + s_b^2)\, w_\ell}, \qquad
        \sup_t (\mathbb E \lVert e(t) \rVert_{rms}^2)^{1/2} \le 2 \sqrt{v_{L+1}}\, \eta_L

    and, for unit variances, :math:`\mathbb E \sup_t \lVert e(t) \rVert_{rms} \le 2 \eta_L + \sum \eta_\ell`.
    **[O]** for proof and constants, the shape is **[P, Lemma 5.1 and Theorem 5.2]**. Assumptions: A and B
    independent, weights i.i.d. :math:`N(0, v_\ell / m_{\ell-1})`, biases :math:`N(0, s_b^2)`, activation
    1-Lipschitz with :math:`\sigma(0) = 0`, real widths multiples of the effective ones. There are
    permutations, each depending on earlier layers only, for which the bound holds.

    Args:
        distances: for each hidden layer :math:`w_\ell = \omega(\tilde m_\ell, d) / d`, with ``d`` the
            effective width before (plus one with biases), at least 0: a proven upper bound, or a measured
            value.
        variances: :math:`v_1 .. v_{L+1}`, one per weight layer; 1 by default.
        bias_variance: :math:`s_b^2`, at least 0.
        activation_gain: :math:`c_\sigma` with :math:`\mathbb E \sigma(z)^2 \le c_\sigma \mathbb E z^2` for
            symmetric ``z``: 1/2 for ReLU, 1 always allowed.
        input_second_moment: :math:`\mathbb E \lVert x \rVert^2 / m_0`, at least 0.

    Raises:
        ShapeError: no layer, or another number of variances than layers plus one.
        DataError: an argument outside its range.

    Notes:
        Measured with simulated distances, ReLU, 5 inputs and gain 1, it is 6.2 to 7.1 times too large for one
        hidden layer of 64 to 1024 effective neurons, 17 times for (16, 64) and 38 times for (8, 64, 256); see
        :func:`grouped_lmc_error`.

    Source:
        Theory, section 4.1.
    """
    if len(distances) == 0:
        raise ShapeError("gaussian_lmc_bound: expected one distance per hidden layer, found none.")
    v = [1.0] * (len(distances) + 1) if variances is None else list(variances)
    if len(v) != len(distances) + 1:
        raise ShapeError(
            f"gaussian_lmc_bound: expected {len(distances) + 1} variances, found {len(v)}. "
            "Give one per weight layer, the output layer included."
        )
    v = [read_number(value, "gaussian_lmc_bound: variances", least=0) for value in v]
    bias = read_number(bias_variance, "gaussian_lmc_bound: bias_variance", least=0)
    gain = read_number(activation_gain, "gaussian_lmc_bound: activation_gain", least=0, most=1)
    moment = read_number(input_second_moment, "gaussian_lmc_bound: input_second_moment", least=0)
    eta, speed = 0.0, 0.0
    etas: list[float] = []
    for variance, w in zip(v, distances, strict=False):
        moment = variance * moment + bias
        distance = read_number(w, "gaussian_lmc_bound: distances", least=0)
        eta = math.sqrt(variance) * eta + math.sqrt(moment * distance)
        # Speed of the activations along the line from A to B, on top of the error itself.
        speed = math.sqrt(variance) * speed + 2 * eta
        moment *= gain
        etas.append(eta)
    last = math.sqrt(v[-1])
    return LmcBound(2 * last * eta, last * (2 * eta + speed / 2), tuple(etas))


def property1_recursion(
    start: float,
    c1: float,
    c2: float,
    effective_widths: float | Sequence[float],
    errors: float | Sequence[float],
) -> float:
    r"""Iterate the paper's recursion for squared errors.

    .. math:: E_{\ell+1} = 2 C_2 E_\ell + 2 C_1 \tilde m_\ell \bar E_\ell

    **[P, Lemma 4.1]** It is the squared form of the recursion of :func:`gaussian_lmc_bound`, by
    :math:`(a + b)^2 \le 2 a^2 + 2 b^2`.

    Args:
        start: error before the first step.
        c1: constant :math:`C_1`.
        c2: constant :math:`C_2`.
        effective_widths: :math:`\tilde m_\ell`, one number per step, or a single number for one step.
        errors: :math:`\bar E_\ell`, likewise.

    Returns:
        The error after the last step.

    Raises:
        ShapeError: different numbers of widths and errors.

    Example:
        >>> property1_recursion(0, 1, 1, 4, 0.1)
        0.8

    Source:
        Theory, section 3.4.
    """
    widths, steps = np.atleast_1d(np.asarray(effective_widths)), np.atleast_1d(np.asarray(errors))
    if widths.shape != steps.shape:
        raise ShapeError(
            f"property1_recursion: expected as many widths as errors, found {widths.size} and {steps.size}."
        )
    error = float(start)
    for width, step in zip(widths, steps, strict=True):
        error = 2 * c2 * error + 2 * c1 * float(width) * float(step)
    return error


class GroupedError(NamedTuple):
    """What the construction behind :func:`gaussian_lmc_bound` gives for one draw of two networks.

    Attributes:
        error: root-mean-square error (outputs and data) at each ``t``, shape ``(points,)``.
        sup: its largest value.
        costs: mean squared distance in each hidden layer's transport, averaged over A and B.
    """

    error: FloatArray
    sup: float
    costs: tuple[float, ...]


def _relu(z: FloatArray) -> FloatArray:
    return np.maximum(z, 0.0)


def grouped_lmc_error(
    inputs: Any,
    effective_widths: Sequence[int],
    rng: np.random.Generator,
    *,
    copies: int = 1,
    outputs: int = 32,
    points: int = 21,
    activation: Callable[[FloatArray], FloatArray] = _relu,
) -> GroupedError:
    r"""Draw two Gaussian networks, match them through quantised neurons, and measure the error on the line.

    The construction of the proof of :func:`gaussian_lmc_bound` **[O]**: in every layer the neurons of both
    networks, summed over the groups of the layer before, are transported in equal groups to common random
    rows.

    Args:
        inputs: data, shape ``(samples, features)``; scale it to a mean square of 1 for unit outputs.
        effective_widths: :math:`\tilde m_1 .. \tilde m_L`.
        rng: draws the networks and the common rows.
        copies: real width of every hidden layer in multiples of the effective one.
        outputs: number of outputs.
        points: points on the line, ends included.
        activation: applied to every hidden pre-activation.

    Raises:
        ShapeError: no hidden layer.
        DataError: a width below 1, or unusable inputs.

    Source:
        Theory, section 4.1.
    """
    x = read_array(inputs, "grouped_lmc_error: inputs")
    widths = [read_integer(w, "grouped_lmc_error: effective_widths") for w in effective_widths]
    group = read_integer(copies, "grouped_lmc_error: copies")
    if not widths:
        raise ShapeError("grouped_lmc_error: expected at least one hidden layer, found none.")
    quantised, weights_a, weights_b, costs = x, [], [], []
    # Columns of the next weight are in groups of `block` neurons that share a quantised neuron.
    block, features = 1, x.shape[1]
    for width in widths:
        rows = rng.standard_normal((width, quantised.shape[1])) / math.sqrt(quantised.shape[1])
        sigma = quantised.T @ quantised / len(x)
        layer_cost = 0.0
        for weights in (weights_a, weights_b):
            weight = rng.standard_normal((width * group, features)) / math.sqrt(features)
            summed = weight.reshape(len(weight), -1, block).sum(-1)
            value, labels = equipartition(summed, rows, sigma)
            weights.append(weight[np.argsort(labels, kind="stable")])
            layer_cost += value / 2
        costs.append(layer_cost)
        quantised = activation(quantised @ rows.T)
        block, features = group, width * group
    for weights in (weights_a, weights_b):
        weights.append(rng.standard_normal((outputs, features)) / math.sqrt(features))
    ends = [_forward(x, weights, activation) for weights in (weights_a, weights_b)]
    error = []
    for t in np.linspace(0.0, 1.0, points):
        line = [(1 - t) * a + t * b for a, b in zip(weights_a, weights_b, strict=True)]
        gap = _forward(x, line, activation) - (1 - t) * ends[0] - t * ends[1]
        error.append(math.sqrt(float((gap**2).mean())))
    return GroupedError(np.array(error), max(error), tuple(costs))


def _forward(
    x: FloatArray, weights: Sequence[FloatArray], activation: Callable[[FloatArray], FloatArray]
) -> FloatArray:
    for weight in weights[:-1]:
        x = activation(x @ weight.T)
    return x @ weights[-1].T
