"""Random networks that can be traced: layers, views, segments, ties, norms, attention, look-ups, order, output trees.

A program is drawn from a seed alone. It keeps a stream of shape (batch, units), (batch, tokens, units) or (batch,
channels, side, side) and changes it step by step; a step is a function that has drawn its parts when it was made.
"""

from __future__ import annotations

import dataclasses
import random
from collections import OrderedDict, namedtuple
from collections.abc import Callable
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BATCH, FEATURES = 3, 4
Step = Callable[[Tensor], Tensor]
Pair = namedtuple("Pair", ["first", "second"])


@dataclasses.dataclass
class Record:
    """What a network may return instead of a tuple."""

    sample: Any
    rest: Any = None


class Part:
    """A part of whatever program runs: steps that kept the module itself would miss a copy of the program."""

    running: ClassVar[list[Program]] = []

    def __init__(self, place: int) -> None:
        self.place = place

    def __call__(self, *inputs: Tensor) -> Any:
        """Run it."""
        return Part.running[-1].parts[self.place](*inputs)

    @property
    def weight(self) -> Tensor:
        """The part's weight."""
        return Part.running[-1].parts[self.place].weight  # type: ignore[return-value]


class Single(nn.Module):
    """A parameter."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.zeros(shape))

    def forward(self) -> Tensor:
        """Return it."""
        return self.value


class Program(nn.Module):
    """A random network.

    Args:
        seed: decides everything: steps, shapes, parameters, output tree.
        steps: how many steps at least.
    """

    def __init__(self, seed: int, steps: int = 4) -> None:
        super().__init__()
        self.dice = random.Random(seed)
        self.generator = torch.Generator().manual_seed(seed)
        self.shape: tuple[int, ...] = (FEATURES,)
        self.parts = nn.ModuleList()
        self.listing: list[str] = []
        self.steps: list[Step] = []
        self._linear_step(self._size())
        for _ in range(steps):
            name = self.dice.choice(STEPS[len(self.shape)])
            self.steps.append(getattr(self, f"_{name}")())
            self.listing.append(f"{name} {self.shape}")
            if len(self.shape) < 3 and self.dice.random() < 0.5:
                self._linear_step(self._size())
        self.head = nn.Linear(self.shape[-1] if len(self.shape) < 3 else self.shape[0], 3)
        self.tree = self.dice.choice(sorted(TREES))
        self.listing.append(self.tree)
        for tensor in (*self.parameters(), *self.buffers()):
            if tensor.is_floating_point():
                tensor.data = torch.randn(tensor.shape, generator=self.generator) * 0.7
        for name, tensor in self.named_buffers():
            if name.endswith("running_var"):
                tensor.data = tensor.data.abs() + 0.5
        self.eval()

    def forward(self, x: Tensor) -> Any:
        """Run all steps and return the stream's head, and the stream itself, in a tree."""
        Part.running.append(self)
        try:
            for step in self.steps:
                x = step(x)
        finally:
            Part.running.pop()
        pooled = x.mean((-2, -1)) if x.ndim == 4 else x
        return TREES[self.tree](self.head(pooled), pooled.amax(-1))

    def inputs(self) -> Tensor:
        """Return random inputs of the network."""
        return torch.randn(BATCH, FEATURES, generator=self.generator)

    # --- parts ---------------------------------------------------------------------------------------------
    def _size(self) -> int:
        return self.dice.choice((4, 6, 8))

    def _made(self, module: nn.Module) -> Part:
        self.parts.append(module)
        return Part(len(self.parts) - 1)

    def _parameter(self, *shape: int) -> Part:
        """Return a part that returns a parameter."""
        return self._made(Single(shape))

    def _linear_step(self, size: int) -> None:
        self.steps.append(self._made(nn.Linear(self.shape[-1], size, bias=self.dice.random() < 0.7)))
        self.shape = (*self.shape[:-1], size)
        self.listing.append(f"linear {self.shape}")

    # --- any stream whose last axis is units ------------------------------------------------------------------
    def _linear(self) -> Step:
        n, m = self.shape[-1], self._size()
        self.shape = (*self.shape[:-1], m)
        return self._made(nn.Linear(n, m, bias=self.dice.random() < 0.7))

    def _pointwise(self) -> Step:
        return self.dice.choice(POINTWISE)

    def _residual(self) -> Step:
        n = self.shape[-1]
        one, two = self._made(nn.Linear(n, 6)), self._made(nn.Linear(6, n, bias=False))
        return lambda h: h + two(one(h).relu())

    def _tied(self) -> Step:
        layer = self._made(nn.Linear(self.shape[-1], 5, bias=False))
        return lambda h: F.linear(layer(h).relu(), layer.weight.t())

    def _shared(self) -> Step:
        n = self.shape[-1]
        layer = self._made(nn.Linear(n, n))
        return lambda h: layer(layer(h).relu())

    def _gated(self) -> Step:
        n, m = self.shape[-1], self._size()
        one, two = self._made(nn.Linear(n, m)), self._made(nn.Linear(n, m))
        self.shape = (*self.shape[:-1], m)
        return lambda h: one(h) * two(h).sigmoid()

    def _halves(self) -> Step:
        layer, way = self._made(nn.Linear(self.shape[-1], 8)), self.dice.choice(("chunk", "split", "glu"))
        self.shape = (*self.shape[:-1], 4)
        if way == "glu":
            return lambda h: F.glu(layer(h), -1)
        return lambda h: (lambda a, b: a * b)(
            *(layer(h).chunk(2, -1) if way == "chunk" else layer(h).split(4, -1))
        )

    def _joined(self) -> Step:
        layer = self._made(nn.Linear(self.shape[-1], 4))
        self.shape = (*self.shape[:-1], self.shape[-1] + 4)
        return lambda h: torch.cat([h, layer(h).relu()], -1)

    def _cut(self) -> Step:
        start = self.dice.randrange(0, 3)
        stop = self.shape[-1] - self.dice.randrange(0, 2)
        if stop - start < 2:
            return lambda h: h
        self.shape = (*self.shape[:-1], stop - start)
        return lambda h: h[..., start:stop]

    def _norm(self) -> Step:
        n, kind = self.shape[-1], self.dice.choice(("layer", "plain", "root", "length"))
        if kind == "layer":
            return self._made(nn.LayerNorm(n))
        gain = self._parameter(n)
        if kind == "plain":
            return lambda h: F.layer_norm(h, (n,)) * gain()
        if kind == "root":
            return lambda h: h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-5) * gain()
        return lambda h: F.normalize(h, dim=-1)

    def _vector(self) -> Step:
        v, way = self._parameter(self.shape[-1]), self.dice.choice(("add", "mul", "max", "where", "fill"))
        return {
            "add": lambda h: h + v(),
            "mul": lambda h: h * v(),
            "max": lambda h: torch.maximum(h, v()),
            "where": lambda h: torch.where(h > v(), h, v()),
            "fill": lambda h: h.masked_fill(h < v(), -1.0),
        }[way]

    def _constant(self) -> Step:
        n, name = self.shape[-1], f"constant{len(self.listing)}"
        self.register_buffer(name, torch.zeros(n), persistent=self.dice.random() < 0.5)
        return lambda h: h + getattr(Part.running[-1], name)

    def _heads(self) -> Step:
        n = self.shape[-1]
        heads = 2 if n % 2 == 0 else 1
        way = self.dice.choice(("softmax", "sum", "flip", "scale", "turn"))
        scale = self._parameter(heads, 1)

        def run(h: Tensor) -> Tensor:
            z = h.unflatten(-1, (heads, n // heads))
            if way == "softmax":
                z = z.softmax(-1)
            elif way == "sum":
                z = z + z.sum(-2, keepdim=True)
            elif way == "flip":
                z = z + z.flip(-2)
            elif way == "scale":
                z = z * scale()
            else:
                z = z.transpose(-1, -2)
            return z.flatten(-2)

        return run

    def _order(self) -> Step:
        """Rank the units: the greatest, masks by rank, sorted values, values found by somebody else's order."""
        n, way = self.shape[-1], self.dice.choice(ORDERS)
        table = self._parameter(n, n)
        other = self._made(nn.Linear(n, n, bias=self.dice.random() < 0.5))

        def run(h: Tensor) -> Tensor:
            if way == "greatest":
                return h * (h == h.amax(-1, keepdim=True))
            if way == "looked up":
                return h + table()[h.argmax(-1)]
            if way == "least of others":
                return h + table()[other(h).argmin(-1)]
            if way == "soft choice":
                return h + table()[other(h).softmax(-1).max(-1).indices]
            if way == "one-hot":
                return h * F.one_hot(h.argmax(-1), n)
            if way == "sorted":
                return h + h.sort(-1).values[..., :1]
            if way == "permuted":
                return torch.gather(other(h), -1, h.argsort(-1))
            if way == "top":
                top = other(h).topk(2, -1)
                return torch.zeros_like(h).scatter(-1, top.indices, top.values)
            if way == "experts":
                gates = other(h).softmax(-1).topk(2, -1)
                return h + (table()[gates.indices] * gates.values[..., None]).sum(-2)
            return h - h.median(-1, keepdim=True).values

        return run

    def _positions(self) -> Step:
        way = self.dice.choice(("roll", "cumsum", "flip", "pick", "every other", "reversed index"))
        pick = torch.tensor([self.shape[-1] - 1, 0])
        if way == "every other" and self.shape[-1] % 2 == 0:
            self.shape = (*self.shape[:-1], self.shape[-1] // 2)
            return lambda h: h[..., ::2]
        if way == "pick":
            self.shape = (*self.shape[:-1], 2)
            return lambda h: h[..., pick]
        return {
            "roll": lambda h: h.roll(1, -1),
            "cumsum": lambda h: h.cumsum(-1),
            "flip": lambda h: h + h.flip(-1),
        }.get(way, lambda h: h + h.index_select(-1, torch.arange(h.shape[-1]).flip(0)))

    def _weights(self) -> Step:
        """A layer whose weight is computed: normalised rows, squared, a product, an outer product."""
        n, m, way = self.shape[-1], self._size(), self.dice.choice(("rows", "square", "product", "einsum"))
        w, low, g = self._parameter(m, n), self._parameter(m, 2), self._parameter(2, n)
        self.shape = (*self.shape[:-1], m)
        return {
            "rows": lambda h: F.linear(h, w() / w().norm(dim=1, keepdim=True)),
            "square": lambda h: F.linear(h, w().pow(2).softmax(0)),
            "product": lambda h: F.linear(h, low() @ g()),
            "einsum": lambda h: torch.einsum("...n,mn->...m", h, w()),
        }[way]

    def _examples(self) -> Step:
        return self.dice.choice(
            (lambda h: h - h.mean(0, keepdim=True), lambda h: h + h.amax(0), lambda h: h / 2)
        )

    # --- between streams --------------------------------------------------------------------------------------
    def _tokens(self) -> Step:
        """Vectors become two tokens."""
        layer, n = self._made(nn.Linear(self.shape[-1], 12)), 6
        self.shape = (2, n)
        return lambda h: layer(h).view(-1, 2, n)

    def _pooled(self) -> Step:
        self.shape = self.shape[1:]
        return self.dice.choice(
            (lambda h: h.mean(1), lambda h: h.amax(1), lambda h: h[:, 0], lambda h: h[:, -1])
        )

    def _flat(self) -> Step:
        self.shape = (self.shape[0] * self.shape[1],)
        return lambda h: h.flatten(1)

    def _attention(self) -> Step:
        n = self.shape[-1]
        qkv, out, heads = (
            self._made(nn.Linear(n, 3 * 8)),
            self._made(nn.Linear(8, n)),
            self.dice.choice((1, 2, 4)),
        )
        causal = self.dice.random() < 0.3

        def run(h: Tensor) -> Tensor:
            q, k, v = (z.unflatten(-1, (heads, 8 // heads)).transpose(1, 2) for z in qkv(h).chunk(3, -1))
            z = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
            return h + out(z.transpose(1, 2).flatten(2))

        return run

    def _written_attention(self) -> Step:
        n = self.shape[-1]
        q, k, v = (self._made(nn.Linear(n, 6, bias=b)) for b in (True, False, True))
        self.shape = (*self.shape[:-1], 6)
        return lambda h: (q(h) @ k(h).transpose(-1, -2) / 2).softmax(-1) @ v(h)

    def _mixed(self) -> Step:
        t = self.shape[0]
        layer = self._made(nn.Linear(t, t))
        return lambda h: h + layer(h.transpose(1, 2)).transpose(1, 2)

    def _recurrent(self) -> Step:
        kind = self.dice.choice((nn.LSTM, nn.GRU, nn.RNN))
        both = self.dice.random() < 0.3
        layer = self._made(kind(self.shape[-1], 5, batch_first=True, bidirectional=both))
        self.shape = (self.shape[0], 10 if both else 5)
        return lambda h: layer(h)[0]

    def _image(self) -> Step:
        layer = self._made(nn.Linear(self.shape[-1], 4 * 16))
        self.shape = (4, 4, 4)
        return lambda h: layer(h).view(-1, 4, 4, 4)

    # --- images ------------------------------------------------------------------------------------------------
    def _convolution(self) -> Step:
        c = self.shape[0]
        groups = self.dice.choice([g for g in (1, 2, c) if c % g == 0])
        out = c * self.dice.choice((1, 2)) if groups > 1 else self._size()
        self.shape = (out, *self.shape[1:])
        return self._made(nn.Conv2d(c, out, 3, padding=1, groups=groups, bias=self.dice.random() < 0.5))

    def _channel_norm(self) -> Step:
        c = self.shape[0]
        return self._made(self.dice.choice((nn.BatchNorm2d(c), nn.GroupNorm(2 if c % 2 == 0 else 1, c))))

    def _pool(self) -> Step:
        if self.shape[1] < 4:
            return torch.relu
        self.shape = (self.shape[0], self.shape[1] // 2, self.shape[2] // 2)
        return self.dice.choice((lambda h: F.max_pool2d(h, 2), lambda h: F.avg_pool2d(h, 2)))

    def _squeeze(self) -> Step:
        c = self.shape[0]
        one, two = self._made(nn.Linear(c, 4)), self._made(nn.Linear(4, c))
        return lambda h: h * two(one(h.mean((2, 3))).relu()).sigmoid()[:, :, None, None]

    def _channels(self) -> Step:
        way = self.dice.choice(("stack", "cat", "relu", "greatest"))
        if way == "cat":
            self.shape = (2 * self.shape[0], *self.shape[1:])
            return lambda h: torch.cat([h, -h.relu()], 1)
        if way == "greatest":
            return lambda h: h * F.one_hot(h.argmax(1), h.shape[1]).movedim(-1, 1)
        return torch.relu if way == "relu" else lambda h: torch.stack([h, -h], 2).sum(2) + h

    def _unrolled(self) -> Step:
        c, s, t = self.shape
        self.shape = (c * s * t,)
        return lambda h: h.flatten(1)

    def _averaged(self) -> Step:
        self.shape = self.shape[:1]
        return lambda h: h.mean((2, 3))


ORDERS = (
    "greatest", "looked up", "least of others", "soft choice", "one-hot", "sorted", "permuted", "top", "experts",
    "median",
)  # fmt: skip
POINTWISE: tuple[Step, ...] = (
    torch.relu, torch.tanh, F.gelu, F.leaky_relu, torch.sigmoid, torch.abs, F.hardtanh, F.hardshrink,
    lambda h: h.clamp(min=-0.5), lambda h: h * h, lambda h: -h, lambda h: h / 3 + 1, lambda h: h.softmax(-1),
    lambda h: (h > 0).to(h.dtype) * h, lambda h: F.softplus(h), lambda h: F.elu(h),
)  # fmt: skip
_UNITS = (
    "linear", "linear", "pointwise", "pointwise", "pointwise", "residual", "tied", "shared", "gated", "halves",
    "joined", "cut", "norm", "vector", "constant", "heads", "order", "order", "order", "positions", "weights",
    "examples",
)  # fmt: skip
STEPS: dict[int, tuple[str, ...]] = {
    1: (*_UNITS, "tokens", "tokens", "image"),
    2: (*_UNITS, "pooled", "flat", "attention", "attention", "written_attention", "mixed", "recurrent"),
    3: (
        "convolution",
        "convolution",
        "channel_norm",
        "pool",
        "squeeze",
        "channels",
        "channels",
        "unrolled",
        "averaged",
    ),
}
TREES: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "tensor": lambda a, b: a,
    "tuple": lambda a, b: (a, b),
    "list in dictionary": lambda a, b: {"a": [None, a], "b": {"c": b}},
    "dotted": lambda a, b: {"a": {"b": a}, "a.b": b},
    "number": lambda a, b: {1: a, "1": b},
    "named": lambda a, b: Pair(a, (b,)),
    "record": lambda a, b: Record(a, [b]),
    "ordered": lambda a, b: OrderedDict([("", a), ("output", b)]),
    "twice": lambda a, b: (a, {"again": a}),
}
