"""Joint second moments of what flows into the same layers of two networks."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from isthmus.batches import Batch
from isthmus.moments import PairedInputRequest, RowSample, SiteRunner, collected
from isthmus.states import state_of


def found(net: nn.Module, other: nn.Module, x: Tensor) -> dict:
    batches = [Batch((x[: len(x) // 2],)), Batch((x[len(x) // 2 :],))]
    runner = SiteRunner(net, batches[0])
    request = PairedInputRequest(runner.sites, torch.Generator().manual_seed(0))
    return collected(runner, batches, [request], state_of(net), state_of(other))[0]


def drawn(*parts: nn.Module, seed: int) -> nn.Module:
    net = nn.Sequential(*parts).eval().double()
    generator = torch.Generator().manual_seed(seed)
    for tensor in state_of(net).values():
        with torch.no_grad():
            tensor.copy_(torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype))
    return net


def test_rows_of_both_networks_stand_side_by_side() -> None:
    a, b = (drawn(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2), seed=s) for s in (0, 1))
    x = torch.randn(40, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    first, second = found(a, b, x).values()
    with torch.no_grad():
        hidden = torch.cat([net[:2](x) for net in (a, b)], 1)  # pyright: ignore[reportIndexIssue]
    assert torch.allclose(
        first.multiply(torch.eye(6).double()), torch.cat([x, x], 1).T @ torch.cat([x, x], 1) / 40
    )
    assert torch.allclose(second.multiply(torch.eye(8).double()), hidden.T @ hidden / 40)


def test_of_many_positions_some_are_drawn_and_the_same_of_both() -> None:
    a, b = (drawn(nn.Conv2d(1, 1, 1), nn.Conv2d(1, 2, 1), seed=s) for s in (0, 1))
    x = torch.randn(8, 1, 32, 32, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    first, _ = found(a, b, x).values()
    assert first.source.count == 2 * 2048
    moment = first.multiply(torch.eye(2).double())
    assert torch.allclose(moment, moment[0, 0].expand(2, 2))  # equal rows: the networks read the same pixels


def test_of_wide_rows_a_sample_is_kept() -> None:
    a, b = (drawn(nn.Linear(1200, 1), seed=s) for s in (0, 1))
    x = torch.randn(6, 1200, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    (only,) = found(a, b, x).values()
    assert isinstance(only.source, RowSample)
    assert torch.equal(only.source.rows, torch.cat([x, x], 1))
