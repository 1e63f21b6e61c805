"""Straight-through and Sinkhorn: never worse than the start by held-out batches, repeatable, and what they refuse."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from drawn_networks import drawn, generator
from torch import Tensor, nn

import isthmus
from isthmus.couplings import Permutation
from isthmus.errors import DataError, ModelError
from isthmus.matching import METHODS, GradientSearch, Match, Problem, Status, by_gradient
from isthmus.matching._between import LossBetween, split_batches
from isthmus.testing import mlp

RATES = {"straight-through": 0.02, "sinkhorn": 0.3}


def perceptron() -> nn.Module:
    return mlp(5, 8, 2, 3)


def labelled(model: nn.Module, count: int = 300) -> list[tuple[Tensor, Tensor]]:
    x = torch.randn(count, 5, generator=generator(5))
    with torch.no_grad():
        return list(zip(x.split(100), model(x).argmax(1).split(100), strict=True))


def shuffled(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the network with two pairs of units exchanged, and the permutations that undo it."""
    order = torch.tensor([1, 0, 2, 3, 5, 4, 6, 7])
    spec = isthmus.discover(model, torch.zeros(1, 5))
    away = dict.fromkeys(spec.groups, order)
    return isthmus.apply(spec, away, model.state_dict()), away


def still(problem: Problem) -> Match:
    sizes = problem.layers.sizes
    return Match({n: Permutation.identity(size) for n, size in sizes.items()}, (0.0,), Status.SINGLE_PASS)


@pytest.mark.parametrize("by", RATES)
@pytest.mark.parametrize("random", [False, True])
def test_a_start_that_is_not_the_best_is_left_and_the_trace_never_falls(by: Any, random: bool) -> None:
    model = drawn(perceptron)
    other, _ = shuffled(model)
    before = {n: t.clone() for n, t in other.items()}
    problem = Problem(model, other, batches=labelled(model), seed=1)
    search = GradientSearch(by, steps=60, learning_rate=RATES[by], batch_size=50, every=5, random=random)
    found = search.run(problem, still(problem), generator(2))
    assert list(found.sweeps) == sorted(found.sweeps)
    assert found.sweeps[-1] > found.sweeps[0]
    assert found.status == "steps done"
    again = search.run(problem, still(problem), generator(2))
    assert again.sweeps == found.sweeps
    assert all(torch.equal(p, again.permutations[n]) for n, p in found.permutations.items())
    assert all(torch.equal(t, before[n]) for n, t in other.items())
    _, held = split_batches(problem, 50, generator(2))
    between = LossBetween(problem, None)
    moved = isthmus.apply(problem.spec, found.permutations, other)
    positions = (0.25, 0.5, 0.75) if random else (0.5,)
    assert between.mean(moved, positions, held) == pytest.approx(-found.sweeps[-1], rel=1e-5)


def test_the_best_start_is_kept() -> None:
    model = drawn(perceptron)
    other, back = shuffled(model)
    with torch.no_grad():
        data = [(x, model(x)) for x, _ in labelled(model)]
    problem = Problem(model, other, batches=data)  # the start has no loss at all
    truth = Match({n: Permutation(p) for n, p in back.items()}, (0.0,), Status.SINGLE_PASS)
    search = GradientSearch("straight-through", steps=6, learning_rate=1.0, every=2, loss="mse")
    found = search.run(problem, truth, generator())
    assert all(torch.equal(p, back[n]) for n, p in found.permutations.items())


def test_by_name_and_with_batch_norm() -> None:
    def build() -> nn.Module:
        return nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3))

    a, b = drawn(build), drawn(build, 1)
    x = torch.randn(40, 2, 4, 4, generator=generator(5))
    data = list(zip(x.split(10), torch.arange(40).remainder(3).split(10), strict=True))
    state = {n: t.clone() for n, t in a.state_dict().items()}
    for by in RATES:
        method = by_gradient(GradientSearch(by, steps=4, every=2), f"short {by}", start="weights")  # pyright: ignore
        found = isthmus.align(a, b, batches=data, method=method)
        assert found.method == f"short {by}"
        assert len(found.sweeps) == 3
        assert METHODS[by].needs == "labels"
    assert all(torch.equal(t, state[n]) for n, t in a.state_dict().items())


def test_what_cannot_be_searched_is_refused() -> None:
    a, b = drawn(perceptron), drawn(perceptron, 1)
    with pytest.raises(DataError, match="sinkhorn: expected steps, batch_size and every of at least 1"):
        GradientSearch("sinkhorn", steps=0)
    with pytest.raises(DataError, match="straight-through permutes units, found symmetry='all'"):
        isthmus.align(a, b, batches=labelled(a), method="straight-through", symmetry="all", check=False)
    with pytest.raises(DataError, match="the batches have no targets"):
        isthmus.align(a, b, batches=[labelled(a)[0][0]], method="sinkhorn", check=False)


class Copying(nn.Module):
    """Computes with a copy of its weight that it made when it was built."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(5, 4), nn.Linear(4, 3)

    def eval(self) -> Copying:
        self.kept = self.two.weight.detach() * 1.0
        return super().eval()

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(self.one(x).relu(), self.kept, self.two.bias)


def test_code_that_keeps_its_weights_is_refused() -> None:
    a, b = drawn(Copying), drawn(Copying, 1)
    problem = Problem(a, b, batches=labelled(drawn(perceptron)))
    with pytest.raises(ModelError, match="computes with tensors that it keeps besides its parameters"):
        LossBetween(problem, None)
