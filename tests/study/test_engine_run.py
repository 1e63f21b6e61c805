"""Running: what is there is skipped, what fails is recorded, and records do not depend on how they were made."""

from __future__ import annotations

import csv
import json
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from engine_studies import TINY, records, start, tiny

from isthmus.errors import OutputError
from isthmus.study import (
    InProcess,
    LocalProcesses,
    Progress,
    StudyError,
    export_study,
    read_rows,
    run_study,
    study_status,
)


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
    table, text = export_study(finished, tmp_path)
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
    out, moments, kills = tmp_path / "out", random.Random(0), 0
    for _ in range(4):
        seen = len(list(out.glob("units/*.json")))
        run = start(study, out)
        # Wait for the start of the work, then strike at a random moment.
        while run.poll() is None and not (out / "plan.json").exists():
            time.sleep(0.05)
        time.sleep(moments.uniform(0.2, 4))
        if run.poll() is None:
            run.kill()
            kills += 1
        run.communicate()
        assert len(list(out.glob("units/*.json"))) >= seen
    last = start(study, out)
    _, errors = last.communicate()
    assert last.returncode == 0, errors.decode()
    assert kills > 0
    assert records(out) == records(finished)


@pytest.mark.slow
def test_workers_end_with_the_process_that_started_them(tmp_path: Path) -> None:
    study = tmp_path / "tiny.yaml"
    study.write_text(TINY, encoding="utf-8")
    run = start(study, tmp_path / "out", "--executor", "processes", "--workers", "1")
    children = Path(f"/proc/{run.pid}/task/{run.pid}/children")
    if not children.parent.exists():
        pytest.skip("needs /proc")
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
def test_two_ray_nodes_give_the_same_records_though_one_dies(finished: Path, tmp_path: Path) -> None:
    ray: Any = pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    from isthmus.study import OnRay

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    second = cluster.add_node(num_cpus=1)
    try:
        cluster.wait_for_nodes()
        dead: list[str] = []

        def kill(progress: Progress) -> None:
            if progress.unit is not None and not dead:
                cluster.remove_node(second, allow_graceful=False)
                dead.append(progress.unit.label)

        with OnRay(cluster.address, threads=1) as executor:
            assert executor.slots == 2
            assert len({n["NodeID"] for n in ray.nodes() if n["Alive"]}) == 2
            status = run_study(tiny(), tmp_path, executor=executor, on_progress=kill)
    finally:
        cluster.shutdown()
    assert dead
    assert status.finished
    assert records(tmp_path) == records(finished)
