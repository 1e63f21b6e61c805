"""Mean and spread of every channel of a stream, without the products between channels."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["ChannelMoment"]


@dataclass(frozen=True, eq=False)
class ChannelMoment:
    """Count, mean and summed squared deviation of each channel; streams combine as in :mod:`isthmus.moments`.

    Attributes:
        count: values seen in each channel.
        mean: float64, shape ``(channels,)``.
        scatter: sum of squared deviations from the mean, float64, shape ``(channels,)``.
    """

    count: int
    mean: Tensor
    scatter: Tensor

    @classmethod
    def of(cls, values: Tensor, axis: int) -> ChannelMoment:
        """Return the moment of a tensor whose axis ``axis`` lists the channels; all other axes list values."""
        rows = values.detach().double().movedim(axis, 0).flatten(1)
        if rows.shape[1] == 0:
            return cls(0, rows.new_zeros(len(rows)), rows.new_zeros(len(rows)))
        variance, mean = torch.var_mean(rows, dim=1, correction=0)
        return cls(rows.shape[1], mean, variance * rows.shape[1])

    def merge(self, other: ChannelMoment) -> ChannelMoment:
        """Return the moment of both streams together (Chan, Golub & LeVeque 1983)."""
        if self.count == 0 or other.count == 0:
            return other if self.count == 0 else self
        count = self.count + other.count
        shift = other.mean - self.mean
        mean = self.mean + shift * (other.count / count)
        between = shift.square() * (self.count * other.count / count)
        return ChannelMoment(count, mean, self.scatter + other.scatter + between)

    @property
    def deviation(self) -> Tensor:
        """Standard deviation of each channel, normalised by the count, float64, shape ``(channels,)``."""
        return (self.scatter / max(self.count, 1)).sqrt()
