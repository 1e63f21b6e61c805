"""What holds for every kind of layer, with and without bias, followed by a batch normalisation or not."""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Callable, Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from isthmus.layers import Site, affine_layer, find_sites, input_rows, matrix_of, tensor_of
from isthmus.symmetry import trace
from isthmus.testing import randomise_state


class Product(nn.Module):
    """A product of matrices written as a function, with the weight in one of two layouts."""

    def __init__(self, kind: str, bias: bool) -> None:
        super().__init__()
        outputs_first = kind in ("linear", "matmul transposed")
        self.kind, self.weight = kind, nn.Parameter(torch.randn((4, 6) if outputs_first else (6, 4)))
        self.bias: nn.Parameter | None
        self.register_parameter("bias", nn.Parameter(torch.randn(4)) if bias else None)

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "linear":
            return F.linear(x, self.weight, self.bias)
        if self.kind == "linear of a transpose":
            return F.linear(x, self.weight.T, self.bias)
        if self.kind == "addmm" and self.bias is not None:
            return torch.addmm(self.bias, x, self.weight)
        return x @ (self.weight.t() if self.kind == "matmul transposed" else self.weight)


pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same':UserWarning")
"""One kind of layer pads more on one side than on the other, which PyTorch says once."""

Build = Callable[[bool], nn.Module]
LAYERS: dict[str, tuple[Build, tuple[int, ...]]] = {
    "linear": (lambda bias: nn.Linear(6, 4, bias=bias), (5, 6)),
    "linear, called": (lambda bias: Product("linear", bias), (5, 6)),
    "linear of a transpose": (lambda bias: Product("linear of a transpose", bias), (5, 6)),
    "addmm or matmul": (lambda bias: Product("addmm", bias), (5, 6)),
    "matmul transposed": (lambda bias: Product("matmul transposed", False), (5, 6)),
    "conv1d": (
        lambda bias: nn.Conv1d(6, 4, 3, stride=2, padding=3, dilation=2, bias=bias),
        (2, 6, 9),
    ),
    "conv2d": (
        lambda bias: nn.Conv2d(6, 4, (3, 2), stride=(2, 1), padding=(1, 2), dilation=(1, 2), bias=bias),
        (2, 6, 6, 7),
    ),
    "conv2d same": (lambda bias: nn.Conv2d(6, 4, (4, 2), padding="same", bias=bias), (2, 6, 6, 7)),
    "conv2d valid": (lambda bias: nn.Conv2d(6, 4, 3, padding="valid", bias=bias), (2, 6, 5, 5)),
    "conv2d grouped": (lambda bias: nn.Conv2d(6, 4, 3, groups=2, bias=bias), (2, 6, 5, 5)),
    "conv2d depthwise": (lambda bias: nn.Conv2d(4, 8, 3, groups=4, padding=1, bias=bias), (2, 4, 5, 5)),
    "conv3d": (lambda bias: nn.Conv3d(2, 4, 2, stride=2, bias=bias), (2, 2, 4, 4, 4)),
    "transposed 1d": (lambda bias: nn.ConvTranspose1d(6, 4, 3, dilation=2, bias=bias), (2, 6, 5)),
    "transposed 2d": (
        lambda bias: nn.ConvTranspose2d(6, 4, (2, 3), stride=2, padding=1, output_padding=1, bias=bias),
        (2, 6, 4, 5),
    ),
    "transposed 3d": (lambda bias: nn.ConvTranspose3d(2, 4, 2, stride=2, bias=bias), (2, 2, 2, 3, 2)),
}
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
CASES = list(itertools.product(LAYERS, (None, True, False), (True, False)))


def network(name: str, affine: bool | None, bias: bool) -> tuple[nn.Sequential, Tensor]:
    """Return a layer and, unless ``affine`` is None, a norm, with tensors of no special values; and an input."""
    build, shape = LAYERS[name]
    with torch.random.fork_rng():
        torch.manual_seed(1)
        layer = build(bias)
        x = torch.randn(shape, dtype=torch.float64)
        channels = layer(x.float()).shape[1]
        norm = NORMS[max(len(shape) - 3, 0)](channels, affine=bool(affine), eps=0.1)
    net = nn.Sequential(layer) if affine is None else nn.Sequential(layer, norm)
    return randomise_state(net, torch.Generator().manual_seed(0)).double().eval(), x


class Side(nn.Module):
    """Networks side by side, each with its own input: one trace serves all kinds of layers."""

    def __init__(self, networks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.networks = nn.ModuleList(networks)

    def forward(self, *inputs: Tensor) -> list[Tensor]:
        return [net(x) for net, x in zip(self.networks, inputs, strict=True)]


@functools.cache
def sites(affine: bool | None, bias: bool) -> dict[str, Site]:
    networks, inputs = zip(*(network(name, affine, bias) for name in LAYERS), strict=True)
    found = find_sites(trace(Side(networks), inputs))
    return dict(zip(LAYERS, found, strict=True))


def seen(name: str, affine: bool | None, bias: bool) -> tuple[Site, dict[str, Tensor], nn.Sequential, Tensor]:
    """Return a layer's site, the state under the names that the site has, the network and an input."""
    net, x = network(name, affine, bias)
    prefix = f"networks.{list(LAYERS).index(name)}."
    return sites(affine, bias)[name], {prefix + k: v for k, v in net.state_dict().items()}, net, x


@pytest.mark.parametrize(("name", "affine", "bias"), CASES)
def test_the_folded_layer_is_the_layer_and_then_its_norm(name: str, affine: bool | None, bias: bool) -> None:
    site, state, net, x = seen(name, affine, bias)
    assert (site.norm is None) == (affine is None)
    before = copy.deepcopy(state)
    weight, shift = affine_layer(state, site)
    assert weight.shape == state[site.weight].shape
    assert weight.dtype == torch.float64
    bare = copy.deepcopy(net[0])
    bare.register_parameter("bias", None)
    found = functional_call(bare, {"weight": weight}, (x,))
    if shift is not None:
        found = found + shift.reshape(-1, *[1] * (found.ndim - 2))
    torch.testing.assert_close(found, net(x), rtol=1e-12, atol=1e-12)
    assert all(torch.equal(before[key], value) for key, value in state.items())


@pytest.mark.parametrize("name", LAYERS)
def test_the_matrix_times_patches_is_the_output(name: str) -> None:
    site, state, net, x = seen(name, None, True)
    weight, bias = affine_layer(state, site)
    rows, matrix = torch.cat(list(input_rows(x, site.convolution))), matrix_of(weight, site)
    out = net(x)
    axis = site.channel_axis(out)
    expected = out if bias is None else out - bias.reshape(-1, *[1] * (out.ndim - 1 - axis))
    if site.convolution is not None and site.convolution.turned:
        found = written(rows @ matrix.T, net[0], x, expected)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
        return
    # rows list the groups fastest, and each group of outputs has its own rows of the matrix
    groups = 1 if site.convolution is None else site.convolution.groups
    blocks = rows.unflatten(0, (-1, groups))
    found = torch.einsum("pgf,gof->pgo", blocks, matrix.unflatten(0, (groups, -1))).flatten(1)
    flat = expected.movedim(axis, -1).reshape(-1, expected.shape[axis])
    torch.testing.assert_close(found, flat, rtol=1e-12, atol=1e-12)


def written(products: Tensor, layer: nn.Module, x: Tensor, like: Tensor) -> Tensor:
    """Add up products, one for every input position, output and kernel position, where the convolution writes them."""
    assert isinstance(layer, (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d))
    kernel, outputs = layer.weight.shape[2:], like.shape[1]
    images = products.reshape(len(x), *x.shape[2:], -1).movedim(-1, 1)
    each = torch.eye(images.shape[1], dtype=x.dtype).reshape(-1, outputs, *kernel)
    one_hot = copy.deepcopy(layer)
    one_hot.register_parameter("bias", None)
    return functional_call(one_hot, {"weight": each}, (images,))


@pytest.mark.parametrize("name", LAYERS)
def test_matrix_and_tensor_are_inverse(name: str) -> None:
    site, state, *_ = seen(name, None, True)
    weight = state[site.weight]
    matrix = matrix_of(weight, site)
    assert matrix.ndim == 2
    assert torch.equal(tensor_of(matrix, weight, site), weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
def test_folding_in_low_precision_rounds_the_factor_and_the_product_only(
    dtype: torch.dtype, bias: bool
) -> None:
    """The weight is off by two roundings of its precision, the shift is exact until it is cast."""
    site, state, *_ = seen("conv2d grouped", True, bias)
    state = {name: t.to(dtype) if t.is_floating_point() else t for name, t in state.items()}
    weight, shift = state[site.weight], None if site.bias is None else state[site.bias]
    assert site.norm is not None
    exact, exact_shift = affine_layer(state, site)
    found, found_shift = site.norm.fold(state, weight, shift, dtype=dtype)
    assert found.dtype == dtype
    assert exact_shift is not None
    assert torch.equal(found_shift, exact_shift)
    allowed = (2 + torch.finfo(dtype).eps) * torch.finfo(dtype).eps / 2
    assert bool(((found.double() - exact).abs() <= allowed * exact.abs()).all())
