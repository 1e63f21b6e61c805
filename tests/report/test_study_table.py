"""Tables and page of a study, from rows alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from isthmus.errors import DataError, OutputError
from isthmus.report import barrier_tables, write_study_report
from isthmus.study import read_rows, read_run

RESULTS = Path(__file__).parents[2] / "results"


def test_means_and_deviations_are_those_of_the_rows() -> None:
    rows = read_rows(RESULTS / "paper-mnist")
    (table,) = barrier_tables(rows)
    assert (table.swept, table.split, table.about) == ("learning_rate", "test", "")
    assert [row.place for row in table.rows] == sorted({row["learning_rate"] for row in rows})
    for place in table.rows:
        for method in table.methods:
            part = [
                r
                for r in rows
                if (r["learning_rate"], r["method"], r["split"]) == (place.place, method, "test")
            ]
            values = [r["barrier"] for r in part]
            found = place.barriers[method]
            assert found.n == place.pairs == len(values) == 4
            assert found.mean == pytest.approx(np.mean(values), rel=1e-12)
            assert found.deviation == pytest.approx(np.std(values, ddof=1), rel=1e-12)
        ends = [(r["loss_a"] + r["loss_b"]) / 2 for r in part]
        assert place.loss is not None
        assert place.loss.mean == pytest.approx(np.mean(ends), rel=1e-12)
    assert table.to_dict()["rows"][0]["barriers"]["none"]["n"] == 4


def test_each_combination_and_refresh_has_a_table_of_its_own() -> None:
    tables = barrier_tables(read_rows(RESULTS / "cifar10-resnet-cpu"))
    assert [t.about for t in tables] == ["", "refresh: batchnorm"]
    assert all(s.deviation is None and s.n == 1 for t in tables for r in t.rows for s in r.barriers.values())
    assert [t.about for t in barrier_tables(read_rows(RESULTS / "width"))] == [
        "hidden layers: 1",
        "hidden layers: 3",
    ]


def test_values_that_are_missing_are_left_out() -> None:
    rows: list[dict[str, Any]] = [dict(r) for r in read_rows(RESULTS / "depth")]
    for row in rows:
        row["accuracy_a"] = None
        if row["method"] == "weights":
            row["barrier"] = None
    (table,) = barrier_tables(rows)
    assert all(row.accuracy is None and "weights" not in row.barriers for row in table.rows)
    for empty in ([], [r for r in rows if r["split"] == "train"]):
        with pytest.raises(
            DataError, match=r"expected rows of the split 'test', found none. Has a pair been measured"
        ):
            barrier_tables(empty)


def test_the_page_holds_table_figures_and_notes_and_escapes_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("isthmus.report._draw_study.FORMATS", ("png",))  # the page holds no others
    rows = [dict(r) for r in read_rows(RESULTS / "depth") if r["method"] in ("none", "weights")]
    for row in rows:
        row["study"] = "<script>alert(1)</script>"
    page = write_study_report(
        rows, tmp_path / "new", run=read_run(RESULTS / "depth"), notes=["<b>one</b> pair is missing"]
    )
    text = page.read_text(encoding="utf-8")
    assert page == tmp_path / "new" / "study.html"
    assert "<script>" not in text
    assert "&lt;script&gt;alert(1)" in text
    assert "&lt;b&gt;one&lt;/b&gt; pair is missing" in text
    assert text.count("data:image/png;base64,") >= 4
    assert "0.314 ± 0.015" in text
    assert "name: depth" in text
    assert [p.name for p in page.parent.iterdir()] == ["study.html"]


def test_a_page_without_rows_or_place(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="Study report: expected rows, found none"):
        write_study_report([], tmp_path)
    (tmp_path / "file").write_text("")
    rows = read_rows(RESULTS / "depth")
    few = [r for r in rows if r["method"] == "none"]
    with pytest.raises(OutputError, match=r"Writing the report to .*: .*Choose a folder that can be written"):
        write_study_report(few, tmp_path / "file" / "inside")
