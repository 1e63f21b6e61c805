"""The training loss between A and tensors of B, differentiable by the latter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from isthmus.batches import Batch, iterate
from isthmus.errors import DataError
from isthmus.evaluation import LossOnTensors
from isthmus.losses import Loss
from isthmus.matching._problem import Problem

__all__ = ["LossBetween", "split_batches"]

_HELD = 4
"""Most batches that are held out."""


class LossBetween:
    r"""The mean loss of :math:`(1-t)\,\theta_A + t\,\theta` on a batch, for any tensors of the architecture.

    It is run as :class:`isthmus.evaluation.LossOnTensors` says.

    Args:
        problem: the networks and labelled data.
        loss: see :data:`isthmus.losses.Loss`.

    Raises:
        ModelError: the code does not compute with tensors that it is given.
    """

    def __init__(self, problem: Problem, loss: Loss | None) -> None:
        states = (problem.state_a, problem.state_b)
        example = next(iterate(problem.batches))
        advice = "Use a method that does not train."
        self._loss = LossOnTensors(problem.model_a, states, example, loss, advice=advice)
        self.own = self._loss.own
        self.a = {name: problem.state_a[name].detach() for name in self.own}

    def __call__(self, other: Mapping[str, Tensor], t: float, batch: Batch) -> tuple[Tensor, float]:
        """Return the mean loss of a batch at ``t``, float64 on the CPU, and what the batch counts for."""
        mixed = {
            name: torch.lerp(a, other[name], t) if a.is_floating_point() else a for name, a in self.a.items()
        }
        return self._loss(mixed, batch)

    @torch.no_grad()
    def mean(
        self, other: Mapping[str, Tensor], positions: Sequence[float], batches: Sequence[Batch]
    ) -> float:
        """Return the mean loss over positions and batches."""
        total = weight = 0.0
        for batch in batches:
            for t in positions:
                loss, counted = self(other, t, batch)
                total, weight = total + (float(loss) * counted if counted else 0.0), weight + counted
        return total / weight if weight else torch.nan


def split_batches(problem: Problem, size: int, generator: torch.Generator) -> tuple[list[Batch], list[Batch]]:
    """Return batches of at most ``size`` examples to train on, and every fifth, four at most, to choose by.

    A single batch serves both ends.

    Raises:
        DataError: a batch without targets.
    """
    found = [
        batch.rows(start, start + size)
        for batch in iterate(problem.batches)
        for start in range(0, batch.size, size)
    ]
    if any(batch.targets is None and not batch.kwargs for batch in found):
        raise DataError(
            "Training a relabelling: the batches have no targets, which the loss needs. Give (inputs, targets), or "
            "take a method that compares units."
        )
    order = torch.randperm(len(found), generator=generator).tolist()
    held = max(1, min(_HELD, len(found) // 5))
    chosen = [found[k] for k in order]
    return (chosen[held:] or chosen), chosen[:held]
