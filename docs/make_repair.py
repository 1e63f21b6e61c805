"""Measure what each repair does for the line between two networks, and write the tables of ``repair.md``.

``python docs/make_repair.py --networks FOLDER --data DIR`` measures every pair of MNIST perceptrons in a folder that is
not in the record yet: files ``relu-RATE-SEED.safetensors`` and ``tanh-RATE-SEED.safetensors`` of the paper's protocol
(784-512-512-512-10), seeds 2p and 2p + 1 make pair p. The record is written after every repair of every pair, so that a
run that was stopped goes on. Without arguments the tables are written from the record.

Pairs are matched by correlation on 10,000 training images, on which repairs are made too; barriers and midpoints are
those of the 10,000 test images at five points, against the original networks. Seconds are CPU seconds of one thread for
the whole line.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
import warnings
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch

import isthmus
from isthmus.checkpoints import load_state
from isthmus.errors import IsthmusError
from isthmus.files import atomic_path
from isthmus.replica import with_state
from isthmus.study import load_dataset, to_batches
from isthmus.testing import mlp

HERE = Path(__file__).parent
RECORD, PAGE = HERE / "repair.json", HERE / "repair.md"
WAYS = (
    "none",
    "repair",
    "rescale",
    "data-free",
    "noise",
    "temperature",
    "repair+temperature",
    "auto",
)
METHODS = ("none", "correlation")
IMAGES = 10_000
BEGIN, END = "<!-- made by make_repair.py -->\n", "<!-- end -->\n"


def pairs(folder: Path) -> list[tuple[str, Path, Path]]:
    """Return the pairs in a folder, by name."""
    found: dict[tuple[str, str, int], dict[int, Path]] = defaultdict(dict)
    for path in sorted(folder.glob("*.safetensors")):
        name = re.fullmatch(r"(relu|tanh)-([\d.e-]+)-(\d+)", path.stem)
        if name:
            seed = int(name[3])
            found[name[1], name[2], seed // 2][seed % 2] = path
    return [
        (f"{kind} {rate} {pair}", ends[0], ends[1])
        for (kind, rate, pair), ends in sorted(found.items())
        if len(ends) == 2
    ]


def measure(networks: Path, data: Path) -> None:
    """Measure what the record lacks."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    record = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    train, test = (load_dataset("mnist", data, split=split) for split in ("train", "test"))
    fitted, judged = to_batches(train.take(IMAGES), 500), to_batches(test, 500)
    for name, *files in pairs(networks):
        row = record.setdefault(name, {})
        shape = mlp(784, 512, 3, 10, activation=name.split()[0])
        a, b = (with_state(shape, load_state(file)).eval() for file in files)
        for method in METHODS:
            wanted = [way for way in WAYS if f"{method}: {way}" not in row]
            if not wanted:
                continue
            alignment = None if method == "none" else isthmus.align(a, b, batches=fitted, method=method)
            for way in wanted:
                start = time.process_time()
                try:
                    line = isthmus.line(
                        a,
                        b,
                        {"test": judged},
                        refresh_batches=fitted,
                        alignment=alignment,
                        points=5,
                        repair=way,
                        bootstrap=0,
                    )
                except IsthmusError as error:
                    row[f"{method}: {way}"] = {"error": str(error)}
                else:
                    row[f"{method}: {way}"] = {
                        "barrier": line.barrier,
                        "midpoint": line.midpoint_loss,
                        "accuracy": line.midpoint_accuracy,
                        "ends": list(line.curve.endpoint_losses),
                        "ensemble": line.ensemble_loss,
                        "repair": line.settings["repair"],
                        "seconds": time.process_time() - start,
                    }
                with atomic_path(RECORD) as temporary:
                    temporary.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
                sys.stderr.write(f"{name} {method} {way} {row[f'{method}: {way}']}\n")


def table(record: dict[str, Any]) -> str:
    """Return the tables of the page, a row for each rate, means over its pairs."""
    lines: list[str] = []
    for method in METHODS:
        rows: dict[tuple[str, float], list[dict[str, Any]]] = defaultdict(list)
        for name, row in record.items():
            kind, rate, _ = name.split()
            if all(f"{method}: {way}" in row for way in WAYS):
                rows[kind, float(rate)].append(row)
        if not rows:
            continue
        how = "not relabelled" if method == "none" else f"matched by `{method}`"
        lines += [f"B {how}: barrier, and in brackets the loss at the midpoint, nats.", ""]
        lines += [f"| network, rate | pairs | ends | {' | '.join(f'`{way}`' for way in WAYS)} |"]
        lines += ["| --- " * (len(WAYS) + 3) + "|"]
        for (kind, rate), found in sorted(rows.items()):
            ends = _mean([sum(row[f"{method}: none"]["ends"]) / 2 for row in found])
            cells = [_cell([row[f"{method}: {way}"] for row in found]) for way in WAYS]
            lines.append(f"| {kind}, {rate:g} | {len(found)} | {_short(ends)} | {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines)


def _cell(found: list[dict[str, Any]]) -> str:
    if any("error" in one for one in found):
        return "–"
    return f"{_short(_mean([one['barrier'] for one in found]))} ({_short(_mean([one['midpoint'] for one in found]))})"


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _short(value: float) -> str:
    return f"{value:.3f}".removeprefix("0")


def main() -> None:
    """Measure if asked to, and write the tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--networks", type=Path)
    parser.add_argument("--data", type=Path)
    given = parser.parse_args()
    if given.networks is not None:
        measure(given.networks, given.data)
    page, record = PAGE.read_text(encoding="utf-8"), json.loads(RECORD.read_text(encoding="utf-8"))
    start, stop = page.index(BEGIN) + len(BEGIN), page.index(END)
    PAGE.write_text(page[:start] + table(record) + page[stop:], encoding="utf-8")


if __name__ == "__main__":
    main()
