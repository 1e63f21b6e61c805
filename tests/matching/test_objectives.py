"""Objectives keep the contract with every schedule, and their gains and values are what they say."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from isthmus.batches import Batch
from isthmus.couplings import index_of
from isthmus.errors import DataError
from isthmus.layers import find_sites
from isthmus.matching import (
    CoordinateDescent,
    Gain,
    MomentObjective,
    Objective,
    Schedule,
    SinglePass,
    Structure,
    TermObjective,
    assignment_solver,
    couple,
    match,
    total_gain,
)
from isthmus.matching._layers import Layers
from isthmus.matching._terms import (
    LayeredPair,
    activation_objective,
    covariance_objective,
    incoming_weight_objective,
    weight_objective,
)
from isthmus.moments import SiteRunner, cross_moments, input_statistics
from isthmus.states import state_of
from isthmus.symmetry import discover, discover_from_trace, trace
from isthmus.testing import gpt, mlp, randomise_state, reference_inputs, reference_network
from isthmus.testing._contracts import check_alignment_contract


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def seeded(build: Callable[[], nn.Module], seed: int) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return randomise_state(build(), generator(seed)).eval()


class Recurrent(nn.Module):
    """One matrix whose rows and columns move together: its gain is only a linearisation."""

    def __init__(self) -> None:
        super().__init__()
        self.read, self.step, self.write = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.read(x))
        for _ in range(2):
            h = torch.relu(h + self.step(h))
        return self.write(h)


NETWORKS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "mlp": (lambda: mlp(5, 8, 2, 3), lambda: torch.randn(40, 5, generator=generator(7))),
    "one unit": (lambda: mlp(2, 1, 1, 1), lambda: torch.randn(9, 2, generator=generator(7))),
    "groupnorm": (
        lambda: reference_network("groupnorm_resnet"),
        lambda: reference_inputs("groupnorm_resnet", 4, generator=generator(7))[0],
    ),
    "recurrent": (Recurrent, lambda: torch.randn(40, 4, generator=generator(7))),
    "gpt": (
        lambda: gpt(vocabulary=11, width=8, depth=1, heads=2, context=5),
        lambda: torch.randint(0, 11, (6, 5), generator=generator(7)),
    ),
}
OBJECTIVES = ["weights", "weights-incoming", "covariance", "tied covariance", "activations", "correlation"]
SCHEDULES = {
    "single pass": SinglePass(),
    "forward": CoordinateDescent(),
    "random": CoordinateDescent(order="random"),
    "one sweep": CoordinateDescent(max_sweeps=1),
}
_CACHE: dict[str, dict[str, Objective]] = {}


def pair_of(a: nn.Module, b: nn.Module, x: Tensor) -> LayeredPair:
    traced = trace(a, (x[:2],))
    layers = Layers(
        discover_from_trace(traced), find_sites(traced), tuple(n for n, _ in a.named_parameters())
    )
    return LayeredPair(layers, state_of(a), state_of(b))


def all_objectives(a: nn.Module, b: nn.Module, x: Tensor) -> dict[str, Objective]:
    pair = pair_of(a, b, x)
    runner = SiteRunner(a, Batch((x,)))
    statistics = input_statistics(runner, pair.state_a, [x], runner.sites, generator())
    taps = {c: [v.tap for v in views] for c, views in pair.layers.views().items() if views}
    moments = cross_moments(runner, pair.state_a, pair.state_b, [x], taps)
    return {
        "weights": weight_objective(pair),
        "weights-incoming": incoming_weight_objective(pair),
        "covariance": covariance_objective(pair, statistics),
        "tied covariance": covariance_objective(pair, statistics, tie_outgoing=True),
        "activations": activation_objective(pair, moments, correlation=False),
        "correlation": activation_objective(pair, moments, correlation=True),
    }


def objective_of(network: str, name: str) -> Objective:
    if network not in _CACHE:
        build, inputs = NETWORKS[network]
        _CACHE[network] = all_objectives(seeded(build, 0), seeded(build, 1), inputs())
    return _CACHE[network][name]


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("network", NETWORKS)
def test_contract(network: str, objective: str, schedule: str) -> None:
    if network == "recurrent" and "covariance" in objective:
        # The second step of A sees other inputs than the first: sites of one weight, each with its own metric.
        assert len(objective_of(network, objective).structure.clusters) == 1
    check_alignment_contract(objective_of(network, objective), SCHEDULES[schedule])


class _Broken:
    """An objective whose gains ignore where B's units already are."""

    def __init__(self, inner: Objective) -> None:
        self.inner, self.structure, self.value, self.cost = inner, inner.structure, inner.value, inner.cost

    def gains(self, cluster: tuple[str, ...], permutations: dict[str, Tensor], *, all_terms: bool = True):
        others = {n: p for n, p in permutations.items() if n not in cluster}
        return self.inner.gains(cluster, others, all_terms=all_terms)


class _Restless:
    """A schedule that draws from torch's global generator."""

    def run(self, objective, solver, start, generator):
        found = SinglePass().run(objective, solver, start, generator)
        name = next(iter(found.permutations))
        shuffled = found.permutations[name][torch.randperm(len(found.permutations[name]))]
        return type(found)({**found.permutations, name: shuffled}, found.sweeps, found.status)


def test_the_contract_can_be_broken() -> None:
    objective = objective_of("mlp", "weights")
    with pytest.raises(AssertionError, match="not relative to the current permutations"):
        check_alignment_contract(_Broken(objective), SinglePass())  # type: ignore[arg-type]
    with pytest.raises(AssertionError, match="global generator"):
        check_alignment_contract(objective, _Restless())  # type: ignore[arg-type]


@pytest.mark.parametrize("network", ["mlp", "groupnorm", "gpt"])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_matching_lowers_the_cost_of_what_is_matched(network: str, name: str) -> None:
    objective = objective_of(network, name)
    found = CoordinateDescent().run(objective, assignment_solver, None, generator()).permutations
    sizes = objective.structure.sizes
    before, after = (sum(n * objective.cost(g, p) for g, n in sizes.items()) for p in ({}, found))
    assert all(objective.cost(group, found) >= -1e-9 for group in sizes)
    if network == "groupnorm":  # few of its units are free
        assert after <= before + 1e-9
        assert objective.value(found) >= objective.value({}) - 1e-9
    else:
        assert after < 0.85 * before
        assert objective.value(found) > objective.value({}) + 0.1


@pytest.mark.parametrize("network", ["mlp", "groupnorm", "gpt"])
def test_the_value_splits_over_groups(network: str) -> None:
    """Leaving out what a group does not touch changes nothing in differences."""
    for name in OBJECTIVES:
        objective = objective_of(network, name)
        found = SinglePass().run(objective, assignment_solver, None, generator()).permutations
        for cluster in objective.structure.clusters:
            without = {g: p for g, p in found.items() if g not in cluster}
            whole = objective.value(found) - objective.value(without)
            part = objective.value(found, cluster) - objective.value(without, cluster)
            assert part == pytest.approx(whole, rel=1e-9, abs=1e-9 * abs(objective.value({})))


def test_gains_of_weights_are_differences_of_the_value() -> None:
    objective = objective_of("mlp", "weights")
    start = SinglePass().run(objective, assignment_solver, None, generator()).permutations
    ring = torch.arange(8).roll(1)
    for cluster in objective.structure.clusters:
        gains = objective.gains(cluster, start)
        moved = objective.structure.followed(start, cluster, {cluster[0]: ring})
        rise = total_gain(gains, {cluster[0]: ring}) - total_gain(gains, {})
        assert rise == pytest.approx(objective.value(moved) - objective.value(start), rel=1e-9)


def test_covariance_gain_is_the_mean_product_of_pre_activations() -> None:
    """Theory, section 1.3: ``W_A Σ W_Bᵀ = E[(W_A h)(W_B h)ᵀ]``, here with biases, behind a hidden layer."""
    a, b, x = (seeded(NETWORKS["mlp"][0], 0), seeded(NETWORKS["mlp"][0], 1), NETWORKS["mlp"][1]())
    objective = all_objectives(a, b, x)["covariance"]
    first, second = objective.structure.clusters
    p = couple(objective.gains(first, {}), first, assignment_solver)
    (gain,) = objective.gains(second, p)
    h = torch.relu(a.double().layers[0](x.double()))  # type: ignore[index, operator]
    moved = {k: v.double() for k, v in state_of(b).items()}
    za = a.layers[1](h)  # type: ignore[index, operator]
    zb = h @ moved["layers.1.weight"][:, index_of(p["layers.0"])].T + moved["layers.1.bias"]
    direct = (za.T @ zb / len(x)).detach()
    assert float((gain.matrix - direct).norm() / direct.norm()) < 1e-6, "float32 statistics"
    assert gain.matrix.dtype == torch.float64


def test_covariance_costs_are_errors_of_pre_activations_of_convolutions_and_norms() -> None:
    """The matched cost of a folded layer is the mean squared difference of what its norm puts out."""

    def build() -> nn.Module:
        return nn.Sequential(nn.Conv2d(2, 4, 3, stride=2, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(),
                             nn.Linear(4 * 9, 3))  # fmt: skip

    a, b = seeded(build, 0), seeded(build, 1)
    x = torch.randn(30, 2, 6, 6, generator=generator(2))
    objective = all_objectives(a, b, x)["covariance"]
    za, zb = (m[1](m[0](x)).detach().double().movedim(1, -1).reshape(-1, 4) for m in (a, b))  # type: ignore[index]
    ring = torch.tensor([1, 2, 3, 0])
    for permutation in (torch.arange(4), ring):
        direct = float((za - zb[:, permutation]).square().mean())
        assert objective.cost("0", {"0": permutation}) == pytest.approx(direct + 0.0, rel=1e-4), (
            "only the first layer is seen from its own group"
        )


def test_activation_costs_are_variances_of_differences() -> None:
    a, b, x = (seeded(NETWORKS["mlp"][0], 0), seeded(NETWORKS["mlp"][0], 1), NETWORKS["mlp"][1]())
    objective = all_objectives(a, b, x)["activations"]
    ha, hb = (torch.relu(m.layers[0](x)).detach().double() for m in (a, b))  # type: ignore[index, operator]
    ring = torch.arange(8).roll(1)
    direct = (ha - hb[:, ring]).var(0, correction=0).mean()
    assert objective.cost("layers.0", {"layers.0": ring}) == pytest.approx(float(direct), rel=1e-5)


def test_tying_adds_the_distance_of_outgoing_weights_by_energy() -> None:
    a, b, x = (seeded(NETWORKS["mlp"][0], 0), seeded(NETWORKS["mlp"][0], 1), NETWORKS["mlp"][1]())
    found = all_objectives(a, b, x)
    cluster = ("layers.0",)
    plain, tied = (total_matrix(found[k].gains(cluster, {})) for k in ("covariance", "tied covariance"))
    h = torch.relu(a.layers[0](x)).detach().double()  # type: ignore[index, operator]
    energy = h.square().mean(0)
    wa, wb = (state_of(m)["layers.1.weight"].double() for m in (a, b))
    expected = energy[:, None] * (wa.T @ wb - 0.5 * wb.square().sum(0))
    assert torch.allclose(tied - plain, expected, rtol=1e-4, atol=1e-7)


def total_matrix(gains: object) -> Tensor:
    return torch.stack([g.matrix for g in gains]).sum(0)  # type: ignore[attr-defined]


def test_a_group_without_any_term_stays_where_it_is() -> None:
    objective = TermObjective(Structure.flat({"idle": 3}), [])
    for schedule in (SinglePass(), CoordinateDescent()):
        found = match(objective, schedule=schedule)
        assert sorted(found.permutations["idle"].tolist()) == [0, 1, 2]
    assert objective.cost("idle", {}) == 0.0
    assert objective.value({}) == 0.0


def test_activations_fall_back_to_weights_where_nothing_is_seen() -> None:
    structure = Structure.flat({"hidden": 3, "seen": 3})
    ring = torch.tensor([1, 2, 0])
    matrix = torch.zeros(3, 3, dtype=torch.float64)
    matrix[torch.arange(3), ring] = 1.0
    seen = Gain(matrix, {"seen": torch.arange(3)[:, None]})
    objective = MomentObjective(
        structure, {("seen",): [seen]}, {("seen",): 6.0}, TermObjective(structure, [])
    )
    assert objective.structure.clusters == (("seen",), ("hidden",))
    found = match(objective)
    assert torch.equal(found.permutations["seen"], ring)
    assert objective.cost("seen", found.permutations) == pytest.approx((6 - 2 * 3) / 3)
    assert objective.value(found.permutations) == pytest.approx(3.0)
    assert objective.value(found.permutations, ["hidden"]) == 0.0
    assert objective.cost("hidden", {}) == 0.0


def test_queries_and_keys_are_seen_where_they_are_computed() -> None:
    """No layer reads them, so the cluster of heads has views of what flows in and of what comes out."""
    build, inputs = NETWORKS["gpt"]
    model = seeded(build, 0)
    layers = pair_of(model, model, inputs()).layers
    for cluster, views in layers.views().items():
        assert {name for v in views for name in v.grid.members} == set(cluster)
    (heads,) = (c for c in layers.structure.clusters if len(c) > 1)
    assert {v.tap.inflow for v in layers.views()[heads]} == {True, False}


def test_random_orders_are_seeded() -> None:
    objective = objective_of("gpt", "weights")
    runs = [
        match(objective, schedule=CoordinateDescent(order="random"), generator=generator(s)) for s in (0, 0)
    ]
    assert runs[0].sweeps == runs[1].sweeps
    schedule = CoordinateDescent(order="random")
    clusters = [(str(k),) for k in range(8)]
    orders = [tuple(schedule._ordered(clusters, generator(s))) for s in range(5)]
    assert len(set(orders)) > 1
    assert all(sorted(o) == clusters for o in orders)


def test_the_sweep_limit_is_a_status() -> None:
    objective = objective_of("mlp", "weights")
    assert match(objective, schedule=CoordinateDescent(max_sweeps=0)).status == "sweep limit reached"
    assert match(objective, schedule=CoordinateDescent()).status == "converged"
    assert match(objective).status == "single pass"


@pytest.mark.parametrize(
    ("settings", "words"),
    [({"order": "backward"}, "expected order 'forward' or 'random'"), ({"max_sweeps": -1}, "at least 0")],
)
def test_bad_schedules_are_refused(settings: dict[str, object], words: str) -> None:
    with pytest.raises(DataError, match=words):
        CoordinateDescent(**settings)  # type: ignore[arg-type]


def test_a_single_pass_matches_what_is_entangled_after_the_rest() -> None:
    """Outputs and inputs of a grouped convolution share its groups: the inputs are known first."""

    def build() -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(2, 6, 1), nn.ReLU(), nn.Conv2d(6, 9, 3, groups=3), nn.ReLU(), nn.Conv2d(9, 2, 1)
        )

    a = seeded(build, 0)
    x = torch.randn(6, 2, 5, 5, generator=generator(1))
    spec = discover(a, (x[:1],))
    pair = pair_of(a, a, x)
    (cluster,) = (c for c in pair.layers.structure.clusters if len(c) > 1)
    assert len(cluster) == 1 + 3 + 3
    objective = incoming_weight_objective(pair)
    first = objective.gains(cluster, {}, all_terms=False)
    known = {name for g in first for name in g.members}
    assert known == {name for name in cluster if name.startswith("0")}
    found = match(objective).permutations
    assert set(found) == set(spec.groups)
    assert all(torch.equal(p, torch.arange(len(p))) for p in found.values()), "A matches itself"


def test_schedules_are_values() -> None:
    schedules: list[Schedule] = [SinglePass(), CoordinateDescent(order="random")]
    assert schedules == [SinglePass(), CoordinateDescent(order="random")]
