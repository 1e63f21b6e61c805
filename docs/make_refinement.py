"""Measure refinement on the path on trained pairs, one record a pair, and draw the table of docs/refinement.md.

    python docs/make_refinement.py measure --networks FOLDER --data-dir FOLDER
    python docs/make_refinement.py page

Measured pairs are kept, so it can be stopped and started again; the record is written after every pair. Pair ``p`` of a
rate is that of ``relu-RATE-SEED.safetensors``, seeds ``2p`` and ``2p + 1``; those that are missing are passed over.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import isthmus
from isthmus.checkpoints import load_state
from isthmus.couplings import Monomial
from isthmus.files import atomic_path
from isthmus.networks import mlp
from isthmus.study import load_dataset

HERE = Path(__file__).parent
RECORD, PAGE = HERE / "refinement.json", HERE / "refinement.md"
RATES = ("0.0001", "0.0003981", "0.001585", "0.00631", "0.02512", "0.1")
BATCH, STATISTICS = 250, 20_000
BEGIN, END = "<!-- table of perceptrons -->", "<!-- end of the table of perceptrons -->"
Data = list[tuple[Tensor, Tensor]]


def batches(split: str, folder: Path, size: int, limit: int | None = None) -> Data:
    """Return MNIST in batches."""
    data = load_dataset("mnist", folder, split=split)
    x, y = data.inputs[:limit].flatten(1), data.labels[:limit]
    return [(x[k : k + size], y[k : k + size]) for k in range(0, len(x), size)]


def network(folder: Path, rate: str, seed: int) -> nn.Module:
    """Return a trained network."""
    model = mlp(784, 512, 3, 10)
    model.load_state_dict(load_state(folder / f"relu-{rate}-{seed}.safetensors"))
    return model.eval()


def measured(a: nn.Module, b: nn.Module, test: Data, alignment: Any = None) -> dict[str, float]:
    """Return barrier and midpoint on test data, at eleven positions."""
    line = isthmus.line(a, b, {"test": test}, alignment=alignment, bootstrap=0)
    return {
        "barrier": line.barrier,
        "midpoint": line.curve.midpoint_loss,
        "ensemble": line.curve.ensemble_loss,
    }


def factors(alignment: Any) -> list[float]:
    """Return the 5th, 50th and 95th percentile of the factors."""
    sizes = torch.cat([c.factors for c in alignment.couplings.values() if isinstance(c, Monomial)])
    return torch.quantile(sizes, torch.tensor([0.05, 0.5, 0.95], dtype=torch.float64)).tolist()


def trained_on(model: nn.Module, rate: float, steps: int, train: Data, test: Data) -> float:
    """Return the test loss of a network trained as many steps more, with its own optimiser and rate, cosine to zero."""
    copy = mlp(784, 512, 3, 10)
    copy.load_state_dict(model.state_dict())
    optimiser = torch.optim.SGD(copy.parameters(), lr=rate, momentum=0.9)
    source = torch.Generator().manual_seed(0)
    for step in range(steps):
        x, y = train[int(torch.randint(len(train), (), generator=source))]
        optimiser.param_groups[0]["lr"] = rate * 0.5 * (1 + math.cos(math.pi * step / steps))
        optimiser.zero_grad()
        nn.functional.cross_entropy(copy(x), y).backward()
        optimiser.step()
    return isthmus.evaluation.evaluate(copy.eval(), test).loss


def row(a: nn.Module, b: nn.Module, rate: str, data: Mapping[str, Data], steps: int) -> dict[str, Any]:
    """Return all that the table shows of a pair; seconds are those of the process."""
    test, train = data["test"], data["train"]
    ends = [isthmus.evaluation.evaluate(net, test).loss for net in (a, b)]
    found: dict[str, Any] = {"rate": rate, "ends": ends, "steps": steps, "none": measured(a, b, test)}
    begun = time.process_time()
    start = isthmus.align(a, b, batches=data["statistics"], method="correlation")
    found["correlation"] = {"seconds": time.process_time() - begun, **measured(a, b, test, start)}
    for name, alignment in (("refined", start), ("scales alone", None)):
        begun = time.process_time()
        refined = isthmus.refine(a, b, alignment, train, steps=steps, batch_size=BATCH)
        found[name] = {
            "seconds": time.process_time() - begun,
            **measured(a, b, test, refined),
            "factors": factors(refined),
            "change": refined.verification_error,
        }
    found["ends, trained on"] = trained_on(a, float(rate), steps, train, test)
    return found


def measure(networks: Path, data_dir: Path, steps: int, pairs: int) -> None:
    """Measure the pairs that are there and not measured yet."""
    data = {
        "train": batches("train", data_dir, BATCH),
        "test": batches("test", data_dir, 2000),
        "statistics": batches("train", data_dir, 500, STATISTICS),
    }
    for pair in range(pairs):
        for rate in RATES:
            known = json.loads(RECORD.read_text()) if RECORD.exists() else {}
            key, seeds = f"mnist relu {rate} pair {pair}", (2 * pair, 2 * pair + 1)
            there = all((networks / f"relu-{rate}-{s}.safetensors").exists() for s in seeds)
            if key in known or not there:
                continue
            a, b = (network(networks, rate, s) for s in seeds)
            known[key] = row(a, b, rate, data, steps)
            with atomic_path(RECORD) as temporary:
                temporary.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")
            print(key, json.dumps(known[key]), flush=True)  # noqa: T201


def table(record: Mapping[str, Any]) -> Iterator[str]:
    """Yield the lines of the table: means over the pairs of a rate."""
    heads = "learning rate (pairs), ends, trained on, ensemble, none, correlation, scales alone, refined, its middle"
    yield "| " + " | ".join([*heads.split(", "), "factors, 5–95 %", "seconds"]) + " |"
    yield "| " + " | ".join(["---"] * 11) + " |"
    for rate in RATES:
        rows = [r for k, r in record.items() if k.startswith(f"mnist relu {rate} ")]
        if not rows:
            continue

        def mean(*path: str, rows: list[Any] = rows) -> float:
            values = []
            for r in rows:
                for step in path:
                    r = r[step]
                values.append(sum(r) / len(r) if isinstance(r, list) else r)
            return sum(values) / len(values)

        low, high = (sum(r["refined"]["factors"][k] for r in rows) / len(rows) for k in (0, 2))
        cells = [
            f"{float(rate):.1e} ({len(rows)})",
            f"{mean('ends'):.3f}",
            f"{mean('ends, trained on'):.3f}",
            f"{mean('none', 'ensemble'):.3f}",
            *(f"{mean(name, 'barrier'):.4f}" for name in ("none", "correlation", "scales alone")),
            f"**{mean('refined', 'barrier'):.4f}**",
            f"{mean('refined', 'midpoint'):.3f}",
            f"{low:.2f}–{high:.1f}",
            f"{mean('refined', 'seconds'):.0f}",
        ]
        yield "| " + " | ".join(cells) + " |"


def page() -> None:
    """Write the table into the page."""
    text = PAGE.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    after = rest.partition(END)[2]
    drawn = "\n".join(table(json.loads(RECORD.read_text(encoding="utf-8"))))
    with atomic_path(PAGE) as temporary:
        temporary.write_text(f"{before}{BEGIN}\n{drawn}\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=("measure", "page"))
    parser.add_argument("--networks", type=Path)
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--pairs", type=int, default=4)
    given = parser.parse_args()
    if given.what == "page":
        page()
    else:
        torch.set_num_threads(1)
        measure(given.networks, given.data_dir, given.steps, given.pairs)
