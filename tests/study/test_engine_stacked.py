"""Networks trained together end where each ends alone."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from isthmus.errors import ModelError
from isthmus.study import Dataset, EpochRecord, StudyError, TrainSettings, can_stack, train, train_stacked
from isthmus.testing import mlp, resnet20


def toy(count: int = 57, features: int = 6, classes: int = 3) -> Dataset:
    values = torch.rand(count, features, generator=torch.Generator().manual_seed(0))
    return Dataset("toy", "train", values, values[:, :classes].argmax(1), tuple("abcdefgh"[:classes]))


def settings(**changes: Any) -> TrainSettings:
    return TrainSettings(
        **{"learning_rate": 0.1, "batch_size": 10, "epochs": 3, "warmup_steps": 3, **changes}
    )


def distance(a: nn.Module, b: nn.Module) -> float:
    left, right = a.state_dict(), b.state_dict()
    return max(float((v - right[k]).abs().max()) for k, v in left.items())


@pytest.mark.parametrize("lockstep", [None, 1, 3, 4])
@pytest.mark.parametrize("depth", [0, 2])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"weight_decay": 0.1},
        {"optimiser": "adam", "learning_rate": 0.01},
        {"optimiser": "adam", "learning_rate": 0.01, "weight_decay": 0.1},
        {"schedule": "constant", "momentum": 0.0, "initialisation": "torch"},
    ],
)
def test_in_float32_every_network_ends_where_it_ends_alone(
    changes: dict[str, Any], depth: int, lockstep: int | None
) -> None:
    model, data = mlp(6, 8, depth, 3), toy()
    rates = (1.0, 0.3)
    wanted = [settings(seed=s, **changes) for s in (0, 1)]
    wanted = [replace(w, learning_rate=w.learning_rate * rate) for w in wanted for rate in rates]
    together = train_stacked(model, data, wanted, lockstep=lockstep)
    for own, result in zip(wanted, together, strict=True):
        alone = train(model, data, own)
        assert result.settings == own
        assert distance(result.model, alone.model) < 2e-5
        assert not result.model.training
        for mine, other in zip(result.history, alone.history, strict=True):
            assert mine.loss == pytest.approx(other.loss, abs=1e-5)
            assert (mine.epoch, mine.accuracy, mine.learning_rate) == (
                other.epoch,
                other.accuracy,
                other.learning_rate,
            )
    assert distance(together[0].model, together[2].model) > 0.01


def test_no_epochs_leave_the_initial_values() -> None:
    model, data = mlp(6, 8, 2, 3), toy()
    (result,) = train_stacked(model, data, [settings(epochs=0, seed=3)])
    assert distance(result.model, train(model, data, settings(epochs=0, seed=3)).model) == 0.0
    assert result.history == ()
    assert result.status == "finished"


def test_bfloat16_trains_to_nearly_the_same_loss() -> None:
    data = toy(300)
    model = mlp(6, 32, 2, 3)
    losses = {
        precision: train_stacked(model, data, [settings(precision=precision, epochs=10)])[0].history[-1].loss
        for precision in ("float32", "bfloat16")
    }
    assert losses["bfloat16"] == pytest.approx(losses["float32"], rel=0.05)
    assert losses["bfloat16"] != losses["float32"]


def test_the_same_stack_gives_the_same_bits_and_leaves_the_model_alone() -> None:
    model, data = mlp(6, 8, 2, 3), toy()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    wanted = [settings(seed=s, precision="bfloat16") for s in (0, 1)]
    first, second = (train_stacked(model, data, wanted) for _ in range(2))
    assert all(distance(a.model, b.model) == 0.0 for a, b in zip(first, second, strict=True))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_a_network_that_diverges_does_not_touch_the_others() -> None:
    model, data = mlp(6, 8, 2, 3), toy()
    good = settings(seed=1)
    results = train_stacked(model, data, [settings(learning_rate=1e20), good], lockstep=2)
    assert [r.status for r in results] == ["diverged", "finished"]
    assert not math.isfinite(results[0].history[-1].loss)
    assert distance(results[1].model, train(model, data, good).model) < 1e-5


def test_epochs_are_reported_for_all_networks() -> None:
    seen: list[list[EpochRecord]] = []
    train_stacked(
        mlp(6, 4, 1, 3), toy(), [settings(), settings(seed=1)], on_epoch=lambda r: seen.append(list(r))
    )
    assert [[r.epoch for r in records] for records in seen] == [[1, 1], [2, 2], [3, 3]]


def test_what_can_be_stacked() -> None:
    assert can_stack(mlp(4, 4, 2, 2))
    assert not can_stack(mlp(4, 4, 2, 2, activation="tanh"))
    assert not can_stack(mlp(4, 4, 2, 2, bias=False))
    assert not can_stack(nn.Sequential(nn.Linear(4, 4)))
    assert not can_stack(resnet20(2, 0.25))


def test_errors() -> None:
    data = toy()
    with pytest.raises(StudyError, match="expected settings of at least one network, found none"):
        train_stacked(mlp(6, 4, 1, 3), data, [])
    with pytest.raises(StudyError, match="may differ in seed and learning_rate only"):
        train_stacked(mlp(6, 4, 1, 3), data, [settings(), settings(epochs=4)])
    with pytest.raises(ModelError, match=r"expected a ReLU perceptron with biases .* found Linear"):
        train_stacked(nn.Linear(6, 3), data, [settings()])
    with pytest.raises(ModelError, match="takes 5 inputs and gives 3 outputs, but toy has 6 inputs and 3"):
        train_stacked(mlp(5, 4, 1, 3), data, [settings()])
    with pytest.raises(ModelError, match="gives 2 outputs"):
        train_stacked(mlp(6, 4, 1, 2), data, [settings()])
