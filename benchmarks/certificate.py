"""How tight certificates are, and what they cost: digits, MNIST and a residual CNN, 1 to 64 segments.

Run as ``python -m benchmarks.certificate --out FILE [--mnist DIR]``; ``--table FILE`` prints the tables of a stored
record, ``--figures FILE FOLDER`` draws it. The ratio is the certified bound on the LMC error over the largest value
on a grid of 65 points (a lower bound on the truth, so the ratio is an upper bound on the looseness). Costs are measured
in a fresh process for each width, on random networks: time and memory depend on sizes alone.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from isthmus.files import atomic_path
from isthmus.matching import align
from isthmus.study import Dataset, TrainSettings, load_dataset, network_for, to_batches, train
from isthmus.testing import mlp
from isthmus.theory import certify

SEGMENTS = (1, 4, 16, 64)
DIGITS = (
    (1, 128, "relu"),
    (1, 512, "relu"),
    (2, 128, "tanh"),
    (2, 256, "relu"),
    (3, 96, "relu"),
    (5, 64, "relu"),
)
DIGITS_TRAINING: dict[str, Any] = {"learning_rate": 0.05, "batch_size": 64, "epochs": 30}
TARGET = 1.05
COST_WIDTHS = (64, 128, 256, 512)
COST_EXAMPLES, COST_BATCH, COST_SEGMENTS = 10_000, 500, 64


class ResidualCnn(nn.Module):
    """Two convolutions with a residual around the second, BatchNorm, max and average pooling."""

    def __init__(self, channels: int = 16) -> None:
        """Build for 8 × 8 images of one channel."""
        super().__init__()
        self.stem, self.stem_norm = nn.Conv2d(1, channels, 3, padding=1), nn.BatchNorm2d(channels)
        self.body, self.body_norm = nn.Conv2d(channels, channels, 3, padding=1), nn.BatchNorm2d(channels)
        self.head = nn.Linear(4 * channels, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits for inputs (n, 1, 8, 8) or (n, 64)."""
        h = functional.relu(self.stem_norm(self.stem(x.reshape(-1, 1, 8, 8))))
        h = functional.max_pool2d(functional.relu(h + self.body_norm(self.body(h))), 2)
        return self.head(functional.avg_pool2d(h, 2).flatten(1))


def trained_pair(
    make: Callable[[], nn.Module], data: Dataset, settings: dict[str, Any]
) -> tuple[nn.Module, nn.Module]:
    """Train two networks and align the second by activation matching."""
    a, b = (train(make(), data, TrainSettings(seed=s, **settings)).model.eval() for s in (0, 1))
    b = align(a, b, batches=to_batches(data, 1000, limit=5000), method="activations").apply(b)
    return a.double(), b.double()


def measure(name: str, a: nn.Module, b: nn.Module, batches: Any) -> list[dict[str, Any]]:
    """Certify with every number of segments."""
    rows: list[dict[str, Any]] = []
    for segments in SEGMENTS:
        start = time.process_time()
        found = certify(a, b, batches, segments=segments)
        rows.append(
            {
                "network": name,
                "segments": segments,
                "bound": found.lmc_error,
                "grid": found.lmc_error_measured,
                "barrier_bound": found.barrier,
                "barrier_grid": found.barrier_measured,
                "accuracy_floor": found.accuracy_floor,
                "examples": found.examples,
                "cpu_seconds": time.process_time() - start,
            }
        )
    for row in rows:  # the ends of 64 segments contain those of 1, 4 and 16
        row |= {"grid": rows[-1]["grid"], "barrier_grid": rows[-1]["barrier_grid"]}
        row["ratio"] = row["bound"] / row["grid"]
        print(json.dumps(row), flush=True)
    return rows


def halving(name: str, a: nn.Module, b: nn.Module, batches: Any) -> dict[str, Any]:
    """Reach a ratio by halving loose segments, and by equal segments, doubled until it is reached."""

    def timed(**settings: Any) -> tuple[Any, float]:
        start = time.process_time()
        return certify(a, b, batches, **settings), time.process_time() - start

    adaptive, adaptive_seconds = timed(segments=4, target=TARGET)
    count = 4
    while (tried := timed(segments=count))[0].ratio > TARGET:
        count *= 2
    row = {
        "network": name,
        "target": TARGET,
        "segments": adaptive.segments,
        "ratio": adaptive.ratio,
        "cpu_seconds": adaptive_seconds,
        "equal_segments": count,
        "equal_ratio": tried[0].ratio,
        "equal_cpu_seconds": tried[1],
    }
    print(json.dumps(row), flush=True)
    return row


def halvings() -> list[dict[str, Any]]:
    """Measure it on the deepest and on the residual network, the two that need most segments."""
    digits, held_out = load_dataset("digits"), to_batches(load_dataset("digits", split="test"))
    deep = trained_pair(lambda: network_for("mlp", digits, width=64, depth=5), digits, DIGITS_TRAINING)
    rows = [halving("digits MLP 5×64 relu", *deep, held_out)]
    return [
        *rows,
        halving("digits residual CNN", *trained_pair(ResidualCnn, digits, DIGITS_TRAINING), held_out),
    ]


def peak_mib() -> float:
    """Largest resident memory of this process so far; ``getrusage`` would count the parent's at the fork too."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) / 1024
    raise RuntimeError(
        "benchmarks.certificate: expected VmHWM in /proc/self/status, found none. Run it on Linux."
    )


def cost(width: int) -> dict[str, Any]:
    """Time one certificate of random 784-input networks with three hidden layers, in this process."""
    torch.manual_seed(0)
    a, b = mlp(784, width, 3, 10).double().eval(), mlp(784, width, 3, 10).double().eval()
    inputs, labels = torch.rand(COST_EXAMPLES, 784), torch.randint(10, (COST_EXAMPLES,))
    data = list(zip(inputs.split(COST_BATCH), labels.split(COST_BATCH), strict=True))
    certify(a, b, [(inputs[:2], labels[:2])], segments=1)  # load everything that is loaded once
    before = peak_mib()
    wall, cpu = time.perf_counter(), time.process_time()
    certify(a, b, data, segments=COST_SEGMENTS)
    return {
        "width": width,
        "examples": COST_EXAMPLES,
        "segments": COST_SEGMENTS,
        "seconds": time.perf_counter() - wall,
        "cpu_seconds": time.process_time() - cpu,
        "peak_mib": peak_mib(),
        "grown_mib": peak_mib() - before,
    }


def costs(widths: Sequence[int]) -> list[dict[str, Any]]:
    """Measure every width in a process of its own, so that peaks do not mix."""
    rows = []
    for width in widths:
        command = [sys.executable, "-m", "benchmarks.certificate", "--cost", str(width)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        rows.append(json.loads(done.stdout))
        print(done.stdout.strip(), flush=True)
    return rows


def run(mnist: Path | None, widths: Sequence[int]) -> list[dict[str, Any]]:
    """Train and certify every network."""
    digits, held_out = load_dataset("digits"), to_batches(load_dataset("digits", split="test"))
    rows: list[dict[str, Any]] = []
    for depth, width, activation in DIGITS:

        def make(d: int = depth, w: int = width, f: str = activation) -> nn.Module:
            return network_for("mlp", digits, width=w, depth=d, activation=f)

        pair = trained_pair(make, digits, DIGITS_TRAINING)
        rows += measure(f"digits MLP {depth}×{width} {activation}", *pair, held_out)
    rows += measure("digits residual CNN", *trained_pair(ResidualCnn, digits, DIGITS_TRAINING), held_out)
    if mnist is not None:
        images, test = load_dataset("mnist", mnist), load_dataset("mnist", mnist, split="test")
        for width in widths:
            pair = trained_pair(
                lambda w=width: network_for("mlp", images, width=w, depth=3),
                images,
                {"learning_rate": 0.1, "batch_size": 500, "epochs": 5},
            )
            rows += measure(f"MNIST MLP 3×{width} relu", *pair, to_batches(test, 500))
    return rows


def tables(record: dict[str, Any]) -> str:
    """Return the tables of a record in Markdown: tightness, then cost."""
    head = " | ".join(str(s) for s in SEGMENTS)
    lines = [
        f"| network | {head} | error on the grid | barrier: proven (64) | on the grid | accuracy: proven (64) |",
        "| --- |" + " ---: |" * (len(SEGMENTS) + 4),
    ]
    for name in dict.fromkeys(row["network"] for row in record["rows"]):
        found = {row["segments"]: row for row in record["rows"] if row["network"] == name}
        ratios = " | ".join(_ratio(found[s]["ratio"]) for s in SEGMENTS)
        last = found[SEGMENTS[-1]]
        lines.append(
            f"| {name} | {ratios} | {last['grid']:.3g} | {last['barrier_bound']:.3g} | {last['barrier_grid']:.3g} "
            f"| {100 * last['accuracy_floor']:.1f} % |"
        )
    lines += [
        "",
        "| width | seconds | CPU seconds | memory grown by (MiB) |",
        "| ---: | ---: | ---: | ---: |",
    ]
    lines += [
        f"| {row['width']} | {row['seconds']:.0f} | {row['cpu_seconds']:.0f} | {row['grown_mib']:.0f} |"
        for row in record["costs"]
    ]
    lines += [
        "",
        "| network | halved: segments | ratio | CPU seconds | equal: segments | ratio | CPU seconds |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    lines += [
        f"| {row['network']} | {row['segments']} | {_ratio(row['ratio'])} | {row['cpu_seconds']:.2f} "
        f"| {row['equal_segments']} | {_ratio(row['equal_ratio'])} | {row['equal_cpu_seconds']:.2f} |"
        for row in record["halvings"]
    ]
    return "\n".join(lines)


def _ratio(value: float) -> str:
    return f"{value:.3f}" if value < 10 else f"{value:.1f}"


def main() -> None:
    """Parse arguments, measure, write JSON; or print or draw a record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="record to write")
    parser.add_argument("--mnist", type=Path, help="folder with the MNIST files")
    parser.add_argument(
        "--widths", type=int, nargs="*", default=[64, 128, 256, 512], help="of the MNIST networks"
    )
    parser.add_argument("--cost", type=int, help="measure one width in this process")
    parser.add_argument("--only-costs", type=Path, help="measure the costs anew in a stored record")
    parser.add_argument("--only-halvings", type=Path, help="measure halved segments anew in a stored record")
    parser.add_argument("--table", type=Path, help="print the tables of a record")
    parser.add_argument("--figures", type=Path, nargs=2, metavar=("RECORD", "FOLDER"), help="draw a record")
    given = parser.parse_args()
    if given.cost is not None:
        print(json.dumps(cost(given.cost)))
    elif given.table is not None:
        print(tables(json.loads(given.table.read_text(encoding="utf-8"))))
    elif given.figures is not None:
        from isthmus.report import draw_theory

        record = json.loads(given.figures[0].read_text(encoding="utf-8"))
        for kind in ("certificate_ratio", "certificate_cost"):
            name = f"3-{kind.replace('_', '-')}.png"
            (given.figures[1] / name).write_bytes(draw_theory(kind, record).png)
    elif given.only_costs is not None:
        record = json.loads(given.only_costs.read_text(encoding="utf-8"))
        _write(given.only_costs, {**record, "costs": costs(COST_WIDTHS)})
    elif given.only_halvings is not None:
        record = json.loads(given.only_halvings.read_text(encoding="utf-8"))
        _write(given.only_halvings, {**record, "halvings": halvings()})
    elif given.out is not None:
        rows = run(given.mnist, given.widths)
        machine = {
            "machine": platform.machine(),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
        }
        record = {**machine, "rows": rows, "costs": [], "halvings": []}
        _write(given.out, record)  # kept if what follows is interrupted
        record["halvings"] = halvings()
        _write(given.out, {**record, "costs": costs(COST_WIDTHS)})
    else:
        parser.error("give --out, --table or --figures")


def _write(path: Path, record: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
