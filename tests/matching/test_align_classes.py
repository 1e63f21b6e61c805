"""``align(symmetry=...)``: each group is matched by the largest class that is wanted and allowed, and B stays B."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import isthmus
from isthmus.batches import Batch
from isthmus.couplings import Coupling, Linear, Monomial, Permutation
from isthmus.errors import DataError, SymmetryError
from isthmus.matching import (
    METHODS,
    Alignment,
    Problem,
    classes_of,
    method_under,
    solve,
    solvers_of,
    symmetry_named,
    symmetry_text,
)
from isthmus.states import state_of
from isthmus.symmetry import Acts, AxisGroup, Relabelling, SymmetrySpec, drawn_elements
from isthmus.testing import gpt, llama, randomise_state, reference_inputs, reference_network


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def chain(act: type[nn.Module]) -> nn.Module:
    return nn.Sequential(nn.Linear(9, 7), act(), nn.Linear(7, 6), act(), nn.Linear(6, 5))


NETWORKS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "relu": (lambda: chain(nn.ReLU), lambda: torch.randn(60, 9, generator=generator(7)).double()),
    "tanh": (lambda: chain(nn.Tanh), lambda: torch.randn(60, 9, generator=generator(7)).double()),
    "gpt": (
        lambda: gpt(vocabulary=11, width=8, depth=1, heads=2, context=5),
        lambda: torch.randint(0, 11, (30, 5), generator=generator(7)),
    ),
    "llama": (
        lambda: llama(11, 16, 1, 4, kv_heads=2, hidden=6),  # with two dimensions, heads are told apart badly
        lambda: torch.randint(0, 11, (30, 5), generator=generator(7)),
    ),
    "resnet20": (
        lambda: reference_network("resnet20"),
        lambda: reference_inputs("resnet20", 8, generator=generator(7))[0].double(),
    ),
}


def drawn(name: str, seed: int = 0) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return randomise_state(NETWORKS[name][0](), generator(seed)).eval().double()


@cache
def planted(name: str) -> tuple[nn.Module, dict[str, Tensor], SymmetrySpec, dict[str, Coupling], Tensor]:
    """Return A, B's state, the spec, the element of the whole group that carries B to A, and inputs."""
    model, x = drawn(name), NETWORKS[name][1]()
    spec = Problem(model, args=x[:2]).spec
    (truth,) = drawn_elements(spec, generator(3), 1)
    state = {n: t.clone() for n, t in state_of(model).items()}
    return model, Relabelling(spec, truth).inverse().apply(state), spec, truth, x


def error_of(found: Alignment, name: str) -> float:
    model, other, *_ = planted(name)
    state, recovered = state_of(model), found.apply(other)
    total = sum(float((recovered[n].double() - t.double()).square().sum()) for n, t in state.items())
    return total / sum(float(t.double().square().sum()) for t in state.values())


SLOW = [pytest.param("resnet20", marks=pytest.mark.slow)]


@pytest.mark.parametrize("name", ["relu", "tanh", "gpt", "llama", *SLOW])
def test_planted_elements_of_the_whole_group_are_found_by_weights(name: str) -> None:
    model, other, spec, truth, x = planted(name)
    assert any(group.acts is not Acts.PERMUTATION for group in spec.groups.values())
    found = isthmus.align(model, other, args=x[:2], method="weights", symmetry="all")
    assert error_of(found, name) < 1e-20
    assert found.verification_error is not None
    assert found.verification_error < 1e-12
    for group, coupling in truth.items():
        assert torch.allclose(found.couplings[group].matrix(), coupling.matrix(), atol=1e-8), group
    permuted = isthmus.align(model, other, args=x[:2], method="weights")
    assert error_of(permuted, name) > 1e-3


@pytest.mark.parametrize("method", METHODS.usual)
@pytest.mark.parametrize("name", ["relu", "tanh", "llama"])
def test_every_method_takes_classes_and_leaves_the_function_alone(name: str, method: str) -> None:
    """One side alone holds factors back to e, so large ones are only approached."""
    model, other, _, _, x = planted(name)
    found = isthmus.align(model, other, batches=[Batch((x,))], method=method, symmetry="all", check=False)
    assert error_of(found, name) < (1e-20 if name == "tanh" else 1e-3)
    twin = found.apply(other)
    args = (x[:5],)
    plain, moved = (
        torch.func.functional_call(model, dict(s), args, tie_weights=False) for s in (other, twin)
    )
    assert torch.allclose(plain, moved, rtol=1e-9, atol=1e-9 * float(plain.abs().max()))


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS.usual)
def test_batch_norm_takes_factors_on_its_gains(method: str) -> None:
    model, other, _, _, x = planted("resnet20")
    found = isthmus.align(model, other, batches=[Batch((x,))], method=method, symmetry="all")
    assert found.verification_error is not None
    assert found.verification_error < 1e-12
    if (
        method == "covariance"
    ):  # folded, the gain is the layer's: factors are found up to the bound of one side
        assert error_of(found, "resnet20") < 0.01


def test_permutations_are_what_they_were() -> None:
    model, other = drawn("relu"), drawn("relu", 1)
    x = NETWORKS["relu"][1]()
    problems = [
        Problem(model, other, batches=[Batch((x,))], symmetry=s) for s in ("permutations", ["permutation"])
    ]
    assert all(problem.permutes for problem in problems)
    for method in METHODS.usual:
        plain = isthmus.align(model, other, batches=[Batch((x,))], method=method, check=False)
        for problem in problems:
            found = solve(problem, method, check=False)
            assert found.permutations.keys() == plain.permutations.keys()
            assert all(torch.equal(p, found.permutations[n]) for n, p in plain.permutations.items())
            assert found.costs == plain.costs
        assert "symmetry" not in plain.settings


@pytest.mark.parametrize(
    ("acts", "symmetry", "expected"),
    [
        ("monomial", "permutations", "permutation"),
        ("monomial", "all", "monomial"),
        ("monomial", ["signed"], "signed"),
        ("monomial", ["positive"], "positive"),
        ("monomial", ["signed", "positive"], "monomial"),
        ("monomial", ["orthogonal"], "signed"),
        ("positive", ["monomial"], "positive"),
        ("positive", ["signed"], "permutation"),
        ("general", ["orthogonal"], "orthogonal"),
        ("general", ["mean-fixing", "positive"], "mean-fixing"),
        ("general", "general", "general"),
        ("orthogonal", ["mean-fixing"], "mean-fixing"),
        ("mean-fixing", ["orthogonal"], "mean-fixing"),
        ("permutation", "all", "permutation"),
    ],
)
def test_a_group_takes_the_largest_class_that_is_wanted_and_allowed(
    acts: str, symmetry: str | list[str], expected: str
) -> None:
    spec = SymmetrySpec({"g": AxisGroup("g", 2, (), acts=Acts(acts))})
    assert classes_of(spec, symmetry) == {"g": Acts(expected)}
    solver = solvers_of(classes_of(spec, symmetry)).of("g")
    assert solver.acts == expected


def test_groups_that_others_are_nested_in_are_permuted() -> None:
    outer = AxisGroup("heads", 1, (), acts=Acts.MONOMIAL)
    inner = AxisGroup("inner", 2, (), within=(("heads", 0),), family="f", acts=Acts.GENERAL)
    found = classes_of(SymmetrySpec({"heads": outer, "inner": inner}), "all")
    assert found == {"heads": Acts.PERMUTATION, "inner": Acts.GENERAL}


def test_unknown_classes_and_options_that_do_not_fit_are_refused() -> None:
    model, other, _, _, x = planted("relu")
    with pytest.raises(
        DataError, match=r"unknown symmetry 'spirals': expected 'permutations', 'all', or classes among"
    ):
        isthmus.align(model, other, args=x[:2], symmetry=["signed", "spirals"])
    with pytest.raises(DataError, match="unknown symmetry 'rotations'"):
        isthmus.align(model, other, args=x[:2], symmetry="rotations")
    with pytest.raises(DataError, match="tie_outgoing weighs pairs of units, which only permutations have"):
        isthmus.align(model, other, batches=[Batch((x,))], tie_outgoing=True, symmetry="all")


def test_alignments_by_class_are_stored_and_used(tmp_path) -> None:
    model, other, _, _, x = planted("llama")
    found = isthmus.align(model, other, args=x[:2], method="weights", symmetry=["general", "monomial"])
    assert found.settings["symmetry"] == ["general", "monomial"]
    assert {"Linear", "Monomial"} <= set(found.kinds)
    found.save(tmp_path / "ab.safetensors")
    again = Alignment.load(tmp_path / "ab.safetensors")
    for name, tensor in found.apply(other).items():
        assert torch.equal(tensor, again.apply(other)[name])
    merged = isthmus.merge([model, other], alignments=[again])
    for name, tensor in state_of(model).items():
        assert torch.allclose(merged[name], tensor, atol=1e-9)
    batches = [(x, torch.randint(0, 11, x.shape, generator=generator(1)))]
    line = isthmus.line(model, other, batches, alignment=again, points=3)
    assert abs(line.barrier) < 1e-9


def test_classes_of_a_problem_serve_every_method() -> None:
    model, other, spec, _, x = planted("llama")
    problem = Problem(model, other, batches=[Batch((x,))], symmetry="all")
    assert not problem.permutes
    kinds = {
        Acts.GENERAL: Linear,
        Acts.MONOMIAL: Monomial,
        Acts.SIGNED: Monomial,
        Acts.PERMUTATION: Permutation,
    }
    for method in ("weights", "correlation"):
        found = solve(problem, method, check=False)
        for name, group in spec.groups.items():
            assert isinstance(found.couplings[name], kinds[problem.classes[name]]), (method, name, group.acts)


@pytest.mark.parametrize("method", ["weights", "activations"])
@pytest.mark.parametrize(("name", "acts"), [("gpt", Acts.MEAN_FIXING), ("llama", Acts.ORTHOGONAL)])
def test_streams_of_folded_transformers_are_turned_and_heads_within(
    name: str, acts: Acts, method: str
) -> None:
    model, _, _, _, x = planted(name)
    folded = isthmus.fold(model, x[:2], untie=True, add_biases=True)
    net = folded.network()
    spec = isthmus.discover(net, x[:2], ones=folded.folded_gains, zeros=folded.folded_biases)
    assert acts in [group.acts for group in spec.groups.values()]
    (truth,) = drawn_elements(spec, generator(3), 1)
    state = {n: t.clone() for n, t in state_of(net).items()}
    other = Relabelling(spec, truth).inverse().apply(state)
    problem = Problem(net, other, batches=[Batch((x,))], spec=spec, symmetry="all")
    found = solve(problem, method, check=False)
    assert problem.function_change(found.couplings) < 1e-12
    recovered = found.apply(other)
    # By activations the factors of the gated units are held back to e, and two that look alike may be exchanged.
    gated = ("gate", "up", "down") if (name, method) == ("llama", "activations") else ()
    told = [n for n, t in state.items() if t.is_floating_point() and not any(f".{g}." in n for g in gated)]
    total = sum(float((recovered[n] - state[n]).square().sum()) for n in told)
    assert total < 1e-20 * sum(float(state[n].square().sum()) for n in told)
    assert found.kinds["Rotation"] == 1


def test_an_alignment_says_what_each_group_does() -> None:
    model, other, spec, _, x = planted("llama")
    found = isthmus.align(model, other, args=x[:2], method="weights", symmetry="all")
    assert found.symmetry == "all"
    assert set(found.similarities) == {
        n for n, c in found.couplings.items() if not isinstance(c, Permutation)
    }
    assert all(before < 0.99 < 1 - 1e-9 < after for before, after in found.similarities.values())
    mixed = next(n for n, c in found.couplings.items() if isinstance(c, Linear))
    assert re.fullmatch(
        r"invertible map, \d dimensions, condition number \S+; similarity -?0\.\d\d → 1\.00",
        found.describe(mixed),
    )
    still = next(n for n in spec.groups if n not in found.similarities)
    assert found.describe(still) == str(found.summaries[still])
    with pytest.raises(SymmetryError, match=r"no group named 'nothing'; the alignment has \["):
        found.describe("nothing")
    assert not found.inverse().similarities
    assert isthmus.align(model, other, args=x[:2], symmetry=["signed", "general"]).symmetry == (
        "signed",
        "general",
    )
    plain = isthmus.align(model, other, args=x[:2])
    assert (plain.symmetry, plain.similarities, plain.larger) == ("permutations", {}, ())


def test_similarities_are_those_of_what_a_group_acts_on_and_are_stored(tmp_path: Path) -> None:
    """By hand, for one hidden layer: all that its units touch, before and after, the rest left out."""
    model, other = (nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).eval() for _ in range(2))
    found = isthmus.align(model, other, args=torch.zeros(1, 3), method="weights", symmetry="all")

    def touched(state: Mapping[str, Tensor]) -> Tensor:
        return torch.cat([state[n].flatten() for n in ("0.weight", "0.bias", "2.weight")]).double()

    ours = touched(state_of(model))
    expected = [
        float(torch.cosine_similarity(ours, touched(state), dim=0))
        for state in (state_of(other), found.apply(state_of(other)))
    ]
    assert found.similarities["0"] == pytest.approx(expected, abs=1e-6)
    found.save(tmp_path / "found.safetensors")
    assert Alignment.load(tmp_path / "found.safetensors").similarities == found.similarities


def test_what_counts_on_folded_gains_is_refused_where_they_are_not_one() -> None:
    model, _, _, _, x = planted("llama")
    folded = isthmus.fold(model, x[:2], untie=True, add_biases=True)
    net = folded.network()
    spec = isthmus.discover(net, x[:2], ones=folded.folded_gains, zeros=folded.folded_biases)
    state = {n: t.clone() for n, t in state_of(net).items()}
    found = isthmus.align(net, state, args=x[:2], spec=spec, method="weights", symmetry="all", check=False)
    gain = folded.folded_gains[0]
    later = {**state, gain: state[gain] * 1.5}
    with pytest.raises(SymmetryError, match=f"found for networks in which '{gain}' holds nothing but ones"):
        found.apply(later)
    assert torch.equal(found.apply(later, check=False)[gain], later[gain])


def test_methods_under_a_symmetry_have_a_name_and_symmetries_a_text() -> None:
    assert method_under("weights", "permutations") == "weights"
    assert method_under("weights", "all") == "weights, all"
    for text in ("permutations", "all", "signed,positive"):
        assert symmetry_text(symmetry_named(text)) == text
    with pytest.raises(DataError, match="unknown symmetry 'mirrors'"):
        symmetry_named("signed,mirrors")


def test_merge_matches_by_classes() -> None:
    model, other, _, _, x = planted("tanh")
    merged = isthmus.merge([model, other], align="weights", symmetry="all", args=x[:2])
    for name, tensor in state_of(model).items():
        assert torch.allclose(merged[name], tensor, atol=1e-9)
    with pytest.raises(DataError, match=r"symmetry='all' says by what align matches. Give align"):
        isthmus.merge([model, other], symmetry="all", model=model)


def test_a_problem_under_other_classes_shares_what_was_collected_and_finds_the_same() -> None:
    model, other, _, _, x = planted("tanh")
    first = Problem(model, other, batches=[Batch((x,))])
    assert first.verification.elements == 0
    first.prepare(inputs=True, joint=True)
    second = first.under("all")
    assert second.traced is first.traced
    assert second.joint_moments() is first.joint_moments()
    assert second.verification.elements > 0
    assert first.under("permutations").verification is first.verification
    assert (first.permutes, second.permutes) == (True, False)
    for method in METHODS.usual:
        fresh = isthmus.align(model, other, batches=[Batch((x,))], method=method, symmetry="all")
        shared = solve(second, method)
        assert shared.costs == fresh.costs
        for name, coupling in fresh.couplings.items():
            assert torch.equal(coupling.matrix(), shared.couplings[name].matrix())
    with pytest.raises(DataError, match="unknown symmetry 'mirrors'"):
        first.under(["mirrors"])
