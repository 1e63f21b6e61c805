"""Small transformers as people write them: like GPT-2, ViT, BERT and Llama."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["bert", "gpt", "llama", "vit"]


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


class _Bert(nn.Module):
    """Post-norm blocks over token, position and segment embeddings, a pooler on the first token."""

    def __init__(
        self, vocabulary: int, classes: int, width: int, depth: int, heads: int, context: int
    ) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(context, width)
        self.segments = nn.Embedding(2, width)
        self.norm = nn.LayerNorm(width)
        self.blocks = nn.ModuleList(_PostNormBlock(width, heads) for _ in range(depth))
        self.pooler = nn.Linear(width, width)
        self.head = nn.Linear(width, classes)

    def forward(self, tokens: Tensor, segments: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        places = torch.arange(tokens.shape[1], device=tokens.device)
        kinds = torch.zeros_like(tokens) if segments is None else segments
        x = self.norm(self.tokens(tokens) + self.positions(places) + self.segments(kinds))
        seen = None if mask is None else mask[:, None, None].bool()
        for block in self.blocks:
            x = block(x, seen)
        return self.head(torch.tanh(self.pooler(x[:, 0])))


class _PostNormBlock(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.out = nn.Linear(width, width)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor, seen: Tensor | None) -> Tensor:
        query, key, value = (
            layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        mixed = functional.scaled_dot_product_attention(query, key, value, attn_mask=seen)
        x = self.norm1(x + self.out(mixed.transpose(1, 2).flatten(2)))
        return self.norm2(x + self.down(functional.gelu(self.up(x))))


class _Llama(nn.Module):
    def __init__(
        self, vocabulary: int, width: int, depth: int, heads: int, kv_heads: int, hidden: int
    ) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.blocks = nn.ModuleList(_LlamaBlock(width, heads, kv_heads, hidden) for _ in range(depth))
        self.norm = nn.RMSNorm(width, eps=1e-6)
        self.head = nn.Linear(width, vocabulary, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class _LlamaBlock(nn.Module):
    """RMS norms, grouped-query attention with rotary embeddings, a gated MLP, no biases."""

    def __init__(self, width: int, heads: int, kv_heads: int, hidden: int) -> None:
        super().__init__()
        self.heads, self.kv_heads, size = heads, kv_heads, width // heads
        self.norm1, self.norm2 = nn.RMSNorm(width, eps=1e-6), nn.RMSNorm(width, eps=1e-6)
        self.query = nn.Linear(width, width, bias=False)
        self.key, self.value = (nn.Linear(width, kv_heads * size, bias=False) for _ in range(2))
        self.out = nn.Linear(width, width, bias=False)
        self.gate, self.up = (nn.Linear(width, hidden, bias=False) for _ in range(2))
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        query = self.query(y).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        key, value = (
            layer(y).unflatten(-1, (self.kv_heads, -1)).transpose(1, 2) for layer in (self.key, self.value)
        )
        mixed = functional.scaled_dot_product_attention(
            _rotated(query), _rotated(key), value, is_causal=True, enable_gqa=True
        )
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        y = self.norm2(x)
        return x + self.down(functional.silu(self.gate(y)) * self.up(y))


def _rotated(x: Tensor) -> Tensor:
    """Turn pairs of dimensions, half a head apart, by angles that grow with the position (Su et al. 2021)."""
    length, half = x.shape[-2], x.shape[-1] // 2
    frequencies = 10000.0 ** (-torch.arange(half, dtype=x.dtype, device=x.device) / half)
    angles = torch.arange(length, dtype=x.dtype, device=x.device)[:, None] * frequencies
    one, two = x[..., :half], x[..., half:]
    return torch.cat([one * angles.cos() - two * angles.sin(), two * angles.cos() + one * angles.sin()], -1)


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


def bert(
    vocabulary: int = 128,
    classes: int = 2,
    width: int = 64,
    depth: int = 2,
    heads: int = 4,
    context: int = 64,
) -> nn.Module:
    """Build a BERT-like classifier: post-norm blocks, separate projections, a pooler on the first token.

    Inputs: tokens, int64, shape ``(n, length)`` with ``length <= context``; optionally segments (0 or 1) and a mask
    (0 where a token is padding), both of that shape. Output: logits ``(n, classes)``.
    """
    return _Bert(vocabulary, classes, width, depth, heads, context)


def llama(
    vocabulary: int = 128,
    width: int = 64,
    depth: int = 2,
    heads: int = 4,
    *,
    kv_heads: int = 2,
    hidden: int = 128,
) -> nn.Module:
    """Build a Llama-like language model: RMS norms, grouped queries, rotary positions, gated MLPs, no biases.

    Input: tokens, int64, shape ``(n, length)``; output: logits ``(n, length, vocabulary)``.
    """
    return _Llama(vocabulary, width, depth, heads, kv_heads, hidden)
