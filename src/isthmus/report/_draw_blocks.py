"""Blocks of units that move with their members (heads and their dimensions), a row for each block."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import numpy as np

from isthmus.report._format import number, shorten
from isthmus.report._moved_group import MovedGroup
from isthmus.report._panels import Panel, literal, look_of, tidy

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["blocks_panel"]

_MOST_BLOCKS = 12


def blocks_panel(
    name: str, families: Mapping[str, Mapping[str, int]], groups: Mapping[str, MovedGroup]
) -> Panel:
    """Draw, for each block, the mean correlation of its members before and after, a colour for each family.

    Args:
        name: of the outer group, whose units the blocks are.
        families: by family, the groups of members and the block that each lies in.
        groups: what is known of all groups.
    """
    from_block = groups[name].permutation if name in groups else None
    blocks = sorted({unit for members in families.values() for unit in members.values()})
    chosen = [
        blocks[i]
        for i in sorted({round(i) for i in np.linspace(0, len(blocks) - 1, min(len(blocks), _MOST_BLOCKS))})
    ]
    means = {
        family: {unit: groups[member].means for member, unit in members.items()}
        for family, members in families.items()
    }
    words = ", ".join(
        f"{family} {number(_mean(found, 0), 2)} before, {number(_mean(found, 1), 2)} after"
        for family, found in means.items()
    )
    kinds = sorted({groups[member].kind for members in families.values() for member in members})
    alt = (
        f"Dot chart for the {len(blocks)} blocks of group {name}, whose members move by {' or '.join(kinds)}. Mean "
        f"correlation of members at the same place, by family: {words}."
    )
    height = 2.4 + 0.3 * max(len(chosen), 3) + 0.2 * len(families)
    return Panel(alt, height, _drawer(name, means, kinds, chosen, len(blocks), from_block))


def _mean(found: Mapping[int, tuple[float, float]], end: int) -> float | None:
    known = [values[end] for values in found.values() if not math.isnan(values[end])]
    return sum(known) / len(known) if known else None


def _drawer(
    name: str,
    means: Mapping[str, Mapping[int, tuple[float, float]]],
    kinds: list[str],
    chosen: list[int],
    count: int,
    from_block: np.ndarray | None,
) -> Callable[[Figure], None]:
    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        places = {unit: row for row, unit in enumerate(chosen)}
        for at, (family, found) in enumerate(means.items()):
            look = look_of(at + 4)
            shift = (at - (len(means) - 1) / 2) * 0.5 / len(means)
            kept = [(places[unit] + shift, *found[unit]) for unit in chosen if unit in found]
            rows, before, after = (np.array(values) for values in zip(*kept, strict=True))
            axes.hlines(rows, before, after, color=look.colour, linewidth=1.4)
            axes.scatter(
                before, rows, s=30, facecolors="white", edgecolors=look.colour, linewidths=1.3, zorder=3
            )
            axes.scatter(
                after,
                rows,
                s=34,
                color=look.colour,
                marker=look.marker,
                label=literal(shorten(family)),
                zorder=4,
            )
        labels = [f"{unit}" if from_block is None else f"{unit} ← {from_block[unit]}" for unit in chosen]
        axes.set_yticks(range(len(chosen)), labels)
        axes.set_ylim(len(chosen) - 0.5, -0.5)
        low = min(min(values) for found in means.values() for values in found.values())
        axes.set_xlim(-1.05 if low < -0.45 else -0.5, 1.05)
        axes.axvline(0, color="0.6", linewidth=0.8)
        tidy(axes, "", "mean correlation of members (white: before)", "block of A ← of B", grid="x")
        for row in range(len(chosen) - 1):
            axes.axhline(row + 0.5, color="0.9", linewidth=0.8)
        figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=9)
        shown = f"{count} blocks" if len(chosen) == count else f"{len(chosen)} of {count} blocks"
        title = f"{literal(shorten(name))}: {shown}, {' and '.join(kinds)} inside"
        figure.suptitle(title, fontsize=10.5, fontweight="bold")

    return draw
