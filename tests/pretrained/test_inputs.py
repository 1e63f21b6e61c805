"""Paths that are no checkpoints: what was found there is said, with the way out, for all of them at once."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from isthmus.checkpoints import save_state
from isthmus.errors import CheckpointError
from isthmus.pretrained import check_inputs, inspect_input, open_model


def made(folder: Path, *names: str, **texts: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("x")
    for name, text in texts.items():
        (folder / f"{name}.json").write_text(text)
    return folder


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for variable in ("HF_HOME", "HF_HUB_CACHE"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return tmp_path


def test_what_is_right(here: Path) -> None:
    save_state(here / "a.pt", {"w": torch.ones(1)})
    made(here / "model", "model.safetensors", config='{"architectures": ["X"]}')
    made(here / "shards", "model.safetensors.index.json")
    made(here / "unet", "model.safetensors", config='{"_class_name": "UNet2DModel"}')
    made(here / "vae", "diffusion_pytorch_model.safetensors.index.json", config='{"_class_name": "VQModel"}')
    found = {
        name: inspect_input(name).kind for name in ("a.pt", "a.pt::ema", "model", "shards", "unet", "vae")
    }
    assert found == {
        "a.pt": "weights",
        "a.pt::ema": "weights",
        "model": "model folder",
        "shards": "weights",
        "unet": "weights",
        "vae": "model folder",
    }
    assert check_inputs(["model", here / "model"])
    assert not check_inputs(["model", "a.pt"], network=True)
    with pytest.raises(
        CheckpointError,
        match=r"Give --model TARGET.*\nmodel: a model folder \(config\.json\)\.\na\.pt: a checkpoint, which names no",
    ):
        check_inputs(["model", "a.pt"])


def _adapter(here: Path) -> str:
    made(
        here / "x",
        "adapter_model.safetensors",
        adapter_config='{"base_model_name_or_path": "org/base\\u001b[31m"}',
    )
    return "x"


def _cached(here: Path) -> str:
    cache = here / "home" / ".cache" / "huggingface" / "hub" / "models--org--name" / "snapshots"
    made(cache / "abc", "config.json")
    return "org/name"


def _cache_folder(here: Path) -> str:
    made(here / "models--org--name" / "snapshots" / "abc", "config.json")
    return "models--org--name"


def _trainer(here: Path) -> str:
    made(here / "run", "checkpoint-5/config.json", "checkpoint-10/config.json", "trainer_state.json")
    return "run"


CASES: list[tuple[Callable[[Path], object], str]] = [
    (lambda p: "gone.pt", r"gone\.pt: no such file or folder\. Check the path\."),
    (lambda p: made(p, "model.pt") and "modle.pt", r"no such file or folder\. Did you mean model\.pt\?"),
    (lambda p: "no/such/place.pt", r"no such file, nor the folder no/such"),
    (
        lambda p: "org/name",
        r"looks like the name of a model on the hub.*hf download org/name --local-dir name",
    ),
    (_cached, r"It is in the hub's cache: give .*snapshots/abc"),
    (_cache_folder, r"a folder of model folders\. Give one of them: models--org--name/snapshots/abc"),
    (
        _adapter,
        r"an adapter \(adapter_config\.json\) for 'org/base\\\\x1b\[31m', not a network\. Give two .* join ",
    ),
    (
        lambda p: made(p, "adapter_model.bin") and "adapter_model.bin",
        "the weights of an adapter, not of a network",
    ),
    (lambda p: made(p / "x"), r"an empty folder\. Was the model downloaded"),
    (_trainer, r"a folder of model folders\. Give one of them: run/checkpoint-10, run/checkpoint-5\."),
    (
        lambda p: made(p / "x", "a.pt", "b.ckpt"),
        r"a folder with checkpoints and no config\.json\. Give one of the files: a\.pt",
    ),
    (lambda p: made(p / "x", "notes.txt"), r"a folder that holds notes\.txt, and no weights"),
    (
        lambda p: made(p / "x", "pytorch_model.bin", config="{}"),
        r"config\.json, but neither model\.safetensors nor .*it holds pytorch_model\.bin.*save_pretrained",
    ),
    (
        lambda p: made(p / "x", config="{}"),
        r"with config\.json, but neither model\.safetensors nor model\.safetensors\.index",
    ),
    (
        lambda p: made(p / "x", "unet/config.json", "vae/config.json", model_index="{}"),
        r"a pipeline of several networks \(model_index\.json\): unet, vae\. Give the folder of one of them: "
        r"\S+/x/unet, \S+/x/vae\.",
    ),
    (
        lambda p: made(p / "x", "diffusion_pytorch_model.bin", config='{"_class_name": "UNet2DModel"}'),
        r"neither diffusion_pytorch_model\.safetensors nor .*it holds diffusion_pytorch_model\.bin.*save_pretrained",
    ),
    (lambda p: made(p, "config.json") and "config.json", r"a configuration or other JSON, no weights"),
    (
        lambda p: made(p, "a.npz") and "a.npz",
        r"neither a torch nor a safetensors file, with the suffix '\.npz'",
    ),
    (
        lambda p: (p / "a").write_bytes(b"PK\3\4") and "a",
        r"a torch file \(\.pt\), with the suffix '\(none\)'\. Give it its right",
    ),
    (lambda p: (p / "a.gguf").write_bytes(b"GGUF1") and "a.gguf", r"a GGUF file, which holds packed weights"),
    (lambda p: (p / "a.pt").touch() or "a.pt", r"a\.pt: is empty\. The file was not written to the end"),
    (lambda p: os.mkfifo(p / "a.pt") or "a.pt", r"a\.pt: is a pipe, which is not read"),
    (lambda p: (p / "a.pt").symlink_to("gone") or "a.pt", r"a\.pt: is a link to gone, which is not there"),
    (lambda p: "a\x1b[2J.pt", r"a\\x1b\[2J\.pt: no such file"),
    (lambda p: "a\0.pt", r"a\\x00\.pt: (no such file|cannot be read)"),
]


@pytest.mark.parametrize("pipeline", [True, False])
def test_long_paths_are_shown_whole(here: Path, pipeline: bool) -> None:
    folder = here / ("x" * 100) / ("y" * 100)
    made(folder, "unet/config.json", **({"model_index": "{}"} if pipeline else {}))
    assert f": {folder / 'unet'}." in inspect_input(folder).advice


@pytest.mark.parametrize(("make", "message"), CASES)
def test_what_is_wrong_is_said(here: Path, make: Callable[[Path], object], message: str) -> None:
    path = str(make(here))
    found = inspect_input(path)
    assert found.kind == "wrong"
    with pytest.raises(CheckpointError, match=message):
        check_inputs([path], network=True)
    assert "\x1b" not in str(found)
    assert "\n" not in str(found)


def test_all_wrong_inputs_are_named_at_once(here: Path) -> None:
    made(here / "empty")
    save_state(here / "a.pt", {"w": torch.ones(1)})
    with pytest.raises(
        CheckpointError,
        match=r"^2 inputs are no checkpoints:\nempty: an empty folder.*\ngone\.pt: no such file[^\n]*$",
    ):
        check_inputs(["empty", "a.pt", "gone.pt"], network=True)
    with pytest.raises(CheckpointError, match=r"^gone\.pt: no such file[^\n]*$"):
        check_inputs(["gone.pt", "gone.pt"])


@pytest.mark.parametrize(
    ("name", "message"),
    [("org/name", "the hub"), ("gone", "no such folder"), ("file", "no such folder: it is neither")],
)
def test_opening_what_is_no_folder(here: Path, name: str, message: str) -> None:
    (here / "file").write_text("x")
    with pytest.raises(CheckpointError, match=f"{name}: .*{message}"):
        open_model(name)


def test_an_adapter_is_not_opened(here: Path) -> None:
    with pytest.raises(CheckpointError, match="an adapter"):
        open_model(_adapter(here))


@pytest.mark.parametrize("text", ["[" * 10**6, "\xff", "[]", json.dumps({"base_model_name_or_path": ["a"]})])
def test_damaged_configurations_do_not_hide_what_it_is(here: Path, text: str) -> None:
    made(here / "x", "adapter_model.safetensors", adapter_config=text)
    with pytest.raises(CheckpointError, match=r"x: a folder with an adapter"):
        check_inputs(["x"])
