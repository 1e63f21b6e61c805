"""What is negligible is dropped before it becomes denormal, and no weight notices."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from isthmus.study import Dataset, TrainSettings, train, train_stacked
from isthmus.testing import mlp
from isthmus.training import _negligible, _stacked, _training
from isthmus.training._negligible import drop_negligible_moments, without_negligible


def denormals(values: Tensor) -> int:
    size = values.abs()
    return int(((size > 0) & (size < torch.finfo(values.dtype).tiny)).sum())


def test_only_the_negligible_is_dropped() -> None:
    values = torch.tensor([0.0, 1e-45, -1e-38, 1e-30, -1.1e-30, 2.0, float("inf"), float("nan")])
    kept = without_negligible(values)
    assert kept[:4].tolist() == [0.0] * 4
    assert torch.equal(kept[4:7], values[4:7])
    assert kept[7].isnan()
    assert values[1] > 0


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_moments_are_dropped_at_every_hundredth_step(kind: Any) -> None:
    weight = nn.Parameter(torch.ones(3))
    optimiser = kind([weight], **({"lr": 0.1, "momentum": 0.9} if kind is torch.optim.SGD else {"lr": 0.1}))
    weight.grad = torch.tensor([1e-31, 1e-20, -1.0])
    optimiser.step()
    state = optimiser.state[weight]
    first = "momentum_buffer" if kind is torch.optim.SGD else "exp_avg"
    before = {k: v.clone() for k, v in state.items()}
    drop_negligible_moments(optimiser, 101)
    assert all(torch.equal(v, before[k]) for k, v in state.items())
    drop_negligible_moments(optimiser, 200)
    assert state[first][0] == 0
    assert torch.equal(state[first][1:], before[first][1:])
    if "step" in state:
        assert state["step"] == 1
        assert state["exp_avg_sq"].tolist() == [0, 0, before["exp_avg_sq"][2]]


@pytest.mark.parametrize("optimiser", ["sgd", "adam"])
@pytest.mark.parametrize("stacked", [False, True])
def test_a_network_that_has_learnt_all_leaves_no_denormal_numbers_and_ends_with_the_same_bits(
    optimiser: Any, stacked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.rand(40, 6, generator=generator)
    data = Dataset("toy", "train", inputs, inputs[:, :3].argmax(1), tuple("abc"))
    settings = TrainSettings(
        optimiser=optimiser,
        learning_rate=1.0,
        batch_size=10,
        epochs=400,
        schedule="constant",
        initialisation="keep",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = mlp(6, 16, 1, 3)
    made: list[torch.optim.Optimizer] = []
    for module, name in ((_training, "_optimiser"), (_stacked, "_fused")):
        build = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, build=build: made.append(build(*a)) or made[-1])

    def run() -> tuple[nn.Module, int]:
        made.clear()
        (result,) = train_stacked(model, data, [settings]) if stacked else [train(model, data, settings)]
        assert result.status == "finished"
        moments = [v for s in made[0].state.values() for k, v in s.items() if k != "step" and v is not None]
        assert moments
        return result.model, sum(map(denormals, moments))

    network, count = run()
    assert count == 0
    monkeypatch.setattr(_negligible, "NEGLIGIBLE", 0.0)
    as_it_was, count = run()
    assert count > 0
    assert all(torch.equal(v, as_it_was.state_dict()[k]) for k, v in network.state_dict().items())
