"""The kinds of networks that the tests of Torch-Pruning cover, written anew, each with the groups a reader names.

A tool that removes channels needs the same answer as one that permutes them: which axes count the same units. Source of
the list: the ``tests`` folder of https://github.com/VainF/Torch-Pruning.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from symmetry_helpers import Expected, Net, build, check, group, normal
from torch import Tensor, nn

IMAGE = normal(2, 3, 4, 4)
ROWS = normal(2, 3)


def normed(inner: int, outer: int, **settings: Any) -> nn.Module:
    return nn.Sequential(nn.Conv2d(inner, outer, 1, **settings), nn.BatchNorm2d(outer))


def made(name: str, part: str = "") -> tuple[str, ...]:
    """Return the slots of a convolution's output and of the norm behind it."""
    tensors = ("0.weight", "0.bias", "1.weight", "1.bias", "1.running_mean", "1.running_var")
    return tuple(f"{name}.{t}[0]{part}" for t in tensors)


def cascaded_concatenation() -> tuple[nn.Module, Expected]:
    def forward(m: Any, x: Tensor) -> Tensor:
        both = torch.cat([m.a(x), m.b(x)], 1)
        return m.out(torch.cat([torch.cat([both, m.c(x)], 1), m.d(x)], 1))

    parts = {"a": normed(3, 2), "b": normed(3, 4), "c": normed(3, 3), "d": normed(3, 5)}
    starts = {"a": ("2/1", 2), "b": ("2+4/1", 4), "c": ("6+3/1", 3), "d": ("9+5/1", 5)}
    return Net(forward, **parts, out=nn.Conv2d(14, 2, 1)), {
        group(size, *made(name), f"out.weight[1] ({where} of 14)") for name, (where, size) in starts.items()
    }


def concatenation_of_a_concatenation_with_itself() -> tuple[nn.Module, Expected]:
    def forward(m: Any, x: Tensor) -> Tensor:
        both = torch.cat([m.a(x), m.b(x)], 1)
        return m.out(torch.cat([both, both.relu()], 1))

    parts = {"a": normed(3, 2), "b": normed(3, 3)}
    return Net(forward, **parts, out=nn.Conv2d(10, 2, 1)), {
        group(2, *made("a"), "out.weight[1] (2/1 of 10)", "out.weight[1] (5+2/1 of 10)"),
        group(3, *made("b"), "out.weight[1] (2+3/1 of 10)", "out.weight[1] (7+3/1 of 10)"),
    }


def split_and_concatenation() -> tuple[nn.Module, Expected]:
    """One part of a split meets a parallel path in a concatenation, the other one is added at the end."""

    def forward(m: Any, x: Tensor) -> Tensor:
        one, two = torch.split(m.a(x), [3, 4], 1)
        return m.out((m.c(torch.cat([one, m.b(x)], 1)) + two).relu())

    parts = {"a": normed(3, 7), "b": normed(3, 5), "c": normed(8, 4), "out": nn.Conv2d(4, 2, 1)}
    return Net(forward, **parts), {
        group(3, *made("a", " (3/1 of 7)"), "c.0.weight[1] (3/1 of 8)"),
        group(5, *made("b"), "c.0.weight[1] (3+5/1 of 8)"),
        group(4, *made("a", " (3+4/1 of 7)"), *made("c"), "out.weight[1]"),
    }


def split_into_a_shared_layer() -> tuple[nn.Module, Expected]:
    """Two parts of a split go through one layer, so they move together; the third one by itself."""

    def forward(m: Any, x: Tensor) -> tuple[Tensor, ...]:
        one, two, three = torch.split(m.a(x), [3, 3, 4], 1)
        return m.b(one), m.b(two), m.c(three)

    parts = {"a": normed(3, 10), "b": nn.Conv2d(3, 2, 1), "c": nn.Conv2d(4, 2, 1)}
    first, second = made("a", " (3/1 of 10)"), made("a", " (3+3/1 of 10)")
    return Net(forward, **parts), {
        group(3, *first, *second, "b.weight[1]"),
        group(4, *made("a", " (6+4/1 of 10)"), "c.weight[1]"),
    }


def chunk_and_unbind() -> tuple[nn.Module, Expected]:
    def forward(m: Any, x: Tensor) -> Tensor:
        one, two = m.a(x).chunk(2, 1)
        left, right = m.b(x).unflatten(1, (2, 3)).unbind(1)
        return m.out(torch.cat([two, one * left, right], 1))

    parts = {"a": normed(3, 6), "b": normed(3, 6), "out": nn.Conv2d(9, 2, 1)}
    return Net(forward, **parts), {
        group(3, *made("a", " (3+3/1 of 6)"), "out.weight[1] (3/1 of 9)"),
        group(3, *made("a", " (3/1 of 6)"), *made("b", " (3/1 of 6)"), "out.weight[1] (3+3/1 of 9)"),
        group(3, *made("b", " (3+3/1 of 6)"), "out.weight[1] (6+3/1 of 9)"),
    }


def concatenation_along_rows() -> tuple[nn.Module, Expected]:
    """Joined along the image: both paths feed the same channels; after a split along the image one is dropped."""

    def forward(m: Any, x: Tensor) -> Tensor:
        return m.out(torch.split(m.c(torch.cat([m.a(x), m.b(x)], 2)), [4, 4], 2)[0])

    parts = {"a": normed(3, 4), "b": normed(3, 4), "c": nn.Conv2d(4, 5, 1), "out": nn.Conv2d(5, 2, 1)}
    return Net(forward, **parts), {
        group(4, *made("a"), *made("b"), "c.weight[1]"),
        group(5, "c.weight[0]", "c.bias[0]", "out.weight[1]"),
    }


def residual_concatenation() -> tuple[nn.Module, Expected]:
    """A layer as wide as two others together, added to their concatenation: its units come in two groups."""

    def forward(m: Any, x: Tensor) -> Tensor:
        return m.out((m.c(x) + torch.cat([m.a(x), m.b(x)], 1)).relu())

    parts = {"a": normed(3, 2), "b": normed(3, 4), "c": normed(3, 6), "out": nn.Conv2d(6, 2, 1)}
    return Net(forward, **parts), {
        group(2, *made("a"), *made("c", " (2/1 of 6)"), "out.weight[1] (2/1 of 6)"),
        group(4, *made("b"), *made("c", " (2+4/1 of 6)"), "out.weight[1] (2+4/1 of 6)"),
    }


def depthwise_and_grouped() -> tuple[nn.Module, Expected]:
    """Channels of a depthwise layer follow; of a grouped one, groups move, and channels inside each group.

    Groups of three channels in, two out.
    """
    layers = [nn.Conv2d(3, 6, 1), nn.Conv2d(6, 6, 3, padding=1, groups=6), nn.ReLU()]
    grouped = [nn.Conv2d(6, 4, 1, groups=2, bias=False), nn.ReLU(), nn.Conv2d(4, 2, 1)]
    outer = (*(f"{k}.{t}[0] (2/3 ×3/1 of 6)" for k in (0, 1) for t in ("weight", "bias")),
             "3.weight[0] (2/2 ×2/1 of 4)", "5.weight[1] (2/2 ×2/1 of 4)")  # fmt: skip
    expected = {group(2, *outer)}
    for k, (inner, out) in enumerate((("3/1", "2/1"), ("3+3/1", "2+2/1"))):
        taken = (f"{j}.{t}[0] ({inner} of 6)" for j in (0, 1) for t in ("weight", "bias"))
        read = f"3.weight[1] at [0] {2 * k},{2 * k + 1}"
        expected.add(group(3, *taken, read))
        expected.add(group(2, f"3.weight[0] ({out} of 4)", f"5.weight[1] ({out} of 4)"))
    return nn.Sequential(*layers, *grouped), expected


def channel_multiplier() -> tuple[nn.Module, Expected]:
    """A depthwise layer that writes two channels for each one it reads."""
    layers = [nn.Conv2d(3, 3, 1), nn.Conv2d(3, 6, 3, groups=3), nn.ReLU(), nn.Conv2d(6, 2, 1)]
    written = [f"1.{t}[0] (3/2 ×2/1 of 6)" for t in ("weight", "bias")]
    expected = {group(3, "0.weight[0]", "0.bias[0]", *written, "3.weight[1] (3/2 ×2/1 of 6)")}
    for place in ("2/1", "2+2/1", "4+2/1"):
        inner = [f"1.{t}[0] ({place} of 6)" for t in ("weight", "bias")]
        expected.add(group(2, *inner, f"3.weight[1] ({place} of 6)"))
    return nn.Sequential(*layers), expected


def flattening() -> tuple[nn.Module, Expected]:
    layers = [
        nn.Conv2d(3, 5, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(20, 6),
        nn.ReLU(),
    ]
    return nn.Sequential(*layers, nn.Linear(6, 2)), {
        group(5, "0.weight[0]", "0.bias[0]", "4.weight[1] (5/4 ×4/1 of 20)"),
        group(6, "4.weight[0]", "4.bias[0]", "6.weight[1]"),
    }


def concatenation_before_flattening() -> tuple[nn.Module, Expected]:
    parts = {"a": nn.Conv2d(3, 2, 1), "b": nn.Conv2d(3, 3, 1), "out": nn.Linear(80, 2)}
    return Net(lambda m, x: m.out(torch.cat([m.a(x), m.b(x)], 1).relu().flatten(1)), **parts), {
        group(2, "a.weight[0]", "a.bias[0]", "out.weight[1] (2/16 ×16/1 of 80)"),
        group(3, "b.weight[0]", "b.bias[0]", "out.weight[1] (32+3/16 ×16/1 of 80)"),
    }


def pixel_shuffle() -> tuple[nn.Module, Expected]:
    layers = [nn.Conv2d(3, 12, 1), nn.PixelShuffle(2), nn.ReLU(), nn.Conv2d(3, 2, 1)]
    return nn.Sequential(*layers), {
        group(3, "0.weight[0] (3/4 ×4/1 of 12)", "0.bias[0] (3/4 ×4/1 of 12)", "3.weight[1]")
    }


def scaled_layer() -> tuple[nn.Module, Expected]:
    """A parameter of a block that no layer holds, as the layer scales of ConvNeXt."""

    def forward(m: Any, x: Tensor) -> Tensor:
        h = m.a(x)
        return m.out(h + m.scale * m.c(m.b(h).relu()))

    parts = {"a": nn.Conv2d(3, 4, 1), "b": nn.Conv2d(4, 6, 1), "c": nn.Conv2d(6, 4, 1), "scale": (4, 1, 1)}
    stream = (
        "a.weight[0]",
        "a.bias[0]",
        "b.weight[1]",
        "c.weight[0]",
        "c.bias[0]",
        "scale[0]",
        "out.weight[1]",
    )
    return Net(forward, **parts, out=nn.Conv2d(4, 2, 1)), {
        group(4, *stream),
        group(6, "b.weight[0]", "b.bias[0]", "c.weight[1]"),
    }


def one_channel() -> tuple[nn.Module, Expected]:
    return nn.Sequential(normed(3, 4), nn.ReLU(), normed(4, 1), nn.ReLU(), nn.Conv2d(1, 2, 1)), {
        group(4, *made("0"), "2.0.weight[1]")
    }


@pytest.mark.parametrize(
    "network",
    [
        cascaded_concatenation, concatenation_of_a_concatenation_with_itself, split_and_concatenation,
        split_into_a_shared_layer, chunk_and_unbind, concatenation_along_rows, residual_concatenation,
        depthwise_and_grouped, channel_multiplier, flattening, concatenation_before_flattening, pixel_shuffle,
        scaled_layer, one_channel,
    ],
)  # fmt: skip
def test_networks_on_images(network: Callable[[], tuple[nn.Module, Expected]]) -> None:
    expected = build_expected(network)
    check(build(lambda: network()[0]), IMAGE, expected, every_slot=False)


def build_expected(network: Callable[[], tuple[nn.Module, Expected]]) -> Expected:
    with torch.random.fork_rng(devices=[]):
        return network()[1]


class Normalising(nn.Module):
    """A layer of one's own: rows of unit length, scaled and shifted, then mixed."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale, self.shift = nn.Parameter(torch.randn(width)), nn.Parameter(torch.randn(width))
        self.mix = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.mix(x / x.square().sum(1, keepdim=True).sqrt() * self.scale + self.shift)


def test_a_layer_of_ones_own_and_a_parameter_without_use() -> None:
    parts = {"a": nn.Linear(3, 4), "own": Normalising(4), "out": nn.Linear(4, 2), "unused": (5,)}
    expected = {
        group(4, "a.weight[0]", "a.bias[0]", "own.scale[0]", "own.shift[0]", "own.mix.weight[1]"),
        group(4, "own.mix.weight[0]", "own.mix.bias[0]", "out.weight[1]"),
    }
    model = build(lambda: Net(lambda m, x: m.out(m.own(m.a(x) + 3)), **parts))
    spec = check(model, ROWS, expected)
    assert [p.reason for p in spec.pinned if p.tensor == "unused"] == ["not used by the traced computation"]


def test_several_inputs_and_outputs() -> None:
    """All three outputs pin their layers; asked for the last one only, the two hidden layers move."""

    def forward(m: Any, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        one, two = m.a(x).relu(), m.b(y).relu()
        return one, two, m.c(torch.cat([one, two], 1)).relu()

    model = build(lambda: Net(forward, a=nn.Linear(3, 4), b=nn.Linear(5, 3), c=nn.Linear(7, 2)))
    inputs = (ROWS, normal(2, 5))
    check(model, inputs, set())
    hidden = group(4, "a.weight[0]", "a.bias[0]", "c.weight[1] (4/1 of 7)")
    check(
        model, inputs, {hidden, group(3, "b.weight[0]", "b.bias[0]", "c.weight[1] (4+3/1 of 7)")}, outputs=2
    )
    check(model, inputs, {hidden}, outputs=[1, 2])


def test_a_recurrent_layer_between_others() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.out(m.lstm(m.a(x).relu())[0])

    parts = {"a": nn.Linear(3, 4), "lstm": nn.LSTM(4, 5, batch_first=True), "out": nn.Linear(5, 2)}
    tensors = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    gates = [f"lstm.{t}_l0[0] ({at}5/1 of 20)" for t in tensors for at in ("", "5+", "10+", "15+")]
    expected = {
        group(4, "a.weight[0]", "a.bias[0]", "lstm.weight_ih_l0[1]"),
        group(5, *gates, "lstm.weight_hh_l0[1]", "out.weight[1]"),
    }
    check(build(lambda: Net(forward, **parts)), normal(2, 4, 3), expected)


def test_one_module_at_two_places() -> None:
    """A shared square layer: what it reads is what it writes."""

    def forward(m: Any, x: Tensor) -> Tensor:
        return m.out(m.shared(m.shared(m.a(x).relu()).relu()).relu())

    parts = {"a": nn.Linear(3, 4), "shared": nn.Linear(4, 4), "out": nn.Linear(4, 2)}
    slots = (
        "a.weight[0]",
        "a.bias[0]",
        "shared.weight[0]",
        "shared.bias[0]",
        "shared.weight[1]",
        "out.weight[1]",
    )
    check(build(lambda: Net(forward, **parts)), ROWS, {group(4, *slots)})


def test_a_deconvolution_reads_what_a_layer_writes_as_pixels() -> None:
    """From a vector to an image and back to a vector."""

    def forward(m: Any, x: Tensor) -> Tensor:
        h = F.relu(m.a(x)).view(-1, 5, 2, 2)
        return m.out(F.relu(m.c(F.relu(m.b(h)))).flatten(1))

    parts = {"a": nn.Linear(3, 20), "b": nn.ConvTranspose2d(5, 4, 2, 2), "c": nn.ConvTranspose2d(4, 3, 1)}
    expected = {
        group(5, "a.weight[0] (5/4 ×4/1 of 20)", "a.bias[0] (5/4 ×4/1 of 20)", "b.weight[0]"),
        group(4, "b.weight[1]", "b.bias[0]", "c.weight[0]"),
        group(3, "c.weight[1]", "c.bias[0]", "out.weight[1] (3/16 ×16/1 of 48)"),
    }
    check(build(lambda: Net(forward, **parts, out=nn.Linear(48, 2))), ROWS, expected)


def test_dense_blocks() -> None:
    """Every layer reads everything written before it."""

    def forward(m: Any, x: Tensor) -> Tensor:
        h = m.stem(x)
        for layer in (m.one, m.two):
            h = torch.cat([h, layer(F.relu(h))], 1)
        return m.out(h)

    parts = {
        "stem": nn.Conv2d(3, 4, 1),
        "one": nn.Conv2d(4, 3, 1),
        "two": nn.Conv2d(7, 2, 1),
        "out": nn.Conv2d(9, 2, 1),
    }
    expected = {
        group(4, "stem.weight[0]", "stem.bias[0]", "one.weight[1]", "two.weight[1] (4/1 of 7)",
              "out.weight[1] (4/1 of 9)"),
        group(3, "one.weight[0]", "one.bias[0]", "two.weight[1] (4+3/1 of 7)", "out.weight[1] (4+3/1 of 9)"),
        group(2, "two.weight[0]", "two.bias[0]", "out.weight[1] (7+2/1 of 9)"),
    }  # fmt: skip
    check(build(lambda: Net(forward, **parts)), IMAGE, expected)
