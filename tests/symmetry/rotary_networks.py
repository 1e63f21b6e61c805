"""Rotary embeddings in every form, others that nearly are, and attention that uses them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from symmetry_helpers import build, normal
from torch import Tensor, nn

X = normal(2, 5, 6)
OTHER = normal(2, 5, 6, seed=3)
HEADS, SIZE = 2, 8
Rotate = Callable[[Any, Tensor], Tensor]


def angles(length: int, half: int = SIZE // 2) -> Tensor:
    return torch.arange(length)[:, None] * 100.0 ** (-torch.arange(half) / half)


def doubled(length: int) -> Tensor:
    freqs = angles(length)
    return torch.cat([freqs, freqs], -1)


def rotate_half(x: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return torch.cat([-x[..., half:], x[..., :half]], -1)


# --- Forms that turn pairs ------------------------------------------------------------------------------------------
def by_halves(_: Any, x: Tensor) -> Tensor:
    emb = doubled(x.shape[-2])
    return x * emb.cos() + rotate_half(x) * emb.sin()


def by_chunks(_: Any, x: Tensor) -> Tensor:
    freqs, (one, two) = angles(x.shape[-2]), x.chunk(2, -1)
    return torch.cat([one * freqs.cos() - two * freqs.sin(), one * freqs.sin() + two * freqs.cos()], -1)


def interleaved(_: Any, x: Tensor) -> Tensor:
    sin, cos = (f(angles(x.shape[-2])).repeat_interleave(2, -1) for f in (torch.sin, torch.cos))
    return x * cos + torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2) * sin


def written(_: Any, x: Tensor) -> Tensor:
    freqs, out = angles(x.shape[-2]), torch.empty_like(x)
    out[..., ::2] = x[..., ::2] * freqs.cos() - x[..., 1::2] * freqs.sin()
    out[..., 1::2] = x[..., 1::2] * freqs.cos() + x[..., ::2] * freqs.sin()
    return out


def as_complex(_: Any, x: Tensor) -> Tensor:
    freqs = angles(x.shape[-2])
    turn = torch.polar(torch.ones_like(freqs), freqs)
    return torch.view_as_real(torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2)) * turn).flatten(-2)


def partly(_: Any, x: Tensor) -> Tensor:
    freqs, turned, rest = angles(x.shape[-2], 2), x[..., :4], x[..., 4:]
    emb = torch.cat([freqs, freqs], -1)
    return torch.cat([turned * emb.cos() + rotate_half(turned) * emb.sin(), rest], -1)


def from_table(m: Any, x: Tensor) -> Tensor:
    at = torch.arange(x.shape[-2])
    return x * m.cos[at] + rotate_half(x) * m.sin[at]


def clockwise(_: Any, x: Tensor) -> Tensor:
    emb = doubled(x.shape[-2])
    return x * emb.cos() - rotate_half(x) * emb.sin()


def swapped(_: Any, x: Tensor) -> Tensor:
    """Cosines and sines exchanged: any table that is the same for both members will do."""
    emb = doubled(x.shape[-2])
    return x * emb.sin() + rotate_half(x) * emb.cos()


def learned(m: Any, x: Tensor) -> Tensor:
    emb = torch.cat([m.freqs, m.freqs], -1) * torch.arange(x.shape[-2])[:, None]
    return x * emb.cos() + rotate_half(x) * emb.sin()


GOOD: dict[Rotate, tuple[str, int]] = {
    by_halves: ("halves", SIZE),
    by_chunks: ("halves", SIZE),
    interleaved: ("neighbours", SIZE),
    written: ("neighbours", SIZE),
    as_complex: ("neighbours", SIZE),
    partly: ("halves", 4),
    from_table: ("halves", SIZE),
    clockwise: ("halves", SIZE),
    swapped: ("halves", SIZE),
}


# --- Forms that do not ----------------------------------------------------------------------------------------------
def wrong_sign(_: Any, x: Tensor) -> Tensor:
    emb = doubled(x.shape[-2])
    half = SIZE // 2
    return x * emb.cos() + torch.cat([x[..., half:], x[..., :half]], -1) * emb.sin()


def other_tables(_: Any, x: Tensor) -> Tensor:
    emb = torch.cat([angles(x.shape[-2]), 2 * angles(x.shape[-2])], -1)
    return x * emb.cos() + rotate_half(x) * emb.sin()


def one_other_entry(_: Any, x: Tensor) -> Tensor:
    emb = torch.arange(x.shape[-2])[:, None] * torch.tensor([1.0, 0.5, 0.2, 0.1, 1.0, 0.5, 0.2, 0.1001])
    return x * emb.cos() + rotate_half(x) * emb.sin()


def own_tables(m: Any, x: Tensor) -> Tensor:
    """Tables that are parameters, one entry for each dimension."""
    return x * m.table_cos + rotate_half(x) * m.table_sin


def cos_for_one_half(_: Any, x: Tensor) -> Tensor:
    freqs, (one, two) = angles(x.shape[-2]), x.chunk(2, -1)
    return torch.cat([one * freqs.cos() - two * freqs.sin(), two * freqs.cos() - one * freqs.sin()], -1)


def unequal_cosines(_: Any, x: Tensor) -> Tensor:
    freqs, (one, two) = angles(x.shape[-2]), x.chunk(2, -1)
    return torch.cat([one * freqs.cos() - two * freqs.sin(), one * freqs.sin() + two * freqs.sin()], -1)


def truncated(_: Any, x: Tensor) -> Tensor:
    """One half by whole numbers of the cosines: another function of the same entries."""
    freqs, (one, two) = 3 * angles(x.shape[-2]), x.chunk(2, -1)
    whole = (2 * freqs.cos()).to(torch.int64)
    return torch.cat([one * (2 * freqs.cos()) - two * freqs.sin(), one * freqs.sin() + two * whole], -1)


def interleaved_with_halves(_: Any, x: Tensor) -> Tensor:
    emb = doubled(x.shape[-2])
    return x * emb.cos() + torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2) * emb.sin()


def shifted(m: Any, x: Tensor) -> Tensor:
    return by_halves(m, x) + doubled(x.shape[-2])


def bent(m: Any, x: Tensor) -> Tensor:
    return by_halves(m, x).tanh()


def gated_by_itself(m: Any, x: Tensor) -> Tensor:
    return by_halves(m, x) * x.sigmoid().mean(-1, keepdim=True)


def gained(m: Any, x: Tensor) -> Tensor:
    return by_halves(m, x * m.gains)


def normed(m: Any, x: Tensor) -> Tensor:
    return by_halves(m, F.rms_norm(x, (SIZE,), m.gains))


def clamped(m: Any, x: Tensor) -> Tensor:
    return by_halves(m, x.clamp(-0.5, 0.5))


def squared_length(m: Any, x: Tensor) -> Tensor:
    return by_halves(m, x) * x.square().sum(-1, keepdim=True)


BAD: tuple[Rotate, ...] = (
    wrong_sign,
    other_tables,
    own_tables,
    cos_for_one_half,
    unequal_cosines,
    truncated,
    interleaved_with_halves,
    shifted,
    bent,
    gated_by_itself,
    gained,
    normed,
    clamped,
    squared_length,
)


class Attention(nn.Module):
    """Attention whose queries and keys are turned, in any way.

    Args:
        query: what turns the queries.
        key: what turns the keys.
        kv_heads: heads of keys and values.
        bias: of queries and keys.
        use: how queries, keys and values are put together.
    """

    def __init__(
        self,
        query: Rotate = by_halves,
        key: Rotate | None = None,
        *,
        kv_heads: int = HEADS,
        bias: bool = True,
        use: Callable[..., Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.turn = query, key or query
        self.kv_heads, self.use = kv_heads, use
        self.q = nn.Linear(6, HEADS * SIZE, bias=bias)
        self.k = nn.Linear(6, kv_heads * SIZE, bias=bias)
        self.v, self.out = nn.Linear(6, kv_heads * SIZE), nn.Linear(HEADS * SIZE, 3)
        needed = {f.__name__ for f in self.turn}
        if "own_tables" in needed:
            self.table_cos, self.table_sin = (nn.Parameter(torch.randn(5, SIZE)) for _ in range(2))
        if needed & {"gained", "normed"}:
            self.gains = nn.Parameter(torch.rand(SIZE) + 0.5)
        if "learned" in needed:
            self.freqs = nn.Parameter(torch.rand(SIZE // 2))
        if "from_table" in needed:
            for name, f in (("cos", torch.cos), ("sin", torch.sin)):
                self.register_buffer(name, f(doubled(9)), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (
            layer(x).unflatten(-1, (-1, SIZE)).transpose(1, 2) for layer in (self.q, self.k, self.v)
        )
        if self.use is not None:
            return self.use(self, query, key, value)
        query, key = self.turn[0](self, query), self.turn[1](self, key)
        grouped = self.kv_heads != HEADS
        mixed = F.scaled_dot_product_attention(query, key, value, enable_gqa=grouped)
        return self.out(mixed.transpose(1, 2).flatten(2))


def network(*args: Any, **kwargs: Any) -> nn.Module:
    return build(lambda: Attention(*args, **kwargs))
