"""Figures about networks: certificates, mean field, dropout, trained pairs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import numpy as np

from isthmus.report._panels import look_of, tidy
from isthmus.report._theory_axes import (
    Account,
    Drawer,
    TheoryValues,
    guide,
    legend,
    line,
    log_log,
    log_values,
    minus,
    show,
    ticks,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = [
    "certificate_panels",
    "certificate_ratio_panels",
    "certificate_cost_panels",
    "mean_field_panels",
    "dropout_panels",
    "independence_panels",
    "bounds_panels",
    "chord_panels",
]


def certificate_panels(data: TheoryValues) -> Account:
    """Certificates of one pair with several numbers of segments: envelopes over the measured line."""
    rows = sorted(data["certificates"], key=lambda r: r["segments"])
    finest = rows[-1]

    def panel(measured: str, bound: str, title: str, unit: str) -> Drawer:
        def draw(axes: Axes) -> None:
            envelope = finest["envelope"]
            line(axes, envelope["ts"], envelope[measured], 0, "measured", markersize=3)
            top = max(envelope[measured])
            for i, row in enumerate(rows, start=1):
                steps = row["envelope"]
                look = look_of(i)
                axes.stairs(
                    steps[bound],
                    steps["ts"],
                    baseline=None,
                    color=look.colour,
                    linestyle=look.dashes,
                    linewidth=1.8,
                    label=f"proven, {row['segments']} segment{'s' if row['segments'] > 1 else ''}",
                )
            tightest = max(finest["envelope"][bound])
            limit = 1.15 * max(tightest, top)
            hidden = [r["segments"] for r in rows if max(r["envelope"][bound]) > 4 * limit]
            widest = max(
                (max(r["envelope"][bound]) for r in rows if r["segments"] not in hidden), default=limit
            )
            axes.set_ylim(min(0.0, *envelope[measured]) - 0.02 * widest, max(limit, 1.08 * widest))
            if hidden:
                axes.annotate(
                    f"out of the picture: {', '.join(map(str, hidden))}",
                    (0.02, 0.97),
                    xycoords="axes fraction",
                    va="top",
                    fontsize=8,
                )
            tidy(axes, title, "position t on the line (0 = A, 1 = B)", unit)
            legend(axes)

        return draw

    panels = [
        panel(
            "error", "error_bound", "Error of linear connectivity", "mean distance from the chord (outputs)"
        )
    ]
    if finest["envelope"]["rise"] is not None:
        panels.append(
            panel("rise", "rise_bound", "Rise of the loss over its chord", "rise (units of the loss)")
        )
    ratio = (
        "" if finest["ratio"] is None else f"; the tightest bound is {finest['ratio']:.4g} times the measured"
    )
    alt = f"Step-shaped proven envelopes above the measured curve, {finest['segments']} segments at most{ratio}."
    return alt, panels


def certificate_ratio_panels(data: TheoryValues) -> Account:
    """Rows of a certificate benchmark: by how much the bounds exceed the truth, against the number of segments."""
    names = list(dict.fromkeys(row["network"] for row in data["rows"]))
    counts = sorted({r["segments"] for r in data["rows"]})

    def panel(title: str, value: Callable[[TheoryValues], float | None]) -> Drawer:
        def draw(axes: Axes) -> None:
            for i, name in enumerate(names):
                rows = [r for r in data["rows"] if r["network"] == name]
                line(axes, [r["segments"] for r in rows], [value(r) for r in rows], i, name)
            first = [value(r) or 0.0 for r in data["rows"] if r["segments"] == counts[0]]
            guide(axes, counts, max(first), -1.5, "slope −3/2")
            log_log(axes, counts)
            tidy(axes, title, "segments K", "bound over measured value, minus 1")
            legend(axes, 7.5)

        return draw

    def barrier_excess(row: TheoryValues) -> float | None:
        return row["barrier_bound"] / row["barrier_grid"] - 1 if row["barrier_grid"] > 0 else None

    worst = max(r["ratio"] for r in data["rows"] if r["segments"] == counts[-1])
    alt = f"Bound over measured error falls towards 1 with the segments; with {counts[-1]} the worst is {worst:.3f}."
    return alt, [
        panel("Error of linear connectivity", lambda r: r["ratio"] - 1),
        panel("Barrier", barrier_excess),
    ]


def certificate_cost_panels(data: TheoryValues) -> Account:
    """Costs of a certificate benchmark: time and memory against width."""
    rows = data["costs"]
    widths = [r["width"] for r in rows]
    examples = f"{rows[0]['examples']:,}".replace(",", " ")
    title = f"{examples} examples, {rows[0]['segments']} segments"

    def time(axes: Axes) -> None:
        line(axes, widths, [r["cpu_seconds"] for r in rows], 0, "CPU time")
        line(axes, widths, [r["seconds"] for r in rows], 1, "wall clock (shared machine)")
        log_log(axes, widths)
        tidy(axes, title, "width of three hidden layers", "seconds")
        legend(axes)

    def memory(axes: Axes) -> None:
        line(axes, widths, [r["peak_mib"] for r in rows], 0, "peak of the process")
        line(axes, widths, [r["grown_mib"] for r in rows], 1, "grown by the certificate")
        log_log(axes, widths)
        tidy(axes, "Memory", "width of three hidden layers", "MiB")
        legend(axes)

    last = rows[-1]
    price = f"{last['cpu_seconds']:.0f} CPU seconds, {last['peak_mib']:.0f} MiB"
    alt = f"Cost against width: at {last['width']} units {price}."
    return alt, [time, memory]


def mean_field_panels(data: TheoryValues) -> Account:
    """Mean-field pairs: error and distance against N, the floor of the step, the least sufficient width."""
    widths = data["widths"]
    means = {key: np.array(data[key]).mean(1) for key in ("sup_error", "w2", "bound", "unmatched")}

    def error(axes: Axes) -> None:
        names = {"unmatched": "without matching", "bound": "proven from $W_2^2$", "sup_error": "matched"}
        for i, (key, text) in enumerate(names.items(), start=1):
            line(axes, widths, means[key], 0 if key == "sup_error" else i, text)
        spread = np.array(data["sup_error"])
        axes.fill_between(
            widths, spread.min(1), spread.max(1), color="0.75", alpha=0.5, lw=0, label="range over seeds"
        )
        log_log(axes, widths)
        slope = data["slopes"]["sup_error"]
        text = "" if slope is None else f" (slope {minus(slope)})"
        tidy(axes, f"Error on the line{text}", "neurons N", "largest |error| over t and inputs")
        legend(axes)

    def distance(axes: Axes) -> None:
        line(axes, widths, means["w2"], 0, "two runs")
        guide(axes, widths, means["w2"][0], -2 / data["parameters"], f"slope −2/{data['parameters']}")
        for i, row in enumerate(data["floor"], start=1):
            style = {"linestyle": "", "markersize": 8}
            line(
                axes,
                [data["floor_width"]],
                [row["runs"]],
                i,
                f"step {row['step']:g} (ratio {row['ratio']:.2f})",
                **style,
            )
        if data["floor"]:
            level = float(np.mean([row["subsamples"] for row in data["floor"]]))
            axes.axhline(
                level, color="0.35", linestyle="--", linewidth=1.1, label="two samples of one wide network"
            )
        log_log(axes, widths)
        tidy(
            axes,
            f"Distance; floor of the step at N = {data['floor_width']}",
            "neurons N",
            "squared distance $W_2^2$",
        )
        legend(axes)

    def least(axes: Axes) -> None:
        rows = [r for r in data["n_min"] if r["enough"] is not None]
        line(axes, [r["error"] for r in rows], [r["enough"] for r in rows], 0, "enough")
        low = [max(r["fails"], 1) for r in rows]
        line(axes, [r["error"] for r in rows], low, 1, "fails")
        log_values(axes, "x")
        axes.set_yscale("log", base=2)
        axes.set_xticks([r["error"] for r in rows], [f"{r['error']:g}" for r in rows])
        axes.set_xticks([], minor=True)
        heights = sorted({v for r in rows for v in (r["enough"], max(r["fails"], 1))})
        axes.set_yticks(
            heights[:: max(1, len(heights) // 6)], [str(h) for h in heights[:: max(1, len(heights) // 6)]]
        )
        share = 100 * (1 - data["delta"])
        tidy(axes, f"How wide for {share:.0f} % of the pairs", "error asked for", "neurons N (bracket)")
        legend(axes)

    alt = (
        f"Error on the line of mean-field pairs falls from {means['sup_error'][0]:.3g} at {widths[0]} neurons to "
        f"{means['sup_error'][-1]:.3g} at {widths[-1]}; without matching it stays near {means['unmatched'][-1]:.2g}."
    )
    return alt, [error, distance, least] if data["n_min"] else [error, distance]


def dropout_panels(data: TheoryValues) -> Account:
    """Dropout errors and the error on the line over width."""
    widths, slopes = data["widths"], data["slopes"]
    names = {
        "line": "error on the line",
        "half": "random half kept",
        "bernoulli": "Bernoulli, exact",
        "matched": "half of each pair kept",
    }

    def against_width(axes: Axes) -> None:
        for i, (key, text) in enumerate(names.items()):
            slope = "" if slopes[key] is None else f" ({minus(slopes[key])})"
            line(axes, widths, data[key], i, text + slope)
        log_log(axes, widths)
        tidy(
            axes,
            f"{data['inputs']} inputs (slopes in brackets)",
            "hidden units",
            "rms change of the output",
        )
        legend(axes)

    def against_line(axes: Axes) -> None:
        for i, key in ((1, "half"), (3, "matched")):
            line(axes, data["line"], data[key], i, names[key])
        for x, y, m in zip(data["line"], data["half"], widths, strict=True):
            axes.annotate(f"{m}", (x, y), fontsize=8, ha="right", xytext=(-3, 5), textcoords="offset points")
        axes.margins(x=0.12)  # room for the labels of the widths
        log_values(axes, "x")
        log_values(axes, "y")
        tidy(axes, "Dropout against the line, by width", "error on the line", "change under dropout")
        legend(axes)

    alt = (
        f"Over widths {widths[0]} to {widths[-1]} the error on the line falls with slope {show(slopes['line'])}, "
        f"dropping a random half with {show(slopes['half'])}."
    )
    return alt, [against_width, against_line]


def independence_panels(data: TheoryValues) -> Account:
    """Trained layers: distance between two networks against random halves of their pooled neurons."""
    rows = data["layers"]
    names = list(dict.fromkeys(r["layer"] for r in rows))
    widths = sorted({r["width"] for r in rows})

    def ratios(axes: Axes) -> None:
        for i, name in enumerate(names):
            own = [r for r in rows if r["layer"] == name]
            line(axes, [r["width"] for r in own], [r["ratio"] for r in own], i, f"{name}, trained")
            low, high = ([r[k] for r in own] for k in ("ratio_low", "ratio_high"))
            axes.fill_between([r["width"] for r in own], low, high, color=look_of(i).colour, alpha=0.2, lw=0)
        low, high = (
            [pick(r[k] for r in rows if r["width"] == w) for w in widths]
            for k, pick in (("splits_low", min), ("splits_high", max))
        )
        axes.fill_between(widths, low, high, color="0.85", lw=0, zorder=0, label="range of random halves")
        axes.axhline(1, color="0.4", linewidth=1)
        axes.set_xscale("log", base=2)
        ticks(axes, widths)
        tidy(
            axes,
            "Are trained neurons independent draws?",
            "width",
            "$W_2^2$ of two networks / of random halves",
        )
        legend(axes)

    def distances(axes: Axes) -> None:
        for i, (key, state) in enumerate((("networks", "trained"), ("initial", "at initialisation"))):
            for k, name in enumerate(names):
                own = [r for r in rows if r["layer"] == name]
                text = f"{name}, {state}"
                line(axes, [r["width"] for r in own], [r[key] for r in own], 2 * i + k, text)
        axes.set_xscale("log", base=2)
        ticks(axes, widths)
        tidy(axes, "Distance between two networks", "width", "$W_2^2$ / mean squared norm of a neuron")
        legend(axes)

    parts = ", ".join(f"{r['layer']} at {r['width']}: {r['ratio']:.2f}" for r in rows)
    alt = f"Distance of two trained layers over that of random halves of their pooled neurons: {parts}."
    return alt, [ratios, distances]


def bounds_panels(data: TheoryValues) -> Account:
    """Networks: measured error and barrier against every bound."""
    rows = data["networks"]
    error = {
        "measured": "measured",
        "chain_64": "64 segments",
        "chain_16": "16 segments",
        "chain_1": "1 segment",
        "weights_only": "weights only",
    }
    barrier = {
        "barrier": "measured",
        "barrier_64": "64 segments, local",
        "lipschitz_64": "64 segments, √2 × error",
        "barrier_16": "16 segments, local",
        "barrier_1": "1 segment, local",
        "lipschitz_weights": "weights only, √2 × error",
    }

    def panel(names: Mapping[str, str], title: str, unit: str) -> Drawer:
        def draw(axes: Axes) -> None:
            places = np.arange(len(rows), dtype=float)
            for i, (key, text) in enumerate(names.items()):
                values = [r[key] if r[key] is None or r[key] > 0 else None for r in rows]
                shape = {"linestyle": "", "markersize": 7}
                if i == 0:  # a wide black dash stays visible behind bounds that touch it
                    shape |= {
                        "marker": "_",
                        "markersize": 24,
                        "markeredgecolor": "black",
                        "markeredgewidth": 2,
                    }
                line(axes, places, values, i, text, **shape)
            log_values(axes, "y")
            axes.set_xticks(places, [r["network"] for r in rows], rotation=20)
            axes.set_xlim(-0.6, len(rows) - 0.4)
            tidy(axes, title, "", unit)
            legend(axes, 7.5)

        return draw

    parts = ", ".join(f"{r['network']} {r['chain_64'] / r['measured']:.3f}" for r in rows)
    panels = [
        panel(error, "Error of linear connectivity", "mean distance from the chord (logits)"),
        panel(barrier, "Barrier", "nats per example"),
    ]
    return f"Bounds over the measured error with 64 segments: {parts}.", panels


def chord_panels(data: TheoryValues) -> Account:
    """Loss on lines between networks of several widths, aligned and not."""
    lines = data["lines"]

    def panel(key: str, title: str) -> Drawer:
        def draw(axes: Axes) -> None:
            for i, row in enumerate(lines):
                line(axes, row["ts"], row[key], i, f"width {row['width']}")
            axes.set_ylim(0, 1.08 * max(max(row[k]) for row in lines for k in ("plain", "aligned")))
            tidy(axes, title, "position t on the line (0 = A, 1 = B)", "loss (nats per example)")
            legend(axes)

        return draw

    last = lines[-1]
    middle = len(last["ts"]) // 2
    values = f"{last['plain'][middle]:.2f} nats as trained and {last['aligned'][middle]:.3f} relabelled"
    alt = f"Loss on the line between two networks: at width {last['width']} the midpoint has {values}."
    return alt, [panel("plain", "As trained"), panel("aligned", "Relabelled")]
