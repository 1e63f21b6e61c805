"""``isthmus study``: run, status, export, figures, presets, and their exit codes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from isthmus.cli._app import run

STUDY = """\
name: small
data: {name: digits, statistics: 100, train: 100}
network: {family: mlp, width: 8, depth: 1}
training: {learning_rate: 0.1, epochs: 1, batch_size: 200}
seeds: 2
measure: {methods: [none, weights], points: 3}
"""


def test_a_study_from_start_to_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, out = tmp_path / "small.yaml", tmp_path / "out"
    file.write_text(STUDY, encoding="utf-8")
    assert run(["study", "run", str(file), "--out", str(out), "--json"]) == 0
    status = json.loads(capsys.readouterr().out)
    assert status["finished"]
    assert status["counts"]["dimension"] == {"all": 2, "done": 2, "failed": 0}
    assert run(["study", "status", str(out)]) == 0
    assert "1 of 1 measure units done" in capsys.readouterr().out
    results = tmp_path / "results"
    assert run(["study", "export", str(out), "--out", str(results)]) == 0
    assert run(["study", "figures", str(results)]) == 0
    assert (results / "figures" / "barrier.svg").is_file()
    capsys.readouterr()
    record = next((out / "units").glob("*.json"))
    broken = json.loads(record.read_text())
    record.write_text(json.dumps({**broken, "status": "failed", "traceback": "x\nValueError: no luck\n"}))
    assert run(["study", "status", str(out)]) == 1
    assert "ValueError: no luck" in capsys.readouterr().out


def test_faults_are_told_in_one_message(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "small.yaml"
    file.write_text(STUDY.replace("epochs", "epoch"), encoding="utf-8")
    assert run(["study", "run", str(file), "--out", str(tmp_path / "out")]) == 2
    assert "line 4: training.epoch: unknown field" in capsys.readouterr().err
    assert run(["study", "status", str(tmp_path)]) == 2
    assert "holds no study" in capsys.readouterr().err


def test_presets_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["study", "presets", "--json"]) == 0
    names = set(json.loads(capsys.readouterr().out))
    assert {"paper-mnist", "paper-mnist-adam", "width", "depth", "epochs", "init"} <= names
    assert {f"cifar10-{n}-{k}" for n in ("vgg", "resnet") for k in ("cpu", "gpu")} <= names
