"""Sites: weight layouts, what is no site, what is no norm of a site, and patches in blocks."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from isthmus import layers
from isthmus.batches import Batch
from isthmus.layers import BatchNorm, Site, affine_layer, find_sites, input_rows, matrix_of
from isthmus.matching import align
from isthmus.moments import SiteRunner
from isthmus.states import state_of
from isthmus.symmetry import discover, trace
from isthmus.testing import planted_pair, randomise_state


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


def test_patches_come_in_blocks_of_bounded_size(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = seeded(lambda: nn.Conv2d(2, 3, 3, padding=1))
    x = torch.randn(7, 2, 5, 5, generator=generator(), dtype=torch.float64)
    ((site, inflow, _),) = seen_at_sites(layer, x)
    whole = torch.cat(list(input_rows(inflow, site.convolution)))
    monkeypatch.setattr("isthmus.layers._convolution._BLOCK_BYTES", 3 * 8 * 25 * 18)
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


def the_norm(forward: Callable[[_Net, Tensor], Tensor], x: Tensor) -> object:
    """Return the norm that folds into the first site of a network."""
    net = seeded(lambda: _Net(forward))
    return find_sites(trace(net, (x,)))[0].norm


class _Net(nn.Module):
    """A layer, a norm and what a function makes of them."""

    def __init__(self, forward: Callable[[_Net, Tensor], Tensor]) -> None:
        super().__init__()
        self.layer, self.norm, self.compute = nn.Linear(5, 5), nn.BatchNorm1d(5), forward
        self.offset = nn.Parameter(torch.randn(5))

    def forward(self, x: Tensor) -> Tensor:
        return self.compute(self, x)


def _normed(net: _Net, x: Tensor, weight: Tensor, mean: Tensor | None = None) -> Tensor:
    norm = net.norm
    mean = norm.running_mean if mean is None else mean
    return F.batch_norm(net.layer(x), mean, norm.running_var, weight, norm.bias)


NOT_FOLDED: dict[str, tuple[Callable[[_Net, Tensor], Tensor], tuple[int, ...]]] = {
    "the layer's value is read twice": (lambda n, x: n.norm(h := n.layer(x)) + h, (2, 5)),
    "units on another axis than the norm's": (lambda n, x: n.norm(n.layer(x)), (2, 5, 5)),
    "a computed gain": (lambda n, x: _normed(n, x, n.norm.weight.exp()), (2, 5)),
    "a computed mean": (lambda n, x: _normed(n, x, n.norm.weight, n.offset.exp()), (2, 5)),
    "a computed bias": (lambda n, x: n.norm(F.linear(x, n.layer.weight, n.offset.exp())), (2, 5)),
    "a scaled bias": (lambda n, x: n.norm(torch.addmm(n.offset, x, n.layer.weight.T, beta=0.5)), (2, 5)),
    "a scaled product": (lambda n, x: n.norm(torch.addmm(n.offset, x, n.layer.weight.T, alpha=2)), (2, 5)),
    "a bias for every row": (lambda n, x: n.norm(torch.addmm(n.layer.weight, x, n.layer.weight)), (5, 5)),
    "the mean of another": (lambda n, x: F.batch_norm(x, n.layer(x[0]), n.norm.running_var), (2, 5)),
}


@pytest.mark.parametrize("name", NOT_FOLDED)
def test_a_norm_that_is_no_part_of_an_affine_layer_is_not_folded(name: str) -> None:
    forward, shape = NOT_FOLDED[name]
    assert the_norm(forward, torch.zeros(shape, dtype=torch.float64)) is None


def test_a_norm_with_a_gain_of_the_state_is_folded() -> None:
    """The positive twin of what is refused above."""
    found = the_norm(lambda n, x: _normed(n, x, n.norm.weight), torch.zeros(2, 5, dtype=torch.float64))
    assert found == BatchNorm("norm.weight", "norm.bias", "norm.running_mean", "norm.running_var", 1e-5)


def test_a_convolution_with_another_layout_of_weights_is_no_site() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.bias = nn.Parameter(torch.randn(3, 4, 6)), nn.Parameter(torch.randn(6))

        def forward(self, x: Tensor) -> Tensor:
            return torch.conv_tbc(x, self.weight, self.bias, 1)

    assert find_sites(trace(seeded(Model), (torch.zeros(5, 2, 4, dtype=torch.float64),))) == ()


@pytest.mark.parametrize("length", [5, 8])
def test_tokens_normalised_along_their_positions_are_aligned(length: int) -> None:
    """A norm over positions behind a layer of eight units: its channels are no units, whatever their number."""

    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.norm, self.head = nn.Linear(8, 8), nn.BatchNorm1d(length), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.relu(self.norm(self.layer(x)))).mean(1)

    net = randomise_state(seeded(Tokens), generator()).eval()
    x = torch.randn(6, length, 8, generator=generator(1), dtype=torch.float64)
    a, b, planted = planted_pair(net, discover(net, (x,)), generator=generator(2))
    net.load_state_dict(a)
    found = align(net, b, batches=[Batch((x,))], method="covariance")
    assert all(torch.equal(found.permutations[name], index) for name, index in planted.items())


def test_every_public_name_is_documented() -> None:
    for name in layers.__all__:
        value = getattr(layers, name)
        assert isinstance(value, frozenset) or value.__doc__, name
