"""Running a study: what is recorded is skipped, what fails is recorded, and the rest goes on."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from isthmus.moments import keeps_running_statistics
from isthmus.study._config import StudyConfig, Variant
from isthmus.study._continuation import check_continuation
from isthmus.study._device import check_device
from isthmus.study._evidence import Evidence, unproven_note, weigh
from isthmus.study._executors import AbstractExecutor, InProcess, Job, Outcome
from isthmus.study._measure import build_network, load_split
from isthmus.study._own_methods import keep_code, own_methods
from isthmus.study._plan import NetworkFacts, StudyPlan, Unit, name_of, plan_study
from isthmus.study._sinks import AbstractSink, scalars_of
from isthmus.study._store import Store
from isthmus.training import (
    Described,
    Precision,
    can_stack,
    check_fits,
    faster_precision,
    operations,
    parameters_of,
)

__all__ = ["Progress", "StudyStatus", "make_plan", "run_study", "study_status"]

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Progress:
    """How far a run is.

    Attributes:
        unit: the unit that just ended, or ``None`` at the start.
        outcome: how it ended.
        done: expected work that is recorded (see :class:`Unit`).
        total: expected work of the study.
        seconds: since the run began.
        left: expected seconds left; ``None`` before the first unit has ended.
    """

    unit: Unit | None
    outcome: Outcome | None
    done: float
    total: float
    seconds: float
    left: float | None


@dataclass(frozen=True)
class StudyStatus:
    """What is recorded of a study.

    Attributes:
        study: its name.
        counts: per kind of unit: done, failed, and all.
        failed: label and last line of the traceback of every failed unit.
        blocked: units that cannot be run because what they need has failed.
        seconds: work recorded, summed over units.
        left: expected seconds that were left when the last unit ended, or ``None``; 0 when finished.
        damaged: label of every unit whose record must not be used, and why; running the study makes it anew.
        notes: what else a reader should know, such as which units were made anew in this run.
    """

    study: str
    counts: dict[str, dict[str, int]]
    failed: dict[str, str]
    blocked: int
    seconds: float
    left: float | None
    damaged: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def finished(self) -> bool:
        """Whether every unit is done."""
        return all(c["done"] == c["all"] for c in self.counts.values())

    def to_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return {**vars(self), "finished": self.finished}


Describe = Callable[[str, str], Described]


def make_plan(
    study: StudyConfig,
    data_dir: str | Path | None,
    *,
    precision: Precision | None = None,
    read: Describe | None = None,
) -> StudyPlan:
    """Return the units of a study; reads the data, whose digests are part of the addresses.

    Args:
        study: the study.
        data_dir: folder of the data set, if it is not to be downloaded.
        precision: what ``precision: auto`` stands for; by default what is faster on this machine's CPU.
        read: from name and split to the data, or to an outline of them, whose units have addresses of their own.

    Raises:
        DataError: the data cannot be had.
        ModelError: a network does not fit the data.
        StudyError: a method of one's own cannot be imported.
    """
    return _planned(study, data_dir, precision, read)[0]


def _planned(
    study: StudyConfig, data_dir: str | Path | None, precision: Precision | None, read: Describe | None = None
) -> tuple[StudyPlan, list[tuple[Variant, NetworkFacts]]]:
    """Return the plan, and what is known about the networks of each architecture in it."""
    where = None if data_dir is None else str(data_dir)
    own = {name: found.digest for name, found in own_methods(study.measure.methods, study.folder).items()}
    known: list[tuple[Variant, NetworkFacts]] = []
    found_in: Describe = (lambda name, split: load_split(name, where, split)) if read is None else read

    def facts(variant: Variant) -> NetworkFacts:
        data = found_in(variant.data.name, "train")
        with torch.device("meta"):  # shapes alone: the widest networks fill gigabytes
            model = build_network(variant.network, data)
            work = operations(model, torch.zeros(1, *data.input_shape))
        found = NetworkFacts(
            can_stack(model, variant.training.augment),
            work,
            keeps_running_statistics(model),
            parameters_of(model),
        )
        known.append((variant, found))
        return found

    chosen = faster_precision("cpu") if precision is None else precision
    return plan_study(study, lambda name, split: found_in(name, split).digest, facts, chosen, own), known


def _check_memory(study: StudyConfig, known: Iterable[tuple[Variant, NetworkFacts]], device: str) -> None:
    """Refuse networks whose training cannot fit: weights, gradients and the optimiser's moments of one unit."""
    for variant, facts in known:
        moments = 2 if variant.training.optimiser == "adam" else 1
        together = min(study.stack, len(study.all_seeds)) if facts.stackable else 1
        check_fits(
            facts.parameters,
            f"Training {name_of(variant)},{f' {together} networks at a time,' if together > 1 else ''}",
            copies=(2 + moments) * together,
            device=device,
        )


def run_study(
    study: StudyConfig,
    out: str | Path,
    *,
    data_dir: str | Path | None = None,
    executor: AbstractExecutor | None = None,
    device: str = "cpu",
    on_progress: Callable[[Progress], Any] | None = None,
    sinks: Sequence[AbstractSink] = (),
) -> StudyStatus:
    """Run what is not yet recorded of a study.

    It may be stopped at any moment, also by force, and started again: units whose record is there are
    skipped, and the records in the end are the same, byte for byte on one machine with one number of threads.
    Units that failed before are tried again.

    Args:
        study: see :func:`isthmus.study.read_study`.
        out: folder of the study (see :mod:`isthmus.study._store`); must be seen by all workers.
        data_dir: folder of the data set, if it is not to be downloaded.
        executor: where units run; by default in this process. It is left open.
        device: where tensors live, such as ``"cpu"`` or ``"cuda"``.
        on_progress: called at the start and after every unit.
        sinks: told about every unit that ends, such as :class:`isthmus.study.TensorBoard`; they are left open.
            One that fails is dropped, with a line in ``events.jsonl``, and the study goes on.

    Returns:
        What is recorded at the end; its notes say which units were made anew because their record or network was
        lost, changed, damaged, or unproven (of a version before digests).

    Raises:
        StudyError: the folder holds another study, or results that this one does not ask for, the device is not
            there, or a method of one's own cannot be imported; nothing is changed then.
        DataError: the data cannot be had.
        ModelError: a network does not fit the data, or into the machine's memory.
        OutputError: the folder cannot be written.
    """
    chosen = InProcess() if executor is None else executor
    check_device(device, here=chosen.here)
    store = Store(Path(out).resolve())
    check_continuation(study, store.folder)
    # A study that is continued elsewhere keeps the precision it was begun with: its records stay of one kind.
    precision = store.plan().precision if store.has_plan else faster_precision(device)
    plan, known = _planned(study, data_dir, precision)
    if chosen.here:
        _check_memory(study, known, device)
    store.create()
    store.write_plan(plan, study.text)
    keep_code(own_methods(study.measure.methods, study.folder), store.folder)
    where = None if data_dir is None else str(Path(data_dir).resolve())
    evidence = weigh(store, plan)
    notes = _told(store, plan, evidence)
    for _ in range(2):  # a network that is trained anew may differ from the one that was measured
        jobs = [
            Job(u, str(store.folder), where, chosen.threads, device, study.folder)
            for u in plan.units
            if u.address not in evidence.done
        ]
        _Loop(store, plan, chosen, on_progress, sinks).run(jobs, set(evidence.done))
        anew = {job.unit.address for job in jobs}
        if not any(anew.intersection(u.needs) for u in plan.units if u.address in evidence.done):
            break
        evidence = weigh(store, plan)
        stale = [u for u in plan.units if u.address in evidence.faults and u.address not in anew]
        if not stale:
            break
        notes += _told(store, plan, evidence)
    return replace(study_status(store.folder), notes=tuple(dict.fromkeys(notes)))


def _told(store: Store, plan: StudyPlan, evidence: Evidence) -> list[str]:
    """Say which units are made anew, and why: in the events, the log and what is returned."""
    labels = {u.address: u.label for u in plan.units}
    notes = [f"made anew: {labels[a]}: {fault}" for a, fault in evidence.faults.items()]
    for note in notes:
        store.log({"time": time.time(), "status": "made anew", "message": note})
        _logger.warning("%s", note)
    return notes


def study_status(folder: str | Path) -> StudyStatus:
    """Return what is recorded in the folder of a study.

    Raises:
        StudyError: the folder holds no study.
    """
    store = Store(Path(folder))
    plan = store.plan()
    counts: dict[str, dict[str, int]] = {}
    failed: dict[str, str] = {}
    bad: set[str] = set()
    damaged: dict[str, str] = {}
    unproven = 0
    blocked, seconds = 0, 0.0
    for unit in plan.units:
        count = counts.setdefault(unit.kind, {"done": 0, "failed": 0, "all": 0})
        count["all"] += 1
        found = store.find(unit)
        if found.record is None:
            if found.fault is not None:
                damaged[unit.label] = found.fault
            if bad.intersection(unit.needs):
                blocked += 1
                bad.add(unit.address)
            continue
        count[found.record["status"]] += 1
        unproven += not found.proven
        if found.status == "failed":
            bad.add(unit.address)
            failed[unit.label] = found.record["traceback"].strip().splitlines()[-1]
        timing = store.timing(unit.address)
        seconds += 0.0 if timing is None else timing.get("seconds") or 0.0
    finished = all(c["done"] == c["all"] for c in counts.values())
    left = 0.0 if finished else (store.last_event() or {}).get("seconds_left")
    notes = (unproven_note(unproven),) if unproven else ()
    return StudyStatus(
        plan.study,
        counts,
        failed,
        blocked,
        seconds,
        left if isinstance(left, (int, float)) else None,
        damaged,
        notes,
    )


class _Loop:
    """Feeds an executor with the units whose needs are met."""

    def __init__(
        self,
        store: Store,
        plan: StudyPlan,
        executor: AbstractExecutor,
        on_progress: Callable[[Progress], Any] | None,
        sinks: Sequence[AbstractSink],
    ) -> None:
        self.store, self.executor, self.on_progress = store, executor, on_progress
        self.sinks, self.ended = list(sinks), 0
        self.units = {u.address: u for u in plan.units}
        self.total = self._cost(self.units)
        self.start = time.perf_counter()

    def run(self, jobs: list[Job], done: set[str]) -> None:
        waiting = list(jobs)
        skipped = self._cost(done)
        ended, running = set(done), 0
        self._tell(None, None, skipped, ended)
        while True:
            ready = [j for j in waiting if done.issuperset(j.unit.needs)]
            for job in ready[: self.executor.slots - running]:
                waiting.remove(job)
                self.executor.submit(job)
                running += 1
            if running == 0:
                break
            outcome = self.executor.next_outcome()
            running -= 1
            ended.add(outcome.address)
            if outcome.status == "done":
                done.add(outcome.address)
            self._tell(self.units[outcome.address], outcome, skipped, ended)

    def _cost(self, addresses: Iterable[str]) -> float:
        """Add up expected work, whatever the order: all done is exactly the total."""
        return math.fsum(self.units[a].cost for a in addresses)

    def _tell(self, unit: Unit | None, outcome: Outcome | None, skipped: float, ended: set[str]) -> None:
        seconds = time.perf_counter() - self.start
        done, total = self._cost(ended), self.total
        left = None if done <= skipped else (total - done) * seconds / (done - skipped)
        progress = Progress(unit, outcome, done, total, seconds, left)
        if unit is not None and outcome is not None:
            event = {
                "time": time.time(),
                "unit": unit.label,
                "address": unit.address,
                "status": outcome.status,
                "seconds": outcome.seconds,
                "message": outcome.message,
                "share_done": done / total if total else 1.0,
                "seconds_left": left,
            }
            self.store.log(event)
            self.ended += 1
            self._fill_sinks(unit, event)
        if self.on_progress is not None:
            self.on_progress(progress)

    def _fill_sinks(self, unit: Unit, event: dict[str, Any]) -> None:
        scalars = scalars_of(unit, self.store.record_of(unit)) if self.sinks else []
        for sink in list(self.sinks):
            try:
                sink.write(self.ended, event, scalars)
            except Exception as error:  # a display that breaks must not cost hours of work
                self.sinks.remove(sink)
                text = f"{type(sink).__name__} was dropped: {type(error).__name__}: {error}"
                self.store.log({"time": time.time(), "status": "sink dropped", "message": text})
                _logger.warning("%s", text)
