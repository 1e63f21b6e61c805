"""Reading matrices: torch tensors or numpy arrays in, checked torch tensors out."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from isthmus.errors import DataError, ShapeError


def as_real(value: Any, name: str) -> Tensor:
    """Return ``value`` as a detached tensor on its own device and in its own dtype.

    Raises:
        DataError: complex, sparse, or nothing that torch reads as an array of numbers.
    """
    if isinstance(value, np.ndarray):
        value = _readable(value)
    try:
        tensor = torch.as_tensor(value).detach()
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise DataError(
            f"{name}: expected a tensor, a numpy array or nested lists of numbers, found {type(value).__name__} "
            f"that cannot be read as one ({error}). Pass a dense array of numbers."
        ) from error
    if tensor.is_complex():
        raise DataError(f"{name}: expected real entries, found {tensor.dtype}. Pass real costs or features.")
    if tensor.layout != torch.strided or tensor.is_meta:
        found = "a meta tensor" if tensor.is_meta else f"the layout {tensor.layout}"
        raise DataError(
            f"{name}: expected a dense tensor with values, found {found}. Call .to_dense() first."
        )
    return tensor


def _readable(array: np.ndarray) -> np.ndarray:
    """Return an array in a form that torch takes: native byte order, writeable, strides not negative."""
    if not array.dtype.isnative:
        return array.astype(array.dtype.newbyteorder("="))
    if not array.flags.writeable or min(array.strides, default=0) < 0:
        return array.copy()
    return array


def as_float64_matrix(value: Any, name: str, *, ndim: int = 2) -> Tensor:
    """Return a finite matrix (or vector) in float64, as every numeric here is (Theory, section 1.0).

    Args:
        value: tensor, numpy array or nested sequence of numbers.
        name: how the error message calls it.
        ndim: number of axes expected.

    Raises:
        ShapeError: another number of axes.
        DataError: complex, NaN or infinite entries.
    """
    tensor = as_real(value, name)
    if tensor.ndim != ndim:
        raise ShapeError(
            f"{name}: expected {ndim} axes, found shape {tuple(tensor.shape)}. "
            "Rows list the units of A (or the samples), columns those of B (or the features)."
        )
    bad = ~torch.isfinite(tensor)
    if bool(bad.any()):
        where = tuple(torch.nonzero(bad)[0].tolist())
        raise DataError(
            f"{name}: {int(bad.sum())} of {tensor.numel()} entries are NaN or infinite, the first at {where}. "
            "Look for a network that diverged or a division by zero upstream."
        )
    return tensor.to(torch.float64)
