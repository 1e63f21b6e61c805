from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from isthmus.checkpoints import save_state
from isthmus.cli._app import run
from isthmus.testing import mlp

NETWORK = """
import torch
from isthmus.testing import mlp

def build(width=12):
    torch.manual_seed(0)
    return mlp(64, width, 2, 10)

def with_inputs():
    return build(), torch.zeros(2, 64)

def broken():
    raise RuntimeError("no such weights")

def no_module():
    return 3

class Noisy(torch.nn.Module):
    def forward(self, x):
        return x + torch.rand_like(x)

def noisy():
    return Noisy(), torch.zeros(2, 4)

def batches():
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(40, 64, generator=generator)
    return [(inputs[:20], torch.arange(20) % 10), (inputs[20:], torch.arange(20) % 10)]

def no_batches():
    return []

def too_wide():
    return [(torch.zeros(3, 65), torch.tensor([0, 5, 1]))]

def wild_labels():
    return [(torch.zeros(3, 64), torch.tensor([0, 5, 10]))]
"""


class Outcome(NamedTuple):
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


@pytest.fixture
def isthmus(capsys: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    def call(*arguments: str | Path) -> Outcome:
        capsys.readouterr()
        code = run([str(a) for a in arguments])
        captured = capsys.readouterr()
        return Outcome(code, captured.out, captured.err)

    return call


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a user's module ``mynet`` and two checkpoints of its network."""
    (tmp_path / "mynet.py").write_text(NETWORK, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.setattr(
        sys, "dont_write_bytecode", True
    )  # or tests that nothing is written would find __pycache__
    sys.modules.pop("mynet", None)
    for seed, name in enumerate(("a.safetensors", "b.pt")):
        torch.manual_seed(seed)
        save_state(tmp_path / name, mlp(64, 12, 2, 10).state_dict())
    return tmp_path
