"""Running: what is there is skipped, what fails is recorded, and records do not depend on how they were made."""

from __future__ import annotations

import csv
import itertools
import json
import os
import random
import signal
import sys
import time
import types
from pathlib import Path
from typing import Any

import pytest
from engine_studies import TINY, deadly, deadly_once, greedy, records, start, tiny

from isthmus.errors import MissingExtraError, OutputError
from isthmus.study import (
    InProcess,
    LocalProcesses,
    OnRay,
    Progress,
    StudyError,
    export_study,
    read_rows,
    read_run,
    run_study,
    study_status,
)
from isthmus.study._export import _busy


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("study")
    with InProcess(1) as executor:
        status = run_study(tiny(), folder, executor=executor)
    assert status.finished
    assert status.failed == {}
    return folder


def test_everything_is_recorded(finished: Path) -> None:
    status = study_status(finished)
    assert status.counts == {
        "train": {"done": 3, "failed": 0, "all": 3},
        "measure": {"done": 4, "failed": 0, "all": 4},
    }
    assert status.seconds > 0
    assert status.left == 0
    assert len(list((finished / "networks").glob("*.safetensors"))) == 8
    assert not list(finished.rglob("*.tmp"))
    for path in (finished / "units").glob("*.json"):
        record = json.loads(path.read_text())
        assert record["address"] == path.stem
        assert record["versions"]["torch"]
        assert record["threads"] == 1
        assert (finished / "timings" / path.name).is_file()


def test_a_second_run_does_nothing(finished: Path) -> None:
    before = records(finished)
    calls: list[Progress] = []
    run_study(tiny(), finished, on_progress=calls.append)
    assert len(calls) == 1
    assert calls[0].done == pytest.approx(calls[0].total)
    assert records(finished) == before


def test_nothing_is_left_at_the_end_whatever_the_order(tmp_path: Path) -> None:
    calls: list[Progress] = []
    text = TINY.replace("width: 12", "width: [3, 7, 12]")
    run_study(tiny(text.replace("[none, weights]", "[none]")), tmp_path, on_progress=calls.append)
    assert calls[-1].done == calls[-1].total
    assert calls[-1].left == 0.0
    assert not str(calls[-1].left).startswith("-")
    assert all(a.done < b.done for a, b in itertools.pairwise(calls))


def test_stopped_after_any_unit_it_goes_on_to_the_same_records(finished: Path, tmp_path: Path) -> None:
    class Stop(Exception):
        pass

    units: list[str] = []

    def stop(progress: Progress) -> None:
        if progress.unit is not None:
            units.append(progress.unit.label)
            raise Stop

    for _ in range(20):
        try:
            with InProcess(1) as executor:
                status = run_study(tiny(), tmp_path, executor=executor, on_progress=stop)
            break
        except Stop:
            continue
    assert status.finished
    assert len(units) == len(set(units)) == 7
    assert records(tmp_path) == records(finished)


def test_a_lost_record_is_made_again_byte_for_byte(finished: Path, tmp_path: Path) -> None:
    wanted = records(finished)
    path = sorted((finished / "units").glob("*.json"))[2]
    path.unlink()
    with InProcess(1) as executor:
        run_study(tiny(), finished, executor=executor)
    assert records(finished) == wanted


def test_a_failed_unit_is_recorded_and_the_rest_goes_on(tmp_path: Path) -> None:
    study = tiny(TINY.replace("[0.01, 0.1]", "[0.1, 1.0e+25]").replace("stack: 3", "stack: 4"))
    status = run_study(study, tmp_path)
    assert status.counts["measure"] == {"done": 2, "failed": 2, "all": 4}
    assert not status.finished
    assert len(status.failed) == 2
    assert all("1e+25" in unit and "CheckpointError" in message for unit, message in status.failed.items())
    failed = [r for r in map(json.loads, records_text(tmp_path)) if r["status"] == "failed"]
    assert all("Traceback" in r["traceback"] for r in failed)
    assert {row["learning_rate"] for row in read_rows(tmp_path)} == {0.1}


def test_what_needs_a_failed_unit_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise ValueError("no luck")

    with monkeypatch.context() as broken:
        broken.setattr("isthmus.study._measure.train_stacked", fail)
        status = run_study(tiny(), tmp_path)
    assert status.counts["train"]["failed"] == 3
    assert status.blocked == 4
    assert set(status.failed.values()) == {"ValueError: no luck"}
    assert run_study(tiny(), tmp_path).finished


def records_text(folder: Path) -> list[str]:
    return [p.read_text(encoding="utf-8") for p in (folder / "units").glob("*.json")]


def test_the_table_has_a_row_per_pair_rate_method_and_split(finished: Path, tmp_path: Path) -> None:
    table, text, _ = export_study(finished, tmp_path)
    rows = read_rows(tmp_path)
    assert rows == read_rows(finished)
    assert len(rows) == 2 * 2 * 2 * 2
    keys = {(r["seed_a"], r["learning_rate"], r["method"], r["split"]) for r in rows}
    assert len(keys) == len(rows)
    for row in rows:
        assert row["barrier"] >= 0
        assert len(row["loss_at"]) == 3
        assert row["loss_at"][1] == row["midpoint_loss"]
        assert row["data_digest_test"]
        assert row["version_torch"]
    with text.open(encoding="utf-8") as file:
        listed = list(csv.DictReader(file))
    assert len(listed) == len(rows)
    assert json.loads(listed[0]["loss_at"]) == rows[0]["loss_at"]
    assert table.name == "records.parquet"


def test_what_the_run_took_is_exported_beside_the_records(finished: Path, tmp_path: Path) -> None:
    _, _, path = export_study(finished, tmp_path)
    run = read_run(tmp_path)
    assert path.name == "run.json"
    assert run == read_run(finished)
    assert run is not None
    timings = [json.loads(p.read_text()) for p in (finished / "timings").glob("*.json")]
    assert run["unit_seconds"] == pytest.approx(sum(t["seconds"] for t in timings))
    assert run["cpu_seconds"] == pytest.approx(sum(t["cpu_seconds"] for t in timings))
    assert 0 < run["busy_seconds"] <= run["unit_seconds"] + 1e-6
    assert run["at_once"] == pytest.approx(1.0, abs=0.05)
    assert (run["study"], run["machines"], run["threads"]) == ("tiny", 1, [1])
    assert run["units"]["train"] == {"done": 3, "failed": 0, "all": 3}
    assert run["yaml"] == TINY
    assert len(run["versions"]["torch"]) == len(run["processors"]) == 1
    assert read_run(tmp_path / "units") is None


def test_overlapping_units_are_counted_once() -> None:
    assert _busy([(0, 10), (5, 12), (6, 7), (20, 21)]) == 13
    assert _busy([]) == 0


def test_folders_without_a_study(tmp_path: Path) -> None:
    with pytest.raises(StudyError, match=r"holds no study \(no plan.json\)"):
        study_status(tmp_path)
    with pytest.raises(StudyError, match=r"holds neither records\.parquet nor a study"):
        read_rows(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="Cannot write to the study's folder"):
        run_study(tiny(), tmp_path / "file" / "folder")
    with pytest.raises(StudyError, match="workers: expected at least 1, found -1"):
        LocalProcesses(-1)


def test_memory_of_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    if sys.platform.startswith("linux"):
        there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
        with LocalProcesses(memory=0.9 * there) as executor:
            assert executor.slots == 1
        with pytest.raises(
            StudyError, match=r"memory: .* GiB for each worker is more than the .* GiB there are"
        ):
            LocalProcesses(memory=2 * there)
        with pytest.raises(StudyError, match="memory: expected more than 0 GiB, found -1"):
            LocalProcesses(memory=-1)
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(StudyError, match="is enforced on Linux only, and this is darwin"):
        LocalProcesses(memory=1)


def test_nothing_measured_yet(finished: Path, tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_bytes((finished / "plan.json").read_bytes())
    for read in (read_rows, export_study):
        with pytest.raises(StudyError, match="no pair has been measured yet"):
            read(tmp_path)


@pytest.mark.slow
def test_local_processes_give_the_same_records(finished: Path, tmp_path: Path) -> None:
    with LocalProcesses(2, 1) as executor:
        assert run_study(tiny(), tmp_path, executor=executor).finished
    assert records(tmp_path) == records(finished)


@pytest.mark.slow
def test_a_killed_worker_is_replaced_and_its_unit_tried_again(finished: Path, tmp_path: Path) -> None:
    killed: list[int] = []
    with LocalProcesses(1, 1) as executor:

        def kill(progress: Progress) -> None:
            if progress.unit is not None and len(killed) < 2:
                worker = next(iter(executor._pool._processes.values()))
                os.kill(worker.pid or 0, signal.SIGKILL)
                killed.append(worker.pid or 0)

        status = run_study(tiny(), tmp_path, executor=executor, on_progress=kill)
    assert len(set(killed)) == 2
    assert status.finished
    assert records(tmp_path) == records(finished)


@pytest.mark.slow
def test_killed_at_random_moments_it_ends_with_the_same_records(finished: Path, tmp_path: Path) -> None:
    study = tmp_path / "tiny.yaml"
    study.write_text(TINY, encoding="utf-8")
    out, moments = tmp_path / "out", random.Random(0)
    folders = ("networks", "timings", "units")

    def written() -> int:
        """Count files, temporary ones too: a moment is when so many are there, on a machine of any speed."""
        return sum(len(list((out / f).iterdir())) for f in folders if (out / f).is_dir())

    # 8 checkpoints, 7 timings and 7 records in all.
    for count in sorted(moments.sample(range(1, 21), 4)):
        seen = {p.name: p.read_bytes() for p in out.glob("units/*.json")}
        run = start(study, out)
        while run.poll() is None and written() < count:
            time.sleep(0.001)
        time.sleep(moments.uniform(0, 0.05))
        run.kill()
        run.communicate()
        assert run.returncode == -signal.SIGKILL, "the run ended before it could be killed"
        kept = {p.name: p.read_bytes() for p in out.glob("units/*.json")}
        assert kept.items() >= seen.items()
    last = start(study, out)
    _, errors = last.communicate()
    assert last.returncode == 0, errors.decode()
    assert records(out) == records(finished)


@pytest.mark.slow
def test_a_unit_that_kills_its_workers_is_recorded_and_its_neighbours_are_not_blamed(tmp_path: Path) -> None:
    class Deadly(LocalProcesses):
        _function = staticmethod(deadly)

    with Deadly(2, 1) as executor:
        status = run_study(tiny(), tmp_path, executor=executor)
    assert status.counts["train"] == {"done": 2, "failed": 1, "all": 3}
    assert list(status.failed.values()) == [
        "The worker died in each of 3 tries: killed, or out of memory? Use fewer workers."
    ]
    # The pair of seeds 0 and 1 at each rate does not need the unit that kills; nothing else may be missing.
    assert status.counts["measure"]["failed"] == 0
    assert status.counts["measure"]["done"] + status.blocked == 4


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits are enforced on Linux only")
def test_a_unit_that_wants_more_memory_than_allowed_fails_alone(tmp_path: Path) -> None:
    class Greedy(LocalProcesses):
        _function = staticmethod(greedy)

    with Greedy(1, 1, memory=1.5) as executor:
        status = run_study(tiny(), tmp_path, executor=executor)
    assert status.counts["train"] == {"done": 2, "failed": 1, "all": 3}
    assert "memory" in next(iter(status.failed.values()))
    with LocalProcesses(1, 1) as executor:
        assert run_study(tiny(), tmp_path, executor=executor).finished


@pytest.mark.slow
def test_workers_end_with_the_process_that_started_them(tmp_path: Path) -> None:
    study = tmp_path / "tiny.yaml"
    study.write_text(TINY, encoding="utf-8")
    run = start(study, tmp_path / "out", "--executor", "processes", "--workers", "1")
    children = Path(f"/proc/{run.pid}/task/{run.pid}/children")
    if not children.parent.exists():
        pytest.skip("children of a process are read from /proc, which only Linux has")
    while not (pids := children.read_text().split()):
        time.sleep(0.05)
    time.sleep(2)
    pids = sorted({*pids, *children.read_text().split()})
    run.kill()
    run.communicate()
    end = time.monotonic() + 30
    while any(Path(f"/proc/{pid}").exists() for pid in pids) and time.monotonic() < end:
        time.sleep(0.1)
    assert not [pid for pid in pids if Path(f"/proc/{pid}").exists()]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_two_ray_nodes_give_the_same_records_though_a_node_and_a_worker_die(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ray: Any = pytest.importorskip("ray")
    # Nodes are other machines to Ray: they import the deadly job by its name.
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=os.pathsep)
    from ray.cluster_utils import Cluster

    class Deadly(OnRay):
        _function = staticmethod(deadly_once)

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    second = cluster.add_node(num_cpus=1)
    try:
        cluster.wait_for_nodes()
        dead: list[str] = []

        def kill(progress: Progress) -> None:
            if progress.unit is not None and not dead:
                cluster.remove_node(second, allow_graceful=False)
                dead.append(progress.unit.label)

        with Deadly(cluster.address, threads=1) as executor:
            assert executor.slots == 2
            assert len({n["NodeID"] for n in ray.nodes() if n["Alive"]}) == 2
            status = run_study(tiny(), tmp_path, executor=executor, on_progress=kill)
    finally:
        cluster.shutdown()
    assert dead
    assert (tmp_path / "died").exists()
    assert status.finished
    assert records(tmp_path) == records(finished)


class Reference:
    """Stands for a job that was handed to the cluster."""

    def __init__(self, function: Any, job: Any) -> None:
        self.function, self.job = function, job


class FakeRay(types.ModuleType):
    """A cluster of three CPUs that runs a job when its result is asked for, with the calls of Ray that we use."""

    def __init__(self, fails: Exception | None = None, dies: tuple[str, ...] = ()) -> None:
        super().__init__("ray")
        self.exceptions: Any = types.ModuleType("ray.exceptions")
        self.exceptions.RayError = type("RayError", (Exception,), {})
        self.fails, self.dies, self.options, self.calls = fails, dies, dict[str, Any](), list[str]()

    def is_initialized(self) -> bool:
        return False

    def init(self, **_: Any) -> None:
        self.calls.append("init")
        if self.fails is not None:
            raise self.fails

    def cluster_resources(self) -> dict[str, float]:
        return {"CPU": 3.0}

    def remote(self, **options: Any) -> Any:
        self.options = options
        return lambda function: types.SimpleNamespace(remote=lambda job: Reference(function, job))

    def wait(self, references: list[Any], num_returns: int) -> tuple[list[Any], list[Any]]:
        return references[:num_returns], references[num_returns:]

    def get(self, reference: Any) -> Any:
        if reference.job.unit.kind in self.dies:
            raise self.exceptions.RayError("the worker died")
        return reference.function(reference.job)

    def cancel(self, reference: Any, force: bool) -> None:
        self.calls.append(f"cancel {force}")

    def shutdown(self) -> None:
        self.calls.append("shutdown")


def use(ray: FakeRay | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", ray)
    monkeypatch.setitem(sys.modules, "ray.exceptions", None if ray is None else ray.exceptions)


def test_what_ray_is_asked_for(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ray = FakeRay()
    use(ray, monkeypatch)
    with OnRay(threads=1, memory=1.5) as executor:
        assert executor.slots == 3
        assert run_study(tiny(), tmp_path, executor=executor).finished
    assert ray.options == {"num_cpus": 1, "max_retries": 2, "memory": 1.5 * 2**30}
    assert ray.calls == ["init", "shutdown"]
    assert records(tmp_path) == records(finished)
    with OnRay(threads=2) as executor:
        assert executor.slots == 1


def test_a_job_that_ray_gives_up_is_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use(FakeRay(dies=("train",)), monkeypatch)
    with OnRay() as executor:
        status = run_study(tiny(), tmp_path, executor=executor)
    assert status.counts["train"] == {"done": 0, "failed": 3, "all": 3}
    assert status.blocked == 4
    assert set(status.failed.values()) == {"the worker died"}
    record = json.loads(records_text(tmp_path)[0])
    assert record["traceback"].startswith("Ray gave the unit up: its worker or node died in each of 3 tries")


def test_no_cluster_and_no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    use(FakeRay(ConnectionError("refused")), monkeypatch)
    with pytest.raises(StudyError, match=r"Cannot reach the Ray cluster at 10\.0\.0\.1:6379: refused"):
        OnRay("10.0.0.1:6379")
    use(None, monkeypatch)
    with pytest.raises(MissingExtraError, match=r'pip install "isthmus\[ray\]"'):
        OnRay()
