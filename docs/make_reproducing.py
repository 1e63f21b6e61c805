"""Write ``reproducing.md`` from stored results: ``python docs/make_reproducing.py [RESULTS]``.

Reads every folder of ``results/`` that ``isthmus study export`` wrote. Every number of ours comes from its records;
those of others are listed in ``reproducing_others.py`` with their sources.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from reproducing_others import against_authors, against_published
from reproducing_text import Lines, Row, duration, entry, head, interval, of, printed, prose, split, test

from isthmus.files import atomic_path
from isthmus.report._study_figures import correlations, sweep_of
from isthmus.report._study_summary import endpoints_mean, exponent
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
REFRESHED = {"none": "", "batchnorm": ", BatchNorm statistics recomputed"}
CAPTIONS = {
    "midpoint": "Loss at the midpoint",
    "barrier": "Barrier",
    "error": "Error of linear connectivity",
    "accuracy": "Accuracy at the midpoint",
    "methods": "Midpoint and barrier, method by method",
    "line": "Loss along the line",
    "dimension": "Approximate dimension against barrier",
}


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
    sweep = sweep_of(rows)
    x = sweep.x
    yield f"## {name}"
    yield ""
    yield from about(name, rows, run)
    if name == "paper-mnist":
        yield from against_authors(rows, folder)
    for combination in sweep.combinations:
        part, place = combination.rows, combination.words
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
    yield from weights_against_activations(rows, [x, *sweep.others])
    yield from figures(folder, {c.suffix: c.words for c in sweep.combinations})


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
        yield f"**{title}, {split_name}{REFRESHED[refresh]}{where}**"
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
    ends = endpoints_mean(column)
    if ends is not None:
        yield "endpoints", means(of(rows, methods[0]), x, lambda r: scale * ends(r))
    for method in methods:
        yield method, means(of(rows, method), x, lambda r: scale * r[column])


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
    yield from turning(rows)


def turning(rows: Sequence[Row]) -> Lines:
    """Name the methods whose error grows again with width, by more than two standard errors, and from where on."""
    named: list[str] = []
    for method in dict.fromkeys(r["method"] for r in rows if r["method"] != "none"):
        points = means(of(rows, method), "width", "lmc_error_sup")
        least, widest = min(points, key=lambda p: p.mean), points[-1]
        if widest.mean - least.mean > 2 * ((least.error or 0.0) + (widest.error or 0.0)):
            named.append(
                f"`{method}` has its least error, {least.mean:.2f}, at width {least.x:g} and {widest.mean:.2f} "
                f"at {widest.x:g}"
            )
    if named:
        yield from prose(
            f"Not every method gains from width, so a power law does not describe all: {'; '.join(named)}."
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
        how = "" if refresh == "none" else f"{REFRESHED[refresh]},"
        yield from prose(
            f"Weights against activations{how} by midpoint test loss: `activations` beats `weights` at "
            f"{len(better)} of {len(places)} places ({', '.join(AXES.get(c, c) for c in columns)})"
            + (f": {'; '.join(better)}." if better and len(better) < len(places) else ".")
        )


def figures(folder: Path, places: Mapping[str, str]) -> Lines:
    """Return the figures of a results folder, each linked to its vector form.

    Args:
        folder: the results.
        places: what the ends of the files' names stand for.
    """
    there = folder / "figures"
    for kind in FIGURES:
        for path in sorted(p for p in there.glob("*.png") if p.stem.split("-")[0] == kind):
            shown = Path(os.path.relpath(path, HERE)).as_posix()
            rest = path.stem.partition("-")[2]
            place = max((p for p in places if p and f"-{rest}".endswith(f"-{p}")), key=len, default="")
            what = rest.removesuffix(place).strip("-")
            how = REFRESHED.get(what, what).removeprefix(", ")
            details = ", ".join(d for d in (how, places.get(place)) if d)
            text = CAPTIONS[kind] + (f" ({details})" if details else "")
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
