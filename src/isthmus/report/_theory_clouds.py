"""Figures about clouds of neurons: widths, rates, dimensions."""

from __future__ import annotations

import math
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
    "width_panels",
    "rate_panels",
    "rates_panels",
    "two_regimes_panels",
    "dimension_panels",
    "approximate_dimension_panels",
]


_LEVEL_OF_ONE = 1.0


def width_panels(data: TheoryValues) -> Account:
    """Widths against the error allowed (one hidden layer) and against depth."""
    curves, m0, eps = data["against_epsilon"], data["input_dimension"], data["epsilon"]
    names = (
        ("sup_t", "sufficient, every t at once"),
        ("fixed_t", "sufficient, each t"),
        ("entezari", "Entezari et al. (constant unknown)"),
        ("necessary", "necessary for the matching"),
    )

    def against_error(axes: Axes) -> None:
        for i, (key, text) in enumerate(names):
            line(axes, curves["epsilon"], curves[key], i, text)
        log_values(axes, "x")
        axes.set_ylim(bottom=0)
        tidy(
            axes,
            f"One hidden layer, {m0} inputs",
            "error ε allowed at the output (of order 1)",
            "log₁₀ of the width",
        )
        legend(axes)

    def against_depth(axes: Axes) -> None:
        depths = [row["depth"] for row in data["against_depth"]]
        levels = [level_of(row["sup_t"]) for row in data["against_depth"]]
        for i, (key, text) in enumerate(names[:2]):
            values = [level_of(row[key]) for row in data["against_depth"]]
            line(axes, depths, values, i, text, linestyle="" if len(depths) == 1 else look_of(i).dashes)
        for row, level in zip(data["against_depth"], levels, strict=True):
            place = {"xytext": (-9, 2), "textcoords": "offset points", "ha": "right"}
            axes.annotate(_tower_text(row["sup_t"]), (row["depth"], level), fontsize=11, **place)
        axes.set_xticks(depths)
        axes.set_xlim(min(depths) - 1, max(depths) + 0.3)
        axes.set_ylim(0, max(levels) + 0.5)
        tidy(axes, f"Last layer, error {eps:g}", "hidden layers", "how often log₁₀ is taken to reach 1")
        legend(axes)

    first = data["layers"][0]["sup_t"]["text"]
    alt = (
        f"Two charts for {m0} inputs. The logarithm of the sufficient width falls with the error allowed; with depth "
        f"the widths are towers of powers of ten, {first} neurons in the first layer at error {eps:g}."
    )
    return alt, [against_error, against_depth]


def level_of(tower: TheoryValues) -> float:
    """Return how often log10 must be taken to reach 1, linear in between (a super-logarithm)."""
    level, value = float(tower["height"]), float(tower["value"])
    while value > _LEVEL_OF_ONE:
        value, level = math.log10(value), level + 1
    return level + value - 1


def _tower_text(tower: TheoryValues) -> str:
    """Write a tower of powers of ten as mathematics."""
    value = float(tower["value"])
    power = math.floor(math.log10(value)) if value > 0 else 0
    text = f"{value:.0f}" if power < 4 else rf"{value / 10**power:.1f}\cdot 10^{{{power}}}"
    for _ in range(int(tower["height"])):
        text = f"10^{{{text}}}"
    return f"${text}$"


def rate_panels(data: TheoryValues) -> Account:
    """Return the panels of one law: the measured mean with its bounds, and local slopes."""
    sizes, d, fit = data["sizes"], data["dimension"], data["fit"]
    names = [
        ("upper", "proven upper bound"),
        ("nearest", "nearest neighbour, lower"),
        ("lower", "volume, lower"),
    ]

    def curve(axes: Axes) -> None:
        line(axes, sizes, data["means"], 0, "measured, ± 1 standard error")
        errors = np.array([e or 0.0 for e in data["errors"]])
        axes.errorbar(sizes, data["means"], yerr=errors, color="black", capsize=3, linestyle="none")
        for i, (key, text) in enumerate(names, start=1):
            if data[key] is not None:
                line(axes, sizes, data[key], i, text)
        axes.axhline(
            data["trivial"], color="0.6", linewidth=1, linestyle=(0, (1, 3)), label="no matching at all"
        )
        if data["floor"]:
            axes.axhline(
                data["floor"], color="0.35", linewidth=1, linestyle="--", label="noise left, signal matched"
            )
        guide(axes, sizes, data["means"][0], -2 / (data["signal"] or d), f"slope −2/{data['signal'] or d}")
        log_log(axes, sizes)
        tidy(
            axes, _law(data), "neurons m in each sample", "mean squared distance $W_2^2$ (mean over neurons)"
        )
        legend(axes)

    def slopes(axes: Axes) -> None:
        middles = np.sqrt(np.array(sizes[:-1], dtype=float) * np.array(sizes[1:]))
        line(axes, middles, fit["local_slopes"], 0, "between neighbouring sizes")
        axes.axhline(
            fit["slope"], color=look_of(4).colour, linewidth=1.4, label=f"fit {minus(fit['slope'], 3)}"
        )
        axes.axhline(-2 / d, color="0.55", linestyle=":", linewidth=1.4, label=f"−2/{d}")
        if data["signal"]:
            axes.axhline(
                -2 / data["signal"], color="0.35", linestyle="--", linewidth=1.2, label=f"−2/{data['signal']}"
            )
        axes.set_xscale("log", base=2)
        ticks(axes, sizes)
        axes.set_ylim(top=0)
        calibrated = fit["dim_calibrated"]
        text = "" if calibrated is None else f", calibrated {calibrated:.1f}"
        asymptotic = "∞" if fit["dim_asymptotic"] is None else f"{fit['dim_asymptotic']:.1f}"
        tidy(
            axes,
            f"Dimension: −2/slope {asymptotic}{text}",
            "neurons m in each sample",
            "local slope of log $W_2^2$",
        )
        legend(axes)

    alt = (
        f"Log-log chart of the squared transport distance of two samples against their size, {_law(data)}: from "
        f"{data['means'][0]:.3g} at {sizes[0]} to {data['means'][-1]:.3g} at {sizes[-1]}, between its bounds."
    )
    return alt, [curve, slopes] if fit is not None else [curve]


def _law(data: TheoryValues) -> str:
    if data["law"] == "low-dim":
        return f"{data['signal']} signal axes of {data['dimension']}, noise {data['noise']:g}"
    return f"{'Gaussian' if data['law'] == 'gaussian' else 'Uniform'}, {data['dimension']} dimensions"


def rates_panels(data: TheoryValues) -> Account:
    """Several rate records: one panel each, measured between the bounds, per dimension."""

    def panel(record: TheoryValues) -> Drawer:
        return rate_panels({**record, "fit": None})[1][0]

    texts = [_law(record) for record in data["records"]]
    alt = f"Squared transport distance against sample size between its bounds: {'; '.join(texts)}."
    return alt, [panel(record) for record in data["records"]]


def two_regimes_panels(data: TheoryValues) -> Account:
    """Rate records of one low-dimensional law with several noises: distances, and local slopes."""
    records = data["records"]
    sizes, k, d = records[0]["sizes"], records[0]["signal"], records[0]["dimension"]

    def curve(axes: Axes) -> None:
        for i, record in enumerate(records):
            line(axes, sizes, record["means"], i, f"noise η = {record['noise']:g}")
            if record["floor"]:
                axes.axhline(record["floor"], color=look_of(i).colour, linewidth=1, linestyle=(0, (1, 3)))
                axes.annotate(
                    f"2·{d - k}·{record['noise']:g}²",
                    (sizes[0], record["floor"]),  # the curves start above their floors
                    fontsize=8,
                    va="top",
                    xytext=(0, -2),
                    textcoords="offset points",
                )
        guide(axes, sizes, records[0]["means"][0], -2 / k, f"slope −2/{k}")
        log_log(axes, sizes)
        tidy(axes, f"{k} signal axes of {d}", "neurons m in each sample", "mean squared distance $W_2^2$")
        legend(axes)

    def slopes(axes: Axes) -> None:
        middles = np.sqrt(np.array(sizes[:-1], dtype=float) * np.array(sizes[1:]))
        for i, record in enumerate(records):
            line(axes, middles, record["fit"]["local_slopes"], i, f"noise η = {record['noise']:g}")
        for value, style in ((-2 / k, ":"), (-2 / d, "--")):
            axes.axhline(value, color="0.5", linestyle=style, linewidth=1.2)
            axes.annotate(f"−2/{k if style == ':' else d}", (middles[0], value), fontsize=8, va="bottom")
        axes.set_xscale("log", base=2)
        ticks(axes, sizes)
        axes.set_ylim(top=0.02)
        tidy(
            axes,
            "The signal's rate, then the noise's",
            "neurons m in each sample",
            "local slope of log $W_2^2$",
        )
        legend(axes)

    last = ", ".join(f"{minus(r['fit']['local_slopes'][-1])} for noise {r['noise']:g}" for r in records)
    return f"With {k} signal axes of {d} the last local slopes are {last}.", [curve, slopes]


def dimension_panels(data: TheoryValues) -> Account:
    """Layers of a network: rate curves of their neurons, and dimensions."""
    layers = data["layers"]

    def curves(axes: Axes) -> None:
        sizes = sorted({m for layer in layers for m in layer["sizes"]})
        for i, layer in enumerate(layers):
            relative = np.array(layer["means"]) / layer["means"][0]
            line(axes, layer["sizes"], relative, i, layer["name"] if len(layers) <= 8 else None)
        log_log(axes, sizes)
        tidy(
            axes,
            "Two disjoint parts of one layer",
            "neurons in each part",
            "$W_2^2$, relative to the smallest parts",
        )
        if len(layers) <= 8:
            legend(axes)

    kinds = (
        ("rows' features", lambda r: r["features"]),
        ("Wasserstein, calibrated", lambda r: r["fit"] and r["fit"]["dim_calibrated"]),
        ("Wasserstein, −2/slope", lambda r: r["fit"] and r["fit"]["dim_asymptotic"]),
        ("approximate dimension", lambda r: r["approximate"]),
        ("approximate, centred", lambda r: r["approximate_centred"]),
    )

    def dimensions(axes: Axes) -> None:
        places = np.arange(len(layers), dtype=float)
        for i, (text, value) in enumerate(kinds):
            line(axes, places, [value(r) for r in layers], i, text, linestyle="", markersize=7)
        log_values(axes, "y")
        axes.set_xticks(
            places, [r["name"] for r in layers], rotation=20 if len(layers) > 2 else 0, ha="center"
        )
        axes.set_xlim(-0.6, len(layers) - 0.4)
        tidy(axes, "Dimension of the cloud of neurons", "layer", "dimension")
        legend(axes)

    parts = ", ".join(f"{r['name']} {show(r['fit'] and r['fit']['dim_calibrated'])}" for r in layers)
    return f"Calibrated Wasserstein dimension of each layer's neurons: {parts}.", [curves, dimensions]


def approximate_dimension_panels(data: TheoryValues) -> Account:
    """Networks of one width trained differently: approximate dimensions against the barrier."""
    rows = sorted(data["networks"], key=lambda r: r["barrier"])
    names = {"naive": "weights", "covariance": "covariance-weighted", "activations": "activations"}

    def panel(suffix: str, title: str) -> Drawer:
        def draw(axes: Axes) -> None:
            for i, (key, text) in enumerate(names.items()):
                line(axes, [r["barrier"] for r in rows], [r[key + suffix] for r in rows], i, text)
            for r in (r for r in rows if "learning_rate" in r):
                place = {"xytext": (0, -13), "textcoords": "offset points", "ha": "center"}
                axes.annotate(
                    f"{r['learning_rate']:g}", (r["barrier"], r["naive" + suffix]), fontsize=8, **place
                )
            log_values(axes, "y")
            log_values(axes, "x")
            tidy(axes, title, "barrier of the relabelled pair (nats)", "approximate dimension")
            legend(axes)

        return draw

    alt = f"Approximate dimensions against the barrier at width {data['width']}, uncentred and centred."
    return alt, [
        panel("", f"Uncentred, width {data['width']} (figures: learning rate)"),
        panel("_centred", "Centred"),
    ]
