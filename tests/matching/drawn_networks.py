"""Networks with random entries, from seeds."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from isthmus.testing import randomise_state


def generator(seed: int = 0) -> torch.Generator:
    """Return a generator with a seed."""
    return torch.Generator().manual_seed(seed)


def drawn(build: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    """Return a network whose parameters and buffers are drawn, in evaluation mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return randomise_state(build(), generator(seed)).eval()
