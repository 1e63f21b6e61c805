"""What surrounds the benchmark of assignment: the peers' process, the fitted growth, the page, the short set."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from benchmarks import __main__ as short
from benchmarks.assignment_page import MARKER, draw_growth, exponents, tables

from isthmus.transport import assign

ROOT = Path(__file__).parent.parent.parent


def test_the_page_shows_the_stored_record() -> None:
    record = json.loads((ROOT / "benchmarks/results/assignment.json").read_text(encoding="utf-8"))
    page = (ROOT / "docs/assignment.md").read_text(encoding="utf-8")
    assert tables(record) in page.partition(MARKER)[2]
    for (_, _), (slope, _) in exponents(record, "seconds").items():
        assert f"| {slope:.2f} |" in page


def test_every_stored_value_is_that_of_scipy() -> None:
    record = json.loads((ROOT / "benchmarks/results/assignment.json").read_text(encoding="utf-8"))
    for row in record["cold"]:
        assert abs(row["value_minus_scipy"]["isthmus"]) < 1e-6 * row["rows"]


def test_exponents_of_a_power_law(tmp_path: Path) -> None:
    row = {"kind": "gaussian", "extra_bytes": {}}
    record = {
        "cold": [
            {**row, "width": n, "seconds": {"isthmus": 3e-9 * n**2.0, "scipy": n**3.0}} for n in (4, 8, 32)
        ]
    }
    found = exponents(record, "seconds")
    assert found["gaussian", "isthmus"][0] == pytest.approx(2.0, abs=1e-9)
    assert found["gaussian", "scipy"][0] == pytest.approx(3.0, abs=1e-9)
    assert exponents(record, "extra_bytes") == {}
    draw_growth(record, tmp_path / "growth")
    assert (tmp_path / "growth.png").stat().st_size > 1000
    assert "<svg" in (tmp_path / "growth.svg").read_text(encoding="utf-8")


def test_the_worker_solves_and_says_what_failed(tmp_path: Path) -> None:
    costs = np.random.default_rng(0).standard_normal((30, 30))
    np.save(tmp_path / "costs.npy", costs)
    requests = [
        {"task": "assignment", "solver": "scipy", "matrix": str(tmp_path / "costs.npy")},
        {"task": "assignment", "solver": "none", "matrix": str(tmp_path / "costs.npy")},
        {"task": "versions"},
    ]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.peers_worker"],
        cwd=ROOT,
        input="".join(json.dumps(r) + "\n" for r in requests),
        capture_output=True,
        text=True,
        check=True,
    )
    solved, failed, versions = map(json.loads, done.stdout.splitlines())
    assert solved["value"] == pytest.approx(assign(costs).value, rel=1e-12)
    assert solved["seconds"] >= 0.0
    assert failed["error"] == "KeyError: 'none'"
    assert versions["versions"]["numpy"] == np.__version__
    assert set(versions["versions"]) | set(versions["missing"]) == {
        "numpy",
        "scipy",
        "lapx",
        "POT",
        "rebasin",
    }


def test_the_short_set_says_where_results_are_and_what_failed(tmp_path, monkeypatch, capfd) -> None:
    assert set(short.SHORT) <= set(short.NAMES)
    monkeypatch.setattr(short, "RESULTS", tmp_path)
    monkeypatch.setattr(short, "SHORT", {"theory_tables": ""})
    assert short.run_short() == 0
    assert f"Results are in {tmp_path}.\n" in capfd.readouterr().out
    monkeypatch.setattr(short, "SHORT", {"theory_tables": "no-such-folder"})
    assert short.run_short() == 1
    assert "Failed: theory_tables." in capfd.readouterr().out


def test_an_unknown_benchmark_is_refused_with_the_list(monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", ["benchmarks", "nothing"])
    with pytest.raises(SystemExit, match="2"):
        short.main()
    assert "  assignment" in capsys.readouterr().out
