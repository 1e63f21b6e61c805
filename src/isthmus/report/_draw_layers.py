"""Figures with one row per group of units: matched cost and approximate dimension; and the descent."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Literal

from isthmus.report._extras import load_extra
from isthmus.report._format import label, shorten
from isthmus.report._panels import Panel, Picture, literal, look_of, tidy
from isthmus.report._record import Record

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["cost_picture", "descent_picture", "dimension_picture"]

GroupValues = Mapping[str, Mapping[str, float]]  # method -> group -> value


def cost_picture(record: Record) -> Picture | None:
    """Draw, per group, the share of the matched cost that relabelling leaves; nothing without costs."""
    rows = {
        name: {
            group: 100 * cost["after"] / cost["before"]
            for group, cost in method["matched_cost"].items()
            if cost["before"] is not None and cost["after"] is not None and cost["before"] > 0
        }
        for name, method in record["methods"].items()
        if name != "none"
    }
    if not any(rows.values()):
        return None
    alt = "Dot chart of the matched cost left after relabelling, per group and method. " + _means(rows, " %")
    drawer = _rows_drawer(
        "cost left by relabelling", "cost after ÷ cost before (%)", record, rows, "linear", mark=100
    )
    caption = (
        "The cost each method minimises, group by group, as a share of its value before relabelling (100 "
        "%, dashed). Every method has its own cost, so compare shapes between methods and values within "
        "one. Lower is better; the distance to 0 is what nothing found here removes."
    )
    return Picture(
        "matched-cost", "Matched cost of every group", caption, (Panel(alt, _height(record), drawer),), 1
    )


def dimension_picture(record: Record) -> Picture | None:
    """Draw the approximate dimension per group and method, uncentred and centred; nothing without any."""
    panels = []
    kinds: tuple[Literal["uncentred", "centred"], ...] = ("uncentred", "centred")
    for kind in kinds:
        rows: dict[str, dict[str, float]] = {}
        for name, method in record["methods"].items():
            known = {group: entry[kind] for group, entry in method["dimension"].items()}
            rows[name] = {group: value for group, value in known.items() if value is not None and value > 0}
        if any(rows.values()):
            alt = f"Dot chart of the {kind} approximate dimension, per group and method. {_means(rows, '')}"
            drawer = _rows_drawer(kind, "approximate dimension (log scale)", record, rows, "log")
            panels.append(Panel(alt, _height(record), drawer))
    if not panels:
        return None
    caption = (
        "Approximate dimension tr(S)² / tr(S²) of the matrix S that each method matches: how many "
        "directions the units really spread over. The fewer, the easier to match. Uncentred is the "
        "paper's convention; the centred one sets the mean direction aside, which otherwise dominates. "
        "Groups of different width should not be compared."
    )
    return Picture("dimension", "Approximate dimension", caption, tuple(panels), 2)


def descent_picture(record: Record) -> Picture | None:
    """Draw the objective after every sweep, relative to its last value; nothing if all are one pass."""
    traces = {
        name: method["sweeps"]
        for name, method in record["methods"].items()
        if len(method["sweeps"]) > 1 and method["sweeps"][-1] != 0
    }
    if not traces:
        return None
    words = ", ".join(f"{label(name)} {len(trace)}" for name, trace in traces.items())
    panel = Panel(
        f"Line chart of the objective after every sweep. Values per method: {words}.",
        3.9,
        _descent(record, traces),
    )
    single = [label(n) for n, m in record["methods"].items() if n != "none" and n not in traces]
    caption = (
        "Objective after every sweep over the groups, as a share of its last value: where a curve is "
        "flat, more sweeps gained nothing. The last value is a fixed point of the descent, not a proven "
        "optimum."
    )
    if single:
        caption += f" Not drawn, with fewer than two values: {', '.join(single)}."
    return Picture("descent", "Descent", caption, (panel,), 1)


def _descent(record: Record, traces: Mapping[str, list[float]]) -> Callable[[Figure], None]:
    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        for name, trace in traces.items():
            look = look_of(list(record["methods"]).index(name))
            axes.plot(
                range(1, len(trace) + 1),
                [100 * value / trace[-1] for value in trace],
                color=look.colour,
                linestyle=look.dashes,
                marker=look.marker,
                markersize=5,
                linewidth=1.8,
                label=literal(label(name)),
            )
        axes.locator_params(axis="x", integer=True)
        tidy(axes, "objective of the descent", "sweep over all groups", "objective (% of its last value)")
        figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=9, handlelength=3.2)

    return draw


def _rows_drawer(
    title: str,
    x: str,
    record: Record,
    rows: GroupValues,
    scale: Literal["linear", "log"],
    mark: float | None = None,
) -> Callable[[Figure], None]:
    """Return a drawer of a dot chart: one row per group, one marker per method, set slightly apart."""
    groups = [group["name"] for group in record["symmetry"]["groups"]]
    shown = {name: values for name, values in rows.items() if values}

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        if mark is not None:
            axes.axvline(mark, color="0.45", linestyle="--", linewidth=1.1)
        for place, (name, values) in enumerate(shown.items()):
            look = look_of(list(record["methods"]).index(name))
            shift = (place - (len(shown) - 1) / 2) * 0.6 / len(shown)
            kept = [(group, i) for i, group in enumerate(groups) if group in values]
            axes.scatter(
                [values[group] for group, _ in kept],
                [i + shift for _, i in kept],
                s=36,
                color=look.colour,
                marker=look.marker,
                edgecolors="black",
                linewidths=0.5,
                label=literal(label(name)),
                zorder=3,
            )
        for i in range(len(groups) - 1):
            axes.axhline(i + 0.5, color="0.9", linewidth=0.8)
        if scale == "log":
            ticker = load_extra("matplotlib.ticker")
            axes.set_xscale("log")
            axes.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
            axes.xaxis.set_major_formatter("{x:g}")
            axes.xaxis.set_minor_formatter("")
        else:
            axes.set_xlim(left=0)
        axes.set_yticks(range(len(groups)), [literal(shorten(group)) for group in groups])
        axes.set_ylim(len(groups) - 0.5, -0.5)
        tidy(axes, title, x, "", grid="x")
        figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=9)

    return draw


def _height(record: Record) -> float:
    """Return a panel height in inches with room for every group, closer together when there are many."""
    groups = len(record["symmetry"]["groups"])
    return 1.8 + max(1.0, groups * max(0.16, min(0.55, 12 / max(groups, 1))))


def _means(rows: GroupValues, unit: str) -> str:
    """Say the mean over groups per method, for a reader who cannot see the dots."""
    parts = [f"{label(name)} {sum(v.values()) / len(v):.3g}{unit}" for name, v in rows.items() if v]
    return f"Mean over groups: {', '.join(parts)}."
