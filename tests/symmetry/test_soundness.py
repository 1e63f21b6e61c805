"""Traps: modules on which a careless rule would move what the function feels. Nothing claimed may be wrong."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from symmetry_helpers import Net, build, check, group, normal
from torch import Tensor, nn

from isthmus import SymmetryError
from isthmus.symmetry import Value, _axes, discover, strict_rules, verify
from isthmus.symmetry._axes import ONE
from isthmus.symmetry._segments import Stacked, moved

X = normal(4, 5)
TURN = torch.tensor([1, 2, 0])
WIDE = TURN[None, :, None].expand(4, 3, 4)


def sizes(model: nn.Module, *inputs: Tensor) -> list[int]:
    spec = check(model, inputs, every_slot=False)
    return sorted(g.size for g in spec.groups.values())


def heads(function: Callable[..., Tensor], **parts: Any) -> nn.Module:
    """Three heads of four dimensions, worked on by ``function(m, h)``, then mixed."""

    def forward(m: Any, x: Tensor) -> Tensor:
        return m.b(function(m, m.a(x).view(-1, 3, 4)).reshape(-1, 12))

    return build(lambda: Net(forward, a=nn.Linear(5, 12), b=nn.Linear(12, 3), **parts))


def _reflected(_: Any, h: Tensor) -> Tensor:
    padded = F.pad(h.transpose(1, 2), (2, 1), mode="reflect").transpose(1, 2)
    return h + padded[:, :3] + padded[:, 3:]


def _written(_: Any, h: Tensor) -> Tensor:
    new = h.clone()
    new[:, [1, 2]] = h[:, :2]
    return new + h


# --- Entries brought to another head: the heads' dimensions must stay alike ------------------------------------
SHARED: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "indexed": lambda _, h: h + h[:, TURN],
    "selected": lambda _, h: h + h.index_select(1, TURN),
    "gathered": lambda _, h: h + h.gather(1, WIDE),
    "taken": lambda _, h: h + torch.take_along_dim(h, TURN[None, :, None], 1),
    "scattered": lambda _, h: h + h.scatter(1, WIDE, h),
    "scattered and added": lambda _, h: h.scatter_add(1, WIDE, h),
    "added at an index": lambda _, h: h.index_add(1, TURN, h),
    "copied to an index": lambda _, h: h + h.index_copy(1, TURN, h),
    "written at an index": _written,
    "rolled": lambda _, h: h + h.roll(1, 1),
    "flipped": lambda _, h: h + h.flip(1),
    "summed so far": lambda _, h: h.cumsum(1),
    "reflected": _reflected,
}


@pytest.mark.parametrize("name", SHARED)
def test_dimensions_of_heads_that_meet_move_alike(name: str) -> None:
    assert sizes(heads(SHARED[name]), X) == [4]


@pytest.mark.parametrize("way", ["index", "gather", "scatter"])
def test_a_choice_among_the_heads_themselves_ties_their_dimensions(way: str) -> None:
    def choose(m: Any, h: Tensor) -> Tensor:
        best = m.scores.argmax(-1)
        if way == "index":
            return h + h[:, best]
        wide = best[None, :, None].expand(4, 3, 4)
        return h + h.gather(1, wide) if way == "gather" else h.scatter_add(1, wide, h)

    assert sizes(heads(choose, scores=(3, 3)), X) == [3, 4]


# --- Positions found by the network ---------------------------------------------------------------------------
def looked_up(
    index: Callable[[Tensor], Tensor], first: Callable[[Tensor], Tensor] = F.leaky_relu
) -> nn.Module:
    return build(lambda: Net(lambda m, x: m.table[index(first(m.a(x)))], a=nn.Linear(5, 6), table=(6, 3)))


MOVES = group(6, "a.weight[0]", "a.bias[0]", "table[0]")


def test_a_unique_choice_moves_with_what_it_counts() -> None:
    check(looked_up(lambda h: h.argmax(-1)), X, {MOVES}, every_slot=False)
    check(looked_up(lambda h: h.topk(2).indices[:, :1].contiguous()), X, {MOVES}, every_slot=False)
    check(looked_up(lambda h: h.argmax(-1), lambda h: h.softmax(-1) * 2), X, {MOVES}, every_slot=False)


@pytest.mark.parametrize(
    "saturate",
    [
        lambda h: (h - 3).relu(),
        lambda h: (h - 3).clamp(min=0).softmax(-1),
        lambda h: h.clamp(-0.1, 0.1).view(-1, 2, 3).flatten(1),
        lambda h: (h > 0).to(h.dtype) * h.abs().amax(),
        lambda h: h.round().chunk(1, -1)[0],
        lambda h: (h * 2).long(),
        torch.tanh,
        torch.sigmoid,
    ],
)
def test_equal_entries_are_told_apart_by_their_order(saturate: Callable[[Tensor], Tensor]) -> None:
    model = looked_up(lambda h: h.argmax(-1), saturate)
    assert check(model, X, set(), every_slot=False).groups == {}


@pytest.mark.parametrize(
    "change",
    [
        lambda i: F.pad(i, (0, 1)),
        lambda i: i.tril(),
        lambda i: i + 1,
        lambda i: torch.where(X[:, :2] > 0, i, 0),
        lambda i: torch.cat([i, torch.zeros(4, 1, dtype=torch.long)], 1),
        lambda i: i.sort(-1).values,
    ],
)
def test_positions_that_are_changed_are_numbers(change: Callable[[Tensor], Tensor]) -> None:
    model = looked_up(lambda h: change(h.topk(2).indices) % 6)
    assert sizes(model, X) == []


def test_the_last_of_several_entries_for_one_position_stays() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        index = m.scores.argmax(-1)[None].expand(4, 8)
        zeros = torch.zeros(4, 6)
        return m.b(zeros.scatter_add(1, index, m.a(x)) if m.add else zeros.scatter(1, index, m.a(x)))

    for add, expected in ((True, [6, 8]), (False, [6])):
        model = build(lambda: Net(forward, a=nn.Linear(5, 8), b=nn.Linear(6, 3), scores=(8, 6)))
        model.add = add  # type: ignore[assignment]
        assert sizes(model, X) == expected


# --- Given states of recurrent layers -------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("kind", "settings"), [("LSTM", {"num_layers": 2}), ("GRU", {"bidirectional": True})]
)
@pytest.mark.parametrize("batch", [1, 2])
def test_layers_and_examples_of_a_given_state_stay(kind: str, settings: dict[str, Any], batch: int) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        states = [s.expand(-1, 2, -1).contiguous() for s in (m.h, m.c)]
        return m.out(m.layer(x, tuple(states) if kind == "LSTM" else states[0])[0])

    out = nn.Linear(8 if kind == "GRU" else 4, 2)
    parts = {"layer": getattr(nn, kind)(5, 4, **settings), "out": out, "h": (2, batch, 4), "c": (2, batch, 4)}
    assert sizes(build(lambda: Net(forward, **parts)), normal(3, 2, 5)) == [4]


@pytest.mark.parametrize("kind", ["LSTMCell", "GRUCell", "RNNCell"])
def test_examples_of_a_cell_state_stay(kind: str) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        state = m.layer(x, (m.h, m.h) if kind == "LSTMCell" else m.h)
        return m.out(state[0] if kind == "LSTMCell" else state)

    parts = {"layer": getattr(nn, kind)(5, 4), "out": nn.Linear(4, 2), "h": (2, 4)}
    assert sizes(build(lambda: Net(forward, **parts)), normal(2, 5)) == [4]


@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
def test_states_handed_from_encoder_to_decoder_keep_layers_apart(kind: str) -> None:
    """Layer by layer the units of both are tied, crosswise where layers are handed over in reverse."""

    def forward(m: Any, x: Tensor, y: Tensor) -> Tensor:
        state = m.encoder(x)[1]
        if m.reverse:
            state = tuple(s.flip(0) for s in state) if kind == "LSTM" else state.flip(0)
        return m.out(m.decoder(y, state)[0])

    layer = getattr(nn, kind)
    for reverse in (False, True):
        parts = {"encoder": layer(5, 4, 2), "decoder": layer(6, 4, 2), "out": nn.Linear(4, 2)}
        model = build(lambda parts=parts: Net(forward, **parts))
        model.reverse = reverse  # type: ignore[assignment]
        assert sizes(model, normal(3, 2, 5), normal(4, 2, 6)) == [4, 4]
        groups = discover(model, (normal(3, 2, 5), normal(4, 2, 6))).groups.values()
        first = next(
            g for g in groups if any(s.tensor == "encoder.weight_ih_l0" and s.axis == 0 for s in g.slots)
        )
        assert f"decoder.weight_ih_l{int(reverse)}" in {s.tensor for s in first.slots if s.axis == 0}


# --- Writing in place ------------------------------------------------------------------------------------------
KEPT = group(6, "a.weight[0]", "a.bias[0]", "b.weight[1]")
ROWS = torch.tensor([True, False, True, True])


def _masked(value: Callable[[Any], Any], wide: bool = False) -> Callable[[Any, Tensor], Tensor]:
    def forward(m: Any, x: Tensor) -> Tensor:
        h = m.a(x).clone()
        h[ROWS[:, None].repeat(1, 6) if wide else ROWS] = value(m)
        return m.b(h)

    return forward


def _row_list(m: Any, x: Tensor) -> Tensor:
    h = m.a(x).clone()
    h[[0, 2]] = m.row
    return m.b(h)


def _interleaved(m: Any, x: Tensor) -> Tensor:
    h = m.a(x)
    new = torch.empty_like(h)
    new[:, 0::2] = 2 * h[:, 0::2] - h[:, 1::2]
    new[:, 1::2] = h[:, 1::2] + h[:, 0::2]
    return m.b(new)


@pytest.mark.parametrize(
    ("forward", "expected"),
    [
        (_masked(lambda m: 0.0), {KEPT}),
        (_masked(lambda m: 0.0, wide=True), {KEPT}),
        (_masked(lambda m: m.row), {group(6, "a.weight[0]", "a.bias[0]", "row[0]", "b.weight[1]")}),
        (_row_list, {group(6, "a.weight[0]", "a.bias[0]", "row[0]", "b.weight[1]")}),
        (
            _interleaved,
            {group(3, "a.weight[0] (3/2 ×2/1 of 6)", "a.bias[0] (3/2 ×2/1 of 6)", "b.weight[1] (3/2 ×2/1 of 6)")},
        ),
    ],
    ids=["mask", "wide mask", "masked rows", "listed rows", "every second"],
)  # fmt: skip
def test_what_is_written_in_place(forward: Callable[..., Tensor], expected: Any) -> None:
    model = build(lambda: Net(forward, a=nn.Linear(5, 6), b=nn.Linear(6, 3), row=(6,)))
    check(model, X, expected, unseen=frozenset() if "row" in str(expected) else frozenset({"row"}))


@pytest.mark.parametrize("write", ["columns", "filled", "several masks"])
def test_what_is_written_at_units_fixes_them(write: str) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        h = m.a(x).clone()
        if write == "columns":
            h[:, [3, 1]] = x[:, :2]
        elif write == "filled":
            h = h.index_fill(1, torch.tensor([0, 5]), 0.0)
        else:
            h[ROWS, torch.arange(6)[:3]] = 1.0
        return m.b(h)

    assert sizes(build(lambda: Net(forward, a=nn.Linear(5, 6), b=nn.Linear(6, 3))), X) == []


# --- Forms that a rule cannot read pin, and nothing crashes ----------------------------------------------------
def test_operands_of_unequal_rank_are_compared() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        h = m.a(x)
        return F.cosine_similarity(h, m.point, dim=-1) + F.pairwise_distance(h, m.point)

    expected = {group(6, "a.weight[0]", "a.bias[0]", "point[0]")}
    check(build(lambda: Net(forward, a=nn.Linear(5, 6), point=(6,))), X, expected)


def test_a_rule_that_fails_or_answers_in_another_shape_pins(monkeypatch: pytest.MonkeyPatch) -> None:
    from isthmus.symmetry import _operation
    from isthmus.symmetry._values import Value

    def fails(op: Any, **_: Any) -> Any:
        raise ValueError("no such form")

    def misses(op: Any, x: Any, **_: Any) -> Any:
        return Value(x.axes[:-1])

    model = build(lambda: Net(lambda m, x: m.b(m.a(x).softmax(-1)), a=nn.Linear(5, 6), b=nn.Linear(6, 3)))
    for wrong, found in (
        (fails, "it raised ValueError: no such form"),
        (misses, "it answered in another shape"),
    ):
        monkeypatch.setitem(_operation._RULES, "aten.softmax", (wrong, "mixes"))
        with pytest.raises(
            SymmetryError, match=rf"the rule for aten\.softmax in module .*softmax\.int.*{found}"
        ):
            check(model, X, set(), every_slot=False)
        with strict_rules(False):
            spec = check(model, X, set(), every_slot=False)
        (pinned,) = (p for p in spec.pinned if p.tensor == "a.bias")
        assert pinned.reason == "the rule does not know this form of the operator"
        assert pinned.operator == "aten.softmax"


@pytest.mark.parametrize("join", [torch.cat, torch.stack])
def test_choices_put_together_still_count_one_axis(join: Callable[..., Tensor]) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        scores = m.a(x)
        best = scores.argmax(-1, keepdim=True)
        second = scores.argmin(-1, keepdim=True)
        return m.table[join([best, second], -1)].flatten(1)

    model = build(lambda: Net(forward, a=nn.Linear(5, 6), table=(6, 3)))
    check(model, X, {MOVES}, every_slot=False)


def test_choices_on_axes_of_unequal_length_are_numbers() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.table[torch.stack([m.a(x).argmax(-1), m.c(x).argmax(-1)], -1)]

    model = build(lambda: Net(forward, a=nn.Linear(5, 6), c=nn.Linear(5, 4), table=(6, 3)))
    assert sizes(model, X) == []


class _RescalesItself(nn.Module):
    """Changes its own weights in the first call of evaluation, as RWKV does."""

    def __init__(self, change: Callable[[Tensor], object]) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(3, 5), nn.Linear(5, 2)
        self.change, self.done = change, False

    def forward(self, x: Tensor) -> Tensor:
        if not self.done:
            with torch.no_grad():
                self.change(self.first.weight)
            self.done = True
        return self.last(self.first(x).relu())


@pytest.mark.parametrize(
    ("change", "moves", "acts"),
    [
        (lambda w: w.div_(2), True, "positive"),
        (lambda w: w.clamp_(-1, 1), True, "permutation"),
        (lambda w: w[0].mul_(2), False, None),
        (lambda w: w.copy_(w.roll(1, 0)), False, None),
    ],
)
def test_weights_that_a_call_computes_anew_move_as_they_did(
    change: Callable[[Tensor], object], moves: bool, acts: str | None
) -> None:
    """What is made of a weight from the state alone must move and scale like the weight, and need not stay."""
    model = _RescalesItself(change).eval()
    found = discover(model, torch.randn(4, 3))
    assert [g.acts for g in found.groups.values() if g.size == 5] == ([acts] if moves else [])
    assert verify(found, model, torch.randn(4, 3)).passed


def test_positions_in_segments_keep_no_segments_apart() -> None:
    """Relative position tables are looked up by positions that were put together: nothing is known of their order."""
    part = Value((ONE, _axes.fresh(4)))
    both = Stacked(0, (part, part))
    lookup = SimpleNamespace(name="aten.index", shape=(2, 4))
    assert moved(lookup, both, {"x": both, "indices": [Stacked(0, (Value((ONE,)), Value((ONE,))))]}) is None  # type: ignore[arg-type]
    counted = Value((_axes.fresh(2),), run=0)
    assert isinstance(moved(lookup, both, {"x": both, "indices": [counted]}), Stacked)  # type: ignore[arg-type]
