"""Streamed weight matching: the permutations that the networks in memory give."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pretrained_models import EXPERTS, KINDS, save, tiny

import isthmus
from isthmus import pretrained
from isthmus.couplings import random_permutation
from isthmus.errors import CheckpointError, DataError, ShapeError, VerificationError
from isthmus.matching import (
    CoordinateDescent,
    Incremental,
    _incremental,
    _objectives,
    _pairs,
    _sources,
    assignment_solver,
    solve,
    weight_objective,
)
from isthmus.pretrained import StoredProblem, open_model


@pytest.mark.parametrize("kind", [*KINDS, EXPERTS])
@pytest.mark.parametrize("piece", [2**23, 7])
def test_the_same_as_in_memory(
    pair_of: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, kind: str, piece: int
) -> None:
    monkeypatch.setattr(_sources, "PIECE", piece)
    pair = pair_of(kind)
    found = pretrained.align(pair.a, pair.b, spec=pair.spec)
    expected = isthmus.align(
        pair.a.load(),
        pair.b.load(),
        method="weights",
        kwargs=pair.b.example.kwargs,
        spec=pair.spec,
        check=kind != EXPERTS,  # torch multiplies experts one by one in float32 only
    )
    assert found.permutations.keys() == expected.permutations.keys()
    assert all(torch.equal(p, expected.permutations[n]) for n, p in found.permutations.items())
    assert any(not torch.equal(p, torch.arange(len(p))) for p in found.permutations.values())
    assert found.sweeps == pytest.approx(expected.sweeps, rel=1e-12)
    assert found.status == expected.status
    for name, costs in expected.costs.items():
        assert found.costs[name] == pytest.approx(costs, rel=1e-9)
    assert found.verification_error is not None
    assert 0 < found.verification_error < 1e-12
    assert found.settings == {**expected.settings, "check": True}


@pytest.mark.parametrize("kind", KINDS)
def test_a_planted_relabelling_is_found(pair_of: Callable[..., Any], tmp_path: Path, kind: str) -> None:
    """Relabel at random, add 1 % noise, and align: every permutation comes back."""
    pair = pair_of(kind)
    generator = torch.Generator().manual_seed(3)
    planted = {n: random_permutation(g.size, generator) for n, g in pair.spec.groups.items()}
    state = isthmus.symmetry.apply(pair.spec, planted, pair.a.load().state_dict())
    model = type(pair.a.model)(pair.a.model.config)
    model.load_state_dict(state)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += (
                0.01 * parameter.std().nan_to_num(1.0) * torch.randn(parameter.shape, generator=generator)
            )
    moved = open_model(save(model.eval(), tmp_path / "moved"))
    found = pretrained.align(pair.a, moved, spec=pair.spec, check=False)
    assert found.verification_error is None
    for name, permutation in pair.spec.invert(planted).items():
        assert torch.equal(found.permutations[name], permutation), name
    back = found.apply(moved.load()).state_dict()
    for name, tensor in pair.a.load().state_dict().items():
        assert torch.allclose(back[name], tensor, atol=0.1 * float(tensor.std().nan_to_num(1.0)) + 1e-6), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_groups_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    """Gains estimated in float32 from tensors in pieces that compiled loops sum, and forgotten after each group."""
    sizes = {"hidden_size": 192, "intermediate_size": 160, "num_attention_heads": 3, "vocab_size": 700}
    a, b = (open_model(save(tiny("bert", k, dtype, **sizes), tmp_path / str(k))) for k in (0, 1))
    spec = a.discover()
    expected = isthmus.align(
        a.load(), b.load(), method="weights", kwargs=a.example.kwargs, spec=spec, check=False
    )
    monkeypatch.setattr(_sources, "PIECE", 2**13)
    monkeypatch.setattr(_pairs, "_COMPILED", 2**10)
    monkeypatch.setattr(_objectives, "_WHOLE", 2**10)
    monkeypatch.setattr(_incremental, "_ROOM", 0)
    largest: list[int] = []
    double = torch.Tensor.double

    def noted(tensor: torch.Tensor) -> torch.Tensor:
        largest.append(tensor.numel())
        return double(tensor)

    monkeypatch.setattr(torch.Tensor, "double", noted)
    found = pretrained.align(a, b, spec=spec, check=False)
    assert max(largest) < 700 * 192, "no copy of the embedding in float64"
    assert all(torch.equal(p, expected.permutations[n]) for n, p in found.permutations.items())
    assert found.sweeps == pytest.approx(expected.sweeps, rel=1e-12)
    for name, costs in expected.costs.items():
        assert found.costs[name] == pytest.approx(costs, rel=1e-9)


@pytest.mark.parametrize("method", ["weights-incoming", "weights"])
def test_any_method_that_compares_weights(pair_of: Callable[..., Any], method: str) -> None:
    pair = pair_of("gpt2")
    found = solve(StoredProblem(pair.a, pair.b, spec=pair.spec), method)
    kwargs = pair.a.example.kwargs
    expected = isthmus.align(pair.a.load(), pair.b.load(), method=method, kwargs=kwargs, spec=pair.spec)
    assert all(torch.equal(p, expected.permutations[n]) for n, p in found.permutations.items())
    assert found.method == method
    with pytest.raises(DataError, match="compares activations: pass batches"):
        solve(StoredProblem(pair.a, pair.b, spec=pair.spec), "activations")


def test_what_is_kept_has_room(pair_of: Callable[..., Any]) -> None:
    """Gains that do not fit are formed anew, and change nothing."""
    pair = pair_of("llama")
    objective = weight_objective(StoredProblem(pair.a, pair.b, spec=pair.spec).pair)
    source = torch.Generator()
    wide, none = Incremental(objective), Incremental(objective, room=0)
    results = [CoordinateDescent().run(kept, assignment_solver, None, source) for kept in (wide, none)]
    assert all(torch.equal(p, results[1].permutations[n]) for n, p in results[0].permutations.items())
    last = none._last.nbytes if none._last is not None else 0
    assert wide._kept_bytes() > none._kept_bytes() == last


def test_one_graph_serves_networks_of_the_same_code(pair_of: Callable[..., Any], tmp_path: Path) -> None:
    pair = pair_of("bert")
    assert pair.b.in_graph_of(pair.a).traced is pair.a.traced
    other = open_model(save(tiny("bert", 1, hidden_act="relu"), tmp_path / "relu"))
    assert other.in_graph_of(pair.a) is other


def test_a_schedule_of_ones_own(pair_of: Callable[..., Any]) -> None:
    pair = pair_of("bert")
    schedule = CoordinateDescent(max_sweeps=0)
    found = pretrained.align(pair.a, pair.b, spec=pair.spec, schedule=schedule, check=False)
    assert found.status == "sweep limit reached"
    assert all(torch.equal(p, torch.arange(len(p))) for p in found.permutations.values())


def test_a_wrong_spec_is_refused(pair_of: Callable[..., Any]) -> None:
    pair = pair_of("bert")
    name, group = next(iter(pair.spec.groups.items()))
    with pytest.raises(VerificationError, match="changes the function"):
        pretrained.align(pair.a, pair.b, spec=pair.spec.without_slot(name, group.slots[0]))


def test_values_that_are_not_finite(pair_of: Callable[..., Any], tmp_path: Path) -> None:
    model = tiny("bert")
    with torch.no_grad():
        model.bert.pooler.dense.bias[2] = float("inf")
    broken = open_model(save(model, tmp_path / "broken"))
    with pytest.raises(CheckpointError, match="has 1 NaN or infinite"):
        pretrained.align(pair_of("bert").a, broken, spec=pair_of("bert").spec)


def test_networks_that_do_not_fit(pair_of: Callable[..., Any], tmp_path: Path) -> None:
    pair = pair_of("bert")
    with pytest.raises(CheckpointError, match="are different architectures"):
        pretrained.align(pair.a, pair_of("gpt2").a)
    wide = open_model(save(tiny("bert", intermediate_size=11), tmp_path / "wide"))
    with pytest.raises(ShapeError, match="Networks of different widths"):
        pretrained.align(pair.a, wide)
