"""How long a study should take: operations that are counted, and a short measurement of this machine."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from isthmus.study._config import NetworkConfig, StudyConfig, matchings
from isthmus.study._continuation import check_continuation
from isthmus.study._device import check_device
from isthmus.study._evidence import weigh
from isthmus.study._measure import build_network, load_split, symmetries_of
from isthmus.study._plan import NetworkFacts, StudyPlan, Unit
from isthmus.study._runner import make_plan
from isthmus.study._store import Store
from isthmus.study._threads import torch_threads
from isthmus.training import (
    Dataset,
    Described,
    EpochRecord,
    TrainSettings,
    faster_precision,
    operations,
    outline,
    to_batches,
    train,
)

__all__ = ["Estimate", "estimate_study"]

_SECONDS = 0.5
"""Of training that is timed, per family of networks."""

_EXAMPLES, _BATCH = 500, 100


@dataclass(frozen=True)
class Estimate:
    """What running a study would do.

    Attributes:
        study: its name.
        units: per kind of unit: all, and done already.
        work: expected seconds of work left, on one worker.
        seconds: expected seconds until the end, with so many workers.
        workers: units at a time.
        rests_on: what the times rest on, in words.
    """

    study: str
    units: dict[str, dict[str, int]]
    work: float
    seconds: float
    workers: int
    rests_on: str

    def to_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return dict(vars(self))


def estimate_study(
    study: StudyConfig,
    out: str | Path | None = None,
    *,
    data_dir: str | Path | None = None,
    workers: int = 1,
    threads: int | None = None,
    device: str = "cpu",
) -> Estimate:
    """Count a study's units and say how long they should take; nothing is written.

    Args:
        study: see :func:`isthmus.study.read_study`.
        out: folder of the study, whose units that are done need no time; it need not exist.
        data_dir: folder of the data set, where it is not the published one. Without it nothing is downloaded for a
            study that has not begun: data sets have the sizes that they were published in.
        workers: units that run at a time.
        threads: of each; by default as many as torch takes.
        device: where tensors live.

    Raises:
        StudyError: the folder holds another study, or the device is not there.
        DataError: the data cannot be had.
        ModelError: a network does not fit the data.

    Notes:
        A unit's operations are counted by torch on shapes alone; how many a second this machine does is measured by
        training one network of each family for half a second, and what tracing costs, by tracing it. Other work on
        the machine, slower memory of larger networks and the solvers of assignments are not in it: expect the right
        order of magnitude, not the minute.
    """
    check_device(device)
    precision, done = faster_precision(device), frozenset[str]()
    if out is not None:
        check_continuation(study, out)
        store = Store(Path(out))
        if store.has_plan:
            precision = store.plan().precision
    begun = out is not None and Store(Path(out)).has_plan
    where = None if data_dir is None else str(data_dir)

    def read(name: str, split: str) -> Described:
        return load_split(name, where, split) if begun or where is not None else outline(name, split)

    plan = make_plan(study, data_dir, precision=precision, read=read)
    if out is not None and begun:
        done = weigh(Store(Path(out)), plan).done
    units: dict[str, dict[str, int]] = {}
    for unit in plan.units:
        count = units.setdefault(unit.kind, {"all": 0, "done": 0})
        count["all"] += 1
        count["done"] += unit.address in done
    left = [unit for unit in plan.units if unit.address not in done]
    with torch_threads(threads):
        work = _work(left, plan, read, device)
    longest = (
        max((unit.cost for unit in left), default=0.0) / max(math.fsum(u.cost for u in left), 1e-9) * work
    )
    return Estimate(
        study.name,
        units,
        work,
        max(work / workers, longest),
        workers,
        f"operations counted from shapes, and {_SECONDS:g} seconds of training on {device} and one tracing for "
        "each family of networks; other work on the machine and the solvers of assignments are not in it",
    )


def _work(
    units: Iterable[Unit], plan: StudyPlan, read: Callable[[str, str], Described], device: str
) -> float:
    """Return the seconds of work of units: passes over the data, examples of a pass, seconds of an example."""
    speeds: dict[str, _Speed] = {}
    total: list[float] = []
    for unit in units:
        network = NetworkConfig(**unit.content["network"])
        data = read(unit.content["data"]["name"], "train")
        if network.family not in speeds:
            speeds[network.family] = _measure(network, data, plan, device)
        speed = speeds[network.family]
        total += [unit.cost * len(data) * speed.cost, _tracings(unit) * speed.tracing]
    return math.fsum(total)


def _tracings(unit: Unit) -> int:
    """Return how often a unit traces its network or verifies a relabelling, whatever its size."""
    if unit.kind == "measure":
        return 1 + len(list(matchings(unit.content["measure"])))
    return 0 if unit.kind == "train" else 2


class _Speed(NamedTuple):
    """Seconds per example and unit of expected work, and of tracing and verifying a network."""

    cost: float
    tracing: float


class _Enough(Exception):
    """The training that is timed has taken long enough."""


def _measure(network: NetworkConfig, data: Described, plan: StudyPlan, device: str) -> _Speed:
    """Time the training of a network, and its tracing.

    A perceptron of the usual size stands for all of them, since small ones are over before a clock can tell; of other
    families the first one of the study is trained.
    """
    measured = NetworkConfig() if network.family == "mlp" else network
    shape, classes = data.input_shape, data.classes
    generator = torch.Generator().manual_seed(0)
    values = torch.randint(0, 256, (_EXAMPLES, *shape), generator=generator, dtype=torch.uint8)
    labels = torch.arange(_EXAMPLES) % len(classes)
    sample = Dataset("a sample of noise", "train", values, labels, classes, 255.0)
    model = build_network(measured, sample)
    facts = NetworkFacts(False, operations(model, torch.zeros(1, *shape)), False)
    settings = TrainSettings(batch_size=_BATCH, epochs=1000, learning_rate=1e-6, precision=plan.precision)
    times: list[float] = []
    _timed(lambda told: train(model.to(device), sample, settings, on_epoch=told, strict=False), times)
    spent = (times[-1] - times[0]) / (len(times) - 1)
    traced: list[float] = []
    for _ in range(2):  # the first tracing of a process also imports what traces
        before = time.perf_counter()
        symmetries_of(model.to(device).eval(), to_batches(sample, _BATCH), 0)
        traced.append(time.perf_counter() - before)
    return _Speed(spent / _EXAMPLES / facts.size, min(traced))


def _timed(run: Callable[[Callable[[EpochRecord], None]], Any], times: list[float]) -> None:
    start = time.perf_counter()

    def told(_: EpochRecord) -> None:
        times.append(time.perf_counter())
        if len(times) > 1 and times[-1] - start > _SECONDS:
            raise _Enough

    try:
        run(told)
    except _Enough:
        return
