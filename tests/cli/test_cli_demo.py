"""The demo: its files, the same at each run, and nothing left when it is interrupted or a disk fills up."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from interrupts import heed_interrupts

from isthmus.matching import METHODS

Cli = Callable[..., Any]
SMALL = ("--width", "24", "--depth", "1", "--epochs", "4")


def test_ctrl_c_during_training_writes_nothing(
    isthmus: Cli, project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import isthmus.study._demo as module

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "train", interrupted)
    result = isthmus("demo", "--out", "demo")
    assert result.code == 130
    assert "Interrupted" in result.err
    assert not (project / "demo").exists()


@pytest.mark.skipif(os.name == "nt", reason="signals")
def test_a_real_interrupt_during_training_leaves_nothing(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "isthmus",
        "demo",
        "--width",
        "64",
        "--epochs",
        "100000",
        "--out",
        "new/demo",
    ]
    with subprocess.Popen(
        command,
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=heed_interrupts,
    ) as run:
        try:
            started = time.monotonic()
            while not (tmp_path / "new" / "demo").exists() and run.poll() is None:
                assert time.monotonic() - started < 300
                time.sleep(0.05)
            time.sleep(1)
            run.send_signal(signal.SIGINT)
            out, err = run.communicate(timeout=300)
        finally:
            run.kill()
    assert run.returncode == 130, err
    assert err == "Interrupted; nothing was written.\n"
    assert out == ""
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fills_up_at_the_end_of_the_demo_leaves_nothing(
    isthmus: Cli, project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import isthmus.cli._demo as module

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(module.np, "savez_compressed", full)
    before = sorted(p.name for p in project.iterdir())
    result = isthmus("demo", "--width", "8", "--depth", "1", "--epochs", "1", "--out", "demo")
    assert result.code == 2
    assert "output folder demo: No space left on device" in result.err
    assert sorted(p.name for p in project.iterdir()) == before


def test_a_width_that_is_no_number_of_units(isthmus: Cli, project: Path) -> None:
    result = isthmus("demo", "--width", "1.5", "--out", "demo")
    assert result.code == 2
    assert "expected a whole number, found 1.5" in result.err
    assert not (project / "demo").exists()


@pytest.mark.parametrize(("options", "expected"), [((), 1), (("--threads", "3"), 3)])
def test_digits_are_too_small_for_several_threads(
    isthmus: Cli, project: Path, monkeypatch: pytest.MonkeyPatch, options: tuple[str, ...], expected: int
) -> None:
    import isthmus.cli._demo as module

    seen = []

    def run(*_: object, **__: object) -> None:
        seen.append(torch.get_num_threads())
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "run_demo", run)
    before = torch.get_num_threads()
    assert isthmus("demo", *options, "--out", "demo").code == 130
    assert seen == [expected]
    assert torch.get_num_threads() == before


@pytest.fixture(scope="module")
def demo_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo")
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "isthmus",
            "demo",
            *SMALL,
            "--out",
            str(folder),
        ],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "COLUMNS": "140"},
    )
    assert done.returncode == 0, done.stderr
    (folder / "stdout.txt").write_text(done.stdout)
    return folder


def test_the_demo_writes_all_its_files(demo_folder: Path) -> None:
    names = {p.name for p in demo_folder.iterdir()}
    assert {
        "report.html",
        "result.json",
        "relabelling.npz",
        "a.safetensors",
        "b.safetensors",
        "loss.png",
    } <= names
    table = (demo_folder / "stdout.txt").read_text()
    for method in ("none", *METHODS.usual):
        assert method in table


def test_the_demo_record_holds_what_is_promised(demo_folder: Path) -> None:
    record = json.loads((demo_folder / "result.json").read_text())
    assert list(record["methods"]) == ["none", *METHODS.usual]
    for name, method in record["methods"].items():
        assert {
            "barrier",
            "midpoint_loss",
            "midpoint_accuracy",
            "verification_error",
            "seconds",
        } <= method.keys()
        if name != "none":
            assert method["verification_error"] <= 1e-10
            assert method["dimension"]
    assert record["settings"]["width"] == 24
    assert 0 < record["endpoints"]["a"]["test"]["loss"] < 2.3


def test_the_demo_checkpoints_give_the_recorded_line(demo_folder: Path, isthmus: Cli) -> None:
    record = json.loads((demo_folder / "result.json").read_text())
    result = isthmus(
        "line",
        demo_folder / "a.safetensors",
        demo_folder / "b.safetensors",
        "--model",
        "isthmus.testing:mlp(64, 24, 1, 10)",
        "--data",
        "digits",
        "--out",
        demo_folder / "line",
        "--json",
    )
    assert result.code == 0, result.err
    test = result.json["curves"]["test"]
    assert test["barrier"] == pytest.approx(record["methods"]["none"]["barrier"], rel=1e-6)


def test_the_demo_repeats_itself(demo_folder: Path, tmp_path: Path, isthmus: Cli) -> None:
    result = isthmus("demo", *SMALL, "--out", tmp_path, "--json")
    assert result.code == 0, result.err
    old, new = json.loads((demo_folder / "result.json").read_text()), result.json
    for method in old["methods"]:
        assert new["methods"][method]["barrier"] == pytest.approx(old["methods"][method]["barrier"], rel=1e-4)
