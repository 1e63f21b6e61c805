"""Every family of operator rules on tiny modules: groups as a careful reader would name them, each slot needed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from symmetry_helpers import Expected, Net, build, check, group, normal
from torch import Tensor, nn


@dataclass(frozen=True)
class Case:
    name: str
    factory: Callable[[], nn.Module]
    inputs: tuple[Tensor, ...]
    expected: Expected
    unseen: frozenset[str] = frozenset()


CASES: list[Case] = []


def case(
    name: str, factory: Callable[[], nn.Module], *shape_or_inputs: Any, expect: Any, unseen: Any = ()
) -> None:
    inputs = tuple(normal(*s) if isinstance(s, tuple) else s for s in shape_or_inputs)
    CASES.append(Case(name, factory, inputs, set(expect), frozenset(unseen)))


def mlp(hidden: str = "a", out: str = "b", size: int = 4) -> tuple[int, frozenset[str]]:
    return group(size, f"{hidden}.weight[0]", f"{hidden}.bias[0]", f"{out}.weight[1]")


def two(function: Callable[..., Any], a: int = 4, b: int | None = None, out: int = 2, **parts: Any) -> Any:
    """Two linear layers, 3 → a and b → out, with ``function(m, m.a(x))`` between them."""

    def forward(m: Any, x: Tensor) -> Tensor:
        return m.b(function(m, m.a(x)))

    def build() -> Net:
        fresh = {name: drawn_anew(part) for name, part in parts.items()}
        return Net(forward, a=nn.Linear(3, a), b=nn.Linear(a if b is None else b, out), **fresh)

    return build


def drawn_anew(part: Any) -> Any:
    """Draw the values of a layer again: when this file is read, they depend on what was imported before."""
    for layer in part.modules() if isinstance(part, nn.Module) else ():
        if hasattr(layer, "reset_parameters"):
            layer.reset_parameters()
    return part


X = (2, 3)
IMAGE = (2, 3, 6, 6)

# --- Pointwise, normalisation, softmax ---------------------------------------------------------------------
POINTWISE: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu,
    "gelu": F.gelu,
    "silu": F.silu,
    "hardswish": F.hardswish,
    "softplus": F.softplus,
    "clamp": lambda h: h.clamp(-1, 1),
    "power": lambda h: h.abs() ** 1.5,
    "where": lambda h: torch.where(h > 0, h, 0.1 * h),
    "masked fill": lambda h: h.masked_fill(h > 1, 0.5),
    "softmax": lambda h: h.softmax(-1),
    "log softmax": lambda h: h.log_softmax(-1),
    "standardised": lambda h: (h - h.mean(-1, keepdim=True)) / (h.std(-1, keepdim=True) + 1),
    "normalised": lambda h: F.normalize(h, dim=-1),
    "centred by maximum": lambda h: h - h.amax(-1, keepdim=True),
    "layer norm without gain": lambda h: F.layer_norm(h, (4,)),
    "double and back": lambda h: h.double().to(h.dtype),
    "in place": lambda h: h.clone().mul_(2).add_(1),
    "dropout in evaluation": lambda h: F.dropout(h, 0.5, training=False),
    "residual": lambda h: h + h.tanh(),
    "contiguous": lambda h: h.t().contiguous().t(),
    "expand and sum": lambda h: h.unsqueeze(0).expand(5, -1, -1).sum(0),
    "lerp": lambda h: torch.lerp(h, h.tanh(), 0.3),
    "addcmul": lambda h: torch.addcmul(h, h, h, value=0.5),
    "stack and mean": lambda h: torch.stack([h, h.tanh()]).mean(0),
    "repeat and view": lambda h: h.repeat(1, 2).view(2, 2, 4).sum(1),
}
for name, function in POINTWISE.items():
    case(name, two(lambda m, h, f=function: f(h)), X, expect=[mlp()])

case(
    "two hidden layers and a gain",
    two(lambda m, h: m.c(h * m.gain).relu(), c=nn.Linear(4, 4), gain=(4,)),
    X,
    expect=[
        group(4, "a.weight[0]", "a.bias[0]", "gain[0]", "c.weight[1]"),
        group(4, "c.weight[0]", "c.bias[0]", "b.weight[1]"),
    ],
)
for norm in ("LayerNorm", "RMSNorm"):
    slots = ["n.weight[0]"] + (["n.bias[0]"] if norm == "LayerNorm" else [])
    case(
        norm,
        two(lambda m, h: m.n(h), n=getattr(nn, norm)(4)),
        X,
        expect=[group(4, "a.weight[0]", "a.bias[0]", *slots, "b.weight[1]")],
    )
case(
    "prelu",
    lambda: nn.Sequential(nn.Linear(3, 4), nn.PReLU(4), nn.Linear(4, 2)),
    X,
    expect=[group(4, "0.weight[0]", "0.bias[0]", "1.weight[0]", "2.weight[1]")],
)
case("prelu with one slope", two(lambda m, h: m.p(h), p=nn.PReLU()), X, expect=[mlp()])

# --- Gates, segments, concatenation ------------------------------------------------------------------------
case(
    "glu",
    two(lambda m, h: F.glu(h), a=6, b=3),
    X,
    expect=[
        group(
            3,
            "a.weight[0] (3/1 of 6)",
            "a.weight[0] (3+3/1 of 6)",
            "a.bias[0] (3/1 of 6)",
            "a.bias[0] (3+3/1 of 6)",
            "b.weight[1]",
        )
    ],
)
FUSED_GATE = CASES[-1].expected
case(
    "chunked gate",
    two(lambda m, h: h.chunk(2, -1)[0].sigmoid() * h.chunk(2, -1)[1], 6, 3),
    X,
    expect=FUSED_GATE,
)
case("sliced gate", two(lambda m, h: h[..., :3] * h[..., 3:].tanh(), 6, 3), X, expect=FUSED_GATE)
case(
    "separate gate",
    lambda: Net(lambda m, x: m.down(F.silu(m.gate(x)) * m.up(x)), gate=nn.Linear(3, 4), up=nn.Linear(3, 4),
                down=nn.Linear(4, 2)),
    X,
    expect=[group(4, "gate.weight[0]", "gate.bias[0]", "up.weight[0]", "up.bias[0]", "down.weight[1]")],
)  # fmt: skip
case(
    "concatenation",
    lambda: Net(lambda m, x: m.out(torch.cat([m.a(x).relu(), m.b(x).tanh()], -1)), a=nn.Linear(3, 4),
                b=nn.Linear(3, 5), out=nn.Linear(9, 2)),
    X,
    expect=[
        group(4, "a.weight[0]", "a.bias[0]", "out.weight[1] (4/1 of 9)"),
        group(5, "b.weight[0]", "b.bias[0]", "out.weight[1] (4+5/1 of 9)"),
    ],
)  # fmt: skip
case(
    "split with sizes and a dropped rest",
    two(lambda m, h: h.split([2, 3, 1], -1)[1], a=6, b=3),
    X,
    expect=[
        group(2, "a.weight[0] (2/1 of 6)", "a.bias[0] (2/1 of 6)"),
        group(3, "a.weight[0] (2+3/1 of 6)", "a.bias[0] (2+3/1 of 6)", "b.weight[1]"),
    ],
    unseen=("a.weight", "a.bias"),
)
case(
    "padded with zeros",
    two(lambda m, h: F.pad(h, (1, 2)), b=7),
    X,
    expect=[
        group(4, "a.weight[0]", "a.bias[0]", "b.weight[1] (1+4/1 of 7)"),
        group(2, "b.weight[1] (5+2/1 of 7)"),
    ],
    unseen=("b.weight",),
)


def _assigned(h: Tensor) -> Tensor:
    h = h.clone()
    h[:, 3] = h[:, :3].sum(1)
    return h


case(
    "slice assignment",
    two(lambda m, h: _assigned(h)),
    X,
    expect=[group(3, "a.weight[0] (3/1 of 4)", "a.bias[0] (3/1 of 4)", "b.weight[1] (3/1 of 4)")],
)


case(
    "one unit used alone",
    two(lambda m, h: h * h[:, :1]),
    X,
    expect=[
        group(3, "a.weight[0] (1+3/1 of 4)", "a.bias[0] (1+3/1 of 4)", "b.weight[1] (1+3/1 of 4)"),
    ],
)

# --- Shapes ------------------------------------------------------------------------------------------------
case(
    "transposed use of a weight",
    lambda: Net(lambda m, x: (x @ m.w).relu() @ m.v, w=(3, 4), v=(4, 2)),
    X,
    expect=[group(4, "w[1]", "v[0]")],
)
case(
    "tied autoencoder",
    lambda: Net(lambda m, x: F.linear(F.linear(x, m.w).relu(), m.w.t()), w=(4, 3)),
    X,
    expect=[group(4, "w[0]")],
)
case(
    "flatten after a convolution",
    lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 2)),
    IMAGE,
    expect=[group(4, "0.weight[0]", "0.bias[0]", "3.weight[1] (4/16 ×16/1 of 64)")],
)
case(
    "flatten with channels last",
    lambda: Net(lambda m, x: m.out(m.conv(x).permute(0, 2, 3, 1).flatten(1)), conv=nn.Conv2d(3, 4, 3),
                out=nn.Linear(64, 2)),
    IMAGE,
    expect=[group(4, "conv.weight[0]", "conv.bias[0]", "out.weight[1] (4/1 ×16/4 of 64)")],
)  # fmt: skip
case(
    "maxout",
    two(lambda m, h: h.view(2, 3, 2).amax(-1), a=6, b=3),
    X,
    expect=[
        group(3, "a.weight[0] (3/2 ×2/1 of 6)", "a.bias[0] (3/2 ×2/1 of 6)", "b.weight[1]"),
        *(group(2, f"a.weight[0] ({k}2/1 of 6)", f"a.bias[0] ({k}2/1 of 6)") for k in ("", "2+", "4+")),
    ],
)
case(
    "a flattened block inside a concatenation",
    lambda: Net(lambda m, x: m.out(torch.cat([x.mean((2, 3)), m.c(x).flatten(1)], 1)), c=nn.Conv2d(3, 4, 5),
                out=nn.Linear(19, 2)),
    IMAGE,
    expect=[group(4, "c.weight[0]", "c.bias[0]", "out.weight[1] (3+4/4 ×4/1 of 19)")],
)  # fmt: skip
case(
    "movedim and squeeze",
    two(lambda m, h: h[:, None].movedim(2, 0).squeeze(2).movedim(0, -1)),
    X,
    expect=[mlp()],
)
case("repeat interleave", two(lambda m, h: h.repeat_interleave(2, -1), b=8), X, expect=[
    group(4, "a.weight[0]", "a.bias[0]", "b.weight[1] (4/2 ×2/1 of 8)"),
    *(group(2, f"b.weight[1] ({start}2/1 of 8)") for start in ("", "2+", "4+", "6+")),
])  # fmt: skip
case(
    "diagonal",
    two(lambda m, h: torch.diagonal(h[:, :, None] * h[:, None, :], dim1=1, dim2=2)),
    X,
    expect=[mlp()],
)
case("a triangle pins", two(lambda m, h: torch.tril(h[:, :, None] * h[:, None, :]).sum(1)), X, expect=[])
case(
    "a strided slice",
    two(lambda m, h: h[:, ::2] * h[:, 1::2].tanh(), b=2),
    X,
    expect=[group(2, "a.weight[0] (2/2 ×2/1 of 4)", "a.bias[0] (2/2 ×2/1 of 4)", "b.weight[1]")],
)
case(
    "an uneven strided slice",
    two(lambda m, h: h[:, ::3], b=2),
    X,
    expect=[group(2, "a.weight[0] (2/3 of 4)", "a.bias[0] (2/3 of 4)", "b.weight[1]")],
)
case("flip pins", two(lambda m, h: h.flip(-1)), X, expect=[])
case("cumulative sum pins", two(lambda m, h: h.cumsum(-1)), X, expect=[])
for name, function in {
    "sorting": lambda h: h.sort(-1).values,
    "gathering by rank": lambda h: h.gather(1, h.argsort(1)),
    "the greatest, counted": lambda h: h * F.one_hot(h.argmax(-1), 4) + h.max(-1).values[:, None],
    "the greatest, scattered": lambda h: torch.zeros_like(h).scatter(1, h.topk(2).indices, h.topk(2).values),
}.items():
    ranks = name in ("sorting", "gathering by rank")
    slots = ["a.weight[0]", "a.bias[0]"] + ([] if ranks else ["b.weight[1]"])
    case(name, two(lambda m, h, f=function: f(h)), X, expect=[group(4, *slots)])
case("unsorted selection pins", two(lambda m, h: h.topk(2, sorted=False).values, b=2), X, expect=[])
case("positions used as numbers pin", two(lambda m, h: h * h.argmax(-1, keepdim=True)), X, expect=[])
case("unbind pins", two(lambda m, h: torch.stack(h.unbind(-1)[::-1], -1)), X, expect=[])
case(
    "circular padding pins",
    two(lambda m, h: F.pad(h[:, None], (1, 1), mode="circular")[:, 0], b=6),
    X,
    expect=[],
)

# --- Contractions ------------------------------------------------------------------------------------------
case(
    "einsum",
    lambda: Net(lambda m, x: torch.einsum("...i,ij,jk->...k", x, m.w, m.v), w=(3, 4), v=(4, 2)),
    X,
    expect=[group(4, "w[1]", "v[0]")],
)
case(
    "addmm, mv and dot",
    lambda: Net(
        lambda m, x: torch.dot(torch.addmm(m.bias, x, m.w).mv(m.v), x[:, 0]), bias=(4,), w=(3, 4), v=(4,)
    ),
    X,
    expect=[group(4, "bias[0]", "w[1]", "v[0]")],
)
case(
    "bilinear",
    lambda: Net(lambda m, x: m.out(m.pair(m.a(x), m.c(x))), a=nn.Linear(3, 4), c=nn.Linear(3, 5),
                pair=nn.Bilinear(4, 5, 3), out=nn.Linear(3, 2)),
    X,
    expect=[
        group(4, "a.weight[0]", "a.bias[0]", "pair.weight[1]"),
        group(5, "c.weight[0]", "c.bias[0]", "pair.weight[2]"),
        group(3, "pair.weight[0]", "pair.bias[0]", "out.weight[1]"),
    ],
)  # fmt: skip
case(
    "distances and similarity",
    lambda: Net(lambda m, x: (torch.cdist(m.a(x), m.c), F.cosine_similarity(m.a(x), m.c[:1])), a=nn.Linear(3, 4),
                c=(5, 4)),
    X,
    expect=[group(4, "a.weight[0]", "a.bias[0]", "c[1]")],
)  # fmt: skip

# --- Convolutions, pooling, norms of channels ----------------------------------------------------------------
for dims in (1, 2, 3):
    conv, up, bn = (getattr(nn, f"{kind}{dims}d") for kind in ("Conv", "ConvTranspose", "BatchNorm"))
    pool = getattr(nn, f"MaxPool{dims}d")
    case(
        f"convolutions in {dims} dimensions",
        lambda conv=conv, up=up, bn=bn, pool=pool: nn.Sequential(
            conv(2, 4, 3, padding=1), bn(4), nn.ReLU(), pool(2), up(4, 3, 2, 2), nn.ReLU(), conv(3, 2, 1)
        ),
        (2, 2, *(4,) * dims),
        expect=[
            group(
                4,
                "0.weight[0]",
                "0.bias[0]",
                *(f"1.{n}[0]" for n in ("weight", "bias", "running_mean", "running_var")),
                "4.weight[0]",
            ),
            group(3, "4.weight[1]", "4.bias[0]", "6.weight[1]"),
        ],
    )
case(
    "depthwise convolution",
    lambda: nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 3, groups=4), nn.Conv2d(4, 2, 1)),
    IMAGE,
    expect=[group(4, "0.weight[0]", "0.bias[0]", "1.weight[0]", "1.bias[0]", "2.weight[1]")],
)
case(
    "an unbatched image",
    lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 1)),
    IMAGE[1:],
    expect=[group(4, "0.weight[0]", "0.bias[0]", "2.weight[1]")],
)
for name, layer in {
    "adaptive pooling": nn.AdaptiveAvgPool2d(2),
    "maximum pooling": nn.AdaptiveMaxPool2d(2),
    "nearest resampling": nn.Upsample(scale_factor=2),
    "bilinear resampling": nn.Upsample(scale_factor=2, mode="bilinear"),
    "reflection padding": nn.ReflectionPad2d(1),
    "unit pooling": nn.AvgPool2d(1),
    "channel dropout": nn.Dropout2d(),
}.items():
    case(
        name,
        lambda layer=layer: nn.Sequential(nn.Conv2d(3, 4, 1), layer, nn.Conv2d(4, 2, 1)),
        IMAGE,
        expect=[group(4, "0.weight[0]", "0.bias[0]", "2.weight[1]")],
    )
case(
    "instance norm",
    lambda: nn.Sequential(
        nn.Conv2d(3, 4, 1), nn.InstanceNorm2d(4, affine=True, track_running_stats=True), nn.Conv2d(4, 2, 1)
    ),
    IMAGE,
    expect=[
        group(
            4,
            "0.weight[0]",
            "0.bias[0]",
            *(f"1.{n}[0]" for n in ("weight", "bias", "running_mean", "running_var")),
            "2.weight[1]",
        )
    ],
)
case(
    "group norm with one group",
    lambda: nn.Sequential(nn.Conv2d(3, 4, 1), nn.GroupNorm(1, 4), nn.Conv2d(4, 2, 1)),
    IMAGE,
    expect=[group(4, "0.weight[0]", "0.bias[0]", "1.weight[0]", "1.bias[0]", "2.weight[1]")],
)
case(
    "squeeze and excite",
    lambda: Net(
        lambda m, x: m.out((h := m.conv(x)) * m.up(m.down(h.mean((2, 3), keepdim=True)).relu()).sigmoid()),
        conv=nn.Conv2d(3, 6, 1), down=nn.Conv2d(6, 4, 1), up=nn.Conv2d(4, 6, 1), out=nn.Conv2d(6, 2, 1),
    ),
    IMAGE,
    expect=[
        group(6, "conv.weight[0]", "conv.bias[0]", "down.weight[1]", "up.weight[0]", "up.bias[0]", "out.weight[1]"),
        group(4, "down.weight[0]", "down.bias[0]", "up.weight[1]"),
    ],
)  # fmt: skip

# --- Look-ups ----------------------------------------------------------------------------------------------
TOKENS = torch.tensor([[0, 3, 1], [2, 2, 4]])
case(
    "embedding with a tied output",
    lambda: Net(lambda m, t: m.e(t).relu() @ m.e.weight.t(), e=nn.Embedding(5, 4)),
    TOKENS,
    expect=[group(4, "e.weight[1]")],
)
case(
    "embeddings and positions",
    lambda: Net(
        lambda m, t: m.out(m.e(t) + m.p[: t.shape[1]]), e=nn.Embedding(5, 4), p=(6, 4), out=nn.Linear(4, 2)
    ),
    TOKENS,
    expect=[group(4, "e.weight[1]", "p[1]", "out.weight[1]")],
)
case(
    "fancy indexing of positions",
    lambda: Net(lambda m, t: m.out(m.table[t, :]), table=(5, 4), out=nn.Linear(4, 2)),
    TOKENS,
    expect=[group(4, "table[1]", "out.weight[1]")],
)
case("indexing units pins them", two(lambda m, h: h[:, torch.tensor([2, 0])], b=2), X, expect=[])
case("gathering units pins them", two(lambda m, h: h.gather(1, (h > 0).long()[:, :2]), b=2), X, expect=[])


@pytest.mark.parametrize("example", CASES, ids=lambda c: c.name)
def test_groups(example: Case) -> None:
    check(build(example.factory), example.inputs, example.expected, unseen=example.unseen)


# --- Recurrent layers --------------------------------------------------------------------------------------
class Recurrent(nn.Module):
    def __init__(self, kind: str, last: bool = False, given: bool = False, **settings: Any) -> None:
        super().__init__()
        self.layer = getattr(nn, kind)(3, 4, **settings)
        directions = 1 if last else 1 + settings.get("bidirectional", False)
        self.out = nn.Linear(settings.get("proj_size", 4) * directions, 2)
        self.start = nn.Parameter(torch.randn(1, 1, 4)) if given else None
        self.last = last

    def forward(self, x: Tensor) -> Tensor:
        y, state = self.layer(x) if self.start is None else self.layer(x, self.start.expand(-1, 2, -1))
        hidden = state[0] if isinstance(state, tuple) else state
        return self.out(hidden[-1] if self.last else y)


def gates(count: int, *tensors: str, size: int = 4) -> list[str]:
    starts = ["", *(f"{k * size}+" for k in range(1, count))]
    indices = [""] if count == 1 else [f" ({start}{size}/1 of {count * size})" for start in starts]
    return [f"layer.{t}[0]{index}" for t in tensors for index in indices]


FIRST = ("weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0")
SECOND = tuple(t.replace("l0", "l1") for t in FIRST)


@pytest.mark.parametrize(
    ("kind", "count"),
    [
        ("LSTM", 4),
        pytest.param("GRU", 3, marks=pytest.mark.slow),
        pytest.param("RNN", 1, marks=pytest.mark.slow),
    ],
)
def test_recurrent_layers(kind: str, count: int) -> None:
    x = normal(5, 2, 3)
    one = group(4, *gates(count, *FIRST), "layer.weight_hh_l0[1]", "out.weight[1]")
    check(build(lambda: Recurrent(kind)), x, {one})
    two = {
        group(4, *gates(count, *FIRST), "layer.weight_hh_l0[1]", "layer.weight_ih_l1[1]"),
        group(4, *gates(count, *SECOND), "layer.weight_hh_l1[1]", "out.weight[1]"),
    }
    check(build(lambda: Recurrent(kind, num_layers=2)), x, two, every_slot=False)
    check(build(lambda: Recurrent(kind, num_layers=2, batch_first=True)), x, two, every_slot=False)
    check(build(lambda: Recurrent(kind, num_layers=2, last=True)), x, two, every_slot=False)
    both = check(build(lambda: Recurrent(kind, bidirectional=True)), x, every_slot=False)
    assert sorted(str(s) for g in both.groups.values() for s in g.slots if s.tensor == "out.weight") == [
        "out.weight[1] (4+4/1 of 8)",
        "out.weight[1] (4/1 of 8)",
    ]
    if kind != "LSTM":
        started = check(build(lambda: Recurrent(kind, given=True)), x)
        assert "start[2]" in {str(s) for g in started.groups.values() for s in g.slots}


def test_projected_recurrent_states() -> None:
    expected = {
        group(4, *gates(4, *FIRST), "layer.weight_hr_l0[1]"),
        group(3, "layer.weight_hr_l0[0]", "layer.weight_hh_l0[1]", "out.weight[1]"),
    }
    check(build(lambda: Recurrent("LSTM", proj_size=3)), normal(5, 2, 3), expected)


@pytest.mark.parametrize(("kind", "count"), [("LSTMCell", 4), ("GRUCell", 3), ("RNNCell", 1)])
def test_recurrent_cells(kind: str, count: int) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        state = m.layer(x[1], m.layer(x[0]))
        return m.out(state[0] if isinstance(state, tuple) else state)

    tensors = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    model = build(lambda: Net(forward, layer=getattr(nn, kind)(3, 4), out=nn.Linear(4, 2)))
    check(model, normal(2, 2, 3), {group(4, *gates(count, *tensors), "layer.weight_hh[1]", "out.weight[1]")})


# --- Equal copies: an expanded axis follows, it does not tie ----------------------------------------------------
def test_a_shared_mask_of_equal_copies_ties_nothing() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        mask = torch.zeros(2, 4) + x.square().mean(-1, keepdim=True)
        return m.c((m.b((m.a(x) * mask).relu()) * mask).relu())

    model = build(lambda: Net(forward, a=nn.Linear(3, 4), b=nn.Linear(4, 4), c=nn.Linear(4, 2)))
    check(model, normal(*X), {mlp("a", "b"), mlp("b", "c")})


def test_equal_copies_that_become_unequal_tie_again() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        ramp = torch.ones(2, 4).cumsum(1)
        gained = F.layer_norm(torch.ones(2, 4) + x[:, :1], (4,), m.gain, m.shift)
        return m.b(m.a(x) * ramp) + m.d(m.c(x) * gained)

    parts = {n: nn.Linear(3, 4) for n in "ac"} | {n: nn.Linear(4, 2) for n in "bd"}
    model = build(lambda: Net(forward, **parts, gain=(4,), shift=(4,)))
    expected = {group(4, "gain[0]", "shift[0]", "c.weight[0]", "c.bias[0]", "d.weight[1]")}
    check(model, normal(*X), expected, unseen=frozenset({"gain"}))
