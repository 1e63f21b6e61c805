"""Print the tables of the page on trained networks from what ``examples/trained_networks_and_theory.py`` stored.

Run as ``python -m benchmarks.theory_tables [FOLDER]``; the page must contain what this prints, which a test checks.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent.parent / "docs" / "images" / "theory"


def independence(record: dict[str, Any]) -> str:
    """Return the table of transport distances, one row per layer and width."""
    lines = [
        "| layer | width | two networks | random halves | ratio | range | halves ≥ networks | initial ratio |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    lines += [
        f"| {r['layer']} | {r['width']} | {r['networks']:.3f} | {r['halves']:.3f} | {r['ratio']:.3f} "
        f"| {r['splits_low']:.3f} to {r['splits_high']:.3f} | {100 * r['rank']:.0f} % | {r['initial_ratio']:.3f} |"
        for r in record["layers"]
    ]
    return "\n".join(lines)


def bounds(record: dict[str, Any]) -> str:
    """Return the tables of bounds over measurements: error, then barrier."""
    rows = record["networks"]
    lines = [
        "| network | error measured | 64 segments | 16 segments | 1 segment | weights only |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for r in rows:
        ratios = (r[key] / r["measured"] for key in ("chain_64", "chain_16", "chain_1", "weights_only"))
        lines.append(f"| {r['network']} | {r['measured']:.3g} | " + " | ".join(map(_times, ratios)) + " |")
    lines += [
        "",
        "| network | barrier measured | 64 segments, local | 64, √2 × error | 16, local | 1, local | weights only |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    keys = ("barrier", "barrier_64", "lipschitz_64", "barrier_16", "barrier_1", "lipschitz_weights")
    lines += [f"| {r['network']} | " + " | ".join(f"{r[key]:.3g}" for key in keys) + " |" for r in rows]
    return "\n".join(lines)


def _times(ratio: float) -> str:
    return f"{ratio:.3f}" if ratio < 10 else f"{ratio:.0f}"


def main() -> None:
    """Print all tables."""
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER
    for name, table in (("10-independence", independence), ("10-bounds", bounds)):
        print(table(json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))), end="\n\n")


if __name__ == "__main__":
    main()
