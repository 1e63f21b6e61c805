r"""The loss on the path between A and a moved B, differentiable by the element that moves B."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from isthmus.batches import Batch, Batches, device_of
from isthmus.couplings import Coupling
from isthmus.errors import ModelError
from isthmus.evaluation import bind, floating_dtype, relative_difference
from isthmus.losses import Loss, Scorer, completed, mean_over_rows, outputs_to_score, scorer_for
from isthmus.replica import Replica
from isthmus.symmetry import Slots, SymmetrySpec, carry_tensor

__all__ = ["PathLoss"]

POSITIONS = (0.25, 0.5, 0.75)
"""Where on the path held-out data are scored."""
AGREEMENT = 1e-3
"""Largest difference, relative to the largest output, of the code run on given tensors from the code run as it is."""


class PathLoss:
    r"""The mean loss of :math:`(1-t)\,\theta_A + t\,g\,\theta_B` on a batch, for an element :math:`g`.

    The code of A is run on the tensors of the path by :func:`torch.func.functional_call`, in evaluation, but layers of
    BatchNorm normalise by the statistics of the batch, as they would on data after their running statistics were
    recomputed for every point of the path.

    Args:
        model: A.
        state_a: its state.
        state_b: B's state where the search begins.
        spec: the symmetries.
        moving: names of the groups that move.
        example: a batch with targets.
        loss: see :data:`isthmus.losses.Loss`.
        outputs: the one output that is scored.

    Attributes:
        dtype: in which the network is run.
        scorer: of the loss.

    Raises:
        ModelError: the code does not run on tensors that are given to it.
    """

    def __init__(
        self,
        model: nn.Module,
        state_a: Mapping[str, Tensor],
        state_b: Mapping[str, Tensor],
        spec: SymmetrySpec,
        moving: Sequence[str],
        example: Batch,
        loss: Loss | None = None,
        read: Any = None,
    ) -> None:
        replica = Replica(model)
        self._source, self._device = model, device_of(model)
        self.dtype = floating_dtype(state_a) or torch.float32
        example = completed(model, example)
        whole = bind(replica, state_a, read=lambda output: output)
        self.scorer: Scorer = scorer_for(loss, model, example, whole, read)
        whole.prepare(self.scorer.prepare(example))
        own = [name for name, _ in (*replica.module.named_parameters(), *replica.module.named_buffers())]
        self._a = {n: state_a[n].detach() for n in own if n in state_a}
        self._b = {n: state_b[n].detach() for n in own if n in state_b}
        slots = spec.slots_by_tensor()
        self._slots: dict[str, Slots] = {
            name: slots[name]
            for name in self._a
            if any(group in moving for listed in slots.get(name, {}).values() for group, _ in listed)
        }
        self._module = replica.module
        self._check(replica, state_a, state_b, example)
        _by_batch(self._module)

    def _check(self, replica: Replica, *given: Any) -> None:
        """See that given tensors are what the code computes with: it gives what it gives when it holds them."""
        *states, example = given
        part = example.head(min(8, example.size))
        moved = self.scorer.prepare(part).to(self._device, self.dtype)
        # Both are run as they are held first: given tensors then meet a copy that holds B, whichever they are.
        held = [bind(replica, state)(self.scorer.prepare(part)) for state in states]
        for reference, tensors in zip(held, (self._a, self._b), strict=True):
            with torch.no_grad():
                found = outputs_to_score(
                    functional_call(self._module, tensors, moved.args, dict(moved.kwargs))
                )
            error = relative_difference(reference, found)
            if error > max(AGREEMENT, 16 * torch.finfo(reference.dtype).eps):
                raise ModelError(
                    f"{type(self._source).__name__} computes with tensors that it keeps besides its parameters and "
                    f"buffers: run on those of another state its outputs differ by {error:.2g} of the largest. "
                    "Refining on the path needs a network whose code reads its weights when it is called."
                )

    def state(self, t: float, at: Mapping[str, Coupling]) -> dict[str, Tensor]:
        """Return the tensors at ``t``, differentiable by the couplings."""
        found: dict[str, Tensor] = {}
        for name, a in self._a.items():
            b = self._b[name]
            if not a.is_floating_point():
                found[name] = a
                continue
            slots = self._slots.get(name)
            moved = b if slots is None else carry_tensor(b, slots, at)
            found[name] = torch.lerp(a, moved, t)
        return found

    def loss(self, t: float, at: Mapping[str, Coupling], batch: Batch) -> tuple[Tensor, float]:
        """Return the mean loss of a batch at ``t``, float64 on the CPU, and the weight of the batch."""
        return self._of(self.state(t, at), batch)

    def _of(self, tensors: Mapping[str, Tensor], batch: Batch) -> tuple[Tensor, float]:
        fed = self.scorer.prepare(completed(self._source, batch))
        moved = fed.to(self._device, self.dtype)
        output = functional_call(self._module, dict(tensors), moved.args, dict(moved.kwargs))
        read = self.scorer.read
        scores = self.scorer.score(outputs_to_score(output) if read is None else read(output), moved)
        weight = float(scores.weights.sum())
        return mean_over_rows(scores.losses, scores.weights), weight

    @torch.no_grad()
    def means(self, spots: Sequence[float], at: Mapping[str, Coupling], batches: Batches) -> list[float]:
        """Return the mean loss at each of some positions, on some batches."""
        states = [self.state(t, at) for t in spots]
        sums, weights = (
            torch.zeros(len(spots), dtype=torch.float64),
            torch.zeros(len(spots), dtype=torch.float64),
        )
        for batch in batches:
            for k, tensors in enumerate(states):
                mean, weight = self._of(tensors, batch)
                if weight:  # where nothing counts, the mean is over nothing
                    sums[k] += mean * weight
                    weights[k] += weight
        return (sums / weights).tolist()

    def excess(self, at: Mapping[str, Coupling], batches: Batches, ends: Sequence[float]) -> float:
        """Return the largest mean loss above the chord at three positions, on some batches.

        Args:
            at: elements by group.
            batches: the data.
            ends: mean losses of A and of B there, which no element changes.
        """
        found = zip(POSITIONS, self.means(POSITIONS, at, batches), strict=True)
        return max(mean - (1 - t) * ends[0] - t * ends[1] for t, mean in found)


def _by_batch(module: nn.Module) -> None:
    """Let layers of BatchNorm in a private copy normalise by the batch, and write nothing."""
    for layer in module.modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm) and layer.running_mean is not None:
            layer.training, layer.track_running_stats = True, False
