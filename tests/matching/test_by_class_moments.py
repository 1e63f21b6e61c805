"""Classes matched by activations: streams turned, signs and factors found, heads by their weights."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from isthmus.batches import Batch
from isthmus.couplings import Coupling, Linear, Monomial, Permutation, Rotation
from isthmus.matching import (
    ByClass,
    CoordinateDescent,
    Gain,
    LeastSquares,
    MomentObjective,
    Problem,
    Procrustes,
    ScaledAssignment,
    SidedSolver,
    SignedAssignment,
    SinglePass,
    Structure,
    TermObjective,
)
from isthmus.matching._activations import ActivationMatching
from isthmus.matching._objectives import UnitSpreads
from isthmus.states import state_of
from isthmus.symmetry import Relabelling
from isthmus.testing import gpt, randomise_state


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


def drawn(build, seed: int = 0) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return randomise_state(build(), generator(seed)).eval().double()


def chain(act: type[nn.Module]) -> nn.Module:
    return nn.Sequential(nn.Linear(9, 7), act(), nn.Linear(7, 6), act(), nn.Linear(6, 5))


CLASSES: dict[str, tuple[type[nn.Module], SidedSolver]] = {
    "signed": (nn.Tanh, SignedAssignment()),
    "positive": (nn.ReLU, ScaledAssignment("norms")),
    "monomial": (nn.Identity, ScaledAssignment("norms", signed=True)),
    "orthogonal": (nn.Identity, Procrustes()),
    "general": (nn.Identity, LeastSquares()),
}


def coupling_of(kind: str, size: int, seed: int) -> Coupling:
    order = torch.randperm(size, generator=generator(seed))
    signs = torch.where(normal(size, seed=seed) < 0, -1.0, 1.0).double()
    factors = (0.3 * normal(size, seed=seed + 1)).clamp(-0.9, 0.9).exp()
    if kind == "orthogonal":
        return Procrustes()(normal(size, size, seed=seed))
    if kind == "general":
        return Linear(torch.eye(size).double() + 0.2 * normal(size, size, seed=seed))
    ones = torch.ones(size).double()
    return Monomial(order, (ones if kind == "positive" else signs) * (ones if kind == "signed" else factors))


@pytest.mark.parametrize("correlation", [False, True])
@pytest.mark.parametrize("kind", CLASSES)
def test_planted_couplings_are_found_by_activations(kind: str, correlation: bool) -> None:
    act, solver = CLASSES[kind]
    model = drawn(lambda: chain(act))
    x = normal(400, 9, seed=3)
    spec = Problem(model, args=x[:3]).spec
    truth = {n: coupling_of(kind, g.size, 11 + k) for k, (n, g) in enumerate(spec.groups.items())}
    state = {n: t.clone() for n, t in state_of(model).items()}
    other = Relabelling(spec, truth).inverse().apply(state)
    problem = Problem(model, other, batches=[Batch((x,))], spec=spec)
    matching = ActivationMatching(
        problem, correlation, None, generator(), ByClass(dict.fromkeys(spec.groups, solver))
    )
    match, _ = matching.run()
    recovered = Relabelling(spec, match.couplings).apply(other)
    limit = 1e-9 if kind != "general" else 1e-3
    for name, tensor in state.items():
        assert torch.allclose(recovered[name], tensor, atol=limit), name


def moments(correlation: bool = False) -> MomentObjective:
    one, two = drawn(lambda: chain(nn.ReLU)), drawn(lambda: chain(nn.ReLU), 1)
    problem = Problem(one, two, batches=[Batch((normal(200, 9, seed=3),))])
    matching = ActivationMatching(problem, correlation, None, generator())
    return matching.objective(dict(problem.joint_moments()), problem.seen.views)


@pytest.mark.parametrize("correlation", [False, True])
def test_gains_are_relative_to_any_coupling(correlation: bool) -> None:
    objective = moments(correlation)
    for cluster in objective.structure.clusters:
        size = objective.structure.sizes[cluster[0]]
        for kind in ("monomial", "orthogonal"):
            here, step = coupling_of(kind, size, 3), coupling_of(kind, size, 4)
            (gain,) = objective.gains(cluster, {cluster[0]: here})
            found = gain.value({cluster[0]: step})
            after = objective.structure.followed({cluster[0]: here}, cluster, {cluster[0]: step})
            assert found == pytest.approx(objective.gains(cluster, {})[0].value(after), rel=1e-10)


def test_costs_are_mean_squared_distances_under_factors_too() -> None:
    one, two = drawn(lambda: chain(nn.ReLU)), drawn(lambda: chain(nn.ReLU), 1)
    x = normal(200, 9, seed=3)
    objective = moments()
    name = objective.structure.clusters[0][0]
    h_a, h_b = (net[:2](x).detach() for net in (one, two))  # pyright: ignore[reportIndexIssue]
    h_a, h_b = h_a - h_a.mean(0), h_b - h_b.mean(0)
    for coupling in (coupling_of("monomial", 7, 5), Permutation(torch.randperm(7, generator=generator(2)))):
        expected = (h_a - coupling.carry(h_b, 1)).square().mean(0).sum() / 7
        assert objective.cost(name, {name: coupling}) == pytest.approx(float(expected), rel=1e-6)


def test_cells_of_several_units_are_carried_together() -> None:
    gain = Gain(normal(6, 6, seed=1), {"heads": torch.arange(6).reshape(2, 3)})
    signs = Monomial(torch.tensor([1, 0]), torch.tensor([1.0, -1.0]))
    matrix = torch.kron(signs.matrix(), torch.eye(3).double())
    assert gain.value({"heads": signs}) == pytest.approx(float((gain.matrix * matrix).sum()))
    assert torch.allclose(gain.moved({"heads": signs}).matrix, gain.matrix @ matrix.T)


def test_factors_keep_within_their_bound_and_start_from_where_units_are() -> None:
    size = 4
    units = {("u",): _spreads(torch.tensor([16.0, 1.0, 1.0, 0.0]), torch.ones(size))}
    structure = Structure.flat({"u": size})
    gain = {("u",): [Gain(torch.eye(size).double(), {"u": torch.arange(size)[:, None]})]}
    objective = MomentObjective(structure, gain, {("u",): 8.0}, TermObjective(structure, []), units)
    solver = ByClass({"u": ScaledAssignment("norms", alone=3.0)})
    match = SinglePass().run(objective, solver, None, generator())
    assert match.couplings["u"].matrix().diagonal().tolist() == pytest.approx([3.0, 1.0, 1.0, 1.0])
    wide = ByClass({"u": ScaledAssignment("norms", alone=100.0)})
    start = {"u": Monomial(torch.arange(size), torch.tensor([2.0, 0.5, 1.0, 1.0]))}
    descended = CoordinateDescent(max_sweeps=1).run(objective, wide, start, generator())
    assert descended.couplings["u"].matrix().diagonal().tolist() == pytest.approx([4.0, 1.0, 1.0, 1.0])


def _spreads(energy_a: Tensor, energy_b: Tensor) -> UnitSpreads:
    return UnitSpreads(energy_a.double(), energy_b.double(), energy_a.double(), energy_b.double())


def test_units_that_never_vary_keep_their_factors_apart() -> None:
    """Dead units are paired by weights; the live ones keep pairs and factors."""
    model = drawn(lambda: chain(nn.ReLU))
    with torch.no_grad():
        model[0].bias[[1, 4]] = -100.0  # pyright: ignore
    x = normal(300, 9, seed=3)
    spec = Problem(model, args=x[:3]).spec
    truth = {n: coupling_of("positive", g.size, 11 + k) for k, (n, g) in enumerate(spec.groups.items())}
    state = {n: t.clone() for n, t in state_of(model).items()}
    other = Relabelling(spec, truth).inverse().apply(state)
    problem = Problem(model, other, batches=[Batch((x,))], spec=spec)
    by_class = ByClass(dict.fromkeys(spec.groups, ScaledAssignment("norms")))
    matching = ActivationMatching(problem, True, None, generator(), by_class)
    match, _ = matching.run()
    assert any("2 units of A and 2 of B never vary" in note for note in matching.notes)
    name = next(n for n, g in spec.groups.items() if g.size == 7)
    found, expected = match.couplings[name], truth[name]
    assert isinstance(found, Monomial)
    assert isinstance(expected, Monomial)
    assert torch.equal(found.index, expected.index)
    live = [0, 2, 3, 5, 6]
    assert torch.allclose(found.factors[live], expected.factors[live])
    assert found.factors[[1, 4]].tolist() == [1.0, 1.0]


def test_heads_are_matched_by_their_weights_after_what_is_seen() -> None:
    model = drawn(lambda: gpt(vocabulary=11, width=8, depth=1, heads=2, context=5))
    tokens = torch.randint(0, 11, (40, 5), generator=generator(7))
    problem = Problem(model, args=tokens[:3])
    spec, state = problem.spec, {n: t.clone() for n, t in state_of(model).items()}
    inner = [
        n for n, g in spec.groups.items() if g.within and {s.role for s in g.slots} == {"holds", "reads"}
    ]
    truth: dict[str, Coupling] = {
        n: Permutation(torch.randperm(g.size, generator=generator(k)))
        for k, (n, g) in enumerate(spec.groups.items())
    }
    truth.update({n: coupling_of("general", spec.groups[n].size, 20 + k) for k, n in enumerate(inner)})
    other = Relabelling(spec, truth).inverse().apply(state)
    pair = Problem(model, other, batches=[Batch((tokens,))], spec=spec)
    by_class = ByClass(dict.fromkeys(inner, LeastSquares()))
    match, objective = ActivationMatching(pair, True, None, generator(), by_class).run()
    recovered = Relabelling(spec, match.couplings).apply(other)
    for name, tensor in state.items():
        assert torch.allclose(recovered[name], tensor, atol=1e-6), name
    assert isinstance(objective.fallback, TermObjective)
    assert not any(inner[0] in cluster for cluster in objective.seen)


def test_streams_are_turned_by_what_their_readers_see() -> None:
    match = SinglePass().run(
        moments(), ByClass(dict.fromkeys(moments().structure.sizes, Procrustes())), None, generator()
    )
    assert all(isinstance(c, Rotation) for c in match.couplings.values())
    assert match.sweeps[0] == pytest.approx(moments().value(match.couplings))
    assert math.isfinite(match.sweeps[0])
