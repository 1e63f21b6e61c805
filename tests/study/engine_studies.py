"""A study small enough for tests, and a way to run it in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from isthmus.study import Job, Outcome, StudyConfig
from isthmus.study._config import parse_study
from isthmus.study._executors import run_job

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
    """Return the bytes of every record and checkpoint.

    Without the commit, which may change while tests run, and the digest, which covers it.
    """
    found = {p.name: p.read_bytes() for p in (folder / "networks").glob("*.safetensors")}
    for path in (folder / "units").glob("*.json"):
        record = json.loads(path.read_bytes())
        assert set(record.pop("source") or ()) <= {"commit", "dirty"}
        assert len(record.pop("digest")) == 64
        found[path.name] = json.dumps(record).encode()
    return found


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


def greedy(job: Job) -> Outcome:
    """Do a unit's work, but take 2 GiB first if it trains the network of seed 3 at the higher rate."""
    if _is_chosen(job):
        with mock.patch("isthmus.study._executors.run_content", _take_two_gibibytes):
            return run_job(job)
    return run_job(job)


def deadly(job: Job) -> Outcome:
    """Do a unit's work, but kill the worker if it trains the network of seed 3 at the higher rate."""
    if _is_chosen(job):
        os._exit(1)
    return run_job(job)


def deadly_once(job: Job) -> Outcome:
    """Do a unit's work, but kill the worker at the first try of one unit, in the middle of its work."""
    mark = Path(job.folder) / "died"

    def die(*_: Any) -> None:
        mark.touch()
        os._exit(1)

    if _is_chosen(job) and not mark.exists():
        with mock.patch("isthmus.study._measure.save_state", die):
            return run_job(job)
    return run_job(job)


def _is_chosen(job: Job) -> bool:
    networks = job.unit.content.get("networks", [])
    return {"learning_rate": 0.1, "seed": 3} in networks


def _take_two_gibibytes(*_: Any) -> dict[str, Any]:
    return {"sum": float(torch.ones(2**29).sum())}
