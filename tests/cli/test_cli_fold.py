"""Folding on the command line: checkpoints of networks in code, and model folders."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from isthmus.checkpoints import load_state, save_state

Cli = Callable[..., Any]

NETWORK = """
import torch
from torch import nn

def build():
    return nn.Sequential(nn.Linear(3, 8), nn.LayerNorm(8), nn.Linear(8, 2))
"""


@pytest.fixture
def written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "normed.py").write_text(NETWORK, encoding="utf-8")
    torch.manual_seed(0)
    model: Any = nn.Sequential(nn.Linear(3, 8), nn.LayerNorm(8), nn.Linear(8, 2))
    nn.init.normal_(model[1].weight)
    nn.init.normal_(model[1].bias)
    save_state(tmp_path / "a.safetensors", model.state_dict())
    return tmp_path


def test_a_checkpoint_of_a_network_in_code(isthmus: Cli, written: Path) -> None:
    arguments = [
        "fold",
        "a.safetensors",
        "--out",
        "b.safetensors",
        "--model",
        "normed:build",
        "--shape",
        "4,3",
    ]
    result = isthmus(*arguments, "--json")
    assert result.code == 0
    assert result.json["folded_gains"] == ["1.weight"]
    assert result.json["error"] <= 1e-10
    assert result.json["folds"][0]["into"] == ["2.weight", "2.bias"]
    models: list[Any] = []
    for name in "ab":
        models.append(nn.Sequential(nn.Linear(3, 8), nn.LayerNorm(8), nn.Linear(8, 2)))
        models[-1].load_state_dict(load_state(written / f"{name}.safetensors"))
    x = torch.randn(4, 3)
    assert torch.allclose(models[0](x), models[1](x), atol=1e-6)
    assert bool((models[1][1].weight == 1).all())
    result = isthmus(*arguments[:3], "c.pt", *arguments[4:], "--part", "means")
    assert result.code == 0
    assert "1: mean out of 0.weight, 0.bias" in result.out
    assert "Written to c.pt" in result.out
    assert torch.equal(
        load_state(written / "c.pt")["1.weight"], load_state(written / "a.safetensors")["1.weight"]
    )


def test_bad_use_is_said_and_nothing_is_written(isthmus: Cli, written: Path) -> None:
    result = isthmus("fold", "a.safetensors", "--out", "b.safetensors")
    assert result.code == 2
    assert "does not say what it computes. Give --model" in result.err
    result = isthmus(
        "fold", "a.safetensors", "--out", "a.safetensors", "--model", "normed:build", "--shape", "4,3"
    )
    assert result.code == 2
    result = isthmus(
        "fold",
        "a.safetensors",
        "--out",
        "b.pt",
        "--model",
        "normed:build",
        "--shape",
        "4,3",
        "--part",
        "gain",
    )
    assert result.code == 2
    assert "Folding 'gain': expected some of batch-norms, biases, gains, means" in result.err
    assert not list(written.glob("b.*"))


@pytest.mark.slow
def test_a_model_folder(isthmus: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    transformers = pytest.importorskip("transformers")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    monkeypatch.chdir(tmp_path)
    config = transformers.GPT2Config(
        vocab_size=19, n_embd=8, n_layer=1, n_head=2, n_positions=8, bos_token_id=0, eos_token_id=0
    )
    model = transformers.GPT2LMHeadModel(config).eval()
    model.save_pretrained(tmp_path / "gpt2")
    result = isthmus("fold", "gpt2", "--out", "folded", "--untie")
    assert result.code == 0
    assert "untied: lm_head.weight has a tensor of its own" in result.out
    assert json.loads((tmp_path / "folded" / "config.json").read_text())["tie_word_embeddings"] is False
    again = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "folded").eval()
    ids = torch.arange(8)[None]
    assert torch.allclose(model(ids).logits, again(ids).logits, atol=1e-5)
    assert isthmus("fold", "gpt2", "--out", "folded").code == 2
