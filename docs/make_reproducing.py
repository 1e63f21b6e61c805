"""Write ``reproducing.md`` from stored records: ``python docs/make_reproducing.py results/paper-mnist``.

Every number of ours comes from the records; the authors' are read off the right panel of their figure 2, mean of four
runs, and so are good to about 3 %.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from isthmus.checkpoints import atomic_path
from isthmus.report._study_figures import correlations
from isthmus.report._study_summary import summarise as means
from isthmus.study import read_rows

AUTHORS = {
    "weights-incoming": (2.05, 1.40, 1.27, 0.89, 0.39, 0.085),
    "covariance": (1.35, 0.55, 0.40, 0.25, 0.14, 0.10),
    "activations": (1.22, 0.47, 0.32, 0.18, 0.13, 0.10),
    "endpoints": (1.02, 0.33, 0.19, 0.083, 0.067, 0.076),
}
RATES = (1e-4, 3.981e-4, 1.585e-3, 6.31e-3, 2.512e-2, 1e-1)

Row = Mapping[str, Any]


def main() -> None:
    """Read the folder given on the command line and write the page beside this file."""
    folder = Path(sys.argv[1])
    rows = read_rows(folder)
    page = "\n".join([*header(rows), *midpoints(rows), *barriers(rows), *dimensions(rows), *footer(rows)])
    with atomic_path(Path(__file__).with_name("reproducing.md")) as temporary:
        temporary.write_text(page, encoding="utf-8")


def header(rows: Sequence[Row]) -> list[str]:
    """Return what was run."""
    first = rows[0]
    pairs = len({(r["seed_a"], r["seed_b"]) for r in rows})
    return [
        "# Reproducing the paper",
        "",
        "This page is written by `python docs/make_reproducing.py results/paper-mnist` from the records of",
        "`isthmus study run paper-mnist`; no number of ours is typed by hand.",
        "",
        f"Perceptron 784-{'-'.join([format(first['width'], 'g')] * first['depth'])}-10 on {first['data'].upper()}, "
        f"{first['optimiser'].upper()} with momentum {first['momentum']:g}, batches of {first['batch_size']}, "
        f"{first['epochs']} epochs, {first['warmup_steps']} warm-up steps, cosine to zero; {pairs} pairs per "
        f"learning rate; products in {first['precision']}, weights in float32; activations compared on "
        f"{first['statistics']:,} training images.",
        "",
    ]


def midpoints(rows: Sequence[Row]) -> list[str]:
    """Return the table of midpoint test losses beside the authors'."""
    lines = [
        "## Midpoint test loss, point by point",
        "",
        "Mean ± standard error over pairs, nats per example. The authors' rows are read off their figure.",
        "",
        *head(),
    ]
    unmoved = [r for r in test(rows) if r["method"] == "none"]
    ends = means(unmoved, "learning_rate", lambda r: (r["loss_a"] + r["loss_b"]) / 2)
    lines.append(line("endpoints", ends))
    lines.append(plain("endpoints, authors", AUTHORS["endpoints"]))
    deviations: list[tuple[float, str, float]] = []
    for method in dict.fromkeys(r["method"] for r in rows):
        ours = means([r for r in test(rows) if r["method"] == method], "learning_rate", "midpoint_loss")
        lines.append(line(method, ours))
        if method in AUTHORS:
            lines.append(plain(f"{method}, authors", AUTHORS[method]))
            for point in ours:
                theirs = dict(zip(RATES, AUTHORS[method], strict=True))[point.x]
                deviations.append((point.mean / theirs - 1, method, point.x))
    if deviations:
        worst = sorted(deviations, key=lambda d: -abs(d[0]))
        within = sum(abs(d[0]) <= 0.1 for d in deviations)
        lines += [
            "",
            f"{within} of {len(deviations)} points lie within 10 % of the authors' values. Farthest: "
            + "; ".join(f"{m} at {x:g}: {100 * d:+.0f} %" for d, m, x in worst[:3])
            + ".",
        ]
    return [*lines, ""]


def barriers(rows: Sequence[Row]) -> list[str]:
    """Return the tables of barriers, test and train."""
    lines: list[str] = []
    for split in ("test", "train"):
        lines += [f"## Barrier, {split}", "", *head()]
        for method in dict.fromkeys(r["method"] for r in rows):
            part = [r for r in rows if r["method"] == method and r["split"] == split]
            lines.append(line(method, means(part, "learning_rate", "barrier")))
        lines.append("")
    return lines


def dimensions(rows: Sequence[Row]) -> list[str]:
    """Return dimensions and their rank correlations with the barrier, where they were measured."""
    lines: list[str] = []
    for column, name in (("dimension", "uncentred"), ("dimension_centred", "centred")):
        known = [r for r in test(rows) if r[column] is not None]
        if not known:
            continue
        lines += [f"## Approximate dimension, {name}", "", "Mean over layers, of A and B.", "", *head()]
        for method in dict.fromkeys(r["method"] for r in known):
            lines.append(
                line(method, means([r for r in known if r["method"] == method], "learning_rate", column))
            )
        lines += [
            "",
            "Spearman's correlation with the test barrier, with 95 % intervals by bootstrap over pairs of seeds:",
            "",
            "| method | over learning rates and pairs | at fixed learning rate | n |",
            "| --- | --- | --- | --- |",
        ]
        for c in correlations(rows, "learning_rate", column):
            overall, within = (interval(c[k]) for k in ("overall", "within"))
            lines.append(f"| {c['method']} | {overall} | {within} | {c['overall']['n']} |")
        lines.append("")
    return lines


def footer(rows: Sequence[Row]) -> list[str]:
    """Return why values may differ, and where the records come from."""
    first = rows[0]
    return [
        "## Why values differ",
        "",
        "- The authors' notebook fixes no seeds; ours are 0 to 7, shared by all learning rates.",
        "- Its descent loops stop at the first layer that does not improve and measure progress against the identity;",
        "  its matching ignores biases. Ours matches `covariance` with the bias as one more input of constant 1.",
        "- What it plots as error is the midpoint test loss; the barrier above the chord is ours.",
        "",
        f"Records: Isthmus {first['version_isthmus']}, torch {first['version_torch']}, {first['version_machine']}, "
        f"{first['threads']} thread(s) per unit, commit {first['commit']}"
        + (" with uncommitted changes" if first["dirty"] else "")
        + ".",
        "",
    ]


def head() -> list[str]:
    """Return the head of a table over learning rates."""
    return [
        "| learning rate | " + " | ".join(f"{r:.1e}" for r in RATES) + " |",
        "| --- " * (len(RATES) + 1) + "|",
    ]


def line(name: str, points: Sequence[Any]) -> str:
    """Return a row of means and standard errors; empty where a learning rate has no records."""
    cells = {p.x: f"{p.mean:.3f}" + ("" if p.error is None else f" ± {p.error:.3f}") for p in points}
    return f"| {name} | " + " | ".join(cells.get(r, "") for r in RATES) + " |"


def plain(name: str, values: Sequence[float]) -> str:
    """Return a row of given values."""
    return f"| *{name}* | " + " | ".join(f"*{v:g}*" for v in values) + " |"


def interval(found: Mapping[str, Any]) -> str:
    """Print a correlation."""
    if found["value"] is None:
        return "undefined"
    return f"{found['value']:.2f}" + (
        "" if found["low"] is None else f" [{found['low']:.2f}, {found['high']:.2f}]"
    )


def test(rows: Sequence[Row]) -> list[Row]:
    """Return the rows of the test split."""
    return [r for r in rows if r["split"] == "test"]


if __name__ == "__main__":
    main()
