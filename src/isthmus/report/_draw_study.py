"""Figures of a study: curves per method, values method by method, and dimension against barrier."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from isthmus.files import atomic_path
from isthmus.report._extras import load_extra
from isthmus.report._format import label
from isthmus.report._panels import literal, look_of, tidy

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["CurvePanel", "Dot", "DotPanel", "Scatter", "write_curves", "write_dots", "write_scatter"]

FORMATS = ("png", "svg", "pdf")

DOTS_PER_INCH = 120
"""Of the PNG files, which are for screens and are kept beside results; the others are for print."""

_LETTER = 0.088
"""Width of an average letter of a figure's title, inches, and a little more."""

_BETWEEN = {3: (2.0, 3.0, 4.0, 5.0, 6.0, 8.0), 10: (2.0, 3.0, 5.0), 100: (2.0, 5.0)}
"""Ticks with numbers between powers of ten, on axes that span less than this factor."""

_LONG: dict[str, Any] = {"handlelength": 3.2}
"""Legends show a whole period of the longest dashes."""

PlottedCurve = Sequence[tuple[float, float, float | None]]
"""Places ``x``, means and standard errors (``None`` for a single pair)."""


@dataclass(frozen=True)
class CurvePanel:
    """One panel of curves.

    Attributes:
        title: of the panel.
        y: label with unit.
        curves: per method.
        notes: per method, words added to its place in the legend; may lack any. A panel with notes has a legend
            of its own; the others share one.
        logarithmic: whether the vertical axis is.
    """

    title: str
    y: str
    curves: Mapping[str, PlottedCurve]
    notes: Mapping[str, str]
    logarithmic: bool = True


@dataclass(frozen=True)
class Dot:
    """One value with its standard error (``None`` for a single pair); dots of one ``kind`` look alike."""

    kind: str
    value: float
    error: float | None


@dataclass(frozen=True)
class DotPanel:
    """One panel of values, method by method.

    Attributes:
        title: of the panel.
        x: label with unit.
        dots: per method, from the top.
        reference: drawn as a dotted line, such as the mean of the endpoints; or ``None``.
    """

    title: str
    x: str
    dots: Mapping[str, Sequence[Dot]]
    reference: float | None


@dataclass(frozen=True)
class Scatter:
    """One panel of points.

    Attributes:
        title: of the panel, such as the method.
        text: written below the panel, such as a correlation.
        x: values.
        y: values.
        colour: value of each point, shown as its shade: different values are equally far apart.
    """

    title: str
    text: str
    x: Sequence[float]
    y: Sequence[float]
    colour: Sequence[float]


def write_curves(
    folder: Path,
    name: str,
    title: str,
    x: str,
    panels: Sequence[CurvePanel],
    methods: Sequence[str],
    *,
    share_y: bool = False,
) -> list[Path]:
    """Draw curves with bands of one standard error, and write PNG, SVG and PDF.

    Args:
        folder: where to.
        name: stem of the files.
        title: of the figure; says how many pairs each point is the mean of.
        x: label of the horizontal axis.
        panels: up to three to a row.
        methods: fixes colours, markers and dashes: the method at place ``i`` looks the same in every figure.
        share_y: whether all panels have one vertical axis, so that they can be compared by eye.

    Raises:
        MissingExtraError: matplotlib is not installed.
        OutputError: a file cannot be written.
    """
    columns = min(len(panels), 2 if len(panels) == 4 else 3)
    rows = -(-len(panels) // columns)
    own = any(p.notes for p in panels)

    def draw(figure: Figure) -> None:
        grid = np.ravel(figure.subplots(rows, columns, squeeze=False, sharey=share_y))
        for axes, panel in zip(grid, panels, strict=False):
            _curves(axes, panel, x, methods)
            if own:
                axes.legend(
                    loc="upper center", bbox_to_anchor=(0.5, -0.18), frameon=False, fontsize=8, **_LONG
                )
        for axes in grid[len(panels) :]:
            axes.set_visible(False)
        if not own:
            _shared_legend(figure, grid[0].get_legend_handles_labels(), columns)
        _title(figure, title)

    return _write(folder, name, (4.8 * columns, (5.6 if own else 3.9) * rows + (0 if own else 0.7)), draw)


def write_dots(
    folder: Path, name: str, title: str, panels: Sequence[DotPanel], methods: Sequence[str]
) -> list[Path]:
    """Draw values method by method, with bars of one standard error, and write PNG, SVG and PDF.

    Args:
        folder: where to.
        name: stem of the files.
        title: of the figure; says how many pairs each value is the mean of.
        panels: side by side.
        methods: as for :func:`write_curves`.

    Raises:
        MissingExtraError: matplotlib is not installed.
        OutputError: a file cannot be written.
    """

    def draw(figure: Figure) -> None:
        grid = np.ravel(figure.subplots(1, len(panels), squeeze=False, sharey=True))
        for axes, panel in zip(grid, panels, strict=True):
            _dots(axes, panel, methods)
        found = {text: h for axes in grid for h, text in zip(*axes.get_legend_handles_labels(), strict=True)}
        _shared_legend(figure, (list(found.values()), list(found)), 3)
        _title(figure, title)

    return _write(folder, name, (4.0 * len(panels), 0.42 * len(methods) + 2.2), draw)


def write_scatter(
    folder: Path, name: str, title: str, axes_labels: tuple[str, str, str], panels: Sequence[Scatter]
) -> list[Path]:
    """Draw scatter plots, the vertical axis logarithmic, shaded by a third value, and write PNG, SVG and PDF.

    Args:
        folder: where to.
        name: stem of the files.
        title: of the figure.
        axes_labels: of the horizontal axis, the vertical axis and the shade.
        panels: three to a row.

    Raises:
        MissingExtraError: matplotlib is not installed.
        OutputError: a file cannot be written.
    """
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)

    def draw(figure: Figure) -> None:
        marked = sorted({c for p in panels for c in p.colour})
        grid = np.ravel(figure.subplots(rows, columns, squeeze=False))
        drawn: Any = None
        for axes, panel in zip(grid, panels, strict=False):
            drawn = _points(axes, panel, axes_labels, marked)
        for axes in grid[len(panels) :]:
            axes.set_visible(False)
        bar = figure.colorbar(drawn, ax=list(grid), label=axes_labels[2], shrink=0.8)
        bar.set_ticks(range(len(marked)), labels=[f"{v:g}" for v in marked])
        _title(figure, title)

    return _write(folder, name, (4.0 * columns + 1, 3.4 * rows + 0.4), draw)


def _title(figure: Figure, text: str) -> None:
    """Write a title over the whole figure, in as many lines as it needs."""
    wide = int(figure.get_figwidth() / _LETTER)
    wrapped = [textwrap.fill(line, wide) for line in text.splitlines()]
    figure.suptitle(literal("\n".join(wrapped)), fontsize=11, x=0.01, ha="left")


def _curves(axes: Axes, panel: CurvePanel, x: str, methods: Sequence[str]) -> None:
    means = [m for curve in panel.curves.values() for _, m, _ in curve]
    floor = 0.0 if min(means, default=1.0) <= 0 else min(means, default=1.0) / 3
    for method, curve in panel.curves.items():
        look = look_of(list(methods).index(method)) if method in methods else None
        place = np.array([c[0] for c in curve])
        mean = np.array([max(c[1], floor) for c in curve])
        error = np.array([c[2] or 0.0 for c in curve])
        note = panel.notes.get(method)
        text = literal(label(method)) + (f"  {note}" if note else "")
        style: dict[str, Any] = {"color": "0.5", "linestyle": ":", "linewidth": 1.4}
        if look is not None:
            style = {"color": look.colour, "linestyle": look.dashes, "marker": look.marker, "linewidth": 1.8}
            style |= {"markersize": 5.5, "markeredgecolor": "white", "markeredgewidth": 0.4}
            axes.fill_between(
                place, np.maximum(mean - error, floor), mean + error, color=look.colour, alpha=0.18, lw=0
            )
        axes.plot(place, mean, label=text, **style)
    if panel.logarithmic:
        _logarithmic(axes, means)
    places = sorted({c[0] for curve in panel.curves.values() for c in curve})
    _scale(axes, places)
    tidy(axes, literal(panel.title), x, panel.y)
    _plain_ticks(axes)
    if 1 < len(places) <= 8 and all(len(f"{p:g}") <= 4 for p in places):
        axes.set_xticks(places, [f"{p:g}" for p in places], minor=False)
        axes.set_xticks([], minor=True)


def _logarithmic(axes: Axes, values: Sequence[float]) -> None:
    """Make the vertical axis logarithmic; with zeros among the values, linear from zero to the least other one."""
    if min(values, default=1.0) > 0:
        axes.set_yscale("log")
        return
    lowest = min((v for v in values if v > 0), default=1e-3)
    axes.set_yscale("symlog", linthresh=lowest, linscale=0.3)
    axes.set_ylim(bottom=-0.3 * lowest)
    powers = 10.0 ** np.arange(np.ceil(np.log10(lowest)), np.log10(max(axes.get_ylim()[1], lowest)))
    axes.set_yticks([0.0, *(powers if len(powers) else [float(f"{lowest:.1g}")])])


def _scale(axes: Axes, places: Sequence[float]) -> None:
    """Make the horizontal axis logarithmic where its places spread; near 0, where there is one, linear."""
    if len(places) < 2 or (places[-1] <= 1 and places[0] <= 0):
        return
    if places[0] > 0:
        axes.set_xscale("log")
    elif places[-1] > 10:
        axes.set_xscale("symlog", linthresh=1, linscale=0.4)
        axes.set_xlim(left=-0.25)


def _shared_legend(figure: Figure, handles: tuple[list[Any], list[str]], columns: int) -> None:
    figure.legend(*handles, loc="outside lower left", ncols=2 * columns, frameon=False, fontsize=8.5, **_LONG)


def _dots(axes: Axes, panel: DotPanel, methods: Sequence[str]) -> None:
    """Draw one row per method, the first on top; the kinds of dots differ in fill and shape, not in colour alone."""
    kinds = list(dict.fromkeys(d.kind for dots in panel.dots.values() for d in dots))
    for row, method in enumerate(methods):
        for dot in panel.dots.get(method, ()):
            kind = kinds.index(dot.kind)
            axes.errorbar(
                dot.value,
                row + 0.16 * (kind - (len(kinds) - 1) / 2),
                xerr=dot.error,
                color=look_of(row).colour,
                marker="os^D"[kind % 4],
                markerfacecolor="white" if kind % 2 else look_of(row).colour,
                markersize=7,
                capsize=3,
                linestyle="none",
            )
    for kind, text in enumerate(kinds if len(kinds) > 1 else ()):
        fill = "white" if kind % 2 else "0.3"
        axes.plot(
            [], [], "os^D"[kind % 4], color="0.3", markerfacecolor=fill, markersize=7, label=literal(text)
        )
    if panel.reference is not None:
        axes.axvline(
            panel.reference, color="0.5", linestyle=":", linewidth=1.4, label="mean of the endpoints"
        )
    axes.set_yticks(range(len(methods)), [literal(label(m)) for m in methods])
    axes.set_ylim(len(methods) - 0.5, -0.5)
    tidy(axes, literal(panel.title), panel.x, "", grid="both")


def _points(axes: Axes, panel: Scatter, labels: tuple[str, str, str], marked: list[float]) -> Any:
    drawn = axes.scatter(
        panel.x,
        panel.y,
        c=[marked.index(c) for c in panel.colour],
        cmap="viridis",
        vmin=0,
        vmax=max(len(marked) - 1, 1),
        s=34,
        edgecolor="black",
        linewidth=0.5,
    )
    _logarithmic(axes, panel.y)
    axes.xaxis.set_major_locator(load_extra("matplotlib.ticker").MaxNLocator(5))
    tidy(axes, literal(panel.title), f"{labels[0]}\n{panel.text}", labels[1])
    _plain_ticks(axes)
    return drawn


def _plain_ticks(axes: Axes) -> None:
    """Write ticks of logarithmic axes as plain numbers, between powers of ten only on short axes."""
    ticker = load_extra("matplotlib.ticker")
    for axis, scale in ((axes.xaxis, axes.get_xscale()), (axes.yaxis, axes.get_yscale())):
        if scale == "symlog":
            axis.set_major_formatter(ticker.StrMethodFormatter("{x:g}"))
        if scale != "log":
            continue
        low, high = sorted(axis.get_view_interval())
        axis.set_major_formatter(ticker.StrMethodFormatter("{x:g}"))
        # Few powers of ten are in sight on a short axis: the shorter, the more numbers between them.
        between = next((subs for span, subs in _BETWEEN.items() if high < span * low), None)
        axis.set_minor_locator(ticker.LogLocator(subs=between or "auto"))
        axis.set_minor_formatter(ticker.StrMethodFormatter("{x:g}") if between else ticker.NullFormatter())


def _write(folder: Path, name: str, size: tuple[float, float], draw: Any) -> list[Path]:
    """Draw a figure with matplotlib's own style and write it in every format, the same at each run."""
    matplotlib = load_extra("matplotlib")
    figure_module = load_extra("matplotlib.figure")
    stem = re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-")
    paths: list[Path] = []
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update({"svg.hashsalt": "isthmus", "svg.fonttype": "none", "pdf.fonttype": 42})
        figure = figure_module.Figure(
            figsize=size, dpi=DOTS_PER_INCH, layout="constrained", facecolor="white"
        )
        draw(figure)
        undated = {"png": {"Software": None}, "svg": {"Date": None}, "pdf": {"CreationDate": None}}
        for suffix in FORMATS:
            path = folder / f"{stem}.{suffix}"
            with atomic_path(path) as temporary:
                figure.savefig(temporary, format=suffix, metadata=undated[suffix])
            paths.append(path)
    return paths
