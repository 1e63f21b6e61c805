"""The files beside the weights: those of the model survive, those of its old weights do not."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from isthmus.errors import CheckpointError, OutputError
from isthmus.pretrained._extras import extras_of

KEPT = [
    "added_tokens.json",
    "chat_template.jinja",
    "code.py",
    "generation_config.json",
    "sub/vocab.txt",
    "tokenizer.json",
    "tokenizer.model",
    "training_args.bin",
    "unknown.data",
    "config.json",
]
STALE = [
    "adapter_model.safetensors",
    "flax_model.msgpack",
    "ggml-model-q4.bin",
    "model-q4.gguf",
    "onnx/model.onnx",
    "onnx/model.onnx_data",
    "openvino/openvino_model.bin",
    "optimizer.pt",
    "original/consolidated.00.pth",
    "pytorch_model-00001-of-00002.bin",
    "pytorch_model.bin.index.json",
    "tf_model.h5",
]


def made(folder: Path, names: list[str]) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    return folder


def files(folder: Path) -> list[str]:
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


def test_files_beside_the_weights_are_copied(tmp_path: Path) -> None:
    own = ["model.safetensors", "README.md", ".gitattributes", ".git/config", "sub/.cache/x"]
    source = made(tmp_path / "source", [*KEPT, *STALE, *own])
    extras = extras_of(source, {"model.safetensors"})
    assert extras.left_out == tuple(STALE)
    assert sorted(extras.copied) == sorted(KEPT)
    assert extras.copied[-1] == "config.json"
    assert extras.nbytes == sum(len(name) for name in KEPT)
    extras.copy(tmp_path / "target")
    assert files(tmp_path / "target") == sorted(KEPT)
    assert all((tmp_path / "target" / name).read_text() == name for name in KEPT)


def test_weights_of_further_modules_survive(tmp_path: Path) -> None:
    """Sentence-transformers runs them on the network's outputs, which stay the same."""
    names = ["2_Dense/config.json", "2_Dense/model.safetensors", "config.json", "modules.json"]
    source = made(tmp_path / "source", [*names, "onnx/model.onnx"])
    modules = [{"path": "", "type": "Transformer"}, {"path": "2_Dense", "type": "Dense"}]
    (source / "modules.json").write_text(json.dumps(modules))
    extras = extras_of(source, {"model.safetensors"})
    assert sorted(extras.copied) == names
    assert extras.left_out == ("onnx/model.onnx",)


@pytest.mark.parametrize("text", ["", "{}", "[3]", '[{"type": "x"}]', '{"path": 3}'])
def test_a_list_of_modules_that_is_none(tmp_path: Path, text: str) -> None:
    source = made(tmp_path / "source", ["sub/model.safetensors"])
    (source / "modules.json").write_text(text)
    assert extras_of(source, set()).left_out == ("sub/model.safetensors",)


def test_links_become_files(tmp_path: Path) -> None:
    """As the hub's cache lays them: a snapshot's files are links to the blobs of the same repository."""
    repository = tmp_path / "models--org--name"
    source = made(repository / "snapshots" / "abc", ["real/vocab.txt"])
    made(repository / "blobs", ["1234"])
    (source / "linked.txt").symlink_to("../../blobs/1234")
    (source / "real" / "deep.txt").symlink_to("../../../blobs/1234")
    (source / "folder").symlink_to(source / "real")
    extras_of(source, set()).copy(tmp_path / "target")
    names = ["folder/deep.txt", "folder/vocab.txt", "linked.txt", "real/deep.txt", "real/vocab.txt"]
    assert files(tmp_path / "target") == names
    assert (tmp_path / "target" / "linked.txt").read_text() == "1234"
    assert not any(p.is_symlink() for p in (tmp_path / "target").rglob("*"))


def test_a_cache_that_is_reached_through_a_link(tmp_path: Path) -> None:
    repository = tmp_path / "disk" / "models--org--name"
    source = made(repository / "snapshots" / "abc", [])
    source.mkdir(parents=True)
    made(repository / "blobs", ["1234"])
    (source / "config.json").symlink_to("../../blobs/1234")
    (tmp_path / "cache").symlink_to(tmp_path / "disk")
    (tmp_path / "model").symlink_to(source)
    for folder in (tmp_path / "cache" / "models--org--name" / "snapshots" / "abc", tmp_path / "model"):
        assert extras_of(folder, set()).copied == ("config.json",)


@pytest.mark.parametrize("place", ["plain", "models--org--name/snapshots/abc"])
def test_a_link_to_a_file_elsewhere_is_refused(tmp_path: Path, place: str) -> None:
    """What lies there may be a key or a password, and the copy may be published."""
    source = made(tmp_path / place, ["config.json", "sub/vocab.txt"])
    secret = made(tmp_path / "home", ["secret"]) / "secret"
    other = made(tmp_path / "models--org--other" / "blobs", ["1234"]) / "1234"
    for target in (secret, other, Path("/etc/passwd"), Path(os.path.relpath(secret, source / "sub"))):
        link = source / "sub" / "tokenizer.json"
        link.symlink_to(target)
        with pytest.raises(
            CheckpointError, match=r"tokenizer\.json: is a link to .*outside the model folder, which is"
        ):
            extras_of(source, set())
        link.unlink()
    (source / "inside.txt").symlink_to("sub/vocab.txt")
    assert extras_of(source, set()).copied == ("inside.txt", "sub/vocab.txt", "config.json")


def test_blobs_that_are_a_link_themselves(tmp_path: Path) -> None:
    repository = tmp_path / "models--org--name"
    source = made(repository / "snapshots" / "abc", ["config.json"])
    (repository / "blobs").symlink_to(made(tmp_path / "home", ["secret"]))
    (source / "tokenizer.json").symlink_to("../../blobs/secret")
    with pytest.raises(CheckpointError, match=r"home/secret, outside the model folder"):
        extras_of(source, set())


def test_a_link_that_is_changed_after_the_check(tmp_path: Path) -> None:
    source = made(tmp_path / "source", ["config.json", "vocab.txt"])
    extras = extras_of(source, set())
    (source / "vocab.txt").unlink()
    (source / "vocab.txt").symlink_to("/etc/passwd")
    with pytest.raises(CheckpointError, match="outside the model folder"):
        extras.copy(tmp_path / "target")


def test_names_that_differ_in_capital_letters(tmp_path: Path) -> None:
    source = made(tmp_path / "source", ["ReadMe.md", "config.json", "isthmus", "vocab.txt"])
    extras = extras_of(source, set())
    assert extras.copied == ("vocab.txt", "config.json")
    (tmp_path / "target").mkdir()
    (tmp_path / "target" / "vocab.txt").write_text("there")  # as on a disk that takes both names for one
    with pytest.raises(
        OutputError, match=r"vocab\.txt: a file whose name differs at most in capital letters is there"
    ):
        extras.copy(tmp_path / "target")
    assert (tmp_path / "target" / "vocab.txt").read_text() == "there"


def test_a_link_in_a_circle_ends(tmp_path: Path) -> None:
    source = made(tmp_path / "source", ["sub/vocab.txt"])
    (source / "sub" / "up").symlink_to(source)
    assert extras_of(source, set()).copied == ("sub/vocab.txt",)


def test_a_link_to_a_folder_elsewhere_is_refused(tmp_path: Path) -> None:
    """What lies there may be anything, and the copy may be published."""
    source = made(tmp_path / "source", ["config.json"])
    (source / "all").symlink_to(made(tmp_path / "home", ["secret"]))
    with pytest.raises(
        CheckpointError, match=r"all: is a link to the folder .*home, outside the model folder"
    ):
        extras_of(source, set())


def test_a_link_to_nowhere_is_refused(tmp_path: Path) -> None:
    source = made(tmp_path / "source", ["config.json"])
    (source / "tokenizer.json").symlink_to("../../blobs/gone")
    with pytest.raises(
        CheckpointError, match=r"tokenizer\.json: is a link to \.\./\.\./blobs/gone, which is not"
    ):
        extras_of(source, set())


def test_pipes_are_no_files(tmp_path: Path) -> None:
    source = made(tmp_path / "source", ["config.json"])
    os.mkfifo(source / "pipe")
    assert extras_of(source, set()).copied == ("config.json",)
