"""``isthmus explain``: the numbers of the library, as tables, JSON and a file."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Cli = Callable[..., Any]
COMMAND = ("explain", "a.safetensors", "b.pt", "--model", "mynet:build", "--data", "mynet:batches")


def test_explain(isthmus: Cli, project: Path) -> None:
    found = isthmus(*COMMAND, "--method", "weights", "--out", "e.json", "--json")
    assert found.code == 0, found.err
    told = found.json
    assert told == json.loads((project / "e.json").read_text())
    assert told["rise"] == pytest.approx(told["split"]["rise"], abs=1e-6)
    assert [layer["name"] for layer in told["layers"]] == ["layers.0", "layers.1", "layers.2"]
    assert sum(stage["added"] for stage in told["stages"]) == pytest.approx(told["rise"], abs=1e-6)
    assert told["settings"]["alignment"] == "weights"
    line = isthmus("line", *COMMAND[1:], "--method", "weights", "--points", "3", "--out", "line", "--json")
    curve = line.json["curves"]["data"]
    chord = sum(curve["endpoint_losses"]) / 2
    assert told["rise"] == pytest.approx(curve["midpoint_loss"] - chord, abs=1e-6)
    printed = isthmus(*COMMAND, "--at", "0.25", "--repair", "rescale")
    assert printed.code == 0, printed.err
    assert printed.out.startswith("Loss at t = 0.25: ")
    for head in ("correlation", "variance left", "layers up to"):
        assert head in printed.out


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (("--at", "1"), "expected t between 0 and 1, found 1.0"),
        (("--part", "test"), "--part test: the data have the parts data"),
        (("--repair", "glue"), "Unknown repair 'glue'"),
        (("--out", "a.safetensors"), "Cannot write a.safetensors: it is the input"),
        (("--method", "weights", "--alignment", "x.safetensors"), "not both"),
    ],
)
def test_bad_use(isthmus: Cli, project: Path, options: tuple[str, ...], text: str) -> None:
    found = isthmus(*COMMAND, *options)
    assert found.code == 2
    assert text in found.err
