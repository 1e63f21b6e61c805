"""The barrier of a loss curve, and standard errors by resampling examples."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from isthmus.connectivity._positions import path_positions
from isthmus.errors import DataError, ShapeError

__all__ = ["Barrier", "bootstrap_means", "chord_of", "loss_barrier"]


@dataclass(frozen=True)
class Barrier:
    """The largest rise of a loss curve above its chord.

    Attributes:
        height: the largest rise, in units of the loss; 0 if the curve stays on or below the chord.
        at: the ``t`` that reaches it first (0 for a height of 0).
        spacing: the widest gap of the grid: between its points the curve can be higher.
    """

    height: float
    at: float
    spacing: float


def loss_barrier(losses: Tensor, ts: Tensor) -> Barrier:
    r"""Measure how far the loss rises above the chord between the endpoints.

    .. math:: \max_t \; L(\theta_t) - \bigl[(1-t)\, L(\theta_0) + t\, L(\theta_1)\bigr]

    Args:
        losses: mean loss at each path point, nats per example for cross-entropy, shape ``(points,)``.
        ts: positions on the path, no unit, rising from 0 to 1, shape ``(points,)``.

    Returns:
        The :class:`Barrier` over the grid.

    Raises:
        ShapeError: the lengths differ, or ``ts`` does not rise strictly from 0 to 1.
        DataError: a loss is NaN or infinite.

    Example:
        >>> loss_barrier(torch.tensor([1.0, 3.0, 1.0]), torch.tensor([0.0, 0.5, 1.0])).height
        2.0

    Source:
        Frankle et al. 2020 (arXiv:1912.05671) with the chord of Entezari et al. 2022 (arXiv:2110.06296).
    """
    positions = path_positions(ts)
    values = torch.as_tensor(losses).detach().cpu().double()
    if values.shape != positions.shape:
        raise ShapeError(
            f"A barrier needs one loss for each position: found losses {tuple(values.shape)} and positions "
            f"{tuple(positions.shape)}."
        )
    if not bool(values.isfinite().all()):
        raise DataError(f"A barrier needs finite losses; found {values.tolist()}.")
    gaps = values - chord_of(values, positions)
    at = int(gaps.argmax())
    return Barrier(float(gaps[at]), float(positions[at]), float(positions.diff().max()))


def chord_of(losses: Tensor, ts: Tensor) -> Tensor:
    """Return the straight line between the first and last loss; shape ``(..., points)`` as the losses."""
    return torch.lerp(losses[..., :1], losses[..., -1:], ts)


def bootstrap_means(
    rows: Tensor, replicates: int, generator: torch.Generator, weights: Tensor | None = None
) -> Tensor:
    r"""Average each row over examples drawn with replacement, the same draw for all rows of a replicate.

    With weights each mean is the ratio :math:`\sum_i w_i v_i / \sum_i w_i` over the examples drawn, so that its spread
    includes that of the weights (the bootstrap of a ratio estimator).

    Args:
        rows: values per example, float64, shape ``(rows, examples)``.
        replicates: number of draws.
        generator: source of the draws.
        weights: of the values, of the same shape; all 1 by default.

    Returns:
        Means, shape ``(replicates, rows)``; where none of the examples drawn counts, the mean over all.
    """
    examples = rows.shape[1]
    means = rows.new_empty(replicates, rows.shape[0])
    for replicate in range(replicates):
        drawn = torch.randint(examples, (examples,), generator=generator, device=generator.device)
        counts = drawn.bincount(minlength=examples).to(rows)
        if weights is None:
            means[replicate] = rows @ counts / examples
        else:
            total = weights @ counts
            whole = (rows * weights).sum(1) / weights.sum(1)
            means[replicate] = torch.where(total > 0, (rows * weights) @ counts / total, whole)
    return means
