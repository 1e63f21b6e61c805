"""Measure refinement on the path on trained pairs, one record a pair, and draw the table of docs/refinement.md.

    python docs/make_refinement.py measure --networks FOLDER --data-dir FOLDER
    python docs/make_refinement.py transformers --networks FOLDER    # {vit,gpt}-SEED.safetensors, seeds 0, 1 and 2
    python docs/make_refinement.py page

Measured pairs are kept, so it can be stopped and started again; the record is written after every pair. Pair ``p`` of a
rate is that of ``relu-RATE-SEED.safetensors``, seeds ``2p`` and ``2p + 1``; those that are missing are passed over.
"""

from __future__ import annotations

import argparse
import json
import math
import sysconfig
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
from isthmus.networks import gpt, mlp, vit
from isthmus.study import load_dataset

HERE = Path(__file__).parent
RECORD, PAGE = HERE / "refinement.json", HERE / "refinement.md"
RATES = ("0.0001", "0.0003981", "0.001585", "0.00631", "0.02512", "0.1")
BATCH, STATISTICS, LENGTH = 500, 20_000, 64
KINDS = {"vit": "ViT-like", "gpt": "GPT-2-like"}
PERCEPTRONS = ("<!-- table of perceptrons -->", "<!-- end of the table of perceptrons -->")
TRANSFORMERS = ("<!-- table of transformers -->", "<!-- end of the table of transformers -->")
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
            write(known)
            print(key, json.dumps(known[key]), flush=True)  # noqa: T201


def transformers(networks: Path, steps: int) -> None:
    """Measure the pairs of transformers, norms folded; data, networks and seeds are examples/transformers_pair.py's."""
    for one, other in ((0, 1), (0, 2), (1, 2)):
        for short, kind in KINDS.items():
            known = json.loads(RECORD.read_text()) if RECORD.exists() else {}
            key = f"{kind} {one}-{other}"
            if key not in known:
                files = [networks / f"{short}-{seed}.safetensors" for seed in (one, other)]
                known[key] = transformer_row(kind, files, steps)
                write(known)
                print(key, json.dumps(known[key]), flush=True)  # noqa: T201


def windows(text: Tensor, count: int, source: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw windows of text, and the same windows shifted by one."""
    starts = torch.randint(len(text) - LENGTH - 1, (count,), generator=source)
    block = text[starts[:, None] + torch.arange(LENGTH + 1)]
    return block[:, :-1], block[:, 1:]


def transformer_data(kind: str) -> tuple[Data, Data, Data]:
    """Return batches to test on, to collect statistics from and to learn from."""
    if kind == "ViT-like":
        found = {s: load_dataset("digits", None, split=s) for s in ("test", "train")}
        (x, y), test = (
            (f.inputs.reshape(-1, 1, 8, 8)[:2000], f.labels[:2000]) for f in reversed(found.values())
        )
        return [test], [(x, y)], [(x[k : k + 128], y[k : k + 128]) for k in range(0, len(x), 128)]
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    joined = "".join(p.read_text("utf-8", "ignore") for p in files)
    text = torch.tensor(list(joined.encode("ascii", "ignore")))
    cut, source = int(0.9 * len(text)), torch.Generator().manual_seed(0)
    test, statistics = windows(text[cut:], 250, source), windows(text[:cut], 250, source)
    more = torch.Generator().manual_seed(7)
    return [test], [statistics], [windows(text[:cut], 32, more) for _ in range(400)]


def transformer_row(kind: str, files: list[Path], steps: int) -> dict[str, Any]:
    """Return what the table shows of a pair of transformers; seconds are those of the process."""
    test, statistics, train = transformer_data(kind)
    inputs = statistics[0][0]
    language = kind == "GPT-2-like"
    plain = [
        gpt(128, 64, 2, 4, LENGTH) if language else vit(10, 64, 2, 4, image_size=8, patch=2) for _ in files
    ]
    for model, file in zip(plain, files, strict=True):
        state = load_state(file)
        own = model.state_dict()
        tied = {
            n: m for n in own.keys() - state.keys() for m in state if own[m].data_ptr() == own[n].data_ptr()
        }
        model.load_state_dict(
            {**state, **{n: state[m] for n, m in tied.items()}}
        )  # tied tensors are stored once
    folded = [isthmus.fold(model.eval(), inputs[:2], untie=True) for model in plain]
    a, b = (f.network() for f in folded)
    spec = isthmus.discover(a, inputs[:4], ones=folded[0].folded_gains, zeros=folded[0].folded_biases)
    ends = [isthmus.evaluation.evaluate(net, test).loss for net in (a, b)]
    row: dict[str, Any] = {"ends": ends, "steps": steps, "none": measured(*plain, test)}
    begun = time.process_time()
    start = isthmus.align(a, b, batches=statistics, spec=spec, method="correlation", symmetry="all")
    row["correlation"] = {"seconds": time.process_time() - begun, **measured(a, b, test, start)}
    begun = time.process_time()
    refined = isthmus.refine(a, b, start, train, steps=steps)
    taken = time.process_time() - begun
    row["refined"] = {"seconds": taken, **measured(a, b, test, refined), "change": refined.verification_error}
    return row


def write(known: Mapping[str, Any]) -> None:
    """Write the record, whole or not at all."""
    with atomic_path(RECORD) as temporary:
        temporary.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")


def transformer_table(record: Mapping[str, Any]) -> Iterator[str]:
    """Yield the lines of the table of transformers, one for each pair."""
    yield "| pair | ends | none | correlation, all classes | refined | its middle | B changed by | seconds |"
    yield "| " + " | ".join(["---"] * 8) + " |"
    for kind in KINDS.values():
        for key, row in record.items():
            if key.startswith(kind):
                refined = row["refined"]
                numbers = [sum(row["ends"]) / 2, *(row[k]["barrier"] for k in ("none", "correlation"))]
                cells = [key, *(f"{v:.3f}" for v in numbers), f"**{refined['barrier']:.3f}**"]
                more = (f"{refined['midpoint']:.3f}", f"{refined['change']:.0e}", f"{refined['seconds']:.0f}")
                yield "| " + " | ".join([*cells, *more]) + " |"


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
    """Write the tables into the page."""
    text, record = PAGE.read_text(encoding="utf-8"), json.loads(RECORD.read_text(encoding="utf-8"))
    for (begin, end), lines in ((PERCEPTRONS, table(record)), (TRANSFORMERS, transformer_table(record))):
        before, _, rest = text.partition(begin)
        after = rest.partition(end)[2]
        text = "\n".join([before + begin, *lines, end]) + after
    with atomic_path(PAGE) as temporary:
        temporary.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=("measure", "transformers", "page"))
    parser.add_argument("--networks", type=Path)
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--pairs", type=int, default=4)
    given = parser.parse_args()
    if given.what == "page":
        page()
    elif given.what == "transformers":
        torch.set_num_threads(1)
        transformers(given.networks, given.steps)
    else:
        torch.set_num_threads(1)
        measure(given.networks, given.data_dir, given.steps, given.pairs)
