"""Where units are run: in this process, in local processes, or on a Ray cluster; the records are the same.

An executor takes jobs and hands back outcomes in the order in which they end. A unit that fails records its
traceback itself; a *worker* that dies (killed, out of memory) is replaced and its job tried again.
"""

from __future__ import annotations

import multiprocessing
import os
import platform
import signal
import socket
import sys
import threading
import time
import traceback
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any

import numpy as np
import torch

import isthmus
from isthmus.errors import MissingExtraError, StudyError
from isthmus.study._evidence import digests_of
from isthmus.study._measure import run_content
from isthmus.study._plan import Unit
from isthmus.study._source import source_state
from isthmus.study._store import Store
from isthmus.study._threads import torch_threads

__all__ = [
    "AbstractExecutor",
    "InProcess",
    "Job",
    "LocalProcesses",
    "Outcome",
    "OnRay",
    "record_failure",
    "run_job",
]

TRIES = 3
"""How often a job is started whose worker dies."""


@dataclass(frozen=True)
class Job:
    """A unit and what its worker must know; every worker sees the same folders."""

    unit: Unit
    folder: str
    data_dir: str | None
    threads: int
    device: str
    modules: str | None = None


@dataclass(frozen=True)
class Outcome:
    """How a job ended: ``"done"`` or ``"failed"``, with the last line of the error."""

    address: str
    status: str
    seconds: float
    message: str = ""


def run_job(job: Job) -> Outcome:
    """Run a unit and write its record; an error is recorded with its traceback and not raised."""
    start, cpu = time.time(), time.process_time()
    clock = time.perf_counter()
    result: dict[str, Any] = {}
    networks: dict[str, str] = {}
    store = Store(Path(job.folder))
    trace = message = None
    with _threads(job.threads):
        try:
            result = run_content(job.unit, store, job.data_dir, job.device, job.modules)
            networks = digests_of(job.unit, store)
        except Exception as error:  # whatever a unit raises is its result; the study goes on
            trace, message = traceback.format_exc(), f"{type(error).__name__}: {error}"
    seconds = time.perf_counter() - clock
    timing = {
        "started": start,
        "seconds": seconds,
        "cpu_seconds": time.process_time() - cpu,
        "host": socket.gethostname(),
        "processor": _processor(),
        "pid": os.getpid(),
    }
    _write(job, result, networks, trace, timing)
    return Outcome(job.unit.address, "done" if trace is None else "failed", seconds, message or "")


def record_failure(job: Job, message: str) -> Outcome:
    """Record a unit whose worker died."""
    _write(
        job,
        {},
        {},
        message,
        {"started": None, "seconds": None, "cpu_seconds": None, "host": None, "pid": None},
    )
    return Outcome(job.unit.address, "failed", 0.0, message)


def _write(
    job: Job, result: dict[str, Any], networks: dict[str, str], trace: str | None, timing: dict[str, Any]
) -> None:
    record = {
        "address": job.unit.address,
        "kind": job.unit.kind,
        "content": job.unit.content,
        "status": "done" if trace is None else "failed",
        "result": result,
        "networks": networks,
        "traceback": trace,
        "threads": job.threads,
        "device": job.device,
        "versions": _versions(),
        "source": source_state(),
    }
    Store(Path(job.folder)).write_record(record, timing)


@cache
def _processor() -> str:
    """Return the processor's model where the system tells it (Linux), and what torch makes of it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return f"{model or platform.processor() or platform.machine()}, {torch.backends.cpu.get_cpu_capability()}"


def _versions() -> dict[str, str]:
    return {
        "isthmus": isthmus.__version__,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "numpy": np.__version__,
        "machine": platform.machine(),
    }


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """Limit torch, and the BLAS of numpy and SciPy, to some threads; put back what was there."""
    from threadpoolctl import threadpool_limits

    with threadpool_limits(count), torch_threads(count):
        yield


class AbstractExecutor(ABC):
    """Runs jobs.

    Attributes:
        slots: how many jobs it runs at a time.
        threads: of each job.
        here: whether jobs run on this machine, so that its devices and memory are theirs.
    """

    slots: int
    threads: int
    here: bool = True

    @abstractmethod
    def submit(self, job: Job) -> None:
        """Take a job."""

    @abstractmethod
    def next_outcome(self) -> Outcome:
        """Wait until a job ends, and return how."""

    @abstractmethod
    def close(self) -> None:
        """Stop the workers; jobs that have not ended are dropped."""

    def __enter__(self) -> AbstractExecutor:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class InProcess(AbstractExecutor):
    """One job at a time in this process; ``threads`` defaults to torch's."""

    def __init__(self, threads: int | None = None) -> None:
        self.slots = 1
        self.threads = _at_least_one("threads", threads or torch.get_num_threads())
        self._waiting: deque[Job] = deque()

    def submit(self, job: Job) -> None:
        """Take a job."""
        self._waiting.append(job)

    def next_outcome(self) -> Outcome:
        """Run the oldest job."""
        return run_job(self._waiting.popleft())

    def close(self) -> None:
        """Forget the jobs that were not run."""
        self._waiting.clear()


class LocalProcesses(AbstractExecutor):
    """Several processes on this machine, freshly started, so that none inherits another's state.

    When a worker dies, all jobs that were running are lost with it, and nothing tells which of them killed it. They
    are then started again one at a time, so that a job is only blamed for a death that it was alone with.

    Args:
        workers: processes; default: one per core, or fewer if ``memory`` does not suffice for so many.
        threads: of each; default: the cores shared out.
        memory: GiB of data that each may hold, torch itself included (about 0.5); a unit that wants more fails, and
            its record says so. Linux only.

    Raises:
        StudyError: a number below 1, a limit that this system cannot enforce, or more memory than there is.
    """

    _function: Callable[[Job], Outcome] = staticmethod(run_job)

    def __init__(
        self, workers: int | None = None, threads: int | None = None, memory: float | None = None
    ) -> None:
        cores = _cores()
        most = cores if memory is None else min(cores, _fitting(memory))
        self.slots = _at_least_one(
            "workers", workers or (max(min(cores // threads, most), 1) if threads else most)
        )
        self.threads = _at_least_one("threads", threads or max(cores // self.slots, 1))
        self._memory = memory
        self._pool = self._start()
        self._running: dict[Future[Outcome], Job] = {}
        self._deaths: dict[str, int] = {}
        self._suspects: deque[Job] = deque()
        self._waiting: deque[Job] = deque()
        self._alone = False

    def _start(self) -> ProcessPoolExecutor:
        context = multiprocessing.get_context("spawn")
        return ProcessPoolExecutor(
            self.slots, mp_context=context, initializer=_prepare_worker, initargs=(self._memory,)
        )

    def submit(self, job: Job) -> None:
        """Start a job, or queue it when all workers are busy or suspects are run one at a time."""
        self._waiting.append(job)
        self._fill()

    def next_outcome(self) -> Outcome:
        """Wait for a job; start jobs again whose worker died, up to three times in all."""
        while True:
            self._fill()
            done, _ = wait(self._running, return_when=FIRST_COMPLETED)
            future = next(iter(done))
            job = self._running.pop(future)
            try:
                outcome = future.result()
            except BrokenProcessPool:
                failed = self._restart(job)
                if failed is not None:
                    return failed
                continue
            self._alone = False
            return outcome

    def _fill(self) -> None:
        """Start what may be started: all that waits, or, while there are suspects, one of them alone."""
        if self._suspects:
            if not self._running:
                self._alone = True
                self._run(self._suspects.popleft())
        elif not self._alone:
            while self._waiting:
                self._run(self._waiting.popleft())

    def _run(self, job: Job) -> None:
        try:
            with _shielded_from_interrupts():
                future = self._pool.submit(self._function, job)
        except BrokenProcessPool:  # an idle worker was killed; next_outcome() finds the jobs that ran
            self._suspects.append(job)
            if not self._running:
                self._pool.shutdown(wait=True, cancel_futures=True)
                self._pool = self._start()
            return
        self._running[future] = job

    def _restart(self, job: Job) -> Outcome | None:
        """Replace a pool that lost a worker; return the outcome of a job that is to blame too often."""
        self._pool.shutdown(wait=True, cancel_futures=True)
        lost = [job]
        for future, other in list(self._running.items()):
            if future.cancelled() or isinstance(future.exception(), BrokenProcessPool):
                del self._running[future]
                lost.append(other)
        self._pool, self._alone = self._start(), False
        if len(lost) == 1:
            deaths = self._deaths[job.unit.address] = self._deaths.get(job.unit.address, 0) + 1
            if deaths >= TRIES:
                return record_failure(job, _died(TRIES))
        self._suspects.extendleft(reversed(lost))
        return None

    def close(self) -> None:
        """Stop the workers at once."""
        if self._running:
            for process in list((self._pool._processes or {}).values()):
                process.terminate()
        self._pool.shutdown(wait=True, cancel_futures=True)


@contextmanager
def _shielded_from_interrupts() -> Iterator[None]:
    """Start workers that Ctrl-C does not reach: it is this process's to stop them, without a word of theirs.

    A process inherits which signals are held back, from its first instruction on.
    """
    if not hasattr(signal, "pthread_sigmask"):  # pragma: no cover (Windows)
        yield
        return
    resource_tracker.ensure_running()  # it would let the signals through again when it is first needed
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _prepare_worker(memory: float | None) -> None:
    _end_with_parent()
    if memory is not None:
        import resource

        size = int(memory * 2**30)
        resource.setrlimit(resource.RLIMIT_DATA, (size, size))


def _fitting(memory: float) -> int:
    """Return how many workers of so many GiB this machine holds."""
    if not sys.platform.startswith("linux"):
        raise StudyError(
            f"memory: a limit of {memory:g} GiB on local processes is enforced on Linux only, and this is "
            f"{sys.platform}. Use fewer workers, or Ray."
        )
    if memory <= 0:
        raise StudyError(f"memory: expected more than 0 GiB, found {memory:g}.")
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    if memory > there:
        raise StudyError(
            f"memory: {memory:g} GiB for each worker is more than the {there:.1f} GiB there are."
        )
    return int(there // memory)


def _end_with_parent() -> None:
    """Let a worker end at once when the process that started it is killed, rather than wait for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


class OnRay(AbstractExecutor):
    """A Ray cluster; the study's folder and the data must be visible under one path on every node.

    Args:
        address: of the cluster, such as ``"auto"`` or ``"10.0.0.1:6379"``; ``None`` starts one on this machine.
        threads: of each job, which Ray counts as CPUs.
        memory: GiB each job reserves; Ray starts no more jobs on a node than fit.

    Raises:
        MissingExtraError: Ray is not installed.
        StudyError: the cluster cannot be reached.
    """

    here = False
    _function: Callable[[Job], Outcome] = staticmethod(run_job)

    def __init__(
        self, address: str | None = None, threads: int | None = None, memory: float | None = None
    ) -> None:
        self.threads = _at_least_one("threads", threads or 1)
        self._ray = _import_ray()
        self._own = not self._ray.is_initialized()
        if self._own:
            try:
                self._ray.init(address=address, log_to_driver=False, configure_logging=False)
            except (ConnectionError, RuntimeError, ValueError) as error:
                raise StudyError(f"Cannot reach the Ray cluster at {address}: {error}") from error
        options: dict[str, Any] = {"num_cpus": self.threads, "max_retries": TRIES - 1}
        if memory is not None:
            options["memory"] = int(memory * 2**30)
        self._remote = self._ray.remote(**options)(self._function)
        self.slots = max(int(self._ray.cluster_resources().get("CPU", 1)) // self.threads, 1)
        self._running: dict[Any, Job] = {}

    def submit(self, job: Job) -> None:
        """Hand a job to the cluster."""
        self._running[self._remote.remote(job)] = job

    def next_outcome(self) -> Outcome:
        """Wait for a job; Ray itself starts jobs again whose worker or node died."""
        ready, _ = self._ray.wait(list(self._running), num_returns=1)
        job = self._running.pop(ready[0])
        try:
            return self._ray.get(ready[0])
        except self._ray.exceptions.RayError as error:
            why = (
                f"Ray gave the unit up: its worker or node died in each of {TRIES} tries, or could not start."
            )
            return record_failure(job, f"{why}\n{error}")

    def close(self) -> None:
        """Drop what runs, and leave the cluster if this executor joined it."""
        for reference in self._running:
            self._ray.cancel(reference, force=True)
        if self._own:
            self._ray.shutdown()


def _import_ray() -> Any:
    try:
        import ray
        import ray.exceptions
    except ImportError as error:
        raise MissingExtraError('Running on a cluster needs Ray: pip install "isthmus[ray]".') from error
    return ray


def _died(tries: int) -> str:
    return f"The worker died in each of {tries} tries: killed, or out of memory? Use fewer workers."


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _at_least_one(name: str, value: int) -> int:
    if value < 1:
        raise StudyError(f"{name}: expected at least 1, found {value}.")
    return value
