"""The line against a plain loop over points, with what each measure contributes, the floor, memory and error.

Run as ``python -m benchmarks.line --out benchmarks/results/line.json --mnist DIR``; ``--table FILE`` prints the
tables of a stored record. The plain loop loads each interpolated state into a copy of the network and runs all
batches through it with cross-entropy: no chord, no LMC error, no accuracy, which :func:`isthmus.line` adds. All
ways of one network take turns; times are medians of process CPU time on one thread (by default), so that a shared
machine disturbs them little. Peak memory is that of a forked process for each way, above what it held at the start.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.measuring import cpu_seconds, machine, peak_memory, product_rate
from isthmus import line
from isthmus.connectivity import _engine, _graph, _networks
from isthmus.errors import ModelError
from isthmus.files import atomic_path
from isthmus.matching import align
from isthmus.study import load_dataset
from isthmus.testing import mlp, resnet20
from isthmus.training._networks import operations as count

Pair = tuple[nn.Module, nn.Module, list[tuple[Tensor, Tensor]]]

WAYS: dict[str, dict[str, Any]] = {
    "own code": {"off": ("trace",)},
    "no mixed first layer": {"off": ("mix",)},
    "no folded norms": {"off": ("fold",)},
    "no regrouped batches": {"off": ("regroup",)},
    "line": {},
    "line, bfloat16": {"precision": "bfloat16"},
    "adaptive": {"points": "adaptive"},
    "adaptive, bfloat16": {"points": "adaptive", "precision": "bfloat16"},
}


def plain_loop(model_a: nn.Module, model_b: nn.Module, batches: list[Any], points: int) -> list[float]:
    """Return the mean losses of ``points`` even positions, computed as most scripts do."""
    network, state_a, state_b = copy.deepcopy(model_a), model_a.state_dict(), model_b.state_dict()
    losses, examples = [], sum(len(x) for x, _ in batches)
    with torch.no_grad():
        for t in torch.linspace(0, 1, points).tolist():
            network.load_state_dict(
                {k: torch.lerp(v, state_b[k], t) if v.is_floating_point() else v for k, v in state_a.items()}
            )
            found = [float(functional.cross_entropy(network(x), y, reduction="sum")) for x, y in batches]
            losses.append(sum(found) / examples)
    return losses


@contextmanager
def switched_off(parts: Sequence[str]) -> Iterator[None]:
    """Run the line without some of its measures."""

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise ModelError("switched off")

    patches = {
        "trace": (_networks, "Engine", refuse),
        "mix": (_engine, "_mixes", lambda site, program: False),
        "fold": (_graph._Builder, "_folded", lambda self, node: None),
        "regroup": (_engine, "PIECE_BYTES", 2**62),
    }
    with ExitStack() as stack:
        for part in parts:
            stack.enter_context(mock.patch.object(*patches[part]))
        if "regroup" in parts:
            stack.enter_context(mock.patch.object(_engine.Engine, "measure"))
        yield


def run_way(way: str, pair: Pair, points: int) -> Any:
    """Run one way; return its losses or its line."""
    if way == "plain loop":
        return plain_loop(*pair, points)
    options = {"points": points, **WAYS[way]}
    with switched_off(options.pop("off", ())):
        return line(*pair, bootstrap=0, refresh=None, **options)


def trained_mlp(data: tuple[Tensor, Tensor], seed: int, width: int, epochs: int) -> nn.Module:
    """Return an MLP with three hidden layers after some epochs of SGD."""
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = mlp(inputs=data[0].shape[1], width=width, depth=3, outputs=10)
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for _ in range(epochs):
        for rows in torch.randperm(len(data[0]), generator=generator).split(500):
            optimiser.zero_grad()
            functional.cross_entropy(model(data[0][rows]), data[1][rows]).backward()
            optimiser.step()
    return model.eval()


def mlp_pair(args: argparse.Namespace) -> Pair:
    """Return two trained MLPs, the second aligned to the first, and the test set of MNIST."""
    parts = [load_dataset("mnist", args.mnist, split=split) for split in ("train", "test")]
    (train, test) = [(d.values.flatten(1).float() / d.scale, d.labels) for d in parts]
    a, b = (trained_mlp(train, seed, args.width, args.epochs) for seed in (0, 1))
    aligned = copy.deepcopy(b)
    aligned.load_state_dict(align(a, b, method="weights", args=(test[0][:2],)).apply(b.state_dict()))
    rows = slice(0, args.mlp_examples)
    return a, aligned, batches_of(test[0][rows], test[1][rows], args.mlp_batch)


def resnet_pair(args: argparse.Namespace) -> Pair:
    """Return two random ResNet-20 with running statistics of random images, and such images."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(args.resnet_examples, 3, 32, 32, generator=generator)
    models = []
    for seed in (0, 1):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = resnet20(width=args.resnet_width)
            with torch.no_grad():
                for part in images[:256].split(64):
                    model.train()(part)
        models.append(model.eval())
    labels = torch.randint(10, (len(images),), generator=generator)
    return models[0], models[1], batches_of(images, labels, args.resnet_batch)


def batches_of(inputs: Tensor, labels: Tensor, size: int) -> list[tuple[Tensor, Tensor]]:
    """Return batches."""
    return list(zip(inputs.split(size), labels.split(size), strict=True))


def operations(model: nn.Module, example: Tensor) -> tuple[int, int]:
    """Return floating-point operations per example in all layers, and in a first layer that can be mixed."""
    first = next(m for m in model.modules() if isinstance(m, (nn.Linear, nn.Conv2d)))
    mixed = first.weight[0].numel() >= _graph.SHORT_SUM
    return count(model, example[:1]), count(first, example[:1]) if mixed else 0


def compare(name: str, pair: Pair, args: argparse.Namespace) -> dict[str, Any]:
    """Measure all ways on one pair."""
    rates = {
        str(dtype).removeprefix("torch."): product_rate(dtype) for dtype in (torch.float32, torch.bfloat16)
    }
    examples = sum(len(x) for x, _ in pair[2])
    total, mixed = operations(pair[0], pair[2][0][0])
    record: dict[str, Any] = {
        "examples": examples,
        "batch": len(pair[2][0][0]),
        "operations_per_example": total,
        "mixed_per_example": mixed,
        "product_rate": rates,
        "points": {},
    }
    for points in args.points:
        ways = ["plain loop", *(w for w in WAYS if points == max(args.points) or "adaptive" not in w)]
        if points == max(args.points) and len(args.points) > 1:
            ways = [w for w in ways if "off" not in WAYS.get(w, {})]
        seconds: dict[str, list[float]] = {way: [] for way in ways}
        results: dict[str, Any] = {}
        for repeat in range(args.repeats if points == min(args.points) else args.long_repeats):
            for way in ways if repeat % 2 == 0 else ways[::-1]:
                spent, results[way] = cpu_seconds(partial(run_way, way, pair, points))
                seconds[way].append(spent)
            print(f"{name}, {points} points, round {repeat + 1}", file=sys.stderr)
        needed = examples * (2 * total + mixed + (points - 2) * (total - mixed))
        losses = torch.tensor(results["plain loop"], dtype=torch.float64)
        record["points"][str(points)] = {
            "plain_floor": examples * points * total / rates["float32"],
            "line_floor": {dtype: needed / rate for dtype, rate in rates.items()},
            "ways": {
                way: described(results[way], seconds[way], seconds["plain loop"], losses) for way in ways
            },
        }
        for way in ways if args.memory == "yes" and points == min(args.points) else ():
            peak = peak_memory(partial(run_way, way, pair, points))
            record["points"][str(points)]["ways"][way]["peak_bytes"] = peak
    return record


def described(result: Any, seconds: list[float], plain: list[float], losses: Tensor) -> dict[str, Any]:
    """Return the record of one way."""
    ratios = [p / s for p, s in zip(plain, seconds, strict=True)]
    found: dict[str, Any] = {
        "seconds": statistics.median(seconds),
        "all_seconds": seconds,
        "ratio": statistics.median(ratios),
    }
    if not isinstance(result, list):
        same = len(result.ts) == len(losses)
        found |= {
            "evaluation": result.settings["evaluation"],
            "points": len(result.ts),
            "barrier": result.barrier,
            "barrier_uncertainty": result.barrier_uncertainty,
            "largest_loss_difference": float((result.loss - losses).abs().max()) if same else None,
        }
    return found


def tables(record: dict[str, Any]) -> str:
    """Return the tables of the docs."""
    rows: list[str] = []
    for name, found in record["networks"].items():
        about, (few, many) = found["machine"], found["repeats"]
        rates = ", ".join(f"{k} {v / 1e9:.0f}" for k, v in found["product_rate"].items())
        rows += [
            f"**{name}**: {found['examples']} examples in batches of {found['batch']}, "
            f"{found['operations_per_example'] / 1e6:.2f} MFLOP each; matrix products in GFLOP/s: {rates}. "
            f"{about['processor']}, {about['threads']} thread, torch {about['torch']}, "
            f"{'AMX' if about['amx'] else 'no AMX'}, "
            f"commit {about['commit'][:7]}{' with changes' if about['dirty'] else ''}, {about['date']}. "
            f"CPU seconds, medians of interleaved rounds: {few} at the fewest points, else {many}.",
            "",
        ]
        for points, ways in found["points"].items():
            floors = ", ".join(f"{k} {v:.2f}" for k, v in ways["line_floor"].items())
            rows += [
                f"{points} points; products alone at the measured rate: plain {ways['plain_floor']:.2f} s, "
                f"line {floors} s.",
                "",
                "| way | seconds | against the plain loop | peak memory, MB | points | barrier | largest loss error |",
                "| --- | --- | --- | --- | --- | --- | --- |",
            ]
            for way, value in ways["ways"].items():
                peak = f"{value['peak_bytes'] / 2**20:.0f}" if "peak_bytes" in value else ""
                above = value.get("barrier_uncertainty")
                barrier = f"{value['barrier']:.5f}" if "barrier" in value else ""
                barrier += f" (+ {above:.1g})" if above is not None else ""
                error = value.get("largest_loss_difference")
                cells = [
                    way,
                    f"{value['seconds']:.2f}",
                    f"{value['ratio']:.2f}",
                    peak,
                    str(value.get("points", points)),
                    barrier,
                    "" if error is None else f"{error:.1e}",
                ]
                rows.append("| " + " | ".join(cells) + " |")
            rows.append("")
    return "\n".join(rows).rstrip()


def parsed(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="write the record there; other networks in it are kept")
    parser.add_argument("--table", type=Path, help="print the tables of a stored record and stop")
    parser.add_argument("--docs", type=Path, help="with --table: put them into this page, after its marker")
    parser.add_argument("--mnist", type=Path, help="folder of MNIST; downloaded if not given")
    parser.add_argument("--networks", nargs="+", default=["mlp", "resnet20"], choices=["mlp", "resnet20"])
    parser.add_argument("--points", type=int, nargs="+", default=[11, 51])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--long-repeats", type=int, default=3, help="rounds of all but the fewest points")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--width", type=int, default=512, help="of the MLP's hidden layers")
    parser.add_argument("--epochs", type=int, default=2, help="of training the MLPs")
    parser.add_argument("--mlp-examples", type=int, default=10_000)
    parser.add_argument("--mlp-batch", type=int, default=500)
    parser.add_argument("--resnet-examples", type=int, default=2000)
    parser.add_argument("--resnet-batch", type=int, default=250)
    parser.add_argument("--resnet-width", type=float, default=1.0)
    parser.add_argument("--memory", choices=["yes", "no"], default="yes", help="measure peak memory")
    return parser.parse_args(arguments)


def main() -> None:
    """Run the benchmark."""
    args = parsed()
    if args.table is not None:
        text = tables(json.loads(args.table.read_text()))
        if args.docs is None:
            print(text)
        else:
            marker = "<!-- made by benchmarks/line.py --table -->"
            head = args.docs.read_text().partition(marker)[0]
            args.docs.write_text(f"{head}{marker}\n{text}\n")
        return
    torch.set_num_threads(args.threads)
    pairs = {"mlp": mlp_pair, "resnet20": resnet_pair}
    record: dict[str, Any] = {"networks": {}}
    if args.out is not None and args.out.exists():
        record = json.loads(args.out.read_text())
    for name in args.networks:
        found = compare(name, pairs[name](args), args)
        record["networks"][name] = {
            "machine": machine(),
            "repeats": [args.repeats, args.long_repeats],
            **found,
        }
        text = json.dumps(record, indent=1) + "\n"
        if args.out is None:
            print(text)
            continue
        with atomic_path(args.out) as temporary:
            temporary.write_text(text)


if __name__ == "__main__":
    main()
