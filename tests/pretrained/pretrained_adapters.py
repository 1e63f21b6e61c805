"""Three ways to average LoRA adapters, measured: on made factors, and on adapters of one network that were trained.

As a program: ``python tests/pretrained/pretrained_adapters.py`` prints the rows of the table.
"""

from __future__ import annotations

import torch
from torch import Tensor

from isthmus.pretrained import ADAPTER_WAYS
from isthmus.pretrained._low_rank import LowRank, averaged_products

SIZE, RANK, PAIRS = 96, 8, 10


def drawn(source: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=source, dtype=torch.float64)


def made(kind: str, seed: int) -> list[LowRank]:
    """Return two products: independent ones, or one with noise in frames of their own."""
    source = torch.Generator().manual_seed(seed)
    first = LowRank(drawn(source, SIZE, RANK), drawn(source, RANK, SIZE))
    if kind == "independent":
        return [first, LowRank(drawn(source, SIZE, RANK), drawn(source, RANK, SIZE))]
    frame = torch.linalg.qr(drawn(source, RANK, RANK))[0] * torch.exp(0.5 * drawn(source, RANK))
    noise = float(kind.removesuffix(" noise"))
    outer = (first.outer + noise * drawn(source, SIZE, RANK)) @ torch.linalg.inv(frame)
    return [first, LowRank(outer, frame @ (first.inner + noise * drawn(source, RANK, SIZE)))]


def loss(net: list[Tensor], products: list[LowRank], inputs: Tensor, targets: Tensor) -> Tensor:
    """Return the mean squared error of a perceptron whose layers have low-rank changes."""
    values = inputs
    for k, (weight, product) in enumerate(zip(net, products, strict=True)):
        values = values @ (weight + product.outer @ product.inner).T
        values = values if k == len(net) - 1 else values.relu()
    return (values - targets).square().mean()


def task(seed: int) -> tuple[list[Tensor], Tensor, Tensor, Tensor, Tensor]:
    """Return a network, and data of a network that is a low-rank change away: for training and for testing."""
    source = torch.Generator().manual_seed(seed)
    shapes = [(SIZE, 32), (SIZE, SIZE), (10, SIZE)]
    net = [drawn(source, *shape) / shape[1] ** 0.5 for shape in shapes]
    wanted = [w + 0.05 * drawn(source, w.shape[0], 4) @ drawn(source, 4, w.shape[1]) for w in net]
    inputs = drawn(source, 3000, 32)
    values = inputs
    for k, weight in enumerate(wanted):
        values = values @ weight.T
        values = values if k == len(wanted) - 1 else values.relu()
    return net, inputs[:2000], values[:2000], inputs[2000:], values[2000:]


def trained(net: list[Tensor], inputs: Tensor, targets: Tensor, seed: int) -> list[LowRank]:
    """Return the factors that Adam finds from peft's start: inner ones at random, outer ones zero."""
    source = torch.Generator().manual_seed(seed)
    factors = [
        (
            torch.zeros(w.shape[0], RANK, dtype=torch.float64),
            drawn(source, RANK, w.shape[1]) / w.shape[1] ** 0.5,
        )
        for w in net
    ]
    parameters = [t.requires_grad_() for pair in factors for t in pair]
    steps = torch.optim.Adam(parameters, lr=5e-3)
    for _ in range(400):
        rows = torch.randint(0, len(inputs), (128,), generator=source)
        steps.zero_grad()
        loss(net, [LowRank(*pair) for pair in factors], inputs[rows], targets[rows]).backward()
        steps.step()
    return [LowRank(outer.detach(), inner.detach()) for outer, inner in factors]


def trained_rows(seeds: range) -> None:
    """Print the errors and test losses of averages of two trainings."""
    errors: dict[str, list[float]] = {way: [] for way in ADAPTER_WAYS}
    losses: dict[str, list[float]] = {
        "none": [],
        "each": [],
        "mean of the products": [],
        **{w: [] for w in ADAPTER_WAYS},
    }
    for seed in seeds:
        net, inputs, targets, test, wanted = task(seed)
        pair = [trained(net, inputs, targets, 100 * seed + k) for k in range(2)]
        half = [0.5, 0.5]
        none = [LowRank(w.new_zeros(w.shape[0], 1), w.new_zeros(1, w.shape[1])) for w in net]
        both = [
            LowRank(torch.cat([0.5 * a.outer, 0.5 * b.outer], 1), torch.cat([a.inner, b.inner]))
            for a, b in zip(*pair, strict=True)
        ]
        losses["none"].append(float(loss(net, none, test, wanted)))
        losses["each"].append(sum(float(loss(net, p, test, wanted)) for p in pair) / 2)
        losses["mean of the products"].append(float(loss(net, both, test, wanted)))
        for way in ADAPTER_WAYS:
            found = [averaged_products([a, b], half, way) for a, b in zip(*pair, strict=True)]
            squares = [(e[way] * b.norm(), b.norm()) for (_, e), b in zip(found, both, strict=True)]
            errors[way].append((sum(e * e for e, _ in squares) / sum(n * n for _, n in squares)) ** 0.5)
            losses[way].append(float(loss(net, [f for f, _ in found], test, wanted)))
    mean = {way: sum(e) / len(e) for way, e in errors.items()}
    print("trained", {way: round(e, 4) for way, e in mean.items()})  # noqa: T201
    print("test loss", {name: round(sum(v) / len(v), 4) for name, v in losses.items()})  # noqa: T201


def main() -> None:
    for kind in ("0.01 noise", "0.1 noise", "0.5 noise", "independent"):
        found = [averaged_products(made(kind, seed), [0.5, 0.5], "svd")[1] for seed in range(PAIRS)]
        mean = {way: sum(f[way] for f in found) / PAIRS for way in ADAPTER_WAYS}
        print(kind, {way: round(e, 4) for way, e in mean.items()})  # noqa: T201
    trained_rows(range(3))


if __name__ == "__main__":
    main()
