"""Coordinate descent with a memory ends where plain coordinate descent ends, and proves its float64 optima."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from isthmus.batches import Batch
from isthmus.errors import DataError
from isthmus.layers import find_sites
from isthmus.matching import (
    CoordinateDescent,
    Facet,
    Grid,
    SinglePass,
    Structure,
    Term,
    _sources,
    assignment_solver,
    match,
)
from isthmus.matching import _incremental as incremental_module
from isthmus.matching._certify import ErrorBound, certified
from isthmus.matching._incremental import Incremental
from isthmus.matching._layers import Layers
from isthmus.matching._objectives import InnerProduct, TermObjective
from isthmus.matching._parts import parts_of
from isthmus.matching._products import SHORT, add_product, blocks, product_error
from isthmus.matching._terms import (
    LayeredPair,
    covariance_objective,
    incoming_weight_objective,
    weight_objective,
)
from isthmus.moments import SiteRunner, input_statistics
from isthmus.states import state_of
from isthmus.symmetry import IndexMap, Slot, discover_from_trace, trace
from isthmus.testing import gpt, mlp, randomise_state, reference_inputs, reference_network
from isthmus.transport import assign


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def network(name: str, seed: int) -> nn.Module:
    builds = {
        "mlp": lambda: mlp(12, 40, 3, 4),
        "wide": lambda: mlp(12, 150, 3, 4),
        "gpt": lambda: gpt(vocabulary=11, width=8, depth=1, heads=2, context=5),
    }
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return randomise_state(builds.get(name, lambda: reference_network(name))(), generator(seed)).eval()


def inputs(name: str) -> Tensor:
    if name in ("mlp", "wide"):
        return torch.randn(50, 12, generator=generator(7))
    if name == "gpt":
        return torch.randint(0, 11, (6, 5), generator=generator(7))
    return reference_inputs(name, 4, generator=generator(7))[0]


_PAIRS: dict[str, tuple[LayeredPair, nn.Module]] = {}


def pair_of(name: str) -> tuple[LayeredPair, nn.Module]:
    """Return a pair whose B is half A: far enough for several sweeps, near enough to have structure."""
    if name not in _PAIRS:
        a, b = network(name, 0), network(name, 1)
        traced = trace(a, (inputs(name)[:2],))
        layers = Layers(
            discover_from_trace(traced), find_sites(traced), tuple(n for n, _ in a.named_parameters())
        )
        _PAIRS[name] = LayeredPair(layers, state_of(a), state_of(b)), a
    return _PAIRS[name]


def objective_of(name: str, method: str) -> TermObjective:
    pair, model = pair_of(name)
    if method == "weights":
        return weight_objective(pair)
    if method == "weights-incoming":
        return incoming_weight_objective(pair)
    runner = SiteRunner(model, Batch((inputs(name),)))
    statistics = input_statistics(runner, pair.state_a, [inputs(name)], runner.sites, generator())
    return covariance_objective(pair, statistics, tie_outgoing=method == "tied covariance")


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(p, other[g]) for g, p in one.items())


_LARGE = ("resnet20", "groupnorm_resnet", "densenet")
_CASES = [
    pytest.param(
        name,
        method,
        order,
        marks=[pytest.mark.slow] if name in _LARGE and (method, order) != ("weights", "forward") else [],
        id=f"{name}, {method}, {order}",
    )
    for name in ("mlp", "wide", "gpt", *_LARGE)
    for method in ("weights", "weights-incoming", "covariance", "tied covariance")
    for order in ("forward", "random")
]


@pytest.mark.parametrize(("name", "method", "order"), _CASES)
def test_the_fixed_point_is_that_of_the_plain_descent(name: str, method: str, order: Any) -> None:
    objective = objective_of(name, method)
    plain = match(objective, schedule=CoordinateDescent(order=order, incremental=False))
    fast = match(objective, schedule=CoordinateDescent(order=order))
    assert same(plain.permutations, fast.permutations)
    assert (plain.status, len(plain.sweeps)) == (fast.status, len(fast.sweeps))
    scale = max(map(abs, plain.sweeps))
    assert fast.sweeps == pytest.approx(plain.sweeps, rel=1e-9, abs=1e-11 * scale)


@pytest.mark.parametrize("products", ["float64", "bfloat16"])
def test_the_precision_of_products_changes_nothing(products: Any) -> None:
    objective = objective_of("wide", "weights")
    plain = match(objective, schedule=CoordinateDescent(incremental=False))
    fast = match(objective, schedule=CoordinateDescent(products=products))
    assert same(plain.permutations, fast.permutations)
    assert fast.sweeps == pytest.approx(plain.sweeps, rel=1e-9)


@pytest.mark.parametrize("name", ["wide", "gpt", "groupnorm_resnet"])
def test_a_single_pass_and_the_descent_after_it_share_their_gains(name: str) -> None:
    objective = objective_of(name, "weights")
    kept = Incremental(objective)
    solver = assignment_solver
    first, again = (SinglePass().run(o, solver, None, generator()) for o in (kept, objective))
    direct = {c: objective.gains(c, {}, all_terms=False) for c in objective.structure.clusters[:1]}
    assert direct
    assert same(first.permutations, again.permutations)
    descent, plain = (
        CoordinateDescent(incremental=i).run(o, solver, first.permutations, generator())
        for i, o in ((True, kept), (False, objective))
    )
    assert same(descent.permutations, plain.permutations)
    for group in objective.structure.sizes:
        assert kept.cost(group, plain.permutations) == pytest.approx(
            objective.cost(group, plain.permutations)
        )
    assert kept.value(plain.permutations) == pytest.approx(objective.value(plain.permutations), rel=1e-12)


def test_only_what_a_neighbour_touched_is_computed_again() -> None:
    """Every product is counted: whole ones at most once for each term, then only the columns that moved."""
    objective = objective_of("wide", "weights")
    widths: list[int] = []

    def counted(total: Tensor, a: Tensor, b: Tensor, dtype: torch.dtype) -> None:
        widths.append(a.shape[1])
        add_product(total, a, b, dtype)

    with mock.patch.object(incremental_module, "add_product", counted):
        found = match(objective, schedule=CoordinateDescent())
    terms = sum(len(objective.terms(c)) for c in objective.structure.clusters)
    solves = len(objective.structure.clusters) * (len(found.sweeps) - 1)
    assert len(found.sweeps) > 3
    assert sum(w == 150 for w in widths) <= terms
    assert len(widths) < solves * 4, "a plain descent would form all products for each solve"
    assert any(w < 150 * 3 // 4 for w in widths[terms:])


def test_settled_groups_are_skipped() -> None:
    objective = objective_of("wide", "weights")
    solved: list[int] = []

    def counted(*args: Any, **kwargs: Any) -> Any:
        solved.append(1)
        return assign(*args, **kwargs)

    with mock.patch.object(incremental_module, "assign", counted):
        kept = Incremental(objective)
        found = CoordinateDescent().run(kept, assignment_solver, None, generator())
        before = len(solved)
        assert before < 3 * (len(found.sweeps) - 1), "the last sweep has nothing to solve for some groups"
        CoordinateDescent().run(kept, assignment_solver, found.permutations, generator())
        assert len(solved) == before + 3, "one look at each group"


@pytest.mark.parametrize("piece", [2**23, 2**12])
def test_estimates_stay_within_their_bound(monkeypatch: pytest.MonkeyPatch, piece: int) -> None:
    """Through all updates of a descent the float32 gains differ from float64 ones by less than is claimed."""
    monkeypatch.setattr(_sources, "PIECE", piece)
    objective = objective_of("wide", "weights")
    for products in ("float32", "bfloat16"):
        kept = Incremental(objective, products)  # type: ignore[arg-type]
        CoordinateDescent(products=products).run(kept, assignment_solver, None, generator())  # type: ignore[arg-type]
        for cluster in objective.structure.clusters:
            keeper: Any = kept._keeper(cluster)
            exact = sum(
                (a @ b.T for i in keeper.listed for a, b in i.part.products(i.order, torch.float64)),
                torch.zeros((), dtype=torch.float64),
            )
            bound = keeper._bound(keeper.listed)
            allowed = torch.outer(bound.rows, bound.columns)
            error = (keeper.total.double() - exact).abs()
            assert bool((error <= allowed).all())
            assert float(error.max()) > 0.0
            rows = torch.arange(150)
            assert torch.allclose(keeper._entries(rows, rows), exact.diagonal(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("noise", [1e-6, 1e-3, 1.0])
@pytest.mark.parametrize("size", [130, 300])
def test_certified_assignments_are_those_of_the_true_gains(size: int, noise: float) -> None:
    """The true gains differ from the estimate by up to the bound, in the least favourable units."""
    true = torch.randn(size, size, dtype=torch.float64, generator=generator(size))
    rows = noise * (0.2 + torch.rand(size, dtype=torch.float64, generator=generator(1)))
    bound = ErrorBound(rows + 2.0**-22, torch.ones_like(rows))
    signs = torch.randint(0, 2, (size, size), generator=generator(2)).double() * 2 - 1
    estimate = (true + 0.99 * signs * rows[:, None]).float()
    found = certified(estimate, assign(estimate, maximize=True), bound, lambda i, j: true[i, j])
    _, best = linear_sum_assignment(true.numpy(), maximize=True)
    if noise < 1.0:
        assert found is not None, "few pairs are near"
    if found is not None:
        assert found.tolist() == best.tolist()


def test_a_wrong_assignment_is_put_right_or_refused() -> None:
    """The estimate prefers a swap by less than the bound allows; the true gains do not."""
    true = torch.eye(4, dtype=torch.float64)
    true[0, 1] = true[1, 0] = 0.999
    estimate = true.float()
    estimate[0, 1] = estimate[1, 0] = 1.001
    found = assign(estimate, maximize=True)
    assert found.columns.tolist() == [1, 0, 2, 3]
    tight = ErrorBound(torch.full((4,), 0.0021, dtype=torch.float64), torch.ones(4, dtype=torch.float64))
    settled = certified(estimate, found, tight, lambda i, j: true[i, j])
    assert settled is not None
    assert settled.tolist() == [0, 1, 2, 3]
    everything = replace(tight, rows=torch.full((4,), math.inf, dtype=torch.float64))
    assert certified(estimate, found, everything, lambda i, j: true[i, j]) is None


def test_ties_are_settled_without_a_second_product() -> None:
    """Equal units are equal candidates for each other: a proof must not hunt for a winner."""
    true = torch.randn(140, 140, dtype=torch.float64, generator=generator(3))
    true[5], true[:, 9] = true[6].clone(), true[:, 8].clone()
    estimate = true.float()
    rows = torch.full((140,), 1e-6, dtype=torch.float64)
    found = certified(
        estimate,
        assign(estimate, maximize=True),
        ErrorBound(rows, torch.ones_like(rows)),
        lambda i, j: true[i, j],
    )
    assert found is not None
    best = linear_sum_assignment(true.numpy(), maximize=True)
    assert float(true[torch.arange(140), found].sum()) == pytest.approx(
        float(true.numpy()[best].sum()), rel=1e-14
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("length", [1, 64, 3000])
def test_products_keep_their_error_bound(dtype: torch.dtype, length: int) -> None:
    """Rows of one sign and of one length are the worst for rounding that drifts."""
    for seed, draw in enumerate((torch.rand, torch.randn)):
        a, b = (draw(40, length, dtype=torch.float64, generator=generator(10 * k + seed)) for k in (1, 2))
        total = torch.zeros(40, 40)
        add_product(total, a.float(), b.float(), dtype)
        error = (total.double() - a @ b.T).abs()
        relative = product_error(length, dtype, torch.float64) + blocks(length) * SHORT
        allowed = relative * torch.outer(a.norm(dim=1), b.norm(dim=1))
        assert bool((error <= allowed + 1e-300).all())
        assert float(error.max()) > 0.0


def test_reduced_float32_products_are_bounded_as_bfloat16() -> None:
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        assert product_error(100, torch.float32, torch.float32) > 2.0**-9
    finally:
        torch.set_float32_matmul_precision(before)
    assert product_error(100, torch.float32, torch.float32) < 1e-5


def test_parts_are_what_a_term_is_made_of() -> None:
    objective = objective_of("wide", "weights")
    ring = {name: torch.arange(150).roll(1) for name in objective.structure.sizes}
    for cluster in objective.structure.clusters:
        by_term = parts_of(objective.terms(cluster), cluster[0], 150)
        assert by_term is not None
        for term, parts in zip(objective.terms(cluster), by_term, strict=True):
            (gain,) = term.gains({g: p for g, p in ring.items() if g not in cluster})
            orders = [p.order(ring) for p in parts]
            total = sum(
                (
                    a @ b.T
                    for p, o in zip(parts, orders, strict=True)
                    for a, b in p.products(o, torch.float64)
                ),
                torch.zeros((), dtype=torch.float64),
            )
            assert torch.allclose(total, gain.matrix, rtol=1e-12, atol=1e-12)


def test_a_group_that_acts_twice_is_no_plain_product() -> None:
    movers = ({axis: [("g", Slot("t", axis, IndexMap(3, 3)))] for axis in (0, 1)},)
    x = torch.randn(3, 3)
    inner_product = InnerProduct((x,), (x,), movers, 1.0)
    structure = Structure.flat({"g": 3})
    facet = _facet("g", 3)
    term = Term(facet, inner_product, ((0,),))
    assert parts_of([term], "g", 3) is None
    kept = Incremental(TermObjective(structure, [term]))
    assert kept.depends(("g",)) == {"g"}, "its own moves change what is best for it"


def _facet(group: str, size: int) -> Facet:
    return Facet((group,), (0,), (Grid(torch.arange(size)[:, None], {group: torch.arange(size)[:, None]}),))


def test_unknown_products_are_refused() -> None:
    with pytest.raises(DataError, match="expected products 'float64', 'float32' or 'bfloat16'"):
        CoordinateDescent(products="float16")  # type: ignore[arg-type]


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["wide", "gpt"])
def test_states_on_a_gpu_are_matched_there(name: str) -> None:
    pair, _ = pair_of(name)
    there = replace(
        pair, **{k: {n: t.cuda() for n, t in getattr(pair, k).items()} for k in ("state_a", "state_b")}
    )
    kept = Incremental(weight_objective(there))
    found = CoordinateDescent().run(kept, assignment_solver, None, generator())
    plain = match(weight_objective(pair), schedule=CoordinateDescent(incremental=False))
    assert same(found.permutations, plain.permutations)
    if name == "wide":
        assert all(k.total.is_cuda for k in kept._keepers.values())  # type: ignore[union-attr]
