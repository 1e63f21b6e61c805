"""The training loss between A and tensors of B, differentiable by the latter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call

from isthmus.batches import Batch, device_of, iterate
from isthmus.errors import DataError, ModelError
from isthmus.evaluation import bind, floating_dtype, relative_difference
from isthmus.losses import Loss, mean_over_rows, outputs_to_score, scorer_for
from isthmus.matching._problem import Problem
from isthmus.replica import Replica

__all__ = ["LossBetween", "split_batches"]

_AGREEMENT = 1e-3
_HELD = 4
"""Most batches that are held out."""


class LossBetween:
    r"""The mean loss of :math:`(1-t)\,\theta_A + t\,\theta` on a batch, for any tensors of the architecture.

    Layers of BatchNorm normalise by the statistics of the batch, as on data after running statistics are recomputed.

    Args:
        problem: the networks and labelled data.
        loss: see :data:`isthmus.losses.Loss`.

    Raises:
        ModelError: the code does not compute with tensors that it is given.
    """

    def __init__(self, problem: Problem, loss: Loss | None) -> None:
        model, replica = problem.model_a, Replica(problem.model_a)
        example = next(iterate(problem.batches))
        self._device, self._dtype = device_of(model), floating_dtype(problem.state_a) or torch.float32
        plain = bind(replica, problem.state_a, read=lambda output: output)
        self._scorer = scorer_for(loss, model, example, plain)
        plain.prepare(self._scorer.prepare(example))
        own = [name for name, _ in (*replica.module.named_parameters(), *replica.module.named_buffers())]
        self.own, self._module = tuple(name for name in own if name in problem.state_a), replica.module
        self.a = {name: problem.state_a[name].detach() for name in self.own}
        self._check(replica, problem, example)
        for layer in self._module.modules():
            if isinstance(layer, nn.modules.batchnorm._BatchNorm) and layer.running_mean is not None:
                layer.training, layer.track_running_stats = True, False

    def _check(self, replica: Replica, problem: Problem, example: Batch) -> None:
        """See that the code computes with the tensors that it is given, and not with some that it keeps."""
        part = self._scorer.prepare(example.head(min(8, example.size)))
        held = bind(replica, problem.state_b)(part)
        bind(replica, problem.state_a).prepare(part)
        with torch.no_grad():
            found = outputs_to_score(self._run({n: problem.state_b[n] for n in self.own}, part))
        error = relative_difference(held, found)
        if error > max(_AGREEMENT, 16 * torch.finfo(held.dtype).eps):
            raise ModelError(
                f"{type(problem.model_a).__name__} computes with tensors that it keeps besides its parameters and "
                f"buffers: run on those of B its outputs are off by {error:.2g} of the largest. Use a method that does "
                "not train."
            )

    def _run(self, tensors: Mapping[str, Tensor], fed: Batch) -> object:
        moved = fed.to(self._device, self._dtype)
        return functional_call(self._module, dict(tensors), moved.args, dict(moved.kwargs))

    def __call__(self, other: Mapping[str, Tensor], t: float, batch: Batch) -> tuple[Tensor, float]:
        """Return the mean loss of a batch at ``t``, float64 on the CPU, and what the batch counts for."""
        mixed = {
            name: torch.lerp(a, other[name], t) if a.is_floating_point() else a for name, a in self.a.items()
        }
        fed = self._scorer.prepare(batch)
        output, reads = self._run(mixed, fed), self._scorer.read
        scores = self._scorer.score(outputs_to_score(output) if reads is None else reads(output), fed)
        return mean_over_rows(scores.losses, scores.weights), float(scores.weights.sum())

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
