r"""Ceilings of a loss between the points of a grid, and the positions to look at next."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from isthmus.connectivity._barrier import chord_of

__all__ = ["FIRST_POINTS", "MOST_POINTS", "Ceiling", "ceiling", "next_points"]

FIRST_POINTS = 7
MOST_POINTS = 51
CLOSEST = 0.1
"""New points keep this share of an interval's width away from its ends."""


class Ceiling(NamedTuple):
    """For each interval of a grid, float64 ``(points - 1,)``: a height, and the ``t`` where it is expected."""

    heights: Tensor
    at: Tensor


def ceiling(losses: Tensor, ts: Tensor, lipschitz: float | None) -> Ceiling | None:
    r"""Return how high the rise :math:`g(t)` of the loss above its chord may be between neighbouring points.

    With a Lipschitz constant :math:`K` of :math:`g` this is a bound, on an interval of width :math:`h` with
    values :math:`g_0, g_1` at its ends: :math:`(g_0 + g_1 + K h) / 2` (Piyavskii 1972). Without, it is an estimate
    for smooth curves: the top of the parabola through the interval and one more neighbour, plus the error of
    that parabola by the next divided difference. The estimate sees nothing narrower than the grid.

    Args:
        losses: mean losses, ``(points,)``, float64.
        ts: their positions.
        lipschitz: a bound on :math:`|g(s) - g(t)| / |s - t|`.

    Returns:
        A :class:`Ceiling`, or None with fewer than four points and no constant.
    """
    rises = losses - chord_of(losses, ts)
    if lipschitz is not None:
        widths, steps = ts.diff(), rises.diff()
        at = (ts[1:] + ts[:-1]) / 2 + steps / (2 * lipschitz)
        return Ceiling((rises[1:] + rises[:-1] + lipschitz * widths) / 2, at.clamp(ts[:-1], ts[1:]))
    if len(ts) < 4:
        return None
    found = [_smooth_top(rises, ts, k) for k in range(len(ts) - 1)]
    heights, at = (torch.tensor(column, dtype=ts.dtype) for column in zip(*found, strict=True))
    return Ceiling(heights, at)


def next_points(losses: Tensor, ts: Tensor, lipschitz: float | None, tolerance: float) -> list[float]:
    """Return up to two positions where the loss may rise highest, or none if it can rise no more than asked.

    Args:
        losses: mean losses, ``(points,)``.
        ts: their positions, at least four.
        lipschitz: see :func:`ceiling`.
        tolerance: how much the barrier may exceed the largest rise on the grid.
    """
    found = ceiling(losses, ts, lipschitz)
    assert found is not None
    excess = found.heights - (losses - chord_of(losses, ts)).max()
    chosen = []
    for k in excess.argsort(descending=True, stable=True)[:2].tolist():
        if excess[k] > tolerance:
            width = ts[k + 1] - ts[k]
            inside = found.at[k].clamp(ts[k] + CLOSEST * width, ts[k + 1] - CLOSEST * width)
            chosen.append(float(inside))
    return chosen


def _smooth_top(rises: Tensor, ts: Tensor, k: int) -> tuple[float, float]:
    """Return the estimated top over interval ``k``, and its place."""
    best = (-float("inf"), float(ts[k]))
    for first in (k - 1, k):
        if not 0 <= first <= len(ts) - 3:
            continue
        nodes = ts[first : first + 3]
        grid = torch.linspace(0, 1, 33, dtype=ts.dtype)
        inside = torch.lerp(ts[k], ts[k + 1], grid)
        values = _newton(rises[first : first + 3], nodes, inside)
        third = max(
            abs(_divided(rises[j : j + 4], ts[j : j + 4]))
            for j in (first - 1, first)
            if 0 <= j <= len(ts) - 4
        )
        values = values + third * (inside[:, None] - nodes).prod(1).abs()
        top = int(values.argmax())
        best = max(best, (float(values[top]), float(inside[top])))
    return best


def _newton(values: Tensor, nodes: Tensor, at: Tensor) -> Tensor:
    """Evaluate the parabola through three points."""
    slope = _divided(values[:2], nodes[:2])
    curvature = _divided(values, nodes)
    return values[0] + (at - nodes[0]) * (slope + (at - nodes[1]) * curvature)


def _divided(values: Tensor, nodes: Tensor) -> float:
    """Return the divided difference over all nodes."""
    table = values
    for order in range(1, len(nodes)):
        table = table.diff() / (nodes[order:] - nodes[:-order])
    return float(table[0])
