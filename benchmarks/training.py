"""Seconds per network-epoch of the MNIST perceptron: plain loop, stacked loop, and the floor set by its products.

Run as ``python -m benchmarks.training --out FILE``. Process CPU seconds on one thread, the least of several interleaved
rounds, so that a busy machine disturbs the ratios little; an epoch is 60,000 examples (measured on fewer and scaled).
"""

from __future__ import annotations

import argparse
import itertools
import json
import platform
import time
from collections.abc import Callable
from pathlib import Path

import torch

from isthmus.files import atomic_path
from isthmus.study import Dataset, TrainSettings, train, train_stacked
from isthmus.testing import mlp

EXAMPLES, EPOCH, BATCH, WIDTH, DEPTH = 5000, 60_000, 500, 512, 3
STACKS = ((4, 1), (4, 4))


def main() -> None:
    """Measure and print; with ``--out`` also store."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    least: dict[str, float] = {}
    for _ in range(options.rounds):
        for name, run in measurements().items():
            least[name] = min(least.get(name, float("inf")), run())
            print(f"{name:38} {least[name]:8.3f} CPU s per network-epoch", flush=True)
    if options.out is not None:
        record = {
            "what": f"CPU seconds per network-epoch, {784}-{'-'.join([str(WIDTH)] * DEPTH)}-10, batch {BATCH}",
            "seconds": least,
            "torch": str(torch.__version__),
            "machine": f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}, 1 thread",
            "rounds": options.rounds,
        }
        with atomic_path(options.out) as temporary:
            temporary.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def measurements() -> dict[str, Callable[[], float]]:
    """Return what is measured: functions giving CPU seconds per network-epoch."""
    found: dict[str, Callable[[], float]] = {}
    for precision in ("float32", "bfloat16"):
        found[f"products alone, {precision}"] = lambda p=precision: products(p)
        found[f"plain loop, {precision}"] = lambda p=precision: plain(p)
        for count, lockstep in STACKS:
            name = f"{count} networks, {lockstep} in lockstep, {precision}"
            found[name] = lambda p=precision, k=count, n=lockstep: stacked(p, k, n)
    return found


def settings(precision: str, seed: int = 0) -> TrainSettings:
    """Return the paper's protocol, for three short epochs."""
    return TrainSettings(epochs=3, batch_size=BATCH, learning_rate=0.01, precision=precision, seed=seed)  # type: ignore[arg-type]


def data() -> Dataset:
    """Return random pixels; time does not depend on what they show."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randint(0, 256, (EXAMPLES, 1, 28, 28), generator=generator).byte()
    labels = torch.arange(EXAMPLES) % 10
    return Dataset("random", "train", values, labels, tuple("0123456789"), 255.0)


def plain(precision: str) -> float:
    """Measure :func:`isthmus.study.train`."""
    ends: list[float] = []
    train(
        mlp(784, WIDTH, DEPTH, 10),
        data(),
        settings(precision),
        on_epoch=lambda _: ends.append(time.process_time()),
    )
    return shortest(ends)


def stacked(precision: str, count: int, lockstep: int) -> float:
    """Measure :func:`isthmus.study.train_stacked`."""
    ends: list[float] = []
    train_stacked(
        mlp(784, WIDTH, DEPTH, 10),
        data(),
        [settings(precision, seed) for seed in range(count)],
        lockstep=lockstep,
        on_epoch=lambda _: ends.append(time.process_time()),
    )
    return shortest(ends) / count


def shortest(ends: list[float]) -> float:
    """Return the shortest epoch but the first, in seconds for 60,000 examples."""
    return min(b - a for a, b in itertools.pairwise(ends)) * EPOCH / EXAMPLES


def products(precision: str) -> float:
    """Measure the matrix products of an epoch and nothing else."""
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    sizes = [784, *[WIDTH] * DEPTH, 10]
    layers = [
        (torch.randn(BATCH, n).to(dtype), torch.randn(m, n).to(dtype), torch.randn(BATCH, m).to(dtype))
        for n, m in itertools.pairwise(sizes)
    ]
    least = float("inf")
    for _ in range(10):
        start = time.process_time()
        for k, (inputs, weight, gradient) in enumerate(layers):
            inputs @ weight.T
            gradient.T @ inputs
            if k:
                gradient @ weight
        least = min(least, time.process_time() - start)
    return least * EPOCH / BATCH


if __name__ == "__main__":
    main()
