"""Where a running study is told besides its own ``events.jsonl``: TensorBoard, and Weights & Biases.

A sink sees every unit as it ends, with its record. What it shows is a copy: nothing is read back from it, and one
that fails is dropped while the study goes on.
"""

from __future__ import annotations

import hashlib
import importlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from isthmus.errors import MissingExtraError
from isthmus.matching import method_under
from isthmus.study._config import PERMUTATIONS
from isthmus.study._plan import Unit

__all__ = ["AbstractSink", "Scalar", "TensorBoard", "WeightsAndBiases", "scalars_of"]

_MEASURED = ("barrier", "midpoint_loss", "midpoint_accuracy")


@dataclass(frozen=True)
class Scalar:
    """One number of a series.

    Attributes:
        series: name, parts divided by ``/``: the kind of unit, which one, and what.
        step: place in the series: the epoch, or 0 where there is one number only.
        value: the number.
    """

    series: str
    step: int
    value: float


class AbstractSink(ABC):
    """Is told about every unit that ends; use it as a context, so that it is closed."""

    @abstractmethod
    def write(self, count: int, event: Mapping[str, Any], scalars: list[Scalar]) -> None:
        """Take what a unit gave.

        Args:
            count: units that have ended in this run, this one included.
            event: the line of ``events.jsonl``: unit, status, seconds, share done, seconds left.
            scalars: numbers of its record; none if it failed.
        """

    @abstractmethod
    def close(self) -> None:
        """Write out what is buffered."""

    def __enter__(self) -> AbstractSink:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class TensorBoard(AbstractSink):
    """Event files for ``tensorboard --logdir FOLDER``.

    Args:
        folder: where to, such as ``OUT/tensorboard``.

    Raises:
        MissingExtraError: the ``tensorboard`` package is not installed.
    """

    def __init__(self, folder: str | Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise MissingExtraError(
                'Writing for TensorBoard needs its package: pip install "isthmus[tensorboard]".'
            ) from error
        self._writer = SummaryWriter(str(folder))

    def write(self, count: int, event: Mapping[str, Any], scalars: list[Scalar]) -> None:
        """Add the numbers, and how far the run is."""
        for scalar in scalars:
            self._writer.add_scalar(scalar.series, scalar.value, scalar.step)
        for name, value in _progress(event).items():
            self._writer.add_scalar(f"progress/{name}", value, count)
        if event["status"] == "failed":
            self._writer.add_text("failed", f"{event['unit']}: {event['message']}", count)
        self._writer.flush()

    def close(self) -> None:
        """Close the event file."""
        self._writer.close()


class WeightsAndBiases(AbstractSink):
    """A run of Weights & Biases, continued when the study is; its own variables (``WANDB_MODE``, …) hold.

    Args:
        study: name of the study, which names the project too.
        folder: of the study; the run's files go there, and the same folder continues the same run.
        text: the study's YAML, kept as the run's configuration.
        options: further arguments of ``wandb.init``, such as ``entity`` or ``mode="offline"``.

    Raises:
        MissingExtraError: the ``wandb`` package is not installed.
    """

    def __init__(self, study: str, folder: str | Path, text: str = "", **options: Any) -> None:
        try:
            wandb = importlib.import_module("wandb")
        except ImportError as error:
            raise MissingExtraError(
                'Writing for Weights & Biases needs its package: pip install "isthmus[wandb]".'
            ) from error
        place = Path(folder).resolve()
        settings: dict[str, Any] = {
            "project": f"isthmus-{study}",
            "name": study,
            "id": hashlib.sha256(f"{study} {place}".encode()).hexdigest()[:16],
            "resume": "allow",
            "dir": str(place),
            "config": {"study": text},
        }
        self._run = wandb.init(**{**settings, **options})
        self._known: set[str] = set()

    def write(self, count: int, event: Mapping[str, Any], scalars: list[Scalar]) -> None:
        """Log the numbers against their epoch, and how far the run is against the units that have ended."""
        for scalar in scalars:
            if scalar.series not in self._known:
                self._known.add(scalar.series)
                self._run.define_metric(scalar.series, step_metric="epoch")
            self._run.log({scalar.series: scalar.value, "epoch": scalar.step})
        progress = {f"progress/{name}": value for name, value in _progress(event).items()}
        self._run.log({**progress, "progress/units": count, "progress/status": event["status"]})

    def close(self) -> None:
        """End the run."""
        self._run.finish()


def scalars_of(unit: Unit, record: Mapping[str, Any] | None) -> list[Scalar]:
    """Return the numbers of a unit's record: losses by epoch, barriers by method, dimensions by layer."""
    if record is None or record["status"] != "done":
        return []
    numbers = {"train": _of_training, "measure": _of_pair, "dimension": _of_network}[unit.kind]
    found = numbers(unit, record["result"])
    return [Scalar(f"{unit.kind}/{name}", step, value) for name, step, value in found if value is not None]


def _of_training(unit: Unit, result: Mapping[str, Any]) -> Iterator[tuple[str, int, float | None]]:
    about = unit.label.removeprefix("train ").partition(", learning rate")[0]
    for network in result["networks"]:
        name = f"{about}, learning rate {network['learning_rate']:g}, seed {network['seed']}"
        for epoch in network["history"]:
            for what in ("loss", "accuracy"):
                yield f"{name}/{what}", epoch["epoch"], epoch[what]


def _of_pair(unit: Unit, result: Mapping[str, Any]) -> Iterator[tuple[str, int, float | None]]:
    about = unit.label.removeprefix("measure ")
    for row in result["rows"]:
        method = (
            method_under(row["method"], row.get("symmetry", PERMUTATIONS))
            if row["method"] != "none"
            else "none"
        )
        method += "" if row["refresh"] == "none" else f" + {row['refresh']}"
        for what in _MEASURED:
            yield f"{about}/{row['split']} {what}/{method}", 0, row[what]


def _of_network(unit: Unit, result: Mapping[str, Any]) -> Iterator[tuple[str, int, float | None]]:
    about = unit.label.removeprefix("dimension of ")
    for method, layers in result["methods"].items():
        for layer, values in layers.items():
            for which in ("uncentred", "centred"):
                yield f"{about}/{which} {method}/{layer}", 0, values.get(which)


def _progress(event: Mapping[str, Any]) -> dict[str, float]:
    names = ("share_done", "seconds_left", "seconds")
    return {name: event[name] for name in names if event.get(name) is not None}
