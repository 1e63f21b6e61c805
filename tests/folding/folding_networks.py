"""Small networks with norms of every kind, with gains far from one and biases far from zero."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_Module = TypeVar("_Module", bound=nn.Module)


def wild(model: _Module, seed: int = 0) -> _Module:
    """Change every weight and every statistic at random; gains come to lie between about -1 and 3."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            if parameter.ndim == 1:
                parameter.copy_(0.7 * noise + (1 if name.endswith("weight") else 0))
            else:
                parameter.add_(0.3 * noise)
        for buffer in model.buffers():
            if buffer.is_floating_point():
                buffer.add_(torch.rand(buffer.shape, generator=generator))
    return model.eval()


def change(one: nn.Module, other: nn.Module, *args: Any, **kwargs: Any) -> float:
    """Return the largest relative difference of the (first) outputs of two networks."""
    with torch.no_grad():
        first, second = one(*args, **kwargs), other(*args, **kwargs)
    if not isinstance(first, Tensor):
        first, second = first[0], second[0]
    return float((first - second).abs().max() / first.abs().max())


class WrittenRms(nn.Module):
    """An RMSNorm as model code writes it out, in one of several ways."""

    def __init__(self, width: int, way: str) -> None:
        super().__init__()
        self.way = way
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float() if x.dtype != torch.float64 else x
        square = wide.pow(2).mean(-1, keepdim=True)
        if self.way == "weight last":
            return (wide * torch.rsqrt(square + 1e-6)).to(x.dtype) * self.weight
        if self.way == "weight first":
            return self.weight * (wide * torch.rsqrt(square + 1e-6)).to(x.dtype)
        if self.way == "divided":
            return wide / torch.sqrt(square + 1e-6) * self.weight
        if self.way == "one plus":
            return (wide * torch.rsqrt(square + 1e-6)) * (1.0 + self.weight.to(wide.dtype))
        assert self.way == "normalize"
        return F.normalize(x, dim=-1) * x.shape[-1] ** 0.5 * self.weight


class Block(nn.Module):
    """A residual block before which a norm stands: attention of one head, then a gated perceptron."""

    def __init__(self, width: int, norm: Any) -> None:
        super().__init__()
        self.first, self.second = norm(), norm()
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in "qkv")
        self.out = nn.Linear(width, width)
        self.gate, self.up = nn.Linear(width, 7), nn.Linear(width, 7)
        self.down = nn.Linear(7, width)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        x = x + self.out(F.scaled_dot_product_attention(self.query(h), self.key(h), self.value(h)))
        h = self.second(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


class Decoder(nn.Module):
    """Token and position tables, blocks, a last norm, a head that may be tied."""

    def __init__(self, norm: Any, *, blocks: int = 1, tied: bool = False, head_bias: bool = False) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(11, 8), nn.Parameter(torch.randn(1, 9, 8))
        self.blocks = nn.ModuleList(Block(8, norm) for _ in range(blocks))
        self.last = norm()
        self.head = nn.Linear(8, 11, bias=head_bias)
        if tied:
            self.head.weight = self.tokens.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens) + self.places[:, : tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.head(self.last(x))


class Mixer(nn.Module):
    """One block that mixes positions and one that mixes channels, each after a LayerNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(3, 6)
        self.first, self.second, self.last = (nn.LayerNorm(6) for _ in range(3))
        self.mix, self.unmix = nn.Linear(4, 8), nn.Linear(8, 4)
        self.up, self.down = nn.Linear(6, 9), nn.Linear(9, 6)
        self.head = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.unmix(F.gelu(self.mix(self.first(x).transpose(1, 2)))).transpose(1, 2)
        x = x + self.down(F.gelu(self.up(self.second(x))))
        return self.head(self.last(x).mean(1))


class Residual(nn.Module):
    """Convolutions, each before a BatchNorm, with shortcuts."""

    def __init__(self, *, bias: bool = False, affine: bool = True) -> None:
        super().__init__()
        self.one, self.two = (nn.Conv2d(i, 6, 3, padding=1, bias=bias) for i in (3, 6))
        self.norm_one, self.norm_two = (nn.BatchNorm2d(6, affine=affine) for _ in range(2))
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm_one(self.one(x)))
        x = F.relu(x + self.norm_two(self.two(x)))
        return self.head(x.mean((2, 3)))


class Channels(nn.Module):
    """A GroupNorm that a convolution reads, and one that a linear layer reads once positions are channels."""

    def __init__(self, padding: int = 0, mode: Any = "zeros", groups: int = 1) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8)
        self.conv = nn.Conv2d(8, 8, 3, padding=padding, padding_mode=mode, groups=groups)
        self.last = nn.GroupNorm(4, 8)
        self.head = nn.LazyLinear(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.last(F.relu(self.conv(self.norm(self.stem(x))))).flatten(1))


class Twice(nn.Module):
    """A norm that is used twice: all of its readers may be only its own, or read something else too."""

    def __init__(self, *, agree: bool) -> None:
        super().__init__()
        self.stem, self.norm, self.agree = nn.Linear(3, 8), nn.LayerNorm(8), agree
        self.one, self.two, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.two(self.norm(x))
        if not self.agree:
            x = x + self.two(F.gelu(x))
        return self.head(F.gelu(self.one(self.norm(x))))
