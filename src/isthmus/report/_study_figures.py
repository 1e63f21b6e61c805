"""From the rows of a study to its figures; see :func:`write_study_figures`."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from isthmus.errors import DataError
from isthmus.report._draw_study import (
    CurvePanel,
    Dot,
    DotPanel,
    Scatter,
    write_curves,
    write_dots,
    write_scatter,
)
from isthmus.report._format import label
from isthmus.report._study_summary import (
    Correlation,
    PlaceMean,
    Row,
    endpoints_mean,
    exponent,
    rank_correlation,
    summarise,
    summarise_lines,
    swept_columns,
    with_symmetries,
)

__all__ = ["Combination", "Rate", "StudyLayout", "correlations", "sweep_of", "write_study_figures"]


Rate = Callable[[Sequence[float], float], float]
"""From widths and a dimension to the exponent of the squared transport distance."""

_AXES = {
    "learning_rate": "peak learning rate",
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
_ENDPOINTS = "mean of the endpoints"
_MEASURES = {
    "midpoint_loss": ("Loss at the midpoint", "loss at t = ½ (nats per example)"),
    "barrier": ("Barrier", "barrier (nats per example)"),
    "midpoint_accuracy": ("Accuracy at the midpoint", "accuracy at t = ½ (%)"),
    "lmc_error_sup": ("Error of linear connectivity", "largest mean error on the line (norm of outputs)"),
}
_SCALES = {"midpoint_accuracy": 100.0}
_REFRESHED = {"none": "as it is", "batchnorm": "BatchNorm statistics recomputed"}


def write_study_figures(rows: Sequence[Row], folder: str | Path, *, rate: Rate | None = None) -> list[Path]:
    """Draw everything a study's rows hold, one set of figures for each combination of what else was swept.

    ``midpoint``, ``accuracy``, ``barrier``: values at the midpoint and barrier against the first swept number
    (learning rate, width, depth, epochs, …), mean over pairs with a band of one standard error; the dotted line is the
    mean of the endpoints. ``error``: the error of linear connectivity against width, with fitted exponents and the
    theory's. Where nothing numeric was swept, ``methods`` shows these values method by method instead. ``line``: the
    loss along the line. ``dimension-…``: approximate dimension against test barrier with Spearman's correlation.
    Every figure as PNG, SVG and PDF; ``correlations.json`` beside them.

    Args:
        rows: as :func:`isthmus.study.read_rows` returns them.
        folder: where to; made if need be.
        rate: the theory's exponent (:func:`isthmus.study.transport_exponent`), drawn beside the fitted ones.

    Returns:
        The paths of the figures.

    Raises:
        DataError: no rows.
        MissingExtraError: matplotlib is not installed.
        OutputError: a file cannot be written.
    """
    if not rows:
        raise DataError("Study figures: expected rows, found none. Has a pair been measured?")
    rows = with_symmetries(rows)
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    sweep = sweep_of(rows)
    x = sweep.x
    paths: list[Path] = []
    listed: list[dict[str, Any]] = []
    for combination in sweep.combinations:
        part = combination.rows
        set_of = _Set(part, x, combination.words, combination.suffix, target, rate)
        paths += set_of.curves() if sweep.varies else set_of.methods()
        for refresh in set_of.refreshed:
            paths += set_of.lines(refresh)
        for column in _DIMENSIONS:
            unrefreshed = [r for r in part if r["refresh"] == set_of.refreshed[0]]
            found = correlations(unrefreshed, x, column)
            listed += [{"figure": set_of.name, "dimension": column, **c} for c in found]
            paths += set_of.scatter(unrefreshed, column, found)
    if listed:
        (target / "correlations.json").write_text(json.dumps(listed, indent=1) + "\n", encoding="utf-8")
    return paths


@dataclass(frozen=True)
class Combination:
    """What was swept beside the horizontal axis, at fixed values.

    Attributes:
        words: the values with their names, for titles; empty where nothing else was swept.
        suffix: the values, for the names of files.
        rows: those with these values.
    """

    words: str
    suffix: str
    rows: Sequence[Row]


@dataclass(frozen=True)
class StudyLayout:
    """How the rows of a study are laid out.

    Attributes:
        x: the column of the horizontal axis.
        varies: whether it was swept, or is there for want of another.
        others: the other swept columns.
        combinations: of their values.
    """

    x: str
    varies: bool
    others: Sequence[str]
    combinations: Sequence[Combination]


def sweep_of(rows: Sequence[Row]) -> StudyLayout:
    """Return what the rows of a study are drawn and listed against: the first swept number."""
    swept = swept_columns(rows)
    x = next((c for c in swept if c in _AXES), "learning_rate")
    others = [c for c in swept if c != x]
    combinations = [
        Combination(
            ", ".join(f"{_AXES.get(c, c)}: {v}" for c, v in zip(others, chosen, strict=True)),
            "-".join(map(str, chosen)),
            part,
        )
        for chosen, part in _split(rows, others).items()
    ]
    return StudyLayout(x, x in swept, others, combinations)


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


class _Set:
    """The figures of one combination of what was swept beside the horizontal axis."""

    def __init__(
        self, rows: Sequence[Row], x: str, about: str, name: str, folder: Path, rate: Rate | None
    ) -> None:
        self.rows, self.x, self.about, self.name, self.folder, self.rate = rows, x, about, name, folder, rate
        self.all_methods = list(dict.fromkeys(r["method"] for r in rows))
        self.refreshed = list(dict.fromkeys(r["refresh"] for r in rows))
        self.splits = sorted({r["split"] for r in rows}, reverse=True)

    def curves(self) -> list[Path]:
        """Draw what is measured against what was swept."""
        paths = self._curves("midpoint_loss", "midpoint") + self._curves("barrier", "barrier")
        if all(r["midpoint_accuracy"] is not None for r in self.rows):
            paths += self._curves("midpoint_accuracy", "accuracy")
        return paths + (self._curves("lmc_error_sup", "error") if self.x == "width" else [])

    def methods(self) -> list[Path]:
        """Draw what is measured, method by method, where nothing numeric was swept."""
        panels = [
            self._dots(column, split)
            for column in ("midpoint_loss", "barrier", "midpoint_accuracy")
            for split in self.splits[-1:]
            if all(r[column] is not None for r in self.rows)
        ]
        title = self._title("Midpoint and barrier, test", self._count(self.rows), "bar")
        return write_dots(self.folder, self._stem("methods"), title, panels, self.all_methods)

    def lines(self, refresh: str) -> list[Path]:
        """Draw the test loss along the line, a panel for each place of the horizontal axis."""
        rows = [r for r in _test(self.rows) if r["refresh"] == refresh]
        panels: list[CurvePanel] = []
        for (place,), part in sorted(_split(rows, [self.x]).items()):
            curves = {
                method: _plain(summarise_lines([r for r in part if r["method"] == method], "loss_at"))
                for method in self.all_methods
            }
            panels.append(
                CurvePanel(f"{_AXES[self.x]} {place:g}", "test loss (nats per example)", curves, {})
            )
        how = "" if refresh == "none" else f", {_REFRESHED[refresh]}"
        title = self._title(f"Test loss along the line{how}", self._count(rows), "band")
        stem = self._stem("line" if refresh == "none" else f"line-{refresh}")
        return write_curves(self.folder, stem, title, "t, weight of B", panels, self.all_methods)

    def scatter(self, rows: Sequence[Row], column: str, found: Sequence[Mapping[str, Any]]) -> list[Path]:
        """Draw dimension against barrier, a panel for each method."""
        panels: list[Scatter] = []
        for entry in found:
            part = [r for r in _test(rows) if r["method"] == entry["method"] and r[column] is not None]
            text = "\n".join(
                f"{words}: {_correlation_text(Correlation(**entry[key]))}"
                for key, words in (
                    ("overall", "ρ"),
                    ("within", f"ρ at fixed {_AXES[self.x].partition(' of ')[0].rpartition(' ')[2]}"),
                )
            )
            panels.append(
                Scatter(
                    label(entry["method"]),
                    text,
                    [r[column] for r in part],
                    [r["barrier"] for r in part],
                    [float(r[self.x]) for r in part],
                )
            )
        if not panels:
            return []
        which = _DIMENSIONS[column]
        title = f"Approximate dimension ({which}, mean over layers) against test barrier" + (
            f"\n{self.about}" if self.about else ""
        )
        labels = (f"dimension ({which})", "barrier (nats per example)", _AXES[self.x])
        return write_scatter(self.folder, self._stem(f"dimension-{which}"), title, labels, panels)

    def _curves(self, column: str, stem: str) -> list[Path]:
        refreshed = self.refreshed
        splits = self.splits if len(refreshed) == 1 else self.splits[-1:]
        panels = [self._panel(column, split, refresh) for refresh in refreshed for split in splits]
        title = self._title(_MEASURES[column][0], self._count(self.rows), "band")
        stem, axis = self._stem(stem), _AXES[self.x]
        return write_curves(self.folder, stem, title, axis, panels, self.all_methods, share_y=True)

    def _panel(self, column: str, split: str, refresh: str) -> CurvePanel:
        rows = [r for r in self.rows if r["split"] == split and r["refresh"] == refresh]
        scale = _SCALES.get(column, 1.0)
        curves: dict[str, list[tuple[float, float, float | None]]] = {}
        notes: dict[str, str] = {}
        for method in self.all_methods:
            part = [r for r in rows if r["method"] == method]
            points = summarise(part, self.x, lambda r: None if r[column] is None else scale * r[column])
            curves[method] = _plain(points)
            if self.x == "width" and column in ("barrier", "lmc_error_sup"):
                notes[method] = self._exponents(column, part, points)
        ends = endpoints_mean(column)
        if ends is not None:
            shown = [r for r in rows if r["method"] == self.all_methods[0]]
            curves[_ENDPOINTS] = _plain(summarise(shown, self.x, lambda r: scale * ends(r)))
        title = split if len(self.refreshed) == 1 else f"{split}, {_REFRESHED[refresh]}"
        notes = {k: v for k, v in notes.items() if v}
        return CurvePanel(title, _MEASURES[column][1], curves, notes, column != "midpoint_accuracy")

    def _exponents(self, column: str, rows: Sequence[Row], points: Sequence[PlaceMean]) -> str:
        fitted = exponent(points)
        if fitted is None:
            return ""
        text = f"∝ width^{_signed(fitted[0])} ± {fitted[1]:.2f}"
        widest = [r["dimension_centred"] for r in rows if float(r["width"]) == points[-1].x]
        if column != "lmc_error_sup" or self.rate is None or not widest or None in widest:
            return text
        expected = self.rate([p.x for p in points], sum(widest) / len(widest)) / 2
        return f"{text} (theory {_signed(expected)})"

    def _dots(self, column: str, split: str) -> DotPanel:
        scale = _SCALES.get(column, 1.0)
        dots: dict[str, list[Dot]] = {}
        rows = [r for r in self.rows if r["split"] == split]
        for method in self.all_methods:
            for refresh in self.refreshed:
                part = [r for r in rows if r["method"] == method and r["refresh"] == refresh]
                for point in summarise(part, self.x, lambda r: scale * r[column]):
                    dots.setdefault(method, []).append(Dot(_REFRESHED[refresh], point.mean, point.error))
        ends = endpoints_mean(column)
        reference = None
        if ends is not None:
            shown = [r for r in rows if r["method"] == self.all_methods[0]]
            reference = scale * sum(map(ends, shown)) / len(shown)
        title, axis = _MEASURES[column]
        return DotPanel(title, axis, dots, reference)

    def _count(self, rows: Sequence[Row]) -> str:
        kept = [c for c in (self.x, "method", "split", "refresh") if rows]
        counts = {len(part) for part in _split(rows, kept).values()}
        low, high = min(counts), max(counts)
        return f"{low}" if low == high else f"{low}–{high}"

    def _title(self, what: str, count: str, spread: str) -> str:
        one = count == "1"
        text = (
            f"{what}: one pair"
            if one
            else f"{what}: mean over n = {count} pairs, {spread} ± 1 standard error"
        )
        return text + (f"\n{self.about}" if self.about else "")

    def _stem(self, what: str) -> str:
        return f"{what}-{self.name}" if self.name else what


def _plain(points: Sequence[PlaceMean]) -> list[tuple[float, float, float | None]]:
    return [(p.x, p.mean, p.error) for p in points]


def _correlation_text(found: Correlation) -> str:
    if found.value is None:
        return f"undefined, n = {found.n}"
    interval = (
        "" if found.low is None or found.high is None else f" [{_signed(found.low)}, {_signed(found.high)}]"
    )
    return f"{_signed(found.value)}{interval}, n = {found.n}"


def _signed(value: float) -> str:
    return f"{value:.2f}".replace("-", "−")


def _test(rows: Iterable[Row]) -> list[Row]:
    return [r for r in rows if r["split"] == "test"]


def _split(rows: Iterable[Row], columns: Sequence[str]) -> dict[tuple[Any, ...], list[Row]]:
    parts: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        parts.setdefault(tuple(row[c] for c in columns), []).append(row)
    return parts
