"""Several layers in one tensor, and attention written with ``einsum``: what a reader would name, found and verified."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from symmetry_helpers import Net, build, check, group, normal, seeded
from torch import Tensor, nn

import isthmus
from isthmus.symmetry import SymmetrySpec, discover, verify

X = normal(2, 5, 6)
HEADS = {3: 1, 4: 6}
"""Heads, and for each of them its query-key and its value dimensions."""


def sizes(spec: SymmetrySpec) -> dict[int, int]:
    return dict(Counter(g.size for g in spec.groups.values()))


def attend(q: Tensor, k: Tensor, v: Tensor, layout: str = "bnhd") -> Tensor:
    if layout == "bnhd":
        scores = torch.einsum("bihd,bjhd->bhij", q, k)
        return torch.einsum("bhij,bjhd->bihd", scores.softmax(-1), v)
    scores = torch.einsum("b h i d, b h j d -> b h i j", q, k)
    return torch.einsum("bhij,bhjd->bhid", scores.softmax(-1), v)


def fused_heads_first(m: Any, x: Tensor) -> Tensor:
    q, k, v = torch.einsum("bnc,thcd->tbhnd", x, m.w).unbind(0)
    return torch.einsum("bhnd,hde->bne", attend(q, k, v, "bhnd"), m.o)


def fused_by_index(m: Any, x: Tensor) -> Tensor:
    qkv = torch.einsum("bnc,thcd->tbnhd", x, m.w)
    return torch.einsum("bnhd,hde->bne", attend(qkv[0] * 0.5, qkv[1], qkv[2]), m.o)


def fused_in_the_middle(m: Any, x: Tensor) -> Tensor:
    qkv = torch.einsum("bnc,thcd->bnthd", x, m.w) + m.b
    return torch.einsum("bnhd,hde->bne", attend(qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, -1]), m.o)


def scaled_by_constants(m: Any, x: Tensor) -> Tensor:
    qkv = torch.einsum("bnc,thcd->bnthd", x, m.w) * torch.tensor([0.5, 1.0, 2.0])[:, None, None]
    return torch.einsum("bnhd,hde->bne", attend(qkv[:, :, 0], qkv[:, :, 1:][:, :, 0], qkv[:, :, 2]), m.o)


def parts_by_index(m: Any, x: Tensor) -> Tensor:
    q, k, v = (torch.einsum("bnc,hcd->bnhd", x, m.w[i]) + m.b[i] for i in range(3))
    return torch.einsum("bnhd,hde->bne", attend(q, k, v), m.o)


def parts_by_unbinding(m: Any, x: Tensor) -> Tensor:
    q, k, v = (torch.einsum("bnc,hcd->bhnd", x, w) for w in m.w.unbind(0))
    return torch.einsum("bhnd,hde->bne", attend(q, k, v, "bhnd"), m.o)


def batched_product(m: Any, x: Tensor) -> Tensor:
    q, k, v = (x[:, None, None] @ m.w).unbind(1)
    return torch.einsum("bhnd,hde->bne", attend(q, k, v, "bhnd"), m.o)


def queries_apart(m: Any, x: Tensor) -> Tensor:
    kv = torch.einsum("bnc,thcd->tbnhd", x, m.w[1:])
    return torch.einsum("bnhd,hde->bne", attend(torch.einsum("bnc,hcd->bnhd", x, m.w[0]), kv[0], kv[1]), m.o)


FUSED = [
    fused_heads_first, fused_by_index, fused_in_the_middle, scaled_by_constants, parts_by_index, parts_by_unbinding,
    batched_product, queries_apart,
]  # fmt: skip


@pytest.mark.parametrize("forward", FUSED)
def test_attention_of_one_tensor(forward: Callable[..., Tensor]) -> None:
    """Written by hand: heads move in all three together; inside a head queries with keys, values with the output."""
    parts = {"w": (3, 3, 6, 4), "o": (3, 4, 2)}
    if forward in (fused_in_the_middle, parts_by_index):
        parts["b"] = (3, 3, 4)
    spec = check(build(lambda: Net(forward, **parts)), X, every_slot=False)
    assert sizes(spec) == HEADS
    slots = {str(s) for g in spec.groups.values() for s in g.slots if s.tensor == "w"}
    assert {f"w[3] at [0] {t}, [1] {h}" for t in range(3) for h in range(3)} <= slots
    assert "w[1]" in slots, "queries, keys and values heads move alike: one slot"


def test_attention_of_three_tensors() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        q, k, v = (torch.einsum("bnc,chd->bhnd", x, w) for w in (m.q, m.k, m.v))
        return torch.einsum("bhnd,hde->bne", attend(q, k, v, "bhnd"), m.o)

    parts = {**dict.fromkeys("qkv", (6, 3, 4)), "o": (3, 4, 2)}
    assert sizes(check(build(lambda: Net(forward, **parts)), X, every_slot=False)) == HEADS


def residual(m: Any, x: Tensor) -> Tensor:
    h = x @ m.e
    for i in range(2):
        h = h + torch.tanh(h @ m.up[i] + m.b[i]) @ m.down[i]
    return h @ m.o


def residual_unbound(m: Any, x: Tensor) -> Tensor:
    h = x @ m.e
    for up, b, down in zip(m.up.unbind(0), m.b.unbind(0), m.down.unbind(0), strict=True):
        h = h + torch.tanh(h @ up + b) @ down
    return h @ m.o


def residual_transposed(m: Any, x: Tensor) -> Tensor:
    h, up = x @ m.e, m.up.permute(1, 0, 2).contiguous()
    for i in range(2):
        h = h + torch.tanh(h @ up[:, i] + m.b.chunk(2)[i].squeeze(0)) @ m.down.view(2, 4, 7)[i]
    return h @ m.o


def residual_viewed(m: Any, x: Tensor) -> Tensor:
    h = x @ m.e
    for i in range(2):
        h = h + torch.tanh(h @ m.up.flatten(0, 1).view(2, 7, 4)[i] + m.b[i]) @ m.down.flip(0)[1 - i]
    return h @ m.o


@pytest.mark.parametrize("forward", [residual, residual_unbound, residual_transposed, residual_viewed])
def test_layers_of_a_residual_stream_in_one_tensor(forward: Callable[..., Tensor]) -> None:
    """Written by hand: the stream is one for all layers, the hidden units of each layer are its own."""
    parts = {"e": (6, 7), "up": (2, 7, 4), "b": (2, 4), "down": (2, 4, 7), "o": (7, 2)}
    spec = check(build(lambda: Net(forward, **parts)), X)
    assert sizes(spec) == {7: 1, 4: 2}
    hidden = {frozenset(map(str, g.slots)) for g in spec.groups.values() if g.size == 4}
    assert hidden == {
        frozenset({f"up[2] at [0] {i}", f"b[1] at [0] {i}", f"down[1] at [0] {i}"}) for i in range(2)
    }


def test_a_chain_of_layers_in_one_tensor() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        h = torch.tanh(x @ m.first)
        for i in range(2):
            h = torch.tanh(h @ m.w[i] + m.b[i])
        return h @ m.o

    expected = {
        group(4, "first[1]", "w[1] at [0] 0"),
        group(4, "w[2] at [0] 0", "b[1] at [0] 0", "w[1] at [0] 1"),
        group(4, "w[2] at [0] 1", "b[1] at [0] 1", "o[0]"),
    }
    check(build(lambda: Net(forward, first=(6, 4), w=(2, 4, 4), b=(2, 4), o=(4, 2))), X, expected)


def test_segments_of_unequal_length() -> None:
    """Written by hand: one layer of its own, then two that may change places, each with its own units."""

    def forward(m: Any, x: Tensor) -> Tensor:
        a, b = m.w.split([1, 2], 0)
        one = torch.tanh(torch.einsum("bnc,tcd->bntd", x, a)).sum(2) @ m.o
        return one + torch.tanh(torch.einsum("bnc,tcd->bntd", x, b)).flatten(2) @ m.p

    spec = check(build(lambda: Net(forward, w=(3, 6, 4), o=(4, 2), p=(8, 2))), X)
    assert sizes(spec) == {4: 3, 2: 1}
    outer = next(g for g in spec.groups.values() if g.size == 2)
    assert "w[0] (1+2/1 of 3)" in set(map(str, outer.slots))


def test_rows_are_looked_up_beside_segments() -> None:
    """The segments are on the last axis, where an index of their number is not one for each of them."""

    def forward(m: Any, x: Tensor) -> Tensor:
        w = m.w.index_select(0, torch.tensor([3, 0]))
        return torch.tanh(x[..., :2] @ w[..., 0]) @ m.o + torch.tanh(x[..., 3:5] @ w[..., 1]) @ m.p

    spec = check(build(lambda: Net(forward, w=(6, 4, 2), o=(4, 2), p=(4, 2))), X, every_slot=False)
    assert sizes(spec)[4] == 2


def test_a_gate_of_one_tensor_ties_its_halves() -> None:
    model = build(lambda: Net(lambda m, x: (F.silu(x @ m.w[0]) * (x @ m.w[1])) @ m.o, w=(2, 6, 4), o=(4, 3)))
    check(model, X, {group(4, "w[2]", "o[0]")}, every_slot=False)


@pytest.mark.parametrize(
    "use",
    [
        lambda m, x: torch.tanh(x @ m.w[0] + x @ m.w[1]) @ m.o + torch.tanh(x @ m.w[0]) @ m.p,
        lambda m, x: (
            torch.tanh(x @ m.w[0]) @ m.o + torch.tanh(x @ m.w[1]) @ m.p + torch.tanh(x @ m.w.sum(0)) @ m.o
        ),
        lambda m, x: torch.tanh(x @ m.w.softmax(0)[0]) @ m.o + torch.tanh(x @ m.w[1]) @ m.p,
    ],
)
def test_layers_that_meet_are_tied(use: Callable[..., Tensor]) -> None:
    assert sizes(check(build(lambda: Net(use, w=(2, 6, 4), o=(4, 2), p=(4, 2))), X)) == {4: 1}


def written_over(t: Tensor) -> Tensor:
    """Rows of a table in which one was replaced; all that stand there now are read."""
    return torch.stack([t[i] for i in range(5)]) + t[5] + t[6] + t[7]


@pytest.mark.parametrize(
    "rows",
    [
        lambda m: m.table[:5],
        lambda m: (m.table * 2)[:5],
        lambda m: m.table.split([5, 3])[0],
        lambda m: m.table.tanh().narrow(0, 0, 5),
        lambda m: torch.stack([m.table[i] for i in range(5)]),
        lambda m: torch.stack(m.table.unbind(0)[:5]),
        lambda m: m.table[torch.arange(5)],
        lambda m: written_over(torch.select_scatter(m.table, m.table[0], 0, 6)),
        lambda m: written_over(torch.slice_scatter(m.table, m.table[:2] * 2, 0, 5, 7)),
    ],
)
def test_rows_that_the_example_does_not_reach_move_with_the_others(rows: Callable[..., Tensor]) -> None:
    """A longer input reaches them, and a relabelling must hold for it too."""

    def forward(m: Any, x: Tensor) -> Tensor:
        return torch.tanh(m.embed(x) + rows(m)) @ m.o

    def longer(m: Any, x: Tensor) -> Tensor:
        return torch.tanh(m.embed(x) + m.table[:7]) @ m.o

    parts = {"embed": nn.Linear(6, 4), "table": (8, 4), "o": (4, 2)}
    model, other = build(lambda: Net(forward, **parts)), build(lambda: Net(longer, **parts))
    spec = check(model, X, every_slot=False)
    moving = next(g for g in spec.groups.values() if any(s.tensor == "embed.weight" for s in g.slots))
    assert {str(s) for s in moving.slots} >= {"table[1]"} or sum(
        index.covered for s in moving.slots if s.tensor == "table" for _, index in s.block
    ) == 8
    other.load_state_dict(isthmus.apply(spec.restrict([moving.name]), {moving.name: torch.tensor([1, 2, 3, 0])},
                                        model.state_dict()))  # fmt: skip
    x = normal(2, 7, 6)
    right = build(lambda: Net(longer, **parts))
    torch.testing.assert_close(other(x), right(x))


def test_slots_in_segments_pass_through_files_and_matching() -> None:
    parts = {"e": (6, 7), "up": (2, 7, 4), "b": (2, 4), "down": (2, 4, 7), "o": (7, 2)}
    a = build(lambda: Net(residual, **parts))
    spec = discover(a, X)
    again = SymmetrySpec.from_json(spec.to_json())
    assert again == spec
    assert [list(map(str, g.slots)) for g in again.groups.values()] == [
        list(map(str, g.slots)) for g in spec.groups.values()
    ]
    turned = {n: torch.randperm(g.size, generator=seeded(3)) for n, g in spec.groups.items()}
    b = build(lambda: Net(residual, **parts))
    b.load_state_dict(isthmus.apply(spec, turned, a.state_dict()))
    torch.testing.assert_close(b(X), a(X))
    for method in ("weights", "activations"):
        found = isthmus.align(a, b, batches=[X], method=method).apply(b)
        for name, tensor in a.state_dict().items():
            torch.testing.assert_close(found.state_dict()[name], tensor)


@pytest.mark.parametrize("how", ["plain", "parametrised"])
def test_dilated_gated_residual_blocks(how: str) -> None:
    """Written by hand: the stream, the skips, and the gated units of each block; filters and gates in one layer."""

    def layer(inner: int, outer: int, size: int, dilation: int = 1) -> nn.Module:
        made = nn.Conv1d(inner, outer, size, dilation=dilation)
        return made if how == "plain" else nn.utils.parametrizations.weight_norm(made)

    def forward(m: Any, x: Tensor) -> Tensor:
        h, total = m.inputs(x), torch.zeros(())
        for k in range(2):
            filtered, gate = m.get_submodule(f"both{k}")(F.pad(h, (2**k, 0))).chunk(2, 1)
            z = m.get_submodule(f"mixed{k}")(filtered.tanh() * gate.sigmoid())
            h, total = h + z[:, :7], total + z[:, 7:]
        return m.outputs(torch.cat([total.relu(), h], 1))

    parts = {"inputs": layer(6, 7, 1), "outputs": layer(16, 2, 1)}
    for k in range(2):
        parts |= {f"both{k}": layer(7, 16, 2, dilation=2**k), f"mixed{k}": layer(8, 16, 1)}
    spec = check(build(lambda: Net(forward, **parts)), normal(2, 6, 10), every_slot=False)
    assert sizes(spec) == {9: 1, 8: 2, 7: 1}
    assert spec.fraction_moved > 0.98
    assert verify(spec, build(lambda: Net(forward, **parts)), normal(2, 6, 10)).passed
