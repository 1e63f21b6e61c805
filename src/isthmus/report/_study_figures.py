"""From the rows of a study to its figures; see :func:`write_study_figures`."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from isthmus.errors import DataError
from isthmus.report._draw_study import CurvePanel, Scatter, write_curves, write_scatter
from isthmus.report._format import label
from isthmus.report._study_summary import (
    Correlation,
    Point,
    exponent,
    rank_correlation,
    summarise,
    swept_columns,
)

__all__ = ["correlations", "write_study_figures"]

Row = Mapping[str, Any]

_AXES = {
    "learning_rate": "highest learning rate",
    "width": "width",
    "depth": "hidden layers",
    "epochs": "epochs of training",
    "batch_size": "batch size",
    "momentum": "momentum",
    "weight_decay": "weight decay",
    "warmup_steps": "warm-up steps",
    "statistics": "examples of the statistics",
}
_DIMENSIONS = {"dimension": "uncentred", "dimension_centred": "centred"}


def write_study_figures(rows: Sequence[Row], folder: str | Path) -> list[Path]:
    """Draw everything a study's rows hold, one set of figures for each combination of what else was swept.

    ``midpoint-…`` and ``barrier-…``: loss at the midpoint and barrier against the first swept number (learning
    rate, width, depth, epochs, …), train and test, mean over pairs with a band of one standard error; the
    dotted line is the mean of the endpoints. ``dimension-…``: approximate dimension against test barrier with
    Spearman's correlation. Every figure as PNG, SVG and PDF; ``correlations.json`` beside them.

    Args:
        rows: as :func:`isthmus.study.read_rows` returns them.
        folder: where to; made if need be.

    Returns:
        The paths of the figures.

    Raises:
        DataError: no rows.
        MissingExtraError: matplotlib is not installed.
        OutputError: a file cannot be written.
    """
    if not rows:
        raise DataError("Study figures: expected rows, found none. Has a pair been measured?")
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    swept = swept_columns(rows)
    x = next((c for c in swept if c in _AXES), "learning_rate")
    others = [c for c in (*swept, "refresh") if c != x]
    paths: list[Path] = []
    listed: list[dict[str, Any]] = []
    for chosen, part in _split(rows, others).items():
        about = ", ".join(f"{c} {v}" for c, v in zip(others, chosen, strict=True) if v != "none")
        name = "-".join(str(v) for v in chosen if v != "none")
        paths += _curve_figures(part, x, about, name, target)
        for column in _DIMENSIONS:
            found = correlations(part, x, column)
            listed += [{"figure": name, "dimension": column, **c} for c in found]
            paths += _scatter_figure(part, x, column, found, about, name, target)
    if listed:
        (target / "correlations.json").write_text(json.dumps(listed, indent=1) + "\n", encoding="utf-8")
    return paths


def correlations(rows: Sequence[Row], x: str, column: str) -> list[dict[str, Any]]:
    """Return, per method, how a dimension's rank goes with that of the test barrier.

    Args:
        rows: of one combination of what was swept beside ``x``.
        x: the swept column.
        column: ``"dimension"`` or ``"dimension_centred"``.

    Returns:
        Per method with dimensions: ``overall`` (over all places and pairs) and ``within`` (at fixed ``x``, ranks
        within each place, pooled), each as value, low, high (95 % bootstrap over pairs of seeds) and n.
    """
    found: list[dict[str, Any]] = []
    for method, part in _split(_test(rows), ["method"]).items():
        known = [r for r in part if r[column] is not None]
        if len(known) < 3:
            continue
        dimension, barrier = [r[column] for r in known], [r["barrier"] for r in known]
        pairs = [(r["seed_a"], r["seed_b"]) for r in known]
        overall = rank_correlation(dimension, barrier, pairs)
        within = rank_correlation(dimension, barrier, pairs, strata=[r[x] for r in known])
        found.append({"method": method[0], "overall": vars(overall), "within": vars(within)})
    return found


def _curve_figures(rows: Sequence[Row], x: str, about: str, name: str, folder: Path) -> list[Path]:
    methods = list(dict.fromkeys(r["method"] for r in rows))
    splits = sorted({r["split"] for r in rows}, reverse=True)
    paths: list[Path] = []
    for column, title, y in (
        ("midpoint_loss", "Loss at the midpoint", "loss at t = ½ (nats per example)"),
        ("barrier", "Barrier", "barrier (nats per example)"),
    ):
        panels = [_panel(rows, x, column, y, split, methods) for split in splits]
        counts = {p.n for s in splits for m in methods for p in _points(rows, x, column, s, m)}
        n = f"n = {min(counts)} pairs" if len(counts) == 1 else f"n = {min(counts)}–{max(counts)} pairs"
        text = f"{title}: mean over {n}, band ± 1 standard error" + (f"\n{about}" if about else "")
        stem = f"{column.replace('_loss', '')}-{name}" if name else column.replace("_loss", "")
        paths += write_curves(folder, stem, text, _AXES[x], panels, methods)
    return paths


def _panel(
    rows: Sequence[Row], x: str, column: str, y: str, split: str, methods: Sequence[str]
) -> CurvePanel:
    curves: dict[str, list[tuple[float, float, float | None]]] = {}
    notes: dict[str, str] = {}
    for method in methods:
        points = _points(rows, x, column, split, method)
        curves[method] = _plain(points)
        fitted = exponent(points) if x == "width" else None
        if fitted is not None:
            notes[method] = f"∝ width^{fitted[0]:.2f} ± {fitted[1]:.2f}"
    if column == "midpoint_loss":
        ends = [r for r in rows if r["split"] == split and r["method"] == methods[0]]
        curves["mean of the endpoints"] = _plain(
            summarise(ends, x, lambda r: (r["loss_a"] + r["loss_b"]) / 2)
        )
    return CurvePanel(split, y, curves, notes)


def _points(rows: Sequence[Row], x: str, column: str, split: str, method: str) -> list[Point]:
    return summarise([r for r in rows if r["split"] == split and r["method"] == method], x, column)


def _plain(points: Sequence[Point]) -> list[tuple[float, float, float | None]]:
    return [(p.x, p.mean, p.error) for p in points]


def _scatter_figure(
    rows: Sequence[Row],
    x: str,
    column: str,
    found: Sequence[Mapping[str, Any]],
    about: str,
    name: str,
    folder: Path,
) -> list[Path]:
    panels: list[Scatter] = []
    for entry in found:
        part = [r for r in _test(rows) if r["method"] == entry["method"] and r[column] is not None]
        text = "\n".join(
            f"{words}: {_correlation_text(Correlation(**entry[key]))}"
            for key, words in (("overall", "ρ"), ("within", f"ρ at fixed {_AXES[x].rpartition(' ')[2]}"))
        )
        panels.append(
            Scatter(
                label(entry["method"]),
                text,
                [r[column] for r in part],
                [r["barrier"] for r in part],
                [max(float(r[x]), 1e-12) for r in part],
            )
        )
    if not panels:
        return []
    which = _DIMENSIONS[column]
    title = f"Approximate dimension ({which}, mean over layers) against test barrier" + (
        f"\n{about}" if about else ""
    )
    stem = f"dimension-{which}-{name}" if name else f"dimension-{which}"
    labels = (f"dimension ({which})", "barrier (nats per example)", _AXES[x])
    return write_scatter(folder, stem, title, labels, panels)


def _correlation_text(found: Correlation) -> str:
    if found.value is None:
        return f"undefined, n = {found.n}"
    interval = "" if found.low is None else f" [{found.low:.2f}, {found.high:.2f}]"
    return f"{found.value:.2f}{interval}, n = {found.n}"


def _test(rows: Iterable[Row]) -> list[Row]:
    return [r for r in rows if r["split"] == "test"]


def _split(rows: Iterable[Row], columns: Sequence[str]) -> dict[tuple[Any, ...], list[Row]]:
    parts: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        parts.setdefault(tuple(row[c] for c in columns), []).append(row)
    return parts
