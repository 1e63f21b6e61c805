"""``isthmus study``: run, status, export, figures, presets, and their exit codes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from isthmus.cli._app import run
from isthmus.cli._study import _words
from isthmus.study import AbstractSink, Outcome, Progress, Unit

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
    assert (results / "figures" / "methods.svg").is_file()
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


def test_a_run_is_shown_where_asked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[tuple[str, tuple[object, ...]]] = []

    class Fake(AbstractSink):
        def __init__(self, name: str, *arguments: object) -> None:
            opened.append((name, arguments))
            self.name, self.count = name, 0

        def write(self, count: int, event: object, scalars: object) -> None:
            self.count = count

        def close(self) -> None:
            opened.append((f"{self.name} closed", (self.count,)))

    monkeypatch.setattr("isthmus.study._sinks.TensorBoard", lambda *a: Fake("tensorboard", *a))
    monkeypatch.setattr("isthmus.study._sinks.WeightsAndBiases", lambda *a: Fake("wandb", *a))
    file, out = tmp_path / "small.yaml", tmp_path / "out"
    file.write_text(STUDY.replace("points: 3", "points: 3, dimension: false"), encoding="utf-8")
    command = ["study", "run", str(file), "--out", str(out)]
    assert run([*command, "--log", "tensorboard", "--log", "wandb"]) == 0
    assert opened == [
        ("tensorboard", (out / "tensorboard",)),
        ("wandb", ("small", out, file.read_text())),
        ("wandb closed", (2,)),
        ("tensorboard closed", (2,)),
    ]
    assert run([*command, "--log", "paper"]) == 2
    assert "tensorboard" in capsys.readouterr().err


def test_memory_needs_an_executor_that_can_limit_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "small.yaml"
    file.write_text(STUDY, encoding="utf-8")
    assert run(["study", "run", str(file), "--out", str(tmp_path / "out"), "--memory", "2"]) == 2
    assert "--memory needs --executor processes or ray" in " ".join(capsys.readouterr().err.split())


def test_status_tells_the_time_left(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, out = tmp_path / "small.yaml", tmp_path / "out"
    file.write_text(STUDY, encoding="utf-8")
    assert run(["study", "run", str(file), "--out", str(out)]) == 0
    assert " left " not in capsys.readouterr().out
    next((out / "units").glob("*.json")).unlink()
    with (out / "events.jsonl").open("a", encoding="utf-8") as events:
        events.write('{"unit": "x", "seconds_left": 5400}\n{"status": "sink dropped"}\n{"unit": "cut sho')
    assert run(["study", "status", str(out)]) == 0
    assert "1 h 30 min left when the last unit ended" in " ".join(capsys.readouterr().out.split())


def test_what_just_ended_is_told_with_the_time_left() -> None:
    unit = Unit("train", "0", {}, (), 1.0, "train mlp")
    outcome = Outcome("0", "done", 3.0)
    assert _words(Progress(None, None, 0.0, 4.0, 0.0, None)) == "running"
    for left, text in ((40.0, "40 s"), (90.0, "2 min"), (7500.0, "2 h 5 min")):
        assert _words(Progress(unit, outcome, 1.0, 4.0, 3.0, left)) == f"done: train mlp; {text} left"
