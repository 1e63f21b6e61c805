"""Groups inside groups: heads and dimensions, experts and hidden units, and how their permutations compose."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from symmetry_helpers import build, check, described, group, normal, seeded
from torch import Tensor, nn

from isthmus.couplings import random_permutation
from isthmus.errors import SymmetryError
from isthmus.symmetry import AxisGroup, IndexMap, Slot, SymmetrySpec, apply, discover, verify
from isthmus.testing import bert, llama

X = normal(2, 5, 6)
WIDTH, HEADS, EACH = 6, 3, 4
DEAD = frozenset({"k.bias"})  # a shift of all scores of a query: softmax does not see it


class Attention(nn.Module):
    """Self-attention written in several ways: ``form`` names how heads are made."""

    def __init__(self, form: str = "separate", heads: int = HEADS, kv: int = HEADS) -> None:
        super().__init__()
        self.form, self.heads, self.kv = form, heads, kv
        inner = heads * EACH
        if form in ("separate", "einsum", "grouped", "alibi", "bmm", "rotary"):
            self.q = nn.Linear(WIDTH, inner, bias=form != "einsum")
            self.k = nn.Linear(WIDTH, kv * EACH, bias=form != "einsum")
            self.v = nn.Linear(WIDTH, kv * EACH, bias=form != "einsum")
        else:
            self.qkv = nn.Linear(WIDTH, 3 * inner, bias=False)
        self.out = nn.Linear(inner, 2)

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        h, k_heads = self.heads, self.kv
        if self.form == "einsum":
            wq, wk, wv = (m.weight.view(h, EACH, WIDTH) for m in (self.q, self.k, self.v))
            scores = torch.einsum("btm,hdm,bsn,hdn->bhts", x, wq, x, wk)
            mixed = torch.einsum("bhts,bsm,hdm->bthd", scores.softmax(-1), x, wv)
            return self.out(mixed.reshape(b, t, h * EACH))
        if self.form in ("separate", "grouped", "alibi", "bmm", "rotary"):
            q = self.q(x).view(b, t, h, EACH).transpose(1, 2)
            k = self.k(x).view(b, t, k_heads, EACH).transpose(1, 2)
            v = self.v(x).view(b, t, k_heads, EACH).transpose(1, 2)
        elif self.form == "chunked":
            q, k, v = (p.view(b, t, h, EACH).transpose(1, 2) for p in self.qkv(x).chunk(3, -1))
        elif self.form == "stacked":
            q, k, v = self.qkv(x).view(b, t, 3, h, EACH).permute(2, 0, 3, 1, 4).unbind(0)
        elif self.form == "selected":
            fused = self.qkv(x).view(b, t, 3, h, EACH).permute(2, 0, 3, 1, 4)
            q, k, v = fused[0], fused[1], fused[2]
        else:  # interleaved: heads first
            fused = self.qkv(x).view(b, t, h, 3, EACH).transpose(1, 2)
            q, k, v = fused[..., 0, :], fused[..., 1, :], fused[..., 2, :]
        if self.form == "rotary":
            angle = torch.arange(t)[:, None] * torch.tensor([1.0, 0.1])
            cos, sin = (f(torch.cat([angle, angle], -1)) for f in (torch.cos, torch.sin))
            q, k = (z * cos + torch.cat([-z[..., 2:], z[..., :2]], -1) * sin for z in (q, k))
        if self.form == "grouped":
            k, v = (
                z[:, :, None].expand(b, k_heads, h // k_heads, t, EACH).reshape(b, h, t, EACH) for z in (k, v)
            )
        if self.form == "bmm":
            q, k, v = (z.reshape(b * h, t, EACH) for z in (q, k, v))
            mixed = torch.bmm(torch.bmm(q, k.transpose(1, 2)).softmax(-1), v).view(b, h, t, EACH)
        elif self.form == "alibi":
            slopes = torch.tensor([0.5, 0.25, 0.125])[:, None, None]
            scores = q @ k.transpose(-1, -2) + slopes * torch.arange(t)
            mixed = scores.softmax(-1) @ v
        else:
            mixed = F.scaled_dot_product_attention(q, k, v)
        return self.out(mixed.transpose(1, 2).reshape(b, t, h * EACH))


def heads_of(spec: SymmetrySpec) -> tuple[list[int], dict[str, list[AxisGroup]]]:
    """Return the sizes of the groups that are not nested, and the families."""
    families: dict[str, list[AxisGroup]] = {}
    for g in spec.groups.values():
        if g.family:
            families.setdefault(g.family, []).append(g)
    return sorted(g.size for g in spec.groups.values() if not g.family), families


@pytest.mark.parametrize(
    "form", ["separate", "einsum", "bmm", "chunked", "stacked", "selected", "interleaved"]
)
def test_heads_and_their_dimensions_however_they_are_written(form: str) -> None:
    model = build(lambda: Attention(form))
    spec = check(model, X, every_slot=form in ("separate", "stacked"), unseen=DEAD)
    outer, families = heads_of(spec)
    assert outer == [HEADS]
    (heads,) = (g for g in spec.groups.values() if not g.family)
    assert [[g.size for g in f] for f in families.values()] == [[EACH] * HEADS] * 2
    assert all(g.within == ((heads.name, k),) for f in families.values() for k, g in enumerate(f))
    value_names = {"einsum": "v", "separate": "v", "bmm": "v"}.get(form, "qkv")
    values = [f for f in families.values() if any(s.tensor == "out.weight" for s in f[0].slots)]
    assert len(values) == 1
    assert {s.tensor.split(".")[0] for s in values[0][1].slots} == {value_names, "out"}
    assert spec.fraction_moved == pytest.approx(1, abs=0.2)


def test_slots_of_heads_and_dimensions() -> None:
    spec = discover(build(Attention), X)
    names = list(spec.groups)
    assert names == ["q", "q#2[0]", "q#2[1]", "q#2[2]", "v[0]", "v[1]", "v[2]"]
    assert [str(s) for s in spec.groups["v[1]"].slots] == [
        "v.weight[0] (4+4/1 of 12)",
        "v.bias[0] (4+4/1 of 12)",
        "out.weight[1] (4+4/1 of 12)",
    ]
    assert spec.groups["v[1]"].family == "v[*]"
    assert str(spec.groups["q"].slots[0]) == "q.weight[0] (3/4 ×4/1 of 12)"


def test_pinned_heads_still_have_free_dimensions() -> None:
    spec = check(build(lambda: Attention("alibi")), X, unseen=DEAD)
    outer, families = heads_of(spec)
    assert outer == []
    assert sorted(g.size for f in families.values() for g in f) == [EACH] * 6
    assert all(g.within == () for f in families.values() for g in f)


def test_rotary_dimensions_are_pinned_but_values_move() -> None:
    spec = check(build(lambda: Attention("rotary")), X, unseen=DEAD)
    outer, families = heads_of(spec)
    assert outer == [HEADS]
    assert [[g.size for g in f] for f in families.values()] == [[EACH] * HEADS]
    assert any(p.tensor == "q.weight" for p in spec.pinned) or "q.weight" in spec.shapes


def test_grouped_queries() -> None:
    spec = check(build(lambda: Attention("grouped", heads=6, kv=2)), X, unseen=DEAD)
    outer, families = heads_of(spec)
    assert outer == [2]
    assert sorted([g.size for g in f] for f in families.values()) == [[3, 3], [4, 4], [4, 4]]


def test_what_heads_share_ties_their_dimensions() -> None:
    """One gain for all heads and a softmax over dimensions: every head has the same order."""

    class Shared(Attention):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.randn(EACH))

        def forward(self, x: Tensor) -> Tensor:
            b, t, _ = x.shape
            v = self.v(x).view(b, t, HEADS, EACH) * self.scale
            return self.out(v.softmax(3).reshape(b, t, -1))

    spec = check(build(Shared), X)
    assert sorted(g.size for g in spec.groups.values()) == [HEADS, EACH]


@pytest.mark.parametrize(("dim", "sizes"), [(3, [HEADS] + [EACH] * HEADS), (2, [EACH] + [HEADS] * EACH)])
def test_the_axis_that_is_mixed_moves_inside_the_other(dim: int, sizes: list[int]) -> None:
    """A softmax along dimensions lets each head order them; along heads, each dimension may order the heads."""

    class Mixing(Attention):
        def forward(self, x: Tensor) -> Tensor:
            b, t, _ = x.shape
            return self.out(self.v(x).view(b, t, HEADS, EACH).softmax(dim).reshape(b, t, -1))

    spec = check(build(Mixing), X)
    assert sorted(g.size for g in spec.groups.values()) == sorted(sizes)


def test_products_between_heads_tie_their_dimensions() -> None:
    class Gram(Attention):
        """Heads compared with one another: dimensions are shared by all."""

        def forward(self, x: Tensor) -> Tensor:
            b, t, _ = x.shape
            v = self.v(x).view(b, t, HEADS, EACH)
            weights = torch.einsum("bthd,btgd->bthg", v, v).softmax(-1)
            return self.out(torch.einsum("bthg,btgd->bthd", weights, v).reshape(b, t, -1))

    spec = check(build(Gram), X)
    assert sorted(g.size for g in spec.groups.values()) == [HEADS, EACH]


class Experts(nn.Module):
    """A dense mixture: every expert's hidden units move by themselves, in tensors of all experts."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(6, 3)
        self.up = nn.Parameter(torch.randn(3, 6, 4))
        self.gain = nn.Parameter(torch.randn(3, 4))
        self.down = nn.Parameter(torch.randn(3, 4, 2))

    def forward(self, x: Tensor) -> Tensor:
        gates = self.router(x).softmax(-1)
        hidden = torch.einsum("btm,emh->bteh", x, self.up).relu() * self.gain
        return torch.einsum("bteh,eho,bte->bto", hidden, self.down, gates)


def test_experts_and_their_hidden_units() -> None:
    model = build(Experts)
    spec = check(
        model,
        X,
        {
            group(3, "router.weight[0]", "router.bias[0]", "up[0]", "gain[0]", "down[0]"),
            *(group(4, f"up[2] at [0] {e}", f"gain[1] at [0] {e}", f"down[1] at [0] {e}") for e in range(3)),
        },
    )
    assert spec.fraction_moved == 1
    assert SymmetrySpec.from_json(spec.to_json()) == spec
    assert list(spec.groups) == ["up", "up#2[0]", "up#2[1]", "up#2[2]"]
    again = SymmetrySpec.from_json(spec.to_json()).groups["up#2[1]"]
    assert again.slots[0].block == spec.groups["up#2[1]"].slots[0].block == ((0, IndexMap(3, 1, 1)),)
    assert again.within == (("up", 1),)


def test_grouped_convolutions_and_norms() -> None:
    def net() -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(3, 6, 1),
            nn.GroupNorm(2, 6),
            nn.ReLU(),
            nn.Conv2d(6, 4, 3, groups=2),
            nn.ReLU(),
            nn.Conv2d(4, 2, 1),
        )

    spec = check(build(net), normal(2, 3, 4, 4))
    outer, families = heads_of(spec)
    assert outer == [2]
    assert sorted([g.size for g in f] for f in families.values()) == [[2, 2], [3, 3]]


@pytest.mark.parametrize(
    ("model", "inputs", "expected"),
    [
        (
            lambda: bert(vocabulary=9, classes=2, width=12, depth=1, heads=3, context=5),
            (
                torch.tensor([[1, 4, 8, 2], [3, 3, 0, 7]]),
                torch.tensor([[0, 0, 1, 1]] * 2),
                torch.tensor([[1, 1, 1, 0]] * 2),
            ),
            {"stream": 12, "pooler": 12, "hidden": 48, "heads": 3, **{f"dimension {k}": 4 for k in range(6)}},
        ),
        (
            lambda: llama(vocabulary=9, width=24, depth=1, heads=6, kv_heads=2, hidden=10),
            (torch.tensor([[1, 4, 8, 2], [3, 3, 0, 7]]),),
            {"stream": 24, "hidden": 10, "key heads": 2, "queries 0": 3, "queries 1": 3, "values 0": 4, "values 1": 4},
        ),
    ],
    ids=["bert", "llama"],
)  # fmt: skip
def test_transformers_as_people_write_them(model: Any, inputs: Any, expected: dict[str, int]) -> None:
    spec = check(build(model), inputs, every_slot=False)
    assert sorted(g.size for g in spec.groups.values()) == sorted(expected.values())


# --- Composition -------------------------------------------------------------------------------------------
def drawn(spec: SymmetrySpec, seed: int) -> dict[str, Tensor]:
    generator = seeded(seed)
    return {name: random_permutation(g.size, generator) for name, g in spec.groups.items()}


@pytest.mark.parametrize("factory", [Attention, lambda: Attention("grouped", heads=6, kv=2), Experts])
def test_inverse_and_composition(factory: Any) -> None:
    model = build(factory)
    spec, state = discover(model, X), dict(model.state_dict())
    one, two = drawn(spec, 1), drawn(spec, 2)
    moved = apply(spec, one, state)
    back = apply(spec, spec.invert(one), moved)
    assert all(torch.equal(back[k], state[k]) for k in state)
    naive = {name: torch.argsort(p) for name, p in one.items()}
    assert any(not torch.equal(apply(spec, naive, moved)[k], state[k]) for k in state)
    twice, once = apply(spec, two, moved), apply(spec, spec.compose(one, two), state)
    assert all(torch.equal(twice[k], once[k]) for k in state)
    some = dict(list(one.items())[:2])
    there = apply(spec, spec.compose(some, two), state)
    assert all(torch.equal(there[k], apply(spec, two, apply(spec, some, state))[k]) for k in state)
    back = apply(spec, spec.invert(some), apply(spec, some, state))
    assert all(torch.equal(back[k], state[k]) for k in state)


def test_the_outer_permutation_acts_first() -> None:
    """``new[i, j] = old[outer[i], inner_i[j]]`` (docs/decisions/0001-conventions.md)."""
    spec = discover(build(Attention), X)
    outer = torch.tensor([1, 2, 0])
    inner = [torch.tensor(p) for p in ([1, 2, 3, 0], [0, 1, 2, 3], [3, 0, 1, 2])]
    permutations = {"q": outer, **{f"v[{k}]": p for k, p in enumerate(inner)}}
    old = torch.arange(12.0)
    state = {k: torch.zeros(s) for k, s in spec.shapes.items()}
    new = apply(spec, permutations, {**state, "v.bias": old})["v.bias"].view(3, 4)
    for i in range(3):
        for j in range(4):
            assert new[i, j] == old.view(3, 4)[outer[i], inner[i][j]]


def test_blocks_keep_the_input_and_work_on_any_dtype() -> None:
    spec = discover(build(Experts), X)
    permutations = drawn(spec, 3)
    for dtype in (torch.bfloat16, torch.int64):
        state = {k: torch.arange(torch.Size(s).numel()).reshape(s).to(dtype) for k, s in spec.shapes.items()}
        kept = {k: v.clone() for k, v in state.items()}
        new = apply(spec, permutations, state)
        assert all(torch.equal(state[k], kept[k]) for k in state)
        assert new["up"].dtype == dtype
        e, h = 1, 2
        source = (int(permutations["up"][e]), int(permutations[f"up#2[{e}]"][h]))
        assert torch.equal(new["up"][e, :, h], state["up"][source[0], :, source[1]])
    meta = apply(spec, permutations, {k: torch.empty(s, device="meta") for k, s in spec.shapes.items()})
    assert meta["up"].is_meta


def test_a_restricted_family_cannot_be_inverted_when_outer_units_move() -> None:
    spec = discover(build(Attention), X).restrict(["q", "v[0]"])
    assert spec.invert({"v[0]": torch.tensor([1, 2, 3, 0])})["v[0]"].tolist() == [3, 0, 1, 2]
    with pytest.raises(
        SymmetryError, match=r"group 'v\[0\]' is nested in \{'q': 0\}, but the spec has no group"
    ):
        spec.invert({"q": torch.tensor([1, 2, 0]), "v[0]": torch.tensor([1, 2, 3, 0])})
    with pytest.raises(SymmetryError, match="no group named 'x'"):
        spec.invert({"x": torch.arange(2)})


def test_wrong_nesting_is_caught_by_verification() -> None:
    """Dimensions of heads that are tied in truth: one group for each head must fail."""

    class Tied(Attention):
        def forward(self, x: Tensor) -> Tensor:
            b, t, _ = x.shape
            return self.out(self.v(x).view(b, t, HEADS, EACH).softmax(2).reshape(b, t, -1))

    model = build(Tied)
    spec = discover(model, X)
    wrong = {
        f"v[{k}]": AxisGroup(
            f"v[{k}]",
            EACH,
            tuple(
                Slot(n, a, IndexMap(12, EACH, EACH * k))
                for n, a in (("v.weight", 0), ("v.bias", 0), ("out.weight", 1))
            ),
        )
        for k in range(HEADS)
    }
    found = verify(SymmetrySpec(wrong, (), spec.shapes), model, X)
    assert found.guilty == ("v[0]", "v[1]", "v[2]")
    assert described(spec)
