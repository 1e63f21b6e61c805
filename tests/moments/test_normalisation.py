from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor, nn

from isthmus.batches import Batch
from isthmus.errors import CheckpointError, DataError, ModelError, ShapeError
from isthmus.evaluation import bind
from isthmus.moments import refresh_batchnorm
from isthmus.paths import recompute_of
from isthmus.states import State, state_of


def seeded(factory, seed: int = 0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return factory().eval()


def images(count: int, seed: int = 0) -> Tensor:
    return 3 * torch.randn(count, 2, 6, 6, generator=torch.Generator().manual_seed(seed)) + 1


class Nested(nn.Module):
    """Batch normalisation in containers, after a dropout that must stay off, and once unused."""

    def __init__(self) -> None:
        super().__init__()
        block = nn.ModuleDict({"conv": nn.Conv2d(2, 3, 3), "norm": nn.BatchNorm2d(3)})
        self.blocks = nn.ModuleList([block])
        self.drop = nn.Dropout(0.5)
        self.head = nn.Sequential(nn.Flatten(), nn.Linear(48, 5), nn.BatchNorm1d(5), nn.Linear(5, 2))
        self.unused = nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            assert isinstance(block, nn.ModuleDict)
            x = torch.relu(block["norm"](block["conv"](x)))
        return self.head(self.drop(x))


def by_hand(model: Nested, state: State, x: Tensor) -> dict[str, Tensor]:
    """The statistics of one full batch, layer by layer, with the formulas written out."""
    z = nn.functional.conv2d(x, state["blocks.0.conv.weight"], state["blocks.0.conv.bias"])
    mean, var = z.mean((0, 2, 3)), z.var((0, 2, 3), correction=1)
    biased = z.var((0, 2, 3), correction=0)
    h = (z - mean[:, None, None]) / (biased + 1e-5).sqrt()[:, None, None]
    h = h * state["blocks.0.norm.weight"][:, None, None] + state["blocks.0.norm.bias"][:, None, None]
    z2 = h.relu().flatten(1) @ state["head.1.weight"].T + state["head.1.bias"]
    return {
        "blocks.0.norm.running_mean": mean,
        "blocks.0.norm.running_var": var,
        "head.2.running_mean": z2.mean(0),
        "head.2.running_var": z2.var(0, correction=1),
    }


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_one_full_batch_gives_its_own_statistics(dtype: torch.dtype, tolerance: float) -> None:
    model = seeded(Nested, 0).to(dtype)
    other = seeded(Nested, 1).to(dtype)
    assert isinstance(model, Nested)
    state, x = state_of(other), images(40)
    found = refresh_batchnorm(model, state, [x])
    wanted = by_hand(model, state, x.to(dtype))
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=tolerance, atol=tolerance)
        assert found[name].dtype == dtype
    assert int(found["head.2.num_batches_tracked"]) == 1
    untouched = [k for k in state if k not in wanted and not k.endswith("num_batches_tracked")]
    assert all(found[k] is state[k] for k in untouched)
    assert torch.equal(found["unused.running_var"], state["unused.running_var"])
    assert int(found["unused.num_batches_tracked"]) == 0


def test_normalised_activations_have_mean_zero_and_variance_one() -> None:
    model = seeded(lambda: nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3))).double()
    x = images(30)
    refreshed = refresh_batchnorm(model, state_of(model), [x])
    outputs = bind(model, refreshed)(Batch((x,)))
    torch.testing.assert_close(outputs.mean((0, 2, 3)), torch.zeros(3).double(), atol=1e-12, rtol=0)
    torch.testing.assert_close(outputs.var((0, 2, 3)), torch.ones(3).double(), atol=1e-4, rtol=0)


def test_batches_count_by_their_values() -> None:
    model = seeded(lambda: nn.Sequential(nn.BatchNorm1d(2))).double()
    x = torch.randn(9, 2, generator=torch.Generator().manual_seed(0)).double()
    found = refresh_batchnorm(model, state_of(model), (piece for piece in (x[:6], x[6:])))
    variances = torch.stack([x[:6].var(0), x[6:].var(0)])
    torch.testing.assert_close(found["0.running_mean"], x.mean(0))
    torch.testing.assert_close(found["0.running_var"], (6 * variances[0] + 3 * variances[1]) / 9)
    assert int(found["0.num_batches_tracked"]) == 2
    swapped = refresh_batchnorm(model, state_of(model), [x[6:], x[:6]])
    torch.testing.assert_close(swapped["0.running_var"], found["0.running_var"])


def test_half_precision_statistics_are_summed_in_float64() -> None:
    model = seeded(lambda: nn.Sequential(nn.BatchNorm1d(1))).bfloat16()
    batches = [torch.tensor([[0.0], [2.0]])] * 300 + [torch.tensor([[508.0], [516.0]])]
    found = refresh_batchnorm(model, state_of(model), batches)
    assert found["0.running_mean"].dtype == torch.bfloat16
    assert found["0.running_mean"].item() == torch.tensor((300 + 512) / 301).bfloat16().item()


def test_a_layer_used_twice_averages_its_calls() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = self.second = nn.BatchNorm1d(2, affine=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.second(10 * self.first(x) + 4)

    model = Twice().double().eval()
    x = torch.randn(8, 2, generator=torch.Generator().manual_seed(0)).double()
    found = refresh_batchnorm(model, state_of(model), [x])
    h = 10 * (x - x.mean(0)) / (x.var(0, correction=0) + 1e-5).sqrt() + 4
    torch.testing.assert_close(found["first.running_mean"], (x.mean(0) + 4) / 2)
    torch.testing.assert_close(found["first.running_var"], (x.var(0) + h.var(0)) / 2)
    assert torch.equal(found["second.running_var"], found["first.running_var"])
    assert int(found["second.num_batches_tracked"]) == 2


def snapshot(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in state.items()}


@pytest.mark.parametrize("fails", [False, True])
def test_nothing_is_changed(fails: bool) -> None:
    model, other = seeded(Nested, 0), seeded(Nested, 1)
    model.blocks.train()  # a mixed mode comes back as it was
    modes = [m.training for m in model.modules()]
    state = state_of(other)
    before, own = snapshot(state), snapshot(model.state_dict())
    if fails:
        with pytest.raises(DataError, match="single value per channel"):
            refresh_batchnorm(model, state, [images(4), images(1)])
    else:
        refresh_batchnorm(model, state, [images(4)])
    assert [m.training for m in model.modules()] == modes
    assert all(torch.equal(state[k], before[k]) for k in before)
    assert all(torch.equal(model.state_dict()[k], own[k]) for k in own)
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert all(m.momentum == 0.1 and not m._forward_hooks and not m._forward_pre_hooks for m in norms)


def test_without_batch_norm_nothing_is_run() -> None:
    for factory in (lambda: nn.Linear(2, 2), lambda: nn.BatchNorm1d(2, track_running_stats=False)):
        model = seeded(factory)
        state = state_of(model)
        found = refresh_batchnorm(model, state, [])
        assert found is not state
        assert list(found) == list(state)
        assert all(found[k] is state[k] for k in state)


def test_bad_input() -> None:
    model = seeded(lambda: nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)))
    state = state_of(model)
    with pytest.raises(DataError, match="expected at least one batch"):
        refresh_batchnorm(model, state, [])
    with pytest.raises(DataError, match="statistics of '1': a batch gives it a single value per channel"):
        refresh_batchnorm(model, state, [torch.ones(1, 2)])
    with pytest.raises(CheckpointError, match="different architectures"):
        refresh_batchnorm(model, {}, [torch.ones(4, 2)])


def test_refresher_chooses() -> None:
    model = seeded(lambda: nn.Sequential(nn.BatchNorm1d(2)))
    data = torch.randn(8, 2, generator=torch.Generator().manual_seed(0))
    assert recompute_of(None, None, None) is None
    once = recompute_of("batchnorm", model, iter([data]))
    assert once is not None
    wanted = refresh_batchnorm(model, state_of(model), [data])
    for _ in range(2):  # a one-shot iterator serves every state
        assert torch.equal(once(state_of(model))["0.running_mean"], wanted["0.running_mean"])
    doubled = recompute_of(lambda state: {k: 2 * v for k, v in state.items()}, None, None)
    assert doubled is not None
    assert doubled({"w": torch.ones(2)})["w"].tolist() == [2.0, 2.0]


def test_refresher_refuses() -> None:
    model = nn.BatchNorm1d(2)
    with pytest.raises(DataError, match="Unknown refresh 'repair'"):
        recompute_of("repair", model, [])
    with pytest.raises(DataError, match="needs batches"):
        recompute_of("batchnorm", model, None)
    with pytest.raises(ModelError, match="pass its architecture as model="):
        recompute_of("batchnorm", None, [])
    shorter = recompute_of(lambda state: {}, None, None)
    longer = recompute_of(lambda state: {"w": torch.ones(3)}, None, None)
    broken = recompute_of(lambda state: {"w": torch.full((2,), float("nan"))}, None, None)
    assert shorter is not None
    assert longer is not None
    assert broken is not None
    with pytest.raises(CheckpointError, match="the refreshed state lacks 'w'"):
        shorter({"w": torch.ones(2)})
    with pytest.raises(ShapeError, match="the refreshed state has"):
        longer({"w": torch.ones(2)})
    with pytest.raises(CheckpointError, match="the refreshed state: 'w' has 2 NaN"):
        broken({"w": torch.ones(2)})
