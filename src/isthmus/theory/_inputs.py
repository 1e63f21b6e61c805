"""Reading arguments: arrays and torch tensors become checked float64 arrays, scalars are range-checked."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from isthmus.errors import DataError, ShapeError

FloatArray = NDArray[np.float64]


def read_array(value: Any, name: str, *, ndim: int = 2) -> FloatArray:
    """Return ``value`` (tensor, array or nested sequence) as a new float64 array with ``ndim`` axes.

    Raises:
        ShapeError: another number of axes, or no entries.
        DataError: complex, NaN or infinite entries.
    """
    if isinstance(value, Tensor):
        value = value.detach().cpu().resolve_conj()
        value = value.numpy() if value.is_complex() else value.double().numpy()
    array = np.array(value)
    if np.iscomplexobj(array):
        raise DataError(f"{name}: expected real entries, found {array.dtype}. Pass real weights or data.")
    array = array.astype(np.float64)
    if array.ndim != ndim:
        raise ShapeError(f"{name}: expected {ndim} axes, found shape {array.shape}.")
    if array.size == 0:
        raise ShapeError(f"{name}: expected a non-empty array, found shape {array.shape}.")
    bad = int((~np.isfinite(array)).sum())
    if bad:
        raise DataError(
            f"{name}: {bad} of {array.size} entries are NaN or infinite. "
            "Look for a network that diverged or a division by zero upstream."
        )
    return array


def read_number(
    value: float, name: str, *, least: float = -math.inf, above: float = -math.inf, most: float = math.inf
) -> float:
    """Return ``value`` as a float after checking ``least <= value <= most`` and ``value > above``.

    Raises:
        DataError: not a number, infinite, or outside the range.
    """
    number = float(value)
    if not math.isfinite(number) or number < least or number <= above or number > most:
        wanted = [f"at least {least:g}"] if least > -math.inf else []
        wanted += [f"above {above:g}"] if above > -math.inf else []
        wanted += [f"at most {most:g}"] if most < math.inf else []
        raise DataError(f"{name}: expected a finite number {' and '.join(wanted)}, found {value}.")
    return number


def read_integer(value: float, name: str, *, least: int = 1) -> int:
    """Return ``value`` as an int after checking that it is whole and at least ``least``.

    Raises:
        DataError: not whole, or too small.
    """
    number = read_number(value, name, least=least)
    if number != int(number):
        raise DataError(f"{name}: expected a whole number, found {value}.")
    return int(number)
