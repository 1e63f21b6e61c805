r"""The loss on the path between A and a moved B, differentiable by the element that moves B."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from isthmus.batches import Batch, Batches
from isthmus.couplings import Coupling
from isthmus.evaluation import LossOnTensors
from isthmus.losses import Loss
from isthmus.symmetry import Slots, SymmetrySpec, carry_tensor

__all__ = ["PathLoss"]

POSITIONS = (0.25, 0.5, 0.75)
"""Where on the path held-out data are scored."""


class PathLoss:
    r"""The mean loss of :math:`(1-t)\,\theta_A + t\,g\,\theta_B` on a batch, for an element :math:`g`.

    The code of A is run on the tensors of the path (:class:`isthmus.evaluation.LossOnTensors`): layers of BatchNorm
    normalise by the batch, as they would after their running statistics were recomputed at every point.

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
        self._loss = LossOnTensors(
            model,
            (state_a, state_b),
            example,
            loss,
            read,
            advice="Refining on the path needs a network whose code reads its weights when it is called.",
        )
        self.dtype, self.scorer = self._loss.dtype, self._loss.scorer
        self._a, self._b = (
            {name: state[name].detach() for name in self._loss.own} for state in (state_a, state_b)
        )
        slots = spec.slots_by_tensor()
        self._slots: dict[str, Slots] = {
            name: slots[name]
            for name in self._a
            if any(group in moving for listed in slots.get(name, {}).values() for group, _ in listed)
        }

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
        return self._loss(self.state(t, at), batch)

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
                mean, weight = self._loss(tensors, batch)
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
