"""Running a network and watching its sites: batches of any form and size, taps, dtypes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from isthmus.batches import Batch, first_batch
from isthmus.errors import DataError, ModelError
from isthmus.moments import (
    CrossMoment,
    Moment,
    SiteRunner,
    Tap,
    cross_moments,
    input_statistics,
    unit_moments,
)
from isthmus.states import state_of


def seeded(seed: int = 0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 4))
    return model.eval()


def images(count: int = 10, seed: int = 1) -> Tensor:
    return torch.randn(count, 2, 4, 4, generator=torch.Generator().manual_seed(seed))


def channels(count: int) -> Tensor:
    return torch.arange(count).unsqueeze(1)


def taps() -> dict[str, list[Tap]]:
    """The convolution's outputs, and its channels as the linear layer reads them after the flatten."""
    blocks = 4 * torch.arange(3).unsqueeze(1) + torch.arange(4)
    return {"out": [Tap("conv2d", False, channels(3))], "read": [Tap("linear", True, blocks)]}


def test_a_smaller_last_batch_is_traced_again_and_counts_alike() -> None:
    model, x = seeded(), images(10)
    runner = SiteRunner(model, Batch((x[:4],)))
    assert list(runner.sites) == ["conv2d", "linear"]
    uneven = unit_moments(runner, state_of(model), [x[:4], x[4:8], x[8:]], taps())
    whole = unit_moments(SiteRunner(model, Batch((x,))), state_of(model), [x], taps())
    for key in ("out", "read"):
        assert uneven[key][0].count == whole[key][0].count == 10 * 4
        assert torch.allclose(uneven[key][0].covariance, whole[key][0].covariance, atol=1e-6)


def test_taps_see_what_flows_in_and_out() -> None:
    model, x = seeded(), images(6)
    found = unit_moments(SiteRunner(model, Batch((x,))), state_of(model), [x], taps())
    z = model[0](x).detach()
    direct = Moment.empty(3).update(z.movedim(1, -1).reshape(-1, 3))
    assert torch.allclose(found["out"][0].second_moment, direct.second_moment, atol=1e-6)
    # Copies of a unit are samples: the four positions of the flatten, after the ReLU.
    rows = torch.relu(z).movedim(1, -1).reshape(-1, 3)
    assert torch.allclose(
        found["read"][0].second_moment, Moment.empty(3).update(rows).second_moment, atol=1e-6
    )


def test_cross_moments_pair_the_same_examples_and_positions() -> None:
    a, b, x = seeded(0), seeded(1), images(9)
    runner = SiteRunner(a, Batch((x[:5],)))
    found = cross_moments(runner, state_of(a), state_of(b), [x[:5], x[5:]], taps())
    za, zb = (m[0](x).detach().movedim(1, -1).reshape(-1, 3) for m in (a, b))
    direct = CrossMoment.empty(3, 3).update(za, zb)
    assert torch.allclose(found["out"][0].covariance, direct.covariance, atol=1e-6)
    assert torch.allclose(found["out"][0].correlation, direct.correlation, atol=1e-6)
    assert not torch.allclose(found["out"][0].covariance, found["out"][0].covariance.T, atol=1e-3)


def test_the_state_may_differ_from_the_models() -> None:
    a, b, x = seeded(0), seeded(1), images(3)
    assert torch.allclose(SiteRunner(a, Batch((x,))).run(state_of(b), Batch((x,))), b(x))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_inputs_follow_the_dtype_of_the_state(dtype: torch.dtype) -> None:
    model, x = seeded().to(dtype), images(3)
    runner = SiteRunner(model, Batch((x,)).to(dtype=dtype))
    seen: list[torch.dtype] = []
    runner.run(state_of(model), Batch((x,)), inflow=lambda site, value: seen.append(value.dtype))
    assert seen == [dtype, dtype]
    found = unit_moments(runner, state_of(model), [x], taps())
    assert found["out"][0].mean.dtype == torch.float64


class _Keyword(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 4), nn.Linear(3, 4)

    def forward(self, x: Tensor, other: Tensor | None = None) -> dict[str, Tensor]:
        y = self.first(x)
        return {"logits": y if other is None else y + self.second(other)}


def test_keyword_inputs_and_integer_targets() -> None:
    model = _Keyword().eval()
    batches: list[Any] = [{"x": torch.ones(2, 3), "other": torch.ones(2, 3), "labels": torch.ones(2)}]
    runner = SiteRunner(model, first_batch(batches))
    found = input_statistics(runner, state_of(model), batches, runner.sites, torch.Generator())
    assert list(found) == ["linear", "linear_1"]
    assert torch.equal(found["linear_1"].mean, torch.ones(3, dtype=torch.float64))


def test_other_layers_for_other_inputs_are_refused() -> None:
    model = _Keyword().eval()
    runner = SiteRunner(model, Batch((torch.ones(2, 3), torch.ones(2, 3))))
    with pytest.raises(ModelError, match="computes through other layers"):
        runner.run(state_of(model), Batch((torch.ones(2, 3),)))


def test_a_model_that_cannot_be_traced() -> None:
    with pytest.raises(ModelError, match="Cannot trace"):
        SiteRunner(seeded(), Batch((torch.ones(2, 5, 4, 4),)))


def test_generators_are_read_once() -> None:
    model, x = seeded(), images(8)
    runner = SiteRunner(model, Batch((x[:4],)))

    def stream() -> Iterator[Tensor]:
        yield x[:4]
        yield x[4:]

    found = input_statistics(runner, state_of(model), stream(), ["conv2d"], torch.Generator())
    assert list(found) == ["conv2d"]
    source = found["conv2d"].source
    assert source.count == 8 * 4
    patches = nn.functional.unfold(x, 3).transpose(1, 2).reshape(-1, 18).double()
    assert torch.allclose(found["conv2d"].mean, patches.mean(0), atol=1e-6)


def test_damaged_activations_are_named() -> None:
    model, x = seeded(), images(4)
    x[2, 1, 0, 0] = float("nan")
    runner = SiteRunner(model, Batch((x,)))
    with pytest.raises(DataError, match="NaN or infinite values"):
        input_statistics(runner, state_of(model), [x], runner.sites, torch.Generator())
    with pytest.raises(DataError, match="NaN or infinite values"):
        cross_moments(runner, state_of(model), state_of(model), [x], taps())
    with pytest.raises(DataError, match="what flows into 'conv2d': NaN or infinite"):
        input_statistics(
            runner, state_of(model), [x], runner.sites, torch.Generator(), max_features=4, sample_rows=8
        )
