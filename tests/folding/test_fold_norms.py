"""Gains and biases into readers: which norms, which readers, and what stays with a reason."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from folding_networks import Channels, Decoder, Mixer, Twice, WrittenRms, change, wild
from torch import Tensor, nn

import isthmus
from isthmus.errors import SymmetryError

TOKENS = torch.tensor([[1, 2, 3, 4, 5], [3, 0, 10, 9, 2]])


def slow(*values: Any) -> Any:
    """Mark a case of a test of whose kind a quicker or plainer one stays in the default run."""
    return pytest.param(*values, marks=pytest.mark.slow)


def seeded(factory: Callable[[], Any], seed: int = 0) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return wild(factory().double())


def images(size: int = 8) -> Tensor:
    return torch.randn(2, 3, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def vectors(rows: int = 4, width: int = 3) -> Tensor:
    return torch.randn(rows, width, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def reasons(folded: isthmus.Folded) -> dict[tuple[str, str], str]:
    return {(r.name, r.what): r.why for r in folded.refusals}


def check(model: nn.Module, *args: Any, **options: Any) -> isthmus.Folded:
    """Fold, and compare the networks as anybody would: folded, and unfolded."""
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    folded = isthmus.fold(model, args, **options)
    assert folded.error <= 1e-10
    assert folded.change <= 1e-10
    assert change(model, folded.network(), *args) < 1e-12
    assert change(model, folded.network(folded.unfold()), *args) < 1e-12
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    for name in folded.folded_gains:
        assert bool((folded.state[name] == 1).all() or (folded.state[name] == 0).all())
    assert all(bool((folded.state[name] == 0).all()) for name in folded.folded_biases)
    return folded


def test_all_norms_of_a_decoder_go_into_queries_keys_values_gates_and_head() -> None:
    folded = check(seeded(lambda: Decoder(lambda: nn.LayerNorm(8), head_bias=True)), TOKENS)
    names = ["blocks.0.first", "blocks.0.second", "last"]
    assert folded.folded_gains == tuple(f"{n}.weight" for n in names)
    assert folded.folded_biases == tuple(f"{n}.bias" for n in names)
    assert not folded.refusals
    assert (
        "blocks.0.second: gain and bias of the LayerNorm into blocks.0.gate.weight, blocks.0.up.weight, "
        in str(folded)
    )


@pytest.mark.parametrize(
    "way", ["weight last", "one plus", *(slow(way) for way in ("weight first", "divided", "normalize"))]
)
def test_root_mean_squares_as_code_writes_them_out(way: str) -> None:
    folded = check(seeded(lambda: Decoder(lambda: WrittenRms(8, way))), TOKENS)
    assert len(folded.folded_gains) == 3
    assert not folded.refusals
    value = 0.0 if way == "one plus" else 1.0
    assert all(bool((folded.state[name] == value).all()) for name in folded.folded_gains)


@pytest.mark.slow
def test_native_root_mean_squares() -> None:
    folded = check(seeded(lambda: Decoder(lambda: nn.RMSNorm(8))), TOKENS)
    assert len(folded.folded_gains) == 3
    assert not folded.refusals


class _WrittenLayerNorm(nn.Module):
    def __init__(self, variance: str = "written") -> None:
        super().__init__()
        self.stem, self.variance = nn.Linear(3, 8), variance
        self.gamma, self.beta = nn.Parameter(torch.ones(8)), nn.Parameter(torch.zeros(8))
        self.out, self.shift = nn.Parameter(torch.randn(8, 2)), nn.Parameter(torch.randn(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + F.gelu(x.mean(-1, keepdim=True)) if self.variance == "mean used" else x
        mean = x.mean(-1, keepdim=True)
        if self.variance == "written":
            size = torch.sqrt((x - mean).pow(2).mean(-1, keepdim=True) + 1e-5)
        else:
            size = x.std(-1, keepdim=True) + 1e-5
        return torch.einsum("bi,io->bo", self.gamma * (x - mean) / size + self.beta, self.out) + self.shift


@pytest.mark.parametrize("variance", ["native", slow("written")])
def test_a_written_out_layer_norm_into_an_einsum_and_what_is_added_to_it(variance: str) -> None:
    folded = check(seeded(lambda: _WrittenLayerNorm(variance)), vectors())
    assert folded.folded_gains == ("gamma",)
    assert folded.folded_biases == ("beta",)
    assert folded.centred == ("stem.weight", "stem.bias")


@pytest.mark.slow
def test_a_mean_that_is_used_elsewhere_stays() -> None:
    folded = check(seeded(lambda: _WrittenLayerNorm("mean used")), vectors())
    assert not folded.centred


@pytest.mark.slow
def test_a_reader_without_a_bias_keeps_the_bias_in_the_norm() -> None:
    model = seeded(lambda: nn.Sequential(nn.Linear(3, 8), nn.LayerNorm(8), nn.Linear(8, 2, bias=False)))
    folded = check(model, vectors())
    assert folded.folded_gains == ("1.weight",)
    assert not folded.folded_biases
    assert reasons(folded)["1", "bias"] == "its reader '2.weight' has no bias of its own in the state"
    assert torch.allclose(folded.state["1.bias"], model[1].bias / model[1].weight)
    added = check(model, vectors(), add_biases=True)
    assert added.added_biases == ("2.bias",)
    assert added.folded_biases == ("1.bias",)
    assert not added.refusals
    assert "added: 2.bias" in str(added)


def test_a_gain_of_zero_under_a_bias_that_must_stay_is_not_folded() -> None:
    model = seeded(lambda: nn.Sequential(nn.Linear(3, 8), nn.LayerNorm(8), nn.Linear(8, 2, bias=False)))
    with torch.no_grad():
        model[1].weight[:2] = 0
    folded = check(model, vectors())
    assert not folded.folded_gains
    assert reasons(folded)["1", "gain"] == "2 of its entries are 0 where the bias, which has to stay, is not"


def test_a_gain_of_zero_folds_and_cannot_be_unfolded() -> None:
    model = seeded(lambda: nn.Sequential(nn.Linear(3, 8), nn.LayerNorm(8), nn.Linear(8, 2)))
    with torch.no_grad():
        model[1].weight[:2] = 0
    folded = isthmus.fold(model, vectors())
    assert folded.folded_gains == ("1.weight",)
    assert change(model, folded.network(), vectors()) < 1e-12
    with pytest.raises(SymmetryError, match="Cannot unfold '1': 2 entries of its gain were 0"):
        folded.unfold()


@pytest.mark.parametrize(
    ("padding", "mode", "groups", "biases"),
    [
        (1, "zeros", 2, 1),
        slow(0, "zeros", 1, 2),
        slow(0, "zeros", 4, 2),
        slow(1, "reflect", 2, 2),
        slow(1, "circular", 1, 2),
    ],
)
def test_group_norms_of_channels(padding: int, mode: str, groups: int, biases: int) -> None:
    x = images(6)

    def made() -> nn.Module:
        model = Channels(padding, mode, groups)
        model(x.float())  # a lazy layer learns its size
        return model

    folded = check(seeded(made), x)
    assert folded.folded_gains == ("norm.weight", "last.weight")
    assert len(folded.folded_biases) == biases
    if biases == 1:
        assert "does not meet it as a constant" in reasons(folded)["norm", "bias"]


@pytest.mark.slow
def test_a_transposed_convolution_takes_gains_and_no_biases() -> None:
    model = seeded(
        lambda: nn.Sequential(
            nn.Conv2d(3, 6, 3), nn.InstanceNorm2d(6, affine=True), nn.ConvTranspose2d(6, 4, 2, 2, groups=2)
        )
    )
    folded = check(model, images())
    assert folded.folded_gains == ("1.weight",)
    assert not folded.folded_biases


def test_mixers_fold_where_channels_are_summed_and_say_where_positions_are() -> None:
    folded = check(seeded(Mixer), torch.randn(2, 4, 3, dtype=torch.float64))
    assert folded.folded_gains == ("second.weight", "last.weight")
    assert reasons(folded)["first", "gain"] == "linear in 'mix' sums over another axis than its channels"
    assert reasons(folded)["first", "mean"].startswith("linear in 'unmix' writes it")


def test_a_norm_used_twice_folds_if_all_readers_agree() -> None:
    agreed = check(seeded(lambda: Twice(agree=True)), vectors())
    assert agreed.folded_gains == ("norm.weight",)
    assert agreed.folded_biases == ("norm.bias",)
    refused = check(seeded(lambda: Twice(agree=False)), vectors())
    assert not refused.folded_gains
    assert reasons(refused)["norm", "gain"].startswith("'two.weight' is also used by linear in 'two'")


class _OneReader(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b, self.head = (
            nn.Linear(3, 8),
            nn.LayerNorm(8),
            nn.LayerNorm(8),
            nn.Linear(8, 2),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head(self.a(x)) + self.head(self.b(x.sin()))


class _TwoBiases(nn.Module):
    """One weight that reads a norm twice, with a bias of its own each time, or with none."""

    def __init__(self, *, second: bool) -> None:
        super().__init__()
        self.stem, self.norm, self.second = nn.Linear(3, 8), nn.LayerNorm(8), second
        self.weight = nn.Parameter(torch.randn(2, 8))
        self.one, self.two = nn.Parameter(torch.randn(2)), nn.Parameter(torch.randn(2))

    def forward(self, x: Tensor) -> Tensor:
        n = self.norm(self.stem(x))
        one, two = (
            F.linear(n, self.weight, self.one),
            F.linear(n, self.weight, self.two if self.second else None),
        )
        return one * two.tanh()


@pytest.mark.slow
@pytest.mark.parametrize("second", [True, False])
def test_one_weight_with_two_biases_is_scaled_once(second: bool) -> None:
    folded = check(seeded(lambda: _TwoBiases(second=second)), vectors())
    assert folded.folded_gains == ("norm.weight",)
    assert folded.folded_biases == (("norm.bias",) if second else ())


@pytest.mark.slow
def test_two_norms_with_one_reader_stay() -> None:
    folded = check(seeded(_OneReader), vectors())
    assert not folded.folded_gains
    assert not folded.folded_biases
    assert {"gain", "bias"} <= {what for name, what in reasons(folded) if name == "a"}


@pytest.mark.slow
@pytest.mark.parametrize("dim", [0, 1])
def test_weight_normalised_readers_take_gains_in_directions_and_lengths(dim: int) -> None:
    def made() -> nn.Module:
        head = nn.utils.parametrizations.weight_norm(nn.Linear(8, 2), dim=dim)
        return nn.Sequential(nn.Linear(3, 8), nn.LayerNorm(8), head)

    folded = check(seeded(made), vectors())
    assert folded.folded_gains == ("1.weight",)
    assert folded.folded_biases == ("1.bias",)
    assert "2.parametrizations.weight.original0" in str(folded)
    model = seeded(made)
    with torch.no_grad():
        model[1].weight.zero_()
    folded = check(model, vectors())
    assert "which is normalised, would be left without a length" in reasons(folded)["1", "gain"]


@pytest.mark.slow
def test_weight_normalised_writers_keep_the_mean() -> None:
    layer = nn.utils.parametrizations.weight_norm
    folded = check(
        seeded(lambda: nn.Sequential(layer(nn.Linear(3, 8)), nn.LayerNorm(8), nn.Linear(8, 2))), vectors()
    )
    assert not folded.centred
    assert (
        "with a weight that _weight_norm in '0.parametrizations.weight.0' computes"
        in reasons(folded)["1", "mean"]
    )


class _Cross(nn.Module):
    """Decoder layers that read a memory: queries of one norm, keys and values of another, in one stacked weight."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.memory = nn.Linear(3, 8), nn.LayerNorm(8)
        layer = nn.TransformerDecoderLayer(8, 2, 12, batch_first=True, norm_first=True)
        self.decoder = nn.TransformerDecoder(layer, 1, norm=nn.LayerNorm(8))
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.head(self.decoder(self.stem(x), self.memory(self.stem(y))))


@pytest.mark.slow
def test_cross_attention_reads_two_norms_with_parts_of_one_weight() -> None:
    x, y = (torch.randn(2, n, 3, dtype=torch.float64) for n in (4, 5))
    folded = check(seeded(_Cross), x, y)
    assert len(folded.folded_gains) == 5
    assert len(folded.folded_biases) == 5
    assert not folded.refusals


class _Plain(nn.Module):
    """Norms whose output goes elsewhere: out of the network, into a function, added, multiplied by a computed one."""

    def __init__(self, where: str) -> None:
        super().__init__()
        self.stem, self.norm, self.head, self.where = nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 4), where

    def forward(self, x: Tensor) -> Any:
        n = self.norm(self.stem(x))
        if self.where == "output":
            return self.head(n), n
        if self.where == "function":
            return self.head(torch.relu(n))
        if self.where == "sum":
            return self.head(n + self.head(n))
        if self.where == "computed":
            return n @ torch.tanh(self.head.weight)
        assert self.where == "cut"
        return self.head(n.reshape(-1, 2).sin().reshape(n.shape))


@pytest.mark.parametrize(
    ("where", "why"),
    [
        ("output", "its output is an output of the network"),
        slow("function", "relu reads it, which is not known to be a linear layer"),
        (
            "sum",
            r"add reads it (the residual stream goes on after the norm), which is not known to be a linear layer",
        ),
        slow("computed", "matmul multiplies it by what tanh computes"),
        ("cut", "where view takes its channels cannot be followed"),
    ],
)
def test_readers_that_are_no_linear_layer_are_named(where: str, why: str) -> None:
    folded = check(seeded(lambda: _Plain(where)), vectors())
    assert not folded.folded_gains
    assert not folded.folded_biases
    assert reasons(folded)["norm", "gain"] == reasons(folded)["norm", "bias"] == why


@pytest.mark.slow
def test_an_output_that_need_not_be_preserved_is_not_looked_at() -> None:
    model = seeded(lambda: _Plain("output"))
    assert isthmus.fold(model, vectors(), outputs=0).folded_gains == ("norm.weight",)


@pytest.mark.slow
def test_norms_over_several_axes_stay() -> None:
    model = seeded(lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.LayerNorm([4, 6, 6]), nn.Conv2d(4, 2, 3)))
    folded = check(model, images())
    assert reasons(folded) == {("1", w): "it normalises over several axes" for w in ("gain", "bias")}


@pytest.mark.slow
@pytest.mark.parametrize("affine", [True, False])
def test_norms_without_gain_or_bias(affine: bool) -> None:
    model = seeded(
        lambda: nn.Sequential(
            nn.Linear(3, 8), nn.LayerNorm(8, elementwise_affine=affine, bias=False), nn.Linear(8, 2)
        )
    )
    folded = check(model, vectors())
    assert folded.folded_gains == (("1.weight",) if affine else ())
    assert not folded.folded_biases
    assert folded.centred == ("0.weight", "0.bias")


@pytest.mark.parametrize("width", [1, slow(2)])
def test_narrow_norms(width: int) -> None:
    model = seeded(lambda: nn.Sequential(nn.Linear(3, width), nn.LayerNorm(width), nn.Linear(width, 2)))
    folded = check(model, vectors())
    assert folded.folded_gains == ("1.weight",)
    assert bool(folded.centred) == (width == 2)  # the mean of one channel is all of it


@pytest.mark.slow
def test_low_precision_follows_the_input_and_state_may_be_given() -> None:
    model = seeded(lambda: Decoder(lambda: nn.LayerNorm(8))).to(torch.bfloat16)
    folded = isthmus.fold(model, TOKENS)
    assert {t.dtype for t in folded.state.values()} == {torch.bfloat16}
    assert folded.error <= 1e-10
    other = wild(seeded(lambda: Decoder(lambda: nn.LayerNorm(8))), seed=5)
    given = isthmus.fold(model, TOKENS, state=other.state_dict())
    assert {t.dtype for t in given.state.values()} == {torch.float64}
    assert given.change <= 1e-10
    assert change(other, given.network(), TOKENS) < 1e-12
