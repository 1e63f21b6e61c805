"""The proof: a fold that is wrong is caught, inputs are checked, and results can be used on other states."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from folding_networks import Decoder, change, wild
from test_fold_norms import TOKENS, seeded, vectors
from torch import Tensor, nn

import isthmus
from isthmus.errors import CheckpointError, DataError, ModelError, VerificationError
from isthmus.folding import NormFold, plan_folds
from isthmus.symmetry import trace


def small() -> nn.Module:
    return seeded(lambda: nn.Sequential(nn.Linear(3, 8), nn.LayerNorm(8), nn.Linear(8, 2)))


def test_a_reader_that_is_left_out_is_caught_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = NormFold.gain_steps
    monkeypatch.setattr(NormFold, "gain_steps", lambda self: whole(replace(self, scaled=self.scaled[1:])))
    with pytest.raises(
        VerificationError, match=r"Folding changes the function of Decoder: .*Guilty: blocks\.0\.first: "
    ):
        isthmus.fold(seeded(lambda: Decoder(lambda: nn.LayerNorm(8))), TOKENS)


@pytest.mark.slow
def test_errors_that_only_several_folds_make_together_are_said(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = NormFold.bias_steps
    monkeypatch.setattr(
        NormFold, "bias_steps", lambda self: list(whole(self))[:-1] if self.name == "1" else []
    )
    found: list[str] = []
    with pytest.raises(VerificationError, match="Guilty: 1: gain and bias") as error:
        isthmus.fold(small(), vectors())
    found.append(str(error.value))
    monkeypatch.setattr(
        "isthmus.folding._plan.FoldPlan.only", lambda self, fold: replace(self, norms=(), means=())
    )
    with pytest.raises(VerificationError, match="no single fold, only several together"):
        isthmus.fold(small(), vectors())


@pytest.mark.slow
def test_nothing_is_run_where_no_check_is_wanted() -> None:
    folded = isthmus.fold(small(), vectors(), check=False)
    assert folded.error != folded.error
    assert folded.change != folded.change
    assert "preserved" not in str(folded)
    assert folded.folded_gains == ("1.weight",)


@pytest.mark.slow
def test_the_proof_repeats_itself_and_a_generator_changes_it() -> None:
    model = small()
    one, two = isthmus.fold(model, vectors()), isthmus.fold(model, vectors())
    other = isthmus.fold(model, vectors(), generator=torch.Generator().manual_seed(4))
    assert one.error == two.error
    assert other.error <= 1e-10
    assert all(torch.equal(one.state[n], two.state[n]) for n in one.state)


@pytest.mark.slow
def test_only_the_parts_that_are_asked_for_are_folded() -> None:
    model = small()
    for part, found in (("gains", (1, 0, 0)), ("biases", (0, 1, 0)), ("means", (0, 0, 2))):
        folded = isthmus.fold(model, vectors(), parts=(part,))
        assert (len(folded.folded_gains), len(folded.folded_biases), len(folded.centred)) == found
        assert change(model, folded.network(), vectors()) < 1e-12
    with pytest.raises(DataError, match="Folding 'gain': expected some of batch-norms, biases, gains, means"):
        isthmus.fold(model, vectors(), parts=("gain",))


def test_bad_input_gets_one_clear_error() -> None:
    with pytest.raises(ModelError, match=r"fold: expected a torch\.nn\.Module first, found dict"):
        isthmus.fold({}, vectors())  # pyright: ignore
    state = small().state_dict()
    with pytest.raises(CheckpointError, match=r"the state lacks '2\.bias'"):
        isthmus.fold(small(), vectors(), state={n: t for n, t in state.items() if n != "2.bias"})
    with pytest.raises(CheckpointError, match=r"'0\.weight' has 24 NaN or infinite of 24 entries"):
        isthmus.fold(small(), vectors(), state={**state, "0.weight": state["0.weight"] / 0})
    broken = small()
    with torch.no_grad():
        broken[0].weight[0] = float("nan")  # pyright: ignore
    with pytest.raises(CheckpointError, match=r"'0\.weight' has 3 NaN"):
        isthmus.fold(broken, vectors())
    with pytest.raises(ModelError, match="training mode"):
        isthmus.fold(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)), vectors().float())


class _Cached(nn.Module):
    """Keeps a product of weights that no trace can follow."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.head = nn.LayerNorm(3), nn.Linear(3, 3)
        self._table: Tensor | None = None

    def train(self, mode: bool = True) -> _Cached:
        super().train(mode)
        self._table = None if mode else torch.as_tensor(self.head.weight.detach().numpy() + 0.0)
        return self

    def forward(self, x: Tensor) -> Tensor:
        assert self._table is not None
        return self.norm(x) @ self._table


@pytest.mark.slow
def test_weights_that_a_module_keeps_a_copy_of_are_refused() -> None:
    with pytest.raises(ModelError, match="which the module computes from its weights"):
        isthmus.fold(_Cached().double().eval(), vectors())


def test_a_plan_folds_any_state_of_the_network() -> None:
    model, other = small(), wild(small(), seed=7)
    plan = plan_folds(trace(model, vectors()))
    folded = plan.apply(other.state_dict())
    assert not torch.equal(folded["2.weight"], other.state_dict()["2.weight"])
    model.load_state_dict(folded)
    assert change(other, model, vectors()) < 1e-12


@pytest.mark.slow
def test_a_state_that_changed_since_is_unfolded_with_the_same_function() -> None:
    model = seeded(lambda: Decoder(lambda: nn.LayerNorm(8), head_bias=True))
    folded = isthmus.fold(model, TOKENS)
    trained = wild(folded.network(), seed=3)
    back = folded.network(folded.unfold(trained.state_dict()))
    assert change(trained, back, TOKENS) < 1e-12


class _Ways(nn.Module):
    """Reads a norm with one layer or another, as the data say."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm, self.one, self.two = (
            nn.Linear(3, 4),
            nn.LayerNorm(4),
            nn.Linear(4, 2),
            nn.Linear(4, 2),
        )

    def forward(self, x: Tensor) -> Tensor:
        n = self.norm(self.stem(x))
        return self.one(n) if bool(x.sum() > 0) else self.two(n)


def test_all_ways_through_the_code_are_looked_at() -> None:
    folded = isthmus.fold(seeded(_Ways), vectors())
    (fold,) = (f for f in folded.folds if isinstance(f, NormFold))
    assert {r.weight.name for r in fold.readers} == {"one.weight", "two.weight"}
    for sign in (1, -1):
        x = sign * vectors().abs()
        assert change(seeded(_Ways), folded.network(), x) < 1e-12
