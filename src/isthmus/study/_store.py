"""The folder of a study: plan, records, checkpoints and timings, each file written whole or not at all.

::

    study.yaml           the study as it was last run
    plan.json            its units
    units/ADDRESS.json   one record per finished or failed unit: the same, byte for byte, however often it is
                         made on one machine with one number of threads
    timings/ADDRESS.json seconds, machine and time of day: what differs from run to run
    networks/…           checkpoints
    events.jsonl         what happened, a line per event
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from isthmus.errors import CheckpointError, OutputError
from isthmus.files import atomic_path
from isthmus.study._errors import StudyError
from isthmus.study._plan import NetworkRef, Plan

__all__ = ["Store"]


@dataclass(frozen=True)
class Store:
    """The folder of a study (see the module)."""

    folder: Path

    def create(self) -> None:
        """Make the folders.

        Raises:
            OutputError: they cannot be made.
        """
        try:
            for name in ("units", "timings", "networks"):
                (self.folder / name).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(
                f"Cannot write to the study's folder {self.folder}: {error.strerror or error}. "
                "Choose another with --out."
            ) from error

    def write_plan(self, plan: Plan, text: str) -> None:
        """Keep the plan and the study it came from."""
        write_json(self.folder / "plan.json", plan.to_dict())
        with atomic_path(self.folder / "study.yaml") as temporary:
            temporary.write_text(text, encoding="utf-8")

    @property
    def has_plan(self) -> bool:
        """Whether a study was begun here."""
        return (self.folder / "plan.json").is_file()

    def plan(self) -> Plan:
        """Return the plan of the last run.

        Raises:
            StudyError: there is none.
        """
        if not self.has_plan:
            raise StudyError(
                f"{self.folder}: holds no study (no plan.json). Run one: isthmus study run FILE --out "
                f"{self.folder}"
            )
        return Plan.from_dict(_read_json(self.folder / "plan.json"))

    def record(self, address: str) -> dict[str, Any] | None:
        """Return the record of a unit, or ``None``."""
        path = self.folder / "units" / f"{address}.json"
        return _read_json(path) if path.is_file() else None

    def write_record(self, record: Mapping[str, Any], timing: Mapping[str, Any]) -> None:
        """Keep the record of a unit; its timing goes first, so that a record means all is there."""
        address = record["address"]
        write_json(self.folder / "timings" / f"{address}.json", timing)
        write_json(self.folder / "units" / f"{address}.json", record)

    def timing(self, address: str) -> dict[str, Any] | None:
        """Return the timing of a unit, or ``None``."""
        path = self.folder / "timings" / f"{address}.json"
        return _read_json(path) if path.is_file() else None

    def network(self, ref: NetworkRef) -> Path:
        """Return where the checkpoint of a network is."""
        return self.folder / "networks" / ref.file

    def log(self, event: Mapping[str, Any]) -> None:
        """Add a line to the events."""
        with (self.folder / "events.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(event, sort_keys=True) + "\n")

    def last_event(self) -> dict[str, Any] | None:
        """Return the last event of a unit, or ``None``; a line that was cut short by a kill is passed over."""
        path = self.folder / "events.jsonl"
        if not path.is_file():
            return None
        for line in reversed(path.read_text(encoding="utf-8").splitlines()):
            try:
                event = json.loads(line)
            except ValueError:
                continue
            if "unit" in event:
                return event
        return None


def write_json(path: Path, value: Any) -> None:
    """Write canonical JSON (sorted keys), whole or not at all."""
    with atomic_path(path) as temporary:
        text = json.dumps(value, indent=1, sort_keys=True, allow_nan=False)
        temporary.write_text(text + "\n", encoding="utf-8")


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{path}: cannot be read: {error}. Delete it and run the study again."
        ) from error
