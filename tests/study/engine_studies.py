"""A study small enough for tests, and a way to run it in a process of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from isthmus.study import StudyConfig
from isthmus.study._config import parse_study

TINY = """\
name: tiny
data: {name: digits, statistics: 200, train: 200}
network: {family: mlp, width: 12, depth: 2}
training: {learning_rate: [0.01, 0.1], epochs: 2, batch_size: 100, warmup_steps: 2}
seeds: 4
stack: 3
measure: {methods: [none, weights], points: 3, dimension: false}
"""


def tiny(text: str = TINY) -> StudyConfig:
    return parse_study(text, "tiny.yaml")


def records(folder: Path) -> dict[str, bytes]:
    """Return the bytes of every record and checkpoint."""
    paths = [*(folder / "units").glob("*.json"), *(folder / "networks").glob("*.safetensors")]
    return {p.name: p.read_bytes() for p in paths}


def start(study: Path, out: Path, *arguments: str) -> subprocess.Popen[bytes]:
    """Start ``isthmus study run`` in a process of its own."""
    command = [
        sys.executable,
        "-m",
        "isthmus",
        "study",
        "run",
        str(study),
        "--out",
        str(out),
        "--threads",
        "1",
    ]
    return subprocess.Popen([*command, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
