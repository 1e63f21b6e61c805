"""The picture of the relabelling itself: how alike units of A and B are before and after, and what acted on them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from isthmus.report._draw_blocks import blocks_panel
from isthmus.report._extras import load_extra
from isthmus.report._format import label, number, shorten
from isthmus.report._moved_group import MovedGroup, moved_groups
from isthmus.report._panels import Panel, Picture, literal, tidy
from isthmus.report._record import Record, StoredRelabelling

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["relabelling_picture"]

_MOST_UNITS = 40  # cells stay at least 3 pixels wide on a phone
_MOST_GROUPS = 6
_BARS = 24


def relabelling_picture(record: Record, stored: StoredRelabelling, method: str) -> Picture | None:
    """Draw similarity before and after relabelling by ``method``; nothing where no array was stored for it.

    Large groups show an even choice of units, ordered by how alike each is to its partner, and a curve over
    all units; networks with many groups show an even choice of groups. Factors have a histogram, invertible maps their
    singular values; blocks whose members are moved by more than permutations (heads) share a panel.
    """
    groups = moved_groups(record, stored, method)
    if not groups:
        return None
    blocks = _blocks(record, groups)
    inside = {name for members in blocks.values() for family in members.values() for name in family}
    shown = [name for name in groups if name not in inside and name not in blocks] + list(blocks)
    chosen = [shown[i] for i in _even(len(shown), _MOST_GROUPS)]
    panels = tuple(
        blocks_panel(name, blocks[name], groups) if name in blocks else _panel(groups[name])
        for name in chosen
    )
    drawn = [groups[name] for name in chosen if name not in blocks]
    caption = _caption(method, drawn, any(name in blocks for name in chosen))
    if len(chosen) < len(shown):
        caption += f" {len(chosen)} of {len(shown)} groups, evenly chosen."
    return Picture("relabelling", "The relabelling itself", caption, panels, 3)


def _blocks(record: Record, groups: dict[str, MovedGroup]) -> dict[str, dict[str, dict[str, int]]]:
    """Return, by outer group and family, the groups inside its units and these units, where one is no permutation."""
    found: dict[str, dict[str, dict[str, int]]] = {}
    for group in record["symmetry"]["groups"]:
        block = group.get("block")
        if block is not None and group["name"] in groups:
            family = found.setdefault(block["group"], {}).setdefault(block["family"], {})
            family[group["name"]] = block["unit"]
    return {
        outer: families
        for outer, families in found.items()
        if any(groups[name].kind != "permutation" for family in families.values() for name in family)
    }


def _caption(method: str, drawn: Sequence[MovedGroup], blocks: bool) -> str:
    parts = [
        "Correlation of A's units (rows) with B's (columns), before and after relabelling by "
        f"{label(method)}. After, the partner of each unit stands on the diagonal. A unit's place in a "
        "network means nothing, so before, the diagonal is like any other place. Rows are sorted by the "
        f"correlation with the partner, in both pictures alike; groups of more than {_MOST_UNITS} units "
        "show an even choice of that order, and the curve below shows all."
    ]
    kinds = {group.kind for group in drawn}
    plain, larger = "permutation" in kinds, bool(kinds - {"permutation"})
    if plain or not drawn:
        parts.append("Negative values are drawn as 0, units that never vary in grey.")
    if larger:
        parts.append(
            ("Where more than a permutation acts, colours" if plain else "Colours")
            + " run from −1 to 1, red for positive and blue for negative, the same before and after."
            + ("" if plain else " Units that never vary are grey.")
        )
    if kinds & {"rotation", "invertible map"}:
        parts.append(
            "A rotation or an invertible map mixes all units of B into each one that stands after it."
        )
    if any(group.scaled for group in drawn):
        parts.append(
            "The histogram shows by what units are multiplied; a factor of 1 leaves a unit as it is."
        )
    if "invertible map" in kinds:
        parts.append("Singular values of a map that are far from 1 stretch or shrink directions of B.")
    if blocks:
        parts.append(
            "Blocks (heads) have a row each, with the block of B that stands there after the arrow, and the mean "
            "correlation of their members before and after."
        )
    return " ".join(parts)


def _even(count: int, most: int) -> list[int]:
    """Return at most ``most`` evenly spaced indices below ``count``, the first and the last among them."""
    return sorted({round(i) for i in np.linspace(0, count - 1, min(count, most))})


def _panel(group: MovedGroup) -> Panel:
    plain = group.kind == "permutation"
    article = {"rotation": "a ", "invertible map": "an "}.get(group.kind, "")
    extra = "" if plain else f" What acts is {article}{group.kind}."
    if group.flipped:
        extra += f" {group.flipped} of the units flipped."
    if group.scaled and group.factors is not None:
        sizes = np.abs(group.factors)
        extra += f" Factors from {sizes.min():.3g} to {sizes.max():.3g}."
    if group.spectrum is not None:
        extra += f" Singular values from {group.spectrum.min():.3g} to {group.spectrum.max():.3g}."
    before, after = (number(None if math.isnan(mean) else mean, 2) for mean in group.means)
    alt = (
        f"Two heat maps and a curve for group {group.name}, {group.size} units. Mean correlation of a "
        f"unit of A with the unit of B in the same place: {before} before, {after} after "
        f"relabelling.{extra}"
    )
    return Panel(alt, 5.0, _drawer(group))


def _drawer(group: MovedGroup) -> Callable[[Figure], None]:
    before, after = np.diagonal(group.before), np.diagonal(group.after)
    order = np.argsort(-np.nan_to_num(after, nan=-2.0), kind="stable")  # units that never vary come last
    rows = order[_even(group.size, _MOST_UNITS)]
    plain = group.kind == "permutation"
    beside = group.scaled or group.spectrum is not None

    def draw(figure: Figure) -> None:
        upper, maps, lower = _layout(figure, beside)
        _maps(upper, maps, group, rows, signed=not plain)
        _curve(lower[0], before, after, narrow=beside)
        if group.spectrum is not None:
            _spectrum(lower[1], group.spectrum)
        elif group.scaled and group.factors is not None:
            _histogram(lower[1], group.factors)
        upper.suptitle(
            f"{literal(shorten(group.name))}: {_shown(group, len(rows))}", fontsize=10.5, fontweight="bold"
        )

    return draw


def _layout(figure: Figure, beside: bool) -> tuple[Any, list[Axes], list[Axes]]:
    """Return where the maps' colour bar goes, the axes of the maps, and those below: one, or two side by side."""
    if not beside:
        grid = figure.add_gridspec(2, 2, height_ratios=(2, 1))
        return figure, [figure.add_subplot(grid[0, k]) for k in (0, 1)], [figure.add_subplot(grid[1, :])]
    # Each part has a layout of its own, or the labels of the small drawings would push the maps apart.
    parts: Any = figure.subfigures(2, 1, height_ratios=(2, 1))  # the stub knows one part only
    upper, lower = parts
    return upper, list(upper.subplots(1, 2)), list(lower.subplots(1, 2))


def _shown(group: MovedGroup, rows: int) -> str:
    word = "dimensions" if group.permutation is None else "units"
    size = f"{group.size} {word}" if rows == group.size else f"{rows} of {group.size} {word}"
    if group.kind == "permutation":
        return size
    return f"{size}, {group.flipped} flipped" if group.kind == "signs" else f"{size}, {group.kind}"


def _maps(figure: Any, maps: Sequence[Axes], group: MovedGroup, rows: np.ndarray, *, signed: bool) -> None:
    """Draw both heat maps on one scale, from −1 to 1 where signs count."""
    scale = {"cmap": "RdBu_r", "vmin": -1, "vmax": 1} if signed else {"cmap": "viridis", "vmin": 0, "vmax": 1}
    word = "dimensions" if group.permutation is None else "units"
    images = []
    for axes, (when, values) in zip(maps, (("before", group.before), ("after", group.after)), strict=True):
        axes.set_facecolor("0.75")
        cells = values[np.ix_(rows, rows)]
        images.append(axes.imshow(cells, interpolation="nearest", **scale))
        axes.set_title(when, fontsize=10)
        axes.set_xticks([])
        axes.set_yticks([])
        axes.set_xlabel(f"{word} of B")
    maps[0].set_ylabel(f"{word} of A")
    ticks, extend = ([-1, -0.5, 0, 0.5, 1], "neither") if signed else ([0, 0.5, 1], "min")
    bar = figure.colorbar(
        images[0], ax=list(maps), location="bottom", shrink=0.5, aspect=30, extend=extend, ticks=ticks
    )
    bar.set_label("correlation")


def _curve(axes: Axes, before: np.ndarray, after: np.ndarray, *, narrow: bool) -> None:
    """Draw the correlations of units at the same place, highest first."""
    marker = "o" if len(before) < 8 else ""  # a curve through few units needs dots to be seen at all
    curves = {"after": _falling(after), "before": _falling(before)}
    for (when, values), (colour, dashes) in zip(
        curves.items(), (("#0072B2", "-"), ("black", "--")), strict=True
    ):
        mean = f"{values.mean():.2f}".replace("-", "−") if values.size else "–"
        text = f"{when}, {mean}" if narrow else f"{when}, mean {mean}"
        axes.plot(
            np.arange(1, len(values) + 1), values, dashes, color=colour, lw=1.8, marker=marker, label=text
        )
    low = min(known.min(initial=0) for known in curves.values())
    axes.set_ylim(-1.05 if narrow or low < -0.6 else -0.6, 1.05)
    axes.set_yticks([-1, -0.5, 0, 0.5, 1] if narrow else [-0.5, 0, 0.5, 1])
    if narrow:
        axes.locator_params(axis="x", integer=True, nbins=4)
    tidy(axes, "", "rank" if narrow else "rank among all units", "correlation")
    axes.legend(frameon=False, fontsize=8 if narrow else 9, loc="lower left" if narrow else "best")


def _histogram(axes: Axes, factors: np.ndarray) -> None:
    """Draw how many units are multiplied by what, on a logarithmic axis that has 1 in it."""
    sizes = np.abs(factors)
    reach = max(sizes.max(), 1 / sizes.min(), 1.05) * 1.02
    edges = np.geomspace(1 / reach, reach, 2 * max(3, min(_BARS // 2, round(math.sqrt(len(sizes))))) + 1)
    axes.hist(sizes, bins=list(edges), color="#0072B2", edgecolor="white", linewidth=0.4)
    axes.axvline(1, color="black", linestyle="--", linewidth=1.1)
    _logarithmic(axes, "x", 1 / reach, reach)
    axes.locator_params(axis="y", integer=True, nbins=4)
    tidy(axes, "", "factor (log scale)", "units")


def _spectrum(axes: Axes, values: np.ndarray) -> None:
    """Draw singular values, largest first."""
    axes.plot(
        np.arange(1, len(values) + 1),
        values,
        "-",
        color="#D55E00",
        lw=1.8,
        marker="o" if len(values) < 40 else "",
        markersize=3.5,
    )
    axes.axhline(1, color="black", linestyle="--", linewidth=1.1)
    reach = max(values.max(), 1 / values.min(), 1.1) * 1.1
    _logarithmic(axes, "y", 1 / reach, reach)
    axes.locator_params(axis="x", integer=True, nbins=4)
    tidy(axes, "", "rank", "singular value")


def _logarithmic(axes: Axes, which: str, low: float, high: float) -> None:
    """Make an axis logarithmic, with at least three plain numbers on it."""
    ticker = load_extra("matplotlib.ticker")
    axis = axes.xaxis if which == "x" else axes.yaxis
    (axes.set_xscale if which == "x" else axes.set_yscale)("log")
    (axes.set_xlim if which == "x" else axes.set_ylim)(low, high)
    half = float(f"{math.sqrt(high):.1g}" if high > 4 else f"{math.sqrt(high):.2g}")
    ticks = [1.0] if half <= 1.0 else [1 / half, 1.0, half]
    axis.set_major_locator(ticker.FixedLocator(ticks))
    axis.set_minor_locator(ticker.NullLocator())
    axis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:.2g}"))


def _falling(values: np.ndarray) -> np.ndarray:
    """Return the known values, highest first; a unit that never varies has none."""
    return np.sort(values[~np.isnan(values)])[::-1]
