"""Whole alignments against the plain loop with SciPy and the ``rebasin`` package: time, memory, floor, growth.

Run as ``python -m benchmarks.matching --out benchmarks/results/matching.json --mnist DIR``; ``--table FILE --docs
PAGE`` puts the tables of a stored record into a page and draws the growth figure beside it. All ways of one problem
take turns; times are medians of process CPU time on one thread, so that a shared machine disturbs them little.

Weight matching: both ways start from the same permutations, go through the groups in the same order and stop by the
same rule; their results are compared. The plain loop is what most scripts do: for every group in every sweep, move
B's weights, form all products in float32, call ``scipy.optimize.linear_sum_assignment``, and stop after a sweep that
raises nothing. "from single pass" is the default of :func:`isthmus.align`; "from identity" is how Git Re-Basin starts.
The symmetries are given to both, and both are given networks in memory. ``align`` is the whole call, with tracing,
discovery, verification and costs; ``rebasin`` traces too.

The floor: the products of a single look at each term plus those of the columns that moved, at the measured rate, and
one read of every gain matrix that was solved, at the measured bandwidth.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import statistics
import subprocess
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn

import isthmus
from benchmarks.line import trained_mlp
from benchmarks.matching_page import tables, write_page
from benchmarks.matching_plain import PlainLoop
from benchmarks.measuring import cpu_seconds, machine, peak_memory, product_rate
from benchmarks.peers import FOLDER, install
from isthmus import align
from isthmus.files import atomic_path
from isthmus.layers import find_sites
from isthmus.matching import CoordinateDescent, Match, SinglePass, assignment_solver
from isthmus.matching import _incremental as incremental_module
from isthmus.matching._incremental import Incremental
from isthmus.matching._layers import Layers
from isthmus.matching._terms import LayeredPair, weight_objective
from isthmus.states import state_of
from isthmus.study import load_dataset
from isthmus.symmetry import discover_from_trace, trace
from isthmus.testing import mlp, resnet20, vgg16_bn
from isthmus.transport import assign


def ours(pair: LayeredPair, start: str, schedule: CoordinateDescent) -> Match:
    """Run this package's weight matching; building the objective counts."""
    generator = torch.Generator().manual_seed(0)
    objective = Incremental(weight_objective(pair), schedule.products)
    first = None
    if start == "single pass":
        first = SinglePass().run(objective, assignment_solver, None, generator).permutations
    return schedule.run(objective, assignment_solver, first, generator)


def cached(path: Path | None, build: Callable[[], nn.Module], model: nn.Module) -> nn.Module:
    """Return a trained network, read from a file when there is one."""
    if path is not None and path.exists():
        model.load_state_dict(torch.load(path, weights_only=True))
        return model.eval()
    trained = build()
    if path is not None:
        torch.save(trained.state_dict(), path)
    return trained


def mnist(args: argparse.Namespace) -> tuple[Tensor, Tensor]:
    """Return the first training images as rows, and their labels."""
    data = load_dataset("mnist", args.mnist, split="train")
    return data.values[: args.examples].flatten(1).float() / data.scale, data.labels[: args.examples]


def mlp_pair(args: argparse.Namespace, width: int) -> tuple[nn.Module, nn.Module, Tensor]:
    """Return two perceptrons trained on MNIST, and images."""
    data = mnist(args)
    epochs = args.epochs if width <= 2048 else min(args.epochs, 2)

    def path(seed: int) -> Path | None:
        return None if args.cache is None else args.cache / f"mlp-{width}-{epochs}-{seed}.pt"

    a, b = (
        cached(path(s), partial(trained_mlp, data, s, width, epochs), mlp(784, width, 3, 10)) for s in (0, 1)
    )
    return a, b, data[0]


def planted(build: Callable[[], nn.Module]) -> tuple[nn.Module, nn.Module, Tensor]:
    """Return a random convolutional network and another that shares half its weights, and images."""
    models = []
    for seed in (0, 1):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            models.append(build().eval())
    a, b = models
    b.load_state_dict(
        {k: 0.5 * (v + a.state_dict()[k]) if v.is_floating_point() else v for k, v in b.state_dict().items()}
    )
    return a, b, torch.randn(64, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def problem(name: str, args: argparse.Namespace) -> tuple[nn.Module, nn.Module, Tensor]:
    """Return the networks and inputs of a problem such as ``mlp-512``, ``resnet20-2`` or ``vgg16``."""
    kind, _, size = name.partition("-")
    if kind == "mlp":
        return mlp_pair(args, int(size))
    return planted(vgg16_bn if kind == "vgg16" else partial(resnet20, width=int(size)))


def pair_of(a: nn.Module, b: nn.Module, example: Tensor) -> LayeredPair:
    """Return two networks with the symmetries of the first."""
    traced = trace(a, (example,))
    layers = Layers(
        discover_from_trace(traced), find_sites(traced), tuple(n for n, _ in a.named_parameters())
    )
    return LayeredPair(layers, state_of(a), state_of(b))


def floor_of(pair: LayeredPair, start: str, rate: float, bandwidth: float) -> dict[str, float]:
    """Return the least time for the products and reads that incremental matching needs, by counting them."""
    products, reads = [0.0], [0.0]
    add, solve = incremental_module.add_product, incremental_module.assign

    def counted(total: Tensor, a: Tensor, b: Tensor, dtype: torch.dtype) -> None:
        products[0] += 2.0 * a.shape[0] * b.shape[0] * a.shape[1]
        add(total, a, b, dtype)

    def read(matrix: Tensor, **options: Any) -> Any:
        reads[0] += matrix.numel() * matrix.element_size()
        return solve(matrix, **options)

    with mock.patch.multiple(incremental_module, add_product=counted, assign=read):
        ours(pair, start, CoordinateDescent())
    return {"flops": products[0], "bytes": reads[0], "seconds": products[0] / rate + reads[0] / bandwidth}


def plain_flops(pair: LayeredPair, start: str, sweeps: int) -> float:
    """Return the operations of the plain loop's products."""
    loop = PlainLoop(pair)
    each = sum(
        2.0 * loop.structure.sizes[group] * pair.state_a[name].numel()
        for group, places in loop.places.items()
        for name, _ in places
    )
    return each * (sweeps + (0.5 if start == "single pass" else 0.0))


def bandwidth_of() -> float:
    """Return bytes per CPU second of reading a large matrix."""
    x = np.ones((4096, 4096), np.float32)
    return x.nbytes / min(cpu_seconds(x.max)[0] for _ in range(5))


def compare(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """Measure weight matching on one problem."""
    a, b, inputs = problem(name, args)
    example = inputs[:2]
    pair = pair_of(a, b, example)
    assign(torch.randn(300, 300))  # loads or compiles the engine
    rate, bandwidth = product_rate(torch.float32), bandwidth_of()
    record: dict[str, Any] = {"product_rate": rate, "bandwidth": bandwidth, "starts": {}}
    for start in args.starts:
        ways: dict[str, Callable[[], Any]] = {
            "plain loop": partial(PlainLoop(pair).run, start),
            "isthmus": partial(ours, pair, start, CoordinateDescent()),
        }
        if start == "single pass":
            ways["align"] = partial(align, a, b, method="weights", args=(example,))
        seconds: dict[str, list[float]] = {way: [] for way in ways}
        results: dict[str, Any] = {}
        for repeat in range(args.repeats):
            for way in ways if repeat % 2 == 0 else reversed(ways):
                spent, results[way] = cpu_seconds(ways[way])
                seconds[way].append(spent)
            print(name, start, repeat + 1, {w: f"{s[-1]:.2f}" for w, s in seconds.items()}, flush=True)
        plain, sweeps = results["plain loop"]
        fast: Match = results["isthmus"]
        objective = weight_objective(pair)
        value = objective.value(plain)
        medians = {w: statistics.median(s) for w, s in seconds.items()}
        record["starts"][start] = {
            "seconds": medians,
            "all_seconds": seconds,
            "ratios": {
                w: statistics.median(p / s for p, s in zip(seconds["plain loop"], seconds[w], strict=True))
                for w in ways
            },
            "sweeps": {"plain loop": sweeps, "isthmus": len(fast.sweeps) - 1},
            "same_permutations": all(torch.equal(p, plain[g]) for g, p in fast.permutations.items()),
            "value_above_plain": (objective.value(fast.permutations) - value) / abs(value),
            "floor": floor_of(pair, start, rate, bandwidth),
            "plain_floor": plain_flops(pair, start, sweeps) / rate,
        }
        if not args.no_memory:
            record["starts"][start]["peak_bytes"] = {w: peak_memory(c) for w, c in ways.items()}
    record["rebasin"] = rebasin(a, b, example, args)
    return record


def peaks(name: str, args: argparse.Namespace) -> dict[str, dict[str, int]]:
    """Return the peak memory of the ways of a problem by start."""
    a, b, inputs = problem(name, args)
    pair = pair_of(a, b, inputs[:2])
    del inputs
    assign(torch.randn(300, 300))
    return {
        start: {
            "plain loop": peak_memory(partial(PlainLoop(pair).run, start)),
            "isthmus": peak_memory(partial(ours, pair, start, CoordinateDescent())),
        }
        for start in args.starts
    }


REBASIN = """
import resource, sys, time, torch
torch.set_num_threads(1)
from rebasin import PermutationCoordinateDescent
a, b, x = torch.load(sys.argv[1], weights_only=False)
start = time.process_time()
found = PermutationCoordinateDescent(a, b, x, device_b="cpu")
found.rebasin()
print(time.process_time() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""


def rebasin(a: nn.Module, b: nn.Module, example: Tensor, args: argparse.Namespace) -> dict[str, Any]:
    """Return the CPU seconds of the ``rebasin`` package in an environment of its own, or why there are none."""
    python = args.rebasin
    if python is None:
        missing = install(packages=("rebasin",))
        if missing:
            return {"skipped": missing["rebasin"]}
        python = FOLDER / "bin" / "python"
    with tempfile.TemporaryDirectory() as folder:
        torch.save((rebuilt(a), rebuilt(b), example), f"{folder}/pair.pt")
        found: list[list[float]] = []
        for _ in range(args.rebasin_repeats):
            try:
                done = subprocess.run(
                    [str(python), "-c", REBASIN, f"{folder}/pair.pt"],
                    capture_output=True,
                    text=True,
                    check=True,
                    timeout=args.timeout,
                    env={**os.environ, "PYTHONPATH": str(Path(isthmus.__file__).parents[1])},
                )
            except subprocess.TimeoutExpired:
                return {"skipped": f"not finished after {args.timeout} s"}
            except subprocess.CalledProcessError as failure:
                words = failure.stderr.strip().splitlines() or [f"ended with {failure.returncode}"]
                return {"skipped": words[-1][:200]}
            found.append([float(x) for x in done.stdout.split()[-2:]])
    return {"seconds": statistics.median(s for s, _ in found), "all": found}


def rebuilt(model: nn.Module) -> nn.Module:
    """Return a perceptron of torch's own modules, so that an environment without this package can load it."""
    layers = [m for m in model.modules() if isinstance(m, nn.Linear)]
    if any(isinstance(m, nn.Conv2d) for m in model.modules()):
        return model
    parts: list[nn.Module] = []
    for layer in layers[:-1]:
        parts += [layer, nn.ReLU()]
    return nn.Sequential(*parts, layers[-1])


def with_data(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """Measure whole alignments that need data."""
    a, b, inputs = problem(name, args)
    batches = list(inputs.split(500))
    assign(torch.randn(300, 300))
    methods = ("covariance", "activations", "correlation")
    seconds: dict[str, list[float]] = {m: [] for m in methods}
    for _ in range(args.repeats):
        for method in methods:
            spent, _found = cpu_seconds(partial(align, a, b, batches=batches, method=method, check=False))
            seconds[method].append(spent)
    record = {"examples": len(inputs), "seconds": {m: statistics.median(s) for m, s in seconds.items()}}
    record["all_seconds"] = seconds
    record["product_rate"] = {str(t)[6:]: product_rate(t) for t in (torch.float32, torch.float64)}
    widths = [m.weight.shape for m in a.modules() if isinstance(m, nn.Linear)]
    forward = sum(2.0 * len(inputs) * rows * columns for rows, columns in widths)
    squares = sum(2.0 * len(inputs) * columns**2 for _, columns in widths)
    cross = sum(2.0 * len(inputs) * rows**2 for rows, _ in widths[:-1])
    flops = {
        "covariance": forward + squares,
        "activations": 2 * forward + cross,
        "correlation": 2 * forward + cross,
    }
    record["moment_floor"] = {m: f / record["product_rate"]["float32"] for m, f in flops.items()}
    if not args.no_memory:
        record["peak_bytes"] = {
            m: peak_memory(partial(align, a, b, batches=batches, method=m, check=False)) for m in methods
        }
    return record


def parsed(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="write the record there; other problems in it are kept")
    parser.add_argument("--table", type=Path, help="print the tables of a stored record and stop")
    parser.add_argument("--docs", type=Path, help="with --table: put them and the figure into this page")
    parser.add_argument("--mnist", type=Path, help="folder of MNIST; downloaded if not given")
    parser.add_argument("--cache", type=Path, help="folder in which trained networks are kept")
    names = [*(f"mlp-{w}" for w in (512, 1024, 2048, 4096)), *(f"resnet20-{w}" for w in (1, 2, 4)), "vgg16"]
    parser.add_argument("--problems", nargs="*", default=names)
    parser.add_argument("--data", nargs="*", default=["mlp-512", "mlp-2048"], help="problems with data")
    parser.add_argument("--starts", nargs="+", default=["single pass", "identity"])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--epochs", type=int, default=3, help="of training the perceptrons (2 above width 2048)"
    )
    parser.add_argument("--examples", type=int, default=10_000, help="images for training and statistics")
    parser.add_argument("--rebasin", type=Path, help="Python with the rebasin package; default: made here")
    parser.add_argument("--rebasin-repeats", type=int, default=1)
    parser.add_argument("--timeout", type=float, default=600.0, help="seconds for one run of rebasin")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument(
        "--only-memory", action="store_true", help="add peak memory to the problems of a record"
    )
    return parser.parse_args(arguments)


def main() -> None:
    """Measure; or print the tables of a record."""
    args = parsed()
    if args.table is not None:
        record = json.loads(args.table.read_text(encoding="utf-8"))
        if args.docs is None:
            print(tables(record))
        else:
            write_page(record, args.docs)
        return
    torch.set_num_threads(args.threads)
    record = {"weights": {}, "data": {}}
    if args.out is not None and args.out.exists():
        record = json.loads(args.out.read_text(encoding="utf-8"))
    if args.only_memory:
        for name in args.problems:
            for start, found in peaks(name, args).items():
                record["weights"][name]["starts"][start]["peak_bytes"] = found
            with atomic_path(args.out) as temporary:
                temporary.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        return
    versions = {n: importlib.metadata.version(n) for n in ("numpy", "scipy", "numba")}
    jobs = [("weights", n, compare) for n in args.problems] + [("data", n, with_data) for n in args.data]
    for kind, name, measure in jobs:
        about = {**machine(), "versions": {"torch": torch.__version__, **versions}, "repeats": args.repeats}
        record[kind][name] = {**measure(name, args), "machine": about}
        if args.out is not None:
            with atomic_path(args.out) as temporary:
                temporary.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    if args.out is None:
        print(tables(record))


if __name__ == "__main__":
    main()
