"""Folded transformers: streams are seen where norms end, planted elements come back, the best on the path is kept."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import Tensor, nn

import isthmus
from isthmus.batches import Batch
from isthmus.matching import CoordinateDescent, Problem
from isthmus.matching._alternating import Alternation
from isthmus.states import state_of
from isthmus.symmetry import Acts, Relabelling, SymmetrySpec, drawn_elements
from isthmus.testing import bert, gpt, llama, randomise_state, vit


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


BUILD = {
    "gpt": lambda: gpt(vocabulary=11, width=8, depth=1, heads=2, context=5),
    "vit": lambda: vit(3, 8, 1, 2, image_size=4, patch=2),
    "llama": lambda: llama(11, 8, 1, 4, kv_heads=2, hidden=6),
    "bert": lambda: bert(11, 2, 8, 1, 2, context=5),
}


def drawn(name: str, seed: int = 0) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return randomise_state(BUILD[name](), generator(seed)).eval().double()


def inputs(name: str) -> Tensor:
    if name == "vit":
        return torch.randn(40, 1, 4, 4, generator=generator(7)).double()
    return torch.randint(0, 11, (40, 5), generator=generator(7))


@cache
def folded(name: str, seed: int = 0) -> tuple[nn.Module, SymmetrySpec]:
    x = inputs(name)[:2]
    found = isthmus.fold(drawn(name, seed), x, untie=True)
    net = found.network()
    return net, isthmus.discover(net, x, ones=found.folded_gains, zeros=found.folded_biases)


def run(model: nn.Module, state: dict[str, Tensor], x: Tensor) -> Tensor:
    return torch.func.functional_call(model, state, (x,), tie_weights=False)


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("name", "method"),
    [
        ("vit", "alternating"),
        ("vit", "activations"),
        pytest.param("vit", "weights", marks=SLOW),
        pytest.param("gpt", "weights", marks=SLOW),
        pytest.param("gpt", "correlation", marks=SLOW),
        pytest.param("gpt", "alternating", marks=SLOW),
    ],
)
def test_planted_rotations_heads_and_hidden_units_come_back(name: str, method: str) -> None:
    model, spec = folded(name)
    assert Acts.MEAN_FIXING in {group.acts for group in spec.groups.values()}
    (truth,) = drawn_elements(spec, generator(3), 1)
    state = {n: t.clone() for n, t in state_of(model).items()}
    other = Relabelling(spec, truth).inverse().apply(state)
    x = inputs(name)
    found = isthmus.align(
        model, other, batches=[Batch((x,))], method=method, spec=spec, symmetry="all", check=False
    )
    recovered = found.apply(other)
    error = sum(float((recovered[n] - t).square().sum()) for n, t in state.items())
    assert error < 1e-16 * sum(float(t.square().sum()) for t in state.values())
    assert torch.allclose(run(model, recovered, x), run(model, other, x), atol=1e-9)


@pytest.mark.parametrize("name", ["vit", pytest.param("gpt", marks=SLOW), pytest.param("llama", marks=SLOW)])
def test_folded_streams_are_seen_where_norms_end(name: str) -> None:
    model, spec = folded(name)
    (stream,) = [n for n, g in spec.groups.items() if g.acts in (Acts.MEAN_FIXING, Acts.ORTHOGONAL)]
    problem = Problem(model, folded(name, 1)[0], batches=[Batch((inputs(name),))], spec=spec, symmetry="all")
    assert len(problem.seen.views[(stream,)]) == 3  # attention, perceptron, head
    assert problem.seen.notes == ()


def labelled(name: str) -> list[tuple[Tensor, Tensor]]:
    x = inputs(name)
    return [(x, torch.arange(len(x)) % 3)]


def test_what_is_kept_is_best_on_the_path() -> None:
    (a, spec), (b, _) = folded("vit"), folded("vit", 1)
    data = labelled("vit")
    problem = Problem(a, b, batches=data, spec=spec, symmetry="all")
    kept = isthmus.matching.solve(problem, "alternating")
    passed = Alternation(problem, None, generator()).candidates()
    middles = {
        name: isthmus.line(
            a, b, data, alignment=isthmus.Alignment(at, spec, name), points=3
        ).curve.midpoint_loss
        for name, at in passed
    }
    found = isthmus.line(a, b, data, alignment=kept, points=3).curve.midpoint_loss
    assert found == pytest.approx(min(middles.values()), rel=1e-9)
    assert max(middles.values()) > found + 1e-3
    assert kept.verification_error is not None
    assert kept.verification_error < 1e-12
    assert f"taken: {min(middles, key=middles.__getitem__)}, " in kept.notes[-1]


def test_without_targets_the_last_round_is_taken() -> None:
    (a, spec), (b, _) = folded("vit"), folded("vit", 1)
    unlabelled = [Batch((inputs("vit"),))]
    found = isthmus.align(
        a, b, batches=unlabelled, method="alternating", spec=spec, symmetry="all", check=False
    )
    assert "the data cannot be scored, so the last round was taken" in found.notes


def test_permutations_alone_and_other_schedules() -> None:
    a, b = drawn("vit"), drawn("vit", 1)
    for schedule in (None, CoordinateDescent(max_sweeps=2)):
        found = isthmus.align(a, b, batches=labelled("vit"), method="alternating", schedule=schedule)
        assert found.permutations.keys() == found.spec.groups.keys()


@pytest.mark.parametrize("name", ["bert", pytest.param("gpt", marks=SLOW), pytest.param("llama", marks=SLOW)])
def test_gains_that_hide_rotations_are_named(name: str) -> None:
    x = inputs(name)
    one, two = drawn(name), drawn(name, 1)
    found = isthmus.align(one, two, args=x[:2], method="weights-incoming", symmetry="all", check=False)
    (note,) = [n for n in found.notes if "no rotations" in n]
    assert "isthmus.fold" in note
    assert "post-norm" in note
    plain = isthmus.align(one, two, args=x[:2], method="weights-incoming", check=False)
    assert not any("no rotations" in n for n in plain.notes)
    if name != "bert":
        net, spec = folded(name)
        found = isthmus.align(
            net,
            folded(name, 1)[0],
            args=x[:2],
            method="weights-incoming",
            spec=spec,
            symmetry="all",
            check=False,
        )
        assert not any("no rotations" in n for n in found.notes)


def test_heads_are_paired_by_what_they_write() -> None:
    model, spec = folded("vit")
    (truth,) = drawn_elements(spec, generator(3), 1)
    heads = next(n for n in spec.groups if n.endswith("qkv"))
    swapped = {**truth, heads: torch.tensor([1, 0])}
    state = {n: t.clone() for n, t in state_of(model).items()}
    other = Relabelling(spec, swapped).inverse().apply(state)
    given = {"batches": [Batch((inputs("vit"),))], "spec": spec, "symmetry": "all", "check": False}
    found = isthmus.align(model, other, method="head-outputs", **given)
    assert found.couplings[heads].matrix().argmax(1).tolist() == [1, 0]
    recovered = found.apply(other)
    error = sum(float((recovered[n] - t).square().sum()) for n, t in state.items())
    assert error < 1e-16 * sum(float(t.square().sum()) for t in state.values())
    assert not any("matched by circuits" in note for note in found.notes)


def test_pairs_of_heads_have_the_least_distance_between_what_they_write() -> None:
    (a, spec), (b, _) = folded("vit"), folded("vit", 1)
    problem = Problem(a, b, batches=[Batch((inputs("vit"),))], spec=spec, symmetry="all")
    found = isthmus.matching.solve(problem, "head-outputs", check=False)
    heads = next(n for n in spec.groups if n.endswith("qkv"))
    inside = [n for n in spec.groups if n == heads or n.startswith(f"{heads}#")]
    others = {n: c for n, c in found.couplings.items() if n not in inside}
    moved, read = Relabelling(spec, others).apply(problem.state_b), {}
    name = heads.removesuffix("qkv") + "out"
    for key, net in (("a", a), ("b", b)):
        hook = net.get_submodule(name).register_forward_pre_hook(
            lambda _, args, key=key: read.update({key: args[0].detach().flatten(0, -2)})
        )
        net(inputs("vit"))
        hook.remove()
    weight = {"a": problem.state_a[f"{name}.weight"], "b": moved[f"{name}.weight"]}
    wrote = {
        k: torch.stack([(x[:, h] @ weight[k][:, h].T) for h in (slice(0, 4), slice(4, 8))])
        for k, x in read.items()
    }
    wrote = {k: c - c.mean(1, keepdim=True) for k, c in wrote.items()}
    distances = {p: float((wrote["a"] - wrote["b"][list(p)]).square().sum()) for p in ((0, 1), (1, 0))}
    assert tuple(found.couplings[heads].matrix().argmax(1).tolist()) == min(
        distances, key=distances.__getitem__
    )


@pytest.mark.slow
def test_heads_that_share_keys_are_matched_by_circuits() -> None:
    (a, spec), (b, _) = folded("llama"), folded("llama", 1)
    batches = [Batch((inputs("llama"),))]
    found = isthmus.align(
        a, b, batches=batches, method="head-outputs", spec=spec, symmetry="all", check=False
    )
    assert any("not compared; matched by circuits" in note for note in found.notes)
