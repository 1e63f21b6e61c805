"""Measure signs and factors against permutations alone, and write the tables of ``signs-and-scales.md``.

``python docs/make_signs_and_scales.py measure mnist --networks DIR [--data DIR]`` takes perceptrons
``{relu,tanh}-RATE-SEED.safetensors`` of the paper's protocol (784-512-512-512-10, seeds 2p and 2p+1 a pair); with
``cifar10 --networks DIR`` the folder of a study of ``cifar10-vgg-cpu`` or ``cifar10-resnet-cpu``. Every pair whose
networks are there and which the record lacks is measured, one method after the other; the record
``signs-and-scales.json`` is written after each. ``python docs/make_signs_and_scales.py page`` writes the tables.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import re
import sys
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
from torch import nn

import isthmus
from isthmus.batches import Batches
from isthmus.checkpoints import load_state
from isthmus.couplings import Coupling, Monomial, Permutation
from isthmus.files import atomic_path
from isthmus.matching import Problem, line_factors, method_named, solve
from isthmus.moments import keeps_running_statistics
from isthmus.study import load_dataset, network_for, to_batches
from isthmus.symmetry import Relabelling
from isthmus.testing import mlp

HERE = Path(__file__).parent
PAGE, RECORD = HERE / "signs-and-scales.md", HERE / "signs-and-scales.json"

RATES = ("0.0001", "0.0003981", "0.001585", "0.00631", "0.02512", "0.1")
POINTS, STATISTICS, STATISTICS_CIFAR, TEST_CIFAR = 3, 20_000, 5000, 2000
BASES = ("weights-incoming", "weights", "covariance", "activations", "correlation")
USUAL = {
    "weights-incoming": "norms",
    "weights": "least-squares",
    "covariance": "line",
    "activations": "line",
    "correlation": "line",
}
"""What ``symmetry="all"`` does for factors, by method."""
SCALES = (
    "none",
    "none+line",
    *(f"{b}{rule}" for b in BASES for rule in ("", "+least-squares", "+norms", "+line")),
)
SIGNS = ("none", *(f"{b}{rule}" for b in BASES for rule in ("", "+signed")))
CONVOLUTIONAL = (
    "none",
    "none+line",
    *(
        f"{b}{rule}"
        for b in ("weights", "covariance", "activations", "correlation")
        for rule in ("", "+all", "+line")
    ),
    "weights+norms",
)

Record = dict[str, Any]


@dataclass(frozen=True)
class Place:
    """One pair of networks: what it is called, where it lies, and what is measured on it."""

    network: str
    rate: str
    pair: int
    files: tuple[Path, Path]
    model: nn.Module
    methods: Sequence[str]


# --- Measuring ---------------------------------------------------------------------------------------------


def main() -> None:
    """Measure, or write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    measured = commands.add_parser("measure")
    measured.add_argument("dataset", choices=("mnist", "cifar10"))
    measured.add_argument("--networks", type=Path, required=True)
    measured.add_argument("--data", type=Path)
    measured.add_argument("--record", type=Path, default=RECORD)
    measured.add_argument("--until", help="time of day, such as 20:35, after which no other line is begun")
    commands.add_parser("page")
    given = parser.parse_args()
    if given.command == "page":
        write_page()
        return
    places = (
        mnist_pairs(given.networks) if given.dataset == "mnist" else study_pairs(given.networks, given.data)
    )
    measure(given.dataset, places, given.data, given.record, given.until)


def mnist_pairs(folder: Path) -> Iterator[Place]:
    """Yield the perceptrons whose two files are there, the rates of the middle first."""
    for pair in range(8):
        for rate in sorted(RATES, key=lambda r: abs(math.log10(float(r)) + 2)):
            for activation, methods in (("relu", SCALES), ("tanh", SIGNS)):
                files = tuple(
                    folder / f"{activation}-{rate}-{seed}.safetensors" for seed in (2 * pair, 2 * pair + 1)
                )
                if all(file.is_file() for file in files):
                    model = mlp(784, 512, 3, 10, activation=activation)
                    yield Place(activation, rate, pair, (files[0], files[1]), model, methods)


def study_pairs(folder: Path, data: Path | None) -> Iterator[Place]:
    """Yield the pairs of a study whose networks are trained."""
    train_data = load_dataset("cifar10", data, split="train")
    for unit in json.loads((folder / "plan.json").read_text("utf-8"))["units"]:
        content = unit["content"]
        if content["kind"] != "measure":
            continue
        ends = [
            folder / "networks" / f"{content[end]['unit']}-{content[end]['index']}.safetensors"
            for end in ("a", "b")
        ]
        of = content["network"]
        if all(file.is_file() for file in ends):
            model = network_for(
                of["family"], train_data, width=of["width"], depth=of["depth"], **of["settings"]
            )
            name = f"{of['family']} × {of['width']:g}"
            yield Place(name, "", content["a"]["seed"] // 2, (ends[0], ends[1]), model, CONVOLUTIONAL)


def measure(
    dataset: str, places: Iterator[Place], data: Path | None, record_file: Path, until: str | None
) -> None:
    """Measure all that the record lacks."""
    record: Record = json.loads(record_file.read_text("utf-8")) if record_file.is_file() else {"pairs": {}}
    train_data, test_data = (load_dataset(dataset, data, split=split) for split in ("train", "test"))
    mnist = dataset == "mnist"
    statistics = to_batches(train_data, 1000, limit=STATISTICS if mnist else STATISTICS_CIFAR, seed=0)
    test = to_batches(test_data, 2000, limit=None if mnist else TEST_CIFAR, seed=0)
    listed = list(places)
    for place, methods in [(p, _core(p.methods)) for p in listed] + [(p, p.methods) for p in listed]:
        key = f"{dataset}/{place.network}/{place.rate}/{place.pair}"
        found = record["pairs"].setdefault(key, {})
        if missing := [m for m in methods if m not in found]:
            pair = _Pair(place, statistics, test)
            for method in missing:
                if until is not None and time.strftime("%H:%M") >= until:
                    return
                found[method] = pair.measured(method)
                sys.stdout.write(f"{key} {method} {json.dumps(found[method])}\n")
                sys.stdout.flush()
                with atomic_path(record_file) as temporary:
                    temporary.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def _core(methods: Sequence[str]) -> list[str]:
    """Return the rows that are measured first on every pair: permutations, and what each method does by itself."""
    return [
        m for m in methods if "+" not in m or m.split("+")[1] in (USUAL.get(m.split("+")[0]), "signed", "all")
    ]


class _Pair:
    """A pair of networks with its data."""

    def __init__(self, place: Place, statistics: Batches, test: Batches) -> None:
        self.a, self.b = (copy.deepcopy(place.model).eval() for _ in range(2))
        for model, file in zip((self.a, self.b), place.files, strict=True):
            model.load_state_dict(load_state(file))
        self.statistics, self.test = statistics, test
        self.problem = Problem(self.a, self.b, batches=statistics)

    def measured(self, method: str) -> Record:
        """Return the barrier, the midpoint and the ends under a method, and how much factors spread."""
        start = time.process_time()
        couplings = self._couplings(method)
        seconds = time.process_time() - start
        state = Relabelling(self.problem.spec, couplings).apply(self.problem.state_b)
        refreshed = keeps_running_statistics(self.a)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            line = isthmus.line(
                self.a,
                state,
                {"test": self.test},
                points=POINTS,
                refresh="batchnorm" if refreshed else None,
                refresh_batches=self.statistics if refreshed else None,
            )
        curve = line.curves["test"]
        values = curve.to_dict()
        losses, accuracies = values["loss"], values["accuracy"]
        logs = [c.factors.abs().log() for c in couplings.values() if isinstance(c, Monomial)]
        return {
            "barrier": values["barrier"],
            "midpoint_loss": losses[POINTS // 2],
            "midpoint_accuracy": accuracies[POINTS // 2],
            "ends": [losses[0], losses[-1]],
            "end_accuracies": [accuracies[0], accuracies[-1]],
            "log_factor_spread": float(torch.cat(logs).std()) if logs else 0.0,
            "seconds": round(seconds, 2),
        }

    def _couplings(self, method: str) -> Mapping[str, Coupling]:
        base, _, rule = method.partition("+")
        if base != "none":
            return solve(self.problem, method_named(method), check=False).couplings
        nothing = {n: Permutation.identity(g.size) for n, g in self.problem.spec.groups.items()}
        return line_factors(self.problem.wanting("all"), nothing) if rule else nothing


# --- The page ----------------------------------------------------------------------------------------------


def write_page() -> None:
    """Replace the tables of the page."""
    record = json.loads(RECORD.read_text("utf-8"))
    page = PAGE.read_text("utf-8")
    for name, write in TABLES.items():
        begin, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
        if begin not in page or end not in page:
            raise ValueError(
                f"{PAGE}: has no place for {name!r}. Put {begin} and {end} where the table belongs."
            )
        text = "\n".join([begin, *write(record), end])
        page = re.sub(f"{begin}.*?{end}", lambda _, text=text: text, page, flags=re.DOTALL)
    with atomic_path(PAGE) as temporary:
        temporary.write_text(page, encoding="utf-8")


def scales(record: Record) -> list[str]:
    """Return the barriers of ReLU perceptrons."""
    return _table(record, "relu", SCALES, "barrier")


def scale_accuracies(record: Record) -> list[str]:
    """Return the accuracies of their midpoints."""
    return _table(record, "relu", SCALES, "midpoint_accuracy")


def signs(record: Record) -> list[str]:
    """Return the barriers of tanh perceptrons."""
    return _table(record, "tanh", SIGNS, "barrier")


def sign_accuracies(record: Record) -> list[str]:
    """Return the accuracies of their midpoints."""
    return _table(record, "tanh", SIGNS, "midpoint_accuracy")


def convolutional(record: Record) -> list[str]:
    """Return barriers and accuracies of convolutional networks."""
    keys = [k for k in record["pairs"] if k.startswith("cifar10/")]
    names = sorted({k.split("/")[1] for k in keys})
    if not names:
        return ["No pair has been measured yet."]
    lines = _heading("method", "factors", *(f"{n} ({_count(record, f'cifar10/{n}/')})" for n in names))
    for method in CONVOLUTIONAL:
        cells = []
        for name in names:
            found = [
                p[method]
                for k, p in record["pairs"].items()
                if k.startswith(f"cifar10/{name}/") and method in p
            ]
            barriers, accuracies = ([f[v] for f in found] for v in ("barrier", "midpoint_accuracy"))
            cells.append(f"{_mean(barriers)}, {fmean(accuracies):.1%}" if found else "–")
        lines.append(_row(*_words(method), *cells))
    return lines


def _table(record: Record, network: str, methods: Sequence[str], value: str) -> list[str]:
    pairs = {
        r: [p for k, p in record["pairs"].items() if k.split("/")[:3] == ["mnist", network, r]] for r in RATES
    }
    lines = _heading("method", "on units", *(f"{float(r):.2g} ({len(pairs[r])})" for r in RATES))
    for method in methods:
        found = {r: [p[method][value] for p in pairs[r] if method in p] for r in RATES}
        lines.append(_row(*_words(method), *(_mean(found[r], value) for r in RATES)))
    ends = [
        [
            fmean(p["none"]["ends" if value == "barrier" else "end_accuracies"])
            for p in pairs[r]
            if "none" in p
        ]
        for r in RATES
    ]
    return [
        *lines,
        _row("ends", "loss" if value == "barrier" else "accuracy", *(_mean(e, value) for e in ends)),
    ]


def _words(method: str) -> tuple[str, str]:
    base, _, rule = method.partition("+")
    words = {"": "permutations", "line": "least error of the midpoint", "norms": "norms", "signed": "signs"}
    if base == "weights" and rule == "norms":
        return base, "norms (SEA)"
    acts = words.get(rule, rule.replace("-", " "))
    if base == "none":
        return "none", "factors of least error alone" if rule else "as they are"
    return base, f"**{acts}**" if rule == USUAL[base] else acts


def _mean(values: Sequence[float], of: str = "barrier") -> str:
    if not values:
        return "–"
    if of == "midpoint_accuracy":
        return f"{fmean(values):.1%}"
    error = f" ± {stdev(values) / math.sqrt(len(values)):.3f}" if len(values) > 1 else ""
    return f"{fmean(values):.3f}{error}"


def _count(record: Record, prefix: str) -> int:
    return sum(k.startswith(prefix) for k in record["pairs"])


def _heading(*names: str) -> list[str]:
    return [_row(*names), _row(*["---"] * len(names))]


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


TABLES: Mapping[str, Any] = {
    "scales": scales,
    "scale accuracies": scale_accuracies,
    "signs": signs,
    "sign accuracies": sign_accuracies,
    "convolutional": convolutional,
}

if __name__ == "__main__":
    main()
