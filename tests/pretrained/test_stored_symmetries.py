"""Stored networks moved by more than permutations: folded, aligned, written and merged, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from pretrained_models import tiny
from safetensors.torch import save_file

import isthmus
from isthmus import pretrained
from isthmus.couplings import Coupling, Linear, Monomial, Permutation, Rotation
from isthmus.errors import CheckpointError, SymmetryError
from isthmus.matching import Alignment
from isthmus.pretrained import LazyState, _gather, open_model
from isthmus.symmetry import Acts, AxisGroup, IndexMap, Slot, SymmetrySpec, drawn_elements, random_element

transformers = pytest.importorskip("transformers")
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

IDS = {"input_ids": torch.arange(10).reshape(2, 5)}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# --- Tensors alone ---------------------------------------------------------------------------------------------


def spec_of(acts: Acts) -> SymmetrySpec:
    """Return a table whose columns hold units, a weight whose rows read others, and one of both with two experts."""
    one_expert = ((0, IndexMap(2, 1, 1)),)
    slots = (
        Slot("table", 1, IndexMap(4, 4), role="holds", power=1),
        Slot("out", 0, IndexMap(4, 4), role="holds", power=1),
        Slot("experts", 2, IndexMap(4, 4), role="reads", power=-1),
    )
    inner = (
        Slot("out", 1, IndexMap(6, 3, 3), role="reads", power=-1),
        Slot("experts", 1, IndexMap(3, 3), one_expert, role="holds", power=1),
    )
    pairs: Literal["", "halves"] = "halves" if acts.pairs else ""
    groups = {
        "stream": AxisGroup("stream", 4, slots, acts=acts, planes=pairs),
        "inner": AxisGroup("inner", 3, inner, acts=Acts.GENERAL if pairs else acts),
    }
    return SymmetrySpec(groups, (), {"table": (9, 4), "out": (4, 6), "experts": (2, 3, 4)})


def couplings_of(acts: Acts) -> Mapping[str, Coupling]:
    source = generator(3)
    order = {4: torch.tensor([1, 2, 0, 3]), 3: torch.tensor([1, 2, 0])}
    inner = Acts.GENERAL if acts.pairs else acts
    return {
        "stream": random_element(acts, order[4], source, "halves" if acts.pairs else ""),
        "inner": random_element(inner, order[3], source),
    }


@pytest.mark.parametrize("acts", [a for a in Acts if a is not Acts.PERMUTATION])
@pytest.mark.parametrize("limit", [1, 70, 10**6])
def test_every_class_is_carried_as_in_memory(tmp_path: Path, acts: Acts, limit: int) -> None:
    spec, at = spec_of(acts), couplings_of(acts)
    state = {n: torch.randn(s, generator=generator(1), dtype=torch.float64) for n, s in spec.shapes.items()}
    save_file(state, tmp_path / "model.safetensors")
    stored, expected = LazyState.open(tmp_path), isthmus.symmetry.apply(spec, at, state)
    for name, move in _gather.moves(spec, at).items():
        assert isinstance(move, _gather.Carrying)
        found = torch.cat(list(_gather.blocks(stored, name, move, limit)))
        torch.testing.assert_close(found, expected[name], rtol=1e-13, atol=1e-13)
        assert not torch.equal(found, state[name])
        assert move.by_rows is (name == "table")


def test_rows_of_a_table_are_read_block_by_block(tmp_path: Path) -> None:
    class Watched(LazyState):
        def __getitem__(self, name: str) -> torch.Tensor:
            raise AssertionError(f"{name} was read whole")

    spec, at = spec_of(Acts.ORTHOGONAL), couplings_of(Acts.ORTHOGONAL)
    save_file({n: torch.ones(s) for n, s in spec.shapes.items()}, tmp_path / "model.safetensors")
    stored = LazyState.open(tmp_path)
    watched = Watched({n: stored.stored(n) for n in stored})
    moves = _gather.moves(spec, at)
    assert len(list(_gather.blocks(watched, "table", moves["table"], 40))) > 3
    with pytest.raises(AssertionError, match="out was read whole"):
        list(_gather.blocks(watched, "out", moves["out"], 40))


def test_a_tensor_of_two_groups_is_rounded_once(tmp_path: Path) -> None:
    spec, at = spec_of(Acts.GENERAL), couplings_of(Acts.GENERAL)
    state = {n: torch.randn(s, generator=generator(1)).bfloat16() for n, s in spec.shapes.items()}
    save_file(state, tmp_path / "model.safetensors")
    exact = isthmus.symmetry.apply(spec, at, {n: t.double() for n, t in state.items()})
    stored, moves = LazyState.open(tmp_path), _gather.moves(spec, at)
    for name, move in moves.items():
        assert torch.equal(
            torch.cat(list(_gather.blocks(stored, name, move))), exact[name].to(torch.bfloat16)
        )
        wide = torch.cat(list(_gather.blocks(stored, name, move, wide=True)))
        assert wide.dtype == torch.float64
        torch.testing.assert_close(wide, exact[name])
    twice = isthmus.symmetry.apply(spec, at, state)["out"]
    assert not torch.equal(twice, exact["out"].to(torch.bfloat16))  # what rounding between groups would give


def test_what_does_not_fit_the_dtype_is_refused(tmp_path: Path) -> None:
    spec = spec_of(Acts.POSITIVE)
    grown = {"stream": Monomial(torch.arange(4), torch.full((4,), 100.0, dtype=torch.float64))}
    state = {n: torch.full(s, 1000.0, dtype=torch.float16) for n, s in spec.shapes.items()}
    save_file(state, tmp_path / "model.safetensors")
    moves = _gather.moves(spec, grown)
    with pytest.raises(
        CheckpointError, match=r"'table' has entries .* too large for float16\. Save the network"
    ):
        list(_gather.blocks(LazyState.open(tmp_path), "table", moves["table"]))
    save_file({n: t * torch.nan for n, t in state.items()}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="so are some that are stored, or they grew too large"):
        list(_gather.blocks(LazyState.open(tmp_path), "out", moves["out"]))


def test_tied_tensors_are_carried_alike_by_rotations_only() -> None:
    holds, reads = (Slot("w", 1, IndexMap(4, 4), role=r, power=p) for r, p in (("holds", 1), ("reads", -1)))
    still = replace(holds, power=0)

    def same(one: Slot, two: Slot, coupling: Coupling) -> bool:
        first, second = (_gather.Carrying({1: [("g", slot)]}, {"g": coupling}) for slot in (one, two))
        return first.same(second)

    turned = Rotation(torch.linalg.qr(torch.randn(4, 4, generator=generator(), dtype=torch.float64))[0])
    mixed = Linear(torch.eye(4, dtype=torch.float64) + torch.ones(4, 4, dtype=torch.float64))
    signs = Monomial(torch.arange(4), torch.tensor([1.0, -1, 1, -1], dtype=torch.float64))
    assert same(holds, reads, turned)
    assert not same(holds, reads, mixed)
    assert same(holds, holds, mixed)
    assert same(holds, reads, signs)
    assert not same(holds, still, signs)
    assert same(holds, still, Permutation(torch.tensor([1, 2, 3, 0])))
    assert not same(holds, replace(reads, axis=0), turned)


# --- Networks --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a GPT-2 (source), folded (a), and moved by an element of its whole group (b)."""
    root = tmp_path_factory.mktemp("symmetries")
    tiny("gpt2").save_pretrained(root / "source")
    pretrained.fold(open_model(root / "source"), root / "a", untie=True)
    a = open_model(root / "a")
    ones, zeros = a.constants()
    spec = a.discover(ones=ones, zeros=zeros)
    drawn = Alignment(drawn_elements(spec, generator(1), 1)[0], spec, "planted")
    written = pretrained.apply(drawn, a, root / "b", max_shard_size="4KB")
    assert len(written.shards) > 1
    assert written.change is None
    return root


def outputs(folder: Path) -> torch.Tensor:
    model = transformers.GPT2LMHeadModel.from_pretrained(folder).eval()
    with torch.no_grad():
        return model(**IDS).logits


def off(one: torch.Tensor, two: torch.Tensor) -> float:
    return float((one - two).abs().max() / one.abs().max())


def test_a_planted_element_of_the_whole_group_is_found(folded: Path, tmp_path: Path) -> None:
    a, b = open_model(folded / "a"), open_model(folded / "b")
    expected = outputs(folded / "source")
    assert off(expected, outputs(folded / "b")) < 1e-4
    found = pretrained.align(a, b, symmetry="all")
    assert found.kinds == {"Rotation": 1, "Permutation": 2, "Linear": 6}
    assert found.verification_error is not None
    assert found.verification_error < 1e-10
    assert not found.notes
    found.save(tmp_path / "ab.safetensors")
    loaded = Alignment.load(tmp_path / "ab.safetensors")
    pretrained.apply(loaded, b, tmp_path / "aligned")
    back = open_model(tmp_path / "aligned")
    for key in a.file:
        torch.testing.assert_close(back.file[key], a.file[key], rtol=1e-4, atol=1e-4)
    assert "1 of the kind Rotation" in (tmp_path / "aligned" / "README.md").read_text()
    pretrained.merge([a, b], tmp_path / "merged", alignments=[loaded])
    assert off(expected, outputs(tmp_path / "merged")) < 1e-4
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert config["tie_word_embeddings"] is False


def test_networks_that_were_not_folded_are_told_to_be(folded: Path, tmp_path: Path) -> None:
    a, source = open_model(folded / "a"), open_model(folded / "source")
    (advice,) = pretrained._align.fold_first(source, source)
    assert "isthmus fold FOLDER --out FOLDER-folded --untie" in advice
    assert "3 norms have gains of their own" in advice
    assert pretrained._align.fold_first(a, a) == ()
    assert a.constants()[0] == tuple(
        n for n in a.state if n.endswith(("ln_1.weight", "ln_2.weight", "ln_f.weight"))
    )
    spec = a.discover(ones=a.constants()[0], zeros=a.constants()[1])
    plain = pretrained.discover_pair(a, source)
    assert (plain.ones, plain.zeros) == ((), ())  # ones in one network alone are not ones of both
    drawn = Alignment(drawn_elements(spec, generator(1), 1)[0], spec, "planted")
    with pytest.raises(
        SymmetryError, match=r"takes all entries of '.*ln_1\.weight' to be one, and some are not"
    ):
        pretrained.apply(drawn, source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_short_dtypes_say_what_rounding_does(
    folded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model: Any = open_model(folded / "a").load().to(torch.bfloat16)
    model.save_pretrained(tmp_path / "half")
    half = open_model(tmp_path / "half")
    ones, zeros = half.constants()
    spec = half.discover(ones=ones, zeros=zeros)
    drawn = Alignment(drawn_elements(spec, generator(1), 1)[0], spec, "planted")
    written = pretrained.apply(drawn, half, tmp_path / "quiet")
    assert written.change is not None
    assert 1e-4 < written.change < 0.1
    monkeypatch.setattr("isthmus.pretrained._write._MOST_ROUNDING", 1e-4)
    with pytest.warns(isthmus.errors.IsthmusWarning, match="rounding what was relabelled to 16 bits moves"):
        pretrained.apply(drawn, half, tmp_path / "loud")
