"""Statistics of what flows into sites: any batching, bounded samples of wide rows."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from isthmus.batches import Batch
from isthmus.errors import DataError
from isthmus.moments import RowSample, SiteRunner, input_statistics


def examples(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("sizes", [(7,), (4, 3), (1, 6)])
def test_statistics_equal_a_direct_computation_for_any_batching(sizes: tuple[int, ...]) -> None:
    net = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 2)).double().eval()
    x = examples(7, 4)
    runner = SiteRunner(net, Batch((x[:2],)))
    found = input_statistics(
        runner, net.state_dict(), list(x.split(list(sizes))), runner.sites, torch.Generator()
    )
    first, last = found.values()
    hidden = torch.relu(net[0](x)).detach()
    for statistics, h in ((first, x), (last, hidden)):
        torch.testing.assert_close(statistics.mean, h.mean(0))
        torch.testing.assert_close(statistics.second_moment_diagonal, h.square().mean(0))
        weights = examples(3, h.shape[1], seed=2)
        torch.testing.assert_close(statistics.multiply(weights), weights @ (h.T @ h) / 7)


def test_wide_rows_keep_a_bounded_sample_whose_moment_is_close() -> None:
    net = nn.Sequential(nn.Linear(40, 3)).double().eval()
    x = examples(6000, 40) @ examples(40, 40, seed=5)
    runner = SiteRunner(net, Batch((x[:2],)))
    found = input_statistics(
        runner,
        net.state_dict(),
        list(x.split(1000)),
        runner.sites,
        torch.Generator().manual_seed(0),
        max_features=39,
        sample_rows=2000,
    )
    (statistics,) = found.values()
    assert isinstance(statistics.source, RowSample)
    assert statistics.source.rows.shape == (2000, 40)
    assert statistics.source.count == 6000
    exact = x.T @ x / 6000
    error = statistics.multiply(torch.eye(40, dtype=torch.float64)) - exact
    assert float(error.norm() / exact.norm()) < 0.1


def test_a_row_sample_is_uniform_over_the_stream() -> None:
    counts = torch.zeros(60)
    for seed in range(400):
        generator = torch.Generator().manual_seed(seed)
        sample = RowSample(0, torch.empty(0, 1), 12)
        for block in torch.arange(60.0)[:, None].split(7):
            sample = sample.update(block, generator)
        assert len(sample.rows) == 12
        counts[sample.rows.flatten().long()] += 1
    expected = 400 * 12 / 60
    assert bool(((counts - expected).abs() < 5 * expected**0.5).all())


def test_no_data_is_an_error() -> None:
    net = nn.Linear(4, 5).eval()
    runner = SiteRunner(net, Batch((torch.zeros(1, 4),)))
    with pytest.raises(DataError, match="at least one batch"):
        input_statistics(runner, net.state_dict(), [], runner.sites, torch.Generator())
