r"""Permutations as optimal transport: equal groups and the one-layer identity.

The matching itself, :func:`isthmus.transport.w2_matching`, belongs to the transport package and is
re-exported by :mod:`isthmus.theory`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from isthmus.couplings import validate_permutation
from isthmus.errors import ShapeError
from isthmus.theory._inputs import read_array
from isthmus.transport import assign, ground_cost

__all__ = ["EquiPartition", "equipartition", "layer_output_error"]


class EquiPartition(NamedTuple):
    """An optimal transport of many atoms to few, every target receiving equally many.

    Attributes:
        value: mean over atoms of the squared distance to the atom's target, squared units of the clouds.
        labels: target of each atom, int64, shape ``(atoms,)``; each target occurs ``atoms / targets`` times.
    """

    value: float
    labels: NDArray[np.int64]


def equipartition(atoms: Any, targets: Any, sigma: Any = None) -> EquiPartition:
    r"""Transport ``k m`` atoms to ``m`` targets of equal mass, exactly.

    **[O]** With equal masses on each side and one size a multiple of the other, an optimal plan is integral:
    each target receives exactly ``k`` atoms (repeat every target ``k`` times and use Birkhoff's theorem).
    No assumption on the data.

    Args:
        atoms: shape ``(k * m, features)``, array or tensor.
        targets: shape ``(m, features)``.
        sigma: metric, symmetric positive semidefinite, shape ``(features, features)``; identity by default.

    Raises:
        ShapeError: the number of atoms is not a multiple of the number of targets, or features differ.
        DataError: NaN or infinite entries.

    Notes:
        One assignment of size ``k m``: cubic in the number of atoms.

    Source:
        Theory, section 1.2; used for Assumption 3 of Ferbach et al. (2024).
    """
    atoms, targets = read_array(atoms, "equipartition: atoms"), read_array(targets, "equipartition: targets")
    copies, rest = divmod(len(atoms), len(targets))
    if rest:
        raise ShapeError(
            f"equipartition: {len(atoms)} atoms cannot be split equally among {len(targets)} targets. "
            "Choose a width that is a multiple of the number of targets."
        )
    cost = ground_cost(atoms, targets, sigma).numpy()
    matched = assign(np.repeat(cost, copies, axis=1))
    return EquiPartition(matched.value / len(atoms), matched.columns.numpy() // copies)


def layer_output_error(weight_a: Any, weight_b: Any, permutation: Any, inputs: Any) -> float:
    r"""Return the mean squared difference of one layer's pre-activations after permuting B.

    .. math:: \tfrac1m \, \mathbb E_x \lVert W_A x - \Pi W_B x \rVert^2 = \tfrac1m \lVert W_A - \Pi W_B
        \rVert_\Sigma^2, \qquad \Sigma = X^\top X / n

    **[P, section 6]** The left side is what is computed here, by running the layer; its least value over
    permutations is the squared transport distance ``w2_matching(weight_a, weight_b, features=inputs)``.
    No assumption on weights or data.

    Args:
        weight_a: weights of A, one unit a row, shape ``(units, features)``.
        weight_b: weights of B, same shape.
        permutation: ``permutation[i]`` is the unit of B placed at position ``i``, shape ``(units,)``.
        inputs: layer inputs, shape ``(samples, features)``; append a column of ones to match biases too.

    Returns:
        Mean over units and inputs, squared units of the pre-activation.

    Raises:
        ShapeError: shapes disagree, or the permutation is none.

    Source:
        Theory, section 1.3; Ferbach et al. (2024), section 6.
    """
    weight_a, weight_b = read_array(weight_a, "weight_a"), read_array(weight_b, "weight_b")
    inputs = read_array(inputs, "inputs")
    if weight_a.shape != weight_b.shape or inputs.shape[1] != weight_a.shape[1]:
        raise ShapeError(
            f"layer_output_error: expected two weights of one shape and inputs with as many features; found "
            f"{weight_a.shape}, {weight_b.shape} and inputs {inputs.shape}."
        )
    order = validate_permutation(permutation, len(weight_a)).numpy()
    return float(np.mean((inputs @ (weight_a - weight_b[order]).T) ** 2))
