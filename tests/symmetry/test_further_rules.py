"""Rules for complex numbers, Fourier transforms, patches, bags, sampling, and runs of rows for experts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from symmetry_helpers import Net, build, check, described, group, normal
from torch import Tensor, nn

from isthmus.symmetry import discover, verify

X = normal(4, 5)
IMAGE = normal(2, 3, 4, 4)
GRID = normal(2, 4, 4, 2).tanh()
CONVOLUTIONS = group(6, "a.weight[0]", "a.bias[0]", "b.weight[1]")


def linear(function: Callable[..., Tensor], width: int = 6, **parts: Any) -> Callable[[], nn.Module]:
    return lambda: Net(
        lambda m, x: m.b(function(m, m.a(x))), a=nn.Linear(5, width), b=nn.Linear(width, 3), **parts
    )


def image(function: Callable[[Tensor], Tensor]) -> Callable[[], nn.Module]:
    return lambda: Net(lambda m, x: m.b(function(m.a(x))), a=nn.Conv2d(3, 6, 1), b=nn.Conv2d(6, 2, 1))


# --- Rotary embeddings: pairs, and only where their frequencies move with them --------------------------------
def _halves(m: Any, h: Tensor) -> Tensor:
    cos, sin = (f(torch.cat([m.frequencies, m.frequencies])) for f in (torch.cos, torch.sin))
    return h * cos + torch.cat([-h[:, 3:], h[:, :3]], -1) * sin


def _complex(m: Any, h: Tensor) -> Tensor:
    turn = torch.polar(torch.ones(3), m.frequencies)
    return torch.view_as_real(torch.view_as_complex(h.view(-1, 3, 2)) * turn).flatten(-2)


PAIRS = {
    _halves: (("(3/1 of 6)", "(3+3/1 of 6)"), "a half apart"),
    _complex: (("(3/2 ×2/1 of 6)",), "beside each other"),
}


@pytest.mark.parametrize("rotate", PAIRS, ids=lambda f: PAIRS[f][1])
def test_rotary_pairs_move_with_frequencies_of_the_state(rotate: Callable[..., Tensor]) -> None:
    """In queries and keys alike, since both read the same frequencies; frequencies that are constants pin them."""

    def forward(m: Any, x: Tensor) -> Tensor:
        query, key = rotate(m, m.q(x)), rotate(m, m.k(x))
        return m.out((query @ key.t()).softmax(-1) @ m.v(x))

    def net(kept: bool) -> nn.Module:
        parts = {"q": nn.Linear(5, 6), "k": nn.Linear(5, 6), "v": nn.Linear(5, 4), "out": nn.Linear(4, 2)}
        model = Net(forward, **parts)
        model.register_buffer("frequencies", torch.tensor([1.0, 0.3, 0.1]), persistent=kept)
        return model

    slots = [
        f"{layer}.{kind}[0] {where}"
        for layer in "qk"
        for kind in ("weight", "bias")
        for where in PAIRS[rotate][0]
    ]
    values = group(4, "v.weight[0]", "v.bias[0]", "out.weight[1]")
    check(build(lambda: net(True)), X, {group(3, "frequencies[0]", *slots), values}, every_slot=False)
    check(build(lambda: net(False)), X, {values}, unseen=frozenset({"k.bias"}))


# --- Complex numbers and Fourier transforms -------------------------------------------------------------------
def test_complex_weights_move_with_both_parts() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        return (m.a(x).to(torch.complex64) @ torch.complex(m.real, m.imaginary)).abs() @ m.out

    model = build(lambda: Net(forward, a=nn.Linear(5, 6), real=(6, 4), imaginary=(6, 4), out=(4, 2)))
    expected = {
        group(6, "a.weight[0]", "a.bias[0]", "real[0]", "imaginary[0]"),
        group(4, "real[1]", "imaginary[1]", "out[0]"),
    }
    spec = check(model, X, expected)
    assert verify(spec, model, X).dtype == torch.float64
    assert verify(spec, model, X).max_relative_error < 1e-12


def test_a_transform_along_tokens_lets_channels_pass() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        spectrum = torch.fft.rfft(m.a(x), dim=1, norm="ortho") * torch.view_as_complex(m.filter)
        return m.b(torch.fft.irfft(spectrum, n=6, dim=1, norm="ortho"))

    model = build(lambda: Net(forward, a=nn.Linear(5, 8), b=nn.Linear(8, 3), filter=(4, 8, 2)))
    check(model, normal(2, 6, 5), {group(8, "a.weight[0]", "a.bias[0]", "filter[1]", "b.weight[1]")})


@pytest.mark.parametrize(
    ("transform", "moves"),
    [
        (lambda h: torch.fft.fft(h).real, False),
        (lambda h: torch.fft.fft(h, dim=0).real, True),
        (lambda h: torch.fft.fftn(h).real, False),
        (lambda h: torch.fft.fftshift(h, dim=0), True),
        (lambda h: torch.fft.fftshift(h), False),
        (lambda h: h + torch.fft.ifft(torch.fft.fft(h, dim=0) * 2, dim=0).real, True),
    ],
)
def test_transformed_axes_stay(transform: Callable[[Tensor], Tensor], moves: bool) -> None:
    check(build(linear(lambda _, h: transform(h))), X, {CONVOLUTIONS} if moves else set())


def test_a_transform_across_heads_ties_their_dimensions() -> None:
    def forward(_: Any, h: Tensor) -> Tensor:
        heads = h.view(-1, 3, 4)
        return (heads + torch.fft.fft(heads, dim=1).real).flatten(1)

    spec = check(build(linear(forward, 12)), X)
    assert [g.size for g in spec.groups.values()] == [4]


# --- Patches, sampling, pooling ---------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "function",
    [
        lambda h: F.fold(F.unfold(h, 3, padding=1), (4, 4), 3, padding=1),
        lambda h: h.unfold(2, 2, 2).amax(-1).repeat_interleave(2, 2),
        lambda h: F.grid_sample(h, GRID, align_corners=False),
        lambda h: F.max_unpool2d(*F.max_pool2d(h, 2, return_indices=True), 2),
        lambda h: F.interpolate(h, (7, 5), mode="bicubic"),
    ],
    ids=["fold", "windows", "grid", "unpool", "bicubic"],
)
def test_positions_stay_and_channels_pass(function: Callable[[Tensor], Tensor]) -> None:
    check(build(image(function)), IMAGE, {CONVOLUTIONS}, every_slot=False)


def test_patches_hold_blocks_of_positions() -> None:
    model = build(
        lambda: Net(
            lambda m, x: m.out(F.unfold(m.a(x), 2, stride=2).transpose(1, 2)),
            a=nn.Conv2d(3, 6, 1),
            out=nn.Linear(24, 2),
        )
    )
    check(model, IMAGE, {group(6, "a.weight[0]", "a.bias[0]", "out.weight[1] (6/4 ×4/1 of 24)")})


@pytest.mark.parametrize("mode", ["mean", "sum", "max"])
def test_bags_of_embeddings(mode: str) -> None:
    tokens, offsets = torch.tensor([1, 2, 3, 3]), torch.tensor([0, 2])
    model = build(
        lambda: Net(
            lambda m, t, o: m.out(m.bag(t, o)), bag=nn.EmbeddingBag(7, 6, mode=mode), out=nn.Linear(6, 2)
        )
    )
    check(model, (tokens, offsets), {group(6, "bag.weight[1]", "out.weight[1]")})


@pytest.mark.parametrize("reduce", [lambda h: h.median(-1, keepdim=True).values, lambda h: h.median()])
def test_medians_do_not_see_the_order(reduce: Callable[[Tensor], Tensor]) -> None:
    check(build(linear(lambda _, h: h - reduce(h))), X, {CONVOLUTIONS})


# --- Experts whose rows lie in runs -----------------------------------------------------------------------------
def grouped_experts(shared: bool = False) -> nn.Module:
    """Rows sorted by their expert, one matrix product for each run, and back to their places."""
    pytest.importorskip("transformers.integrations.moe")

    def forward(m: Any, x: Tensor) -> Tensor:
        product = torch.ops.transformers.grouped_mm_fallback
        weights, chosen = m.router(x).softmax(-1).topk(2)
        experts, order = chosen.reshape(-1).sort()
        counts = torch.histc(experts.float(), bins=3, min=0, max=2)
        ends = counts.cumsum(0).to(torch.int32)
        hidden = product(x[order // 2], m.up, ends).relu()
        if shared:
            hidden = hidden + hidden.roll(1, 0)
        out = product(hidden, m.down, ends) * weights.reshape(-1)[order, None]
        back = torch.empty_like(order)
        back[order] = torch.arange(len(order))
        return out[back].view(-1, 2, 2).sum(1)

    return Net(forward, router=nn.Linear(5, 3), up=(3, 5, 4), down=(3, 4, 2))


def test_hidden_units_of_experts_in_runs_of_rows() -> None:
    """The runs fix the order of the experts; inside each, hidden units move by themselves."""
    x = normal(9, 5)
    model = build(grouped_experts)
    with torch.no_grad():
        assert set(model.router(x).topk(2).indices.flatten().tolist()) == {0, 1, 2}
    expected = {group(4, f"up[2] at [0] {e}", f"down[1] at [0] {e}") for e in range(3)}
    spec = check(model, x, expected)
    assert any(p.tensor == "router.weight" and p.axis == 0 for p in spec.pinned)
    tied = discover(build(lambda: grouped_experts(shared=True)), x)
    assert described(tied) == {group(4, "up[2]", "down[1]")}
    assert verify(tied, build(lambda: grouped_experts(shared=True)), x).passed
