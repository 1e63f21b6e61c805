"""Studies that match by more than permutations: the setting, the rows, tables and figures, and studies of old."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from engine_studies import TINY, tiny

from isthmus.report import barrier_tables, write_study_figures, write_study_report
from isthmus.study import InProcess, StudyError, make_plan, read_rows, run_study, study_status
from isthmus.study._config import matchings
from isthmus.study._plan import address_of
from isthmus.study._sinks import scalars_of
from isthmus.study._store import Store

SMALL = TINY.replace("[0.01, 0.1]", "0.1").replace("seeds: 4", "seeds: 2")
BOTH = SMALL.replace("points: 3", "points: 3, symmetry: [permutations, all]")


def run(text: str, folder: Path) -> list[dict[str, Any]]:
    with InProcess(1) as executor:
        status = run_study(tiny(text), folder, executor=executor)
    assert status.finished, status.failed
    return read_rows(folder)


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("both")
    run(BOTH, folder)
    return folder


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("all", ("all",)),
        ("[all]", ("all",)),
        ("[permutations, 'signed, positive']", ("permutations", "signed,positive")),
        ("[permutations, [signed, positive]]", ("permutations", "signed,positive")),
        ("permutations", ("permutations",)),
    ],
)
def test_one_symmetry_or_a_list(written: str, expected: tuple[str, ...]) -> None:
    assert tiny(SMALL.replace("points: 3", f"points: 3, symmetry: {written}")).measure.symmetry == expected


@pytest.mark.parametrize(
    ("written", "message"),
    [
        (
            "[permutations, mirrors]",
            "expected permutations, all, or classes among permutation, signed, .*with commas",
        ),
        ("[]", "expected at least one entry, each once, found"),
        ("[all, all]", "expected at least one entry, each once, found"),
        ("['signed,positive', [signed, positive]]", "expected at least one entry, each once, found"),
        ("{all: yes}", r"expected a valid tuple, found"),
        ("true", "expected a number or text, found True"),
        ("[3]", "expected a valid string, found 3"),
    ],
)
def test_faults_name_what_is_allowed(written: str, message: str) -> None:
    with pytest.raises(StudyError, match=f"line 6: measure.symmetry.*: {message}"):
        tiny(SMALL.replace("points: 3", f"points: 3, symmetry: {written}").replace("stack: 3\n", ""))


def test_studies_of_permutations_have_the_addresses_and_rows_of_old(tmp_path: Path, both: Path) -> None:
    plans = [
        make_plan(tiny(text), None)
        for text in (SMALL, SMALL.replace("points: 3", "points: 3, symmetry: permutations"))
    ]
    assert plans[0] == plans[1]
    (unit,) = [u for u in plans[0].units if u.kind == "measure"]
    assert unit.content["measure"] == {"methods": ["none", "weights"], "points": 3, "refresh": ["none"]}
    assert unit.address == address_of(unit.content)
    plain = run(SMALL, tmp_path)
    assert all("symmetry" not in row for row in plain)
    (record,) = [json.loads(p.read_text()) for p in (tmp_path / "units").glob(f"{unit.address}.json")]
    assert not any({"symmetry", "couplings"} & row.keys() for row in record["result"]["rows"])
    new = {(r["method"], r["split"]): r for r in read_rows(both) if r["symmetry"] != "all"}
    for row in plain:
        again = new[row["method"], row["split"]]
        assert {k: v for k, v in again.items() if k not in ("symmetry", "unit")} == {
            k: v for k, v in row.items() if k != "unit"
        }


def test_every_method_is_measured_by_every_symmetry(both: Path) -> None:
    rows = read_rows(both)
    assert [(r["method"], r["symmetry"]) for r in rows if r["split"] == "test"] == [
        ("none", "none"),
        ("weights", "permutations"),
        ("weights", "all"),
    ]
    barriers = {r["symmetry"]: r["barrier"] for r in rows if r["split"] == "test"}
    assert len(set(barriers.values())) == 3
    store = Store(both)
    (unit,) = [u for u in store.plan().units if u.kind == "measure"]
    record = store.record_of(unit)
    assert record is not None
    kinds = {
        row["symmetry"]: {c["kind"] for c in row["couplings"].values()} for row in record["result"]["rows"]
    }
    assert kinds == {"none": set(), "permutations": {"permutation"}, "all": {"scales"}}
    scaled = [
        c for row in record["result"]["rows"] if row["symmetry"] == "all" for c in row["couplings"].values()
    ]
    assert all(c["similarity"][0] < c["similarity"][1] and c["factors"][0] > 0 for c in scaled)
    names = {s.series.rpartition("/")[2] for s in scalars_of(unit, record)}
    assert names == {"none", "weights", "weights, all"}


def test_tables_figures_and_page_show_them_apart(
    both: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("isthmus.report._draw_study.FORMATS", ("svg",))  # the others show the same
    rows = read_rows(both)
    (table,) = barrier_tables(rows)
    assert table.methods == ("none", "weights", "weights, all")
    assert len({spread.mean for spread in table.rows[0].barriers.values()}) == 3
    page = write_study_report(rows, tmp_path).read_text(encoding="utf-8")
    assert "weights, both sides (all)" in page
    drawn = write_study_figures(rows, tmp_path / "figures")
    assert any("weights, both sides (all)" in p.read_text("utf-8") for p in drawn if p.suffix == ".svg")


def test_symmetries_may_be_added_and_not_left_out(both: Path, tmp_path: Path) -> None:
    before = {p.name: p.read_bytes() for p in (both / "units").iterdir()}
    run(BOTH, both)
    assert {p.name: p.read_bytes() for p in (both / "units").iterdir()} == before
    with pytest.raises(
        StudyError, match=r"no longer asks for: measure .*, method weights, symmetry all, refresh none"
    ):
        run(SMALL, both)
    run(SMALL, tmp_path)
    trained = {p.name for p in (tmp_path / "networks").iterdir()}
    rows = run(BOTH, tmp_path)
    assert {p.name for p in (tmp_path / "networks").iterdir()} == trained
    assert {r["symmetry"] for r in rows} == {"none", "permutations", "all"}


def test_a_record_that_lacks_a_symmetry_is_no_record_of_the_unit(both: Path, tmp_path: Path) -> None:
    from isthmus.study._records import examine, seal

    store = Store(both)
    (unit,) = [u for u in store.plan().units if u.kind == "measure"]
    record = {k: v for k, v in (store.record_of(unit) or {}).items() if k != "digest"}
    assert examine(seal(record), unit).proven
    rows = [row for row in record["result"]["rows"] if row["symmetry"] != "all"]
    short = {**record, "result": {**record["result"], "rows": rows}}
    assert examine(seal(short), unit).fault == "it holds no result of such a unit"
    assert study_status(both).damaged == {}


def test_matchings_are_methods_by_symmetries() -> None:
    assert list(matchings({"methods": ["weights", "none"]})) == [
        ("weights", "permutations"),
        ("none", "none"),
    ]
    found = matchings({"methods": ["none", "weights"], "symmetry": ["all", "signed"]})
    assert list(found) == [("none", "none"), ("weights", "all"), ("weights", "signed")]
