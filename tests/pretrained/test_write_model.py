"""Relabelled and merged folders: the same function, the same arithmetic, and nothing half-written."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pretrained_models import KINDS, logits, save, tiny
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import isthmus
from isthmus import pretrained
from isthmus.couplings import random_permutation
from isthmus.errors import CheckpointError, DataError, OutputError, ShapeError, SymmetryError
from isthmus.matching import Alignment
from isthmus.pretrained import _gather, _write, open_model
from isthmus.symmetry import AxisGroup, IndexMap, Reordering, Slot, SymmetrySpec

# Most networks here are random; that strangers are named has a test of its own.
pytestmark = pytest.mark.filterwarnings("ignore:The weights of model")


def random_alignment(spec: SymmetrySpec, seed: int = 0) -> Alignment:
    generator = torch.Generator().manual_seed(seed)
    drawn = {n: random_permutation(g.size, generator) for n, g in spec.groups.items()}
    return Alignment(drawn, spec, "random", seed=seed)


@pytest.mark.parametrize("shard", ["5GB", "1500", "1"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_relabelled_network_computes_the_same(
    pair_of: Callable[..., Any], tmp_path: Path, kind: str, shard: str
) -> None:
    pair = pair_of(kind)
    alignment = random_alignment(pair.spec)
    written = pretrained.apply(alignment, pair.b, tmp_path / "out", max_shard_size=shard)
    assert (len(written.shards) == 1) == (shard == "5GB")
    assert written.nbytes == pair.b.file.nbytes
    before = type(pair.b.model).from_pretrained(pair.b.path)
    after = type(pair.b.model).from_pretrained(tmp_path / "out")
    expected = isthmus.symmetry.apply(pair.spec, alignment.permutations, before.state_dict())
    changed = [n for n, v in after.state_dict().items() if not torch.equal(v, before.state_dict()[n])]
    assert len(changed) > len(expected) / 2
    assert all(torch.equal(after.state_dict()[n], v) for n, v in expected.items())
    one, other = (logits(m, pair.b.example.kwargs) for m in (before, after))
    assert torch.allclose(one, other, rtol=0, atol=3e-6 * float(one.abs().max()))


@pytest.mark.parametrize("block", [1, 50, 300])
def test_small_blocks_give_the_same(
    pair_of: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int
) -> None:
    pair = pair_of("llama")
    alignment = random_alignment(pair.spec)
    pretrained.apply(alignment, pair.b, tmp_path / "whole")
    pretrained.merge([pair.a, pair.b], tmp_path / "merged", alignments=[alignment])
    monkeypatch.setattr(_gather.blocks, "__defaults__", (block,))
    monkeypatch.setattr(_write, "_BLOCK_ENTRIES", block)
    pretrained.apply(alignment, pair.b, tmp_path / "parts")
    pretrained.merge([pair.a, pair.b], tmp_path / "merged parts", alignments=[alignment])
    for one, other in (("whole", "parts"), ("merged", "merged parts")):
        files = [(tmp_path / name / "model.safetensors").read_bytes() for name in (one, other)]
        assert files[0] == files[1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dtype_ties_and_metadata_are_kept(
    tmp_path: Path, pair_of: Callable[..., Any], dtype: torch.dtype
) -> None:
    spec = pair_of("gpt2").spec
    opened = open_model(save(tiny("gpt2", dtype=dtype), tmp_path / "m"))
    alignment = random_alignment(spec)
    pretrained.apply(alignment, opened, tmp_path / "out")
    inverse = replace(alignment, couplings=spec.invert(alignment.permutations))
    pretrained.apply(inverse, open_model(tmp_path / "out"), tmp_path / "back")
    before, back = (load_file(tmp_path / f / "model.safetensors") for f in ("m", "back"))
    assert before.keys() == back.keys()
    assert "lm_head.weight" not in back
    assert all(v.dtype == dtype and torch.equal(v, back[k]) for k, v in before.items())
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
    loaded = type(opened.model).from_pretrained(tmp_path / "out")
    assert loaded.lm_head.weight is loaded.transformer.wte.weight
    assert loaded.dtype == dtype


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("aligned", [True, False])
def test_a_merge_is_that_of_the_networks_in_memory(
    pair_of: Callable[..., Any], tmp_path: Path, kind: str, aligned: bool
) -> None:
    pair = pair_of(kind)
    alignments = [random_alignment(pair.spec)] if aligned else None
    written = pretrained.merge([pair.a, pair.b], tmp_path / "out", [1, 3], alignments=alignments)
    expected = isthmus.merge([pair.a.load(), pair.b.load()], [1, 3], alignments=alignments)
    found = type(pair.a.model).from_pretrained(tmp_path / "out").state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[n], v) for n, v in expected.items())
    assert written.tensors == len(pair.a.file)


def test_three_networks_and_different_dtypes(tmp_path: Path) -> None:
    folders = [save(tiny("bert", k, dtype), tmp_path / f"{k}") for k, dtype in
               enumerate((torch.float32, torch.bfloat16, torch.float16))]  # fmt: skip
    opened = [open_model(f) for f in folders]
    spec = opened[0].discover()
    alignments = [None, random_alignment(spec)]
    pretrained.merge(opened, tmp_path / "out", alignments=alignments)
    expected = isthmus.merge([m.load() for m in opened], alignments=alignments)
    found = open_model(tmp_path / "out").load().state_dict()
    assert all(v.dtype == torch.float32 and torch.equal(found[n], v) for n, v in expected.items())


def test_strangers_are_named(pair_of: Callable[..., Any], tmp_path: Path) -> None:
    pair = pair_of("bert")
    with pytest.warns(
        isthmus.errors.IsthmusWarning, match=r"weights of model 1 \([+-]0\.\d\d\) have almost nothing"
    ):
        pretrained.merge([pair.a, pair.b], tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").exists()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pretrained.merge([pair.a, pair.a], tmp_path / "same")
        pretrained.merge([pair.a, pair.b], tmp_path / "moved", alignments=[random_alignment(pair.spec)])


def test_tensors_that_the_network_does_not_know_are_the_first_ones(
    pair_of: Callable[..., Any], tmp_path: Path
) -> None:
    pair = pair_of("bert")
    folder = save(tiny("bert"), tmp_path / "m")
    extra = {"bert.embeddings.old_ids": torch.arange(5), "old": torch.randn(3)}
    save_file(
        {**load_file(folder / "model.safetensors"), **extra}, folder / "model.safetensors", {"format": "pt"}
    )
    opened = open_model(folder)
    merged = pretrained.merge([opened, pair.b], tmp_path / "out")
    moved = pretrained.apply(random_alignment(pair.spec), opened, tmp_path / "moved")
    assert sorted(merged.unknown) == sorted(moved.unknown) == sorted(extra)
    assert pretrained.merge([pair.a, pair.b], tmp_path / "other").unknown == ()
    for name, what in (("out", "the first model's"), ("moved", "as they were, in the old order")):
        found = load_file(tmp_path / name / "model.safetensors")
        assert all(torch.equal(found[k], v) for k, v in extra.items())
        card = (tmp_path / name / "README.md").read_text(encoding="utf-8")
        assert f"does not use `bert.embeddings.old_ids`, `old`. These tensors are {what}" in card
    assert "does not use" not in (tmp_path / "other" / "README.md").read_text(encoding="utf-8")


def test_dtypes_that_differ_within_one_checkpoint(pair_of: Callable[..., Any], tmp_path: Path) -> None:
    """Norms in float32, the rest in bfloat16, an integer beside them."""
    pair = pair_of("llama")
    folder = save(tiny("llama", 2), tmp_path / "m")
    stored = load_file(folder / "model.safetensors")
    mixed = {k: v if "norm" in k else v.bfloat16() for k, v in stored.items()} | {"step": torch.tensor(3)}
    save_file(mixed, folder / "model.safetensors", {"format": "pt"})
    opened, alignment = open_model(folder), random_alignment(pair.spec)
    pretrained.apply(alignment, opened, tmp_path / "moved")
    pretrained.merge([opened, pair.b], tmp_path / "merged", alignments=[alignment])
    for name in ("moved", "merged"):
        found = load_file(tmp_path / name / "model.safetensors")
        assert {k: v.dtype for k, v in found.items()} == {k: v.dtype for k, v in mixed.items()}
    expected = isthmus.merge([opened.load(), pair.b.load()], alignments=[alignment])
    assert all(torch.equal(found[k], expected[k]) for k in stored)


def test_tied_tensors_stored_twice_move_together(pair_of: Callable[..., Any], tmp_path: Path) -> None:
    pair = pair_of("gpt2")
    folder = save(tiny("gpt2"), tmp_path / "m")
    tensors = load_file(folder / "model.safetensors")
    twin = {"lm_head.weight": tensors["transformer.wte.weight"].clone()}
    save_file(tensors | twin, folder / "model.safetensors", {"format": "pt"})
    opened = open_model(folder)
    pretrained.apply(random_alignment(pair.spec), opened, tmp_path / "moved")
    pretrained.merge([opened, pair.b], tmp_path / "merged", alignments=[random_alignment(pair.spec)])
    for name in ("moved", "merged"):
        found = load_file(tmp_path / name / "model.safetensors")
        assert torch.equal(found["lm_head.weight"], found["transformer.wte.weight"])
        assert not torch.equal(found["lm_head.weight"], twin["lm_head.weight"])
        assert open_model(tmp_path / name).load().lm_head.weight.shape == twin["lm_head.weight"].shape


def test_a_snapshot_of_the_hubs_cache(pair_of: Callable[..., Any], tmp_path: Path) -> None:
    """Its files are links to blobs; what is written is an ordinary folder, and the card names the model."""
    pair = pair_of("llama")
    blobs, snapshot = (tmp_path / "models--org--tiny--llama" / p for p in ("blobs", "snapshots/0a1b"))
    for folder in (blobs, snapshot):
        folder.mkdir(parents=True)
    for k, path in enumerate(sorted(p for p in pair.b.path.iterdir() if p.is_file())):
        (blobs / f"{k:03}").write_bytes(path.read_bytes())
        (snapshot / path.name).symlink_to(f"../../blobs/{k:03}")
    opened, alignment = open_model(snapshot), random_alignment(pair.spec)
    assert opened.title == "org/tiny--llama"
    pretrained.apply(alignment, opened, tmp_path / "from links", max_shard_size=2000)
    pretrained.apply(alignment, pair.b, tmp_path / "from files", max_shard_size=2000)
    assert not any(p.is_symlink() for p in (tmp_path / "from links").rglob("*"))
    found, expected = (contents(tmp_path / name) for name in ("from links", "from files"))
    assert '- "org/tiny--llama"' in found.pop("README.md").decode()
    del expected["README.md"], expected["notes/data.txt"]
    for files in (found, expected):  # safetensors shuffles the metadata of a header
        files["isthmus/alignment.safetensors"] = b"%d" % len(files["isthmus/alignment.safetensors"])
    assert found == expected


def test_notes_of_the_index_are_kept(pair_of: Callable[..., Any], tmp_path: Path) -> None:
    opened = pair_of("bert").b
    before = json.loads((opened.path / "model.safetensors.index.json").read_text())["metadata"]
    assert set(before) > {"total_size"}
    for name in ("one", "two"):
        pretrained.apply(random_alignment(pair_of("bert").spec), opened, tmp_path / name, max_shard_size=900)
        opened = open_model(tmp_path / name)
        assert opened.file.index_metadata == before


def test_values_that_are_not_finite_can_be_moved(pair_of: Callable[..., Any], tmp_path: Path) -> None:
    """A relabelling loses nothing, not even these; matching and averaging refuse them."""
    model = tiny("bert")
    with torch.no_grad():
        model.bert.pooler.dense.bias.fill_(float("nan"))
    pretrained.apply(
        random_alignment(pair_of("bert").spec), open_model(save(model, tmp_path / "m")), tmp_path / "out"
    )
    assert load_file(tmp_path / "out" / "model.safetensors")["bert.pooler.dense.bias"].isnan().all()


def test_a_disk_that_fills_up_while_writing(pair_of: Callable[..., Any], tmp_path: Path) -> None:
    """A limit on the size of files makes the system itself refuse, in the middle of a shard."""
    resource = pytest.importorskip("resource")
    pair = pair_of("llama")
    before, limits = contents(pair.b.path), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, limits[1]))
    try:
        with pytest.raises(
            OutputError, match=r"Cannot write .*out: File too large.* has room; nothing was changed"
        ):
            pretrained.apply(random_alignment(pair.spec), pair.b, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(tmp_path.iterdir()) == []
    assert contents(pair.b.path) == before


def test_too_little_room_is_seen_before_any_tensor_is_read(
    pair_of: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = pair_of("bert")
    room = pair.b.file.nbytes
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=room))
    seen: list[object] = []
    with pytest.raises(OutputError, match=r"it needs .* GB, but the disk of .* free"):
        pretrained.apply(
            random_alignment(pair.spec), pair.b, tmp_path / "out", on_progress=lambda *at: seen.append(at)
        )
    assert not seen
    room = 10 * room + 10**6
    pretrained.apply(random_alignment(pair.spec), pair.b, tmp_path / "out")


def test_networks_of_different_classes_with_the_same_tensors(
    pair_of: Callable[..., Any], tmp_path: Path
) -> None:
    pair = pair_of("llama")
    folder = save(tiny("llama"), tmp_path / "m")
    config = json.loads((folder / "config.json").read_text())
    config |= {"architectures": ["MistralForCausalLM"], "model_type": "mistral"}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    other = open_model(folder)
    assert other.state.shapes().keys() == pair.a.state.shapes().keys()
    with pytest.raises(CheckpointError, match=r"is a LlamaForCausalLM and .* a MistralForCausalLM: they"):
        pretrained.merge([pair.a, other], tmp_path / "out")


def test_other_files_survive_and_the_card_tells(pair_of: Callable[..., Any], tmp_path: Path) -> None:
    pair = pair_of("gpt2")
    folder = save(tiny("gpt2"), tmp_path / "base model")
    (folder / "README.md").write_text("the old card", encoding="utf-8")
    (folder / "pytorch_model.bin").write_bytes(b"old weights")
    base = open_model(folder)
    alignment = replace(random_alignment(pair.spec, 5), verification_error=1.5e-15)
    written = pretrained.merge([base, pair.b], tmp_path / "out", [1, 3], alignments=[alignment])
    out = tmp_path / "out"
    assert written.left_out == ("pytorch_model.bin",)
    for name in ("config.json", "generation_config.json", "tokenizer.json", "notes/data.txt"):
        assert (out / name).read_bytes() == (folder / name).read_bytes()
    stored = Alignment.load(out / "isthmus" / "alignment.safetensors")
    assert all(torch.equal(p, stored.permutations[n]) for n, p in alignment.permutations.items())
    card = (out / "README.md").read_text(encoding="utf-8")
    front = card.split("---\n")[1].splitlines()
    titles = ["base_model:", '- "base model"', '- "b"']
    assert front == ["library_name: transformers", *titles, "tags:", "- merge", "- isthmus"]
    assert "| base model | 0.25 | no |" in card
    assert "| b | 0.75 | yes, by the method 'random' |" in card
    assert "seed 5" in card
    assert "1.50e-15" in card
    assert "pytorch_model.bin" in card
    assert str(tmp_path) not in card
    pretrained.apply(replace(alignment, verification_error=None), base, tmp_path / "moved")
    card = (tmp_path / "moved" / "README.md").read_text(encoding="utf-8")
    assert "It computes the same function" in card
    assert "was not measured" in card


def test_a_name_on_the_hub_is_the_title(tmp_path: Path) -> None:
    opened = open_model(save(tiny("bert"), tmp_path / "m"))
    assert opened.title == "m"
    for name, title in (("org/bert", "org/bert"), ("/home/me/bert", "m"), ("./x/y", "m"), ("../y", "m")):
        config = json.loads((opened.path / "config.json").read_text())
        (opened.path / "config.json").write_text(json.dumps({**config, "_name_or_path": name}))
        assert opened.title == title


def test_several_alignments_are_kept(pair_of: Callable[..., Any], tmp_path: Path) -> None:
    pair = pair_of("bert")
    alignments = [random_alignment(pair.spec, k) for k in range(2)]
    pretrained.merge([pair.a, pair.b, pair.b], tmp_path / "out", alignments=alignments)
    found = sorted(p.name for p in (tmp_path / "out" / "isthmus").iterdir())
    assert found == ["alignment-1.safetensors", "alignment-2.safetensors"]


def test_progress_counts_bytes(pair_of: Callable[..., Any], tmp_path: Path) -> None:
    pair = pair_of("bert")
    seen: list[tuple[str, int, int]] = []
    written = pretrained.merge([pair.a, pair.b], tmp_path / "out", on_progress=lambda *at: seen.append(at))
    assert [s[0] for s in seen] == list(pair.a.file)
    assert seen[0][1] == 0
    assert {s[2] for s in seen} == {written.nbytes}


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.mark.parametrize("error", [RuntimeError("disk on fire"), KeyboardInterrupt()])
def test_an_interrupted_run_leaves_nothing(
    pair_of: Callable[..., Any], tmp_path: Path, error: BaseException
) -> None:
    pair = pair_of("llama")
    before = contents(pair.b.path)

    def fail(name: str, done: int, total: int) -> None:
        if done > total / 2:
            raise error

    with pytest.raises(type(error)):
        pretrained.apply(
            random_alignment(pair.spec), pair.b, tmp_path / "out", max_shard_size=2000, on_progress=fail
        )
    assert list(tmp_path.iterdir()) == []
    assert contents(pair.b.path) == before
    pretrained.apply(random_alignment(pair.spec), pair.b, tmp_path / "out", max_shard_size=2000)
    assert open_model(tmp_path / "out").state.nbytes == pair.b.state.nbytes


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills forks of one process")
def test_a_killed_run_leaves_nothing_that_looks_whole(pair_of: Callable[..., Any], tmp_path: Path) -> None:
    """Killed outright at random points and at all of the last ones; run again, it always comes to the same end."""
    pair = pair_of("bert")
    (tmp_path / "root").mkdir()
    command = [sys.executable, str(Path(__file__).with_name("pretrained_killed.py"))]
    command += [str(pair.a.path), str(pair.b.path), str(tmp_path / "root"), "6", "0"]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr
    tried = json.loads(done.stdout)
    assert len(tried) == 14
    for run in tried:
        assert run["ended"] == signal.SIGKILL, run
        assert run["left"] in ("nothing", "hidden", "whole"), run
        assert run["inputs"], run
        assert run["then"] == "whole", run
        # What is whole is not written again.
        assert run["again"] == (-3 if run["left"] == "whole" else 0), run
    assert {run["left"] for run in tried} >= {"hidden", "whole"}
    assert any(run["point"].startswith("os.rename") for run in tried)


def test_what_is_there_is_not_overwritten(pair_of: Callable[..., Any], tmp_path: Path) -> None:
    pair = pair_of("bert")
    before = contents(pair.b.path)
    with pytest.raises(OutputError, match="it is there already"):
        pretrained.apply(random_alignment(pair.spec), pair.b, pair.b.path)
    assert contents(pair.b.path) == before


def test_networks_that_do_not_fit(pair_of: Callable[..., Any], tmp_path: Path) -> None:
    pair, other = pair_of("bert"), pair_of("gpt2")
    with pytest.raises(CheckpointError, match="are different architectures"):
        pretrained.merge([pair.a, other.a], tmp_path / "out")
    wide = open_model(save(tiny("bert", intermediate_size=11), tmp_path / "wide"))
    with pytest.raises(ShapeError, match="Networks of different widths"):
        pretrained.merge([pair.a, wide], tmp_path / "out")
    with pytest.raises(SymmetryError, match=r"which the alignment moves\. Was it made for this network"):
        pretrained.apply(random_alignment(other.spec), pair.a, tmp_path / "out")
    with pytest.raises(ShapeError, match="the alignment expects"):
        pretrained.apply(random_alignment(pair.spec), wide, tmp_path / "out")
    with pytest.raises(DataError, match="two models or more, found 1"):
        pretrained.merge([pair.a], tmp_path / "out")
    with pytest.raises(
        ShapeError, match="expected 1 alignments, one for each model after the first, found 2"
    ):
        pretrained.merge([pair.a, pair.b], tmp_path / "out", alignments=[None, None])
    with pytest.raises(ShapeError, match="expected 2 weights"):
        pretrained.merge([pair.a, pair.b], tmp_path / "out", [1, 2, 3])
    with pytest.raises(DataError, match="weights must be finite"):
        pretrained.merge([pair.a, pair.b], tmp_path / "out", [0, 0])
    with pytest.raises(DataError, match="Shard size"):
        pretrained.merge([pair.a, pair.b], tmp_path / "out", max_shard_size="big")
    assert not (tmp_path / "out").exists()


def test_tied_tensors_must_move_together(pair_of: Callable[..., Any], tmp_path: Path) -> None:
    pair = pair_of("gpt2")
    name = next(n for n, g in pair.spec.groups.items() if any(s.tensor == "lm_head.weight" for s in g.slots))
    group = pair.spec.groups[name]
    torn = pair.spec.with_group(
        AxisGroup(name, group.size, tuple(s for s in group.slots if s.tensor != "lm_head.weight"))
    )
    with pytest.raises(SymmetryError, match="are one tensor, but the alignment moves them differently"):
        pretrained.apply(random_alignment(torn), pair.b, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_values_that_are_not_finite_are_not_merged(pair_of: Callable[..., Any], tmp_path: Path) -> None:
    pair = pair_of("bert")
    model = tiny("bert")
    with torch.no_grad():
        model.bert.pooler.dense.bias[2] = float("nan")
    broken = open_model(save(model, tmp_path / "broken"))
    with pytest.raises(CheckpointError, match=r"'bert.pooler.dense.bias' has 1 NaN"):
        pretrained.merge([pair.a, broken], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_tensor_is_read_whole_only_if_its_rows_move(pair_of: Callable[..., Any]) -> None:
    class Watched(pretrained.LazyState):
        def __getitem__(self, name: str) -> torch.Tensor:
            raise AssertionError(f"{name} was read whole")

    state = pair_of("llama").a.file
    watched = Watched({n: state.stored(n) for n in state})
    rolled = torch.arange(12).roll(1)

    def parts(gather: dict[int, torch.Tensor]) -> Iterator[torch.Tensor]:
        return _gather.blocks(watched, "model.embed_tokens.weight", Reordering(gather), 100)

    found = list(parts({1: rolled}))
    assert len(found) > 3
    assert torch.equal(torch.cat(found), state["model.embed_tokens.weight"][:, rolled])
    with pytest.raises(AssertionError, match="read whole"):
        list(parts({0: torch.arange(23).roll(1)}))


@pytest.mark.parametrize("limit", [1, 30, 10**6])
def test_parts_of_a_tensor_move_as_in_memory(tmp_path: Path, limit: int) -> None:
    """Experts in one tensor: the experts move, and the units inside one of them."""
    values = torch.arange(3 * 4 * 5, dtype=torch.bfloat16).reshape(3, 4, 5)
    save_file({"experts": values}, tmp_path / "model.safetensors")
    one_expert = ((0, IndexMap(3, 1, 2)),)
    spec = SymmetrySpec(
        {
            "experts": AxisGroup("experts", 3, (Slot("experts", 0, IndexMap(3, 3)),)),
            "hidden": AxisGroup("hidden", 4, (Slot("experts", 1, IndexMap(4, 4), one_expert),)),
            "stream": AxisGroup("stream", 5, (Slot("experts", 2, IndexMap(5, 5)),)),
        },
        (),
        {"experts": (3, 4, 5)},
    )
    drawn = random_alignment(spec, 1).permutations | {"hidden": torch.tensor([1, 2, 3, 0])}
    gather = _gather.moves(spec, drawn)["experts"]
    found = torch.cat(list(_gather.blocks(pretrained.LazyState.open(tmp_path), "experts", gather, limit)))
    expected = isthmus.symmetry.apply(spec, drawn, {"experts": values})["experts"]
    assert torch.equal(found, expected)
    assert torch.equal(gather.apply(values), expected)
    assert not gather.same(_gather.moves(spec, {n: p for n, p in drawn.items() if n != "hidden"})["experts"])
    assert not _gather.moves(spec, {n: torch.arange(len(p)) for n, p in drawn.items()})
