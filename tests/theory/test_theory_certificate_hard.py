"""Attempts to break certificates: odd operators, extreme weights, random networks. The bound holds or names why not."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from isthmus.batches import Batch
from isthmus.certificates._activations import slope_gap
from isthmus.certificates._norms import convolution_norm, matrix_norm
from isthmus.errors import CheckpointError, DataError, ModelError
from isthmus.testing import mlp
from isthmus.theory import Certificate, certify

Forward = Callable[[Any, Tensor], Tensor]


class Net(nn.Module):
    """Layers by name and a forward function of them."""

    def __init__(self, forward: Forward, **layers: nn.Module) -> None:
        super().__init__()
        self.function = forward
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def examples(*shape: int, seed: int = 3) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def two(make: Callable[[], nn.Module], change: Callable[[Any], None] | None = None) -> list[nn.Module]:
    """Two networks from different seeds."""
    found = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        found.append(make().double().eval())
        if change is not None:
            with torch.no_grad():
                change(found[-1])
    return found


def sup_errors(a: nn.Module, b: nn.Module, x: Tensor, points: int = 65) -> tuple[float, Tensor]:
    """Largest mean error over the grid, and the largest error of every example."""
    first, last = a.state_dict(), b.state_dict()
    worst, mean = torch.zeros(len(x), dtype=torch.float64), 0.0
    with torch.no_grad():
        ends = a(x), b(x)
        for t in torch.linspace(0, 1, points, dtype=torch.float64).tolist():
            state = {k: (1 - t) * v + t * last[k] for k, v in first.items()}
            found = torch.func.functional_call(a, state, (x,))
            error = (found - ((1 - t) * ends[0] + t * ends[1])).reshape(len(x), -1).norm(dim=1)
            worst, mean = torch.maximum(worst, error), max(mean, float(error.mean()))
    return mean, worst


def check(a: nn.Module, b: nn.Module, x: Tensor, segments: int) -> Certificate:
    found = certify(a, b, [x], segments=segments)
    mean, worst = sup_errors(a, b, x)
    assert mean <= found.lmc_error
    assert bool((worst <= found.per_example).all())
    return found


def square(n: int = 6) -> nn.Linear:
    return nn.Linear(n, n)


IN_SCOPE: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "a sum of one node and its multiple": (
        lambda: Net(lambda s, x: torch.add(s.a(x).relu(), s.a(x).relu(), alpha=5), a=square()),
        (5, 6),
    ),
    "a node added to itself": (
        lambda: Net(lambda s, x: (lambda h: torch.add(h, h, alpha=5))(s.a(x).relu()), a=square()),
        (5, 6),
    ),
    "a difference": (lambda: Net(lambda s, x: torch.sub(s.a(x).relu(), x, alpha=3), a=square()), (5, 6)),
    "elu with a scale": (
        lambda: Net(lambda s, x: torch.ops.aten.elu(s.a(x), 1.0, 7.0, 1.0), a=square()),
        (5, 6),
    ),
    "elu with a kink": (lambda: Net(lambda s, x: s.b(functional.elu(s.a(x), 2.5)), a=square(), b=square()), (5, 6)),
    "celu": (lambda: Net(lambda s, x: s.b(functional.celu(s.a(x), 0.3)), a=square(), b=square()), (5, 6)),
    "softplus with a jump": (
        lambda: Net(lambda s, x: s.b(functional.softplus(s.a(x), 2.0, 0.1)), a=square(), b=square()),
        (5, 6),
    ),
    "steep leaky relu": (
        lambda: Net(lambda s, x: s.b(functional.leaky_relu(s.a(x), 3.0)), a=square(), b=square()),
        (5, 6),
    ),
    "folding leaky relu": (
        lambda: Net(lambda s, x: s.b(functional.leaky_relu(s.a(x), -2.0)), a=square(), b=square()),
        (5, 6),
    ),
    "randomised relu": (lambda: Net(lambda s, x: s.b(s.r(s.a(x))), a=square(), b=square(), r=nn.RReLU()), (5, 6)),
    "gelu by tanh": (
        lambda: Net(lambda s, x: s.b(functional.gelu(4 * s.a(x), approximate="tanh")), a=square(), b=square()),
        (5, 6),
    ),
    "hardswish": (lambda: Net(lambda s, x: s.b(functional.hardswish(9 * s.a(x))), a=square(), b=square()), (5, 6)),
    "one layer three times": (
        lambda: Net(lambda s, x: s.b(s.a(s.a(s.a(x).relu()).relu()).relu()), a=square(), b=square()),
        (5, 6),
    ),
    "dropout in evaluation": (
        lambda: nn.Sequential(square(), nn.Tanh(), nn.Dropout(0.5), square(), nn.ReLU(), square()),
        (5, 6),
    ),
    "a projection around": (
        lambda: Net(lambda s, x: s.c((s.a(x).relu() + s.p(x)).relu()), a=square(), p=square(), c=square()),
        (5, 6),
    ),
    "parts joined": (
        lambda: Net(
            lambda s, x: s.b(torch.cat([t.tanh() for t in s.a(x).chunk(3, dim=1)][::-1], -1)), a=square(), b=square()
        ),
        (5, 6),
    ),
    "positions": (lambda: nn.Sequential(square(), nn.ReLU(), square(), nn.Flatten()), (3, 4, 6)),
    "transposed within": (
        lambda: Net(lambda s, x: s.b(s.a(x).relu().transpose(1, 2)).flatten(1), a=square(), b=nn.Linear(4, 2)),
        (3, 4, 6),
    ),
    "transposed weight": (
        lambda: Net(lambda s, x: functional.linear(s.a(x).relu(), s.b.weight.t()), a=square(), b=square()),
        (5, 6),
    ),
    "added parameter": (
        lambda: Net(
            lambda s, x: s.b((s.a(x) + s.p.weight.reshape(6)).relu()), a=square(), b=square(), p=nn.Linear(2, 3)
        ),
        (5, 6),
    ),
    "joined parameter": (
        lambda: Net(lambda s, x: s.b(torch.cat([s.a(x).relu(), s.p.weight.expand(5, 6)], 1)), a=square(),
                    b=nn.Linear(12, 3), p=nn.Linear(6, 1)),
        (5, 6),
    ),
    "learned slopes": (lambda: nn.Sequential(square(), nn.PReLU(6), square()), (5, 6)),
    "one learned slope": (
        lambda: nn.Sequential(nn.Conv2d(2, 3, 3), nn.PReLU(), nn.Flatten(), nn.Linear(48, 2)),
        (3, 2, 6, 6),
    ),
    "overlapping averages": (
        lambda: nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.AvgPool2d(3, 1, 1), nn.Flatten(), nn.Linear(48, 2)),
        (3, 2, 6, 6),
    ),
    "padded maxima": (
        lambda: nn.Sequential(nn.Conv2d(2, 3, 3), nn.MaxPool2d(3, 2, 1), nn.Flatten(), nn.Linear(12, 2)),
        (3, 2, 6, 6),
    ),
    "dilated maxima": (
        lambda: nn.Sequential(nn.Conv2d(2, 3, 3), nn.Tanh(), nn.MaxPool2d(2, 1, 1, dilation=2), nn.Conv2d(3, 2, 2)),
        (3, 2, 6, 6),
    ),
    "maxima in three dimensions": (
        lambda: nn.Sequential(nn.Conv3d(1, 2, 2), nn.MaxPool3d(2, 1), nn.AvgPool3d(2), nn.Flatten(), nn.Linear(2, 2)),
        (3, 1, 4, 4, 4),
    ),
    "same padding and groups": (
        lambda: nn.Sequential(
            nn.Conv2d(2, 4, 3, padding="same"), nn.ReLU(), nn.Conv2d(4, 4, 4, padding="same", groups=2)
        ),
        (3, 2, 5, 5),
    ),
    "strided and dilated": (
        lambda: nn.Sequential(nn.Conv2d(2, 4, 3, stride=2, padding=4, dilation=2), nn.ReLU(), nn.Conv2d(4, 2, 2)),
        (3, 2, 6, 6),
    ),
    "transposed convolution": (
        lambda: nn.Sequential(
            nn.Conv2d(2, 4, 3), nn.ReLU(), nn.ConvTranspose2d(4, 4, 3, 2, 1, output_padding=1, groups=2, dilation=2)
        ),
        (3, 2, 5, 5),
    ),
    "enlarged images": (
        lambda: nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Upsample(scale_factor=2), nn.Conv2d(3, 2, 3)),
        (3, 2, 5, 5),
    ),
    "shuffled pixels": (
        lambda: nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.PixelShuffle(2), nn.Conv2d(1, 1, 3)),
        (2, 1, 4, 4),
    ),
}  # fmt: skip


def slopes(model: nn.Module) -> None:
    """Learned slopes far from their usual value, of both signs."""
    for layer in model.modules():
        if isinstance(layer, nn.PReLU):
            layer.weight.copy_(3 * torch.randn(layer.weight.shape))


@pytest.mark.parametrize("name", IN_SCOPE)
def test_odd_operators_are_bounded(name: str) -> None:
    make, shape = IN_SCOPE[name]
    a, b = two(make, slopes)
    assert check(a, b, examples(*shape), 1).lmc_error > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("name", IN_SCOPE)
def test_odd_operators_are_bounded_segment_by_segment(name: str) -> None:
    make, shape = IN_SCOPE[name]
    a, b = two(make, slopes)
    check(a, b, examples(*shape), 3)


OUT_OF_SCOPE: dict[str, tuple[Forward, str]] = {
    "selects an example": (
        lambda s, x: s.a(x).relu()[0].unsqueeze(1),
        "aten.select is out of scope: it mixes",
    ),
    "narrows": (lambda s, x: s.a(x)[:3], "aten.slice is out of scope: it mixes examples"),
    "joins examples": (
        lambda s, x: torch.cat([s.a(x), x], -2),
        "aten.cat is out of scope: it joins examples",
    ),
    "stacks examples": (lambda s, x: torch.stack([s.a(x), x], -3), "it joins examples"),
    "joins a function of weights": (
        lambda s, x: torch.cat([s.a(x), s.b.weight.tanh()], 1),
        "aten.cat is out of scope: what is joined is a nonlinear",
    ),
    "adds a function of weights": (lambda s, x: s.a(x) + s.b.bias.tanh(), "what is added is a nonlinear"),
    "squeezes a bias": (
        lambda s, x: functional.linear(x, s.a.weight, s.a.bias.tanh()),
        "aten.linear is out of scope: its bias is not a parameter",
    ),
    "rounds down": (lambda s, x: torch.div(s.a(x), 0.1, rounding_mode="floor"), "aten.div .*: it rounds"),
    "counts": (lambda s, x: s.b((20 * s.a(x)).long().double()), r"it makes torch\.int64"),
    "halves precision": (lambda s, x: s.a(x).float().double(), r"it makes torch\.float32"),
    "learns where to clamp": (
        lambda s, x: torch.clamp(s.a(x), max=s.a.bias),
        "aten.clamp is out of scope: its settings are tensors",
    ),
    "sums everything": (lambda s, x: s.a(x).relu().sum(dim=()), "aten.sum is out of scope: it mixes"),
    "sums examples": (lambda s, x: s.a(x).relu().sum(dim=-2), "aten.sum is out of scope: it mixes"),
    "scales a product": (
        lambda s, x: torch.addmm(s.b.weight, s.a(x).relu(), s.a.weight, alpha=50.0),
        "aten.addmm .*: its weights depend|aten.addmm .*: only alpha",
    ),
    "adds its transpose": (lambda s, x: s.a(x) + s.a(x).t(), "aten.t is out of scope: it mixes"),
    "wraps around": (
        lambda s, x: functional.pad(s.a(x).unsqueeze(1), (1, 1), mode="circular").squeeze(1),
        "only constant padding",
    ),
    "steep the other way": (
        lambda s, x: functional.celu(s.a(x), -1.0),
        "aten.celu .*: alpha must be above 0",
    ),
    "does not depend on data": (lambda s, x: s.a.weight.tanh(), "the output does not depend on the input"),
}


@pytest.mark.parametrize("name", OUT_OF_SCOPE)
def test_what_would_break_the_bound_is_refused(name: str) -> None:
    forward, words = OUT_OF_SCOPE[name]
    a, b = two(lambda: Net(forward, a=square(), b=square()))
    with pytest.raises(ModelError, match=words):
        certify(a, b, [examples(6, 6)], segments=1)


def square_layers() -> dict[str, nn.Module]:
    return {
        "a": nn.Linear(4, 4),
        "b": nn.Linear(4, 4),
        "c": nn.Conv2d(4, 4, 3, padding=1),
        "d": nn.Conv1d(4, 4, 1),
    }


MIXING: dict[str, tuple[Forward, int]] = {
    # name: forward of a value whose axes all have length 4, and their number
    "a linear layer without examples": (lambda s, x: s.a(x), 1),
    "a convolution of one image": (lambda s, x: s.c(s.c(x).relu()), 3),
    "a convolution of one row": (lambda s, x: s.d(s.d(x).relu()), 2),
    "pooling of one image": (lambda s, x: functional.max_pool2d(s.a(x), 3, 1, 1), 3),
    "pixels of one image": (
        lambda s, x: functional.pixel_unshuffle(functional.pixel_shuffle(s.a(x), 2), 2),
        3,
    ),
    "a pad and a crop": (lambda s, x: s.b(functional.pad(s.a(x).relu(), [0, 0, 1, -1])), 2),
    "a crop and a pad": (lambda s, x: s.b(functional.pad(s.a(x).relu(), [0, 0, -2, 2], value=1.0)), 2),
    "a pad of all axes": (lambda s, x: s.b(functional.pad(s.a(x), [0, 0, 0, 0, 2, -2])), 3),
    "a roll": (lambda s, x: s.b(s.a(x).relu().roll(1, 0)), 2),
    "a flip": (lambda s, x: s.b(s.a(x).relu().flip(0)), 2),
    "a running sum": (lambda s, x: s.b(s.a(x).relu().cumsum(0)), 2),
    "an order": (lambda s, x: s.b(s.a(x).sort(0).values), 2),
    "a choice": (lambda s, x: s.b(s.a(x).relu().index_select(0, torch.tensor([1, 0, 3, 2]))), 2),
    "a turn": (lambda s, x: s.b(s.a(x).relu().transpose(-2, -1)), 2),
    "a permutation": (lambda s, x: s.b(s.a(x).relu().permute(1, 0, 2)), 3),
    "an axis moved": (lambda s, x: s.b(s.a(x).relu().movedim(0, -1)), 3),
    "a merged turn": (lambda s, x: s.b(s.a(x).relu().reshape(2, 8).t().reshape(4, 4)), 2),
    "halves exchanged": (lambda s, x: s.b(torch.cat(s.a(x).relu().chunk(2, 0)[::-1])), 2),
    "a mean": (lambda s, x: s.b(s.a(x).relu() + s.a(x).mean(0, keepdim=True)), 2),
    "a sum of negative axis": (lambda s, x: s.b(s.a(x).relu() + s.a(x).sum(-2)), 2),
    "a product": (lambda s, x: s.b(s.a(x).relu() @ s.a(x)), 2),
    "a softmax": (lambda s, x: s.b(s.a(x).softmax(0)), 2),
    "examples spread out": (lambda s, x: s.b(s.a(x)[:1].expand(4, 4)), 2),
    "batch statistics": (lambda s, x: functional.batch_norm(s.a(x), None, None, training=True), 2),
}


@pytest.mark.parametrize("name", MIXING)
def test_whatever_mixes_examples_is_refused(name: str) -> None:
    forward, rank = MIXING[name]
    a, b = two(lambda: Net(forward, **square_layers()))
    with pytest.raises(ModelError, match=r"out of scope|has no weight of its own|has no running"):
        certify(a, b, [examples(*[4] * rank)], segments=1)


KEEPING: dict[str, tuple[Forward, int]] = {
    "a pad of space": (lambda s, x: s.b(functional.pad(s.a(x).relu(), [1, -1])), 2),
    "a crop of the middle": (lambda s, x: s.b(functional.pad(s.a(x).relu(), [0, 0, -1, 1])), 3),
    "no pad at all": (lambda s, x: s.b(functional.pad(s.a(x).relu(), [0, 0, 0, 0])), 2),
    "a whole slice": (lambda s, x: s.b(s.a(x).relu()[0:4]), 2),
    "a turn behind": (lambda s, x: s.b(s.a(x).relu().transpose(1, 2)), 3),
    "an axis for the examples": (lambda s, x: s.c(s.c(x).relu()), 4),
    "made constants": (lambda s, x: s.b(s.a(x).relu() + torch.ones(4) * torch.arange(4.0)), 2),
    "the other name": (lambda s, x: s.b(torch.add(s.a(x).relu(), other=s.a(x).tanh(), alpha=3)), 2),
}  # fmt: skip


@pytest.mark.parametrize("name", KEEPING)
def test_what_keeps_examples_apart_is_bounded(name: str) -> None:
    forward, rank = KEEPING[name]
    a, b = two(lambda: Net(forward, **square_layers()))
    assert check(a, b, examples(*[4] * rank), 2).lmc_error > 1e-3


@pytest.mark.parametrize(
    ("factor", "mode"), [(1.05, "nearest"), (1.3, "nearest-exact"), (1.7, "nearest"), (0.7, "nearest")]
)
def test_enlarging_by_any_factor(factor: float, mode: str) -> None:
    """Some pixels are repeated more often than the lengths before and after tell."""

    def forward(s: Any, x: Tensor) -> Tensor:
        return functional.interpolate(s.c(x).tanh(), scale_factor=factor, mode=mode)

    a, b = two(lambda: Net(forward, c=nn.Conv2d(1, 2, 1)))
    x = torch.zeros(10, 1, 10, 10, dtype=torch.float64)
    x[range(10), 0, range(10), range(10)] = 3.0  # all of the error in one pixel, another one in every example
    check(a, b, x, 1)


def test_a_picture_that_repeats_one_pixel_most() -> None:
    # 10 pixels enlarged by 1.05 are 10 again, the first of them twice; its error counts twice, per axis.
    a, b = two(
        lambda: Net(
            lambda s, x: functional.interpolate(s.c(x).relu(), scale_factor=1.05), c=nn.Conv1d(1, 1, 1)
        )
    )
    with torch.no_grad():
        for model, sign in ((a, 1.0), (b, -1.0)):
            model.c.weight.fill_(sign)
            model.c.bias.fill_(0.0)
    x = torch.zeros(1, 1, 10, dtype=torch.float64)
    x[0, 0, 0] = 1.0
    found = check(a, b, x, 2)
    assert found.lmc_error_measured == pytest.approx(math.sqrt(2) / 2)


class Table(nn.Module):
    """Adds a row of integers that lies in the state, and has a second name for its weights."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(4, 4), nn.Linear(4, 2)
        self.register_buffer("whole", torch.arange(4))
        self.register_buffer("unused", torch.arange(3))
        self.twin = self.layer

    def forward(self, x: Tensor) -> Tensor:
        return self.head((self.layer(x) + self.whole).relu())


def test_integers_of_the_other_state_are_no_line() -> None:
    a, b = two(Table)
    state = {k: v.clone() for k, v in b.state_dict().items()}
    state["unused"] += 1
    assert certify(a, state, [examples(5, 4)]).lmc_error > 0
    state["whole"][1:3] += 7
    with pytest.raises(
        CheckpointError, match=r"'whole' holds torch.int64, .* differ in 2 of 4 entries. There is no line"
    ):
        certify(a, state, [examples(5, 4)])


def test_tied_tensors_of_the_other_state_are_one() -> None:
    a, b = two(Table)
    state = {k: v.clone() for k, v in b.state_dict().items()}
    state["twin.weight"] = state["layer.weight"] + 1
    with pytest.raises(
        CheckpointError,
        match=r"weight' are one tensor in the model, but differ in B",
    ):
        certify(a, state, [examples(5, 4)])


@pytest.mark.parametrize("scale", [1e-300, 1e-200, 1e-100, 1e100, 1e140])
def test_small_and_large_numbers_on_the_way(scale: float) -> None:
    """What is tiny inside is large again outside: no square vanished in between, none overflowed."""

    def change(model: Any) -> None:
        model.a.weight.mul_(scale)
        model.a.bias.mul_(scale)
        model.b.weight.div_(scale)

    a, b = two(lambda: Net(lambda s, x: s.b(s.a(x).relu()), a=square(), b=square()), change)
    found = check(a, b, examples(5, 6), 2)
    assert found.lmc_error_measured > 1e-3
    assert found.lmc_error < 4 * found.lmc_error_measured


def test_what_is_not_finite_inside_is_refused() -> None:
    for forward, words in (
        (lambda s, x: s.b((s.a(x) / 0).tanh()), "it divides by zero"),
        (lambda s, x: s.b((s.a(x) * 1e200 * 1e200).tanh()), "some of its values are NaN or infinite"),
    ):
        a, b = two(lambda forward=forward: Net(forward, a=square(), b=square()))
        with pytest.raises(ModelError, match=words):
            certify(a, b, [examples(5, 6)], segments=1)


def test_bounds_beyond_the_range_of_numbers_are_infinite() -> None:
    a, b = two(
        lambda: Net(lambda s, x: s.b(s.a(x).relu()), a=square(), b=square()), lambda m: m.a.weight.mul_(1e160)
    )
    with torch.no_grad():
        for model in (a, b):
            model.b.weight.mul_(1e147)
    found = certify(a, b, [examples(5, 6)], segments=1)
    assert found.lmc_error > 1e300
    assert not math.isnan(found.lmc_error)


def test_labels_without_a_class_are_refused() -> None:
    a, b = two(lambda: mlp(6, 8, 1, 3))
    x = examples(4, 6)
    for labels in (torch.tensor([0, 1, -100, 2]), torch.tensor([0, 1, 255, 2])):
        with pytest.raises(DataError, match=r"labels from .* for 3 classes. Leave ignored labels out"):
            certify(a, b, [(x, labels)], segments=1)
    with pytest.raises(DataError, match="expected a tensor of targets, found a dict"):
        certify(a, b, [Batch((x,), {}, {"labels": torch.zeros(4)})], segments=1)  # type: ignore[arg-type]


class Rows(nn.Module):
    """A linear layer whose units lie on the last axis, and a normalisation of the axis before: six of both."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.norm, self.head = nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Linear(36, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.layer(x)).relu().flatten(1))


def test_a_normalisation_of_another_axis_is_not_folded_into_the_layer() -> None:
    def change(model: Any) -> None:
        model.norm.running_var.copy_(torch.rand(6) + 0.1)
        model.norm.weight.copy_(torch.randn(6))

    a, b = two(Rows, change)
    x = examples(4, 6, 5)
    found = certify(a, b, [x], segments=2)
    with torch.no_grad():
        middle = copy.deepcopy(a)
        for own, other in zip(middle.parameters(), b.parameters(), strict=True):
            own.copy_((own + other) / 2)
        scale = [(m.norm.running_var + m.norm.eps).rsqrt() for m in (a, b)]  # type: ignore[union-attr]
        # the path of the folded networks, written out: scale and shift of the normalisation move on the line
        gain = sum(m.norm.weight * s for m, s in zip((a, b), scale, strict=True)) / 2  # type: ignore[union-attr]
        shift = (a.norm.bias + b.norm.bias) / 2  # type: ignore[union-attr]
        inner = middle.layer(x) * gain[:, None] + shift[:, None]  # type: ignore[operator]
        error = middle.head(inner.relu().flatten(1)) - (a(x) + b(x)) / 2  # type: ignore[operator]
    assert float(found.envelope.error[1]) == pytest.approx(float(error.norm(dim=1).mean()), rel=1e-9)
    assert float(error.norm(dim=1).mean()) <= found.lmc_error


@pytest.mark.parametrize("variance", [1e-30, 1e30])
def test_normalisation_of_extreme_variance(variance: float) -> None:
    def make() -> nn.Module:
        return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 2))

    a, b = two(make, lambda m: m[1].running_var.fill_(variance))
    x = examples(3, 1, 4, 4)
    found = certify(a, b, [x], segments=3)
    assert 0 < found.lmc_error_measured <= found.lmc_error < math.inf
    assert found.lmc_error < max(3 * found.lmc_error_measured, 1.01e-9)


def test_dead_and_saturated_units_cost_nothing() -> None:
    a, b = two(lambda: mlp(6, 8, 1, 3), lambda m: m.layers[0].bias.fill_(-50.0))
    assert certify(a, b, [examples(4, 6)], segments=1).lmc_error <= 1.01e-9
    # alive everywhere: only the bilinear term of the head is left, and it is exact at the middle
    a, b = two(lambda: mlp(6, 8, 1, 3), lambda m: m.layers[0].bias.fill_(50.0))
    found = certify(a, b, [examples(4, 6)], segments=2)
    assert found.lmc_error_measured == pytest.approx(
        float(certify(a, b, [examples(4, 6)], segments=1).lmc_error), rel=1e-6
    )
    a, b = two(lambda: mlp(6, 8, 1, 3, activation="tanh"), lambda m: m.layers[0].bias.fill_(60.0))
    assert certify(a, b, [examples(4, 6)], segments=1).lmc_error <= 1e-6


@pytest.mark.parametrize("bias", [1e9, 1e13])
def test_rounding_is_part_of_the_bound(bias: float) -> None:
    """Biases of 1e13 leave three digits of float64; what is lost there is in the bound."""
    make = lambda: Net(lambda s, x: s.b((s.a(x)).relu()), a=square(), b=nn.Linear(6, 3))  # noqa: E731
    a, _ = two(make, lambda m: m.a.bias.fill_(bias))
    same = certify(a, a, [examples(7, 6)], segments=5)
    mean, worst = sup_errors(a, a, examples(7, 6), 257)  # exactly zero, but for rounding
    assert 0 < mean <= same.lmc_error < 1e-12 * bias
    assert bool((worst <= same.per_example).all())
    b = two(make, lambda m: m.a.bias.fill_(bias))[1]
    check(a, b, examples(7, 6), 1)


def test_norms_survive_extreme_scales() -> None:
    m = examples(5, 4)
    exact = float(torch.linalg.matrix_norm(m, 2))
    for scale in (1e-200, 1.0, 1e200):
        assert exact * scale <= matrix_norm(scale * m) <= exact * scale * (1 + 1e-11)
        kernel = scale * examples(3, 2, 3, 3)
        one = convolution_norm(examples(3, 2, 3, 3), [5, 5], dilation=[1, 1], groups=1)
        found = convolution_norm(kernel, [5, 5], dilation=[1, 1], groups=1)
        assert found == pytest.approx(scale * one, rel=1e-12)
    assert convolution_norm(torch.zeros(3, 0, 3, 3), [5, 5], dilation=[1, 1], groups=1) == 0
    assert matrix_norm(torch.zeros(3, 4)) == 0


def test_norms_are_not_below_the_truth_by_rounding() -> None:
    """A matrix of known norm 1, in float64, and badly conditioned: never below, hardly above."""
    for n, seed in ((3, 0), (40, 1), (120, 2)):
        q, _ = torch.linalg.qr(examples(n, n, seed=seed))
        values = torch.logspace(0, -12, n, dtype=torch.float64)
        assert 1 - 1e-15 * n <= matrix_norm(q * values) <= 1 + 1e-10


def test_the_parallelogram_is_the_least_bound_from_slopes_and_ends() -> None:
    a, b = examples(300, seed=1), examples(300, seed=2)
    for low, high in ((0.0, 1.0), (-0.3, 1.2), (0.5, 0.5)):
        share = torch.rand(300, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        # steep first, then flat: reaches the bound
        before = b - a
        after = before * (share * high + (1 - share) * low)
        height = (share * (high - low) * (1 - share) * before).abs()
        torch.testing.assert_close(slope_gap(before, after, low, high), height)
    relu = slope_gap(b - a, b.relu() - a.relu(), 0.0, 1.0)
    exact = torch.where(a * b < 0, a.abs() * b.abs() / (a.abs() + b.abs()), 0.0)
    torch.testing.assert_close(relu, exact)


def test_images_of_two_sizes_have_norms_of_their_own() -> None:
    """The norm of a convolution grows with the image; batches of different sizes may come in any order."""

    def make() -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(1, 3, 3, padding=1), nn.ReLU(), nn.Conv2d(3, 3, 3, padding=1), nn.ReLU(),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 2),
        )  # fmt: skip

    a, b = two(make)
    small, large = examples(2, 1, 2, 2), examples(3, 1, 12, 12)
    together = certify(a, b, [small, large], segments=2)
    alone = [certify(a, b, [x], segments=2).per_example for x in (small, large)]
    torch.testing.assert_close(together.per_example, torch.cat(alone), rtol=1e-9, atol=0)


def test_the_other_networks_code_is_compared() -> None:
    a, _ = two(lambda: mlp(6, 8, 1, 3))
    _, b = two(lambda: mlp(6, 8, 1, 3, activation="tanh"))
    with pytest.raises(
        ModelError, match=r"differ by .* of the largest output, so the path would not end in B"
    ):
        certify(a, b, [examples(4, 6)])
    certify(a, b.state_dict(), [examples(4, 6)], segments=1)  # of a state, A's code is what is meant


def test_outputs_that_are_not_finite_are_refused() -> None:
    a, b = two(lambda: mlp(6, 8, 1, 3))
    x = examples(4, 6)
    x[2, 0] = math.nan
    with pytest.raises(ModelError, match="at t = 0 are NaN or infinite on 1 of 4 examples"):
        certify(a, b, [x])


def test_several_inputs() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two, self.head = nn.Linear(3, 5), nn.Linear(2, 5), nn.Linear(5, 2)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return self.head((self.one(x) + self.two(y)).relu())

    a, b = two(Both)
    x, y = examples(4, 3), examples(4, 2, seed=4)
    found = certify(a, b, [((x, y), None)], segments=2)
    with torch.no_grad():
        middle = copy.deepcopy(a)
        for own, other in zip(middle.parameters(), b.parameters(), strict=True):
            own.copy_((own + other) / 2)
        error = (middle(x, y) - (a(x, y) + b(x, y)) / 2).norm(dim=1)
    assert float(found.envelope.error[1]) == pytest.approx(float(error.mean()))
    assert bool((error <= found.per_example).all())
    with pytest.raises(ModelError, match="several inputs by keyword"):
        certify(a, b, [{"x": x, "y": y}])


ACTIVATIONS: list[Callable[[], nn.Module]] = [
    nn.ReLU, nn.Tanh, nn.GELU, nn.SiLU, nn.ELU, nn.Sigmoid, nn.LeakyReLU, nn.Softplus, nn.Hardtanh, nn.Mish, nn.SELU,
    nn.CELU, nn.Hardswish, nn.LogSigmoid
]  # fmt: skip


def random_network(seed: int) -> tuple[list[nn.Module], Tensor, int]:
    """A small random architecture, two networks of it near or far, data, and a number of segments."""
    g = torch.Generator().manual_seed(seed)

    def pick(*options: Any) -> Any:
        return options[int(torch.randint(len(options), (1,), generator=g))]

    act, width, scale = ACTIVATIONS[seed % len(ACTIVATIONS)], pick(1, 2, 5), pick(0.3, 1.0, 4.0)
    if seed % 3 == 0:
        kernel, stride, pad, pool = pick(1, 2, 3), pick(1, 2), pick(0, 1), pick(nn.MaxPool2d, nn.AvgPool2d)

        def make() -> nn.Module:
            body = [nn.Conv2d(2, width, kernel, stride, pad), act(), pool(2, pick(1, 2))]
            return nn.Sequential(
                *body, nn.Conv2d(width, 3, 2, padding=1), act(), nn.Flatten(), nn.LazyLinear(2)
            )

        shape: tuple[int, ...] = (pick(1, 4), 2, 6, 6)
    else:
        layers = pick(1, 2, 4)
        bias = pick(True, False)

        def make() -> nn.Module:
            body: list[nn.Module] = [nn.Linear(4, width, bias=bias), act()]
            for _ in range(layers - 1):
                body += [nn.Linear(width, width, bias=bias), act()]
            return nn.Sequential(*body, nn.Linear(width, 3, bias=bias))

        shape = (pick(1, 5), 4)
    x = examples(*shape, seed=seed) * pick(0.1, 1.0, 10.0)
    near = pick(0.05, 1.0, None)
    first = make().double().eval()
    with torch.no_grad():
        first(x)
        for p in first.parameters():
            p.copy_(scale * torch.randn(p.shape, generator=g, dtype=torch.float64) / math.sqrt(p[0].numel()))
        last = copy.deepcopy(first)
        for p in last.parameters():
            noise = scale * torch.randn(p.shape, generator=g, dtype=torch.float64) / math.sqrt(p[0].numel())
            p.copy_(noise if near is None else p + near * noise)
    return [first, last], x, pick(1, 2, 3, 7)


@pytest.mark.parametrize("group", range(2))
def test_the_bound_holds_on_random_networks(group: int) -> None:
    for seed in range(
        21 * group, 21 * group + 21
    ):  # 42 in all: each activation in layers and in convolutions
        (a, b), x, segments = random_network(seed)
        check(a, b, x, segments)


@pytest.mark.slow
@pytest.mark.parametrize("group", range(20))
def test_the_bound_holds_on_many_random_networks(group: int) -> None:
    for seed in range(1000 + 20 * group, 1020 + 20 * group):
        (a, b), x, segments = random_network(seed)
        check(a, b, x, segments)


@pytest.mark.parametrize("target", [1.5, 1.02])
def test_a_target_is_reached_by_halving(target: float) -> None:
    a, b = two(lambda: mlp(7, 24, 2, 4))
    x, labels = examples(20, 7), torch.arange(20) % 4
    data = [(x[:13], labels[:13]), (x[13:], labels[13:])]
    found = certify(a, b, data, segments=2, target=target)
    assert found.ratio <= target
    mean, worst = sup_errors(a, b, x)
    assert mean <= found.lmc_error
    assert bool((worst <= found.per_example).all())
    ts = found.envelope.ts
    assert len(ts) == found.segments + 1 == len(found.envelope.error_bound) + 1
    assert bool((ts.diff() > 0).all())
    # the segments are not all of one length, and the same grid in one go gives the same numbers
    smallest = float(ts.diff().min())
    equal = certify(a, b, data, segments=round(1 / smallest))
    assert found.segments < equal.segments or target == 1.5
    shared = [round(float(t) / smallest) for t in ts]
    torch.testing.assert_close(found.envelope.error, equal.envelope.error[shared])
    assert found.envelope.rise is not None
    assert equal.envelope.rise is not None
    torch.testing.assert_close(found.envelope.rise, equal.envelope.rise[shared])
    assert equal.ratio <= found.ratio


def test_a_target_that_is_met_changes_nothing_and_identical_networks_stop() -> None:
    a, b = two(lambda: mlp(7, 24, 2, 4))
    plain, easy = (certify(a, b, [examples(9, 7)], segments=4, target=t) for t in (None, 1e6))
    assert easy.to_dict() == plain.to_dict()
    assert certify(a, a, [examples(9, 7)], segments=2, target=1.01).segments == 2
    with pytest.raises(DataError, match="must be above 1, found 1"):
        certify(a, b, [examples(9, 7)], target=1)
    with pytest.raises(DataError, match=r"whole number, at least 1, found 2\.5"):
        certify(a, b, [examples(9, 7)], segments=2.5)  # type: ignore[arg-type]
