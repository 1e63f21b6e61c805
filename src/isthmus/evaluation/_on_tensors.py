"""The loss of a network's code on tensors that are given to it, by which these are learnt."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from isthmus.batches import Batch, device_of
from isthmus.errors import ModelError
from isthmus.evaluation._evaluation import bind, floating_dtype, relative_difference
from isthmus.losses import Loss, Scorer, completed, mean_over_rows, outputs_to_score, scorer_for
from isthmus.replica import Replica

__all__ = ["LossOnTensors"]

_AGREEMENT = 1e-3
"""Largest difference, relative to the largest output, of the code run on given tensors from the code run as it is."""


class LossOnTensors:
    """The mean loss of a network's code on tensors that are given to it, differentiable by them.

    The code is run by :func:`torch.func.functional_call`, in evaluation, but layers of BatchNorm normalise by the
    statistics of the batch and write none, as they would on data after their running statistics were recomputed.

    Args:
        model: the network; a copy is run.
        states: states on which the code must give what it gives when it holds them; the first one's dtype is run in.
        example: a batch with targets.
        loss: see :data:`isthmus.losses.Loss`.
        read: picks the output that is scored; default: the usual one.
        advice: what messages say to do about a network that cannot be run so.

    Attributes:
        own: names of the tensors that the code is given.
        dtype: in which the network is run.
        scorer: of the loss.

    Raises:
        ModelError: the code does not compute with the tensors that it is given.
    """

    def __init__(
        self,
        model: nn.Module,
        states: Sequence[Mapping[str, Tensor]],
        example: Batch,
        loss: Loss | None = None,
        read: Callable[[Any], Tensor] | None = None,
        *,
        advice: str,
    ) -> None:
        replica = Replica(model)
        self._source, self._device, self._module = model, device_of(model), replica.module
        self.dtype = floating_dtype(states[0]) or torch.float32
        example = completed(model, example)
        whole = bind(replica, states[0], read=lambda output: output)
        self.scorer: Scorer = scorer_for(loss, model, example, whole, read)
        whole.prepare(self.scorer.prepare(example))
        named = (*replica.module.named_parameters(), *replica.module.named_buffers())
        self.own = tuple(name for name, _ in named if name in states[0])
        self._check(replica, states, example, advice)
        for layer in self._module.modules():
            if isinstance(layer, nn.modules.batchnorm._BatchNorm) and layer.running_mean is not None:
                layer.training, layer.track_running_stats = True, False

    def _check(
        self, replica: Replica, states: Sequence[Mapping[str, Tensor]], example: Batch, advice: str
    ) -> None:
        """See that given tensors are what the code computes with: it gives what it gives when it holds them."""
        part = self.scorer.prepare(example.head(min(8, example.size)))
        # All are run as they are held first: given tensors then meet a copy that holds the last, whichever they are.
        held = [bind(replica, state)(part) for state in states]
        for reference, state in zip(held, states, strict=True):
            with torch.no_grad():
                found = outputs_to_score(self._run({name: state[name] for name in self.own}, part)[0])
            error = relative_difference(reference, found)
            if error > max(_AGREEMENT, 16 * torch.finfo(reference.dtype).eps):
                raise ModelError(
                    f"{type(self._source).__name__} computes with tensors that it keeps besides its parameters and "
                    f"buffers: run on those of another state its outputs differ by {error:.2g} of the largest. {advice}"
                )

    def _run(self, tensors: Mapping[str, Tensor], fed: Batch) -> tuple[Any, Batch]:
        moved = fed.to(self._device, self.dtype)
        return functional_call(self._module, dict(tensors), moved.args, dict(moved.kwargs)), moved

    def __call__(self, tensors: Mapping[str, Tensor], batch: Batch) -> tuple[Tensor, float]:
        """Return the mean loss of a batch, float64 on the CPU, and the weight of the batch."""
        output, moved = self._run(tensors, self.scorer.prepare(completed(self._source, batch)))
        read = self.scorer.read
        scores = self.scorer.score(outputs_to_score(output) if read is None else read(output), moved)
        return mean_over_rows(scores.losses, scores.weights), float(scores.weights.sum())
