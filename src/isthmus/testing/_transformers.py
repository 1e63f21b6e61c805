"""Small transformers as people write them: a GPT-2-like language model and a ViT-like image classifier."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["gpt", "vit"]


class _Attention(nn.Module):
    def __init__(self, width: int, heads: int, *, causal: bool) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.qkv(x).chunk(3, dim=-1)
        query, key, value = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (query, key, value))
        mixed = functional.scaled_dot_product_attention(query, key, value, is_causal=self.causal)
        return self.out(mixed.transpose(1, 2).flatten(2))


class _Block(nn.Module):
    def __init__(self, width: int, heads: int, *, causal: bool) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = _Attention(width, heads, causal=causal)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.down(functional.gelu(self.up(self.norm2(x))))


class _Gpt(nn.Module):
    def __init__(self, vocabulary: int, width: int, depth: int, heads: int, context: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Embedding(context, width)
        self.blocks = nn.ModuleList(_Block(width, heads, causal=True) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, tokens: Tensor) -> Tensor:
        places = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.tokens(tokens) + self.positions(places)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class _Vit(nn.Module):
    def __init__(
        self, classes: int, width: int, depth: int, heads: int, image_size: int, patch: int, channels: int
    ) -> None:
        super().__init__()
        self.patches = nn.Conv2d(channels, width, patch, stride=patch)
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        self.positions = nn.Parameter(0.02 * torch.randn(1, (image_size // patch) ** 2 + 1, width))
        self.blocks = nn.ModuleList(_Block(width, heads, causal=False) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patches(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], dim=1) + self.positions
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x[:, 0]))


def gpt(
    vocabulary: int = 128, width: int = 64, depth: int = 2, heads: int = 4, context: int = 64
) -> nn.Module:
    """Build a GPT-2-like model: learned positions, pre-norm, causal attention, tied embedding and output.

    Input: tokens, int64, shape ``(n, length)`` with ``length <= context``; output: logits
    ``(n, length, vocabulary)``.
    """
    model = _Gpt(vocabulary, width, depth, heads, context)
    nn.init.normal_(model.tokens.weight, std=0.02)
    nn.init.normal_(model.positions.weight, std=0.02)
    return model


def vit(
    classes: int = 10,
    width: int = 64,
    depth: int = 2,
    heads: int = 4,
    *,
    image_size: int = 28,
    patch: int = 7,
    channels: int = 1,
) -> nn.Module:
    """Build a ViT-like classifier: patches, class token, learned positions, pre-norm blocks.

    Input: images ``(n, channels, image_size, image_size)``; output: logits ``(n, classes)``.
    """
    return _Vit(classes, width, depth, heads, image_size, patch, channels)
