"""Groups matched by the solver of their class: both sides add up, values are distances, planted truth is found."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache

import pytest
import torch
from torch import Tensor, nn

from isthmus.batches import Batch
from isthmus.couplings import Coupling, Linear, Monomial, Permutation, Rotation
from isthmus.errors import SymmetryError
from isthmus.matching import (
    Assignment,
    BalancedProcrustes,
    ByClass,
    CoordinateDescent,
    LeastSquares,
    Problem,
    Procrustes,
    ScaledAssignment,
    SidedSolver,
    Sides,
    SignedAssignment,
    SinglePass,
    TermObjective,
    Then,
    covariance_objective,
    incoming_weight_objective,
    weight_objective,
    working,
)
from isthmus.matching._by_class import held_back
from isthmus.matching._sided import compared_of, sides_of
from isthmus.matching._solvers import as_sides
from isthmus.states import state_of
from isthmus.symmetry import Relabelling, Slot, SymmetrySpec
from isthmus.testing import gpt, llama, mlp, randomise_state, reference_inputs, reference_network


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


def drawn(build: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return randomise_state(build(), generator(seed)).eval().double()


NETWORKS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "mlp": (lambda: mlp(5, 6, 3, 4), lambda: normal(8, 5, seed=7)),
    "resnet20": (
        lambda: reference_network("resnet20"),
        lambda: reference_inputs("resnet20", 4, generator=generator(7))[0].double(),
    ),
    "gpt": (
        lambda: gpt(vocabulary=11, width=8, depth=1, heads=2, context=5),
        lambda: torch.randint(0, 11, (6, 5), generator=generator(7)),
    ),
    "llama": (
        lambda: llama(11, 8, 1, 4, kv_heads=2, hidden=6),
        lambda: torch.randint(0, 11, (6, 5), generator=generator(7)),
    ),
    "linear": (
        lambda: nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)),
        lambda: normal(8, 4, seed=7),
    ),
}


@cache
def problem(name: str, seed: int = 1) -> Problem:
    build, inputs = NETWORKS[name]
    return Problem(drawn(build), drawn(build, seed), batches=[Batch((inputs(),))])


def objectives(name: str) -> dict[str, TermObjective]:
    found = problem(name)
    statistics = found.input_statistics(found.generator())
    return {
        "weights": weight_objective(found.pair),
        "incoming": incoming_weight_objective(found.pair),
        "covariance": covariance_objective(found.pair, statistics),
    }


def permutations(spec: SymmetrySpec, seed: int) -> dict[str, Tensor]:
    source = generator(seed)
    return {name: torch.randperm(g.size, generator=source) for name, g in spec.groups.items()}


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] * (n == "resnet20")) for n in NETWORKS]
)
@pytest.mark.parametrize("kind", ["weights", "incoming", "covariance"])
def test_sides_add_up_to_the_gains(name: str, kind: str) -> None:
    objective = objectives(name)[kind]
    at = permutations(objective.structure.spec, 3)
    for cluster in objective.structure.clusters:
        gains = objective.gains(cluster, at)
        compared = compared_of(objective.terms(cluster), at, cluster)
        for group in cluster:
            size = objective.structure.sizes[group]
            sides = sides_of(compared, group, size, sided=False)
            expected = sum(
                (g.reduced(group) for g in gains if group in g.members), torch.zeros(size, size).double()
            )
            assert torch.allclose(sides.total, expected, rtol=1e-9, atol=1e-9), group
            assert sides.of_a is not None
            assert sides.of_b is not None


def carried(kind: str, size: int, seed: int) -> Coupling:
    order = torch.randperm(size, generator=generator(seed))
    if kind == "permutation":
        return Permutation(order)
    if kind == "monomial":
        return Monomial(
            order, normal(size, seed=seed).exp() * torch.where(normal(size, seed=seed + 1) < 0, -1.0, 1.0)
        )
    if kind == "rotation":
        return Procrustes()(normal(size, size, seed=seed))
    return Linear(torch.eye(size).double() + 0.2 * normal(size, size, seed=seed))


@pytest.mark.parametrize("kind", ["permutation", "monomial", "rotation", "linear"])
@pytest.mark.parametrize("name", ["mlp", "linear"])
def test_sides_say_by_how_much_the_value_rises(name: str, kind: str) -> None:
    """Whatever the coupling, and wherever all other groups are; each group acts once on every tensor."""
    objective = weight_objective(problem(name).pair).with_costs()
    structure = objective.structure
    at: dict[str, Coupling] = {n: carried(kind, size, 5) for n, size in structure.sizes.items()}
    for cluster in structure.clusters:
        size = structure.sizes[cluster[0]]
        sides = sides_of(compared_of(objective.terms(cluster), at, cluster), cluster[0], size)
        for seed in range(3):
            step = carried(kind, size, 30 + seed)
            after = structure.followed(at, cluster, {cluster[0]: step})
            rise = objective.value(after) - objective.value(at)
            expected = sides.value(step) - sides.value(Permutation.identity(size))
            assert rise == pytest.approx(expected, rel=1e-9, abs=1e-9)


def test_the_metric_counts_in_norms() -> None:
    """Covariance: what a factor on the outputs of one layer does to that layer's own error."""
    found = problem("mlp")
    objective = covariance_objective(found.pair, found.input_statistics(found.generator()))
    structure = objective.structure
    cluster = structure.clusters[0]
    (term, *_) = objective.terms(cluster)
    sides = sides_of(compared_of([term], {}, cluster), cluster[0], structure.sizes[cluster[0]])
    for seed in range(3):
        step = carried("monomial", structure.sizes[cluster[0]], seed)
        rise = -0.5 * (term.inner_product.cost({cluster[0]: step}) - term.inner_product.cost({}))
        assert sides.value(step) - sides.value(Permutation.identity(6)) == pytest.approx(rise, rel=1e-9)
    norms = sides.norms("A")[0]
    assert float(norms.sum()) == pytest.approx(term.inner_product.norm_a or 0.0, rel=1e-9)


def planted(
    spec: SymmetrySpec, state: Mapping[str, Tensor], couplings: Mapping[str, Coupling]
) -> dict[str, Tensor]:
    """Return B, which the couplings carry to the state."""
    return Relabelling(spec, couplings).inverse().apply(state)


def outputs_of(model: nn.Module, state: Mapping[str, Tensor], inputs: Tensor) -> Tensor:
    return torch.func.functional_call(model, dict(state), (inputs,), tie_weights=False)


CLASSES: dict[str, tuple[str, SidedSolver]] = {
    "signed": ("tanh", SignedAssignment()),
    "positive": ("relu", ScaledAssignment()),
    "norms": ("relu", ScaledAssignment("norms")),
    "monomial": ("identity", ScaledAssignment(signed=True)),
    "general": ("identity", LeastSquares()),
    "orthogonal": ("identity", Procrustes()),
}


def coupling_of(kind: str, size: int, seed: int) -> Coupling:
    order, size_ = torch.randperm(size, generator=generator(seed)), size
    signs = torch.where(normal(size_, seed=seed) < 0, -1.0, 1.0).double()
    factors = (0.7 * normal(size_, seed=seed + 1)).exp()
    return {
        "signed": lambda: Monomial(order, signs),
        "positive": lambda: Monomial(order, factors),
        "norms": lambda: Monomial(order, factors),
        "monomial": lambda: Monomial(order, signs * factors),
        "general": lambda: carried("linear", size, seed),
        "orthogonal": lambda: carried("rotation", size, seed),
    }[kind]()


ACTIVATIONS = {"tanh": nn.Tanh, "relu": nn.ReLU, "identity": nn.Identity}


@cache
def chain(activation: str) -> Problem:
    act = ACTIVATIONS[activation]

    def build() -> nn.Module:
        return nn.Sequential(nn.Linear(9, 7), act(), nn.Linear(7, 6), act(), nn.Linear(6, 5))

    return Problem(drawn(build), drawn(build, 1), args=normal(3, 9, seed=8))


@pytest.mark.parametrize("noise", [0.0, 0.02])
@pytest.mark.parametrize("kind", CLASSES)
def test_planted_couplings_of_every_class_are_found(kind: str, noise: float) -> None:
    activation, solver = CLASSES[kind]
    x = normal(10, 9, seed=8)
    found = chain(activation)
    model = found.model_a
    state = {n: t.clone() for n, t in state_of(model).items()}
    truth = {name: coupling_of(kind, g.size, 11 + k) for k, (name, g) in enumerate(found.spec.groups.items())}
    other = planted(found.spec, state, truth)
    assert torch.allclose(outputs_of(model, other, x), outputs_of(model, state, x), atol=1e-10)
    other = {n: t + noise * t.std(correction=0) * normal(*t.shape, seed=9) for n, t in other.items()}
    objective = weight_objective(replace(found.pair, state_b=other))
    by_class = ByClass(dict.fromkeys(found.spec.groups, solver))
    match = Then(SinglePass(), CoordinateDescent()).run(objective, by_class, None, generator())
    assert all(b >= a for a, b in itertools.pairwise(match.sweeps))
    recovered = Relabelling(found.spec, match.couplings).apply(other)
    error = sum(float((recovered[n] - t).square().sum()) for n, t in state.items())
    scale = sum(float(t.square().sum()) for t in state.values())
    assert error <= (1e-10 if noise == 0 else 0.01) * scale
    assert torch.allclose(outputs_of(model, recovered, x), outputs_of(model, other, x), atol=1e-8)


def test_the_descent_goes_on_where_permutations_stop() -> None:
    """Two independent networks: each class is worth at least what the class inside it is."""
    objective = weight_objective(chain("relu").pair).with_costs()
    names = list(objective.structure.sizes)
    schedule = Then(SinglePass(), CoordinateDescent())
    plain = schedule.run(objective, ByClass(), None, generator())
    values = [objective.value(plain.couplings)]
    few = LeastSquares(most_steps=3)
    for solver in (SignedAssignment(), ScaledAssignment(), ScaledAssignment(signed=True), few):
        by_class = ByClass(dict.fromkeys(names, solver))
        found = CoordinateDescent(max_sweeps=8).run(objective, by_class, plain.couplings, generator())
        assert found.sweeps[0] == pytest.approx(values[0])
        values.append(found.sweeps[-1])
    assert values[0] < values[1]
    assert values[0] < values[2] < values[3] < values[4]


def test_heads_are_paired_by_what_their_members_are_worth() -> None:
    """Values and outputs of a head allow any invertible map; heads change places with them."""
    found = problem("gpt")
    spec, state = found.spec, {n: t.clone() for n, t in state_of(found.model_a).items()}
    inner = [
        n for n, g in spec.groups.items() if g.within and {s.role for s in g.slots} == {"holds", "reads"}
    ]
    assert len(inner) == 2
    outer = spec.groups[inner[0]].within[0][0]
    truth: dict[str, Coupling] = {outer: Permutation(torch.tensor([1, 0]))}
    truth.update({n: carried("linear", spec.groups[n].size, 20 + k) for k, n in enumerate(inner)})
    other = planted(spec, state, truth)
    tokens = torch.randint(0, 11, (3, 5), generator=generator(2))
    assert torch.allclose(
        outputs_of(found.model_a, other, tokens), outputs_of(found.model_a, state, tokens), atol=1e-9
    )
    objective = weight_objective(replace(found.pair, state_b=other))
    for solver in (BalancedProcrustes(), LeastSquares()):
        by_class = ByClass(dict.fromkeys(inner, solver))
        match = Then(SinglePass(), CoordinateDescent()).run(objective, by_class, None, generator())
        recovered = Relabelling(spec, match.couplings).apply(other)
        for name, tensor in state.items():
            assert torch.allclose(recovered[name], tensor, atol=1e-7), name
        assert match.couplings[outer] == truth[outer]


class _Worst:
    """A solver that finds what is least."""

    acts = "orthogonal"

    def __call__(self, gain: Sides | Tensor) -> Coupling:
        return Procrustes()(-as_sides(gain).total)


def test_families_that_meet_on_one_axis_are_improved_group_after_group() -> None:
    """Grouped queries: the columns that read a value's dimensions are cut by query heads too."""
    found = problem("llama")
    spec = found.spec
    inner = [
        n
        for n, g in spec.groups.items()
        if g.within and {s.role for s in g.slots} == {"holds", "reads"} and len(g.slots) == 2
    ]
    objective = weight_objective(found.pair)
    by_class = ByClass(dict.fromkeys(inner, LeastSquares()))
    match = CoordinateDescent(max_sweeps=5).run(objective, by_class, None, generator())
    assert match.sweeps[-1] > match.sweeps[0]
    assert all(b >= a for a, b in itertools.pairwise(match.sweeps))
    assert match.sweeps[-1] == pytest.approx(objective.with_costs().value(match.couplings))
    assert any(isinstance(match.couplings[n], Linear) for n in inner)
    work = working(objective, ByClass(dict.fromkeys(inner, _Worst())), "float64")
    (cluster,) = (c for c in objective.structure.clusters if inner[0] in c)
    for seed in range(6):
        at: dict[str, Coupling] = {n: Permutation(p) for n, p in permutations(spec, seed).items()}
        change, _ = work.change(cluster, at)
        changed = objective.structure.followed(at, cluster, change)
        assert work.value(changed) >= work.value(at)


def test_only_permutations_are_what_they_were() -> None:
    objective = weight_objective(problem("gpt").pair)
    plain = CoordinateDescent(incremental=False).run(objective, Assignment(), None, generator())
    found = CoordinateDescent().run(objective, ByClass(), None, generator())
    assert all(torch.equal(p, found.permutations[n]) for n, p in plain.permutations.items())
    assert found.sweeps == pytest.approx(plain.sweeps)


def test_slots_that_do_not_say_what_they_are_take_no_factors() -> None:
    objective = weight_objective(problem("linear").pair)
    (cluster, *_) = objective.structure.clusters
    terms = [
        replace(
            t,
            inner_product=replace(t.inner_product, movers=tuple(unknown(m) for m in t.inner_product.movers)),
        )
        for t in objective.terms(cluster)
    ]
    compared = compared_of(terms, {}, cluster)
    with pytest.raises(
        SymmetryError, match="does not say whether it holds or reads its units, so signs, factors"
    ):
        sides_of(compared, cluster[0], 6)
    assert bool(sides_of(compared, cluster[0], 6, sided=False).total.any())


def unknown(movers: Mapping[int, list[tuple[str, Slot]]]) -> dict[int, list[tuple[str, Slot]]]:
    return {axis: [(g, replace(s, role="", power=None)) for g, s in pairs] for axis, pairs in movers.items()}


def test_groups_that_act_otherwise_are_not_paired() -> None:
    objective = weight_objective(problem("linear").pair)
    first, second = (c[0] for c in objective.structure.clusters[:2])
    compared = compared_of(objective.terms((first,)), {}, (first,))
    with pytest.raises(SymmetryError, match="expected both to act on the same axes of the same tensors"):
        sides_of(compared, first, 6, second)


def test_rotations_stay_rotations_from_sweep_to_sweep() -> None:
    found = problem("linear")
    name = next(n for n, g in found.spec.groups.items() if g.size == 6)
    objective = weight_objective(found.pair)
    match = CoordinateDescent().run(objective, ByClass({name: Procrustes()}), None, generator())
    assert isinstance(match.couplings[name], Rotation)
    assert match.sweeps[-1] > match.sweeps[0]


def test_changes_within_bounds_do_not_add_up_to_couplings_beyond() -> None:
    """Readers that are zero hold nothing back: the factor would shrink by its bound in every sweep."""
    one = torch.ones(1).double()
    step = Monomial(torch.tensor([1, 0]), torch.tensor([0.5, -4.0]))
    solver = ScaledAssignment(most=5.0)
    assert held_back(step, None, solver).matrix().equal(step.matrix())
    current = Monomial(torch.tensor([1, 0]), torch.tensor([2.0, 0.25]))
    found = held_back(step, current, solver)
    assert current.then(found).matrix().diagonal().tolist() == [0.2, -5.0]
    assert torch.allclose(found.matrix(), held_back(found, current, solver).matrix())
    wide = Linear(torch.diag(torch.cat([1e3 * one, one])))
    assert held_back(wide, Permutation.identity(2), LeastSquares()).matrix().equal(wide.matrix())
    assert held_back(wide, wide, LeastSquares()) == Permutation.identity(2)
