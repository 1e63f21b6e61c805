"""Figures of a study: a value against what was swept, per method; and dimension against barrier."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from isthmus.checkpoints import atomic_path
from isthmus.report._extras import load_extra
from isthmus.report._format import label
from isthmus.report._panels import DOTS_PER_INCH, literal, look_of, tidy

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["CurvePanel", "Scatter", "write_curves", "write_scatter"]

FORMATS = ("png", "svg", "pdf")

Curve = Sequence[tuple[float, float, float | None]]
"""Places ``x``, means and standard errors (``None`` for a single pair)."""


@dataclass(frozen=True)
class CurvePanel:
    """One panel of curves.

    Attributes:
        title: of the panel.
        y: label with unit.
        curves: per method.
        notes: per method, words added to its place in the legend; may lack any.
    """

    title: str
    y: str
    curves: Mapping[str, Curve]
    notes: Mapping[str, str]


@dataclass(frozen=True)
class Scatter:
    """One panel of points.

    Attributes:
        title: of the panel, such as the method.
        text: written below the panel, such as a correlation.
        x: values.
        y: values.
        colour: value of each point shown as its shade, positive.
    """

    title: str
    text: str
    x: Sequence[float]
    y: Sequence[float]
    colour: Sequence[float]


def write_curves(
    folder: Path, name: str, title: str, x: str, panels: Sequence[CurvePanel], methods: Sequence[str]
) -> list[Path]:
    """Draw curves on logarithmic axes, with bands of one standard error, and write PNG, SVG and PDF.

    Args:
        folder: where to.
        name: stem of the files.
        title: of the figure; says how many pairs each point is the mean of.
        x: label of the horizontal axis.
        panels: side by side.
        methods: fixes colours, markers and dashes: the method at place ``i`` looks the same in every figure.

    Raises:
        MissingExtraError: matplotlib is not installed.
        OutputError: a file cannot be written.
    """

    def draw(figure: Figure) -> None:
        for axes, panel in zip(np.ravel(figure.subplots(1, len(panels), squeeze=False)), panels, strict=True):
            _curves(axes, panel, x, methods)
        figure.suptitle(literal(title), fontsize=11, x=0.01, ha="left")

    return _write(folder, name, (4.8 * len(panels), 5.6), draw)


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
        colours = load_extra("matplotlib.colors")
        shades = [c for p in panels for c in p.colour]
        norm = colours.LogNorm(min(shades), max(shades) if max(shades) > min(shades) else 2 * min(shades))
        grid = np.ravel(figure.subplots(rows, columns, squeeze=False))
        drawn: Any = None
        for axes, panel in zip(grid, panels, strict=False):
            drawn = _points(axes, panel, axes_labels, norm)
        for axes in grid[len(panels) :]:
            axes.set_visible(False)
        figure.colorbar(drawn, ax=list(grid), label=axes_labels[2], shrink=0.8)
        figure.suptitle(literal(title), fontsize=11, x=0.01, ha="left")

    return _write(folder, name, (4.0 * columns + 1, 3.4 * rows + 0.4), draw)


def _curves(axes: Axes, panel: CurvePanel, x: str, methods: Sequence[str]) -> None:
    lowest = [m for curve in panel.curves.values() for _, m, _ in curve if m > 0]
    floor = min(lowest, default=1e-3) / 3
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
    axes.set_yscale("log")
    if len({c[0] for curve in panel.curves.values() for c in curve}) > 1:
        axes.set_xscale("log" if min(c[0] for v in panel.curves.values() for c in v) > 0 else "linear")
    tidy(axes, literal(panel.title), x, panel.y)
    _plain_ticks(axes)
    axes.legend(
        loc="upper center",
        bbox_to_anchor=(0.5, -0.18),
        ncols=1 if panel.notes else 2,
        frameon=False,
        fontsize=8,
        handlelength=3.2,
    )


def _points(axes: Axes, panel: Scatter, labels: tuple[str, str, str], norm: Any) -> Any:
    floor = min((y for y in panel.y if y > 0), default=1e-3) / 2
    drawn = axes.scatter(
        panel.x,
        [max(y, floor) for y in panel.y],
        c=panel.colour,
        cmap="viridis",
        norm=norm,
        s=34,
        edgecolor="black",
        linewidth=0.5,
    )
    axes.set_yscale("log")
    tidy(axes, literal(panel.title), f"{labels[0]}\n{panel.text}", labels[1])
    _plain_ticks(axes)
    return drawn


def _plain_ticks(axes: Axes) -> None:
    """Write ticks of logarithmic axes as plain numbers, between powers of ten only on short axes."""
    ticker = load_extra("matplotlib.ticker")
    for axis, scale in ((axes.xaxis, axes.get_xscale()), (axes.yaxis, axes.get_yscale())):
        if scale != "log":
            continue
        low, high = sorted(axis.get_view_interval())
        axis.set_major_formatter(ticker.StrMethodFormatter("{x:g}"))
        short = high < 10 * low
        subs = ticker.LogLocator(subs=(2.0, 3.0, 5.0) if high > 3 * low else (2.0, 3.0, 4.0, 5.0, 6.0, 8.0))
        axis.set_minor_locator(subs if short else ticker.LogLocator(subs="auto"))
        axis.set_minor_formatter(ticker.StrMethodFormatter("{x:g}") if short else ticker.NullFormatter())


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
