"""The core on the reference networks: what discovering, verifying, aligning by every method and a line cost.

Run as ``python -m benchmarks.core --out benchmarks/results/core.json``. B is a permuted copy of A with noise on every
tensor (5 % of its root mean square), so each row also says how many units each method puts back where they belong.
Times are process CPU seconds, the least of ``--repeats`` runs, the assignment solver compiled beforehand; so that a
shared machine disturbs them little, give one thread (``OMP_NUM_THREADS=1``).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import isthmus
from benchmarks.measuring import cpu_seconds, machine
from isthmus.files import atomic_path
from isthmus.testing import planted_pair, randomise_state, reference_inputs, reference_network
from isthmus.transport import assign

NETWORKS: dict[str, dict[str, Any]] = {
    "mlp": {"inputs": 784, "width": 512, "depth": 3, "outputs": 10},
    "vgg16_bn": {"width": 1 / 4, "image_size": 32},
    "resnet20": {"width": 1},
    "densenet": {"width": 1},
    "unet": {"width": 1},
    "mobilenet": {"width": 1},
    "groupnorm_resnet": {"width": 1},
}
NOISE = 0.05


def measure(name: str, settings: dict[str, Any], *, examples: int, repeats: int) -> dict[str, Any]:
    """Measure one network.

    Args:
        name: of a reference network.
        settings: of its builder.
        examples: random inputs on which activations are compared and the line is measured.
        repeats: runs of everything; the least time counts.
    """
    generator = torch.Generator().manual_seed(0)
    model = randomise_state(reference_network(name, **settings), generator)
    inputs = reference_inputs(name, examples, generator=generator, **settings)

    def least(call: Callable[[], Any]) -> tuple[float, Any]:
        runs = [cpu_seconds(call) for _ in range(repeats)]
        return round(min(seconds for seconds, _ in runs), 3), runs[-1][1]

    row: dict[str, Any] = {"network": name, "parameters": sum(p.numel() for p in model.parameters())}
    first = tuple(x[:2] for x in inputs)
    row["discover"], spec = least(lambda: isthmus.discover(model, first))
    row["groups"] = len(spec.groups)
    row["verify"], verification = least(lambda: isthmus.verify(spec, model, first))
    row["verification_error"] = verification.max_relative_error
    pair = planted_pair(model, spec, NOISE, generator)
    other = reference_network(name, **settings)
    other.load_state_dict(pair.state_b)
    outputs = model(*inputs).detach()
    targets = outputs.flatten(2).mean(2).argmax(1) if outputs.ndim > 2 else outputs.argmax(1)
    if outputs.ndim > 2:
        targets = targets[:, None, None].expand(-1, *outputs.shape[2:])
    data = [(inputs[0], targets)]
    row["align"], row["recovered"] = {}, {}
    for method in isthmus.METHODS:
        seconds, found = least(
            lambda m=method: isthmus.align(model, other, batches=data, method=m, spec=spec)
        )
        row["align"][method] = seconds
        right = sum(int((found.permutations[g] == p).sum()) for g, p in pair.permutations.items())
        row["recovered"][method] = right / max(1, sum(len(p) for p in pair.permutations.values()))
    row["line"], _ = least(lambda: isthmus.line(model, other, data, points=11, loss=_loss))
    return row


def _loss(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    losses = nn.functional.cross_entropy(outputs, targets, reduction="none")
    return losses.flatten(1).mean(1) if losses.ndim > 1 else losses


def table(record: dict[str, Any]) -> str:
    """Return the record as a Markdown table."""
    heads = ["network", "parameters", "groups", "discover", "verify", *isthmus.METHODS, "line, 11 points"]
    lines = ["| " + " | ".join(heads) + " |", "| --- " + "| ---: " * (len(heads) - 1) + "|"]
    for r in record["rows"]:
        times = [f"{r['align'][m]:.2f} ({100 * r['recovered'][m]:.0f} %)" for m in isthmus.METHODS]
        cells = [
            r["network"],
            f"{r['parameters']:,}",
            str(r["groups"]),
            f"{r['discover']:.2f}",
            f"{r['verify']:.2f}",
            *times,
            f"{r['line']:.2f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Measure the networks that were asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="write the record there")
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--examples", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    assign(torch.eye(512), warm=assign(torch.eye(512)))
    rows = []
    for name in args.networks:
        rows.append(measure(name, NETWORKS[name], examples=args.examples, repeats=args.repeats))
        print(f"{name}: done", flush=True)
    record = {"machine": machine(), "noise": NOISE, "examples": args.examples, "rows": rows}
    print("\nProcess CPU seconds; in brackets, units put back where they belong.\n")
    print(table(record))
    if args.out is not None:
        with atomic_path(args.out) as temporary:
            temporary.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
