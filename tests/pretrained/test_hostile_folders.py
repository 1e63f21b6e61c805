"""Model folders that mean harm, or change while they are used: one clear error, at once, and nothing half-written."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pretrained_models import save, tiny
from safetensors.torch import load_file, save_file

from isthmus import pretrained
from isthmus.couplings import random_permutation
from isthmus.errors import CheckpointError, ModelError, OutputError
from isthmus.matching import Alignment
from isthmus.pretrained import LazyState, open_model
from isthmus.pretrained._card import Contribution, merge_card, relabelled_card

EVIL = "a\x1b[31m\u202e|`<b>\n# x"


def header(entries: dict[str, Any] | str, data: bytes = b"") -> bytes:
    text = (entries if isinstance(entries, str) else json.dumps(entries)).encode()
    return len(text).to_bytes(8, "little") + text + data


def entry(start: int, stop: int, shape: list[int] | None = None, dtype: str = "F32") -> dict[str, Any]:
    return {
        "dtype": dtype,
        "shape": [(stop - start) // 4] if shape is None else shape,
        "data_offsets": [start, stop],
    }


# --- Headers -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content",
    [
        header({"a": entry(0, 8), "b": entry(4, 12)}, bytes(12)),
        header({"a": entry(0, 8), "b": entry(12, 16)}, bytes(16)),
        header({"a": entry(0, 8)}, bytes(4)),
        header({"a": entry(0, 8)}, bytes(12)),
        header({"a": entry(8, 0, [2])}, bytes(8)),
        header({"a": entry(0, 8, [2**62, 4])}, bytes(8)),
        header({"a": entry(0, 8, [-2])}, bytes(8)),
        header({"a": entry(0, 8, [3])}, bytes(8)),
        header({"a": {"dtype": "F32", "shape": [2]}}, bytes(8)),
        header({"__metadata__": {"a": 3}, "a": entry(0, 8)}, bytes(8)),
        (2**63).to_bytes(8, "little") + b"{}",
        (2**30).to_bytes(8, "little") + b"{}",
        header("[" * 10**6),
        header('{"a":' * 10**5),
        header("{}  \xff"),
    ],
    ids=lambda c: c[8:60].decode("latin1"),
)
def test_headers_that_lie(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match="not a whole safetensors file"):
        LazyState.open(tmp_path)


def test_a_tensor_that_a_header_names_twice(tmp_path: Path) -> None:
    """Safetensors takes the last one without a word."""
    twice = f'{{"a": {json.dumps(entry(0, 8))}, "a": {json.dumps(entry(0, 8, dtype="I32"))}}}'
    (tmp_path / "model.safetensors").write_bytes(header(twice, bytes(8)))
    with pytest.raises(CheckpointError, match="holds the key 'a' twice in one object"):
        LazyState.open(tmp_path)


def test_names_in_a_header_are_shown_escaped(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(header({EVIL: entry(0, 2, [2], "F8_E8M0")}, bytes(2)))
    with pytest.raises(CheckpointError, match=r"dtype F8_E8M0, which cannot be permuted") as caught:
        LazyState.open(tmp_path)
    assert "\x1b" not in str(caught.value)
    assert "\n" not in str(caught.value)


# --- Links and special files -------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save(tiny("bert"), tmp_path / "m")


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    return save(tiny("bert", 1), tmp_path / "s", shard="2KB")


def test_weights_that_lie_elsewhere(folder: Path, sharded: Path, tmp_path: Path) -> None:
    (folder / "model.safetensors").rename(tmp_path / "private.safetensors")
    (folder / "model.safetensors").symlink_to(tmp_path / "private.safetensors")
    with pytest.raises(
        CheckpointError, match=r"is a link to .*private\.safetensors, outside the model folder"
    ):
        open_model(folder)
    shard = sorted(sharded.glob("model-*"))[1]
    shard.rename(tmp_path / "shard.safetensors")
    shard.symlink_to(tmp_path / "shard.safetensors")
    with pytest.raises(CheckpointError, match=r"is a link to .*shard\.safetensors, outside the model folder"):
        open_model(sharded)


def test_a_snapshot_in_the_cache_of_the_hub(folder: Path, tmp_path: Path) -> None:
    repository = tmp_path / "models--org--name"
    snapshot = repository / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    for k, file in enumerate(f for f in folder.iterdir() if f.is_file()):
        file.rename(repository / "blobs" / str(k))
        (snapshot / file.name).symlink_to(f"../../blobs/{k}")
    model = open_model(snapshot)
    assert model.title == "org/name"
    written = pretrained.merge([model, model], tmp_path / "out")
    assert not any(p.is_symlink() for p in written.path.rglob("*"))
    assert (written.path / "tokenizer.json").read_text() == '{"version": "1.0"}'


@pytest.mark.parametrize(
    "name", ["/etc/passwd", "..", ".", "", "sub/x.safetensors", "../s/x.safetensors", "x\0y", "x" * 5000]
)
def test_an_index_that_points_elsewhere(sharded: Path, name: str) -> None:
    path = sharded / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"][next(iter(index["weight_map"]))] = name
    path.write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="which is not in the folder"):
        open_model(sharded)


@pytest.mark.parametrize("file", ["config.json", "model.safetensors"])
def test_a_pipe_is_not_waited_for(folder: Path, file: str) -> None:
    (folder / file).unlink()
    os.mkfifo(folder / file)
    with pytest.raises(
        CheckpointError, match=r"is a pipe, which is not read|holds neither model\.safetensors"
    ):
        open_model(folder)


def test_a_configuration_that_lies_elsewhere(folder: Path, tmp_path: Path) -> None:
    (folder / "config.json").rename(tmp_path / "private.json")
    (folder / "config.json").symlink_to(tmp_path / "private.json")
    with pytest.raises(
        CheckpointError, match=r"config\.json: is a link to .*private\.json, outside the model folder"
    ):
        open_model(folder)


@pytest.mark.parametrize("path", ["x" * 5000, "a\0b"])
def test_paths_that_are_none(path: str) -> None:
    assert not pretrained.is_model_folder(path)
    with pytest.raises(CheckpointError, match="no such folder"):
        open_model(path)
    with pytest.raises(CheckpointError, match="cannot be read"):
        LazyState.open(path)


def test_a_link_to_a_secret_is_not_copied(folder: Path, tmp_path: Path) -> None:
    (folder / "vocab.txt").symlink_to("/etc/passwd")
    model = open_model(folder)
    with pytest.raises(
        CheckpointError, match=r"vocab\.txt: is a link to /etc/passwd, outside the model folder"
    ):
        pretrained.merge([model, model], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_result_is_not_written_into_an_input(folder: Path, pair_of: Callable[..., Any]) -> None:
    before = sorted(folder.rglob("*"))
    model = open_model(folder)
    with pytest.raises(OutputError, match=r"it is inside the input .*m, which would be lost or mixed up"):
        pretrained.merge([model, model], folder / "merged")
    with pytest.raises(OutputError, match=r"it is inside the input"):
        pretrained.apply(random_alignment(pair_of("bert").spec), model, folder / "notes" / "new")
    assert sorted(folder.rglob("*")) == before


# --- Files that change while they are used -----------------------------------------------------------------


def random_alignment(spec: Any) -> Alignment:
    generator = torch.Generator().manual_seed(0)
    drawn = {n: random_permutation(g.size, generator) for n, g in spec.groups.items()}
    return Alignment(drawn, spec, "random")


def _replace(shard: Path) -> None:
    """Another shard with the same header, under the same name."""
    other = {k: v + 1 if v.is_floating_point() else v for k, v in load_file(shard).items()}
    save_file(other, shard.with_suffix(".new"), metadata={"format": "pt"})
    os.replace(shard.with_suffix(".new"), shard)


def _write_into(shard: Path) -> None:
    """The same, in place."""
    time.sleep(0.02)  # the clock of a file system ticks a hundred times a second
    with shard.open("r+b") as file:
        file.seek(-8, os.SEEK_END)
        file.write(bytes(8))


@pytest.mark.parametrize("change", [_replace, _write_into, Path.unlink, lambda p: os.truncate(p, 40)])
@pytest.mark.parametrize("action", ["apply", "merge"])
def test_a_shard_that_changes_while_a_run_goes_on(
    folder: Path,
    sharded: Path,
    tmp_path: Path,
    change: Callable[[Path], object],
    action: str,
    pair_of: Callable[..., Any],
) -> None:
    a, b = open_model(folder), open_model(sharded)
    last = sorted(sharded.glob("model-*"))[-1]
    changed = False

    def midway(name: str, done: int, total: int) -> None:
        nonlocal changed
        if done > total / 2 and not changed:
            changed = True
            change(last)

    def run() -> None:
        if action == "apply":
            alignment = random_alignment(pair_of("bert").spec)
            pretrained.apply(alignment, b, tmp_path / "out", on_progress=midway)
        else:
            pretrained.merge([a, b], tmp_path / "out", on_progress=midway)

    with pytest.raises(CheckpointError, match=r"was changed or replaced since it was opened, so tensors of"):
        run()
    assert changed
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m", "s"]


def test_a_tensor_stays_as_it_was_read(folder: Path) -> None:
    """What safetensors returns is a mapping of the file."""
    state = LazyState.open(folder)
    whole, rows = state["bert.pooler.dense.weight"], state.rows("bert.pooler.dense.weight", 0, 3)
    before = whole.clone(), rows.clone()
    with (folder / "model.safetensors").open("r+b") as file:
        file.seek(-state.nbytes, os.SEEK_END)
        file.write(bytes(state.nbytes))
    assert torch.equal(whole, before[0])
    assert torch.equal(rows, before[1])
    with pytest.raises(CheckpointError, match="was changed or replaced"):
        state["bert.pooler.dense.weight"]


# --- Configurations ----------------------------------------------------------------------------------------


def configure(folder: Path, **changes: Any) -> Path:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    return folder


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert", "vit"])
@pytest.mark.parametrize("layers", [10**9, 10**5])
def test_configurations_of_very_many_layers(tmp_path: Path, kind: str, layers: int) -> None:
    name = "n_layer" if kind == "gpt2" else "num_hidden_layers"
    folder = configure(save(tiny(kind), tmp_path / "m"), **{name: layers})
    config = json.loads((folder / "config.json").read_text())
    if layers == 10**5:
        config.pop("layer_types", None)  # of the length that was saved
        (folder / "config.json").write_text(json.dumps(config))
    started = time.process_time()
    with pytest.raises(
        ModelError,
        match=rf"asks for {name} = 1,000,000,000, more|describes a network of (more than [\d,]+ tensors|[\d,]+ par)",
    ):
        open_model(folder)
    assert time.process_time() - started < 10


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_size": 12 * 10**8},
        {"intermediate_size": 10**9},
        {"vocab_size": 10**11},
        {"num_labels": 10**9},
        {"num_attention_heads": 10**9, "hidden_size": 10**9},
        {"max_position_embeddings": 10**11},
        {"max_position_embeddings": 3 * 10**9},
        {"type_vocab_size": 10**15},
    ],
)
def test_configurations_of_very_large_layers(folder: Path, changes: dict[str, int]) -> None:
    started = time.process_time()
    with pytest.raises(ModelError, match=r"asks for|describes a network of|failed with"):
        open_model(configure(folder, **changes))
    assert time.process_time() - started < 10


def test_masks_that_fill_the_memory(tmp_path: Path) -> None:
    """Position tables are made by the constructor, whatever is stored."""
    folder = save(tiny("llama"), tmp_path / "m")
    configure(
        folder,
        max_position_embeddings=10**12,
        rope_scaling={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4},
    )
    try:
        open_model(folder)  # where nothing is made of it
    except ModelError as error:
        assert "describes a network of" in str(error) or "failed with" in str(error)  # noqa: PT017
    from isthmus.pretrained._bounds import parameters_on_meta

    file = LazyState.open(folder)
    for make in (
        lambda: torch.arange(10**12),
        lambda: torch.ones(10**6, 10**6),
        lambda: torch.full((10**6, 10**6), 1.0),
        lambda: torch.arange(10**6)[:, None] < torch.arange(10**6),
        lambda: torch.outer(torch.arange(10**6), torch.arange(10**6)),
        lambda: torch.arange(10**5).repeat(10**7),
    ):
        with pytest.raises(ModelError, match=r"describes a network of [\d,]+ numbers in one tensor"):  # noqa: SIM117
            with parameters_on_meta(folder, file):
                make()
    with parameters_on_meta(folder, file):
        assert torch.arange(10**6).sum() == 10**6 * (10**6 - 1) // 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 10**6, "nested 1000000 levels deep"),
        ('{"a": ' * 100 + "1" + "}" * 100, "nested 100 levels deep"),
        ('{"architectures": ["X"], "architectures": ["Y"]}', "holds the key 'architectures' twice"),
        ('{"a": "' + "x" * 5 * 2**20 + '"}', "of a configuration at most 4,194,304 are read"),
        ("\xff", "cannot be read as JSON"),
        ('["BertModel"]', "expected a JSON object, found list"),
    ],
)
def test_configurations_that_are_none(folder: Path, text: str, message: str) -> None:
    (folder / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=message):
        open_model(folder)


def test_a_configuration_with_infinite_limits_is_read(folder: Path) -> None:
    configure(folder, some_limit=[0.0, float("inf")])
    assert "Infinity" in (folder / "config.json").read_text()
    assert open_model(folder).config["some_limit"] == [0.0, float("inf")]


@pytest.mark.parametrize("name", ["__name__", "torch", "os.system", "", "Bert\x1b[31mModel", "x" * 10**5])
def test_architectures_that_are_none(folder: Path, name: str) -> None:
    with pytest.raises(
        (ModelError, CheckpointError), match=r"has no architecture|names no architectures"
    ) as caught:
        open_model(configure(folder, architectures=[name] if name else []))
    assert "\x1b" not in str(caught.value)
    assert len(str(caught.value)) < 1500


# --- Cards -------------------------------------------------------------------------------------------------


def test_cards_hold_no_markup_of_others(pair_of: Callable[..., Any]) -> None:
    alignment = replace(random_alignment(pair_of("bert").spec), method=EVIL)
    source = Contribution(EVIL, alignment=alignment)
    for card in (merge_card([source, source], [EVIL], [EVIL]), relabelled_card(source, [EVIL], [EVIL])):
        assert "\x1b" not in card
        assert "\u202e" not in card
        assert "\n# x" not in card
        body = card.split("---\n")[2].replace("`a\\x1b[31m\\u202e|'<b>\\n# x`", "(code)")
        assert "<b>" not in body
        assert body.count("(code)") == 2
        rows = [line for line in body.splitlines() if line.startswith("|")]
        assert all(line.replace("\\|", "").count("|") == 4 for line in rows)


def test_titles_from_configurations(tmp_path: Path) -> None:
    opened = open_model(save(tiny("bert"), tmp_path / "m"))
    for name in ("org/\x1b[31m", "org/na me", "org/" + "x" * 200, 3, ["a/b"], "a/b\n", "-x/y", "org/<b>"):
        configure(opened.path, _name_or_path=name)
        assert opened.title == "m"


def test_a_folder_whose_name_is_no_text(folder: Path, tmp_path: Path) -> None:
    shutil.move(folder, tmp_path / "m\udcff\x1b[31m")
    with pytest.raises(
        CheckpointError, match=r"m\\udcff\\x1b\[31m.*is no text in UTF-8, which safetensors needs"
    ):
        open_model(tmp_path / "m\udcff\x1b[31m")
