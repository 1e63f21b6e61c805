r"""Dropout stability of one hidden layer: how much the output moves when half of the neurons go."""

from __future__ import annotations

import math
from typing import Any, Literal

import numpy as np

from isthmus.errors import DataError, ShapeError
from isthmus.theory._inputs import FloatArray, read_array, read_integer, read_number
from isthmus.transport import assign, ground_cost

__all__ = ["DropoutKind", "bernoulli_dropout_error", "dropout_error", "kept_subcloud_masks"]

DropoutKind = Literal["half", "matched"]


def bernoulli_dropout_error(activations: Any, output_weight: Any, probability: float = 0.5) -> float:
    r"""Return the root-mean-square change of the output under Bernoulli dropout, exactly.

    .. math:: \mathrm{rms}^2 = \frac p{1-p}\, \mathbb E_x \sum_i \phi_i(x)^2 \lVert a_i \rVert^2

    over masks and data, of the Euclidean norm over outputs. **[P, appendix B.14; L Kuditipudi et al. 2019,
    Shevchenko and Mondelli 2020]** for the notion, the formula is elementary. Every neuron is dropped with
    probability ``p`` on its own and the others are divided by ``1 - p``. No sampling.

    Args:
        activations: :math:`\phi`, shape ``(samples, units)``, array or tensor.
        output_weight: weights after the layer, :math:`a_i` in column ``i``, shape ``(outputs, units)``.
        probability: of dropping a neuron, in ``[0, 1)``.

    Returns:
        In units of the output, a norm over outputs (not divided by their number).

    Raises:
        ShapeError: the numbers of units differ.
        DataError: a probability outside its range, NaN or infinite entries.

    Source:
        Theory, section 7.
    """
    phi, weight = _read_layer(activations, output_weight)
    p = read_number(probability, "bernoulli_dropout_error: probability", least=0)
    if p >= 1:
        raise DataError(f"bernoulli_dropout_error: expected a probability below 1, found {probability}.")
    return math.sqrt(p / (1 - p) * float(((phi**2).mean(0) * (weight**2).sum(0)).sum()))


def dropout_error(
    activations: Any,
    output_weight: Any,
    kind: DropoutKind,
    *,
    rng: np.random.Generator,
    masks: int = 200,
    input_weight: Any = None,
    second_moment: Any = None,
) -> float:
    r"""Estimate the root-mean-square change of the output when half of the neurons are kept and doubled.

    **[P, appendix B.14; L Kuditipudi et al. 2019, Shevchenko and Mondelli 2020]**; the pairing is **[O]**.
    Link to transport **[O]**, deterministic, for a network that is the mean of its neurons: keeping a
    subcloud ``S`` moves the output by at most :math:`\mathrm{Lip}(x)\, W_1(\hat\mu, \hat\mu_S)`.

    Args:
        activations: :math:`\phi`, shape ``(samples, units)``, array or tensor.
        output_weight: :math:`a_i` in column ``i``, shape ``(outputs, units)``.
        kind: ``"half"``: a random half is kept. ``"matched"``: neurons of a random half are paired with those
            of the other by assignment, and one of each pair is kept, drawn anew for every mask.
        rng: draws masks and halves.
        masks: number of masks averaged.
        input_weight: for ``"matched"``, incoming weights, shape ``(units, features)``, bias appended if any.
        second_moment: metric of the incoming weights, shape ``(features, features)``; identity by default.
            The cost of a pair is :math:`\overline{\lVert a \rVert^2} \lVert \Delta w \rVert_\Sigma^2 +
            \overline{\phi^2} \lVert \Delta a \rVert^2`: with the first factor (Theory, section 9), the
            pairing does not depend on how scale is shared between the two layers.

    Returns:
        Root of the mean over masks and data of the squared Euclidean norm over outputs, in its units. With an
        odd number of units, ``(units + 1) / 2`` are kept and scaled to be unbiased, or one stays unpaired.

    Raises:
        ShapeError: the numbers of units differ, or ``"matched"`` without incoming weights.
        DataError: an unknown kind, no masks, NaN or infinite entries.

    Source:
        Theory, section 7.
    """
    phi, weight = _read_layer(activations, output_weight)
    count = read_integer(masks, "dropout_error: masks")
    if kind == "half":
        keep = kept_subcloud_masks(phi.shape[1], count, rng)
    elif kind == "matched":
        keep = _matched_masks(phi, weight, input_weight, second_moment, count, rng)
    else:
        raise DataError(f"dropout_error: expected kind 'half' or 'matched', found {kind!r}.")
    squares = [float((((phi * (scale - 1)) @ weight.T) ** 2).sum(1).mean()) for scale in keep]
    return math.sqrt(sum(squares) / count)


def kept_subcloud_masks(units: int, masks: int, rng: np.random.Generator) -> FloatArray:
    """Return random masks that keep half of the units (the larger half) and scale them to be unbiased.

    Shape ``(masks, units)``; entries are 0 or ``units / kept``.
    """
    kept = (units + 1) // 2
    scale = np.zeros((masks, units))
    for row in scale:
        row[rng.permutation(units)[:kept]] = units / kept
    return scale


def _matched_masks(
    phi: FloatArray,
    weight: FloatArray,
    input_weight: Any,
    second_moment: Any,
    masks: int,
    rng: np.random.Generator,
) -> FloatArray:
    units = phi.shape[1]
    if input_weight is None:
        raise ShapeError("dropout_error: kind 'matched' pairs neurons by their weights; give input_weight.")
    incoming = read_array(input_weight, "dropout_error: input_weight")
    if len(incoming) != units:
        raise ShapeError(f"dropout_error: expected {units} rows of input_weight, found {len(incoming)}.")
    order = rng.permutation(units)
    one, other = order[: units // 2], order[units // 2 : 2 * (units // 2)]
    incoming = incoming * math.sqrt(float((weight**2).sum(0).mean()))
    outgoing = weight.T * math.sqrt(float((phi**2).mean()))
    cost = ground_cost(incoming[one], incoming[other], second_moment)
    cost += ground_cost(outgoing[one], outgoing[other])
    partner = other[assign(cost).columns.numpy()]
    scale = np.ones((masks, units))
    first = rng.integers(0, 2, (masks, len(one)))
    scale[:, one] = 2 * first
    scale[:, partner] = 2 * (1 - first)
    return scale


def _read_layer(activations: Any, output_weight: Any) -> tuple[FloatArray, FloatArray]:
    phi = read_array(activations, "dropout: activations")
    weight = read_array(output_weight, "dropout: output_weight")
    if phi.shape[1] != weight.shape[1]:
        raise ShapeError(
            f"Dropout: {phi.shape[1]} activations but {weight.shape[1]} columns of output weights. "
            "Both list the units of one hidden layer."
        )
    return phi, weight
