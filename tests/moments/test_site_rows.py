"""Sites and patches: the rows a site reads, times its flattened weight, are what the layer computes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from isthmus.batches import Batch
from isthmus.errors import DataError
from isthmus.matching._layers import affine_layer, matrix_of, tensor_of
from isthmus.moments import RowSample, SiteRunner, find_sites, input_rows, input_statistics
from isthmus.symmetry import trace


def examples(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Scale(nn.Module):
    """A transposed weight layout, as GPT-2's Conv1D has it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(5, 7)), nn.Parameter(torch.randn(7))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x, self.weight)


LAYERS = {
    "linear": (nn.Linear(5, 4), (3, 5)),
    "linear, tokens": (nn.Linear(5, 4), (2, 6, 5)),
    "addmm": (Scale(), (3, 5)),
    "conv1d": (nn.Conv1d(3, 4, 3, padding=1), (2, 3, 8)),
    "conv2d": (nn.Conv2d(3, 4, (3, 2), stride=(2, 1), padding=(1, 0)), (2, 3, 7, 6)),
    "conv2d same": (nn.Conv2d(3, 4, 4, padding="same", dilation=2), (2, 3, 9, 9)),
    "conv2d valid": (nn.Conv2d(3, 4, 3, padding="valid"), (2, 3, 5, 5)),
    "conv2d grouped": (nn.Conv2d(4, 6, 3, groups=2), (2, 4, 5, 5)),
    "conv2d depthwise": (nn.Conv2d(4, 4, 3, groups=4, padding=1, bias=False), (2, 4, 5, 5)),
    "conv3d": (nn.Conv3d(2, 3, 2, stride=2), (2, 2, 4, 4, 4)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_rows_times_the_flattened_weight_are_the_outputs(name: str) -> None:
    layer, shape = LAYERS[name]
    layer = layer.double().eval()
    x = examples(*shape)
    (site,) = find_sites(trace(layer, (x,)))
    weight, bias = affine_layer(layer.state_dict(), site)
    rows = torch.cat(list(input_rows(x, site.convolution)))
    out = layer(x)
    axis = site.channel_axis(out)
    expected = out.movedim(axis, -1).reshape(-1, out.shape[axis])
    groups = 1 if site.convolution is None else site.convolution.groups
    matrix = matrix_of(weight, site)
    blocks = rows.reshape(-1, groups, rows.shape[1])
    found = torch.einsum("ngf,gof->ngo", blocks, matrix.reshape(groups, -1, matrix.shape[1]))
    found = found.reshape(len(expected), -1)
    torch.testing.assert_close(found if bias is None else found + bias, expected)


@pytest.mark.parametrize("name", LAYERS)
def test_matrix_and_tensor_are_inverse(name: str) -> None:
    layer, shape = LAYERS[name]
    (site,) = find_sites(trace(layer.double().eval(), (examples(*shape),)))
    weight = affine_layer(layer.state_dict(), site)[0]
    assert torch.equal(tensor_of(matrix_of(weight, site), weight, site), weight)


def test_transposed_convolutions_read_channels_at_every_position() -> None:
    layer = nn.ConvTranspose2d(3, 4, 2, stride=2).double().eval()
    x = examples(2, 3, 5, 5)
    (site,) = find_sites(trace(layer, (x,)))
    rows = torch.cat(list(input_rows(x, site.convolution)))
    torch.testing.assert_close(rows, x.movedim(1, -1).reshape(-1, 3))
    matrix = matrix_of(layer.weight.detach(), site)
    # windows do not overlap here, so every output is one row times one kernel position
    products = (rows @ matrix.T).reshape(2, 5, 5, 4, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(2, 4, 10, 10)
    torch.testing.assert_close(products + layer.bias.detach()[:, None, None], layer(x).detach())


def test_batch_norm_is_folded_into_the_layer_before_it() -> None:
    net = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3)).double().eval()
    norm = net[1]
    assert isinstance(norm, nn.BatchNorm2d)
    with torch.no_grad():
        for tensor in (norm.weight, norm.bias, norm.running_mean):
            assert tensor is not None
            tensor.normal_()
        assert norm.running_var is not None
        norm.running_var.uniform_(0.5, 2)
    x = examples(2, 2, 5, 5)
    (site,) = find_sites(trace(net, (x,)))
    weight, bias = affine_layer(net.state_dict(), site)
    torch.testing.assert_close(nn.functional.conv2d(x, weight, bias), net(x).detach())


def test_a_norm_after_a_fork_is_not_folded() -> None:
    class Fork(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.norm = nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3)

        def forward(self, x: Tensor) -> Tensor:
            h = self.layer(x)
            return self.norm(h) + h

    (site,) = find_sites(trace(Fork().eval(), (torch.zeros(1, 2, 4, 4),)))
    assert site.norm is None


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
