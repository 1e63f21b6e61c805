"""Numbers too small to matter: processors are slow where they become denormal, so they are set to zero before.

The moments of weights without a gradient, such as those of dead units, shrink by a constant factor at every step and
end among the denormal numbers (below 1.2e-38 in float32), on which an operation takes some hundred cycles. With Adam
at learning rate 0.01 half the moments of the paper's MNIST network got there, and so did gradients once the training
loss was below 1e-5; together they doubled the time of an epoch.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["NEGLIGIBLE", "drop_negligible_moments", "without_negligible"]

NEGLIGIBLE = 1e-30
"""Gradients and moments of this size change no float32 weight above 1e-22, with Adam's ``eps`` of 1e-8 neither."""

_EVERY = 100
"""Steps: in so many a momentum of 0.9 takes what is negligible to 3e-35, which is not denormal yet."""


def drop_negligible_moments(optimiser: torch.optim.Optimizer, step: int) -> None:
    """Set moments of at most :data:`NEGLIGIBLE` to zero in place, at every hundredth step."""
    if step % _EVERY:
        return
    for state in optimiser.state.values():
        for value in state.values():  # moments, and the number of steps, which is at least 1
            if isinstance(value, Tensor):
                value.copy_(without_negligible(value))


def without_negligible(values: Tensor) -> Tensor:
    """Return values with those of at most :data:`NEGLIGIBLE` in magnitude set to zero; NaN stays."""
    return F.hardshrink(values, NEGLIGIBLE)
