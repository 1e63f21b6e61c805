"""Sinks: what TensorBoard and Weights & Biases are told about a running study."""

from __future__ import annotations

import json
import sys
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from engine_studies import TINY, tiny

from isthmus.errors import MissingExtraError
from isthmus.study import AbstractSink, InProcess, Scalar, TensorBoard, WeightsAndBiases, run_study
from isthmus.study._sinks import scalars_of
from isthmus.study._store import Store

SMALL = TINY.replace("[0.01, 0.1]", "0.1").replace("seeds: 4", "seeds: 2").replace("dimension: false", "")
LOSS = "train/mlp 12 × 2 on digits, 2 epochs, learning rate 0.1, seed 1/loss"
BARRIER = "measure/mlp 12 × 2 on digits, 2 epochs, learning rate 0.1, seeds 0 and 1/test barrier/weights"


class Remembers(AbstractSink):
    def __init__(self) -> None:
        self.calls: list[tuple[int, Mapping[str, Any], list[Scalar]]] = []
        self.closed = False

    def write(self, count: int, event: Mapping[str, Any], scalars: list[Scalar]) -> None:
        self.calls.append((count, event, scalars))

    def close(self) -> None:
        self.closed = True


class Breaks(Remembers):
    def write(self, count: int, event: Mapping[str, Any], scalars: list[Scalar]) -> None:
        super().write(count, event, scalars)
        raise ConnectionError("no route to host")


def run_small(folder: Path, *sinks: AbstractSink) -> None:
    with InProcess(1) as executor:
        assert run_study(tiny(SMALL), folder, executor=executor, sinks=sinks).finished


def test_a_sink_is_told_every_number_once(tmp_path: Path) -> None:
    with Remembers() as sink:
        run_small(tmp_path, sink)
    assert sink.closed
    assert [c[0] for c in sink.calls] == [1, 2, 3, 4]
    assert [c[1]["unit"].split()[0] for c in sink.calls] == ["train", "measure", "dimension", "dimension"]
    assert sink.calls[-1][1]["share_done"] == pytest.approx(1.0)
    (train, *_), store = (c[2] for c in sink.calls), Store(tmp_path)
    record = store.record(sink.calls[0][1]["address"])
    assert record is not None
    history = record["result"]["networks"][1]["history"]
    assert [(s.step, s.value) for s in train if s.series == LOSS] == [
        (h["epoch"], h["loss"]) for h in history
    ]
    listed = [s.series for c in sink.calls for s in c[2] if s.step == 0]
    assert len(listed) == len(set(listed))
    # two methods and two splits, three numbers each; and a value per layer, method and kind of dimension
    assert sum(name.startswith("measure/") for name in listed) == 2 * 2 * 3
    assert sum(name.startswith("dimension/") for name in listed) > 0
    assert BARRIER in listed
    # What is recorded already is not told again.
    again = Remembers()
    run_small(tmp_path, again)
    assert again.calls == []


def test_a_sink_that_fails_is_dropped_and_the_study_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    broken, whole = Breaks(), Remembers()
    run_small(tmp_path, broken, whole)
    assert (len(broken.calls), len(whole.calls)) == (1, 4)
    text = "Breaks was dropped: ConnectionError: no route to host"
    assert text in caplog.text
    events = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert [e["message"] for e in events if e["status"] == "sink dropped"] == [text]


def test_failed_units_have_no_numbers(tmp_path: Path) -> None:
    with Remembers() as sink, InProcess(1) as executor:
        study = tiny(SMALL.replace("0.1,", "1.0e+25,"))
        run_study(study, tmp_path, executor=executor, sinks=[sink])
    failed = [c for c in sink.calls if c[1]["status"] == "failed"]
    assert failed
    assert all(scalars == [] for _, _, scalars in failed)
    assert scalars_of(None, None) == []  # type: ignore[arg-type]


def test_tensorboard_can_read_what_was_written(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with TensorBoard(tmp_path / "tensorboard") as sink:
        run_small(tmp_path, sink)
    (path,) = (tmp_path / "tensorboard").glob("events.out.tfevents.*")
    read = EventAccumulator(str(path)).Reload()
    assert [e.step for e in read.Scalars("progress/share_done")] == [1, 2, 3, 4]
    assert read.Scalars("progress/share_done")[-1].value == pytest.approx(1.0)
    assert [e.step for e in read.Scalars(LOSS)] == [1, 2]
    assert [e.step for e in read.Scalars(BARRIER)] == [0]


class FakeRun:
    """The three methods of a run that are used, as documented by wandb."""

    def __init__(self) -> None:
        self.logged: list[dict[str, Any]] = []
        self.axes: dict[str, str] = {}
        self.finished = False

    def define_metric(self, name: str, *, step_metric: str) -> None:
        self.axes[name] = step_metric

    def log(self, data: dict[str, Any]) -> None:
        self.logged.append(data)

    def finish(self) -> None:
        self.finished = True


def test_weights_and_biases_gets_series_by_epoch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[dict[str, Any]] = []
    fake: Any = types.ModuleType("wandb")
    fake_run = FakeRun()
    fake.init = lambda **options: started.append(options) or fake_run
    monkeypatch.setitem(sys.modules, "wandb", fake)
    with WeightsAndBiases("tiny", tmp_path, SMALL, mode="offline") as sink:
        run_small(tmp_path, sink)
    assert fake_run.finished
    (options,) = started
    assert (options["project"], options["mode"], options["resume"]) == ("isthmus-tiny", "offline", "allow")
    assert options["config"] == {"study": SMALL}
    assert fake_run.axes[LOSS] == "epoch"
    assert [d["epoch"] for d in fake_run.logged if LOSS in d] == [1, 2]
    assert [d["progress/units"] for d in fake_run.logged if "progress/units" in d] == [1, 2, 3, 4]
    WeightsAndBiases("tiny", tmp_path)
    WeightsAndBiases("tiny", tmp_path / "elsewhere")
    ids = [o["id"] for o in started]
    assert ids[0] == ids[1] != ids[2]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_weights_and_biases_offline(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    with WeightsAndBiases("tiny", tmp_path, SMALL, mode="offline") as sink:
        run_small(tmp_path, sink)
    (path,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    content = path.read_bytes()
    assert LOSS.encode() in content
    assert BARRIER.encode() in content


def test_without_their_packages_the_extras_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(MissingExtraError, match=r'pip install "isthmus\[tensorboard\]"'):
        TensorBoard(tmp_path)
    with pytest.raises(MissingExtraError, match=r'pip install "isthmus\[wandb\]"'):
        WeightsAndBiases("tiny", tmp_path)
