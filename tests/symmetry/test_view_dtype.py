"""Views as another dtype read the same bytes as other entries: they are no reshape, and pin what they touch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import isthmus


class Viewed(nn.Module):
    """Hidden units seen in pairs as complex numbers, and back."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(3, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.first(x))
        turned = hidden.view(torch.complex64 if x.dtype == torch.float32 else torch.complex128) * 1j
        return self.last(torch.view_as_real(turned).flatten(-2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_view_as_another_dtype_ends_and_pins(dtype: torch.dtype) -> None:
    net = Viewed().eval().to(dtype)
    x = torch.randn(2, 3, dtype=dtype)
    spec = isthmus.discover(net, x)
    assert isthmus.verify(spec, net, x).passed
    assert not any("first.weight" in {slot.tensor for slot in g.slots} for g in spec.groups.values())
