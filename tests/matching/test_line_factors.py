"""Factors of least error of the midpoint's layers: what they minimise, that they do, and names that ask for them."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import isthmus
from isthmus.batches import Batch
from isthmus.couplings import Coupling, Monomial, Permutation
from isthmus.errors import DataError
from isthmus.matching import METHODS, LayerErrors, Problem, line_factors, method_named, solve
from isthmus.states import state_of
from isthmus.symmetry import Acts, Relabelling
from isthmus.testing import mlp, randomise_state
from isthmus.transport import norm_factors

X = torch.randn(400, 6, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def network(seed: int, width: int = 8, activation: str = "relu") -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = randomise_state(mlp(6, width, 2, 3, activation=activation), generator(seed)).eval().double()
    for name, tensor in state_of(model).items():
        if name.endswith("bias"):
            with torch.no_grad():
                tensor.abs_()  # no unit is dead
    return model


def near(model: nn.Module, noise: float, seed: int = 9) -> nn.Module:
    """Return a network whose tensors are off by noise of a share of their size."""
    other = copy.deepcopy(model)
    for k, tensor in enumerate(state_of(other).values()):
        with torch.no_grad():
            drawn = torch.randn(tensor.shape, generator=generator(seed + k), dtype=tensor.dtype)
            tensor += noise * tensor.std(correction=0) * drawn
    return other


def planted(problem: Problem, *, signs: bool, factors: bool) -> dict[str, Coupling]:
    found: dict[str, Coupling] = {}
    for k, (name, group) in enumerate(problem.spec.groups.items()):
        index = torch.randperm(group.size, generator=generator(30 + k))
        drawn = torch.randn(group.size, generator=generator(60 + k), dtype=torch.float64)
        sizes = (0.6 * drawn).clamp(-0.9, 0.9).exp() if factors else torch.ones_like(drawn)
        found[name] = Monomial(index, sizes * torch.where((drawn < 0) & signs, -1.0, 1.0))
    return found


def midpoint_miss(a: nn.Module, b: nn.Module, couplings: dict[str, Coupling], problem: Problem) -> float:
    """Return the mean squared distance of the midpoint's outputs from the average of both networks' outputs."""
    moved = Relabelling(problem.spec, couplings).apply(state_of(b))
    middle = {n: (t + moved[n]) / 2 for n, t in state_of(a).items()}
    with torch.no_grad():
        halfway = torch.func.functional_call(a, middle, (X,))
        return float((halfway - (a(X) + b(X)) / 2).square().sum(1).mean())


def errors_of(problem: Problem, at: dict[str, Coupling]) -> LayerErrors:
    return LayerErrors.between(problem, at, list(at))


def identity(problem: Problem) -> dict[str, Coupling]:
    return {n: Permutation.identity(g.size) for n, g in problem.spec.groups.items()}


def test_the_error_is_that_of_layers_which_average_weights_and_units() -> None:
    a, b = network(0), network(1)
    problem = Problem(a, b, batches=[Batch((X,))])
    at = planted(problem, signs=False, factors=True)
    errors = errors_of(problem, at)
    logs = {
        n: 0.3 * torch.randn(k, generator=generator(k), dtype=torch.float64) for n, k in errors.sizes.items()
    }
    total = {n: at[n].then(Monomial(torch.arange(len(x)), x.exp())) for n, x in logs.items()}
    moved = Relabelling(problem.spec, total).apply(state_of(b))
    expected = 0.0
    units_a, units_b = X, X
    for name in ("layers.0", "layers.1", "layers.2"):
        weights = [state[f"{name}.weight"] for state in (state_of(a), moved)]
        read_a = units_a @ weights[0].T
        missed = (weights[0] + weights[1]) / 2 @ ((units_a + units_b) / 2).T
        missed = missed - (read_a.T + weights[1] @ units_b.T) / 2
        if name != "layers.0":
            expected += float(missed.square().sum(0).mean() / read_a.var(0, correction=0).sum())
        units_a = torch.relu(read_a + state_of(a)[f"{name}.bias"])
        units_b = torch.relu(units_b @ weights[1].T + moved[f"{name}.bias"])
    assert float(errors.value(logs)) == pytest.approx(expected, rel=1e-9)


def test_the_factor_of_one_unit_is_the_best_there_is() -> None:
    a, b = network(0, width=1), network(3, width=1)
    with torch.no_grad():
        for model in (a, b):
            for tensor in state_of(model).values():
                tensor.abs_()
    problem = Problem(a, b, batches=[Batch((X.abs(),))])
    errors = errors_of(problem, identity(problem))
    found = errors.least()
    least = float(errors.value(found))
    for name in found:
        for step in torch.linspace(-3, 3, 601, dtype=torch.float64):
            tried = {**found, name: torch.full((1,), float(step), dtype=torch.float64)}
            assert float(errors.value(tried)) >= least - 1e-9


def test_of_units_that_have_nothing_in_common_both_sides_ask_in_the_geometric_mean() -> None:
    """The mean square of (r - s/λ)(h - λk) with r ⟂ s and E hk = 0 is least at SEA's factor."""
    a, r, b, s = 3.0, 0.5, 0.2, 4.0
    best = norm_factors((torch.tensor([a]), torch.tensor([r])), (torch.tensor([b]), torch.tensor([s])))
    grid = torch.linspace(-3, 3, 60001, dtype=torch.float64).exp()
    error = (r + s / grid**2) * (a + grid**2 * b)
    assert float(grid[error.argmin()]) == pytest.approx(float(best), rel=1e-3)


def test_the_error_never_rises_and_pairs_stay() -> None:
    a, b = network(0), network(1)
    problem = Problem(a, b, batches=[Batch((X,))], symmetry="all")
    at = solve(problem, "correlation+norms", check=False).couplings
    errors = errors_of(problem, dict(at))
    before = float(errors.value({n: torch.zeros(k, dtype=torch.float64) for n, k in errors.sizes.items()}))
    values = [float(errors.value(errors.least(steps))) for steps in (1, 3, 10, 40)]
    assert all(later <= earlier + 1e-12 for earlier, later in zip([before, *values], values, strict=False))
    assert values[-1] < 0.95 * before
    moved = line_factors(problem, at)
    for name, coupling in moved.items():
        assert isinstance(coupling, Monomial)
        assert isinstance(at[name], Monomial)
        assert torch.equal(coupling.index, at[name].index)  # pyright: ignore[reportAttributeAccessIssue]
        assert bool((coupling.factors > 0).all())


@pytest.mark.parametrize("noise", [0.0, 0.05])
def test_planted_factors_come_back(noise: float) -> None:
    a = network(2)
    first = Problem(a, args=X[:3])
    truth = planted(first, signs=False, factors=True)
    b = near(a, noise)
    b.load_state_dict(Relabelling(first.spec, truth).inverse().apply(state_of(b)))
    problem = Problem(a, b, batches=[Batch((X,))], spec=first.spec, symmetry="all")
    for method in ("weights", "covariance", "correlation", "activations+least-squares", "weights+norms"):
        found = solve(problem, method, check=False).couplings
        for name, coupling in truth.items():
            one = found[name]
            assert isinstance(one, Monomial)
            assert isinstance(coupling, Monomial)
            assert torch.equal(one.index, coupling.index)
            assert float((one.factors / coupling.factors).log().abs().max()) < (0.25 if noise else 1e-3)


def test_planted_signs_come_back_under_noise() -> None:
    a = network(2, activation="tanh")
    first = Problem(a, args=X[:3])
    truth = planted(first, signs=True, factors=False)
    b = near(a, 0.05)
    b.load_state_dict(Relabelling(first.spec, truth).inverse().apply(state_of(b)))
    problem = Problem(a, b, batches=[Batch((X,))], spec=first.spec)
    for method in ("weights+signed", "covariance+all", "correlation+all"):
        found = solve(problem, method, check=False).couplings
        assert all(torch.equal(found[n].matrix(), c.matrix()) for n, c in truth.items())


def test_covariance_is_not_worse_with_factors_where_regression_made_it_so() -> None:
    """A regression on the one side that is seen shrinks every unit of B that agrees with A's but partly."""
    missed = dict.fromkeys(("", "+least-squares", "+norms", "+line"), 0.0)
    for seed in (0, 1, 2):
        a = network(seed, width=32)
        b = near(a, 0.6, seed=100 + seed)
        problem = Problem(a, b, batches=[Batch((X,))])
        for rule in missed:
            found = dict(solve(problem, f"covariance{rule}", check=False).couplings)
            missed[rule] += midpoint_miss(a, b, found, problem)
    assert missed["+least-squares"] > 1.3 * missed[""]
    assert missed["+norms"] <= 1.1 * missed[""]
    assert missed["+line"] < 0.9 * missed[""]


def test_batch_norm_takes_factors_on_the_line() -> None:
    def drawn(seed: int) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            first = [nn.Conv2d(2, 5, 3, padding=1, bias=False), nn.BatchNorm2d(5), nn.ReLU()]
            second = [
                nn.Conv2d(5, 6, 3, stride=2),
                nn.BatchNorm2d(6),
                nn.ReLU(),
                nn.Flatten(),
                nn.Linear(24, 3),
            ]
            return randomise_state(nn.Sequential(*first, *second), generator(seed)).eval().double()

    a, b = drawn(0), drawn(1)
    x = torch.randn(60, 2, 5, 5, generator=generator(3), dtype=torch.float64)
    problem = Problem(a, b, batches=[Batch((x,))], symmetry="all")
    at = identity(problem)
    assert {problem.classes[n] for n in at} == {Acts.POSITIVE}
    errors = errors_of(problem, at)
    start = float(errors.value({n: torch.zeros(k, dtype=torch.float64) for n, k in errors.sizes.items()}))
    found = line_factors(problem, at)
    assert (
        float(errors.value({n: c.factors.log() for n, c in found.items() if isinstance(c, Monomial)})) < start
    )
    moved = Relabelling(problem.spec, found).apply(state_of(b))
    assert torch.equal(moved["0.weight"], state_of(b)["0.weight"])  # what comes before a norm forgets factors
    assert not torch.equal(moved["3.weight"], state_of(b)["3.weight"])
    with torch.no_grad():
        assert torch.allclose(torch.func.functional_call(b, moved, (x,)), b(x), atol=1e-10)


def test_what_no_layer_reads_as_whole_columns_keeps_its_factors() -> None:
    net = nn.Sequential(
        nn.Conv2d(2, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, 3, groups=4), nn.ReLU(), nn.Flatten(), nn.Linear(4, 2)
    )
    net = randomise_state(net, generator()).eval()
    x = torch.randn(6, 2, 3, 3, generator=generator(2))
    problem = Problem(net, near(net, 0.5), batches=[Batch((x,))], symmetry="all")
    found = line_factors(problem, identity(problem))
    before = isthmus.align(net, near(net, 0.5), batches=[Batch((x,))], method="correlation+line")
    assert before.verification_error is not None
    assert before.verification_error < 1e-9
    assert set(found) == set(problem.spec.groups)


def test_nothing_to_move_is_nothing_moved() -> None:
    a, b = network(0, activation="tanh"), network(1, activation="tanh")
    problem = Problem(a, b, batches=[Batch((X,))], symmetry="all")
    at = identity(problem)
    assert line_factors(problem, at) == at
    assert LayerErrors([], {}).least() == {}


# --- Names -------------------------------------------------------------------------------------------------


def test_names_say_what_acts_and_how_factors_are_found() -> None:
    sea = method_named("weights+norms")
    assert (sea.name, sea.symmetry, sea.factors, sea.least_error) == ("weights+norms", "all", "norms", False)
    some = method_named("covariance+signed+positive+line")
    assert (some.symmetry, some.factors, some.least_error) == (("signed", "positive"), "norms", True)
    assert some.needs == "inputs"
    assert method_named("weights+line").needs == "inputs"
    assert method_named("correlation+least-squares").factors == "least squares"
    assert not method_named("correlation+least-squares").least_error
    assert method_named("correlation+all").least_error
    assert method_named("weights+permutations").symmetry == "permutations"
    assert sea.label == f"{METHODS['weights'].label} + norms"
    assert method_named(sea) is sea


def test_the_name_is_a_default_and_symmetry_has_the_last_word() -> None:
    a, b = network(0), network(1)
    found = isthmus.align(a, b, args=X[:3], method="weights+norms")
    assert found.kinds == {"Monomial": 2}
    assert found.method == "weights+norms"
    same = isthmus.align(a, b, args=X[:3], method="weights+norms", symmetry="permutations", check=False)
    plain = isthmus.align(a, b, args=X[:3], method="weights", check=False)
    assert same.couplings == plain.couplings


def test_problems_with_other_wishes_share_what_is_known() -> None:
    a, b = network(0), network(1)
    problem = Problem(a, b, batches=[Batch((X,))])
    solve(problem, "covariance+norms", check=False)
    solve(problem, "correlation", check=False)
    other = problem.wanting("all")
    assert other is problem.wanting("all")
    assert other is not problem
    assert other.spec is problem.spec
    assert other.joint_moments() is problem.joint_moments()
    assert other.wanting("permutations") is other
    assert problem.wanting(None) is problem
    assert problem.wanting("permutations") is problem


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("weights+mirrors", "expected 'permutations', 'all', .* after a plus sign, found 'mirrors'"),
        ("weights+all+signed", "expected one of 'permutations', 'all' and some classes"),
        ("weights+norms+least-squares", "expected one of 'permutations', 'all' and some classes"),
        ("height+all", "unknown method 'height'"),
    ],
)
def test_names_that_go_on_wrongly_are_refused(name: str, text: str) -> None:
    with pytest.raises(DataError, match=text):
        method_named(name)


def test_factors_on_the_line_need_data_and_own_searches_find_their_own() -> None:
    a, b = network(0), network(1)
    with pytest.raises(DataError, match=r"'weights\+line' compares activations"):
        isthmus.align(a, b, args=X[:3], method="weights+line")
    own = METHODS["weights"]
    with METHODS.apart():
        METHODS.register(type(own)("own", "own", own.objective, search=METHODS["correlation"].search))
        with pytest.raises(DataError, match="has a search of its own"):
            method_named("own+norms")
