"""Positions on a path."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from isthmus.errors import ShapeError

__all__ = ["path_positions"]


def path_positions(points: int | Sequence[float] | Tensor | Any) -> Tensor:
    """Return positions on a path, float64 ``(points,)``: an even grid for a number, else those given.

    Raises:
        ShapeError: fewer than two points, or not rising strictly from 0 to 1.
    """
    if isinstance(points, Integral):
        if points < 2:
            raise ShapeError(f"A line needs its two ends: expected points of 2 or more, found {points}.")
        return torch.linspace(0.0, 1.0, int(points), dtype=torch.float64)
    ts = torch.as_tensor(points, dtype=torch.float64).detach().cpu()
    rising = ts.ndim == 1 and len(ts) >= 2 and bool((ts[1:] > ts[:-1]).all())
    if not rising or float(ts[0]) != 0.0 or float(ts[-1]) != 1.0:
        raise ShapeError(f"Positions on a line must rise strictly from 0 to 1; found {ts.tolist()}.")
    return ts
