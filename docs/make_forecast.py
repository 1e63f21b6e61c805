"""Measure how well a barrier can be told before the line is measured: ``python docs/make_forecast.py``.

Pairs of perceptrons on the digits, of several widths, depths and learning rates, are lined up in three ways. For each
the record keeps what one pass over the training data tells (correlations and spreads, by layer; the ends' losses) and
the barrier on the test data at five points. It is written after every pair, so that a stopped run goes on. At the end a
rule is fitted for each way of lining up, and judged on pairs that were left out.
"""

from __future__ import annotations

import json
import sys
import time
import warnings
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import torch

import isthmus
from isthmus.explanation import PairMoments, fit_forecast
from isthmus.files import atomic_path
from isthmus.study import TrainSettings, load_dataset, to_batches, train
from isthmus.testing import mlp

RECORD = Path(__file__).parent / "forecast.json"
WIDTHS, DEPTHS, RATES = (16, 32, 64, 128, 256), (1, 2, 3, 5), (0.01, 0.03, 0.1)
METHODS = ("none", "weights", "correlation")


def measured(width: int, depth: int, rate: float, seed: int) -> dict[str, Any]:
    """Return the rows of one pair, by method."""
    data, held = (load_dataset("digits", split=split) for split in ("train", "test"))
    batches, test = to_batches(data, 500), to_batches(held, 500)
    settings = [
        TrainSettings(seed=2 * seed + k, epochs=12, batch_size=64, learning_rate=rate) for k in (0, 1)
    ]
    a, b = (train(mlp(64, width, depth, 10), data, s, strict=False).model for s in settings)
    found: dict[str, Any] = {}
    for method in METHODS:
        alignment = None if method == "none" else isthmus.align(a, b, batches=batches, method=method)
        told = isthmus.explain(a, b, batches, alignment=alignment, stages=0, repair="none")
        line = isthmus.line(a, b, {"test": test}, points=5, alignment=alignment, bootstrap=0)
        found[method] = {
            "correlations": [layer.correlation for layer in told.layers],
            "kept": [layer.kept for layer in told.layers],
            "variances": [layer.variance for layer in told.layers],
            "spread": _spread(a, batches),
            "train_losses": list(told.losses[:2]),
            "ends": list(line.curve.endpoint_losses),
            "barrier": line.barrier,
            "midpoint": line.midpoint_loss,
        }
    return found


def _spread(model: torch.nn.Module, batches: Any) -> float:
    """Return the standard deviation of a network's logits about their mean over classes."""
    with torch.no_grad():
        logits = torch.cat([model(inputs) for inputs, _ in batches])
    return float((logits - logits.mean(1, keepdim=True)).std())


def main() -> None:
    """Measure what the record lacks."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    record = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    for seed, (width, depth, rate) in enumerate(product(WIDTHS, DEPTHS, RATES)):
        name = f"{width} {depth} {rate}"
        if name in record:
            continue
        start = time.process_time()
        record[name] = measured(width, depth, rate, seed)
        with atomic_path(RECORD) as temporary:
            temporary.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        sys.stderr.write(
            f"{name} {time.process_time() - start:.1f} s {record[name]['correlation']['barrier']:.3f}\n"
        )
    for methods in (METHODS, METHODS[1:], *((method,) for method in METHODS)):
        sys.stdout.write(judged(record, methods) + "\n")


def judged(record: dict[str, Any], methods: Sequence[str]) -> str:
    """Return a row of the page's table."""
    moments, barriers, names = [], [], []
    for name, row in record.items():
        for method in methods:
            kept = tuple(k or 0.0 for k in row[method]["kept"])
            moments.append(PairMoments(kept, row[method]["spread"], sum(row[method]["train_losses"]) / 2))
            barriers.append(row[method]["barrier"])
            names.append(name)
    rule = fit_forecast(moments, barriers, names)
    told = [rule(m).merge for m in moments]
    refused = [b for b, merge in zip(barriers, told, strict=True) if merge is False]
    mean = sum(barriers) / len(barriers)
    return (
        f"| {', '.join(methods)} | {len(barriers)} | {mean:.3f} | {rule.rank:.3f} | {rule.mean_error:.3f} | "
        f"{rule.error:.2f} | {len(refused)}, {sum(b <= 0.1 for b in refused)} of them at most .1 |"
    )


if __name__ == "__main__":
    main()
