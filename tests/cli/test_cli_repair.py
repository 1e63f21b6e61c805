"""Repairs on the command line: what is chosen is said, and what is written is an ordinary checkpoint."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from isthmus import merge
from isthmus.checkpoints import load_state
from isthmus.pretrained import open_model

transformers = pytest.importorskip("transformers")
Cli = Callable[..., Any]

PAIR = ("a.safetensors", "b.pt", "--model", "mynet:build")
IMAGES = """
import torch

def batches():
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(24, 3, 16, 16, generator=generator)
    return [{"pixel_values": pixels[:12], "labels": torch.arange(12) % 3},
            {"pixel_values": pixels[12:], "labels": torch.arange(12) % 3}]
"""


def test_a_line_says_which_repair_was_taken(isthmus: Cli, project: Path) -> None:
    data = ("--data", "mynet:batches", "--points", "3")
    found = isthmus("line", *PAIR, *data, "--repair", "auto", "--out", "line", "--json")
    assert found.code == 0, found.err
    settings = found.json["settings"]
    losses = settings["repair_losses"]
    assert settings["repair"] == min(losses, key=losses.__getitem__)
    assert {"none", "repair", "rescale"} <= set(losses)
    assert json.loads((project / "line" / "line.json").read_text())["settings"] == settings
    bad = isthmus("line", *PAIR, *data, "--repair", "glue", "--out", "other")
    assert bad.code == 2
    assert "Unknown repair 'glue': expected one of none" in bad.err


def test_a_merge_says_which_repair_was_taken(isthmus: Cli, project: Path) -> None:
    command = ("merge", *PAIR, "--data", "mynet:batches", "--method", "weights", "--repair")
    found = isthmus(*command, "auto", "--out", "m.safetensors", "--json")
    assert found.code == 0, found.err
    assert found.json["repair"] in found.json["repair_losses"]
    state = load_state("m.safetensors")
    assert {k: v.shape for k, v in state.items()} == {
        k: v.shape for k, v in load_state("a.safetensors").items()
    }
    printed = isthmus(*command, "repair", "--out", "n.safetensors")
    assert "Note: Repair: repair (mean and spread of every channel put back (REPAIR))." in printed.out
    free = isthmus(
        "merge", *PAIR[:2], "--model", "mynet:with_inputs", "--repair", "data-free", "--out", "f.pt"
    )
    assert free.code == 0, free.err
    without = isthmus("merge", *PAIR, "--repair", "repair", "--out", "x.pt")
    assert without.code == 2
    assert "repair='repair' needs batches=... of training data" in without.err
    assert not (project / "x.pt").exists()


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for seed, name in enumerate("ab"):
        torch.manual_seed(seed)
        config = transformers.ResNetConfig(
            embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], layer_type="basic", num_labels=3
        )
        transformers.ResNetForImageClassification(config).save_pretrained(tmp_path / name)
    (tmp_path / "images.py").write_text(IMAGES, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    sys.modules.pop("images", None)
    return tmp_path


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ([], "Running statistics of BatchNorm were recomputed on data."),
        (["--refresh", "batchnorm"], "Running statistics of BatchNorm were recomputed on data."),
        pytest.param(["--repair", "auto"], "chosen by the loss on the training data", marks=pytest.mark.slow),
    ],
)
def test_model_folders_are_run_where_data_serve(
    isthmus: Cli, folders: Path, options: list[str], said: str
) -> None:
    found = isthmus("merge", "a", "b", "--data", "images:batches", *options, "--out", "m")
    assert found.code == 0, found.err
    assert said in found.out
    assert said in (folders / "m" / "README.md").read_text()
    assert "unning statistics" not in found.err
    models = [open_model(name).load() for name in "ab"]
    batches = __import__("images").batches()
    repair = {"repair": "auto"} if "--repair" in options else {}
    with pytest.warns(match="have almost nothing in common"):
        wanted = merge(models, batches=batches, **repair)
    state = transformers.ResNetForImageClassification.from_pretrained("m").state_dict()
    assert all(torch.equal(v, wanted[k]) for k, v in state.items())


def test_without_refresh_or_data_folders_are_averaged_as_they_are(isthmus: Cli, folders: Path) -> None:
    told = isthmus("merge", "a", "b", "--data", "images:batches", "--refresh", "none", "--out", "m")
    assert told.code == 0, told.err
    assert "--data was not used: model folders are averaged tensor by tensor" in told.err
    assert "The merged running statistics" in told.err
    again = isthmus("merge", "a", "b", "--repair", "none", "--out", "n")
    assert again.code == 0, again.err
    one, other = (load_state(f"{name}/model.safetensors") for name in "mn")
    assert all(torch.equal(one[k], other[k]) for k in one)
