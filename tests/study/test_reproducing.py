"""The page that is made from stored results says what the records say."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from engine_studies import TINY, tiny

from isthmus.study import InProcess, export_study, read_rows, run_study

DOCS = Path(__file__).parents[2] / "docs"

pytestmark = pytest.mark.skipif(not (DOCS / "make_reproducing.py").is_file(), reason="needs the docs folder")

SMALL = TINY.replace("dimension: false", "dimension: true")


@pytest.fixture
def make(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.syspath_prepend(str(DOCS))
    yield importlib.import_module("make_reproducing")
    for name in ("make_reproducing", "reproducing_others", "reproducing_text"):
        sys.modules.pop(name)


@pytest.fixture
def others(make: Any) -> Any:
    return sys.modules["reproducing_others"]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reproducing")
    with InProcess(1) as executor:
        assert run_study(tiny(SMALL), folder / "run", executor=executor).finished
    out = folder / "results" / "tiny"
    out.mkdir(parents=True)
    export_study(folder / "run", out)
    figures = out / "figures"
    figures.mkdir()
    for name in ("barrier.png", "barrier.svg", "dimension-centred.png", "other.png"):
        (figures / name).write_bytes(b"")
    return folder / "results"


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def test_every_number_comes_from_the_records(make: Any, results: Path) -> None:
    page = "\n".join(make.page(results))
    rows = [r for r in read_rows(results / "tiny") if r["split"] == "test" and r["learning_rate"] == 0.1]
    for column, scale, decimals in (
        ("midpoint_loss", 1, 3),
        ("barrier", 1, 3),
        ("midpoint_accuracy", 100, 1),
        ("dimension", 1, 1),
    ):
        for method in ("none", "weights"):
            found = [scale * r[column] for r in rows if r["method"] == method and r[column] is not None]
            if (column, method) == ("dimension", "none"):
                assert found == []
            else:
                assert f"| {mean(found):.{decimals}f} ± " in page
    assert "| [tiny](#tiny) | 4 | 15 of 15 |" in page
    assert "2 pair(s) of seeds at each place; activations compared on 200 training images" in " ".join(
        page.split()
    )
    assert "| weights | " in page.partition("Spearman's correlation")[2]
    assert max(len(line) for line in page.splitlines() if not line.startswith(("|", "*", "!"))) <= 118


def test_methods_that_lose_from_width_are_named(make: Any) -> None:
    errors = {
        "weights": {32: (3.0, 3.2), 64: (1.0, 1.2), 128: (2.0, 2.2)},
        "covariance": {32: (3.0,), 64: (2.0,)},
    }
    rows = [
        {"method": method, "width": width, "lmc_error_sup": value}
        for method, places in errors.items()
        for width, values in places.items()
        for value in values
    ]
    text = " ".join("\n".join(make.turning(rows)).split())
    assert text.endswith(": `weights` has its least error, 1.10, at width 64 and 2.10 at 128.")
    assert list(make.turning([r for r in rows if r["method"] == "covariance"])) == []
    # 1.5 and 2.1 are six standard errors of 0.1 apart, 1.8 and 2.1 only three, and four are wanted.
    for rise, some in ((0.4, True), (0.7, False)):
        near = [{**r, "lmc_error_sup": r["lmc_error_sup"] + rise * (r["width"] == 64)} for r in rows]
        assert bool(list(make.turning(near))) is some


def test_the_sign_of_an_interval_says_what_goes_with_what(make: Any) -> None:
    ends = {
        "weights": (0.2, 0.9),
        "covariance": (-0.9, -0.2),
        "activations": (-0.1, 0.3),
        "none": (None, None),
    }
    found = [{"method": m, "overall": {"low": low, "high": high}} for m, (low, high) in ends.items()]
    text = " ".join("\n".join(make.directions(found, "learning rate")).split())
    assert text.startswith(
        "Over learning rate and pairs, a larger dimension goes with a larger barrier for `weights`; a larger "
        "dimension goes with a smaller barrier for `covariance`; the interval holds zero for `activations`."
    )


def test_figures_are_shown_and_linked(make: Any, results: Path) -> None:
    page = "\n".join(make.page(results))
    assert "![Barrier](" in page
    assert "tiny/figures/barrier.png)" in page
    assert "As [SVG](" in page
    assert "Approximate dimension against barrier (centred)" in page
    assert "With fewer than three pairs of seeds there are no intervals." in page
    assert "other.png" not in page


def test_the_authors_figure_is_compared_point_by_point(others: Any, tmp_path: Path) -> None:
    """Rows that repeat the authors' values agree everywhere; worse ones are named."""
    rows = [
        {
            "method": method,
            "split": "test",
            "learning_rate": rate,
            "midpoint_loss": value,
            "loss_a": others.AUTHORS["endpoints"][k],
            "loss_b": others.AUTHORS["endpoints"][k],
            "precision": "float32",
        }
        for method, values in {**others.AUTHORS, "none": others.AUTHORS["endpoints"]}.items()
        if method != "endpoints"
        for k, (rate, value) in enumerate(zip(others.RATES, values, strict=True))
        for _ in range(2)
    ]
    same = " ".join("\n".join(others.against_authors(rows, tmp_path)).split())
    assert "24 of 24 of the authors' values lie in the range of our pairs" in same
    assert "24 of 24 of our means lie within 10 % of theirs." in same
    assert "Its share was not measured." in same
    # Covariance and activations share their value at 0.1, so 17 of the 18 comparisons have a winner.
    assert "in 17 of 17 comparisons" in same
    assert "Not so" not in same
    worse = [
        {**r, "midpoint_loss": 2.0} if (r["method"], r["learning_rate"]) == ("activations", 1e-4) else r
        for r in rows
    ]
    other = " ".join("\n".join(others.against_authors(worse, tmp_path)).split())
    assert "23 of 24 of the authors' values" in other
    assert "the others: activations at 0.0001 (2.000 to 2.000 / 1.22). 23 of 24 of our means" in other
    assert "Farther: activations at 0.0001: +64 %" in other
    assert "in 16 of 17 comparisons" in other
    assert "Not so: covariance − activations at 0.0001: ours -0.650, theirs +0.130." in other


def test_the_share_of_biases_is_that_of_its_record(others: Any, tmp_path: Path) -> None:
    rows = [
        {"learning_rate": rate, "library": 0.5, "with_bias": 0.5 + 1e-7, "without_bias": 0.5 + change}
        for rate, change in ((0.1, -0.01), (0.1, -0.03), (0.3, 0.01))
    ]
    (tmp_path / "biases.json").write_text(json.dumps(rows), encoding="utf-8")
    (text,) = others.biases_explained(others.read_biases(tmp_path))
    assert "agrees with it to 1e-07 on every pair" in text
    assert "by -0.020 to +0.010, most at 0.1: -0.020 ± 0.010." in text


def test_matching_with_biases_by_hand_gives_what_the_library_gives(tmp_path: Path) -> None:
    script = DOCS.parent / "examples" / "paper_biases.py"
    subprocess.run(
        [sys.executable, str(script)],
        check=True,
        capture_output=True,
        cwd=tmp_path,
        env={**os.environ, "ISTHMUS_SMOKE": "1"},
    )
    rows = json.loads((tmp_path / "biases.json").read_text(encoding="utf-8"))
    assert len(rows) == 2
    for row in rows:
        assert row["with_bias"] == pytest.approx(row["library"], rel=1e-5)
    assert any(row["without_bias"] != pytest.approx(row["with_bias"], rel=1e-3) for row in rows)


def test_midpoint_accuracies_stand_beside_published_ones(others: Any) -> None:
    accuracies = {("none", "none"): 0.1, ("correlation", "none"): 0.2, ("correlation", "batchnorm"): 0.6}
    rows = [
        {
            "family": "resnet20",
            "width": 0.5,
            "method": method,
            "refresh": refresh,
            "split": "test",
            "epochs": 12,
            "midpoint_accuracy": value,
            "accuracy_a": 0.8,
            "accuracy_b": 0.7,
        }
        for (method, refresh), value in accuracies.items()
    ]
    page = "\n".join(others.against_published(rows))
    assert "| resnet20, width 0.5 | 10.0 | 20.0 | 60.0 | 75.0 |" in page
    assert "| *ResNet-20, width 1, published* | | *12.7* | *67.6* | *93.6* |" in page
    assert "VGG" not in page


def test_what_is_measured_at_a_single_place_stands_in_one_table(make: Any) -> None:
    rows = [
        {
            "method": method,
            "refresh": refresh,
            "split": "test",
            "learning_rate": 0.05,
            "midpoint_loss": loss,
            "barrier": loss - 1,
            "midpoint_accuracy": accuracy,
            "loss_a": 0.9,
            "loss_b": 1.1,
            "accuracy_a": 0.6,
            "accuracy_b": 0.7,
        }
        for method, refresh, loss, accuracy in (
            ("none", "none", 2.5, 0.1),
            ("none", "batchnorm", 2.25, 0.2),
            ("weights", "none", 2.0, 0.3),
            ("weights", "batchnorm", 1.5, 0.4),
        )
    ]
    assert list(make.tables(rows, "learning_rate", "family: vgg16_bn")) == [
        "**Test, family: vgg16_bn**",
        "",
        "| method | Midpoint loss | Midpoint loss, BatchNorm reset | Barrier | Barrier, BatchNorm reset "
        "| Midpoint accuracy (%) | Midpoint accuracy (%), BatchNorm reset |",
        "| --- | --- | --- | --- | --- | --- | --- |",
        "| endpoints | 1.000 | 1.000 |  |  | 65.0 | 65.0 |",
        "| none | 2.500 | 2.250 | 1.500 | 1.250 | 10.0 | 20.0 |",
        "| weights | 2.000 | 1.500 | 1.000 | 0.500 | 30.0 | 40.0 |",
        "",
    ]


def test_no_results(make: Any, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"no folder with records\.parquet"):
        list(make.page(tmp_path))
