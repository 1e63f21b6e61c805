"""Scores of a batch: a loss and a weight for each row, and how they are averaged."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Scores", "averaged", "mean_over_rows", "unless_equal"]


@dataclass(frozen=True, eq=False)
class Scores:
    r"""Scores of a batch; float64 on the CPU, shape ``(rows,)``.

    A row is an example, or a whole batch where a loss gives one value for it. The loss over several batches is
    :math:`\sum_i w_i \ell_i / \sum_i w_i`, so that a mean over tokens, pixels or class weights is the same however the
    data are cut into batches.

    Attributes:
        losses: mean loss of each row; 0 where the weight is 0.
        weights: what each row counts for: its number of positions, less those that are ignored, or the sum of
            their class weights.
        correct: share of right predictions of each row, or None.
        counts: what ``correct`` counts for: the number of predictions; None with it.
    """

    losses: Tensor
    weights: Tensor
    correct: Tensor | None = None
    counts: Tensor | None = None

    def part(self, start: int, stop: int) -> Scores:
        """Return some of the rows."""
        rows = slice(start, stop)
        correct, counts = (None if v is None else v[rows] for v in (self.correct, self.counts))
        return Scores(self.losses[rows], self.weights[rows], correct, counts)

    @staticmethod
    def cat(parts: Sequence[Scores]) -> Scores:
        """Return the rows of all parts; ``correct`` only where every part has it."""
        shares = [(p.correct, p.counts) for p in parts if p.correct is not None and p.counts is not None]
        every = len(shares) == len(parts)
        return Scores(
            torch.cat([p.losses for p in parts]),
            torch.cat([p.weights for p in parts]),
            torch.cat([correct for correct, _ in shares]) if every else None,
            torch.cat([counts for _, counts in shares]) if every else None,
        )

    @property
    def loss(self) -> float:
        """Mean loss over the rows."""
        return float(mean_over_rows(self.losses.detach(), unless_equal(self.weights)))

    @property
    def accuracy(self) -> float | None:
        """Share of right predictions over the rows."""
        if self.correct is None or self.counts is None:
            return None
        return float(mean_over_rows(self.correct, unless_equal(self.counts)))


def averaged(values: Tensor, counted: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Average everything but axis 0, in float64 on the CPU.

    Args:
        values: shape ``(n, ...)``.
        counted: weights of the same shape; None counts everything once.

    Returns:
        Means and the sums of their weights, shape ``(n,)``; a mean over nothing is 0.
    """
    rows = values.reshape(len(values), -1)
    if counted is None and rows.shape[1] > 0:
        return rows.mean(1, dtype=torch.float64).cpu(), torch.full(
            (len(rows),), float(rows.shape[1])
        ).double()
    weights = torch.ones_like(rows) if counted is None else counted.reshape(len(values), -1)
    # What does not count may be NaN: fully masked tokens attend to nothing.
    sums = torch.where(weights > 0, rows.double() * weights.double(), 0.0).sum(1).cpu()
    total = weights.sum(1, dtype=torch.float64).cpu()
    return torch.where(total > 0, sums / total.where(total > 0, torch.ones_like(total)), 0.0), total


def mean_over_rows(values: Tensor, weights: Tensor | None) -> Tensor:
    """Average over the last axis, with weights if there are any; a sum of weights of 0 gives NaN."""
    return values.mean(-1) if weights is None else (values * weights).sum(-1) / weights.sum(-1)


def unless_equal(weights: Tensor) -> Tensor | None:
    """Return weights, or None where all are one positive value, which a plain mean needs not."""
    equal = (
        weights.numel() > 0
        and bool((weights == weights.flatten()[0]).all())
        and bool(weights.flatten()[0] > 0)
    )
    return None if equal else weights
