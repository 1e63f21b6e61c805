"""A study trusts nothing that it finds: what is not proven is made anew, with a note, or refused by name."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from engine_studies import TINY, records, tiny

from isthmus.errors import CheckpointError, OutputError
from isthmus.study import (
    InProcess,
    StudyError,
    StudyStatus,
    check_continuation,
    export_study,
    read_rows,
    read_run,
    run_study,
    study_status,
)
from isthmus.study._evidence import checked_network, digests_of, refs_of, weigh
from isthmus.study._records import examine, seal, sealed
from isthmus.study._store import Store, read_json

SMALL = TINY.replace("seeds: 4", "seeds: 2").replace("stack: 3", "stack: 1").replace("points: 3", "points: 2")


def go_on(folder: Path, text: str = SMALL) -> StudyStatus:
    with InProcess(1) as executor:
        return run_study(tiny(text), folder, executor=executor)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study of two networks at each of two rates, trained one by one: four units, and two pairs."""
    folder = tmp_path_factory.mktemp("whole")
    assert go_on(folder).finished
    return folder


@pytest.fixture
def study(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "study"))


def units(folder: Path, kind: str) -> list[Any]:
    return [u for u in Store(folder).plan().units if u.kind == kind]


def place(folder: Path, kind: str, index: int = 0) -> Path:
    return folder / "units" / f"{units(folder, kind)[index].address}.json"


def edit(path: Path, change: Callable[[Any], Any]) -> None:
    value = json.loads(path.read_text())
    changed = change(value)
    path.write_text(json.dumps(value if changed is None else changed, indent=1, sort_keys=True) + "\n")


def better(record: Any) -> None:
    for row in record["result"].get("rows", ()):
        row["midpoint_loss"] = 0.0
    for network in record["result"].get("networks", ()):
        network["history"][-1]["loss"] = 0.0


DAMAGE: dict[str, tuple[Callable[[Path, Path], Any], str]] = {
    "empty object": (lambda p, _: p.write_text("{}"), "it is of no unit"),
    "a list": (lambda p, _: p.write_text("[1]"), "expected a record, found list"),
    "null": (lambda p, _: p.write_text("3"), "expected a record, found int"),
    "empty file": (lambda p, _: p.write_bytes(b""), "Expecting value"),
    "cut short": (lambda p, _: p.write_bytes(p.read_bytes()[: p.stat().st_size // 2]), ""),
    "no JSON": (lambda p, _: p.write_bytes(b"\xff\xfe\x00"), ""),
    "nested deep": (lambda p, _: p.write_text("[" * 100_000), "recursion"),
    "no result": (
        lambda p, _: edit(p, lambda r: {k: v for k, v in r.items() if k != "result"}),
        "digest does not fit",
    ),
    "another result": (lambda p, _: edit(p, better), "its digest does not fit"),
    "another seed": (
        lambda p, _: edit(p, lambda r: r["content"].update(code=1)),
        "it is of another unit, or changed",
    ),
    "of another unit": (lambda p, q: shutil.copyfile(q, p), "it is of another unit"),
    "another status": (lambda p, _: edit(p, lambda r: r.update(status="fine")), "it is incomplete"),
    "another commit": (
        lambda p, _: edit(p, lambda r: r.update(source={"commit": "0", "dirty": False})),
        "its digest",
    ),
    "sealed without a result": (
        lambda p, _: edit(p, lambda r: seal({**{k: v for k, v in r.items() if k != "digest"}, "result": {}})),
        "it holds no result of such a unit",
    ),
    "sealed without networks": (
        lambda p, _: edit(p, lambda r: seal({k: v for k, v in r.items() if k not in ("digest", "networks")})),
        "it does not say which networks",
    ),
    "no digest": (
        lambda p, _: edit(p, lambda r: {k: v for k, v in r.items() if k != "digest"}),
        "carries no digest",
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_records_are_made_anew_with_a_note(
    name: str, whole: Path, study: Path, caplog: pytest.LogCaptureFixture
) -> None:
    damage, reason = DAMAGE[name]
    damage(place(study, "train", 0), place(study, "train", 1))
    check_damage(name, reason, units(study, "train")[0], whole, study, caplog)


@pytest.mark.parametrize("name", ["another result", "of another unit", "no digest"])
def test_damaged_records_of_pairs_are_made_anew_too(
    name: str, whole: Path, study: Path, caplog: pytest.LogCaptureFixture
) -> None:
    damage, reason = DAMAGE[name]
    damage(place(study, "measure", 0), place(study, "measure", 1))
    check_damage(name, reason, units(study, "measure")[0], whole, study, caplog)


def check_damage(
    name: str, reason: str, unit: Any, whole: Path, study: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A damaged record is told, never read, and made anew the same, with a note."""
    before = study_status(study)
    if name == "no digest":
        assert before.finished
        assert "1 records carry no digest" in before.notes[0]
        with caplog.at_level(logging.WARNING):
            assert len(read_rows(study)) == 8
        assert "1 records carry no digest" in caplog.text
    elif name != "sealed without networks":
        assert not before.finished
        assert list(before.damaged) == [unit.label]
        for read in (read_rows, export_study):
            with pytest.raises(
                CheckpointError, match=rf"{unit.address}.json: expected the record of .*Run the study again"
            ):
                read(study)
    status = go_on(study)
    assert status.finished
    assert status.damaged == {}
    (note,) = status.notes
    assert note.startswith(f"made anew: {unit.label}: ")
    assert reason.lower() in note.lower()
    events = [json.loads(line) for line in (study / "events.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [e["message"] for e in events if e["status"] == "made anew"] == [note]
    assert records(study) == records(whole)


@pytest.mark.slow
def test_every_kind_of_record_is_checked(tmp_path: Path) -> None:
    text = SMALL.replace("dimension: false", "dimension: true")
    assert go_on(tmp_path, text).finished
    before, paths = records(tmp_path), sorted((tmp_path / "units").glob("*.json"))
    for path in paths:
        path.write_text("{}")
    status = go_on(tmp_path, text)
    assert len(status.notes) == len(paths)
    assert records(tmp_path) == before
    with pytest.raises(StudyError, match="no longer asks for: dimensions"):
        check_continuation(tiny(SMALL), tmp_path)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-10] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda p, q: flip(p), "was changed or damaged"),
        (lambda p, q: p.unlink(), "is lost"),
        (lambda p, q: shutil.copyfile(q, p), "was changed or damaged"),
        (lambda p, q: p.write_bytes(b""), "was changed or damaged"),
        (lambda p, q: p.write_bytes(p.read_bytes()[:100]), "was changed or damaged"),
    ],
    ids=["a flipped bit", "lost", "of another seed", "empty", "cut short"],
)
def test_damaged_networks_are_trained_anew(
    whole: Path, study: Path, damage: Callable[[Path, Path], Any], reason: str
) -> None:
    first, second = (Store(study).network(refs_of(unit)[0]) for unit in units(study, "train")[:2])
    damage(first, second)
    status = go_on(study)
    assert status.finished
    (note,) = status.notes
    assert note.startswith("made anew: train")
    assert f"{first.name} {reason}" in note
    assert records(study) == records(whole)
    assert go_on(study).notes == ()


def test_what_was_measured_on_another_network_is_measured_again(whole: Path, study: Path) -> None:
    """A training unit and its networks from elsewhere, whole in themselves: the pair was not measured on these."""
    unit = units(study, "train")[0]
    ref = refs_of(unit)[0]
    flip(Store(study).network(ref))
    edit(
        place(study, "train", 0),
        lambda r: seal(
            {k: v for k, v in r.items() if k != "digest"} | {"networks": digests_of(unit, Store(study))}
        ),
    )
    evidence = weigh(Store(study), Store(study).plan())
    assert unit.address in evidence.done
    assert set(evidence.faults.values()) == {
        f"the network {ref.file} that it measured is no longer the one there is"
    }
    status = go_on(study)
    assert {note.split()[2] for note in status.notes} == {"measure"}
    changed = {name for name, content in records(study).items() if content != records(whole)[name]}
    assert place(study, "measure", 0).name in changed


def test_a_network_that_comes_out_otherwise_is_measured_again(
    study: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On another machine training ends elsewhere; what was measured on a lost network is measured anew as well."""
    first = refs_of(units(study, "train")[0])[0]
    Store(study).network(first).unlink()
    from isthmus.study import _measure

    train = _measure.train_stacked

    def otherwise(*arguments: Any, **options: Any) -> Any:
        results = train(*arguments, **options)
        for result in results:
            for parameter in result.model.parameters():
                parameter.data.mul_(1.001)
        return results

    before = place(study, "measure", 0).read_text()
    monkeypatch.setattr(_measure, "train_stacked", otherwise)
    status = go_on(study)
    assert status.finished
    assert any("no longer the one there is" in note for note in status.notes)
    assert place(study, "measure", 0).read_text() != before
    assert weigh(Store(study), Store(study).plan()).faults == {}


def test_a_unit_does_not_read_a_network_that_changed_under_it(study: Path) -> None:
    store, unit = Store(study), units(study, "train")[0]
    ref = refs_of(unit)[0]
    assert checked_network(store, ref) == store.network(ref)
    flip(store.network(ref))
    with pytest.raises(
        CheckpointError, match=r"expected the network that its unit trained, SHA-256 .* Run the study again"
    ):
        checked_network(store, ref)
    store.network(ref).unlink()
    with pytest.raises(CheckpointError, match="found no file"):
        checked_network(store, ref)
    with pytest.raises(CheckpointError, match=r"cannot be read back. Check the disk"):
        digests_of(unit, store)
    place(study, "train", 0).write_text("{}")
    with pytest.raises(
        CheckpointError, match=r"expected the record of the unit that trained .*, with its digest, found none"
    ):
        checked_network(store, ref)


def test_a_store_of_an_earlier_version_is_read_with_a_note_and_made_anew(whole: Path, study: Path) -> None:
    for path in (study / "units").glob("*.json"):
        edit(path, lambda r: {k: v for k, v in r.items() if k not in ("digest", "networks")})
    edit(study / "plan.json", lambda p: {k: v for k, v in p.items() if k != "digest"})
    old = study_status(study)
    assert old.finished
    count = len(list((study / "units").glob("*.json")))
    assert old.notes == (
        f"{count} records carry no digest, because an earlier version made them: nothing shows that they were not "
        "changed. Running the study makes them anew.",
    )
    assert read_rows(study) == read_rows(whole)
    status = go_on(study)
    assert len(status.notes) == count
    assert records(study) == records(whole)


def test_failed_records_are_shown_and_tried_again(study: Path) -> None:
    path = place(study, "measure")
    edit(path, lambda r: r.update(status="failed", traceback="x\nValueError: no luck\n"))
    assert list(study_status(study).failed.values()) == ["ValueError: no luck"]
    for bad in (None, 3, "", "  \n"):
        edit(path, lambda r, bad=bad: r.update(traceback=bad))
        assert list(study_status(study).failed.values()) == ["no reason is recorded"]
    assert go_on(study).finished


@pytest.mark.parametrize(
    "change",
    [
        lambda plan: {},
        lambda plan: [],
        lambda plan: plan["units"][0]["content"]["networks"][0].update(seed=7),
        lambda plan: plan["units"][0].pop("needs"),
        lambda plan: plan.update(precision="bfloat16"),
        lambda plan: plan.update(units=3),
    ],
)
def test_a_plan_that_was_changed_is_refused_by_name(study: Path, change: Callable[[Any], Any]) -> None:
    before = (study / "study.yaml").read_bytes()
    edit(study / "plan.json", change)
    for use in (study_status, read_rows, export_study, go_on):
        with pytest.raises(
            CheckpointError,
            match=r"plan.json: expected the plan of a study.*Delete it and run the study again",
        ):
            use(study)
    assert (study / "study.yaml").read_bytes() == before
    (study / "plan.json").unlink()
    assert go_on(study).notes == ()


def test_timings_and_events_are_no_evidence_and_may_be_damaged(study: Path) -> None:
    for i, path in enumerate(sorted((study / "timings").iterdir())):
        path.write_bytes([b"{}", b"[]", b"\xff", b'{"seconds": "x"}', b'{"started": 1}', b""][i % 6])
    (study / "events.jsonl").write_bytes(b'3\n"unit"\n\xff\xfe\n[]\n' + b"[" * 100_000 + b"\n")
    assert study_status(study).finished
    run = read_run(study)
    assert run is not None
    assert run["cpu_seconds"] == 0
    next((study / "units").glob("*.json")).unlink()
    assert study_status(study).left is None


def test_exported_files_that_are_damaged(whole: Path, tmp_path: Path) -> None:
    table, _, took = export_study(whole, tmp_path)
    content = table.read_bytes()
    for damaged in (content[:-1], content[:100], b"", b"PAR1PAR1"):
        table.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=r"records.parquet: truncated or not a table of records"):
            read_rows(tmp_path)
    parquet, arrow = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
    parquet.write_table(arrow.table({"a": [1]}), table)
    with pytest.raises(CheckpointError, match="found a table without accuracy_at, barrier"):
        read_rows(tmp_path)
    for text, message in (("[", "cannot be read"), ("[]", "expected what a run took, found list")):
        took.write_text(text)
        with pytest.raises(CheckpointError, match=message):
            read_run(tmp_path)
    took.unlink()
    assert read_run(tmp_path) is None


def test_large_files_are_not_read(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("[1, 2, 3]")
    assert read_json(tmp_path / "a.json", 9) == [1, 2, 3]
    with pytest.raises(CheckpointError, match=r"a.json: cannot be read: it has more than 8 bytes"):
        read_json(tmp_path / "a.json", 8)


def test_seals() -> None:
    value = seal({"a": 1, "b": [2.5, None]})
    assert sealed(value)
    assert sealed(json.loads(json.dumps(value)))
    assert not sealed({**value, "a": 2})
    assert not sealed({"a": 1})
    assert not sealed({**value, "a": float("nan")})
    assert examine(None, None).record is None  # type: ignore[arg-type]


# --- Another study in the folder ---------------------------------------------------------------------------


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            SMALL.replace("name: tiny", "name: other"),
            "holds the study 'tiny', not 'other'. Give another folder with --out",
        ),
        (SMALL.replace("width: 12", "width: 13"), "no longer asks for: train mlp 12 × 2 on digits"),
        (SMALL.replace("[0.01, 0.1]", "[0.1, 0.5]"), "epochs, learning rate 0.01, seeds 0"),
        (SMALL.replace("[none, weights]", "[none]"), "method weights, refresh none"),
        (SMALL.replace("epochs: 2", "epochs: 3"), "They would be missing from its tables. Ask for them too"),
        (SMALL.replace("seeds: 2", "seeds: [0, 5]"), "learning rate 0.01, seeds 1"),
        (SMALL.replace("train: 200}", "train: 200, normalise: train}"), "no longer asks for: train mlp"),
    ],
)
def test_another_study_in_the_folder_is_refused_and_nothing_is_touched(
    study: Path, text: str, message: str
) -> None:
    export_study(study)
    before = contents(study)
    with pytest.raises(StudyError, match=message) as caught:
        go_on(study, text)
    assert str(study / "study.yaml") in str(caught.value)
    assert contents(study) == before


@pytest.mark.parametrize(
    "text",
    [
        SMALL.replace("seeds: 2", "seeds: 4"),
        SMALL.replace("[0.01, 0.1]", "[0.01, 0.1, 0.2]"),
        SMALL.replace("[none, weights]", "[none, weights, weights-incoming]"),
        SMALL.replace("points: 3", "points: 5"),
        SMALL.replace("name: tiny", "name: tiny\ndescription: the same"),
        SMALL.replace("stack: 1", "stack: 3"),
        SMALL + "max_units: 100\n",
        SMALL.replace("seeds: 2", "seeds: 3\npairs: all"),
    ],
)
def test_a_study_that_has_grown_goes_on(study: Path, text: str) -> None:
    check_continuation(tiny(text), study)


def test_more_seeds_add_their_pairs_and_keep_what_is_there(whole: Path, study: Path) -> None:
    assert go_on(study, SMALL.replace("seeds: 2", "seeds: 4")).finished
    assert records(study).items() >= records(whole).items()
    assert {row["seed_a"] for row in read_rows(study)} == {0, 2}


def test_where_nothing_is_recorded_any_study_of_the_name_may_run(study: Path) -> None:
    for path in (study / "units").iterdir():
        path.unlink()
    check_continuation(tiny(SMALL.replace("width: 12", "width: 13")), study)
    with pytest.raises(StudyError, match="holds the study"):
        check_continuation(tiny(SMALL.replace("name: tiny", "name: other")), study)
    check_continuation(tiny(SMALL), study / "nowhere")
    with pytest.raises(OutputError, match="Cannot write to the study's folder"):
        go_on(study / "study.yaml" / "inside")
