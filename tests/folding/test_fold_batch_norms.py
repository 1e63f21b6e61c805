"""BatchNorm into the layer before it: convolutions and linear layers, with and without bias, and what stays."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from folding_networks import Residual, change, wild
from test_fold_norms import check, images, reasons, seeded, slow, vectors
from torch import Tensor, nn

import isthmus
from isthmus.errors import SymmetryError
from isthmus.folding import unit_variance


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("eps", [0.0, 1e-12, 1e-6, 1e-5, 3e-5, 1e-3, 0.1, 1 / 3])
def test_variance_and_eps_are_one_in_the_precision_of_the_tensor(eps: float, dtype: torch.dtype) -> None:
    assert float(unit_variance(eps, dtype) + eps) == 1.0


@pytest.mark.slow
def test_a_folded_norm_is_the_identity_exactly() -> None:
    folded = isthmus.fold(seeded(lambda: Residual(bias=True)).float(), images().float())
    norm: Any = folded.network().norm_one
    x = torch.randn(3, 6, 4, 4)
    assert torch.equal(norm(x), x)


@pytest.mark.parametrize("affine", [True, slow(False)])
@pytest.mark.parametrize("bias", [slow(True), False])
def test_residual_networks(bias: bool, affine: bool) -> None:
    folded = check(seeded(lambda: Residual(bias=bias, affine=affine)), images())
    names = ("norm_one", "norm_two")
    assert len(folded.folds) == 2
    assert not folded.refusals
    assert folded.folded_gains == (tuple(f"{n}.weight" for n in names) if affine else ())
    assert folded.folded_biases == (tuple(f"{n}.bias" for n in names) if affine and bias else ())
    assert ("its shift stays" in str(folded)) == (not bias)
    means = [folded.state[f"{n}.running_mean"] for n in names]
    assert all(bool((m == 0).all()) for m in means) == (bias or affine)


@pytest.mark.slow
def test_biases_may_be_added_to_convolutions() -> None:
    folded = check(seeded(Residual), images(), add_biases=True)
    assert folded.added_biases == ("one.bias", "two.bias")
    assert folded.folded_biases == ("norm_one.bias", "norm_two.bias")


class _Other(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.one, self.norm, self.head = nn.Linear(3, 6), nn.BatchNorm1d(6), nn.Linear(6, 2)
        if kind == "batch statistics":
            self.norm = nn.BatchNorm1d(6, track_running_stats=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.one(x)
        if self.kind == "function":
            x = F.relu(x)
        y = self.norm(x)
        if self.kind == "read twice":
            y = y + x
        if self.kind == "used twice":
            y = y + self.one(y[:, :3])
        return self.head(F.relu(y))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "why"),
    [
        ("function", "it does not follow a layer whose only reader it is, but relu"),
        ("read twice", "it does not follow a layer whose only reader it is, but linear in 'one'"),
        (
            "used twice",
            "'one.weight' is also used by linear in 'one', which is not the layer before 'norm', or that norm",
        ),
    ],
)
def test_batch_norms_that_stay_are_named(kind: str, why: str) -> None:
    folded = check(seeded(lambda: _Other(kind)), vectors())
    assert not folded.folds
    assert reasons(folded)["norm", "batch norm"] == why


@pytest.mark.slow
@pytest.mark.parametrize("dim", [0, 1])
def test_weight_normalised_layers_take_the_scale_in_their_lengths(dim: int) -> None:
    def made() -> nn.Module:
        layer = nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 6, 3), dim=dim)
        return nn.Sequential(layer, nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 2, 1))

    folded = check(seeded(made), images())
    assert folded.folded_gains == (("1.weight",) if dim == 0 else ())
    if dim == 0:
        assert "BatchNorm into 0.parametrizations.weight.original0, 0.bias" in str(folded)


@pytest.mark.slow
def test_linear_layers_and_one_that_is_computed_by_transposed_convolutions() -> None:
    check(seeded(lambda: _Other("plain")), vectors())
    model = seeded(
        lambda: nn.Sequential(nn.ConvTranspose2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 2, 1))
    )
    assert len(check(model, images()).folds) == 1


@pytest.mark.slow
def test_a_gain_of_zero_cannot_be_unfolded() -> None:
    model = seeded(Residual)
    with torch.no_grad():
        model.norm_one.weight[0] = 0
    folded = isthmus.fold(model, images())
    assert change(model, folded.network(), images()) < 1e-12
    with pytest.raises(SymmetryError, match="Cannot unfold 'norm_one': 1 entries of its gain were 0"):
        folded.unfold()


def test_what_the_norms_hold_by_now_stays_when_they_are_unfolded() -> None:
    model = seeded(lambda: Residual(bias=True))
    folded = isthmus.fold(model, images())
    trained = wild(folded.network(), seed=3)
    back = folded.network(folded.unfold(trained.state_dict()))
    assert change(trained, back, images()) < 1e-12
