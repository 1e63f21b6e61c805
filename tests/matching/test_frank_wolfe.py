"""All groups at once: Frank–Wolfe on whole objectives, and the Kronecker form that needs it."""

from __future__ import annotations

from itertools import permutations, product
from typing import Any

import pytest
import torch
from drawn_networks import drawn, generator
from torch import Tensor, nn

import isthmus
from isthmus.batches import Batch
from isthmus.couplings import random_permutation
from isthmus.errors import DataError, ModelError, ShapeError
from isthmus.matching import (
    METHODS,
    CoordinateDescent,
    FrankWolfe,
    Problem,
    SignedAssignment,
    assignment_solver,
    solve,
    weight_objective,
)
from isthmus.matching._frank_wolfe import _Relaxation
from isthmus.matching._soft import SoftPermutation, as_matrices
from isthmus.testing import (
    check_alignment_contract,
    check_gain_law,
    gpt,
    mlp,
    planted_pair,
    reference_inputs,
    reference_network,
)


def small() -> nn.Module:
    return mlp(3, 4, 2, 2)


def convolutions() -> nn.Module:
    return nn.Sequential(nn.Conv2d(2, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(24, 3))


def test_the_result_lies_between_the_start_and_the_best_of_all_permutations() -> None:
    gained = 0
    for seed in range(6):
        objective = weight_objective(
            Problem(drawn(small, seed), drawn(small, seed + 9), args=torch.zeros(1, 3)).pair
        )
        orders = [torch.tensor(p) for p in permutations(range(4))]
        every = [dict(zip(objective.structure.sizes, pair, strict=True)) for pair in product(orders, orders)]
        best = max(objective.value(at) for at in every)
        found = check_alignment_contract(objective, FrankWolfe())
        assert objective.value(found.couplings) <= best + 1e-9
        descended = CoordinateDescent().run(objective, assignment_solver, None, generator())
        gained += found.sweeps[-1] > descended.sweeps[-1] + 1e-9
        again = FrankWolfe().run(objective, assignment_solver, descended.couplings, generator())
        assert again.sweeps[-1] >= descended.sweeps[-1]
    assert gained >= 1


@pytest.mark.parametrize("name", ["mlp", "groupnorm_resnet"])
def test_planted_permutations_are_recovered(name: str) -> None:
    model = drawn(lambda: reference_network(name))
    x = reference_inputs(name, 2, generator=generator(5))[0]
    spec = isthmus.discover(model, (x,))
    pair = planted_pair(model, spec, 0.01, generator(1))
    found = isthmus.align(model, pair.state_b, args=(x,), method="frank-wolfe", spec=spec, check=False)
    assert all(torch.equal(found.permutations[g], p) for g, p in pair.permutations.items())


def test_along_a_segment_the_step_is_the_best() -> None:
    problem = Problem(drawn(small), drawn(small, 1), batches=[torch.randn(50, 3, generator=generator(5))])
    for method, by_cost in (("weights", False), ("kronecker", True)):
        objective: Any = METHODS[method].objective(problem, problem.generator())
        relaxed, sizes = _Relaxation(objective.compared, by_cost), objective.structure.sizes
        here = {name: torch.full((n, n), 1 / n).to(relaxed.dtype) for name, n in sizes.items()}
        corner = as_matrices(
            {name: random_permutation(n, generator(3)) for name, n in sizes.items()}, sizes, relaxed.dtype
        )
        step = relaxed.best_step(here, corner, relaxed.value(here))
        values = [
            relaxed.value({n: torch.lerp(m, corner[n], float(t)) for n, m in here.items()})
            for t in (step, *torch.linspace(0, 1, 101))
        ]
        assert values[0] >= max(values[1:]) - 1e-5 * abs(max(values))


def test_a_soft_permutation_that_is_hard_carries_as_a_permutation() -> None:
    order = torch.tensor([1, 2, 0])
    soft = SoftPermutation(torch.eye(3, dtype=torch.float64)[order])
    units = torch.randn(2, 3, generator=generator())
    assert torch.equal(soft.carry(units, 1), units[:, order])
    assert torch.equal(soft.carry_readers(units, 1), units[:, order])
    assert torch.equal(soft.then(soft).matrix(), torch.eye(3, dtype=torch.float64)[order[order]])
    with pytest.raises(ShapeError, match="nothing undoes a mixture of units"):
        soft.inverse()


def test_what_cannot_be_searched_is_refused() -> None:
    a, b, x = drawn(small), drawn(small, 1), torch.randn(30, 3, generator=generator(5))
    with pytest.raises(DataError, match="expected max_steps and tolerance of at least 0, found -1"):
        FrankWolfe(max_steps=-1)
    with pytest.raises(DataError, match="needs an objective that lists what it compares"):
        isthmus.align(a, b, batches=[x], method="correlation", schedule=FrankWolfe())
    objective = weight_objective(Problem(a, b, args=x).pair)
    with pytest.raises(DataError, match="found a solver of class 'signed'"):
        FrankWolfe().run(objective, SignedAssignment(), None, generator())
    turned = {"layers.0": isthmus.couplings.Monomial(torch.arange(4), -torch.ones(4))}
    with pytest.raises(DataError, match="expected permutations to start from"):
        FrankWolfe().run(objective, assignment_solver, turned, generator())


def second_moment(rows: Tensor) -> Tensor:
    return rows.T @ rows / len(rows)


def test_the_value_of_the_kronecker_form_is_the_change_of_the_outputs_layer_by_layer() -> None:
    a: Any = drawn(small)
    b, x = drawn(small, 1), torch.randn(60, 3, generator=generator(5))
    problem = Problem(a, b, batches=[x], seed=4)
    objective: Any = METHODS["kronecker"].objective(problem, problem.generator())
    ones = torch.ones(60, 1)
    h = [x, a.layers[0](x).relu(), a.layers[1](a.layers[0](x).relu()).relu()]
    z = [layer(inputs.detach()).detach().requires_grad_() for layer, inputs in zip(a.layers, h, strict=True)]
    vectors = torch.randn(60, 2, generator=generator(4))
    outputs = [a.layers[2](a.layers[1](z[0].relu()).relu()), a.layers[2](z[1].relu()), z[2]]
    slopes = [torch.autograd.grad((f * vectors).sum(), at)[0] for f, at in zip(outputs, z, strict=True)]
    at = {name: random_permutation(4, generator(k)) for k, name in enumerate(objective.structure.sizes)}
    moved = isthmus.apply(problem.spec, at, b.state_dict())
    expected = 0.0
    for k in range(3):
        weight, bias = (
            (a.state_dict()[n] - moved[n]).double() for n in (f"layers.{k}.weight", f"layers.{k}.bias")
        )
        change = torch.cat([weight, bias[:, None]], 1)
        inputs = second_moment(torch.cat([h[k].detach(), ones], 1).double())
        expected += float((second_moment(slopes[k].double()) @ change @ inputs @ change.T).trace())
    assert objective.value(at) == pytest.approx(-expected / 2, rel=1e-5)
    check_gain_law(objective)


def test_the_kronecker_form_recovers_and_refuses_what_it_does_not_know() -> None:
    model, x = drawn(convolutions), torch.randn(64, 2, 4, 4, generator=generator(5))
    spec = isthmus.discover(model, (x[:2],))
    pair = planted_pair(model, spec, 0.01, generator(1))
    problem = Problem(model, pair.state_b, batches=[x], spec=spec)
    found = solve(problem, "kronecker", check=False)
    assert all(torch.equal(found.permutations[g], p) for g, p in pair.permutations.items())
    objective = METHODS["kronecker"].objective(problem, problem.generator())
    check_gain_law(objective)
    one, other = (drawn(lambda: gpt(vocabulary=7, width=8, depth=1, heads=2, context=4), k) for k in (0, 1))
    tokens = torch.randint(0, 7, (8, 4), generator=generator(5))
    with pytest.raises(ModelError, match=r"kronecker: .* moves '.*', which is no weight or bias"):
        isthmus.align(one, other, batches=[Batch((tokens,))], method="kronecker", check=False)
