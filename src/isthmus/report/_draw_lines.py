"""Figures of what happens on the straight line: loss, accuracy, barriers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from isthmus.report._format import NATS, amount, label, number, unit_of, with_error
from isthmus.report._panels import Look, Panel, Picture, literal, look_of, png, render, tidy, tile
from isthmus.report._record import Record, RecordedLine

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["accuracy_picture", "barrier_picture", "draw_line", "loss_picture"]

_POSITION = "position t on the line (0 = A, 1 = B)"
_ZOOM_BELOW = 0.35  # a second, closer panel where relabelling leaves less than this share of the barrier

Lines = Mapping[str, RecordedLine]


def loss_picture(record: Record) -> Picture:
    """Draw the loss along the line, every method and split, with barriers as brackets above the chord."""
    panels, unit = [], unit_of(record)
    for split, lines in _splits(record).items():
        panels.append(Panel(_loss_alt(split, lines, unit), 4.2, _loss_drawer(split, lines, lines, unit)))
        if _worth_a_closer_look(lines):
            closer = {name: line for name, line in lines.items() if name != "none"}
            alt = _loss_alt(f"{split}, closer", closer, unit)
            title = f"{split}, closer: relabelled only"
            panels.append(Panel(alt, 4.2, _loss_drawer(title, lines, closer, unit)))
    caption = (
        f"Loss along the straight line from A to B, in {unit}. The grey dotted line is the chord "
        "between the two losses. A vertical bracket runs from the chord to the worst point: its length is "
        "the barrier, printed in the legend. Bands are ± 1 standard error over examples. Where brackets "
        "share a place, the shorter lies on the longer."
    )
    return Picture("loss", "Loss along the line", caption, tuple(panels), 2)


def accuracy_picture(record: Record) -> Picture | None:
    """Draw the accuracy along the line, or nothing where no method has one."""
    panels = []
    for split, lines in _splits(record).items():
        known = {name: line for name, line in lines.items() if line["accuracy"] is not None}
        if known:
            middle = ", ".join(
                f"{label(name)} {number(100 * np.interp(0.5, line['t'], _accuracy(line)), 1)} %"
                for name, line in known.items()
            )
            alt = f"Line chart of accuracy against position on the line, {split}. At the midpoint: {middle}."
            panels.append(Panel(alt, 4.2, _accuracy_drawer(split, list(record["methods"]), known)))
    if not panels:
        return None
    caption = "Share of examples classified correctly along the same line. Higher is better."
    return Picture("accuracy", "Accuracy along the line", caption, tuple(panels), 2)


def barrier_picture(record: Record) -> Picture:
    """Draw the barrier of every method as bars with standard errors."""
    panels, unit = [], unit_of(record)
    height = 1.1 + 0.42 * len(record["methods"])
    for split, lines in _splits(record).items():
        values = ", ".join(f"{label(name)} {number(line['barrier'])}" for name, line in lines.items())
        alt = f"Bar chart of barriers in {unit}, {split}: {values}."
        panels.append(Panel(alt, height, _barrier_drawer(split, record, lines)))
    caption = (
        "Barrier: the most the loss on the line rises above the chord. Whiskers are ± 1 standard error "
        "over examples, for this pair of networks; another pair of seeds varies more. “÷ n”: n times "
        "lower than without relabelling."
    )
    return Picture("barriers", "Barrier of every method", caption, tuple(panels), 2)


def draw_line(curves: Mapping[str, Mapping[str, Any]], method: str, unit: str = NATS) -> bytes:
    """Draw one line on its own, without a record: loss and, where there is one, accuracy per data set.

    Args:
        curves: by name of the data set, the fields of :class:`isthmus.connectivity.Curve` as plain values
            (``Curve.to_dict()``).
        method: how B was relabelled, for the legend.
        unit: of the loss (:attr:`isthmus.connectivity.Line.unit`).

    Returns:
        A PNG.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    panels: list[Panel] = []
    for split, curve in curves.items():
        lines = cast("Lines", {method: {"t": curve["ts"], **curve}})
        panels.append(Panel(_loss_alt(split, lines, unit), 4.2, _loss_drawer(split, lines, lines, unit)))
        if curve["accuracy"] is not None:
            alt = f"Line chart of accuracy against position on the line, {split}."
            panels.append(Panel(alt, 4.2, _accuracy_drawer(split, [method], lines)))
    return png(tile([render(panel) for panel in panels], 2))


def _splits(record: Record) -> dict[str, dict[str, RecordedLine]]:
    """Return the lines by split then method, the headline split first."""
    names = [record["split"]]
    for method in record["methods"].values():
        names += [split for split in method["line"] if split not in names]
    return {
        split: {name: m["line"][split] for name, m in record["methods"].items() if split in m["line"]}
        for split in names
    }


def _worth_a_closer_look(lines: Lines) -> bool:
    others = [line["barrier"] for name, line in lines.items() if name != "none"]
    return "none" in lines and bool(others) and max(others) < _ZOOM_BELOW * lines["none"]["barrier"]


def _loss_alt(split: str, lines: Lines, unit: str) -> str:
    parts = ", ".join(
        f"{label(name)} rises {amount(line['barrier'], unit)} above the chord at t = {line['barrier_at']:g}"
        for name, line in lines.items()
    )
    return f"Line chart of loss against position on the line, {split}: {parts}."


def _loss_drawer(title: str, everything: Lines, shown: Lines, unit: str) -> Callable[[Figure], None]:
    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        first = next(iter(shown.values()))
        axes.plot(first["t"], first["chord"], color="0.45", linestyle=":", linewidth=1.2, zorder=1)
        for name, line in shown.items():
            look = look_of(list(everything).index(name))
            text = f"{literal(label(name))}: {number(line['barrier'])}"
            _curve(axes, line["t"], line["loss"], look, text)
            if line["loss_error"] is not None:
                loss, error = np.array(line["loss"]), np.array(line["loss_error"])
                axes.fill_between(line["t"], loss - error, loss + error, color=look.colour, alpha=0.09, lw=0)
            _bracket(axes, line, look)
        tidy(axes, literal(title), _POSITION, f"loss ({literal(unit)})")
        _legend(figure, f"barrier, {literal(unit)}")

    return draw


def _bracket(axes: Axes, line: RecordedLine, look: Look) -> None:
    """Mark a barrier: a vertical bar from the chord to the loss at the worst position, low ones in front."""
    if line["barrier"] <= 0:
        return
    at = line["barrier_at"]
    foot = float(np.interp(at, line["t"], line["chord"]))
    ends = [foot, foot + line["barrier"]]
    style = {"color": look.colour, "lw": 2.2, "marker": "_", "markersize": 9, "mew": 2}
    axes.plot([at, at], ends, zorder=2.5 - 1e-3 * line["barrier"], **style)


def _accuracy(line: RecordedLine) -> np.ndarray:
    return np.array(line["accuracy"], dtype=float)


def _accuracy_drawer(split: str, order: list[str], lines: Lines) -> Callable[[Figure], None]:
    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        for name, line in lines.items():
            look = look_of(order.index(name))
            _curve(axes, line["t"], 100 * _accuracy(line), look, literal(label(name)))
        tidy(axes, literal(split), _POSITION, "accuracy (%)")
        _legend(figure, None)

    return draw


def _curve(axes: Axes, x: list[float], y: object, look: Look, text: str) -> None:
    axes.plot(
        x,
        y,  # type: ignore[arg-type]
        color=look.colour,
        linestyle=look.dashes,
        marker=look.marker,
        markersize=5.5,
        markeredgecolor="white",
        markeredgewidth=0.4,
        linewidth=1.8,
        label=text,
        zorder=3,
    )


def _legend(figure: Figure, title: str | None) -> None:
    figure.legend(
        loc="outside lower center",
        ncols=2,
        frameon=False,
        fontsize=9,
        title=title,
        title_fontsize=9,
        handlelength=3.2,
    )


def _barrier_drawer(split: str, record: Record, lines: Lines) -> Callable[[Figure], None]:
    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        baseline = lines["none"]["barrier"] if "none" in lines else 0.0
        reach = max(max(line["barrier"] + (line["barrier_error"] or 0.0) for line in lines.values()), 1e-12)
        for row, (name, line) in enumerate(lines.items()):
            look = look_of(list(record["methods"]).index(name))
            error = line["barrier_error"]
            axes.barh(row, line["barrier"], 0.62, color=look.colour, edgecolor="black", linewidth=0.6)
            if error is not None:
                axes.errorbar(line["barrier"], row, xerr=error, color="0.35", capsize=3, lw=1.2)
            text = with_error(line["barrier"], error) + _times_lower(baseline, line["barrier"], name)
            axes.text(
                max(line["barrier"], 0) + (error or 0) + 0.03 * reach, row, text, va="center", fontsize=9
            )
        axes.set_yticks(range(len(lines)), [literal(label(name)) for name in lines])
        axes.invert_yaxis()
        axes.set_xlim(min(0.0, *(1.1 * line["barrier"] for line in lines.values())), 1.55 * reach)
        tidy(axes, literal(split), f"barrier ({literal(unit_of(record))})", "", grid="x")

    return draw


def _times_lower(baseline: float, barrier: float, name: str) -> str:
    if name == "none" or not 0 < barrier < baseline:
        return ""
    return f"  (÷ {baseline / barrier:.{0 if baseline > 10 * barrier else 1}f})"
