"""A forecast finds the law that its pairs were made by, says how wrong it is on others, and what it has not seen."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from isthmus import align, explain
from isthmus.errors import DataError, ModelError
from isthmus.explanation import PairMoments, fit_forecast, pair_moments
from isthmus.states import state_of
from isthmus.testing import mlp, randomise_state


def planted(count: int, noise: float, seed: int = 0) -> tuple[list[PairMoments], list[float]]:
    """Return pairs whose log barrier is a linear function of the features, and noise."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(low: float, high: float) -> float:
        return low + (high - low) * float(torch.rand((), generator=generator))

    moments, barriers = [], []
    for k in range(count):
        kept = tuple(uniform(0.3, 0.95) for _ in range(2 + k % 4))
        one = PairMoments(kept, uniform(1, 20), uniform(0.001, 0.5))
        weights = torch.tensor([0.8, -0.3, 0.5, 0.1, 0.2], dtype=torch.float64)
        value = float(one.features @ weights) - 2 + noise * float(torch.randn((), generator=generator))
        moments.append(one)
        barriers.append(math.exp(value))
    return moments, barriers


def test_a_planted_law_is_found() -> None:
    moments, barriers = planted(200, 0.0)
    rule = fit_forecast(moments, barriers)
    assert rule.rank > 0.99
    assert rule.error < 1.2
    assert rule.pairs == 200
    new, measured = planted(50, 0.0, seed=1)
    for one, barrier in zip(new, measured, strict=True):
        assert rule(one).barrier == pytest.approx(barrier, rel=0.3, abs=0.01)


def test_the_interval_holds_nine_in_ten_of_pairs_that_were_not_seen() -> None:
    rule = fit_forecast(*planted(200, 0.5))
    new, measured = planted(400, 0.5, seed=1)
    told = [rule(one) for one in new]
    inside = sum(f.low <= b <= f.high for f, b in zip(told, measured, strict=True)) / 400
    assert 0.84 < inside < 0.96  # standard error of the share: .015
    assert rule.rank > 0.7
    errors = [abs(f.barrier - b) for f, b in zip(told, measured, strict=True)]
    assert sum(errors) / 400 == pytest.approx(rule.mean_error, rel=0.4)


def test_pairs_without_a_law_have_no_rank() -> None:
    moments, barriers = planted(100, 0.0)
    order = torch.randperm(100, generator=torch.Generator().manual_seed(0)).tolist()
    rule = fit_forecast(moments, [barriers[k] for k in order])
    assert abs(rule.rank) < 0.35


def test_what_belongs_together_is_left_out_together() -> None:
    """The same pair thirty times over tells nothing of others: with each copy by itself it would seem to."""
    moments, barriers = planted(25, 1.5)
    copies, values = moments * 3, barriers * 3
    alone = fit_forecast(copies, values)
    together = fit_forecast(copies, values, [k % 25 for k in range(75)])
    assert together.pairs == 25
    assert together.error > alone.error


def test_it_says_do_not_merge_when_it_should() -> None:
    rule = fit_forecast(*planted(200, 0.1))
    moments, barriers = planted(100, 0.0, seed=2)
    told = [rule(one) for one in moments]
    no = [b for f, b in zip(told, barriers, strict=True) if f.merge is False]
    yes = [b for f, b in zip(told, barriers, strict=True) if f.merge is True]
    assert no
    assert min(no) > 0.1
    assert all(b <= 0.1 for b in yes)
    high = max(moments, key=lambda one: rule(one).barrier)
    assert str(rule(high)).endswith("do not merge.")
    assert rule(high, most=1e6).merge is True
    assert str(rule(high, most=1e6)).endswith("merging should do.")
    assert rule(high, most=rule(high).barrier).merge is None
    assert "measure the line before merging" in str(rule(high, most=rule(high).barrier))
    strange = rule(PairMoments((0.9, 0.9), 1e4, 0.1), most=1e6)
    assert not strange.familiar
    assert strange.merge is None
    assert "These networks are unlike those the rule was fitted on." in str(strange)


def test_moments_are_those_of_the_explanation() -> None:
    a, b = (
        randomise_state(mlp(6, 12, 2, 3), torch.Generator().manual_seed(k)).eval().double() for k in (0, 1)
    )
    inputs = torch.randn(50, 6, generator=torch.Generator().manual_seed(2)).double()
    data = [(inputs[:20], torch.arange(20) % 3), (inputs[20:], torch.arange(30) % 3)]
    alignment = align(a, b, batches=data, method="correlation")
    found, told = (
        pair_moments(a, b, data, alignment=alignment),
        explain(a, b, data, alignment=alignment, stages=0),
    )
    assert found.kept == pytest.approx([layer.kept for layer in told.layers])
    assert found.loss == pytest.approx(sum(told.losses[:2]) / 2)
    with torch.no_grad():
        logits = torch.stack([a(inputs), b(inputs)])
    spread = (logits - logits.mean(-1, keepdim=True)).square().mean().sqrt()
    assert found.spread == pytest.approx(float(spread))
    same = pair_moments(a, state_of(a), data)
    assert same.kept == pytest.approx([1.0] * 3)
    assert bool(same.features.isfinite().all())


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3, 5))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.T


def test_bad_use() -> None:
    moments, barriers = planted(25, 0.1)
    with pytest.raises(DataError, match="expected 20 pairs or more, found 19"):
        fit_forecast(moments[:19], barriers[:19])
    with pytest.raises(DataError, match="expected 20 pairs or more, found 1"):
        fit_forecast(moments, barriers, [0] * 25)
    with pytest.raises(
        DataError, match="a barrier and a group for each of 25 pairs, found 24 barriers and 25"
    ):
        fit_forecast(moments, barriers[:-1])
    for bad in (-1.0, float("nan"), float("inf")):
        with pytest.raises(DataError, match="expected barriers that are finite and not negative"):
            fit_forecast(moments, [*barriers[:-1], bad])
    plain = Plain().eval()
    with pytest.raises(ModelError, match="expected two layers or more whose outputs can be seen, found 0"):
        pair_moments(plain, plain, [(torch.randn(4, 5), torch.arange(4) % 3)])
