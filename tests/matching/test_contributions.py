"""Matching by contributions to the outputs and by sensitivities: what is compared, planted truth, and refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from drawn_networks import drawn, generator
from torch import Tensor, nn

import isthmus
from isthmus.batches import Batch
from isthmus.errors import DataError, ModelError
from isthmus.matching import METHODS, Problem, SinglePass, solve
from isthmus.moments import OutputProjections
from isthmus.testing import (
    check_alignment_contract,
    check_gain_law,
    gpt,
    mlp,
    planted_pair,
    reference_inputs,
    reference_network,
)

BY_SLOPES = ("contributions", "sensitivity")


def perceptron() -> nn.Module:
    return mlp(6, 10, 2, 3)


def examples(count: int = 200) -> Tensor:
    return torch.randn(count, 6, generator=generator(5))


NETWORKS: dict[str, tuple[Any, Any]] = {
    "mlp": (perceptron, examples),
    "convolutions": (
        lambda: nn.Sequential(
            nn.Conv2d(2, 6, 3), nn.BatchNorm2d(6), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(24, 3)
        ),
        lambda: torch.randn(64, 2, 4, 4, generator=generator(5)),
    ),
    "groupnorm_resnet": (
        lambda: reference_network("groupnorm_resnet"),
        lambda: reference_inputs("groupnorm_resnet", 8, generator=generator(5))[0],
    ),
    "gpt": (
        lambda: gpt(vocabulary=11, width=8, depth=1, heads=2, context=5),
        lambda: torch.randint(0, 11, (32, 5), generator=generator(5)),
    ),
}


@pytest.mark.parametrize("method", BY_SLOPES)
@pytest.mark.parametrize("name", NETWORKS)
def test_planted_permutations_are_recovered_and_gains_obey_the_law(name: str, method: str) -> None:
    build, inputs = NETWORKS[name]
    model, x = drawn(build), inputs()
    spec = isthmus.discover(model, (x[:2],))
    pair = planted_pair(model, spec, 0.01, generator(1))
    problem = Problem(model, pair.state_b, batches=[x], spec=spec)
    found = solve(problem, method, check=False)
    assert all(torch.equal(found.permutations[g], p) for g, p in pair.permutations.items())
    assert all(after <= before for before, after in found.costs.values())
    objective = METHODS[method].objective(problem, problem.generator())
    check_gain_law(objective)
    check_alignment_contract(objective, SinglePass())


def by_hand(model: Any, x: Tensor, vectors: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Return activations and slopes of the hidden layers of a perceptron of three layers, by its own code."""
    first, second, last = model.layers
    one = first(x).relu()
    two = second(one).relu()
    slopes = torch.autograd.grad((last(two) * vectors).sum(), [one, two])
    return [(h.detach().double(), s.double()) for h, s in zip((one, two), slopes, strict=True)]


def test_gains_are_products_of_contributions_between_covariance_and_correlation() -> None:
    a, b, x = drawn(perceptron), drawn(perceptron, 1), examples()
    problem = Problem(a, b, batches=[x[:120], x[120:]], seed=3)
    source = generator(3)
    vectors = torch.cat([torch.randn(n, 3, generator=source) for n in (120, 80)])
    objective: Any = METHODS["contributions"].objective(problem, problem.generator())
    for k, ((h_a, s_a), (h_b, s_b)) in enumerate(
        zip(by_hand(a, x, vectors), by_hand(b, x, vectors), strict=True)
    ):
        c_a, c_b = h_a * s_a, h_b * s_b
        roots = [c.square().mean(0).sqrt().sqrt() for c in (c_a, c_b)]
        expected = (c_a.T @ c_b / len(x)) / torch.outer(*roots).where(torch.outer(*roots) > 0, torch.inf)
        (gain,) = objective.gains((f"layers.{k}",), {})
        torch.testing.assert_close(gain.matrix, expected, rtol=1e-4, atol=1e-6)


def test_pair_costs_of_sensitivities_keep_every_term() -> None:
    a, b, x = drawn(perceptron), drawn(perceptron, 1), examples()
    problem = Problem(a, b, batches=[x], seed=3)
    vectors = torch.randn(len(x), 3, generator=generator(3))
    objective: Any = METHODS["sensitivity"].objective(problem, problem.generator())
    (h_a, s_a), (h_b, s_b) = (by_hand(m, x, vectors)[1] for m in (a, b))

    def apart(p: Tensor, q: Tensor) -> Tensor:
        return (p[:, :, None] - q[:, None]).square().mean(0)

    def half(p: Tensor, q: Tensor) -> Tensor:
        return (p.square().mean(0)[:, None] + q.square().mean(0)) / 2

    cost = half(s_a, s_b) * apart(h_a, h_b) + half(h_a, h_b) * apart(s_a, s_b)
    (gain,) = objective.gains(("layers.1",), {})
    own = [2 * h.square().mean(0) * s.square().mean(0) for h, s in ((h_a, s_a), (h_b, s_b))]
    live = (own[0] > 0)[:, None] & (own[1] > 0)
    found = own[0][:, None] + own[1] - 2 * gain.matrix
    torch.testing.assert_close(found[live], cost[live], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("method", BY_SLOPES)
def test_the_same_seed_gives_the_same_result_and_nothing_is_changed(method: str) -> None:
    a, b, x = drawn(perceptron), drawn(perceptron, 1), examples()
    before = [{k: v.clone() for k, v in m.state_dict().items()} for m in (a, b)]
    one, other = (isthmus.align(a, b, batches=[x], method=method, seed=2, check=False) for _ in range(2))
    assert all(torch.equal(p, other.permutations[g]) for g, p in one.permutations.items())
    for model, state in zip((a, b), before, strict=True):
        assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
        assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_several_projections_are_rows_of_one_moment() -> None:
    """The average over many projections is the sum over the outputs."""
    net = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 3))
    x = examples(2)
    hidden = net[1](net[0](x)).detach().requires_grad_()
    projections = OutputProjections(generator(), 4000)
    slopes = torch.stack([s[0] for s in projections.slopes(net[2](hidden), [hidden])])
    exact = (net[2].weight.T @ net[2].weight).detach()  # pyright: ignore
    found = torch.einsum("rni,rnj->ij", slopes, slopes) / (4000 * 2)
    torch.testing.assert_close(found, exact, atol=0.05 * float(exact.abs().max()), rtol=0)
    with pytest.raises(DataError, match="expected at least one projection, found 0"):
        OutputProjections(generator(), 0)


@pytest.mark.parametrize("method", BY_SLOPES)
def test_larger_classes_are_matched_by_activations_and_said(method: str) -> None:
    model, other = (drawn(lambda: mlp(6, 10, 2, 3, activation="tanh"), k) for k in (0, 1))
    x = examples()
    found = isthmus.align(model, other, batches=[x], method=method, symmetry="all", check=False)
    plain = isthmus.align(model, other, batches=[x], method="activations", symmetry="all", check=False)
    for name, coupling in plain.couplings.items():
        assert torch.equal(found.couplings[name].matrix(), coupling.matrix())
    assert any("matched by activations, since" in note for note in found.notes)


class Rounded(nn.Module):
    """Outputs that change by steps only."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(6, 5), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        return (self.two(self.one(x).relu()) > 0).float()


def test_outputs_without_slopes_are_refused() -> None:
    a, b = drawn(Rounded), drawn(Rounded, 1)
    with pytest.raises(ModelError, match="do not depend differentiably on the network's tensors"):
        isthmus.align(a, b, batches=[Batch((examples(),))], method="contributions", check=False)


class TwoOutputs(nn.Module):
    """The second output is read by nobody."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.other = nn.Linear(6, 5), nn.Linear(5, 2), nn.Linear(5, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.one(x).relu()
        return self.two(h), self.other(h)


def test_only_outputs_that_are_preserved_are_projected() -> None:
    a, b, x = drawn(TwoOutputs), drawn(TwoOutputs, 1), examples()
    scaled = {k: v * (100.0 if k.startswith("other") else 1.0) for k, v in b.state_dict().items()}
    gains = []
    for state in (b.state_dict(), scaled):
        problem = Problem(a, state, batches=[x], outputs=0)
        objective: Any = METHODS["contributions"].objective(problem, problem.generator())
        gains.append(objective.gains(("one",), {})[0].matrix)
    assert torch.equal(*gains)


def test_methods_that_are_there_by_name_are_not_compared_unasked() -> None:
    assert METHODS.usual == ("weights-incoming", "weights", "covariance", "activations", "correlation")
    assert set(BY_SLOPES) <= set(METHODS.shipped) - set(METHODS.usual)
    with METHODS.apart():
        assert set(BY_SLOPES) <= set(METHODS)
    with pytest.raises(DataError, match="method 'contributions' compares activations: pass batches"):
        isthmus.align(drawn(perceptron), drawn(perceptron, 1), args=examples(2), method="contributions")
