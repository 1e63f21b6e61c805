"""Checkpoints of trainers on the command line: what the network's names decide needs no option."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from isthmus import Alignment
from isthmus.checkpoints import load_state, save_state
from isthmus.testing import mlp

Cli = Callable[..., Any]


def network(seed: int) -> Any:
    torch.manual_seed(seed)
    return mlp(64, 12, 2, 10)


def prefixed(prefix: str, state: Any) -> OrderedDict[str, torch.Tensor]:
    return OrderedDict((prefix + k, v) for k, v in state.items())


@pytest.mark.parametrize(
    ("name", "wrap"),
    [
        ("b.pt", lambda s: prefixed("module._orig_mod.", s)),
        ("b.pth", lambda s: {"net": prefixed("model.", s), "epoch": 3, "acc": np.float64(0.5)}),
        (
            "last.ckpt",
            lambda s: {"state_dict": {**prefixed("net.", s), "loss.weight": torch.ones(2)}, "epoch": 1},
        ),
        ("b.bin", lambda s: s),
        ("b.pt", lambda s: {"model": s, "critic": {"w": torch.ones(3)}}),
        ("b.pt::ema", lambda s: {"model": network(5).state_dict(), "ema": s}),
    ],
)
def test_the_same_alignment_whatever_holds_the_network(
    isthmus: Cli, project: Path, name: str, wrap: Callable[[Any], Any]
) -> None:
    state = network(1).state_dict()
    save_state("plain.pt", state)
    torch.save(wrap(state), name.partition("::")[0] if name != "b.pt" else "wrapped.pt")
    given = name if name != "b.pt" else "wrapped.pt"
    for path, out in (("plain.pt", "plain.safetensors"), (given, "found.safetensors")):
        result = isthmus(
            "align",
            "a.safetensors",
            path,
            "--model",
            "mynet:with_inputs",
            "--method",
            "weights",
            "--out",
            out,
        )
        assert result.code == 0, result.err
    first, second = (Alignment.load(f) for f in ("plain.safetensors", "found.safetensors"))
    assert all(torch.equal(p, second.permutations[n]) for n, p in first.permutations.items())


def test_mixed_widths_run_in_the_widest(isthmus: Cli, project: Path) -> None:
    """The first tensor's would round the others."""
    for seed, name in enumerate(("x.pt", "y.pt")):
        state = network(seed).state_dict()
        first = next(iter(state))
        torch.save({k: v.to(torch.bfloat16) if k == first else v for k, v in state.items()}, name)
    command = ("merge", "x.pt", "y.pt", "--model", "mynet:with_inputs", "--align", "weights", "--out")
    assert isthmus(*command, "m.pt").code == 0
    for name in ("x.pt", "y.pt"):
        torch.save({k: v.float() for k, v in load_state(name).items()}, name)
    assert isthmus(*command, "n.pt").code == 0
    found, expected = load_state("m.pt"), load_state("n.pt")
    assert all(torch.equal(v.float(), expected[k]) for k, v in found.items() if v.dtype == torch.float32)


def test_folders_of_shards_with_a_prefix(isthmus: Cli, project: Path) -> None:
    Path("b").mkdir()
    save_state("b/model.safetensors", prefixed("module.", network(1).state_dict()))
    arguments = ("--model", "mynet:with_inputs", "--method", "weights", "--out")
    for path, out in (("b", "one.safetensors"), ("b.pt", "two.safetensors")):
        result = isthmus("align", "a.safetensors", path, *arguments, out)
        assert result.code == 0, result.err
    one, two = (Alignment.load(f).permutations for f in ("one.safetensors", "two.safetensors"))
    assert all(torch.equal(p, two[n]) for n, p in one.items())


def test_what_is_unclear_is_asked(isthmus: Cli, project: Path) -> None:
    torch.save({"model": network(0).state_dict(), "ema": network(1).state_dict()}, "both.pt")
    result = isthmus("merge", "a.safetensors", "both.pt", "--model", "mynet:build", "--out", "m.pt")
    assert result.code == 2
    assert "holds 2 states that fit the network: 'model' (6 tensors), 'ema' (6 tensors)" in " ".join(
        result.err.split()
    )
    assert "both.pt::model as the path" in " ".join(result.err.split())
    assert not Path("m.pt").exists()
    assert load_state("both.pt", key="ema").keys() == network(0).state_dict().keys()
