"""Exact assignment against SciPy, lapx's ``lapjvh`` and POT: cold on many kinds of matrices, warm in a real descent.

Run as ``python -m benchmarks.assignment --out benchmarks/results/assignment.json --mnist DIR``, then
``python -m benchmarks.assignment --table benchmarks/results/assignment.json --docs docs/assignment.md``, which also
draws the growth. Peers run in a process of their own environment (:mod:`benchmarks.peers`). Solvers of one matrix take
turns; times are medians of process CPU time on one thread, so that a shared machine disturbs them little. The floor is
one read of the matrix at the speed of its minimum: no exact solver can do with less. Peak memory is that of a forked
process for each solver, above what it held before. Matrices are float32; every value is compared with SciPy's, every
gap must be zero. Rows already in the file are kept, so that a run may be cut short and resumed.

Kinds: ``gaussian``; ``planted`` (permuted Gaussian weights plus noise of twice their size); ``low-rank`` (rank 5 plus
noise); and from pairs of MNIST perceptrons with two hidden layers ``weights``, ``covariance`` and ``activations``
(first layer / second layer), live units only, and ``dead`` (activations with 10 % of the units dead on both sides).
Training takes longer than measuring: ``--matrices DIR`` keeps what comes of it for the next run.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import statistics
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.assignment_page import tables, write_page
from benchmarks.measuring import cpu_seconds, machine, peak_memory
from benchmarks.peers import Peers
from isthmus.files import atomic_path
from isthmus.study import TrainSettings, load_dataset, train
from isthmus.testing import mlp
from isthmus.transport import assign

Matrix = np.ndarray
SYNTHETIC = ("gaussian", "planted", "low-rank")
TRAINED = ("weights 1", "weights 2", "covariance 1", "covariance 2", "activations 1", "activations 2", "dead")
SOLVERS = {"scipy": "scipy", "lapjvh": "lapx", "pot": "POT"}  # and the packages they belong to
POT_LARGEST = 1024  # a network simplex; slower than both others from the smallest size on


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
            layers = list(net.layers)
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


class Problems:
    """Matrices of one width, trained ones made when first asked for and kept in a folder if there is one."""

    def __init__(self, width: int, args: argparse.Namespace) -> None:
        self.width, self.args = width, args

    def _stored(self, names: list[str]) -> dict[str, Path]:
        folder = self.args.matrices
        return (
            {} if folder is None else {n: folder / f"{self.width}-{n.replace(' ', '_')}.npy" for n in names}
        )

    def cold(self) -> Iterator[tuple[str, Matrix]]:
        """Yield the kinds asked for."""
        for kind in SYNTHETIC:
            if kind in self.args.kinds:
                yield kind, synthetic(kind, self.width)
        wanted = [kind for kind in TRAINED if kind in self.args.kinds]
        if not wanted or self.width > self.args.largest_trained:
            return
        paths = self._stored(wanted)
        if not all(path.exists() for path in paths.values()) or not paths:
            made = dict(Pair(self.width, self.args).matrices())
            for kind, path in paths.items():
                np.save(path, made[kind])
            yield from ((kind, made[kind]) for kind in wanted)
        else:
            yield from ((kind, np.load(path)) for kind, path in paths.items())

    def descent(self) -> Iterator[tuple[str, Matrix]]:
        """Yield the problems of one descent, in order."""
        folder = self.args.matrices
        paths = [] if folder is None else sorted(folder.glob(f"{self.width}-descent_*.npy"))
        if paths:
            yield from ((path.stem[-7:].replace("_", " "), np.load(path)) for path in paths)
            return
        for k, (layer, costs) in enumerate(Pair(self.width, self.args).descent()):
            if folder is not None:
                np.save(folder / f"{self.width}-descent_{k:02d}_{layer.replace(' ', '_')}.npy", costs)
            yield layer, costs


def compare(costs: Matrix, names: list[str], peers: Peers, args: argparse.Namespace) -> dict[str, Any]:
    """Time all solvers on one matrix, in turns, until the repeats or the time are over."""
    path = peers.share(costs)
    seconds: dict[str, list[float]] = {name: [] for name in ("isthmus", *names)}
    values: dict[str, float] = {}
    reads = []
    for repeat in range(args.repeats):
        for name in list(seconds)[:: 1 if repeat % 2 == 0 else -1]:
            if name == "isthmus":
                spent, result = cpu_seconds(partial(assign, costs))
                assert result.gap == 0.0
                seconds[name].append(spent)
                values[name] = result.value
            else:
                answer = peers.call("assignment", solver=name, matrix=path)
                seconds[name].append(answer["seconds"])
                values[name] = answer["value"]
        reads.append(cpu_seconds(costs.min)[0])
        if sum(map(sum, seconds.values())) > args.seconds:
            break
    medians = {name: statistics.median(s) for name, s in seconds.items()}
    best = min((s, name) for name, s in medians.items() if name != "isthmus")
    found = {
        "rows": len(costs),
        "repeats": len(reads),
        "seconds": medians,
        "all_seconds": seconds,
        "floor": statistics.median(reads),
        "better_peer": best[1],
        "ratio": best[0] / medians["isthmus"],
        "value_minus_scipy": {name: v - values["scipy"] for name, v in values.items()},
    }
    if not args.no_memory:
        found["extra_bytes"] = {"isthmus": peak_memory(partial(assign, costs))}
        for name in names:
            found["extra_bytes"][name] = peers.call("assignment", solver=name, matrix=path, memory=True)[
                "bytes"
            ]
    return found


def compare_descent(width: int, names: list[str], peers: Peers, args: argparse.Namespace) -> dict[str, Any]:
    """Time all solvers on the problems of one descent; the engine also from the last solution of the layer."""
    rounds: list[dict[str, list[float]]] = []
    problems = list(Problems(width, args).descent())
    for _ in range(args.repeats):
        seconds: dict[str, list[float]] = {name: [] for name in ("isthmus, warm", "isthmus", *names)}
        last: dict[str, Any] = {}
        for layer, costs in problems:
            warm = last.get(layer)
            spent, last[layer] = cpu_seconds(partial(assign, costs, warm=warm))
            assert last[layer].gap == 0.0
            if warm is None:
                continue
            seconds["isthmus, warm"].append(spent)
            seconds["isthmus"].append(cpu_seconds(partial(assign, costs))[0])
            path = peers.share(costs)
            for name in names:
                seconds[name].append(peers.call("assignment", solver=name, matrix=path)["seconds"])
        rounds.append(seconds)
        if sum(sum(map(sum, r.values())) for r in rounds) > args.seconds:
            break
    solves = len(rounds[0]["isthmus"])
    means = {n: statistics.median(sum(r[n]) for r in rounds) / solves for n in rounds[0]}
    best = min((s, name) for name, s in means.items() if "isthmus" not in name)
    return {
        "solves": solves,
        "repeats": len(rounds),
        "seconds": means,
        "all_seconds": rounds,
        "better_peer": best[1],
        "ratio_warm": best[0] / means["isthmus, warm"],
        "ratio_cold": best[0] / means["isthmus"],
    }


def parsed() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="write the record there; rows already in it are kept")
    parser.add_argument("--table", type=Path, help="print the tables of a stored record, and do nothing else")
    parser.add_argument("--docs", type=Path, help="with --table: put them and the figure into this page")
    parser.add_argument("--sizes", type=int, nargs="*", default=[512, 2048])
    parser.add_argument("--kinds", nargs="+", default=[*SYNTHETIC, *TRAINED])
    parser.add_argument("--descents", type=int, nargs="*", default=[512, 2048], help="widths of descents")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=30, help="no new repeat of a matrix after that many")
    parser.add_argument("--epochs", type=int, default=3, help="of training the pairs")
    parser.add_argument("--largest-trained", type=int, default=4096)
    parser.add_argument("--matrices", type=Path, help="folder of trained matrices, filled where missing")
    parser.add_argument("--mnist", type=Path, help="folder of MNIST files; without it the pairs learn digits")
    parser.add_argument("--no-memory", action="store_true")
    return parser.parse_args()


def main() -> None:
    """Measure and print; with ``--out`` also store."""
    args = parsed()
    if args.table is not None:
        record = json.loads(args.table.read_text(encoding="utf-8"))
        if args.docs is None:
            print(tables(record))
        else:
            write_page(record, args.docs)
        return
    torch.set_num_threads(1)
    if args.matrices is not None:
        args.matrices.mkdir(parents=True, exist_ok=True)
    record: dict[str, Any] = {"cold": [], "warm": []}
    if args.out is not None and args.out.exists():
        record = json.loads(args.out.read_text(encoding="utf-8"))
    with Peers() as peers:
        names = [solver for solver, package in SOLVERS.items() if package in peers.versions]
        ours = {n: importlib.metadata.version(n) for n in ("numpy", "numba")}
        about = {
            **machine(),
            "versions": {**ours, **{k: peers.versions[k] for k in ("scipy", "lapx", "POT")}},
        }
        record |= {"machine": about, "skipped": peers.skipped}
        # Loads or compiles the engine, which takes what is larger than 256 x 256.
        assign(np.random.default_rng(0).standard_normal((300, 300), np.float32))
        for width in args.sizes:
            for kind, costs in Problems(width, args).cold():
                if any((r["width"], r["kind"]) == (width, kind) for r in record["cold"]):
                    continue
                some = [n for n in names if n != "pot" or width <= POT_LARGEST]
                found = compare(np.ascontiguousarray(costs), some, peers, args)
                epochs = {"epochs": args.epochs} if kind in TRAINED else {}
                record["cold"].append({"width": width, "kind": kind, **epochs, **found})
                announce(width, kind, found, found["ratio"])
                store(record, args.out)
        for width in args.descents:
            if any(r["width"] == width for r in record["warm"]):
                continue
            found = compare_descent(width, [n for n in names if n != "pot"], peers, args)
            record["warm"].append({"width": width, "epochs": args.epochs, **found})
            announce(width, "descent", found, found["ratio_warm"])
            store(record, args.out)
    print(tables(record))


def announce(width: int, kind: str, found: dict[str, Any], ratio: float) -> None:
    """Print one line."""
    print(
        width, kind, {k: f"{1e3 * v:.1f} ms" for k, v in found["seconds"].items()}, f"{ratio:.1f}", flush=True
    )


def store(record: dict[str, Any], path: Path | None) -> None:
    """Write the record, if it is to be kept."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(path) as temporary:
            temporary.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
