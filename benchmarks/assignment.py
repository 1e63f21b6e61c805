"""Exact assignment against SciPy and lapx's ``lapjvh``: cold on many kinds of matrices, warm in a real descent.

Run as ``python -m benchmarks.assignment --out benchmarks/results/assignment.json --mnist DIR``; ``--table FILE``
prints the tables of a stored record. Solvers of one matrix take turns; times are medians of process CPU time on one
thread, so that a shared machine disturbs them little. The floor is one read of the matrix at the speed of its
minimum: no exact solver can do with less. Peak memory is that of a fresh process for each solver, above what it held
before. Matrices are float32; every value is compared with SciPy's, every gap must be zero.

Kinds: ``gaussian``; ``planted`` (permuted Gaussian weights plus noise of twice their size); ``low-rank`` (rank 5 plus
noise); and from pairs of MNIST perceptrons with two hidden layers ``weights``, ``covariance`` and ``activations``
(first layer / second layer), live units only, and ``dead`` (activations with 10 % of the units dead on both sides).
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import multiprocessing
import resource
import statistics
import sys
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment

from benchmarks.line import cpu_seconds, machine
from isthmus.checkpoints import atomic_path
from isthmus.study import TrainSettings, load_dataset, train
from isthmus.testing import mlp
from isthmus.transport import assign

Matrix = np.ndarray
SYNTHETIC = ("gaussian", "planted", "low-rank")
TRAINED = ("weights 1", "weights 2", "covariance 1", "covariance 2", "activations 1", "activations 2", "dead")


def peers() -> tuple[dict[str, Callable[[Matrix], Any]], dict[str, str]]:
    """Return the solvers to compare, and why any is left out."""
    found: dict[str, Callable[[Matrix], Any]] = {"isthmus": assign, "scipy": linear_sum_assignment}
    try:
        import lap
    except ImportError as failure:
        return found, {"lapjvh": f"lapx is not installed ({failure})"}
    found["lapjvh"] = lap.lapjvh
    return found, {}


def synthetic(kind: str, size: int) -> Matrix:
    """Return a random cost matrix."""
    rng = np.random.default_rng(size)

    def normal(*shape: int) -> Matrix:
        return rng.standard_normal(shape, dtype=np.float32)

    if kind == "gaussian":
        return normal(size, size)
    if kind == "planted":
        a = normal(size, size)
        return -(a @ (a[rng.permutation(size)] + 2 * normal(size, size)).T)
    return -(normal(size, 5) @ normal(5, size) + 0.1 * normal(size, size))


class Pair:
    """Two trained perceptrons with two hidden layers, and their hidden activations."""

    def __init__(self, width: int, args: argparse.Namespace) -> None:
        data = load_dataset("mnist", data_dir=args.mnist) if args.mnist else load_dataset("digits")
        settings = [TrainSettings(epochs=args.epochs, learning_rate=0.05, seed=s) for s in (0, 1)]
        pixels = data.values[0].numel()
        nets = [train(mlp(pixels, width, 2, 10), data, s).model for s in settings]
        x = data.take(min(5000, len(data))).inputs.flatten(1)
        self.hidden = []
        self.weights = []
        for net in nets:
            layers = list(net.layers)  # type: ignore[arg-type]
            with torch.no_grad():
                first = layers[0](x).relu()
                self.hidden.append((x, first, layers[1](first).relu()))
            self.weights.append([(m.weight.detach(), m.bias.detach()) for m in layers])
        self.order = torch.arange(width)

    def gain(self, method: str, layer: int) -> Matrix:
        """Return the costs of matching a hidden layer (1 or 2); B's first layer is placed by ``order``."""
        (w_a, b_a), (w_b, b_b) = self.weights[0][layer - 1], self.weights[1][layer - 1]
        if layer == 2:
            w_b = w_b[:, self.order]
        if method == "activations":
            h_a, h_b = (h[layer] - h[layer].mean(0) for h in self.hidden)
            alive_a, alive_b = h_a.std(0) > 0, h_b.std(0) > 0
            count = int(min(alive_a.sum(), alive_b.sum()))
            return -(h_a[:, alive_a][:, :count].T @ h_b[:, alive_b][:, :count] / len(h_a)).numpy()
        if method == "covariance":
            inputs = self.hidden[0][layer - 1]
            return -((w_a @ inputs.T) @ (inputs @ w_b.T) / len(inputs)).numpy()
        gain = w_a @ w_b.T + torch.outer(b_a, b_b)
        if layer == 2:
            gain += self.weights[0][2][0].T @ self.weights[1][2][0]
        return -gain.numpy()

    def matrices(self) -> Iterator[tuple[str, Matrix]]:
        """Yield all kinds of trained matrices; second layers follow the matching of the first."""
        for method in ("weights", "covariance", "activations"):
            self.order = torch.arange(len(self.order))
            first = self.gain(method, 1)
            yield f"{method} 1", first
            if method != "activations":
                self.order = assign(first).columns
            yield f"{method} 2", self.gain(method, 2)
        dead = self.gain("activations", 1)
        rng = np.random.default_rng(0)
        dead[rng.permutation(len(dead))[: len(dead) // 10]] = 0.0
        dead[:, rng.permutation(len(dead))[: len(dead) // 10]] = 0.0
        yield "dead", dead

    def descent(self) -> Iterator[tuple[str, Matrix]]:
        """Yield the gains of full weight matching by coordinate descent, and apply each best permutation."""
        width = len(self.order)
        orders = [torch.arange(width), torch.arange(width)]
        (w1_a, b1_a), (w2_a, b2_a), (w3_a, _) = self.weights[0]
        (w1_b, b1_b), (w2_b, b2_b), (w3_b, _) = self.weights[1]
        fixed = [w1_a @ w1_b.T + torch.outer(b1_a, b1_b), w3_a.T @ w3_b + torch.outer(b2_a, b2_b)]
        moved = True
        while moved:
            moved = False
            for k in (0, 1):
                if k == 0:
                    costs = -(fixed[0] + w2_a.T @ w2_b[orders[1]]).numpy()
                else:
                    costs = -(fixed[1] + w2_a @ w2_b[:, orders[0]].T).numpy()
                yield f"layer {k + 1}", costs
                best = assign(costs).columns
                moved |= not torch.equal(best, orders[k])
                orders[k] = best


@cache
def pair(width: int, options: tuple[tuple[str, Any], ...]) -> Pair:
    """Return a trained pair, kept for the next use."""
    return Pair(width, argparse.Namespace(**dict(options)))


def value_of(name: str, costs: Matrix, result: Any) -> float:
    """Return the cost of a solver's answer in float64."""
    if name == "isthmus":
        assert result.gap == 0.0
        return result.value
    rows, columns = result[-2:]
    return float(costs[rows, columns].astype(np.float64).sum())


def compare(costs: Matrix, solvers: dict[str, Callable[[Matrix], Any]], repeats: int) -> dict[str, Any]:
    """Time all solvers on one matrix, in turns."""
    seconds: dict[str, list[float]] = {name: [] for name in solvers}
    values: dict[str, float] = {}
    reads = []
    for repeat in range(repeats):
        for name in solvers if repeat % 2 == 0 else reversed(solvers):
            spent, result = cpu_seconds(partial(solvers[name], costs))
            seconds[name].append(spent)
            values[name] = value_of(name, costs, result)
        reads.append(cpu_seconds(costs.min)[0])
    medians = {name: statistics.median(s) for name, s in seconds.items()}
    best = min((s, name) for name, s in medians.items() if name != "isthmus")
    return {
        "rows": len(costs),
        "seconds": medians,
        "all_seconds": seconds,
        "floor": statistics.median(reads),
        "better_peer": best[1],
        "ratio": best[0] / medians["isthmus"],
        "value_minus_scipy": {name: v - values["scipy"] for name, v in values.items()},
    }


def compare_descent(found: Pair, solvers: dict[str, Callable[[Matrix], Any]]) -> dict[str, Any]:
    """Time all solvers on the problems of one descent; the engine also from the last solution of the layer."""
    seconds: dict[str, list[float]] = {name: [] for name in (*solvers, "isthmus, warm")}
    last: dict[str, Any] = {}
    for layer, costs in found.descent():
        if layer not in last:
            last[layer] = assign(costs)
            continue
        for name, solver in solvers.items():
            seconds[name].append(cpu_seconds(partial(solver, costs))[0])
        spent, result = cpu_seconds(partial(assign, costs, warm=last[layer]))
        assert result.gap == 0.0
        seconds["isthmus, warm"].append(spent)
        last[layer] = result
    totals = {name: sum(s) for name, s in seconds.items()}
    best = min((s, name) for name, s in totals.items() if "isthmus" not in name)
    return {
        "solves": len(seconds["isthmus"]),
        "seconds": {name: s / len(seconds["isthmus"]) for name, s in totals.items()},
        "all_seconds": seconds,
        "better_peer": best[1],
        "ratio_warm": best[0] / totals["isthmus, warm"],
        "ratio_cold": best[0] / totals["isthmus"],
    }


def peak_memory(solver: Callable[[Matrix], Any], costs: Matrix) -> int:
    """Return the bytes a solver needs beyond its matrix, measured in a forked process."""

    def child(pipe: Any) -> None:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        solver(costs)
        pipe.send(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)

    context = multiprocessing.get_context("fork")
    receive, send = context.Pipe(duplex=False)
    process = context.Process(target=child, args=(send,))
    process.start()
    kilobytes = receive.recv()
    process.join()
    return 1024 * int(kilobytes)


def tables(record: dict[str, Any]) -> str:
    """Return the tables of the docs."""
    about = record["machine"]
    rows = [
        f"CPU milliseconds on one thread, medians of {record['repeats']} interleaved runs; {about['processor']}, "
        f"{', '.join(f'{k} {v}' for k, v in about['versions'].items())}, commit {about['commit'][:7]}"
        f"{' with changes' if about['dirty'] else ''}, {about['date']}.",
        "",
        "| n | matrix | SciPy | lapjvh | isthmus | against the better | one read | extra MB |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in record["cold"]:
        ms = {name: f"{1e3 * s:.1f}" for name, s in row["seconds"].items()}
        memory = row.get("extra_bytes", {}).get("isthmus")
        rows.append(
            f"| {row['rows']} | {row['kind']} | {ms['scipy']} | {ms.get('lapjvh', '–')} | {ms['isthmus']} "
            f"| {row['ratio']:.1f} | {1e3 * row['floor']:.1f} | {'–' if memory is None else f'{memory / 1e6:.0f}'} |"
        )
    rows += [
        "",
        "| descent of width | solves | SciPy | lapjvh | cold | warm | against the better |",
        "|" + " --- |" * 7,
    ]
    for row in record["warm"]:
        ms = {name: f"{1e3 * s:.1f}" for name, s in row["seconds"].items()}
        rows.append(
            f"| {row['width']} | {row['solves']} | {ms['scipy']} | {ms.get('lapjvh', '–')} | {ms['isthmus']} "
            f"| {ms['isthmus, warm']} | {row['ratio_warm']:.1f} |"
        )
    return "\n".join(rows)


def main() -> None:
    """Measure and print; with ``--out`` also store."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--table", type=Path, help="print the tables of a stored record, and do nothing else")
    parser.add_argument("--sizes", type=int, nargs="+", default=[512, 2048])
    parser.add_argument("--kinds", nargs="+", default=[*SYNTHETIC, *TRAINED])
    parser.add_argument(
        "--descents", type=int, nargs="*", default=[512, 2048], help="widths of whole descents"
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=3, help="of training the pairs")
    parser.add_argument("--mnist", type=Path, help="folder of MNIST files; without it the pairs learn digits")
    parser.add_argument("--no-memory", action="store_true")
    args = parser.parse_args()
    if args.table is not None:
        print(tables(json.loads(args.table.read_text(encoding="utf-8"))))
        return
    solvers, skipped = peers()
    names = ("numpy", "scipy", "numba", "lapx")
    versions = {n: importlib.metadata.version(n) for n in names if n != "lapx" or not skipped}
    record: dict[str, Any] = {"repeats": args.repeats, "skipped": skipped, "cold": [], "warm": []}
    training = (("epochs", args.epochs), ("mnist", args.mnist))
    for size in args.sizes:
        threads = torch.get_num_threads()
        trained = pair(size, training) if set(args.kinds) & set(TRAINED) else None
        torch.set_num_threads(1)
        problems: list[tuple[str, Matrix]] = [(k, synthetic(k, size)) for k in SYNTHETIC if k in args.kinds]
        problems += [(k, m) for k, m in (trained.matrices() if trained else ()) if k in args.kinds]
        assign(problems[0][1])  # loads or compiles the engine
        for kind, costs in problems:
            row = {"kind": kind, **compare(np.ascontiguousarray(costs), solvers, args.repeats)}
            if not args.no_memory:
                row["extra_bytes"] = {name: peak_memory(s, costs) for name, s in solvers.items()}
            record["cold"].append(row)
            print(
                size, kind, {k: f"{1e3 * v:.1f} ms" for k, v in row["seconds"].items()}, f"{row['ratio']:.1f}"
            )
            sys.stdout.flush()
        torch.set_num_threads(threads)
    for width in args.descents:
        row = {"width": width, **compare_descent(pair(width, training), solvers)}
        record["warm"].append(row)
        print(
            width,
            "descent",
            {k: f"{1e3 * v:.1f} ms" for k, v in row["seconds"].items()},
            f"{row['ratio_warm']:.1f}",
        )
        sys.stdout.flush()
    torch.set_num_threads(1)
    record["machine"] = {**machine(), "versions": versions}
    print(tables(record))
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(args.out) as temporary:
            temporary.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
