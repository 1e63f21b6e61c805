"""Random networks whose layers are cut from shared tensors: parts taken twice, overlapping, reversed, in turn."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable

import pytest
import torch
from programs import BATCH, FEATURES
from test_fuzz_programs import changed_on, inputs_of
from torch import Tensor, nn

from isthmus.symmetry import discover, verify

LAYERS, UNITS = 4, 5
Change = Callable[[nn.ParameterDict, Tensor], Tensor]
Use = Callable[[Tensor, Tensor], Tensor]


def changes(dice: random.Random) -> dict[str, Change]:
    """Return ways to make another stack of square matrices from one."""
    layer, other = dice.randrange(LAYERS), dice.randrange(1, LAYERS)
    order = [dice.randrange(LAYERS) for _ in range(dice.randint(2, 5))]
    axis = dice.randrange(3)
    return {
        "flipped": lambda p, w: w.flip(0),
        "units flipped": lambda p, w: w.flip(2),
        "rolled": lambda p, w: w.roll(other, 0),
        "first": lambda p, w: w[:-1] if len(w) > 1 else w,
        "last": lambda p, w: w[1:] if len(w) > 1 else w,
        "every second": lambda p, w: w[::2],
        "picked": lambda p, w: w[[k % len(w) for k in order]],
        "selected": lambda p, w: w.index_select(0, torch.tensor([k % len(w) for k in order])),
        "transposed": lambda p, w: w.transpose(1, 2),
        "one by one": lambda p, w: torch.stack([w[k % len(w)] for k in order]),
        "apart": lambda p, w: torch.cat(w.split([1, len(w) - 1])[::-1]) if len(w) > 1 else w,
        "one matrix": lambda p, w: (
            w.permute(1, 0, 2).reshape(UNITS, -1).view(UNITS, len(w), UNITS).transpose(0, 1)
        ),
        "in turn": lambda p, w: (
            w.permute(1, 2, 0).reshape(UNITS, -1).view(UNITS, len(w), UNITS).transpose(0, 1)
        ),
        "with its reverse": lambda p, w: w + w.flip(0),
        "with the next": lambda p, w: w[1:] * w[:-1] if len(w) > 1 else w,
        "with the other": lambda p, w: torch.cat([w[:2], p["v"][1:3]]),
        "times the other": lambda p, w: w * p["v"][: len(w)] if len(w) <= LAYERS else w,
        "times one layer": lambda p, w: w * p["v"][layer],
        "scaled by layer": lambda p, w: w * torch.arange(1.0, len(w) + 1, dtype=w.dtype)[:, None, None],
        "with biases": lambda p, w: w + p["b"][: len(w), None] if len(w) <= LAYERS else w,
        "normalised": lambda p, w: w / w.norm(dim=axis, keepdim=True),
        "centred": lambda p, w: w - w.mean((1, 2), keepdim=True),
        "shared out": lambda p, w: w.softmax(axis),
        "summed up": lambda p, w: w.cumsum(0),
        "rewritten": lambda p, w: torch.select_scatter(w, w[-1], 0, layer % len(w)),
        "squared": lambda p, w: torch.bmm(w, w.transpose(1, 2)),
        "masked": lambda p, w: w.masked_fill(torch.arange(len(w))[:, None, None] == 1, 0.5),
    }


def uses(dice: random.Random) -> dict[str, Use]:
    """Return ways to run a stream of units through a stack of matrices."""
    layer = dice.randrange(LAYERS)
    return {
        "one layer": lambda h, w: torch.tanh(h @ w[layer % len(w)]),
        "a chain": lambda h, w: torch.tanh(torch.tanh(h @ w[0]) @ w[-1]),
        "residuals": lambda h, w: h + torch.tanh(h @ w[layer % len(w)]) @ w[0].T,
        "all summed": lambda h, w: torch.tanh(torch.einsum("bd,tde->bte", h, w)).sum(1),
        "all ranked": lambda h, w: torch.tanh(torch.einsum("bd,tde->tbe", h, w)).amax(0),
        "one of all": lambda h, w: torch.tanh(torch.einsum("bd,tde->bte", h, w))[:, layer % len(w)],
        "batched": lambda h, w: torch.tanh(h @ w).unbind(0)[layer % len(w)],
        "attention": lambda h, w: (h @ w[0] @ (h @ w[-1]).T).softmax(-1) @ (h @ w[layer % len(w)]),
    }


class Stacked(nn.Module):
    """A network drawn from a seed: three readings of shared tensors, each with a read-out of its own."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        dice, numbers = random.Random(seed), torch.Generator().manual_seed(seed)
        self.seed, self.listing, self._readings = seed, [], []
        shapes = {
            "e": (FEATURES, UNITS),
            "w": (LAYERS, UNITS, UNITS),
            "v": (LAYERS, UNITS, UNITS),
            "b": (LAYERS, UNITS),
        }
        shapes |= {f"o{k}": (UNITS, 2) for k in range(3)}
        self.parts = nn.ParameterDict({n: torch.randn(s, generator=numbers) / 2 for n, s in shapes.items()})
        for _ in range(3):
            steps = [dice.choice(list(changes(dice).items())) for _ in range(dice.randint(0, 3))]
            name, use = dice.choice(list(uses(dice).items()))
            self.listing.append(" ".join([*(n for n, _ in steps), f"({name})"]))
            self._readings.append(([change for _, change in steps], use))
        self.whole = dice.random() < 0.15

    def inputs(self) -> Tensor:
        """Return example inputs."""
        return torch.randn(BATCH, FEATURES, generator=torch.Generator().manual_seed(self.seed + 1)).to(
            self.parts["e"]
        )

    def forward(self, x: Tensor) -> list[Tensor]:
        h = torch.tanh(x @ self.parts["e"])
        found: list[Tensor] = []
        for k, (steps, use) in enumerate(self._readings):
            w = self.parts["w"]
            for change in steps:
                w = change(self.parts, w)
            h = use(h, w)
            found.append(h @ self.parts[f"o{k}"])
        return [*found, self.parts["w"].square().sum()] if self.whole else found


def wrong(seeds: range) -> tuple[list[str], int]:
    """Return the networks whose spec is wrong, and the number of groups that were found in all."""
    found: list[str] = []
    groups = 0
    for seed in seeds:
        network = Stacked(seed).eval()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's own, of its exporter
            spec = discover(network, network.inputs())
        groups += len(spec.groups)
        verified = seed % 8 or verify(spec, network, network.inputs()).passed
        network = network.double()
        on = changed_on(network, spec, inputs_of(network), seed)  # type: ignore[arg-type]
        if on or not verified:
            found.append(f"seed {seed}, on {on}: {network.listing}\n{spec}")
    return found, groups


def test_nothing_claimed_of_layers_in_shared_tensors_is_wrong() -> None:
    found, groups = wrong(range(12))
    assert not found, "\n".join(found)
    assert groups > 12


@pytest.mark.slow
@pytest.mark.parametrize("start", range(12, 1012, 250))
def test_nothing_claimed_of_many_layers_in_shared_tensors_is_wrong(start: int) -> None:
    found, _ = wrong(range(start, start + 250))
    assert not found, "\n".join(found)
