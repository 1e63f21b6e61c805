"""Plain modules of many kinds, each small, each with what makes its symmetry special."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Built = tuple[nn.Module, tuple[Any, ...]]


class Apply(nn.Module):
    """Submodules and parameters by name, and a function of them and of the inputs."""

    def __init__(self, function: Callable[..., Any], **parts: Any) -> None:
        super().__init__()
        self.function = function
        for name, part in parts.items():
            if isinstance(part, nn.Module):
                self.add_module(name, part)
            else:
                self.register_parameter(name, nn.Parameter(torch.randn(part) / 2))

    def forward(self, *inputs: Tensor) -> Any:
        return self.function(self, *inputs)


def _normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


SEQUENCE = (2, 5, 6)
IMAGE = (2, 3, 8, 8)


class Residual(nn.Module):
    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.body = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


class Transpose(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.transpose(1, 2)


class Mean(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean(1)


def _recurrent(kind: str, **settings: Any) -> Built:
    layer = getattr(nn, kind)(6, 5, num_layers=2, batch_first=True, **settings)
    width = settings.get("proj_size", 5) * (2 if settings.get("bidirectional") else 1)
    return Apply(lambda m, x: m.head(m.layer(x)[0]), layer=layer, head=nn.Linear(width, 2)), (
        _normal(*SEQUENCE),
    )


def recurrent_final_state() -> Built:
    def forward(m: Any, x: Tensor) -> Tensor:
        _, (hidden, cell) = m.layer(x)
        return m.head(torch.cat([hidden[-1], cell[0]], -1))

    return Apply(forward, layer=nn.LSTM(6, 5, 2), head=nn.Linear(10, 2)), (_normal(*SEQUENCE),)


def multihead_attention() -> Built:
    def forward(m: Any, x: Tensor, y: Tensor) -> Tensor:
        return m.head(m.cross(m.own(m.embed(x), m.embed(x), m.embed(x))[0], y, y, need_weights=False)[0])

    parts = {"embed": nn.Linear(6, 12), "own": nn.MultiheadAttention(12, 3, batch_first=True)}
    cross = nn.MultiheadAttention(12, 3, kdim=6, vdim=6, batch_first=True)
    return Apply(forward, **parts, cross=cross, head=nn.Linear(12, 2)), (_normal(*SEQUENCE), _normal(2, 4, 6))


def transformer_encoder() -> Built:
    layer = nn.TransformerEncoderLayer(12, 3, 16, batch_first=True, norm_first=True)
    body = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    return nn.Sequential(nn.Linear(6, 12), body, nn.LayerNorm(12), nn.Linear(12, 2)), (_normal(*SEQUENCE),)


def transformer() -> Built:
    def forward(m: Any, x: Tensor, y: Tensor) -> Tensor:
        return m.head(m.body(m.source(x), m.target(y)))

    body = nn.Transformer(12, 3, 1, 2, 16, batch_first=True)
    parts = {"source": nn.Linear(6, 12), "target": nn.Linear(6, 12), "head": nn.Linear(12, 2)}
    return Apply(forward, body=body, **parts), (_normal(*SEQUENCE), _normal(2, 4, 6))


def fused_attention_block() -> Built:
    """Vision transformers as ``timm`` writes them: one projection for queries, keys and values, then unbind."""

    def forward(m: Any, x: Tensor) -> Tensor:
        h = m.embed(x)
        b, t, c = h.shape
        q, k, v = m.qkv(m.norm(h)).reshape(b, t, 3, 3, 4).permute(2, 0, 3, 1, 4).unbind(0)
        mixed = ((q * 0.5) @ k.transpose(-2, -1)).softmax(-1) @ v
        h = h + m.gamma * m.proj(mixed.transpose(1, 2).reshape(b, t, c))
        return m.head(h + m.up2(F.gelu(m.up1(m.norm2(h)))))

    return Apply(
        forward, embed=nn.Linear(6, 12), norm=nn.LayerNorm(12), qkv=nn.Linear(12, 36), proj=nn.Linear(12, 12),
        gamma=(12,), norm2=nn.LayerNorm(12), up1=nn.Linear(12, 16), up2=nn.Linear(16, 12), head=nn.Linear(12, 2),
    ), (_normal(*SEQUENCE),)  # fmt: skip


def linear_attention() -> Built:
    def forward(m: Any, x: Tensor) -> Tensor:
        q, k, v = (p.view(2, 5, 3, 4) for p in (F.elu(m.q(x)) + 1, F.elu(m.k(x)) + 1, m.v(x)))
        state = torch.einsum("bthd,bthe->bhde", k, v)
        scale = 1 / torch.einsum("bthd,bhd->bth", q, k.sum(1))
        return m.out(torch.einsum("bthd,bhde,bth->bthe", q, state, scale).flatten(2))

    parts = {n: nn.Linear(6, 12) for n in "qkv"}
    return Apply(forward, **parts, out=nn.Linear(12, 2)), (_normal(*SEQUENCE),)


def set_transformer() -> Built:
    def forward(m: Any, x: Tensor) -> Tensor:
        h = m.embed(x)
        seeds = m.seeds.expand(len(x), -1, -1)
        pooled = m.pool(seeds, h, h, need_weights=False)[0]
        return m.head(pooled.mean(1))

    return Apply(
        forward, embed=nn.Linear(6, 8), seeds=(1, 4, 8), pool=nn.MultiheadAttention(8, 2, batch_first=True),
        head=nn.Linear(8, 2),
    ), (_normal(*SEQUENCE),)  # fmt: skip


def mlp_mixer() -> Built:
    def block() -> nn.Module:
        tokens = Residual(
            nn.LayerNorm(8), Transpose(), nn.Linear(5, 7), nn.GELU(), nn.Linear(7, 5), Transpose()
        )
        channels = Residual(nn.LayerNorm(8), nn.Linear(8, 10), nn.GELU(), nn.Linear(10, 8))
        return nn.Sequential(tokens, channels)

    return nn.Sequential(nn.Linear(6, 8), block(), block(), Mean(), nn.Linear(8, 2)), (_normal(*SEQUENCE),)


def gated_mlp() -> Built:
    """gMLP: a spatial gate on one half of the channels."""

    def forward(m: Any, x: Tensor) -> Tensor:
        h = m.embed(x)
        u, v = F.gelu(m.up(m.norm(h))).chunk(2, -1)
        v = m.spatial(m.gate_norm(v).transpose(1, 2)).transpose(1, 2)
        return m.head(h + m.down(u * v))

    return Apply(
        forward, embed=nn.Linear(6, 8), norm=nn.LayerNorm(8), up=nn.Linear(8, 12), gate_norm=nn.LayerNorm(6),
        spatial=nn.Linear(5, 5), down=nn.Linear(6, 8), head=nn.Linear(8, 2),
    ), (_normal(*SEQUENCE),)  # fmt: skip


def swiglu(fused: bool) -> Built:
    def forward(m: Any, x: Tensor) -> Tensor:
        gate, up = m.both(x).chunk(2, -1) if fused else (m.gate(x), m.up(x))
        return m.down(F.silu(gate) * up)

    parts: dict[str, Any] = (
        {"both": nn.Linear(6, 14)} if fused else {"gate": nn.Linear(6, 7), "up": nn.Linear(6, 7)}
    )
    return Apply(forward, **parts, down=nn.Linear(7, 2)), (_normal(4, 6),)


def deep_sets() -> Built:
    phi = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 7))
    return nn.Sequential(phi, Mean(), nn.Linear(7, 5), nn.ReLU(), nn.Linear(5, 2)), (_normal(*SEQUENCE),)


def graph_convolution() -> Built:
    def forward(m: Any, x: Tensor, adjacency: Tensor) -> Tensor:
        degree = adjacency.sum(-1, keepdim=True).rsqrt()
        smooth = degree * adjacency * degree.transpose(-1, -2)
        return m.c(smooth @ F.relu(m.b(smooth @ F.relu(m.a(smooth @ x)))))

    parts = {"a": nn.Linear(6, 8), "b": nn.Linear(8, 7), "c": nn.Linear(7, 2)}
    return Apply(forward, **parts), (_normal(*SEQUENCE), _normal(2, 5, 5).abs() + 1)


def graph_attention() -> Built:
    def forward(m: Any, x: Tensor, adjacency: Tensor) -> Tensor:
        h = m.project(x).view(2, 5, 3, 4)
        scores = (h * m.left).sum(-1)[:, :, None] + (h * m.right).sum(-1)[:, None]
        weights = F.leaky_relu(scores).masked_fill((adjacency < 0)[..., None], -1e9).softmax(2)
        return m.head(torch.einsum("bijh,bjhd->bihd", weights, h).flatten(2))

    parts = {"project": nn.Linear(6, 12), "left": (3, 4), "right": (3, 4), "head": nn.Linear(12, 2)}
    return Apply(forward, **parts), (_normal(*SEQUENCE), _normal(2, 5, 5))


def squeeze_excite_resnet() -> Built:
    def block(m: Any, x: Tensor) -> Tensor:
        h = m.norm(m.conv(x)).relu()
        gate = m.up(m.down(F.adaptive_avg_pool2d(h, 1)).relu()).sigmoid()
        return (x + h * gate).relu()

    blocks = [
        Apply(block, conv=nn.Conv2d(8, 8, 3, padding=1), norm=nn.BatchNorm2d(8), down=nn.Conv2d(8, 4, 1),
              up=nn.Conv2d(4, 8, 1))
        for _ in range(2)
    ]  # fmt: skip
    tail = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2)]
    return nn.Sequential(nn.Conv2d(3, 8, 3), *blocks, *tail), (_normal(*IMAGE),)


class Shuffle(nn.Module):
    def __init__(self, groups: int) -> None:
        super().__init__()
        self.groups = groups

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        return x.view(b, self.groups, c // self.groups, h, w).transpose(1, 2).reshape(b, c, h, w)


def shufflenet() -> Built:
    return nn.Sequential(
        nn.Conv2d(3, 12, 1), nn.Conv2d(12, 12, 1, groups=3), nn.BatchNorm2d(12), nn.ReLU(), Shuffle(3),
        nn.Conv2d(12, 12, 3, groups=12), nn.BatchNorm2d(12), nn.Conv2d(12, 12, 1, groups=3), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 2),
    ), (_normal(*IMAGE),)  # fmt: skip


def shufflenet_v2() -> Built:
    """Each unit works on half of the channels, and a shuffle of both halves follows."""

    def apart(m: Any, x: Tensor) -> Tensor:
        return torch.cat([m.short(x), m.long(x)], 1)

    def half(m: Any, x: Tensor) -> Tensor:
        kept, worked = x.chunk(2, 1)
        return torch.cat([kept, m.long(worked)], 1)

    def long(inner: int) -> nn.Module:
        layers = [
            nn.Conv2d(inner, 6, 1),
            nn.BatchNorm2d(6),
            nn.ReLU(),
            nn.Conv2d(6, 6, 3, padding=1, groups=6),
        ]
        return nn.Sequential(*layers, nn.BatchNorm2d(6), nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6), nn.ReLU())

    short = nn.Sequential(
        nn.Conv2d(8, 8, 3, padding=1, groups=8),
        nn.BatchNorm2d(8),
        nn.Conv2d(8, 6, 1),
        nn.BatchNorm2d(6),
        nn.ReLU(),
    )
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), Apply(apart, short=short, long=long(8)), Shuffle(2),
        Apply(half, long=long(6)), Shuffle(2), Apply(half, long=long(6)), Shuffle(2), nn.Conv2d(12, 10, 1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(10, 2),
    ), (_normal(*IMAGE),)  # fmt: skip


def resnext() -> Built:
    body = Residual(
        nn.Conv2d(8, 12, 1), nn.BatchNorm2d(12), nn.ReLU(), nn.Conv2d(12, 12, 3, padding=1, groups=4),
        nn.BatchNorm2d(12), nn.ReLU(), nn.Conv2d(12, 8, 1), nn.BatchNorm2d(8),
    )  # fmt: skip
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2)]
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), body, nn.ReLU(), *head), (_normal(*IMAGE),)


def super_resolution() -> Built:
    """Sub-pixel convolution: the last convolution writes the pixels of a larger image."""
    layers = [nn.Conv2d(3, 8, 5, padding=2), nn.Tanh(), nn.Conv2d(8, 12, 3, padding=1), nn.PixelShuffle(2)]
    return nn.Sequential(*layers, nn.Conv2d(3, 3, 1)), (_normal(*IMAGE),)


def pixel_unshuffle() -> Built:
    layers = [nn.Conv2d(3, 4, 3, padding=1), nn.PixelUnshuffle(2), nn.ReLU(), nn.Conv2d(16, 2, 1)]
    return nn.Sequential(*layers), (_normal(*IMAGE),)


def inception() -> Built:
    def forward(m: Any, x: Tensor) -> Tensor:
        h = m.stem(x).relu()
        branches = [m.one(h), m.three(m.reduce(h).relu()), m.pooled(F.max_pool2d(h, 3, 1, 1))]
        return m.head(torch.cat(branches, 1).relu().mean((2, 3)))

    return Apply(
        forward, stem=nn.Conv2d(3, 6, 3), one=nn.Conv2d(6, 4, 1), reduce=nn.Conv2d(6, 3, 1),
        three=nn.Conv2d(3, 5, 3, padding=1), pooled=nn.Conv2d(6, 2, 1), head=nn.Linear(11, 2),
    ), (_normal(*IMAGE),)  # fmt: skip


def conv_mixer() -> Built:
    def layer() -> nn.Module:
        depth = Residual(nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.GELU(), nn.BatchNorm2d(8))
        return nn.Sequential(depth, nn.Conv2d(8, 8, 1), nn.GELU(), nn.BatchNorm2d(8))

    stem = nn.Sequential(nn.Conv2d(3, 8, 2, 2), nn.GELU(), nn.BatchNorm2d(8))
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2)]
    return nn.Sequential(stem, layer(), layer(), *head), (_normal(*IMAGE),)


def wavenet() -> Built:
    """Dilated causal convolutions with gates, residual and skip connections."""

    def forward(m: Any, x: Tensor) -> Tensor:
        h, total = m.inputs(x), torch.zeros(())
        for k in range(2):
            padded = F.pad(h, (2**k, 0))
            gated = torch.tanh(getattr(m, f"filter{k}")(padded)) * torch.sigmoid(
                getattr(m, f"gate{k}")(padded)
            )
            total = total + getattr(m, f"skip{k}")(gated)
            h = h + getattr(m, f"residual{k}")(gated)
        return m.outputs(total.relu())

    parts: dict[str, nn.Module] = {"inputs": nn.Conv1d(6, 7, 1), "outputs": nn.Conv1d(9, 2, 1)}
    for k in range(2):
        parts |= {f"{n}{k}": nn.Conv1d(7, 8, 2, dilation=2**k) for n in ("filter", "gate")}
        parts |= {f"skip{k}": nn.Conv1d(8, 9, 1), f"residual{k}": nn.Conv1d(8, 7, 1)}
    return Apply(forward, **parts), (_normal(2, 6, 10),)


def wavenet_one_layer(normalised: bool) -> Built:
    """Filters and gates come from one convolution, residuals and skips from another one."""

    def layer(*settings: int, **more: int) -> nn.Module:
        made = nn.Conv1d(*settings, **more)
        return nn.utils.parametrizations.weight_norm(made) if normalised else made

    def forward(m: Any, x: Tensor) -> Tensor:
        h, total = m.inputs(x), torch.zeros(())
        for k in range(2):
            filtered, gate = m.get_submodule(f"both{k}")(F.pad(h, (2**k, 0))).chunk(2, 1)
            z = m.get_submodule(f"mixed{k}")(filtered.tanh() * gate.sigmoid())
            h, total = h + z[:, :7], total + z[:, 7:]
        return m.outputs(torch.cat([total.relu(), h], 1))

    parts: dict[str, nn.Module] = {"inputs": layer(6, 7, 1), "outputs": layer(16, 2, 1)}
    for k in range(2):
        parts |= {f"both{k}": layer(7, 16, 2, dilation=2**k), f"mixed{k}": layer(8, 16, 1)}
    return Apply(forward, **parts), (_normal(2, 6, 10),)


def einsum_attention(layout: str) -> Built:
    """Heads behind or before the tokens, in letters."""
    inner = {"bnhd": ("bihd,bjhd->bhij", "bhij,bjhd->bihd"), "bhnd": ("bhid,bhjd->bhij", "bhij,bhjd->bhid")}[
        layout
    ]

    def forward(m: Any, x: Tensor) -> Tensor:
        q, k, v = (p(x).view(2, 5, 3, 4) for p in (m.q, m.k, m.v))
        if layout == "bhnd":
            q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        mixed = torch.einsum(inner[1], torch.einsum(inner[0], q, k).softmax(-1), v)
        return torch.einsum(f"{layout},hde->bne", mixed, m.o)

    return Apply(forward, **{n: nn.Linear(6, 12) for n in "qkv"}, o=(3, 4, 2)), (_normal(*SEQUENCE),)


def einsum_attention_fused() -> Built:
    """One tensor for queries, keys and values."""

    def forward(m: Any, x: Tensor) -> Tensor:
        q, k, v = torch.einsum("bnc,thcd->tbhnd", x, m.w).unbind(0)
        mixed = torch.einsum("bhij,bhjd->bhid", torch.einsum("bhid,bhjd->bhij", q, k).softmax(-1), v)
        return torch.einsum("bhnd,hde->bne", mixed, m.o)

    return Apply(forward, w=(3, 3, 6, 4), o=(3, 4, 2)), (_normal(*SEQUENCE),)


def layers_in_one_tensor() -> Built:
    def forward(m: Any, x: Tensor) -> Tensor:
        h = m.inputs(x)
        for k in range(2):
            h = h + torch.tanh(h @ m.up[k] + m.bias[k]) @ m.down[k]
        return m.head(h)

    parts = {"up": (2, 7, 4), "bias": (2, 4), "down": (2, 4, 7)}
    return Apply(forward, inputs=nn.Linear(6, 7), **parts, head=nn.Linear(7, 2)), (_normal(*SEQUENCE),)


def highway() -> Built:
    def forward(m: Any, x: Tensor) -> Tensor:
        h = m.embed(x)
        gate = torch.sigmoid(m.gate(h))
        return m.head(gate * m.body(h).relu() + (1 - gate) * h)

    parts = {
        "embed": nn.Linear(6, 8),
        "gate": nn.Linear(8, 8),
        "body": nn.Linear(8, 8),
        "head": nn.Linear(8, 2),
    }
    return Apply(forward, **parts), (_normal(4, 6),)


def film() -> Built:
    """Channels scaled and shifted by a conditioning network."""

    def forward(m: Any, x: Tensor, c: Tensor) -> Tensor:
        scale, shift = m.condition(c).chunk(2, -1)
        h = m.conv(x) * (1 + scale[..., None, None]) + shift[..., None, None]
        return m.head(h.relu().mean((2, 3)))

    parts = {"conv": nn.Conv2d(3, 7, 3), "condition": nn.Linear(6, 14), "head": nn.Linear(7, 2)}
    return Apply(forward, **parts), (_normal(*IMAGE), _normal(2, 6))


def autoencoder() -> Built:
    encoder = [nn.Conv2d(3, 6, 4, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(96, 5)]
    decoder = [nn.Linear(5, 96), nn.ReLU(), nn.Unflatten(1, (6, 4, 4)), nn.ConvTranspose2d(6, 3, 4, 2, 1)]
    return nn.Sequential(*encoder, *decoder), (_normal(*IMAGE),)


def radiance_field() -> Built:
    """Positions are concatenated again in the middle."""

    def forward(m: Any, x: Tensor) -> Tensor:
        frequencies = torch.tensor([1.0, 2.0, 4.0])
        code = torch.cat([f(x[..., None] * frequencies).flatten(-2) for f in (torch.sin, torch.cos)], -1)
        h = m.b(m.a(code).relu()).relu()
        return m.out(m.c(torch.cat([h, code], -1)).relu())

    parts = {"a": nn.Linear(18, 8), "b": nn.Linear(8, 7), "c": nn.Linear(25, 9), "out": nn.Linear(9, 4)}
    return Apply(forward, **parts), (_normal(5, 3),)


def dense_experts() -> Built:
    def forward(m: Any, x: Tensor) -> Tensor:
        gates = m.router(x).softmax(-1)
        return torch.einsum("bth,the,bt->be", torch.einsum("bm,tmh->bth", x, m.up).relu(), m.down, gates)

    return Apply(forward, router=nn.Linear(6, 3), up=(3, 6, 4), down=(3, 4, 2)), (_normal(5, 6),)


def chosen_experts() -> Built:
    """Each example goes to the two experts its router likes best."""

    def forward(m: Any, x: Tensor) -> Tensor:
        weights, chosen = m.router(x).softmax(-1).topk(2)
        hidden = torch.einsum("bm,bkmh->bkh", x, m.up[chosen]) + m.bias[chosen]
        return torch.einsum("bkh,bkhe,bk->be", hidden.relu(), m.down[chosen], weights)

    parts = {"router": nn.Linear(6, 3), "up": (3, 6, 4), "bias": (3, 4), "down": (3, 4, 2)}
    return Apply(forward, **parts), (_normal(5, 6),)


def masked_experts() -> Built:
    """Gates of experts that were not chosen are set to zero."""

    def forward(m: Any, x: Tensor) -> Tensor:
        gates = m.router(x).softmax(-1)
        best = gates.topk(2)
        sparse = torch.zeros_like(gates).scatter(-1, best.indices, best.values)
        hidden = torch.einsum("bm,tmh->bth", x, m.up).relu()
        return torch.einsum("bth,the,bt->be", hidden, m.down, sparse)

    return Apply(forward, router=nn.Linear(6, 3), up=(3, 6, 4), down=(3, 4, 2)), (_normal(5, 6),)


def state_space() -> Built:
    """A diagonal state-space layer: every channel has states of its own."""

    def forward(m: Any, x: Tensor) -> Tensor:
        h = m.inputs(x)
        decay = torch.exp(-F.softplus(m.log_decay))
        state = torch.zeros(len(x), 7, 3)
        out = []
        for t in range(h.shape[1]):
            state = decay * state + m.b * h[:, t, :, None]
            out.append((state * m.c).sum(-1))
        return m.head(F.gelu(torch.stack(out, 1)) * h)

    parts = {
        "inputs": nn.Linear(6, 7),
        "log_decay": (7, 3),
        "b": (7, 3),
        "c": (7, 3),
        "head": nn.Linear(7, 2),
    }
    return Apply(forward, **parts), (_normal(*SEQUENCE),)


def windowed_attention() -> Built:
    """Attention inside shifted windows of a line of tokens."""

    def forward(m: Any, x: Tensor) -> Tensor:
        h = torch.roll(m.embed(x), 1, 1)
        windows = h.view(2, 3, 2, 12).reshape(6, 2, 12)
        mixed = m.attend(windows, windows, windows, need_weights=False)[0]
        return m.head(torch.roll(mixed.view(2, 3, 2, 12).reshape(2, 6, 12), -1, 1))

    attend = nn.MultiheadAttention(12, 3, batch_first=True)
    return Apply(forward, embed=nn.Linear(6, 12), attend=attend, head=nn.Linear(12, 2)), (_normal(2, 6, 6),)


def siamese() -> Built:
    body = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 5))
    return Apply(lambda m, x, y: F.cosine_similarity(m.body(x), m.body(y)), body=body), (
        _normal(4, 6),
        _normal(6, 4).T + 0.5,
    )


def matrix_factorisation() -> Built:
    def forward(m: Any, users: Tensor, items: Tensor) -> Tensor:
        return (m.users(users) * m.items(items)).sum(-1) + m.bias[items]

    parts = {"users": nn.Embedding(9, 5), "items": nn.Embedding(8, 5), "bias": (8,)}
    return Apply(forward, **parts), (torch.tensor([1, 4, 8]), torch.tensor([0, 7, 2]))


def hypernetwork() -> Built:
    """A network that writes the weights of another one."""

    def forward(m: Any, x: Tensor, z: Tensor) -> Tensor:
        weights = m.write(m.encode(z).relu()).view(-1, 7, 6)
        return m.head(torch.einsum("bi,boi->bo", x, weights).relu())

    parts = {"encode": nn.Linear(3, 5), "write": nn.Linear(5, 42), "head": nn.Linear(7, 2)}
    return Apply(forward, **parts), (_normal(4, 6), _normal(4, 3))


def group_norm_network() -> Built:
    layers = [
        nn.Conv2d(3, 8, 3),
        nn.GroupNorm(4, 8),
        nn.SiLU(),
        nn.Conv2d(8, 6, 3),
        nn.GroupNorm(1, 6),
        nn.SiLU(),
    ]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 2)), (_normal(*IMAGE),)


def weight_normalised() -> Built:
    layers = [nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 7), nn.ReLU(), nn.Linear(7, 2)]
    wrapped = [nn.utils.parametrizations.weight_norm(m) if isinstance(m, nn.Linear) else m for m in layers]
    return nn.Sequential(*wrapped), (_normal(4, 6),)


def unrolled_solver() -> Built:
    """One layer applied several times."""

    def forward(m: Any, x: Tensor) -> Tensor:
        h = torch.zeros(len(x), 8)
        for _ in range(3):
            h = torch.tanh(m.inputs(x) + m.recurrent(h))
        return m.head(h)

    parts = {"inputs": nn.Linear(6, 8), "recurrent": nn.Linear(8, 8), "head": nn.Linear(8, 2)}
    return Apply(forward, **parts), (_normal(4, 6),)


PLAIN: dict[str, Callable[[], Built]] = {
    "lstm": lambda: _recurrent("LSTM"),
    "lstm_bidirectional": lambda: _recurrent("LSTM", bidirectional=True),
    "lstm_projected": lambda: _recurrent("LSTM", proj_size=4),
    "lstm_final_state": recurrent_final_state,
    "gru": lambda: _recurrent("GRU"),
    "rnn": lambda: _recurrent("RNN"),
    "swiglu": lambda: swiglu(False),
    "swiglu_fused": lambda: swiglu(True),
    "wavenet_one_layer": lambda: wavenet_one_layer(False),
    "wavenet_normalised": lambda: wavenet_one_layer(True),
    "einsum_attention": lambda: einsum_attention("bnhd"),
    "einsum_attention_heads_first": lambda: einsum_attention("bhnd"),
    **{
        f.__name__: f
        for f in (
            multihead_attention, transformer_encoder, transformer, fused_attention_block, linear_attention,
            set_transformer, mlp_mixer, gated_mlp, deep_sets, graph_convolution, graph_attention,
            squeeze_excite_resnet, shufflenet, shufflenet_v2, resnext, super_resolution, pixel_unshuffle, inception, conv_mixer,
            wavenet, highway, film, autoencoder, radiance_field, dense_experts, chosen_experts, masked_experts,
            state_space, windowed_attention, siamese, matrix_factorisation, hypernetwork, group_norm_network,
            weight_normalised, unrolled_solver, einsum_attention_fused, layers_in_one_tensor,
        )
    },
}  # fmt: skip
