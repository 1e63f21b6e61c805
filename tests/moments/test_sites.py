"""Sites: weight layouts, what is no site, folded norms, and the rarer convolutions."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from isthmus.batches import Batch
from isthmus.matching._layers import affine_layer, matrix_of, tensor_of
from isthmus.moments import Site, SiteRunner, find_sites, input_rows
from isthmus.states import state_of
from isthmus.symmetry import trace


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def seeded(factory: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return factory().eval().double()


def seen_at_sites(model: nn.Module, x: Tensor) -> list[tuple[Site, Tensor, Tensor]]:
    """Every site with what flows in and what comes out."""
    runner = SiteRunner(model, Batch((x,)))
    inflow: dict[str, Tensor] = {}
    outflow: dict[str, Tensor] = {}
    runner.run(
        state_of(model),
        Batch((x,)),
        inflow=lambda site, value: inflow.__setitem__(site.name, value),
        outflow=lambda site, value: outflow.__setitem__(site.name, value),
    )
    return [(site, inflow[name], outflow[name]) for name, site in runner.sites.items()]


CONVOLUTIONS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "stride, padding, dilation": (lambda: nn.Conv1d(3, 5, 3, stride=2, padding=3, dilation=2), (2, 3, 9)),
    "uneven": (
        lambda: nn.Conv2d(3, 5, (3, 2), stride=(2, 1), padding=(1, 2), dilation=(1, 2)),
        (2, 3, 6, 7),
    ),
    "same, even kernel": (lambda: nn.Conv2d(3, 5, (4, 2), padding="same"), (2, 3, 6, 7)),
    "one image": (lambda: nn.Conv2d(3, 5, 3, bias=False), (3, 6, 7)),
    "depthwise multiplier": (lambda: nn.Conv2d(4, 8, 3, groups=4), (2, 4, 5, 5)),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_patches_times_flattened_kernel_are_the_convolution(name: str) -> None:
    build, shape = CONVOLUTIONS[name]
    layer = seeded(build)
    x = torch.randn(shape, generator=generator(1), dtype=torch.float64)
    ((site, inflow, outflow),) = seen_at_sites(layer, x)
    weight, bias = affine_layer(state_of(layer), site)
    assert site.convolution is not None
    rows = torch.cat(list(input_rows(inflow, site.convolution)))
    matrix = matrix_of(weight, site)
    groups = site.convolution.groups
    # Rows list the groups fastest; each group of outputs has its own rows of the kernel.
    by_group = rows.unflatten(0, (-1, groups))
    result = torch.einsum("pgf,gof->pgo", by_group, matrix.unflatten(0, (groups, -1))).flatten(1)
    if bias is not None:
        result = result + bias
    images = outflow if outflow.ndim == site.convolution.dimensions + 2 else outflow[None]
    assert torch.allclose(result, images.movedim(1, -1).reshape(-1, images.shape[1]), rtol=1e-12, atol=1e-12)


def test_overlapping_transposed_convolution_rows_are_the_input_positions() -> None:
    """Documented: one row per input position; each kernel position multiplies the same rows."""
    layer = seeded(lambda: nn.ConvTranspose2d(3, 5, 3, stride=2, padding=1))
    x = torch.randn(2, 3, 4, 5, generator=generator(1), dtype=torch.float64)
    ((site, inflow, outflow),) = seen_at_sites(layer, x)
    assert (site.in_axis, site.out_axis) == (0, 1)
    rows = torch.cat(list(input_rows(inflow, site.convolution)))
    weight, bias = affine_layer(state_of(layer), site)
    assert bias is not None
    # Scatter the products to where each kernel position writes: this is the transposed convolution.
    products = (rows @ matrix_of(weight, site).T).reshape(2, 20, -1).transpose(1, 2)
    written = F.fold(products, outflow.shape[2:], 3, stride=2, padding=1)
    assert torch.allclose(written + bias[:, None, None], outflow, atol=1e-12)


def test_patches_come_in_blocks_of_bounded_size(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = seeded(lambda: nn.Conv2d(2, 3, 3, padding=1))
    x = torch.randn(7, 2, 5, 5, generator=generator(), dtype=torch.float64)
    ((site, inflow, _),) = seen_at_sites(layer, x)
    whole = torch.cat(list(input_rows(inflow, site.convolution)))
    monkeypatch.setattr("isthmus.moments._patches._BLOCK_BYTES", 3 * 8 * 25 * 18)
    blocks = list(input_rows(inflow, site.convolution))
    assert [len(b) for b in blocks] == [75, 75, 25]
    assert torch.equal(torch.cat(blocks), whole)


class _Function(nn.Module):
    """A layer written as a function call, with its weight in one of two layouts."""

    def __init__(self, compute: Callable[[Tensor, Tensor, Tensor], Tensor], shape: tuple[int, int]) -> None:
        super().__init__()
        self.compute = compute
        self.weight = nn.Parameter(torch.randn(shape))
        self.bias = nn.Parameter(torch.randn(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.compute(x, self.weight, self.bias)


LAYOUTS: dict[
    str, tuple[Callable[[Tensor, Tensor, Tensor], Tensor], tuple[int, int], tuple[int, int], bool]
] = {
    "addmm transposed": (lambda x, w, b: torch.addmm(b, x, w.T), (4, 3), (1, 0), True),
    "matmul": (lambda x, w, b: x @ w + b, (3, 4), (0, 1), False),
    "matmul transposed": (lambda x, w, b: x @ w.t() + b, (4, 3), (1, 0), False),
    "matmul permuted": (lambda x, w, b: x @ w.permute(1, 0) + b, (4, 3), (1, 0), False),
    "matmul swapped": (lambda x, w, b: x @ w.transpose(-1, -2) + b, (4, 3), (1, 0), False),
    "mm": (lambda x, w, b: torch.mm(x, w) + b, (3, 4), (0, 1), False),
    "linear of a transpose": (lambda x, w, b: F.linear(x, w.T, b), (3, 4), (0, 1), True),
    "linear": (lambda x, w, b: F.linear(x, w, b), (4, 3), (1, 0), True),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_both_weight_layouts_are_read(name: str) -> None:
    compute, shape, axes, has_bias = LAYOUTS[name]
    layer = seeded(lambda: _Function(compute, shape))
    x = torch.randn(5, 3, generator=generator(), dtype=torch.float64)
    ((site, inflow, outflow),) = seen_at_sites(layer, x)
    assert (site.in_axis, site.out_axis) == axes
    weight, bias = affine_layer(state_of(layer), site)
    assert (bias is not None) == has_bias
    product = torch.cat(list(input_rows(inflow, None))) @ matrix_of(weight, site).T
    assert torch.allclose(product if bias is None else product + bias, outflow)


def test_what_is_no_site() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(3, 3))
            self.v = nn.Parameter(torch.randn(3, 3))

        def forward(self, x: Tensor) -> Tensor:
            mixed = self.v @ self.w  # two parameters, no activation
            return (self.w @ x.T).T + x @ (x.T @ x) + mixed.sum()

    model = seeded(Model)
    assert find_sites(trace(model, (torch.zeros(2, 3, dtype=torch.float64),))) == ()


def test_grouped_transposed_convolutions_are_no_sites() -> None:
    layer = seeded(lambda: nn.ConvTranspose2d(4, 4, 2, groups=2))
    assert find_sites(trace(layer, (torch.zeros(1, 4, 3, 3, dtype=torch.float64),))) == ()


def _normed(build: Callable[[], nn.Module], norm: Callable[[], nn.Module]) -> nn.Module:
    model = seeded(lambda: nn.Sequential(build(), norm()))
    assert isinstance(model[1], nn.Module)
    with torch.no_grad():
        for name, tensor in [*model[1].named_parameters(), *model[1].named_buffers()]:
            if tensor.is_floating_point():
                draw = torch.rand(tensor.shape, generator=generator(3), dtype=torch.float64)
                tensor.copy_(draw + 0.5 if name.endswith("var") else 2 * draw - 1)
    return model


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("kind", ["linear", "conv no bias", "transposed"])
def test_folded_batch_norm_is_the_layer_and_its_norm(kind: str, affine: bool) -> None:
    build: dict[str, tuple[Callable[[], nn.Module], Callable[[], nn.Module], tuple[int, ...]]] = {
        "linear": (lambda: nn.Linear(3, 4), lambda: nn.BatchNorm1d(4, affine=affine), (6, 3)),
        "conv no bias": (
            lambda: nn.Conv2d(3, 4, 3, bias=False),
            lambda: nn.BatchNorm2d(4, affine=affine, eps=0.1),
            (2, 3, 5, 5),
        ),
        "transposed": (
            lambda: nn.ConvTranspose2d(3, 4, 2, stride=2),
            lambda: nn.BatchNorm2d(4, affine=affine),
            (2, 3, 4, 4),
        ),
    }
    layer, norm, shape = build[kind]
    model = _normed(layer, norm)
    x = torch.randn(shape, generator=generator(1), dtype=torch.float64)
    ((site, inflow, outflow),) = seen_at_sites(model, x)
    assert site.norm is not None
    assert torch.equal(outflow, model(x)), "the site's outflow is what comes out of the norm"
    weight, bias = affine_layer(state_of(model), site)
    assert bias is not None
    assert weight.shape == model.get_parameter("0.weight").shape
    if kind == "linear":
        again = F.linear(inflow, weight, bias)
    elif kind == "transposed":
        again = F.conv_transpose2d(inflow, weight, bias, stride=2)
    else:
        again = F.conv2d(inflow, weight, bias)
    assert torch.allclose(again, model(x), rtol=1e-12, atol=1e-12)


def test_matrix_and_tensor_are_inverse_for_transposed_convolutions() -> None:
    layer = seeded(lambda: nn.ConvTranspose2d(3, 4, (2, 3)))
    ((site, *_),) = seen_at_sites(layer, torch.zeros(1, 3, 5, 5, dtype=torch.float64))
    weight, _ = affine_layer(state_of(layer), site)
    assert torch.equal(tensor_of(matrix_of(weight, site), weight, site), weight)
