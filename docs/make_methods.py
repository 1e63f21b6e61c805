"""Measure methods on trained perceptrons: ``python docs/make_methods.py NETWORKS DATA [--methods a,b] [--pairs 0,1]``.

``NETWORKS`` holds ``relu-RATE-SEED.safetensors``, perceptrons 784-512-512-512-10 by the paper's protocol; pair ``p`` is
of the seeds ``2p`` and ``2p + 1``. ``DATA`` is the folder of MNIST. What is measured goes into ``methods.json`` beside
this file, one entry at a time, and what stands there is not measured again; pairs that are not there are left out. The
table between the marks in ``how-to-choose.md`` is then written anew. ``--table`` measures nothing.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

import isthmus
from isthmus.checkpoints import load_state
from isthmus.files import atomic_path
from isthmus.matching import METHODS, Problem, solve
from isthmus.study import load_dataset, to_batches
from isthmus.testing import mlp

RECORD, PAGE = Path(__file__).parent / "methods.json", Path(__file__).parent / "how-to-choose.md"
RATES = ("0.0001", "0.0003981", "0.001585", "0.00631", "0.02512", "0.1")
SHOWN = (
    "none",
    "weights",
    "frank-wolfe",
    "covariance",
    "kronecker",
    "activations",
    "correlation",
    "sensitivity",
)
SHOWN += ("contributions", "straight-through", "sinkhorn")
POINTS = (0.0, 0.25, 0.5, 0.75, 1.0)
EXAMPLES, BATCH = 10_000, 1000
MARKS = ("<!-- made by docs/make_methods.py -->", "<!-- end -->")


def main() -> None:
    """Measure what is asked for and not there yet, then write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("networks", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("--methods", default=",".join(SHOWN))
    parser.add_argument("--pairs", default="0,1,2,3")
    parser.add_argument("--table", action="store_true")
    options = parser.parse_args()
    record: dict[str, Any] = json.loads(RECORD.read_text()) if RECORD.is_file() else {}
    if not options.table:
        for key, measured in measure(options, record):
            record[key] = measured
            print(key, measured, flush=True)  # noqa: T201
            with atomic_path(RECORD) as path:
                path.write_text(json.dumps(record, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    before, rest = PAGE.read_text(encoding="utf-8").split(MARKS[0])
    with atomic_path(PAGE) as path:
        path.write_text(
            before + "\n".join([MARKS[0], *table(record), MARKS[1]]) + rest.split(MARKS[1])[1], "utf-8"
        )


def measure(options: argparse.Namespace, record: dict[str, Any]) -> Iterator[tuple[str, dict[str, float]]]:
    """Yield what is missing in the record, by a key of pair, rate and method."""
    train = load_dataset("mnist", str(options.data), split="train")
    test = load_dataset("mnist", str(options.data), split="test")
    batches = list(to_batches(train, BATCH, limit=EXAMPLES, seed=0))
    for pair in map(int, options.pairs.split(",")):
        for rate in RATES:
            files = [
                options.networks / f"relu-{rate}-{seed}.safetensors" for seed in (2 * pair, 2 * pair + 1)
            ]
            keys = {f"relu {pair} {rate} {name}": name for name in options.methods.split(",")}
            if not all(file.is_file() for file in files) or keys.keys() <= record.keys():
                continue
            a, b = (mlp(784, 512, 3, 10) for _ in files)
            for model, file in zip((a, b), files, strict=True):
                model.load_state_dict(load_state(file))
                model.eval()
            problem = Problem(a, b, batches=batches)
            problem.verification.require()
            for key, name in keys.items():
                if key not in record:
                    yield key, row(problem, name, list(to_batches(test, 2000)))


def row(problem: Problem, name: str, test: list[Any]) -> dict[str, float]:
    """Return loss and barrier of a method, and CPU seconds of matching, with the statistics it is first to need."""
    start, found = time.process_time(), None
    if name != "none":
        found = solve(problem, METHODS[name], check=False)
    seconds = time.process_time() - start
    line = isthmus.line(problem.model_a, problem.model_b, {"test": test}, points=POINTS, alignment=found)
    curve = line.curves["test"]
    return {
        "midpoint": float(curve.midpoint_loss),
        "barrier": float(curve.barrier),
        "ends": float(curve.loss[0] + curve.loss[-1]) / 2,
        "seconds": seconds,
    }


def table(record: dict[str, Any]) -> Iterator[str]:
    """Yield the lines of the table: midpoint loss and barrier by method and rate."""
    yield "| method | " + " | ".join(f"{float(rate):.1e}" for rate in RATES) + " | CPU seconds |"
    yield "| --- |" + " --- |" * (len(RATES) + 1)
    for name in SHOWN:
        cells = [entries(record, rate, name) for rate in RATES]
        seconds = [entry["seconds"] for cell in cells for entry in cell]
        if seconds:
            took = "" if name == "none" else f"{statistics.median(seconds):.1f}"
            yield f"| `{name}` | " + " | ".join(shown(cell) for cell in cells) + f" | {took} |"
    ends = [[entry["ends"] for entry in entries(record, rate, "none")] for rate in RATES]
    yield "| ends | " + " | ".join(f"{statistics.mean(e):.3f}" if e else "" for e in ends) + " | |"


def entries(record: dict[str, Any], rate: str, name: str) -> list[dict[str, float]]:
    """Return what was measured of a method at a rate, over all pairs."""
    return [e for key, e in record.items() if key.split()[2:] == [rate, name]]


def shown(cell: list[dict[str, float]]) -> str:
    """Return midpoint loss and barrier, with standard errors over pairs where there are several."""

    def text(values: list[float]) -> str:
        error = f" ± {statistics.stdev(values) / len(values) ** 0.5:.3f}" if len(values) > 1 else ""
        return f"{statistics.mean(values):.3f}{error}"

    return f"{text([e['midpoint'] for e in cell])} / {text([e['barrier'] for e in cell])}" if cell else ""


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
