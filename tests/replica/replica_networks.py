"""Networks that keep more than their state, of every kind we know; sizes are tiny."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm

EXAMPLES = 12
CLASSES = 3


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class CachedBias(nn.Module):
    """Attention whose bias per head is laid out once and kept: the ways of LeViT, EfficientFormer and TinyViT.

    Args:
        how: ``attribute`` and ``buffer`` are made in ``eval()`` and dropped in ``train()``; ``dictionary`` is filled in
            the first call and emptied in ``train()``; ``once`` is made in the first ``eval()`` and never again;
            ``first call`` and ``for ever`` (a dictionary) are filled in the first call and never again.
    """

    index: Tensor

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.kept, self.lazy = how, {}, None
        self.mix, self.out = nn.Linear(6, 12), nn.Linear(12, CLASSES)
        self.bias = nn.Parameter(2 * torch.randn(3, 5))
        self.register_buffer("index", (torch.arange(25) % 5).view(5, 5), persistent=False)

    @torch.no_grad()
    def train(self, mode: bool = True) -> CachedBias:
        super().train(mode)
        if self.how in ("attribute", "buffer"):
            if mode and hasattr(self, "laid"):
                del self.laid
            elif not mode and self.how == "attribute":
                self.laid = self.bias[:, self.index]
            elif not mode:
                self.register_buffer("laid", self.bias[:, self.index], persistent=False)
        elif self.how == "once" and not mode and not hasattr(self, "laid"):
            self.laid = self.bias[:, self.index]
        elif self.how == "dictionary" and mode:
            self.kept = {}
        return self

    def _laid(self) -> Tensor:
        if self.how in ("attribute", "buffer", "once"):
            return self.laid
        if self.how in ("dictionary", "for ever"):
            if "cpu" not in self.kept:
                self.kept["cpu"] = self.bias[:, self.index].detach()
            return self.kept["cpu"]
        if self.lazy is None:
            self.lazy = self.bias[:, self.index].detach()
        return self.lazy

    def forward(self, x: Tensor) -> Tensor:
        h = self.mix(x).view(len(x), 5, 3, 4).transpose(1, 2)
        attention = (h @ h.transpose(-1, -2) + self._laid()).softmax(-1)
        return self.out((attention @ h).transpose(1, 2).reshape(len(x), 5, 12)).mean(1)


class Tied(nn.Module):
    """A square layer whose weight is used twice, the second time through another holder of its memory."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.stem, self.layer, self.out = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, CLASSES)
        weight = self.layer.weight
        if how == "list":
            self.held = [weight]
        elif how == "dictionary":
            self.held = {"again": [weight]}
        elif how == "parameter":
            self.again = nn.Parameter(weight)
        elif how == "data":
            self.again = nn.Parameter(weight.data)
        elif how == "buffer":
            self.register_buffer("again", weight.data)
        elif how == "attribute":
            self.again = weight.data.view(6, 6)
        elif how == "closure":
            self.function = lambda h: h @ weight.T
        elif how == "closure over a module":
            layer = self.layer
            self.function = lambda h: h @ layer.weight.T
        elif how == "default":
            self.function = lambda h, w=weight: h @ w.T
        elif how == "partial":
            self.function = functools.partial(lambda layer, h: h @ layer[0].weight.T, (self.layer,))
        elif how == "method":
            self.function = self._again
        elif how == "hook":
            self.out.register_forward_pre_hook(lambda module, args: (args[0] @ weight.T,))
        elif how == "rows":
            self.again = nn.Parameter(weight.data[:3])
        elif how == "transposed":
            self.again = nn.Parameter(weight.data.t())
        elif how == "object":
            self.held = Holder(weight)

    def _again(self, h: Tensor) -> Tensor:
        return h @ self.layer.weight.T

    def forward(self, x: Tensor) -> Tensor:
        h = self.layer(self.stem(x).relu()).relu()
        if self.how == "hook":
            return self.out(h)
        if self.how == "list":
            return self.out(h @ self.held[0].T)
        if self.how == "dictionary":
            return self.out(h @ self.held["again"][0].T)
        if self.how == "object":
            return self.out(h @ self.held.weight.T)
        if self.how == "rows":
            return self.out(h[:, :3] @ self.again)
        if hasattr(self, "function"):
            return self.out(self.function(h))
        return self.out(h @ self.again.T)


class Holder:
    """Some object that is no module."""

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight


class Scaled(nn.Module):
    """A parametrisation."""

    def forward(self, weight: Tensor) -> Tensor:
        return weight.tanh()


def pruned() -> nn.Module:
    model = _plain(nn.Linear(4, 6))
    prune.l1_unstructured(model[0], "weight", 0.3)
    return model


def parametrised() -> nn.Module:
    model = _plain(nn.Linear(4, 6))
    nn.utils.parametrize.register_parametrization(model[0], "weight", Scaled())
    return model


def _plain(first: nn.Module) -> nn.Sequential:
    return nn.Sequential(first, nn.ReLU(), nn.Linear(6, CLASSES))


class MergedInEvaluation(nn.Module):
    """A low-rank update that ``eval()`` adds to the weight and ``train()`` takes off again."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.out = nn.Linear(4, 6), nn.Linear(6, CLASSES)
        self.down, self.up = nn.Parameter(torch.randn(2, 4)), nn.Parameter(torch.randn(6, 2))
        self.merged = False

    def train(self, mode: bool = True) -> MergedInEvaluation:
        super().train(mode)
        if mode == self.merged:
            with torch.no_grad():
                self.layer.weight += (-1 if mode else 1) * (self.up @ self.down)
            self.merged = not mode
        return self

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.layer(x).relu())


CACHES = ("attribute", "buffer", "dictionary", "once", "first call", "for ever")
HOLDERS = (
    "list", "dictionary", "parameter", "data", "buffer", "attribute", "closure", "closure over a module", "default",
    "partial", "method", "hook", "rows", "transposed", "object",
)  # fmt: skip
KINDS: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    **{f"cached bias, {how}": (lambda how=how: CachedBias(how), normal(EXAMPLES, 5, 6)) for how in CACHES},
    **{f"tied by {how}": (lambda how=how: Tied(how), normal(EXAMPLES, 4)) for how in HOLDERS},
    "old weight norm": (lambda: _plain(weight_norm(nn.Linear(4, 6))), normal(EXAMPLES, 4)),
    "old spectral norm": (lambda: _plain(spectral_norm(nn.Linear(4, 6))), normal(EXAMPLES, 4)),
    "weight norm": (lambda: _plain(parametrizations.weight_norm(nn.Linear(4, 6))), normal(EXAMPLES, 4)),
    "parametrised": (parametrised, normal(EXAMPLES, 4)),
    "pruned": (pruned, normal(EXAMPLES, 4)),
}
"""Every kind by its name, with inputs."""


def build(kind: str, seed: int) -> nn.Module:
    """Return a network in evaluation that was run once, so that it keeps whatever it keeps."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        factory, inputs = KINDS[kind]
        model = factory().eval()
        model(inputs)
    return model


def wanted(kind: str, state: dict[str, Tensor]) -> Tensor:
    """Return what a state computes: in a network that was loaded before it was first evaluated."""
    factory, inputs = KINDS[kind]
    with torch.random.fork_rng(devices=[]):
        model = factory()
        model.load_state_dict(state)
        return model.train().eval()(inputs).detach()


def data(kind: str) -> list[Any]:
    """Return labelled batches for a kind."""
    return [(KINDS[kind][1], torch.arange(EXAMPLES) % CLASSES)]
