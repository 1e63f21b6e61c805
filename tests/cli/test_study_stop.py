"""Ctrl-C and SIGTERM in a study: what is kept is said, and the same command goes on to the same records."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from interrupts import heed_interrupts

from isthmus.cli import _study
from isthmus.cli._app import run
from isthmus.study import study_status

STUDY = """\
name: small
data: {name: digits, statistics: 100, train: 100}
network: {family: mlp, width: 8, depth: 1}
training: {learning_rate: 0.1, epochs: 1, batch_size: 200}
seeds: 6
stack: 1
measure: {methods: [none], points: 2, dimension: false}
"""


@pytest.fixture
def command(tmp_path: Path) -> list[str]:
    (tmp_path / "small.yaml").write_text(STUDY, encoding="utf-8")
    return ["study", "run", str(tmp_path / "small.yaml"), "--out", str(tmp_path / "out"), "--threads", "1"]


def written(out: Path) -> int:
    return len(list(out.glob("units/*.json")))


def stop(
    command: list[str], out: Path, how: signal.Signals, *options: str, units: int = 2
) -> tuple[int, str]:
    """Run a command in a group of its own, stop the group when some units are done; return exit code and messages."""
    process = subprocess.Popen(
        [sys.executable, "-m", "isthmus", *command, *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
        preexec_fn=heed_interrupts,
    )
    while process.poll() is None and written(out) < units:
        time.sleep(0.002)
    os.killpg(process.pid, how)
    _, errors = process.communicate(timeout=120)
    return process.returncode, errors.decode()


@pytest.mark.parametrize("how", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_what_is_kept_is_said(command: list[str], tmp_path: Path, how: signal.Signals) -> None:
    out = tmp_path / "out"
    code, message = stop(command, out, how)
    assert code == 130
    done = sum(c["done"] for c in study_status(out).counts.values())
    assert 2 <= done < 9
    assert (
        message
        == f"Interrupted: {done} of 9 units are done and kept in {out}; run the same command to go on.\n"
    )
    assert not list(out.rglob("*.tmp"))


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_local_processes_are_stopped_without_a_word_of_theirs(
    command: list[str], tmp_path: Path, how: signal.Signals
) -> None:
    out = tmp_path / "out"
    code, message = stop(command, out, how, "--executor", "processes", "--workers", "2")
    assert code == 130
    assert "Traceback" not in message
    assert message.startswith("Interrupted: ")
    assert message.count("\n") == 1
    assert run(command) == 0


def test_messages_before_anything_is_written_and_where_the_plan_is_lost(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("isthmus.study._runner._planned", interrupt)
    before = signal.getsignal(signal.SIGTERM)
    assert run(command) == 130
    assert capsys.readouterr().err == "Interrupted; nothing was written.\n"
    assert signal.getsignal(signal.SIGTERM) is before
    out = tmp_path / "out"
    out.mkdir(exist_ok=True)
    (out / "plan.json").write_text("{}")
    assert _study._kept(out) == (
        f"Interrupted; the units that were done are kept in {out}. Run the same command to go on."
    )


# --- The other commands ------------------------------------------------------------------------------------


def test_a_run_ends_with_the_barriers_and_makes_a_page(
    command: list[str], tmp_path: Path, isthmus: Callable[..., object]
) -> None:
    two = (
        STUDY.replace("seeds: 6", "seeds: 4")
        .replace("[none]", "[none, weights]")
        .replace("points: 2", "points: 3")
    )
    (tmp_path / "small.yaml").write_text(two, encoding="utf-8")
    out = tmp_path / "out"
    told = isthmus(*command)
    assert told.code == 0
    assert "Barrier (nats per example, test)" in told.out
    assert "mean ± standard deviation over pairs" in told.out
    row = next(line for line in told.out.splitlines() if " 0.1 " in line)
    assert row.count("±") == 2
    value = isthmus(*command, "--json").json
    (table,) = value["barriers"]
    (place,) = table["rows"]
    assert (table["swept"], place["place"], place["pairs"]) == ("learning_rate", 0.1, 2)
    assert set(place["barriers"]) == {"none", "weights"}
    found = place["barriers"]["none"]
    assert row.split("│")[4].split("±")[0].strip() == f"{found['mean']:.3f}"
    page = isthmus("study", "report", out, "--json").json["report"]
    text = Path(page).read_text(encoding="utf-8")
    assert page == str(out / "study.html")
    assert "small" in text
    assert 'src="data:image/png;base64,' in text
    # A record that is gone is said on the page; one that is damaged makes the exit code 1 and is named.
    measured = next(p for p in (out / "units").glob("*.json") if '"measure"' in p.read_text())
    content = measured.read_bytes()
    measured.unlink()
    assert isthmus("study", "report", out).code == 0
    assert "1 units of the study are not done" in Path(page).read_text(encoding="utf-8")
    measured.write_bytes(content[:-20])
    told = isthmus("study", "status", out)
    assert told.code == 1
    assert "damaged: measure mlp 8 × 1 on digits" in told.out
    assert "run again to make it anew" in " ".join(told.out.split())
    told = isthmus("study", "report", out)
    assert told.code == 2
    assert measured.name in told.err
    told = isthmus(*command)
    assert told.code == 0
    assert "note: made anew: measure" in told.out


def test_presets_are_shown(isthmus: Callable[..., object]) -> None:
    told = isthmus("study", "show", "width")
    assert told.code == 0
    assert "name: width\n" in told.out
    assert isthmus("study", "show", "width", "--json").json["yaml"].rstrip("\n") == told.out.rstrip("\n")
    told = isthmus("study", "show", "wdth")
    assert told.code == 2
    assert "No preset 'wdth'. Choose one of cifar10-resnet-cpu" in told.err


def test_a_dry_run_counts_and_writes_nothing(
    command: list[str], tmp_path: Path, isthmus: Callable[..., object]
) -> None:
    told = isthmus("study", "run", tmp_path / "small.yaml", "--dry-run", "--threads", "1")
    assert told.code == 0
    assert told.out.startswith("small: 9 units (6 train, 3 measure); about ")
    assert "This rests on operations counted from shapes" in told.out
    value = isthmus(*command, "--dry-run", "--json").json
    assert value["units"] == {"train": {"all": 6, "done": 0}, "measure": {"all": 3, "done": 0}}
    assert 0 < value["seconds"] < 600
    assert not (tmp_path / "out").exists()
    told = isthmus("study", "run", tmp_path / "small.yaml")
    assert told.code == 2
    assert "Give --out DIR, the folder of the study. Only --dry-run needs none." in told.err


def test_a_dry_run_needs_no_data(
    tmp_path: Path, isthmus: Callable[..., object], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("data were asked for")

    monkeypatch.setattr("isthmus.training._datasets._download", refuse)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for preset in ("paper-mnist", "cifar10-resnet-cpu"):
        told = isthmus("study", "run", preset, "--dry-run", "--threads", "1")
        assert told.code == 0, told.err
        assert told.out.startswith(f"{preset}: ")
    assert not (tmp_path / "cache").exists()
    missing = isthmus("study", "run", "paper-mnist", "--dry-run", "--data-dir", tmp_path)
    assert missing.code == 2
    assert "No files of mnist (train)" in missing.err


def test_a_device_that_is_not_there_and_another_study_are_refused_at_once(
    command: list[str], tmp_path: Path, isthmus: Callable[..., object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    told = isthmus(*command, "--device", "cuda")
    assert told.code == 2
    assert "finds no cuda device" in told.err
    assert "Use --device cpu" in told.err
    assert not (tmp_path / "out").exists()
    told = isthmus(*command, "--device", "gpu")
    assert told.code == 2
    assert "expected 'cpu' or 'cuda', found 'gpu'" in told.err
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "plan.json").write_text('{"study": "large", "units": [], "precision": "float32"}')
    told = isthmus(*command, "--log", "tensorboard")
    assert told.code == 2
    assert "holds the study 'large', not 'small'" in told.err
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["plan.json"]
