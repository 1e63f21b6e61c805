"""Verification side by side: it agrees with running the network in memory, and finds every planted fault."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pretrained_models import KINDS, save, tiny

import isthmus
from isthmus import pretrained
from isthmus.batches import Batch
from isthmus.errors import ModelError, SymmetryError, VerificationError
from isthmus.pretrained import _verify, open_model
from isthmus.symmetry import AxisGroup, IndexMap, Slot, _runner


@pytest.mark.parametrize("kind", KINDS)
def test_a_right_spec_passes(pair_of: Callable[..., Any], kind: str) -> None:
    pair = pair_of(kind)
    result = pretrained.verify(pair.spec, pair.b)
    assert result.passed
    assert result.dtype == torch.float64
    assert 0 < result.max_relative_error < 1e-12
    assert set(result.errors) == {"logits"}
    memory = isthmus.verify(pair.spec, pair.b.load(), (), pair.b.example.kwargs)
    assert memory.passed


def test_both_runners_try_the_same_relabellings(
    pair_of: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """All groups together, and after a failure each alone: the same permutations from the same generator."""
    pair = pair_of("bert")
    name, group = next(iter(pair.spec.groups.items()))
    wrong = pair.spec.without_slot(name, group.slots[0])
    tried: dict[str, list[dict[str, torch.Tensor]]] = {"memory": [], "stored": []}

    def noting(runner: Any, where: str) -> None:
        plain = runner.errors

        def errors(self: Any, spec: Any, relabellings: Any) -> Any:
            tried[where] += relabellings
            return plain(self, spec, relabellings)

        monkeypatch.setattr(runner, "errors", errors)

    noting(_runner.Runner, "memory")
    noting(_verify._StoredRuns, "stored")
    memory = isthmus.verify(
        wrong, pair.a.load(), (), pair.a.example.kwargs, generator=torch.Generator().manual_seed(4)
    )
    stored = pretrained.verify(wrong, pair.a, generator=torch.Generator().manual_seed(4))
    drawn = tried["memory"][:2]
    assert len(drawn[0]) == len(pair.spec.groups)
    for one, two in zip(drawn, tried["stored"], strict=False):
        assert one.keys() == two.keys()
        assert all(torch.equal(p, two[n]) for n, p in one.items())
    assert all(bool((p != torch.arange(len(p))).all()) for p in drawn[0].values()), "every unit moves"
    assert len(tried["memory"]) == len(tried["stored"])
    assert (memory.guilty, memory.draws, memory.tolerance, memory.seed) == (
        stored.guilty,
        stored.draws,
        stored.tolerance,
        stored.seed,
    )


def test_weights_too_small_to_be_felt_hide_nothing(pair_of: Callable[..., Any], tmp_path: Path) -> None:
    pair = pair_of("gpt2")
    model = tiny("gpt2")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(1e-8)
    opened = open_model(save(model, tmp_path / "weak"))
    name, group = next((n, g) for n, g in pair.spec.groups.items() if "mlp" in n)
    wrong = pair.spec.without_slot(name, group.slots[0])
    assert not pretrained.verify(wrong, opened).passed
    assert pretrained.verify(pair.spec, opened).passed


def test_inputs_that_are_the_same_everywhere_hide_nothing(pair_of: Callable[..., Any]) -> None:
    """Zeros show nothing of the kernel that reads them."""
    pair = pair_of("vit")
    zeros = {name: torch.zeros_like(value) for name, value in pair.a.example.kwargs.items()}
    blank = replace(pair.a, example=Batch(pair.a.example.args, zeros))
    kernel = next(n for n in pair.spec.shapes if n.endswith("projection.weight"))
    name, slot = next((n, s) for n, g in pair.spec.groups.items() for s in g.slots if s.tensor == kernel)
    wrong = pair.spec.without_slot(name, slot)
    drawn = {name: torch.arange(pair.spec.groups[name].size).roll(1)}
    assert pretrained.function_change(wrong, drawn, blank) < 1e-12
    assert not pretrained.verify(wrong, blank).passed


@pytest.mark.parametrize("kind", KINDS)
def test_every_missing_slot_is_found(pair_of: Callable[..., Any], kind: str) -> None:
    """The first and the last weight of every group; a key's bias would change nothing, as softmax ignores it."""
    pair = pair_of(kind)
    for name, group in pair.spec.groups.items():
        weights = [s for s in group.slots if len(pair.spec.shapes[s.tensor]) > 1]
        for slot in {weights[0], weights[-1]}:
            tied = {n for n in pair.a.state if pair.a.state.stored(n) == pair.a.state.stored(slot.tensor)}
            kept = tuple(s for s in group.slots if s.tensor not in tied or s.index != slot.index)
            wrong = pair.spec.with_group(replace(group, slots=kept))
            result = pretrained.verify(wrong, pair.a, draws=1)
            assert not result.passed, (name, slot)
            assert name in result.guilty


def test_an_extra_slot_is_found(pair_of: Callable[..., Any]) -> None:
    pair = pair_of("bert")
    extra = AxisGroup("extra", 3, (Slot("classifier.bias", 0, IndexMap(3, 3)),))
    result = pretrained.verify(pair.spec.with_group(extra), pair.a)
    assert result.guilty == ("extra",)
    with pytest.raises(VerificationError, match="Guilty: extra"):
        result.require()


def test_gains_of_one_hide_nothing(pair_of: Callable[..., Any], tmp_path: Path) -> None:
    """At the initial values of norms and biases, a wrong spec changes nothing unless the weights are changed."""
    pair = pair_of("bert")
    model = tiny("bert")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.fill_(float("LayerNorm.weight" in name))
    opened = open_model(save(model, tmp_path / "m"))
    name = next(n for n in pair.spec.groups if "LayerNorm" in n)
    group = pair.spec.groups[name]
    slot = next(s for s in group.slots if s.tensor.endswith("attention.output.LayerNorm.weight"))
    wrong = pair.spec.without_slot(name, slot)
    drawn = {name: torch.arange(group.size).roll(1)}
    assert pretrained.function_change(wrong, drawn, opened) < 1e-12
    assert not pretrained.verify(wrong, opened).passed


@pytest.mark.parametrize("kind", KINDS)
def test_the_change_is_that_in_memory(pair_of: Callable[..., Any], kind: str) -> None:
    pair = pair_of(kind)
    name, group = next((n, g) for n, g in pair.spec.groups.items() if g.size > 5)
    wrong = pair.spec.with_group(replace(group, slots=group.slots[:1]))
    tied = any(len(v) > 1 and group.slots[0].tensor in v for v in pair.b.names.values())
    drawn = {name: torch.arange(group.size).roll(1)}
    if tied:
        pytest.skip("one slot alone tears tied tensors apart")
    found = pretrained.function_change(wrong, drawn, pair.b)
    expected = isthmus.symmetry.function_change(wrong, drawn, pair.b.load(), (), pair.b.example.kwargs)
    assert expected > 1e-3
    assert found == pytest.approx(expected, rel=1e-9)


def test_large_networks_run_in_float32(pair_of: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    pair = pair_of("llama")
    monkeypatch.setattr(_verify, "LARGE", 100)
    result = pretrained.verify(pair.spec, pair.a)
    assert result.dtype == torch.float32
    assert result.passed
    assert 1e-9 < result.max_relative_error < 1e-5
    group = next(n for n in pair.spec.groups if "mlp" in n)
    wrong = pair.spec.without_slot(group, pair.spec.groups[group].slots[0])
    assert not pretrained.verify(wrong, pair.a).passed


def test_each_tensor_is_read_once(pair_of: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    pair = pair_of("llama")
    reads: list[str] = []
    plain = pretrained.LazyState.__getitem__

    def counted(state: pretrained.LazyState, name: str) -> torch.Tensor:
        reads.append(state.stored(name).key)
        return plain(state, name)

    monkeypatch.setattr(pretrained.LazyState, "__getitem__", counted)
    pretrained.verify(pair.spec, pair.a, draws=5)
    assert sorted(reads) == sorted(set(reads))
    assert set(reads) == set(pair.a.file)


def test_another_network(pair_of: Callable[..., Any]) -> None:
    with pytest.raises(SymmetryError, match="Was it made for this network"):
        pretrained.verify(pair_of("gpt2").spec, pair_of("bert").a)


def test_nothing_finite(pair_of: Callable[..., Any], tmp_path: Path) -> None:
    model = tiny("bert")
    with torch.no_grad():
        model.classifier.weight.fill_(float("nan"))
    opened = open_model(save(model, tmp_path / "m"))
    with pytest.raises(ModelError, match="returns no finite value in 'logits'"):
        pretrained.verify(pair_of("bert").spec, opened)


class Odd(torch.nn.Module):
    """Makes a constant while it runs."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(3, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x).relu() @ torch.tensor([[1.0], [2.0], [3.0], [4.0]], device=x.device)


def test_a_constant_whose_value_is_unknown(tmp_path: Path) -> None:
    from isthmus.pretrained import LazyState, OpenedModel

    with torch.device("meta"):
        model = Odd().eval()
    opened = OpenedModel(tmp_path, model, Batch((torch.zeros(2, 3),)), LazyState({}), LazyState({}), {})
    constants = [t for t in opened.traced.constants.values() if t.is_meta]
    if not constants:
        pytest.skip("this version of torch keeps the constant's value")
    with pytest.raises(ModelError, match="its value is unknown"):
        pretrained.verify(opened.discover(), opened)
