"""Our results beside those of others, for ``reproducing.md``; see ``make_reproducing.py``."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from operator import itemgetter
from pathlib import Path
from typing import Any

from reproducing_text import (
    Lines,
    Row,
    accuracy,
    bullet,
    entry,
    head,
    of,
    printed,
    prose,
    split,
    spread,
    test,
)

from isthmus.report._study_summary import endpoints_mean
from isthmus.report._study_summary import summarise as means

# Read off the right panel of figure 2 of arXiv:2310.19103: midpoint test loss, mean of four runs.
AUTHORS = {
    "weights-incoming": (2.05, 1.40, 1.27, 0.89, 0.39, 0.085),
    "covariance": (1.35, 0.55, 0.40, 0.25, 0.14, 0.10),
    "activations": (1.22, 0.47, 0.32, 0.18, 0.13, 0.10),
    "endpoints": (1.02, 0.33, 0.19, 0.083, 0.067, 0.076),
}
RATES = (1e-4, 3.981e-4, 1.585e-3, 6.31e-3, 2.512e-2, 1e-1)
READING = 1.03  # how well a value can be read off a figure
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


def against_authors(rows: Sequence[Row], folder: Path) -> Lines:
    """Return the comparison with the authors' figure, point by point, and of the order of their methods."""
    ours: dict[str, dict[float, Any]] = {}
    spans: dict[tuple[str, float], tuple[float, float]] = {}
    for method in AUTHORS:
        part = of(test(rows), "none" if method == "endpoints" else method)
        value = endpoints_mean("midpoint_loss") if method == "endpoints" else itemgetter("midpoint_loss")
        assert value is not None
        ours[method] = {p.x: p for p in means(part, "learning_rate", value)}
        for (rate,), pairs in split(part, ["learning_rate"]).items():
            spans[method, rate] = min(map(value, pairs)), max(map(value, pairs))
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
            low, high = spans[method, rate]
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
        f"by the {100 * (READING - 1):.0f} % of reading a figure"
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
        f"{widest(spans)}.",
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


def widest(spans: Mapping[tuple[str, float], tuple[float, float]]) -> str:
    """Name the method and learning rate where single pairs differ most."""
    method, rate = max(spans, key=lambda place: spans[place][1] / spans[place][0])
    low, high = spans[method, rate]
    return f"`{method}` at {rate:.3g} spans {low:.3f} to {high:.3f}"


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
