"""Order where entries may be equal: what is not proven to differ stays, and verification sees ties."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from symmetry_helpers import Net, build, described, group, normal, seeded
from torch import Tensor, nn

from isthmus.symmetry import AxisGroup, IndexMap, Slot, SymmetrySpec, apply, discover, verify

X = normal(4, 5)
UNITS = 6
First = Callable[[Any, Tensor], Tensor]


def chooser(
    first: First, rank: Callable[[Tensor], Tensor] = lambda h: h.argmax(-1), bias: bool = True
) -> nn.Module:
    """Six units, made equal or not by ``first``, ranked; what comes out addresses a table of six rows."""

    def forward(m: Any, x: Tensor) -> Tensor:
        return m.table[rank(first(m, m.a(x)))].flatten(1)

    parts = {"table": (UNITS, 3), "square": (UNITS, UNITS), "s": (1,), "vector": (UNITS,)}
    return build(lambda: Net(forward, a=nn.Linear(5, UNITS, bias=bias), c=nn.Linear(UNITS, UNITS), **parts))


def whole(tensor: str, axis: int) -> Slot:
    return Slot(tensor, axis, IndexMap(UNITS, UNITS))


def careless(model: nn.Module) -> SymmetrySpec:
    """The spec of somebody who believes that a choice always moves with the units it chooses from."""
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    ways = [whole("a.weight", 0), *([whole("a.bias", 0)] if "a.bias" in shapes else []), whole("table", 0)]
    return SymmetrySpec({"a": AxisGroup("a", UNITS, tuple(ways))}, (), shapes)


def moved_outputs(model: nn.Module, spec: SymmetrySpec, x: Tensor) -> bool:
    """Return whether rings of the groups change what the network gives on these inputs."""
    state = {k: v.double() if v.is_floating_point() else v for k, v in model.state_dict().items()}
    rings = {name: torch.arange(g.size).roll(1) for name, g in spec.groups.items()}
    runs = [torch.func.functional_call(model, s, (x.double(),)) for s in (state, apply(spec, rings, state))]
    return not torch.allclose(*runs, atol=1e-9)


HARD = {
    "zeros": torch.zeros(4, 5),
    "ones": torch.ones(4, 5),
    "negative": -50 * X.abs(),
    "positive": 50 * X.abs(),
    "large": 1e3 * X,
    "small": 1e-4 * X,
    "signs": X.sign(),
}

TIES: dict[str, First] = {
    "relu": lambda m, h: (h - 3).relu(),
    "relu, scaled": lambda m, h: (h - 3).relu() * 2 + 1,
    "relu, mean": lambda m, h: (h - 3).relu()[:, None].expand(-1, 2, -1).mean(1),
    "relu, maximum with a number": lambda m, h: torch.maximum((h - 3).relu(), m.s.abs()),
    "relu, matrix": lambda m, h: (h - 3).relu() @ m.square,
    "relu, layer norm": lambda m, h: F.layer_norm((h - 3).relu(), (UNITS,)),
    "relu, softmax": lambda m, h: (h - 3).relu().softmax(-1),
    "relu, tanh": lambda m, h: (h - 3).relu().tanh(),
    "relu, sum": lambda m, h: (h - 3).relu() + (h - 3).relu(),
    "relu, norm": lambda m, h: F.normalize((h - 3).relu(), dim=-1),
    "where": lambda m, h: torch.where(h > 3, h, 0.0),
    "masked": lambda m, h: h.masked_fill(h < 3, -1e9),
    "masked by the input": lambda m, h: h.masked_fill(h.sum(-1, keepdim=True) < 30, 0.0),
    "maximum": lambda m, h: torch.maximum(h, m.s + 3),
    "minimum": lambda m, h: torch.minimum(h, m.s - 3),
    "pooled": lambda m, h: F.max_pool1d((h - 3).relu()[:, :, None].expand(-1, -1, 4), 2)[..., 0],
    "scattered": lambda m, h: torch.zeros_like(h).scatter_add(1, (h - 3).relu().long() * 0, h),
    "counts": lambda m, h: (h[:, :, None] > m.vector).sum(-1),
    "truth values": lambda m, h: (h > 0).to(h.dtype),
    "hardshrink": lambda m, h: F.hardshrink(h, 2.0),
    "softshrink": lambda m, h: F.softshrink(h, 2.0),
    "hardtanh": lambda m, h: F.hardtanh(h),
    "clamped": lambda m, h: h.clamp(-0.1, 0.1),
    "rounded": lambda m, h: h.round(),
    "whole numbers": lambda m, h: h.long(),
    "signs": lambda m, h: h.sign(),
    "tanh": lambda m, h: torch.tanh(40 * h),
    "sigmoid": lambda m, h: torch.sigmoid(40 * h),
    "exponential": lambda m, h: torch.exp(40 * h),
    "elu": lambda m, h: F.elu(40 * h),
    "gelu": lambda m, h: F.gelu(h - 40),
    "silu": lambda m, h: F.silu(1e3 * h),
    "times nothing": lambda m, h: h * 0,
    "times a gate": lambda m, h: h * (h.sum(-1, keepdim=True) > 30),
    "absorbed": lambda m, h: h + 1e30,
    "difference with itself": lambda m, h: h - h,
    "own bias twice": lambda m, h: h - m.a.bias - h + m.a.bias,
    "power of zero": lambda m, h: h.pow(0),
    "one number for all": lambda m, h: h.mean(-1, keepdim=True) + 0 * h,
    "half precision": lambda m, h: h.bfloat16(),
    "cumulated": lambda m, h: (h - 3).relu().amax(-1, keepdim=True) - (h - 3).relu(),
    "no such number": lambda m, h: (h - 3).relu().log(),
}

RANKINGS: dict[str, Callable[[Tensor], Tensor]] = {
    "argmax": lambda h: h.argmax(-1),
    "argmin": lambda h: h.argmin(-1),
    "max": lambda h: h.max(-1).indices,
    "min": lambda h: h.min(-1).indices,
    "topk": lambda h: h.topk(2).indices,
    "sort": lambda h: h.sort(-1).indices[:, :2],
    "stable sort": lambda h: torch.sort(h, stable=True, dim=-1, descending=True).indices[:, 2:4],
    "argsort": lambda h: h.argsort(-1)[:, 1:3],
    "median": lambda h: h.median(-1).indices,
    "kthvalue": lambda h: h.kthvalue(2, -1).indices,
    "mode": lambda h: h.mode(-1).indices,
    "cummax": lambda h: h.cummax(-1).indices[:, -1],
    "one-hot": lambda h: F.one_hot(h.argmax(-1), UNITS).argmax(-1),
}


def is_right(model: nn.Module) -> SymmetrySpec:
    spec = discover(model, X)
    for name, x in HARD.items():
        assert not moved_outputs(model, spec, x), f"{name}\n{spec}"
    return spec


UNSEEN = ("half precision", "absorbed", "own bias twice", "difference with itself", "relu, matrix")
"""Not seen: it computes in float64, differences of equals are rounding, and one group was not moved with a matrix."""

SEEN_BY_DEFAULT = ("relu", "masked", "maximum", "counts", "hardshrink", "tanh", "elu", "one number for all")


@pytest.mark.parametrize("name", TIES)
def test_what_may_be_equal_stays(name: str) -> None:
    spec = is_right(chooser(TIES[name]))
    assert all(g.size != UNITS or "table" not in str(g) for g in spec.groups.values())


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(n, marks=() if n in SEEN_BY_DEFAULT else pytest.mark.slow)
        for n in TIES
        if n not in UNSEEN
    ],
)
def test_verification_sees_ties(name: str) -> None:
    """Somebody's spec that moves the units with the choice is found out, though random inputs make no ties."""
    model = chooser(TIES[name])
    assert verify(careless(model), model, X, generator=seeded(1), draws=1).guilty == ("a",)


@pytest.mark.parametrize("rank", RANKINGS)
def test_every_ranking_of_equal_entries_stays(rank: str) -> None:
    is_right(chooser(lambda m, h: (h - 3).relu(), RANKINGS[rank]))


@pytest.mark.slow
@pytest.mark.parametrize("rank", RANKINGS)
@pytest.mark.parametrize("name", TIES)
def test_every_ranking_after_every_tie(name: str, rank: str) -> None:
    if name != "truth values" or rank not in ("median", "kthvalue", "mode"):
        is_right(chooser(TIES[name], RANKINGS[rank]))


def test_verification_sees_ties_of_units_without_bias() -> None:
    model = chooser(lambda m, h: h, bias=False)
    assert verify(careless(model), model, X).guilty == ("a",)


# --- What is proven to differ moves ----------------------------------------------------------------------------
DIFFERENT: dict[str, First] = {
    "bias": lambda m, h: h,
    "scaled and shifted": lambda m, h: -2 * h / 3 + 1,
    "leaky relu": lambda m, h: F.leaky_relu(h, 0.1),
    "softmax": lambda m, h: h.softmax(-1),
    "log-softmax": lambda m, h: h.log_softmax(-1),
    "moved": lambda m, h: h[None].permute(2, 1, 0).squeeze(2).t().contiguous(),
    "scaled by a parameter": lambda m, h: h * m.s,
    "parameter added after ties": lambda m, h: (h - 3).relu() + m.vector,
    "parameter subtracted from ties": lambda m, h: m.vector - (h - 3).relu(),
    "norm with a shift": lambda m, h: F.layer_norm((h - 3).relu(), (UNITS,), None, m.vector),
    "finer numbers": lambda m, h: h.double().softmax(-1),
}  # fmt: skip


@pytest.mark.parametrize("name", DIFFERENT)
def test_what_differs_moves(name: str) -> None:
    spec = is_right(chooser(DIFFERENT[name]))
    (found,) = (g for g in spec.groups.values() if g.size == UNITS)
    assert {"a.weight[0]", "a.bias[0]", "table[0]"} <= set(map(str, found.slots))


def routed(embedding: dict[str, Any], gain: bool = True, residual: bool = True) -> nn.Module:
    """A router without bias over a residual stream, as language models have it."""

    def forward(m: Any, tokens: Tensor) -> Tensor:
        h = m.embed(tokens)
        mixed = m.out(h.relu().mean(1, keepdim=True).expand_as(h))
        h = h + mixed if residual else mixed
        scale = torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)
        h = h * scale * (m.gain if gain else m.gain.relu())
        return m.table[m.route(h.reshape(-1, 4)).softmax(-1).topk(2).indices].sum(1)

    return build(
        lambda: Net(
            forward,
            embed=nn.Embedding(7, 4, **embedding),
            out=nn.Linear(4, 4, bias=False),
            route=nn.Linear(4, UNITS, bias=False),
            gain=(4,),
            table=(UNITS, 3),
        )
    )


TOKENS = torch.tensor([[0, 1, 2], [3, 4, 6]])


def test_a_router_without_bias_reads_a_stream_that_is_not_zero() -> None:
    expected = group(UNITS, "route.weight[0]", "table[0]")
    model = routed({})
    assert expected in described(discover(model, TOKENS))
    assert verify(discover(model, TOKENS), model, TOKENS).passed


@pytest.mark.parametrize("way", [{"embedding": {"padding_idx": 0}}, {"gain": False}, {"residual": False}])
def test_a_router_without_bias_whose_stream_may_be_zero_stays(way: dict[str, Any]) -> None:
    found = described(discover(routed(**{"embedding": {}, **way}), TOKENS))
    assert not any(size == UNITS for size, _ in found)


def test_a_bias_that_influences_what_it_is_added_to_proves_nothing() -> None:
    model = chooser(lambda m, h: (0 * h - m.vector) + m.vector)
    assert not any("table" in str(g) for g in is_right(model).groups.values())


def test_a_matrix_with_a_number_in_two_places_proves_nothing() -> None:
    """Rows that are multiples of ones make logits ``v Σ h``, all zero where the sum of ``h`` is."""

    def forward(m: Any, x: Tensor) -> Tensor:
        h = F.layer_norm(x, (5,)) + 0 * m.bias
        return m.table[F.linear(h, m.v[:, None].expand(-1, 5)).argmax(-1)]

    model = build(lambda: Net(forward, v=(UNITS,), bias=(5,), table=(UNITS, 3)))
    assert discover(model, X).groups == {}


def test_a_choice_that_may_tie_still_says_which_expert_a_row_is_of() -> None:
    """Hidden units move inside every expert, also where the order of the experts is fixed."""

    def forward(m: Any, x: Tensor) -> Tensor:
        weights, chosen = m.route((x - 1).relu()).topk(2)
        hidden = torch.einsum("nd,nkdh->nkh", x, m.up[chosen]).relu()
        return torch.einsum("nk,nkh,nkho->no", weights.softmax(-1), hidden, m.down[chosen])

    model = build(lambda: Net(forward, route=nn.Linear(5, 3, bias=False), up=(3, 5, 4), down=(3, 4, 2)))
    spec = discover(model, X)
    assert sorted(g.size for g in spec.groups.values()) == [4, 4, 4]
    assert verify(spec, model, X).passed
