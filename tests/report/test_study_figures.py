"""Figures of a study: summaries are right, and every file is written, the same at each run."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from isthmus.errors import DataError
from isthmus.report import write_study_figures
from isthmus.report._draw_study import CurvePanel, Scatter, _curves, _points, _title
from isthmus.report._study_summary import (
    PlaceMean,
    exponent,
    rank_correlation,
    summarise,
    summarise_lines,
    swept_columns,
)

FIXED: dict[str, Any] = {
    "width": 8.0,
    "depth": 2,
    "epochs": 3,
    "batch_size": 10,
    "family": "mlp",
    "optimiser": "sgd",
    "schedule": "cosine",
    "momentum": 0.9,
    "weight_decay": 0.0,
    "warmup_steps": 1,
    "precision": "float32",
    "initialisation": "torch",
    "network_settings": "{}",
    "data": "digits",
    "statistics": 10,
    "refresh": "none",
}


def rows(**changes: list[Any]) -> list[dict[str, Any]]:
    """Return rows whose dimension rises with the barrier."""
    found: list[dict[str, Any]] = []
    for rate in changes.get("learning_rate", [0.01, 0.1]):
        for pair in range(3):
            for method in ("none", "weights"):
                for split in ("train", "test"):
                    value = (0.1 + pair / 10) * rate * (2 if method == "none" else 1)
                    known = method == "weights"
                    found.append(
                        {
                            **FIXED,
                            "learning_rate": rate,
                            "seed_a": 2 * pair,
                            "seed_b": 2 * pair + 1,
                            "method": method,
                            "split": split,
                            "midpoint_loss": 1 + value,
                            "midpoint_accuracy": 0.9 - value,
                            "accuracy_a": 0.92,
                            "accuracy_b": 0.94,
                            "barrier": value,
                            "lmc_error_sup": 2 * value,
                            "loss_at": [0.9, 1 + value, 1.1],
                            "loss_a": 0.9,
                            "loss_b": 1.1,
                            "dimension": 10 * value if known else None,
                            "dimension_centred": 1 / value if known else None,
                        }
                    )
    return found


def svg_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draw in one format: the others show the same."""
    monkeypatch.setattr("isthmus.report._draw_study.FORMATS", ("svg",))


def text_of(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def test_all_figures_are_written_the_same_at_each_run(tmp_path: Path) -> None:
    first, second = (write_study_figures(rows(), tmp_path / name) for name in "ab")
    stems = ("midpoint", "barrier", "accuracy", "line", "dimension-uncentred", "dimension-centred")
    assert [p.name for p in first] == [f"{s}.{f}" for s in stems for f in ("png", "svg", "pdf")]
    for a, b in zip(first, second, strict=True):
        assert a.read_bytes() == b.read_bytes()
    svg = text_of(tmp_path / "a" / "barrier.svg")
    for words in ("no relabelling", "weights, both sides", "n = 3 pairs", "peak learning rate", "nats"):
        assert words in svg
    assert "accuracy at t = ½ (%)" in text_of(tmp_path / "a" / "accuracy.svg")
    listed = json.loads((tmp_path / "a" / "correlations.json").read_text())
    assert [(c["method"], c["dimension"], c["overall"]["value"]) for c in listed] == [
        ("weights", "dimension", pytest.approx(1.0)),
        ("weights", "dimension_centred", pytest.approx(-1.0)),
    ]
    assert listed[0]["within"]["value"] == pytest.approx(1.0)
    assert listed[0]["overall"]["n"] == 6


def test_what_else_is_swept_gets_figures_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    svg_only(monkeypatch)
    both = [{**r, "depth": d, "dimension": None, "dimension_centred": None} for d in (1, 2) for r in rows()]
    names = {p.stem for p in write_study_figures(both, tmp_path)}
    assert names == {f"{s}-{d}" for s in ("midpoint", "barrier", "accuracy", "line") for d in (1, 2)}
    assert not (tmp_path / "correlations.json").exists()


def test_widths_get_fitted_exponents_beside_the_theory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    svg_only(monkeypatch)
    wide = [
        {**r, "width": w, "barrier": r["barrier"] / w, "lmc_error_sup": r["lmc_error_sup"] * w**-0.25}
        for w in (8.0, 16.0, 32.0)
        for r in rows(learning_rate=[0.1])
    ]
    asked: list[tuple[list[float], float]] = []

    def rate(widths: Any, dimension: float) -> float:
        asked.append((list(widths), dimension))
        return -0.6

    write_study_figures(wide, tmp_path, rate=rate)
    assert "width^−1.00 ± 0.00" in text_of(tmp_path / "barrier.svg")
    assert "theory" not in text_of(tmp_path / "barrier.svg")
    # The bound of the error goes with the root of the squared distance; `none` has no dimension to go by.
    assert text_of(tmp_path / "error.svg").count("width^−0.25 ± 0.00 (theory −0.30)") == 2
    known = [r["dimension_centred"] for r in wide if r["width"] == 32 and r["method"] == "weights"]
    assert asked[0] == ([8.0, 16.0, 32.0], pytest.approx(sum(known) / len(known)))


def test_without_a_sweep_values_are_shown_method_by_method(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    svg_only(monkeypatch)
    one = [
        {**r, "refresh": how, "midpoint_accuracy": r["midpoint_accuracy"] / 2 if how == "none" else 0.91}
        for how in ("none", "batchnorm")
        for r in rows(learning_rate=[0.1])
        if r["seed_a"] == 0
    ]
    names = [p.stem for p in write_study_figures(one, tmp_path)]
    assert names == ["methods", "line", "line-batchnorm"]
    shown = text_of(tmp_path / "methods.svg")
    for words in (
        "as it is",
        "BatchNorm statistics recomputed",
        "one pair",
        "mean of the endpoints",
        "accuracy",
    ):
        assert words in shown


def test_states_as_they_are_and_refreshed_stand_side_by_side(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    svg_only(monkeypatch)
    both = [{**r, "refresh": how} for how in ("none", "batchnorm") for r in rows()]
    write_study_figures(both, tmp_path)
    shown = text_of(tmp_path / "accuracy.svg")
    assert "test, as it is" in shown
    assert "test, BatchNorm statistics recomputed" in shown
    assert len(json.loads((tmp_path / "correlations.json").read_text())) == 2


def test_epochs_from_zero_have_a_place_on_the_axis(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    svg_only(monkeypatch)
    times = [{**r, "epochs": e} for e in (0, 1, 32) for r in rows(learning_rate=[0.1])]
    write_study_figures(times, tmp_path)
    shown = text_of(tmp_path / "barrier.svg")
    assert "epochs of training" in shown
    assert all(f">{e}</text>" in shown for e in (0, 1, 32))


def test_no_rows(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="expected rows, found none"):
        write_study_figures([], tmp_path)


def test_means_and_standard_errors() -> None:
    table = [{"x": 2, "y": 1.0}, {"x": 2, "y": 3.0}, {"x": 1, "y": 5.0}, {"x": 1, "y": None}]
    assert summarise(table, "x", "y") == [PlaceMean(1.0, 5.0, None, 1), PlaceMean(2.0, 2.0, 1.0, 2)]
    assert summarise(table[:1], "x", lambda r: 2 * r["y"]) == [PlaceMean(2.0, 2.0, None, 1)]
    assert swept_columns(rows()) == ("learning_rate",)
    lines = [{"loss_at": [1.0, 2.0, 3.0]}, {"loss_at": [3.0, None, 5.0]}]
    assert summarise_lines(lines, "loss_at") == [
        PlaceMean(0.0, 2.0, 1.0, 2),
        PlaceMean(0.5, 2.0, None, 1),
        PlaceMean(1.0, 4.0, 1.0, 2),
    ]


def test_rank_correlation_within_strata_ignores_what_lies_between_them() -> None:
    # Between strata both rise together; within each, one falls as the other rises.
    x, y = [1, 2, 3, 11, 12, 13], [3, 2, 1, 13, 12, 11]
    pairs = [0, 1, 2, 0, 1, 2]
    overall = rank_correlation(x, y, pairs)
    within = rank_correlation(x, y, pairs, strata=[0, 0, 0, 1, 1, 1])
    assert overall.value is not None
    assert overall.value > 0.5
    assert within.value == pytest.approx(-1.0)
    assert within.low == pytest.approx(-1.0)
    assert within.n == 6


def test_two_pairs_give_no_interval() -> None:
    two = rank_correlation([1, 2, 3, 4], [1, 2, 3, 4], [0, 1, 0, 1])
    assert two.value == pytest.approx(1.0)
    assert two.low is None
    assert two.high is None


def test_rank_correlation_of_what_never_varies_is_undefined() -> None:
    assert rank_correlation([1, 1, 1], [1, 2, 3], [0, 1, 2]).value is None
    single = rank_correlation([1, 2, 3], [1, 2, 3], [0, 0, 0])
    assert (single.value, single.low) == (pytest.approx(1.0), None)


def test_exponent() -> None:
    points = [PlaceMean(x, 3 * x**-0.5, None, 1) for x in (1.0, 4.0, 9.0)]
    fitted = exponent(points)
    assert fitted is not None
    assert fitted == (pytest.approx(-0.5), pytest.approx(0.0, abs=1e-12))
    assert exponent(points[:2]) is None
    assert exponent([*points[:2], PlaceMean(3.0, 0.0, None, 1)]) is None
    assert exponent([*points, PlaceMean(99.0, 0.0, None, 1)]) is None
    assert not math.isnan(fitted[1])


@pytest.mark.parametrize("width", [4.8, 9.6, 14.4])
def test_titles_stay_within_the_figure(width: float) -> None:
    figures = pytest.importorskip("matplotlib.figure")
    backend = pytest.importorskip("matplotlib.backends.backend_agg")
    figure = figures.Figure((width, 4.0), layout="constrained")
    canvas = backend.FigureCanvasAgg(figure)
    figure.subplots()
    _title(
        figure,
        "Test loss along the line, BatchNorm statistics recomputed: mean over n = 4 pairs, MMMM $W$ " * 2,
    )
    canvas.draw()
    box = figure._suptitle.get_window_extent()
    assert box.x0 >= 0
    assert box.x1 <= figure.bbox.width
    assert box.y1 <= figure.bbox.height
    assert box.y0 > figure.axes[0].get_window_extent().y1


def test_a_barrier_of_zero_is_drawn_at_zero_even_on_a_logarithmic_axis() -> None:
    axes = pytest.importorskip("matplotlib.figure").Figure().subplots()
    curves = {"none": [(0.0, 0.0, 0.0), (1.0, 0.5, 0.1), (16.0, 0.2, None)]}
    _curves(axes, CurvePanel("test", "barrier", curves, {}, True), "epochs", ["none"])
    (line,) = axes.get_lines()
    assert line.get_ydata().tolist() == [0.0, 0.5, 0.2]
    assert axes.get_yscale() == axes.get_xscale() == "symlog"
    assert axes.get_ylim()[0] < 0
    labels = {text.get_text() for text in axes.get_yticklabels()}
    assert "0" in labels
    assert not any("$" in label for label in labels)


def test_a_scatter_draws_zero_at_zero_and_tells_places_apart() -> None:
    axes = pytest.importorskip("matplotlib.figure").Figure().subplots()
    panel = Scatter("covariance", "ρ", [3.0, 4.0, 5.0], [0.0, 0.5, 0.2], [0.0, 1.0, 32.0])
    drawn = _points(axes, panel, ("dimension", "barrier", "epochs"), [0.0, 1.0, 32.0])
    assert drawn.get_offsets()[:, 1].tolist() == [0.0, 0.5, 0.2]
    assert axes.get_yscale() == "symlog"
    assert drawn.get_array().tolist() == [0, 1, 2]
    assert (drawn.norm.vmin, drawn.norm.vmax) == (0, 2)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ((0.6, 6.0), {"1", "2", "5"}),
        ((2.0, 5.0), {"2", "3", "4", "5"}),
        ((0.02, 0.8), {"0.02", "0.05", "0.1", "0.2", "0.5"}),
        ((0.01, 5.0), {"0.01", "0.1", "1"}),
    ],
)
def test_short_logarithmic_axes_have_numbers_between_powers_of_ten(
    values: tuple[float, float], expected: set[str]
) -> None:
    figures = pytest.importorskip("matplotlib.figure")
    backend = pytest.importorskip("matplotlib.backends.backend_agg")
    figure = figures.Figure()
    axes = figure.subplots()
    curves: dict[str, list[tuple[float, float, float | None]]] = {
        "none": [(0.5, values[0], None), (1.0, values[1], None)]
    }
    _curves(axes, CurvePanel("test", "barrier", curves, {}, True), "width", ["none"])
    backend.FigureCanvasAgg(figure).draw()
    low, high = axes.get_ylim()
    shown = {
        text.get_text()
        for minor in (False, True)
        for text in axes.get_yticklabels(minor=minor)
        if low <= text.get_position()[1] <= high
    } - {""}
    assert shown == expected
    assert [text.get_text() for text in axes.get_xticklabels()] == ["0.5", "1"]
