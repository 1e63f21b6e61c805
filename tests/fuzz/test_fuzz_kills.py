"""Studies stopped at random moments, by force or politely, go on to the records of an undisturbed run, byte for byte.

Tried so far: see ``docs/studies.md``.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from isthmus.study import InProcess, run_study, study_status
from isthmus.study._config import parse_study

STUDY = """\
name: fuzzed
data: {name: digits, statistics: 100, train: 100, test: 100}
network: {family: mlp, width: 6, depth: 1}
training: {learning_rate: 0.1, epochs: 2, batch_size: 200}
seeds: 4
stack: 1
measure: {methods: [none], points: 2, dimension: false}
"""
FOLDERS = ("networks", "timings", "units")
FILES = 4 + 6 + 6
"""Networks, timings and records of a finished run."""

WAYS = (signal.SIGKILL, signal.SIGINT, signal.SIGTERM)


def start(file: Path, out: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "isthmus", "study", "run", str(file), "--out", str(out), "--threads", "1"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )


def written(out: Path) -> int:
    """Count files, temporary ones too: a moment is when so many are there, on a machine of any speed."""
    return sum(len(list((out / f).iterdir())) for f in FOLDERS if (out / f).is_dir())


def contents(out: Path) -> dict[str, bytes]:
    """Return every network and record; without the commit and the digest over it, which may change meanwhile."""
    found = {p.name: p.read_bytes() for p in (out / "networks").glob("*.safetensors")}
    for path in (out / "units").glob("*.json"):
        record = json.loads(path.read_bytes())
        del record["source"], record["digest"]
        found[path.name] = json.dumps(record).encode()
    return found


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("undisturbed")
    with InProcess(1) as executor:
        assert run_study(parse_study(STUDY), out, executor=executor).finished
    return contents(out)


def stop(file: Path, out: Path, how: signal.Signals, after: int, pause: float) -> None:
    """Start a study, stop it when so many files more are there, and check what it says and leaves."""
    kept = {p.name: p.read_bytes() for p in out.glob("units/*.json")}
    target = written(out) + after
    process = start(file, out)
    while process.poll() is None and written(out) < target:
        time.sleep(0.001)
    time.sleep(pause)
    if process.poll() is None:
        os.killpg(process.pid, how)
    _, errors = process.communicate(timeout=300)
    message = errors.decode()
    assert "Traceback" not in message
    if how is signal.SIGKILL:
        assert process.returncode in (0, -signal.SIGKILL)
    else:
        assert process.returncode in (0, 130)
        assert process.returncode == 0 or "run the same command to go on" in message
        assert not [p for p in out.rglob("*.tmp") if str(process.pid) in p.name]
    assert {p.name: p.read_bytes() for p in out.glob("units/*.json")}.items() >= kept.items()
    assert study_status(out).damaged == {}


def fuzz(tmp_path: Path, undisturbed: dict[str, bytes], seed: int, ways: tuple[signal.Signals, ...]) -> None:
    draw = random.Random(seed)
    file, out = tmp_path / f"{seed}.yaml", tmp_path / str(seed)
    file.write_text(STUDY, encoding="utf-8")
    for how in ways:
        stop(file, out, how, draw.randrange(1, FILES // 2), draw.uniform(0, 0.03))
    with InProcess(1) as executor:
        status = run_study(parse_study(STUDY), out, executor=executor)
    assert status.finished
    assert status.notes == (), "what a kill leaves needs no mending"
    assert contents(out) == undisturbed


def test_one_kill(tmp_path: Path, undisturbed: dict[str, bytes]) -> None:
    fuzz(tmp_path, undisturbed, 0, (signal.SIGKILL,))


@pytest.mark.slow
def test_two_stops(tmp_path: Path, undisturbed: dict[str, bytes]) -> None:
    fuzz(tmp_path, undisturbed, 0, (signal.SIGKILL, signal.SIGTERM))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 9))
def test_many_stops(seed: int, tmp_path: Path, undisturbed: dict[str, bytes]) -> None:
    ways = random.Random(seed).choices(WAYS, k=4)
    fuzz(tmp_path, undisturbed, seed, tuple(ways))
