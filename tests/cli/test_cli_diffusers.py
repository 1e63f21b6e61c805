"""Model folders of diffusers on the command line, from their symmetries to a merged folder that loads."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

diffusers = pytest.importorskip("diffusers")
diffusers.logging.set_verbosity_error()

Cli = Callable[..., Any]


def saved(folder: Path, seed: int) -> None:
    torch.manual_seed(seed)
    model = diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=4, num_layers=1, in_channels=2, sample_size=4, patch_size=2,
        num_embeds_ada_norm=5, norm_elementwise_affine=False,
    )  # fmt: skip
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn(parameter.shape)
    model.save_pretrained(folder)


def loaded(folder: Path) -> Any:
    return diffusers.DiTTransformer2DModel.from_pretrained(folder).eval()


BATCHES = """
import torch

def batches():
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(8, 2, 4, 4, generator=generator)
    inputs = {
        "hidden_states": noise, "timestep": torch.arange(8), "class_labels": torch.arange(8) % 5,
    }
    return [(inputs, noise.flip(0))]
"""


def test_the_command_line(isthmus: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    saved(tmp_path / "a", 0)
    saved(tmp_path / "b", 1)
    (tmp_path / "diffusers_data.py").write_text(BATCHES)
    found = isthmus("symmetry", "a", "--json")
    assert found.code == 0, found.err
    assert found.json["verification"]["passed"]
    aligned = isthmus("align", "a", "b", "--out", "ab.safetensors", "--apply", "b2", "--json")
    assert aligned.code == 0, aligned.err
    assert aligned.json["verification_error"] < 1e-10
    merged = isthmus(
        "merge", "a", "b", "--alignment", "ab.safetensors", "--out", "m", "--max-shard-size", "4KB"
    )
    assert merged.code == 0, merged.err
    average = {n: (v + loaded(tmp_path / "b2").state_dict()[n]) / 2
               for n, v in loaded(tmp_path / "a").state_dict().items()}  # fmt: skip
    for name, value in loaded(tmp_path / "m").state_dict().items():
        torch.testing.assert_close(value, average[name], rtol=0, atol=1e-6)
    line = isthmus("line", "a", "b", "--data", "diffusers_data:batches", "--loss", "mse", "--alignment",
                   "ab.safetensors", "--points", "3", "--out", "line", "--json")  # fmt: skip
    assert line.code == 0, line.err
    network, batch = loaded(tmp_path / "m"), importlib.import_module("diffusers_data").batches()[0]
    with torch.no_grad():
        expected = float((network(**batch[0]).sample - batch[1]).square().mean())
    assert line.json["curves"]["data"]["loss"][1] == pytest.approx(expected, rel=1e-4)
    (tmp_path / "pipeline" / "unet").mkdir(parents=True)
    (tmp_path / "pipeline" / "unet" / "config.json").write_text("{}")
    (tmp_path / "pipeline" / "model_index.json").write_text("{}")
    refused = isthmus("symmetry", "pipeline")
    assert refused.code == 2
    assert "Give the folder of one of them: pipeline/unet." in refused.err
