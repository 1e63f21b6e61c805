"""The folder of a study: plan, records, checkpoints and timings, each file written whole or not at all.

::

    study.yaml           the study as it was last run
    plan.json            its units
    units/ADDRESS.json   one record per finished or failed unit: the same, byte for byte, however often it is
                         made on one machine with one number of threads; it carries the digest of itself, and those
                         of the networks that it made or read
    timings/ADDRESS.json seconds, machine and time of day: what differs from run to run
    networks/…           checkpoints
    events.jsonl         what happened, a line per event
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from isthmus.errors import CheckpointError, OutputError, StudyError
from isthmus.files import atomic_path
from isthmus.study._plan import NetworkRef, StudyPlan, Unit, address_of
from isthmus.study._records import DIGEST, UnitRecord, examine, seal, sealed

__all__ = ["TIMES", "Store", "read_json", "write_json"]

_MOST_RECORD, _MOST_PLAN = 1 << 26, 1 << 30
"""Bytes of a record and of a plan; nothing that we write comes near."""

TIMES = ("started", "seconds", "cpu_seconds")


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

    def write_plan(self, plan: StudyPlan, text: str) -> None:
        """Keep the plan and the study it came from."""
        write_json(self.folder / "plan.json", seal(plan.to_dict()))
        with atomic_path(self.folder / "study.yaml") as temporary:
            temporary.write_text(text, encoding="utf-8")

    @property
    def has_plan(self) -> bool:
        """Whether a study was begun here."""
        return (self.folder / "plan.json").is_file()

    def plan(self) -> StudyPlan:
        """Return the plan of the last run.

        Raises:
            StudyError: there is none.
            CheckpointError: it was changed or damaged.
        """
        if not self.has_plan:
            raise StudyError(
                f"{self.folder}: holds no study (no plan.json). Run one: isthmus study run FILE --out "
                f"{self.folder}"
            )
        path = self.folder / "plan.json"
        plan = _plan_of(read_json(path, _MOST_PLAN))
        if plan is None:
            raise CheckpointError(
                f"{path}: expected the plan of a study, found one that was changed or damaged. Delete it and run the "
                "study again with its own file; what is recorded is kept."
            )
        return plan

    def find(self, unit: Unit) -> UnitRecord:
        """Return what lies under a unit's name, checked (see :mod:`isthmus.study._records`)."""
        path = self.folder / "units" / f"{unit.address}.json"
        if not path.exists():
            return UnitRecord(None)
        try:
            return examine(read_json(path, _MOST_RECORD), unit)
        except CheckpointError as error:
            return UnitRecord(None, str(error.__cause__ or error))

    def record_of(self, unit: Unit) -> dict[str, Any] | None:
        """Return the record of a unit, or ``None`` if there is none.

        Raises:
            CheckpointError: what lies there is not the unit's record, or was changed or damaged.
        """
        found = self.find(unit)
        if found.damaged:
            raise CheckpointError(
                f"{self.folder / 'units' / unit.address}.json: expected the record of {unit.label}: {found.fault}. "
                "Run the study again to make it anew."
            )
        return found.record

    def record(self, address: str) -> dict[str, Any] | None:
        """Return the record under an address if it is whole and names this address, else ``None``."""
        try:
            record = read_json(self.folder / "units" / f"{address}.json")
        except CheckpointError:
            return None
        whole = isinstance(record, dict) and sealed(record) and record.get("address") == address
        return record if whole else None

    def write_record(self, record: Mapping[str, Any], timing: Mapping[str, Any]) -> None:
        """Keep the record of a unit, sealed; its timing goes first, so that a record means all is there."""
        address = record["address"]
        write_json(self.folder / "timings" / f"{address}.json", timing)
        write_json(self.folder / "units" / f"{address}.json", seal(record))

    def timing(self, address: str) -> dict[str, Any] | None:
        """Return the timing of a unit, or ``None``: it is no evidence, so one that is damaged is passed over."""
        path = self.folder / "timings" / f"{address}.json"
        try:
            timing = read_json(path, _MOST_RECORD) if path.is_file() else None
        except CheckpointError:
            return None
        if not isinstance(timing, dict) or not all(
            isinstance(timing.get(key, ""), (int, float, type(None))) for key in TIMES
        ):
            return None
        return timing

    def digest(self, ref: NetworkRef) -> str | None:
        """Return the SHA-256 of a network's file, or ``None`` if it is lost."""
        try:
            with self.network(ref).open("rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest()
        except OSError:
            return None

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
        for line in reversed(path.read_text(encoding="utf-8", errors="replace").splitlines()):
            try:
                event = json.loads(line)
            except (ValueError, RecursionError):
                continue
            if isinstance(event, dict) and "unit" in event:
                return event
        return None


def write_json(path: Path, value: Any) -> None:
    """Write canonical JSON (sorted keys), whole or not at all."""
    with atomic_path(path) as temporary:
        text = json.dumps(value, indent=1, sort_keys=True, allow_nan=False)
        temporary.write_text(text + "\n", encoding="utf-8")


def read_json(path: Path, most: int = _MOST_RECORD) -> Any:
    """Read a JSON file.

    Args:
        path: the file.
        most: bytes that it may have.

    Raises:
        CheckpointError: it cannot be read, is too large, or is no JSON.
    """
    try:
        with path.open("rb") as file:
            content = file.read(most + 1)
        if len(content) > most:
            raise ValueError(f"it has more than {most:,} bytes")
        return json.loads(content)
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path}: cannot be read: {error}. Delete it and run the study again."
        ) from error


def _plan_of(values: Any) -> StudyPlan | None:
    """Return the plan, if it is one whose units are what their addresses say."""
    try:
        plan = StudyPlan.from_dict(values)
        whole = (DIGEST not in values or sealed(values)) and all(
            address_of(unit.content) == unit.address for unit in plan.units
        )
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError):
        return None
    return plan if whole else None
