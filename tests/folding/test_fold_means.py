"""Means out of what writes a stream, tied heads, and streams that cannot be centred."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from folding_networks import Decoder
from test_fold_norms import TOKENS, check, images, reasons, seeded, slow, vectors
from torch import Tensor, nn

import isthmus


def stream_means(folded: isthmus.Folded, names: dict[str, int]) -> float:
    return max(float(folded.state[name].mean(axis).abs().max()) for name, axis in names.items())


def test_the_mean_goes_out_of_tables_projections_and_their_biases() -> None:
    folded = check(seeded(lambda: Decoder(lambda: nn.LayerNorm(8))), TOKENS)
    writers = {"tokens.weight": 1, "places": 2, "blocks.0.out.weight": 0, "blocks.0.down.weight": 0}
    biases = {"blocks.0.out.bias": 0, "blocks.0.down.bias": 0}
    assert set(folded.centred) == set(writers) | set(biases)
    assert stream_means(folded, writers | biases) < 1e-15  # places past the example's length, too
    assert "blocks.0.first and 2 more: mean out of tokens.weight, places, " in str(folded)


def test_a_tied_head_is_untied_on_request_and_said() -> None:
    model = seeded(lambda: Decoder(lambda: nn.LayerNorm(8), tied=True))
    tied = check(model, TOKENS)
    assert not tied.centred
    assert not tied.untied
    assert "last.weight" not in tied.folded_gains
    assert tied.state["head.weight"].data_ptr() == tied.state["tokens.weight"].data_ptr()
    assert "untie=True gives head.weight a tensor of its own" in reasons(tied)["last", "gain"]
    assert "untie=True gives head.weight a tensor of its own" in reasons(tied)["blocks.0.first", "mean"]
    apart = check(model, TOKENS, untie=True)
    assert apart.untied == ("head.weight",)
    assert "last.weight" in apart.folded_gains
    assert "tokens.weight" in apart.centred
    assert "untied: head.weight has a tensor of its own" in str(apart)
    assert model.head.weight is model.tokens.weight


@pytest.mark.slow
def test_a_head_is_untied_for_nothing_else() -> None:
    model = seeded(lambda: Decoder(lambda: nn.LayerNorm(8), tied=True))
    assert not check(model, TOKENS, untie=True, parts=("biases",)).untied


@pytest.mark.slow
def test_a_tied_head_reads_no_mean_of_a_norm_without_gain() -> None:
    folded = check(
        seeded(lambda: Decoder(lambda: nn.LayerNorm(8, elementwise_affine=False), tied=True)), TOKENS
    )
    assert "tokens.weight" in folded.centred
    assert not folded.refusals


class _Half(nn.Module):
    """A tied table that reads half of the channels of a norm without gain: that half has a mean."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.up, self.norm = nn.Parameter(torch.randn(11, 4)), nn.Linear(4, 8), nn.LayerNorm(4)
        self.last = nn.LayerNorm(8, elementwise_affine=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.up(self.norm(F.embedding(tokens, self.table)))
        return F.linear(self.last(x)[..., :4], self.table)


@pytest.mark.slow
def test_a_tied_table_that_reads_half_of_the_channels_reads_a_mean() -> None:
    folded = check(seeded(_Half), TOKENS)
    assert "table" not in folded.centred
    assert "up.weight" in folded.centred


class _OwnTable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.norm = nn.Parameter(torch.randn(11, 6)), nn.LayerNorm(6)

    def forward(self, tokens: Tensor) -> Tensor:
        return F.linear(self.norm(F.embedding(tokens, self.table)), self.table)


@pytest.mark.slow
def test_code_that_uses_one_tensor_twice_cannot_be_untied() -> None:
    folded = check(seeded(_OwnTable), TOKENS, untie=True)
    assert not folded.untied
    assert not folded.folded_gains
    assert "'table' is also used by embedding" in reasons(folded)["norm", "gain"]
    assert "untie" not in reasons(folded)["norm", "gain"]


class _Vision(nn.Module):
    """Patches by a convolution, a class token, positions; a last norm at the class token."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 6, 4, 4)
        self.token, self.places = nn.Parameter(torch.randn(1, 1, 6)), nn.Parameter(torch.randn(1, 5, 6))
        self.norm, self.up, self.down = nn.LayerNorm(6), nn.Linear(6, 7), nn.Linear(7, 6)
        self.last, self.head = nn.LayerNorm(6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.places
        x = x + self.down(F.gelu(self.up(self.norm(x))))
        return self.head(self.last(x)[:, 0])


def test_patches_class_tokens_and_positions() -> None:
    folded = check(seeded(_Vision), images())
    assert not folded.refusals
    assert len(folded.folded_gains) == 2
    where = {
        "patches.weight": 0,
        "patches.bias": 0,
        "token": 2,
        "places": 2,
        "down.weight": 0,
        "down.bias": 0,
    }
    assert set(folded.centred) == set(where)
    assert stream_means(folded, where) < 1e-15


class _Stream(nn.Module):
    """A stream into which something is written, or from which something is read, that the mean matters to."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.stem, self.norm, self.head, self.what = nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 4), what
        self.scale, self.register = nn.Parameter(torch.ones(4)), None
        self.constant = torch.arange(4.0, dtype=torch.float64)

    def forward(self, x: Tensor) -> Any:
        y = self.stem(x)
        if self.what == "output":
            return self.head(self.norm(y)), y
        if self.what == "function":
            y = y + torch.relu(self.head(y.detach()))
        if self.what == "scaled":
            y = y * self.scale
        if self.what == "constant":
            y = y + self.constant.to(y.dtype)
        if self.what == "input":
            y = y + x[:, :1].expand(-1, 4)
        if self.what == "number":
            y = y + 1.0
        if self.what == "post-norm":
            y = self.norm(y)
            y = y + self.head(y)
        if self.what == "fine":
            y = 2.0 * y - y / 4 + torch.zeros_like(y) + y.roll(1, 0).flip(0) + y.unsqueeze(1).squeeze(1)
            y = torch.cat(y.split(2, 0), 0).masked_fill(x[:, :1] > 3, 0) * torch.sigmoid(x[:, 1:2])
            y = torch.stack([y, -y], 0).mean(0).expand_as(y) if y.shape[0] == 0 else y
        return self.head(self.norm(y))


@pytest.mark.parametrize(
    ("what", "why"),
    [
        slow("output", "linear in 'stem' is an output of the network"),
        slow("function", "relu writes it, which is not a layer that is known to be linear"),
        ("scaled", "mul multiplies its channels by factors of their own"),
        slow("constant", "the constant 'constant', which is not in the state, is added to it"),
        slow("input", "expand makes it from parts of other channels"),
        slow("number", "add adds one number to all of its channels"),
        ("post-norm", "the norm 'norm' writes into it without a layer in between (post-norm)"),
    ],
)
def test_streams_that_keep_their_mean_are_named(what: str, why: str) -> None:
    folded = check(seeded(lambda: _Stream(what)), vectors())
    found = [why for (_, part), why in reasons(folded).items() if part == "mean"]
    assert why in found, found
    assert not folded.centred or what == "post-norm"


def test_sums_moves_and_numbers_keep_a_mean_of_zero() -> None:
    assert check(seeded(lambda: _Stream("fine")), vectors()).centred == ("stem.weight", "stem.bias")


@pytest.mark.slow
def test_a_stream_that_is_pooled_before_its_norm() -> None:
    model = seeded(
        lambda: nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.LayerNorm(4), nn.Linear(4, 2)
        )
    )
    folded = check(model, images())
    assert folded.centred == ("0.weight", "0.bias")
    assert folded.folded_gains == ("3.weight",)


@pytest.mark.slow
def test_a_convolution_in_groups_writes_channels_that_cannot_be_centred() -> None:
    model = seeded(
        lambda: nn.Sequential(
            nn.Conv2d(4, 4, 3, groups=2), nn.Flatten(2), _Swap(), nn.LayerNorm(4), nn.Linear(4, 2)
        )
    )
    folded = check(model, torch.randn(2, 4, 5, 5, dtype=torch.float64))
    assert reasons(folded)["3", "mean"] == "conv2d in '0' writes it in groups of channels"


class _Swap(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.transpose(1, 2)
