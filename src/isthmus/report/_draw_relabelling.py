"""The picture of the relabelling itself: how alike the units of A and B are, before and after."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from isthmus.report._format import label, number, shorten
from isthmus.report._panels import Panel, Picture, literal, tidy
from isthmus.report._record import Record, StoredRelabelling

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["relabelling_picture"]

_MOST_UNITS = 40  # cells stay at least 3 pixels wide on a phone
_MOST_GROUPS = 6


def relabelling_picture(record: Record, stored: StoredRelabelling, method: str) -> Picture | None:
    """Draw similarity before and after relabelling by ``method``; nothing where no array was stored for it.

    Large groups show an even choice of units, ordered by how alike each is to its partner, and a curve over
    all units; networks with many groups show an even choice of groups.
    """
    permutations = stored.permutation.get(method, {})
    groups = [g["name"] for g in record["symmetry"]["groups"] if g["name"] in permutations]
    groups = [group for group in groups if group in stored.similarity and len(permutations[group])]
    if not groups:
        return None
    chosen = [groups[i] for i in _even(len(groups), _MOST_GROUPS)]
    panels = tuple(_panel(group, stored.similarity[group], permutations[group]) for group in chosen)
    caption = (
        "Correlation of A's units (rows) with B's (columns), before and after relabelling by "
        f"{label(method)}. After, the partner of each unit stands on the diagonal. A unit's place in a "
        "network means nothing, so before, the diagonal is like any other place. Rows are sorted by the "
        f"correlation with the partner, in both pictures alike; groups of more than {_MOST_UNITS} units "
        "show an even choice of that order, and the curve below shows all. Negative values are drawn as "
        "0, units that never vary in grey."
    )
    if len(chosen) < len(groups):
        caption += f" {len(chosen)} of {len(groups)} groups, evenly chosen."
    return Picture("relabelling", "The relabelling itself", caption, panels, 3)


def _even(count: int, most: int) -> list[int]:
    """Return at most ``most`` evenly spaced indices below ``count``, the first and the last among them."""
    return sorted({round(i) for i in np.linspace(0, count - 1, min(count, most))})


def _panel(group: str, similarity: np.ndarray, permutation: np.ndarray) -> Panel:
    before, after = np.diagonal(similarity), similarity[np.arange(len(permutation)), permutation]
    alt = (
        f"Two heat maps and a curve for group {group}, {len(permutation)} units. Mean correlation of a "
        f"unit of A with the unit of B in the same place: {_mean(before)} before, {_mean(after)} after "
        "relabelling."
    )
    return Panel(alt, 5.0, _drawer(group, similarity, permutation, before, after))


def _mean(values: np.ndarray) -> str:
    known = values[~np.isnan(values)]
    return number(float(known.mean()) if known.size else None, 2)


def _drawer(
    group: str, similarity: np.ndarray, permutation: np.ndarray, before: np.ndarray, after: np.ndarray
) -> Callable[[Figure], None]:
    size = len(permutation)
    order = np.argsort(-np.nan_to_num(after, nan=-2.0), kind="stable")  # units that never vary come last
    rows = order[_even(size, _MOST_UNITS)]
    shown = f"{size} units" if len(rows) == size else f"{len(rows)} of {size} units"

    def draw(figure: Figure) -> None:
        grid = figure.add_gridspec(2, 2, height_ratios=(2, 1))
        maps = [figure.add_subplot(grid[0, column]) for column in (0, 1)]
        columns = {"before": rows, "after": permutation[rows]}
        images = []
        for axes, (when, chosen) in zip(maps, columns.items(), strict=True):
            axes.set_facecolor("0.75")
            cells = similarity[np.ix_(rows, chosen)]
            images.append(axes.imshow(cells, cmap="viridis", vmin=0, vmax=1, interpolation="nearest"))
            axes.set_title(when, fontsize=10)
            axes.set_xticks([])
            axes.set_yticks([])
            axes.set_xlabel("units of B")
        maps[0].set_ylabel("units of A")
        bar = figure.colorbar(
            images[0], ax=maps, location="bottom", shrink=0.5, aspect=30, extend="min", ticks=[0, 0.5, 1]
        )
        bar.set_label("correlation")
        axes = figure.add_subplot(grid[1, :])
        marker = "o" if size < 8 else ""  # a curve through few units needs dots to be seen at all
        curves = {"after": _falling(after), "before": _falling(before)}
        for (when, values), (colour, dashes) in zip(
            curves.items(), (("#0072B2", "-"), ("black", "--")), strict=True
        ):
            text = f"{when}, mean {_mean(values)}"
            axes.plot(
                np.arange(1, len(values) + 1), values, dashes, color=colour, lw=1.8, marker=marker, label=text
            )
        axes.set_ylim(-1.05 if min(known.min(initial=0) for known in curves.values()) < -0.6 else -0.6, 1.05)
        axes.set_yticks([-0.5, 0, 0.5, 1])
        tidy(axes, "", "rank among all units", "correlation")
        axes.legend(frameon=False, fontsize=9, loc="best")
        figure.suptitle(f"{literal(shorten(group))}: {shown}", fontsize=10.5, fontweight="bold")

    return draw


def _falling(values: np.ndarray) -> np.ndarray:
    """Return the known values, highest first; a unit that never varies has none."""
    return np.sort(values[~np.isnan(values)])[::-1]
