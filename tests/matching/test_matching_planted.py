"""Planted truth beyond plain and residual nets: branches, concatenations, heads, experts, grouped convolutions."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from isthmus import SymmetrySpec, align, discover
from isthmus.matching import METHODS
from isthmus.testing import (
    PlantedPair,
    bert,
    gpt,
    llama,
    planted_pair,
    randomise_state,
    reference_inputs,
    reference_network,
    vit,
)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class GroupedQueries(nn.Module):
    """Four query heads over two key and value heads, with separate projections."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm = nn.Linear(8, 24), nn.LayerNorm(24)
        self.query, self.key, self.value = nn.Linear(24, 24), nn.Linear(24, 12), nn.Linear(24, 12)
        self.out, self.head = nn.Linear(24, 24), nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        y = self.norm(x)
        query = self.query(y).unflatten(-1, (4, 6)).transpose(1, 2)
        key, value = (
            f(y).unflatten(-1, (2, 6)).transpose(1, 2).repeat_interleave(2, 1) for f in (self.key, self.value)
        )
        mixed = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        return self.head((x + self.out(mixed)).mean(1))


class Experts(nn.Module):
    """Experts stacked in one tensor: hidden units of each expert in its own block."""

    def __init__(self, width: int = 12, experts: int = 5, hidden: int = 7) -> None:
        super().__init__()
        self.embed, self.router = nn.Linear(8, width), nn.Linear(width, experts)
        self.up = nn.Parameter(torch.randn(experts, hidden, width) / width**0.5)
        self.down = nn.Parameter(torch.randn(experts, width, hidden) / hidden**0.5)
        self.bias, self.head = nn.Parameter(torch.randn(experts, hidden)), nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.embed(x))
        hidden = torch.relu(torch.einsum("bd,ehd->beh", x, self.up) + self.bias)
        y = torch.einsum("beh,edh->bed", hidden, self.down)
        return self.head(x + (self.router(x).softmax(-1)[:, :, None] * y).sum(1))


class Grouped(nn.Module):
    """A residual block with a grouped convolution, and no norms."""

    def __init__(self, width: int = 8, groups: int = 4) -> None:
        super().__init__()
        self.stem, self.up = nn.Conv2d(3, width, 3, padding=1), nn.Conv2d(width, 2 * width, 1)
        self.mix = nn.Conv2d(2 * width, 2 * width, 3, padding=1, groups=groups)
        self.down, self.head = nn.Conv2d(2 * width, width, 1), nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        x = x + self.down(torch.relu(self.mix(torch.relu(self.up(x)))))
        return self.head(torch.relu(x).mean((2, 3)))


def reference(name: str) -> tuple[Callable[[], nn.Module], Callable[[], Tensor]]:
    return lambda: reference_network(name), lambda: reference_inputs(name, 64, generator=generator(5))[0]


NETWORKS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    **{name: reference(name) for name in ("resnet20_zero_pad", "densenet", "unet", "mobilenet")},
    "gpt": (
        lambda: gpt(vocabulary=31, width=16, depth=1, heads=2, context=8),
        lambda: torch.randint(0, 31, (64, 8), generator=generator(5)),
    ),
    "vit": (
        lambda: vit(classes=5, width=16, depth=1, heads=2, image_size=8, patch=4, channels=3),
        lambda: torch.randn(64, 3, 8, 8, generator=generator(5)),
    ),
    **{
        f"bert {depth}": (
            lambda depth=depth: bert(vocabulary=31, classes=5, width=16, depth=depth, heads=2, context=8),
            lambda: torch.randint(0, 31, (64, 8), generator=generator(5)),
        )
        for depth in (1, 2)
    },
    **{
        f"llama {depth}": (
            lambda depth=depth: llama(vocabulary=31, width=32, depth=depth, heads=4, kv_heads=2, hidden=24),
            lambda: torch.randint(0, 31, (64, 8), generator=generator(5)),
        )
        for depth in (1, 2)
    },
    "grouped queries": (GroupedQueries, lambda: torch.randn(64, 6, 8, generator=generator(5))),
    "experts": (Experts, lambda: torch.randn(128, 8, generator=generator(5))),
    "grouped convolution": (Grouped, lambda: torch.randn(32, 3, 8, 8, generator=generator(5))),
}


@functools.cache
def planted(name: str) -> tuple[nn.Module, Tensor, SymmetrySpec, PlantedPair]:
    build, inputs = NETWORKS[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = randomise_state(build(), generator()).eval()
    x = inputs()
    spec = discover(model, (x[:2],))
    return model, x, spec, planted_pair(model, spec, 0.01, generator(1))


SLOW = ("resnet20_zero_pad", "bert 2", "llama 2")


def cases() -> Iterator[Any]:
    """Yield every network with every method; by default each network meets two of them, and all meet several."""
    for k, name in enumerate(NETWORKS):
        for i, method in enumerate(METHODS.usual):
            quick = name not in SLOW and i in (k % len(METHODS.usual), (k + 2) % len(METHODS.usual))
            yield pytest.param(name, method, marks=() if quick else pytest.mark.slow)


@pytest.mark.parametrize(("name", "method"), list(cases()))
def test_planted_permutations_are_recovered(name: str, method: str) -> None:
    model, x, spec, pair = planted(name)
    assert len(spec.groups) > 1
    found = align(model, pair.state_b, batches=[x], method=method, spec=spec, check=False)
    wrong = [g for g, truth in pair.permutations.items() if not torch.equal(found.permutations[g], truth)]
    assert not wrong
    assert all(after <= before for before, after in found.costs.values())
