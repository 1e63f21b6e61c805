"""Inputs and outputs of runs that are compared."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

__all__ = ["differ", "other_inputs", "output_leaves"]


def output_leaves(output: Any) -> list[Any]:
    if isinstance(output, Mapping) and not isinstance(output, dict):
        output = dict(output)
    return [t.detach().clone() if isinstance(t, Tensor) else t for t in pytree.tree_leaves(output)]


def differ(one: list[Any], two: list[Any], tolerance: float = 0.0) -> bool:
    """Tell whether outputs differ by more than the root of the machine precision, or ``tolerance``, of the largest."""
    tensors = [[t for t in leaves if isinstance(t, Tensor)] for leaves in (one, two)]
    if [t.shape for t in tensors[0]] != [t.shape for t in tensors[1]]:
        return True
    return not all(_close(a, b, tolerance) for a, b in zip(*tensors, strict=True))


def _close(one: Tensor, two: Tensor, tolerance: float) -> bool:
    if not (one.is_floating_point() or one.is_complex()):
        return torch.equal(one, two)
    allowed = max(torch.finfo(one.dtype).eps ** 0.5, tolerance)
    largest = one[one.isfinite()].abs().max() if one.isfinite().any() else torch.tensor(0.0)
    return torch.allclose(one, two, rtol=0.0, atol=allowed * float(largest), equal_nan=True)


def other_inputs(inputs: Any) -> Any:
    """Return inputs of the same form with other values: examples in reverse order, real numbers changed too."""

    def other(value: Any) -> Any:
        if not isinstance(value, Tensor) or value.ndim == 0:
            return value
        flipped = value.flip(0)
        return flipped * 0.75 + 0.125 if value.is_floating_point() else flipped

    return pytree.tree_map(other, inputs)
