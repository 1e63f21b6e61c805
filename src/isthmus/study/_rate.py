"""The rate at which the theory expects matched layers to approach each other as they get wider."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from isthmus.errors import DataError
from isthmus.theory import nearest_neighbour_lower

__all__ = ["transport_exponent"]


def transport_exponent(widths: Sequence[float], dimension: float) -> float:
    r"""Return the exponent of the squared transport distance between two layers of independent neurons.

    The neurons are taken as isotropic Gaussian rows of ``dimension`` axes. Their expected squared distance falls
    like :math:`m^{-2/d}` for large widths ``m``; at usual widths it is steeper or flatter, so the exponent is that of
    the nearest-neighbour law (:func:`isthmus.theory.nearest_neighbour_lower`) fitted to the very widths. The error
    of linear connectivity is bounded by the distance, so *half* this exponent is that of its bound: a measured
    error may fall faster.

    Args:
        widths: at least two different numbers of neurons, each at least 1.
        dimension: of the layer's matched matrix, above 0; centred, since the mean is one axis and matched at once.

    Raises:
        DataError: fewer than two different widths, or a dimension of 0 or less.

    Source:
        Theorems 5.2 and 5.3 of arXiv:2310.19103 for the rate; Theory, section 2.5 for the law.
    """
    if len(set(widths)) < 2:
        raise DataError(f"transport_exponent: expected at least two different widths, found {list(widths)}.")
    logs = np.log(np.array(sorted(set(widths)), dtype=float))
    values = [math.log(nearest_neighbour_lower(math.exp(m), dimension)) for m in logs]
    return float(np.polyfit(logs, values, 1)[0])
