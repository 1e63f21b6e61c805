"""Tables and growth figure of the page on assignment, made from the record of :mod:`benchmarks.assignment`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.measuring import exponent

MARKER = "<!-- made by benchmarks/assignment.py --table -->"
NAMES = {"isthmus": "isthmus", "lapjvh": "lapx lapjvh", "scipy": "SciPy", "pot": "POT emd"}
COLOURS = {
    "isthmus": "#0072B2",
    "lapjvh": "#D55E00",
    "scipy": "#009E73",
}  # Okabe and Ito: told apart by all eyes
MARKS = {"isthmus": "o", "lapjvh": "s", "scipy": "^"}
GROWTH = ("gaussian", "low-rank", "planted")


def tables(record: dict[str, Any]) -> str:
    """Return the tables of the docs."""
    about = record["machine"]
    trained = sorted({(r["width"], r["epochs"]) for r in record["cold"] + record["warm"] if "epochs" in r})
    rows = [
        f"CPU milliseconds on one thread, medians of interleaved rounds (their number in the second last column); "
        f"epochs of training: {', '.join(f'{e} at width {w}' for w, e in trained)}; {about['processor']}, "
        f"{', '.join(f'{k} {v}' for k, v in about['versions'].items())}, commit {about['commit'][:7]}"
        f"{' with changes' if about['dirty'] else ''}, {about['date']}.",
        "",
        *(f"Left out: {name}, {why}." for name, why in record["skipped"].items()),
        "| width | matrix | SciPy | lapjvh | POT | isthmus | against the better | one read | rounds "
        "| extra MB: SciPy / lapjvh / isthmus |",
        "|" + " ---: |" * 10,
    ]
    for row in sorted(record["cold"], key=lambda row: row["width"]):
        ms = {name: f"{1e3 * s:.1f}" for name, s in row["seconds"].items()}
        memory = row.get("extra_bytes", {})
        extra = " / ".join(
            f"{memory[n] / 1e6:.0f}" if n in memory else "–" for n in ("scipy", "lapjvh", "isthmus")
        )
        rows.append(
            f"| {row['width']} | {row['kind']} | {ms.get('scipy', '–')} | {ms.get('lapjvh', '–')} "
            f"| {ms.get('pot', '–')} | {ms['isthmus']} | {row['ratio']:.1f} | {1e3 * row['floor']:.1f} "
            f"| {row['repeats']} | {extra} |"
        )
    rows += [
        "",
        "| descent of width | solves | SciPy | lapjvh | cold | warm | against the better |",
        "|" + " ---: |" * 7,
    ]
    for row in sorted(record["warm"], key=lambda row: row["width"]):
        ms = {name: f"{1e3 * s:.1f}" for name, s in row["seconds"].items()}
        rows.append(
            f"| {row['width']} | {row['solves']} | {ms.get('scipy', '–')} | {ms.get('lapjvh', '–')} "
            f"| {ms['isthmus']} | {ms['isthmus, warm']} | {row['ratio_warm']:.1f} |"
        )
    return "\n".join(rows)


def exponents(
    record: dict[str, Any], measure: str
) -> dict[tuple[str, str], tuple[float, list[tuple[int, float]]]]:
    """Return for each kind and solver the least-squares slope of log(measure) against log(width), and its points."""
    found = {}
    for kind in GROWTH:
        for name in COLOURS:
            points = [
                (row["width"], row[measure][name])
                for row in record["cold"]
                if row["kind"] == kind and row.get(measure, {}).get(name, 0) > 0
            ]
            if len(points) < 3:
                continue
            found[kind, name] = exponent(*zip(*points, strict=True)), sorted(points)
    return found


def draw_growth(record: dict[str, Any], stem: Path) -> None:
    """Draw time and memory against width on log axes, with fitted exponents, as ``stem`` .png and .svg."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, len(GROWTH), figsize=(10.5, 6.4), sharex=True, sharey="row")
    rows = (("seconds", 1.0, "CPU seconds"), ("extra_bytes", 1e-6, "extra memory, MB"))
    for line, (measure, unit, label) in zip(axes, rows, strict=True):
        fits = exponents(record, measure)
        for axis, kind in zip(line, GROWTH, strict=True):
            for name, colour in COLOURS.items():
                if (kind, name) not in fits:
                    continue
                slope, points = fits[kind, name]
                x, y = [p[0] for p in points], [p[1] * unit for p in points]
                axis.plot(x, y, marker=MARKS[name], color=colour, label=f"{NAMES[name]}: n^{slope:.2f}")
            axis.set_xscale("log", base=2)
            axis.set_yscale("log")
            axis.grid(alpha=0.3)
            if axis.lines:
                axis.legend(fontsize=8, frameon=False)
            widths = sorted({row["width"] for row in record["cold"]})
            axis.set_xticks(widths, [str(w) for w in widths])
            if measure == "seconds":
                axis.set_title(kind)
        line[0].set_ylabel(label)
    for axis in axes[-1]:
        axis.set_xlabel("width n of an n × n float32 matrix")
    figure.tight_layout()
    for ending in (".png", ".svg"):
        figure.savefig(
            stem.with_suffix(ending), dpi=130, metadata={"Date": None} if ending == ".svg" else None
        )
    pyplot.close(figure)


def write_page(record: dict[str, Any], page: Path) -> None:
    """Put tables and figure into a page, after its marker."""
    stem = page.parent / "images" / "assignment-growth"
    draw_growth(record, stem)
    rows = [
        f"| {kind} | {NAMES[name]} | {slope:.2f} | {memory} |"
        for (kind, name), (slope, _) in exponents(record, "seconds").items()
        for memory in [_slope(record, kind, name)]
    ]
    growth = [
        f"![CPU seconds and extra memory against the width, on log axes](images/{stem.name}.png)",
        "",
        "Exponents fitted by least squares over the widths of the table:",
        "",
        "| matrix | solver | time | extra memory |",
        "| --- | --- | ---: | ---: |",
        *rows,
    ]
    head = page.read_text(encoding="utf-8").partition(MARKER)[0]
    text = "\n".join([f"{head}{MARKER}", tables(record), "", "## Growth", "", *growth])
    page.write_text(text + "\n", encoding="utf-8")


def _slope(record: dict[str, Any], kind: str, name: str) -> str:
    fits = exponents(record, "extra_bytes")
    return f"{fits[kind, name][0]:.2f}" if (kind, name) in fits else "–"
