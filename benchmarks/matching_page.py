"""Tables and growth figure of the page on matching, made from the record of :mod:`benchmarks.matching`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.measuring import exponent

MARKER = "<!-- made by benchmarks/matching.py --table -->"


def tables(record: dict[str, Any]) -> str:
    """Return the tables of the docs."""
    rows: list[str] = []
    for start in ("single pass", "identity"):
        rows += [
            f"Weight matching from the {start}, CPU seconds on one thread:",
            "",
            "| networks | runs | sweeps | plain loop, SciPy | isthmus | ratio | floor | same | MB, plain / isthmus |",
            "|" + " --- |" * 9,
        ]
        for name, found in record["weights"].items():
            part = found["starts"].get(start)
            if part is None:
                continue
            peak = part.get("peak_bytes")
            same = "yes" if part["same_permutations"] else f"value {part['value_above_plain']:+.1e}"
            rows.append(
                f"| {name} | {len(part['all_seconds']['isthmus'])} | {part['sweeps']['isthmus']} "
                f"| {part['seconds']['plain loop']:.2f} "
                f"| {part['seconds']['isthmus']:.2f} | **{part['ratios']['isthmus']:.1f}** "
                f"| {part['floor']['seconds']:.2f} | {same} "
                f"| {'–' if peak is None else ' / '.join(f'{peak[w] / 1e6:.0f}' for w in ('plain loop', 'isthmus'))} |"
            )
        rows.append("")
    rows += [
        "The whole call, with tracing, discovery, verification and costs:",
        "",
        "| networks | align | rebasin | ratio |",
        "|" + " --- |" * 4,
    ]
    for name, found in record["weights"].items():
        part, peer = found["starts"].get("single pass"), found["rebasin"]
        if part is not None:
            mine = part["seconds"]["align"]
            theirs = (
                f"{peer['seconds']:.2f} | {peer['seconds'] / mine:.1f}"
                if "seconds" in peer
                else f"{peer['skipped']} | –"
            )
            rows.append(f"| {name} | {mine:.2f} | {theirs} |")
    rows += [
        "",
        "With MNIST images, the whole call without verification; in brackets the moments' products alone:",
        "",
    ]
    rows += ["| networks | runs | images | covariance | activations | correlation |", "|" + " --- |" * 6]
    for name, found in record["data"].items():
        cells = [f"{s:.2f} ({found['moment_floor'][m]:.2f})" for m, s in found["seconds"].items()]
        rows.append(
            f"| {name} | {len(found['all_seconds']['covariance'])} | {found['examples']} | {' | '.join(cells)} |"
        )
    about = next(iter(record["weights"].values()))["machine"]
    rates = [f["product_rate"] / 1e9 for f in record["weights"].values()]
    machines = [f["machine"] for kind in ("weights", "data") for f in record[kind].values()]
    commits = list(dict.fromkeys(m["commit"][:7] for m in machines))
    rows += [
        "",
        f"{about['processor']}, {about['threads']} thread, {'AMX' if about['amx'] else 'no AMX'}; "
        f"{', '.join(f'{k} {v}' for k, v in about['versions'].items())}; commits {', '.join(commits)}"
        f"{' with changes' if any(m['dirty'] for m in machines) else ''}, {about['date']}. Medians of interleaved runs "
        f"(rebasin: {next((len(f['rebasin']['all']) for f in record['weights'].values() if 'all' in f['rebasin']), 0)}"
        f" run); float32 products at {min(rates):.0f} to {max(rates):.0f} GFLOP/s.",
    ]
    return "\n".join(rows)


def growth(record: dict[str, Any], path: Path) -> str:
    """Draw time and memory against width; return the fitted exponents in words."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import LogLocator

    parts = {
        int(name[4:]): found["starts"]["single pass"]
        for name, found in record["weights"].items()
        if name.startswith("mlp-")
    }
    widths = sorted(parts)
    for part in parts.values():
        # Widths need different numbers of sweeps, which says nothing about growth; the single pass is one more.
        part["per sweep"] = {w: s / (part["sweeps"]["isthmus"] + 1) for w, s in part["seconds"].items()}
    figure, axes = plt.subplots(1, 2, figsize=(8, 3.4), layout="constrained")
    words = []
    for way in ("plain loop", "isthmus"):
        whole = exponent(widths, [parts[w]["seconds"][way] for w in widths])
        words.append(f"CPU seconds of whole runs, {way}: {whole:.2f}")
    kinds = (("per sweep", "CPU seconds per sweep", 1.0), ("peak_bytes", "peak memory, MB", 1e6))
    for axis, (kind, label, unit) in zip(axes, kinds, strict=True):
        for way, mark in (("plain loop", "s--"), ("isthmus", "o-")):
            known = [w for w in widths if parts[w].get(kind, {}).get(way, 0.0) > 0.0]
            values = [parts[w][kind][way] / unit for w in known]
            if len(known) < 2:
                continue
            slope = exponent(known, values)
            axis.loglog(known, values, mark, label=f"{way}, exponent {slope:.2f}")
            words.append(f"{label}, {way}: {slope:.2f}")
        axis.set_xticks(widths, [str(w) for w in widths])
        axis.minorticks_off()
        axis.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axis.yaxis.set_major_formatter("{x:g}")
        axis.set_xlabel("width of the hidden layers")
        axis.set_ylabel(label)
        axis.legend(frameon=False)
    figure.savefig(path, dpi=150, metadata={"Software": None})
    plt.close(figure)
    return "; ".join(words)


def write_page(record: dict[str, Any], page: Path) -> None:
    """Put the tables into a page, between the marker and the next heading, and draw the growth figure beside it."""
    picture = page.parent / "images" / "matching-growth.png"
    picture.parent.mkdir(exist_ok=True)
    words = growth(record, picture)
    image = f"![Growth of time and memory with width](images/{picture.name})"
    text = f"{tables(record)}\n\n{image}\n\nFitted exponents: {words}."
    head, _, rest = page.read_text(encoding="utf-8").partition(MARKER)
    tail = rest.partition("\n## ")[2]
    page.write_text(f"{head}{MARKER}\n{text}\n" + (f"\n## {tail}" if tail else ""), encoding="utf-8")
