"""Write ``reproducing.md`` from stored results: ``python docs/make_reproducing.py [RESULTS]``.

Reads every folder of ``results/`` that ``isthmus study export`` wrote. Every number of ours comes from its records;
those of others are listed below with their sources. What was read off a figure is good to about 3 %.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from reproducing_text import (
    accuracy,
    bullet,
    duration,
    entry,
    head,
    interval,
    of,
    printed,
    prose,
    split,
    spread,
    test,
)

from isthmus.checkpoints import atomic_path
from isthmus.report._study_figures import correlations
from isthmus.report._study_summary import exponent, swept_columns
from isthmus.report._study_summary import summarise as means
from isthmus.study import preset_names, read_rows, read_run, read_study, transport_exponent

HERE = Path(__file__).parent
ORDER = (
    "paper-mnist",
    "paper-mnist-adam",
    "width",
    "depth",
    "epochs",
    "init",
    "cifar10-resnet-cpu",
    "cifar10-vgg-cpu",
)
AXES = {
    "learning_rate": "learning rate",
    "width": "width",
    "depth": "hidden layers",
    "epochs": "epochs",
}
FIGURES = ("midpoint", "barrier", "error", "accuracy", "methods", "line", "dimension")
CAPTIONS = {
    "midpoint": "Loss at the midpoint",
    "barrier": "Barrier",
    "error": "Error of linear connectivity",
    "accuracy": "Accuracy at the midpoint",
    "methods": "Midpoint and barrier, method by method",
    "line": "Loss along the line",
    "dimension": "Approximate dimension against barrier",
}

# Read off the right panel of figure 2 of arXiv:2310.19103: midpoint test loss, mean of four runs.
AUTHORS = {
    "weights-incoming": (2.05, 1.40, 1.27, 0.89, 0.39, 0.085),
    "covariance": (1.35, 0.55, 0.40, 0.25, 0.14, 0.10),
    "activations": (1.22, 0.47, 0.32, 0.18, 0.13, 0.10),
    "endpoints": (1.02, 0.33, 0.19, 0.083, 0.067, 0.076),
}
READING = 1.03
RATES = (1e-4, 3.981e-4, 1.585e-3, 6.31e-3, 2.512e-2, 1e-1)
# Test accuracy (%) at the midpoint, aligned by correlation; after renormalisation; mean of the endpoints. Figure
# objects of github.com/KellerJordan/REPAIR (arXiv:2211.08403).
PUBLISHED = {
    "resnet20": {
        "ResNet-20, width 1": (12.7, 67.6, 93.6),
        "ResNet-20, width 4": (34.8, 92.1, 96.1),
        "ResNet-20, width 16": (16.1, 95.4, 96.9),
        "ResNet-20, width 32": (13.2, 95.95, 96.9),
    },
    "vgg16": {"VGG16": (27.9, 90.1, 93.3), "VGG11": (61.3, 88.2, 92.2)},
}

Row = Mapping[str, Any]
Lines = Iterator[str]


def main() -> None:
    """Read the results and write the page beside this file."""
    results = Path(sys.argv[1]) if len(sys.argv) > 1 else HERE.parent / "results"
    with atomic_path(HERE / "reproducing.md") as temporary:
        temporary.write_text("\n".join(page(results)) + "\n", encoding="utf-8")


def page(results: Path) -> Lines:
    """Return the lines of the page."""
    found = {f.parent.name: f.parent for f in sorted(results.glob("*/records.parquet"))}
    names = [*(n for n in ORDER if n in found), *(n for n in found if n not in ORDER)]
    if not names:
        raise SystemExit(f"{results}: no folder with records.parquet. Run and export a study first.")
    rows = {name: read_rows(found[name]) for name in names}
    runs = {name: read_run(found[name]) for name in names}
    yield "# Reproducing the paper"
    yield ""
    yield from prose(
        "The experiments of *Proving Linear Mode Connectivity of Neural Networks via Optimal Transport* (Ferbach, "
        "Goujaud, Gidel and Dieuleveut, AISTATS 2024), rerun and extended. `python docs/make_reproducing.py` writes "
        "this page from the records under `results/`; no number of ours is typed by hand. To make "
        "a section's results anew:"
    )
    yield "```sh"
    yield "isthmus study run paper-mnist --out runs/paper-mnist --executor processes --threads 1"
    yield "isthmus study export runs/paper-mnist --out results/paper-mnist"
    yield "isthmus study figures results/paper-mnist"
    yield "```"
    yield ""
    yield from prose(
        "Values are means over pairs of networks ± one standard error; losses and barriers are in nats per example. "
        "*None* is the line without alignment. Methods are told apart in [matching](matching.md), the file format in "
        "[studies](studies.md)."
    )
    yield from summary(rows, runs)
    for name in names:
        yield from section(name, rows[name], runs[name], found[name])


def summary(rows: Mapping[str, Sequence[Row]], runs: Mapping[str, dict[str, Any] | None]) -> Lines:
    """Return the table of what was run and what it took."""
    yield "| study | pairs measured | units done | CPU time | elapsed | units at a time |"
    yield "| --- | --- | --- | --- | --- | --- |"
    for name, table in rows.items():
        pairs, run = len({r["unit"] for r in table}), runs[name]
        if run is None:
            yield f"| [{name}](#{name}) | {pairs} | | | | |"
            continue
        done, failed, total = (sum(c[k] for c in run["units"].values()) for k in ("done", "failed", "all"))
        units = f"{done} of {total}" + (f", {failed} failed" if failed else "")
        times = f"{duration(run['cpu_seconds'])} | {duration(run['busy_seconds'])} | {run['at_once']:.1f}"
        yield f"| [{name}](#{name}) | {pairs} | {units} | {times} |"
    yield ""
    yield from prose(
        "CPU time is the sum over units; elapsed is the time during which any unit ran, pauses left out. Both are "
        "those of the machine as it was, with whatever else ran on it; CPU time suffers less from that."
    )


def section(name: str, rows: Sequence[Row], run: Mapping[str, Any] | None, folder: Path) -> Lines:
    """Return the section of one study."""
    swept = swept_columns(rows)
    x = next((c for c in swept if c in AXES), "learning_rate")
    others = [c for c in swept if c != x]
    yield f"## {name}"
    yield ""
    yield from about(name, rows, run)
    if name == "paper-mnist":
        yield from against_authors(rows, folder)
    for chosen, part in split(rows, others).items():
        place = ", ".join(f"{AXES.get(c, c)} {v}" for c, v in zip(others, chosen, strict=True))
        yield from tables(part, x, place)
        if name.startswith("paper-"):
            yield from tables(part, x, place, "train")
        if x == "width":
            yield from exponents(part, place)
        yield from dimensions(part, x, place)
        if name.startswith("paper-"):
            yield from layers(part, x)
    if len({r["refresh"] for r in rows}) > 1:
        yield from against_published(rows)
    yield from weights_against_activations(rows, [x, *others])
    yield from figures(folder)


def about(name: str, rows: Sequence[Row], run: Mapping[str, Any] | None) -> Lines:
    """Return what was run, and by which code."""
    first = rows[0]
    if name in preset_names():
        yield from prose(read_study(name).description)
    seeds = len({(r["seed_a"], r["seed_b"]) for r in rows})
    yield from prose(
        f"Data {first['data']}, {first['optimiser']}, batches of {first['batch_size']}, {first['warmup_steps']} "
        f"warm-up steps, {first['schedule']} schedule, weight decay {first['weight_decay']:g}, initial values "
        f"`{first['initialisation']}`, products in {first['precision']}, augmentation "
        f"{first.get('augment', 'none')}; {seeds} pair(s) of seeds at each place; activations compared on "
        f"{first['statistics']:,} training images; {first['points']} points on each line."
    )
    commits = dict.fromkeys(
        r["commit"][:12] + (" with uncommitted changes" if r["dirty"] else "") for r in rows if r["commit"]
    )
    processors = "" if run is None or not run["processors"] else f", {'; '.join(run['processors'])}"
    yield from prose(
        f"Records: Isthmus {first['version_isthmus']}, torch {first['version_torch']}, {first['version_machine']}"
        f"{processors}, {first['threads']} thread(s) per unit"
        + (f", commit {' and '.join(commits)}" if commits else "")
        + "."
    )


def tables(rows: Sequence[Row], x: str, place: str, split_name: str = "test") -> Lines:
    """Return midpoint losses, barriers and accuracies of a split by method: a table each, or one for a single place."""
    places, where = sorted({r[x] for r in rows}), f", {place}" if place else ""
    found: dict[tuple[str, str], dict[str, dict[float, str]]] = {}
    for column, title, scale in (
        ("midpoint_loss", "Midpoint loss", 1.0),
        ("barrier", "Barrier", 1.0),
        ("midpoint_accuracy", "Midpoint accuracy (%)", 100.0),
    ):
        if any(r[column] is None for r in rows):
            continue
        for (refresh,), part in split([r for r in rows if r["split"] == split_name], ["refresh"]).items():
            values = by_method(part, x, column, scale)
            found[title, refresh] = {k: printed(v, 1 if scale > 1 else 3) for k, v in values}
    if len(places) == 1:
        yield from one_place(found, f"{split_name.capitalize()}{where}", places[0])
        return
    for (title, refresh), values in found.items():
        how = "" if refresh == "none" else ", BatchNorm statistics recomputed"
        yield f"**{title}, {split_name}{how}{where}**"
        yield ""
        yield from head(AXES.get(x, x), places)
        yield from (entry(name, at, places) for name, at in values.items())
        yield ""


def one_place(
    found: Mapping[tuple[str, str], Mapping[str, Mapping[float, str]]], title: str, place: float
) -> Lines:
    """Return one table of all that was measured at a single place: a row per method, a column per measure."""
    columns = [name + ("" if refresh == "none" else ", BatchNorm reset") for name, refresh in found]
    yield f"**{title}**"
    yield ""
    yield f"| method | {' | '.join(columns)} |"
    yield "| --- " * (len(columns) + 1) + "|"
    for name in dict.fromkeys(name for values in found.values() for name in values):
        yield f"| {name} | {' | '.join(values.get(name, {}).get(place, '') for values in found.values())} |"
    yield ""


def by_method(rows: Sequence[Row], x: str, column: str, scale: float) -> Iterator[tuple[str, Any]]:
    """Yield the means of a column by place, of the endpoints where that makes sense and of every method."""
    methods = list(dict.fromkeys(r["method"] for r in rows))
    what = {"midpoint_loss": "loss", "midpoint_accuracy": "accuracy"}.get(column)
    if what is not None:
        ends = means(of(rows, methods[0]), x, lambda r: scale * (r[f"{what}_a"] + r[f"{what}_b"]) / 2)
        yield "endpoints", ends
    for method in methods:
        yield method, means(of(rows, method), x, lambda r: scale * r[column])


def against_authors(rows: Sequence[Row], folder: Path) -> Lines:
    """Return the comparison with the authors' figure, point by point, and of the order of their methods."""
    ours: dict[str, dict[float, Any]] = {}
    for method in AUTHORS:
        part = of(test(rows), "none" if method == "endpoints" else method)
        value = (lambda r: (r["loss_a"] + r["loss_b"]) / 2) if method == "endpoints" else "midpoint_loss"
        ours[method] = {p.x: p for p in means(part, "learning_rate", value)}
    yield "### Against the authors' figure, point by point"
    yield ""
    yield from prose(
        "Midpoint test loss: ours (mean ± standard error over pairs) / the authors' (mean of four runs, read off their "
        "figure)."
    )
    yield from head("learning rate", RATES)
    ratios: list[tuple[float, str, float, float]] = []
    outside: list[str] = []
    for method, theirs in AUTHORS.items():
        cells: list[str] = []
        for rate, value in zip(RATES, theirs, strict=True):
            point = ours[method].get(rate)
            if point is None:
                cells.append("")
                continue
            cells.append(f"{point.mean:.3f}{spread(point.error)} / {value:g}")
            errors = abs(point.mean - value) / point.error if point.error else float("inf")
            ratios.append((point.mean / value - 1, method, rate, errors))
            low, high = extent(rows, method, rate)
            if not low / READING <= value <= high * READING:
                outside.append(f"{method} at {rate:g} ({low:.3f} to {high:.3f} / {value:g})")
        yield f"| {method} | " + " | ".join(cells) + " |"
    biases = read_biases(folder)
    if biases:
        points = means(biases, "learning_rate", "without_bias")
        yield entry("covariance, biases ignored", printed(points), RATES)
    yield ""
    near = sum(abs(r[0]) <= 0.1 for r in ratios)
    far = sorted((r for r in ratios if abs(r[0]) > 0.1), key=lambda r: -abs(r[0]))
    yield from prose(
        f"{len(ratios) - len(outside)} of {len(ratios)} of the authors' values lie in the range of our pairs, widened "
        "by the 3 % of reading a figure"
        + (f"; the others: {', '.join(outside)}" if outside else "")
        + f". {near} of {len(ratios)} of our means lie within 10 % of theirs."
        + (" Farther: " if far else "")
        + "; ".join(f"{m} at {rate:g}: {100 * r:+.0f} % ({e:.0f} standard errors)" for r, m, rate, e in far)
        + ("." if far else "")
    )
    yield from ordering(ours)
    yield from prose("Where and why the two differ:")
    for text in (
        "Seeds: the authors' notebook fixes none; ours are listed in the records and shared by all learning rates. "
        "Single pairs differ by much more than the means above do from the authors' where the loss falls steeply: "
        f"{widest(rows)}.",
        *biases_explained(biases),
        "Descent: theirs stops at the first layer that does not improve on the identity. That changes nothing here: "
        "for `weights-incoming` and `covariance` a layer depends on the layers before it alone, so one pass in order "
        "is exact.",
        f"Our products are in {rows[0]['precision']}; weights and losses are float32.",
        "It plots the midpoint test loss as the error. The barrier, which is zero where no point of the line is worse "
        "than the chord between the ends, stands below.",
        "Reading a value off a figure on a logarithmic axis is good to about 3 %, less near the bottom.",
    ):
        yield bullet(text)
    yield ""


def read_biases(folder: Path) -> list[Row]:
    """Return what ``examples/paper_biases.py`` measured, if it was run."""
    path = folder / "biases.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []


def biases_explained(biases: Sequence[Row]) -> Lines:
    """Say how much of a difference it makes that the authors' matching ignores biases."""
    text = "Biases: the authors' matching ignores them, `covariance` takes the bias as one more input of constant 1. "
    if not biases:
        yield text + "Its share was not measured."
        return
    shifts = {p.x: p for p in means(biases, "learning_rate", lambda r: r["without_bias"] - r["with_bias"])}
    rate = max(shifts, key=lambda x: abs(shifts[x].mean))
    off = max(abs(r["with_bias"] - r["library"]) for r in biases)
    yield text + (
        "Matched once more on the same pairs with and without them (`examples/paper_biases.py`, independently of the "
        f"library; with biases it agrees with it to {off:.0e} on every pair), ignoring them changes the midpoint test "
        f"loss by {min(p.mean for p in shifts.values()):+.3f} to {max(p.mean for p in shifts.values()):+.3f}, most at "
        f"{rate:.3g}: {shifts[rate].mean:+.3f}{spread(shifts[rate].error)}."
    )


def widest(rows: Sequence[Row]) -> str:
    """Name the method and learning rate where single pairs differ most."""
    rates = sorted({r["learning_rate"] for r in rows})
    places = [(m, x, *extent(rows, m, x)) for m in AUTHORS for x in rates]
    method, rate, low, high = max(places, key=lambda p: p[3] / p[2])
    return f"`{method}` at {rate:.3g} spans {low:.3f} to {high:.3f}"


def extent(rows: Sequence[Row], method: str, rate: float) -> tuple[float, float]:
    """Return the range over single pairs of the midpoint test loss, or of the endpoints' mean, at one learning rate."""
    part = [
        r for r in of(test(rows), "none" if method == "endpoints" else method) if r["learning_rate"] == rate
    ]
    ends = method == "endpoints"
    values = [(r["loss_a"] + r["loss_b"]) / 2 if ends else r["midpoint_loss"] for r in part]
    return min(values), max(values)


def ordering(ours: Mapping[str, Mapping[float, Any]]) -> Lines:
    """Return at how many places two methods stand in the same order as in the authors' figure."""
    agree, total, against = 0, 0, list[str]()
    for a, b in itertools.combinations([m for m in AUTHORS if m != "endpoints"], 2):
        for k, rate in enumerate(RATES):
            if rate not in ours[a] or rate not in ours[b] or AUTHORS[a][k] == AUTHORS[b][k]:
                continue
            total += 1
            mine, theirs = ours[a][rate].mean - ours[b][rate].mean, AUTHORS[a][k] - AUTHORS[b][k]
            agree += (mine > 0) == (theirs > 0)
            if (mine > 0) != (theirs > 0):
                against.append(f"{a} − {b} at {rate:g}: ours {mine:+.3f}, theirs {theirs:+.3f}")
    yield from prose(
        f"Order of the methods: in {agree} of {total} comparisons of two methods at one learning rate the same one is "
        "better as in the authors' figure." + (f" Not so: {'; '.join(against)}." if against else "")
    )


def exponents(rows: Sequence[Row], place: str) -> Lines:
    """Return fitted exponents of width, beside the theory's for the error; a fit needs three widths."""
    rows = [r for r in test(rows) if r["refresh"] == rows[0]["refresh"]]
    widths = sorted({float(r["width"]) for r in rows})
    if len(widths) < 3:
        return
    yield f"**Fitted exponents of the width, test{f', {place}' if place else ''}**"
    yield ""
    yield "| method | of the barrier | of the error of linear connectivity | of its bound | dimension, centred |"
    yield "| --- | --- | --- | --- | --- |"
    for method in dict.fromkeys(r["method"] for r in rows):
        part = of(rows, method)
        fits = [exponent(means(part, "width", column)) for column in ("barrier", "lmc_error_sup")]
        widest = [r["dimension_centred"] for r in part if float(r["width"]) == widths[-1]]
        dimension = sum(widest) / len(widest) if widest and None not in widest else None
        theory = "" if dimension is None else f"{transport_exponent(widths, dimension) / 2:.2f}"
        cells = ["" if f is None else f"{f[0]:.2f} ± {f[1]:.2f}" for f in fits]
        yield f"| {method} | {' | '.join(cells)} | {theory} | {'' if dimension is None else f'{dimension:.1f}'} |"
    yield ""
    yield from prose(
        "That of the bound is half the exponent at which the squared transport distance of two layers of independent "
        "Gaussian neurons of that dimension falls over these widths (`isthmus.study.transport_exponent`). It bounds "
        "the error of independent neurons from above, so a measured error may fall faster; trained neurons are not "
        "independent."
    )


def dimensions(rows: Sequence[Row], x: str, place: str) -> Lines:
    """Return dimensions and their rank correlations with the barrier, where they were measured."""
    part = [r for r in rows if r["refresh"] == rows[0]["refresh"]]
    for column, name in (("dimension", "uncentred"), ("dimension_centred", "centred")):
        known = [r for r in test(part) if r[column] is not None]
        if not known:
            continue
        places = sorted({r[x] for r in known})
        where = f", {place}" if place else ""
        yield f"**Approximate dimension, {name}, mean over layers of A and B{where}**"
        yield ""
        yield from head(AXES.get(x, x), places)
        for method in dict.fromkeys(r["method"] for r in known):
            yield entry(method, printed(means(of(known, method), x, column), 1), places)
        yield ""
        found = correlations(part, x, column)
        if found:
            yield from prose(
                "Spearman's correlation of that dimension with the test barrier, 95 % intervals by bootstrap over "
                f"pairs{where}:"
            )
            yield f"| method | over {AXES.get(x, x)} and pairs | at fixed {AXES.get(x, x)} | n |"
            yield "| --- | --- | --- | --- |"
            for c in found:
                overall, within = (interval(c[k]) for k in ("overall", "within"))
                yield f"| {c['method']} | {overall} | {within} | {c['overall']['n']} |"
            yield ""
            yield from directions(found, AXES.get(x, x))


def directions(found: Sequence[Mapping[str, Any]], axis: str) -> Lines:
    """Say for which methods a larger dimension goes with a larger barrier, and for which the other way round."""
    signs: dict[str, list[str]] = {"with": [], "against": [], "neither": []}
    for c in found:
        low, high = c["overall"]["low"], c["overall"]["high"]
        if low is not None:
            sign = "with" if low > 0 else "against" if high < 0 else "neither"
            signs[sign].append(f"`{c['method']}`")
    parts = (
        ("with", "a larger dimension goes with a larger barrier for"),
        ("against", "a larger dimension goes with a smaller barrier for"),
        ("neither", "the interval holds zero for"),
    )
    said = [f"{words} {', '.join(signs[key])}" for key, words in parts if signs[key]]
    if not said:
        yield from prose("With fewer than three pairs of seeds there are no intervals.")
        return
    yield from prose(
        f"Over {axis} and pairs, {'; '.join(said)}. The barrier changes with {axis} for many reasons, so this is no "
        f"statement about causes; at fixed {axis} only the seeds differ."
    )


def layers(rows: Sequence[Row], x: str) -> Lines:
    """Return dimensions layer by layer, uncentred and centred."""
    known = [r for r in test(rows) if r["dimension_by_layer"] is not None]
    if not known:
        return
    places = sorted({r[x] for r in known})
    yield "**Approximate dimension by layer, uncentred (centred), mean of A and B over pairs**"
    yield ""
    yield from head(f"method, layer; {AXES.get(x, x)}", places)
    for method in dict.fromkeys(r["method"] for r in known):
        for layer in range(len(known[0]["dimension_by_layer"])):
            cells: list[str] = []
            for place in places:
                part = [r for r in of(known, method) if r[x] == place]
                two = [
                    sum(r[c][layer] for r in part) / len(part)
                    for c in ("dimension_by_layer", "dimension_centred_by_layer")
                ]
                cells.append(f"{two[0]:.1f} ({two[1]:.1f})")
            yield f"| {method}, {layer + 1} | " + " | ".join(cells) + " |"
    yield ""


def against_published(rows: Sequence[Row]) -> Lines:
    """Return midpoint accuracies aligned, after BatchNorm reset and of the endpoints, beside published ones."""
    first = rows[0]
    yield "### Midpoint accuracy beside published results"
    yield ""
    yield from prose(
        "Test accuracy in %, alignment by correlation; published: REPAIR (Jordan et al. 2022, arXiv:2211.08403), "
        f"trained in full and with augmentation. Ours: {first['epochs']} epochs, augmentation "
        f"{first.get('augment', 'none')}; so compare the columns with each other rather than with the "
        "published rows."
    )
    yield "| network | no alignment | aligned | + BatchNorm reset | endpoints |"
    yield "| --- | --- | --- | --- | --- |"
    families = list(dict.fromkeys(r["family"] for r in rows))
    for key, part in split(test(rows), ["family", "width"]).items():
        plain, reset = (
            [r for r in of(part, "correlation") if r["refresh"] == how] for how in ("none", "batchnorm")
        )
        nothing = [r for r in of(part, "none") if r["refresh"] == "none"]
        cells = [accuracy(values) for values in (nothing, plain, reset)]
        ends = sum(50 * (r["accuracy_a"] + r["accuracy_b"]) for r in plain) / len(plain) if plain else None
        yield f"| {key[0]}, width {key[1]:g} | {' | '.join(cells)} | {'' if ends is None else f'{ends:.1f}'} |"
    for family in dict.fromkeys(f.removesuffix("_bn") for f in families):
        for name, values in PUBLISHED.get(family, {}).items():
            yield f"| *{name}, published* | | " + " | ".join(f"*{v:g}*" for v in values) + " |"
    yield ""
    if "vgg16" in families:
        yield from prose("VGG16 without BatchNorm has no statistics to recompute: its two columns agree.")


def weights_against_activations(rows: Sequence[Row], columns: Sequence[str]) -> Lines:
    """Return at how many places activation matching beats weight matching (the paper's figure 3)."""
    if not {"weights", "activations"} <= {r["method"] for r in rows}:
        return
    for (refresh,), part in split(test(rows), ["refresh"]).items():
        places = split(part, list(columns))
        better: list[str] = []
        for key, chosen in places.items():
            mean = {
                m: sum(r["midpoint_loss"] for r in of(chosen, m)) / len(of(chosen, m))
                for m in ("weights", "activations")
            }
            if mean["activations"] < mean["weights"]:
                better.append(", ".join(f"{v:g}" if isinstance(v, float) else str(v) for v in key))
        how = "" if refresh == "none" else ", BatchNorm statistics recomputed,"
        yield from prose(
            f"Weights against activations{how} by midpoint test loss: `activations` beats `weights` at "
            f"{len(better)} of {len(places)} places ({', '.join(AXES.get(c, c) for c in columns)})"
            + (f": {'; '.join(better)}." if better and len(better) < len(places) else ".")
        )


def figures(folder: Path) -> Lines:
    """Return the figures of a results folder, each linked to its vector form."""
    there = folder / "figures"
    for kind in FIGURES:
        for path in sorted(p for p in there.glob("*.png") if p.stem.split("-")[0] == kind):
            shown = Path(os.path.relpath(path, HERE)).as_posix()
            rest = path.stem.partition("-")[2]
            text = CAPTIONS[kind] + (f" ({rest})" if rest else "")
            yield f"![{text}]({shown})"
            yield ""
            vectors = [
                f"[{k.upper()}]({shown[:-3]}{k})"
                for k in ("svg", "pdf")
                if path.with_suffix(f".{k}").is_file()
            ]
            yield f"*{text}, {folder.name}.*" + (f" As {' and '.join(vectors)}." if vectors else "")
            yield ""


if __name__ == "__main__":
    main()
