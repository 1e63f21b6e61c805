"""How alike the units of two networks are, layer by layer, and how much of their variance a point between them has."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from isthmus.moments import ChannelMoment
from isthmus.paths import HeldLayer

__all__ = ["LayerStatistics", "LayerTally"]

_CONSTANT = 1e-12


@dataclass(frozen=True)
class LayerStatistics:
    r"""One layer's outputs in A, in B as it is lined up, and at the point between them.

    Attributes:
        name: of the module.
        units: number of its units.
        correlation: mean over units of the correlation of A's and B's output, over the data; None where no unit varies.
        variance: variance at the point, summed over units, over that of units with the mean deviation of the ends,
            :math:`\sum\sigma_t^2/\sum((1-t)\sigma_A+t\sigma_B)^2`. It is 1 where nothing is lost; with equal spreads
            and ends of correlation :math:`\rho` that nothing before has changed, it is
            :math:`(1-t)^2+t^2+2t(1-t)\rho`. None where no unit varies.
    """

    name: str
    units: int
    correlation: float | None
    variance: float | None


class LayerTally:
    """Collects the outputs of layers in three networks, batch by batch.

    Args:
        t: position of the third.
    """

    def __init__(self, t: float) -> None:
        self._t = t
        self._now: dict[tuple[HeldLayer, int], Tensor] = {}
        self._single: dict[tuple[HeldLayer, int], ChannelMoment] = {}
        self._joint: dict[tuple[HeldLayer, int], ChannelMoment] = {}

    def seeing(self, network: int) -> Callable[[HeldLayer, Tensor], None]:
        """Return what is called with the outputs of A (0), B (1) or the point (2)."""

        def see(layer: HeldLayer, output: Tensor) -> None:
            self._now[layer, network] = output.detach().double().movedim(layer.axis, 0).flatten(1)

        return see

    def end(self) -> None:
        """Take the batch that all three have seen.

        The covariance is that of sums and differences, whose moments merge exactly.
        """
        for layer in {layer for layer, _ in self._now}:
            seen = [self._now.get((layer, k)) for k in range(3)]
            rows = [s for s in seen if s is not None]
            if len(rows) < 3 or len({r.shape for r in rows}) > 1:
                continue
            parts = {0: rows[0], 1: rows[1], 2: rows[2]}
            for k, values in parts.items():
                self._single[layer, k] = _merged(self._single.get((layer, k)), values)
            for k, values in enumerate((rows[0] + rows[1], rows[0] - rows[1])):
                self._joint[layer, k] = _merged(self._joint.get((layer, k)), values)
        self._now.clear()

    def result(self, layers: tuple[HeldLayer, ...]) -> tuple[LayerStatistics, ...]:
        """Return the statistics of the layers that were seen, in the order given."""
        return tuple(self._of(layer) for layer in layers if (layer, 0) in self._single)

    def _of(self, layer: HeldLayer) -> LayerStatistics:
        a, b, point = (self._single[layer, k].deviation for k in range(3))
        total, difference = (self._joint[layer, k].deviation.square() for k in range(2))
        size = float(torch.stack([a, b]).square().mean())
        varies = (a.square() > _CONSTANT * size) & (b.square() > _CONSTANT * size)
        correlations = ((total - difference) / 4)[varies] / (a * b)[varies]
        goal = torch.lerp(a, b, self._t).square().sum()
        return LayerStatistics(
            layer.path,
            len(a),
            float(correlations.clamp(-1, 1).mean()) if bool(varies.any()) else None,
            float(point.square().sum() / goal) if float(goal) > 0 else None,
        )


def _merged(before: ChannelMoment | None, values: Tensor) -> ChannelMoment:
    found = ChannelMoment.of(values, 0)
    return found if before is None else before.merge(found)
