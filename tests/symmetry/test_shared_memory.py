"""Tensors that share memory move together or not at all, and what calls leave behind is felt by later ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from symmetry_helpers import build, described, group, normal, seeded
from torch import Tensor, nn

import isthmus
from isthmus.errors import CheckpointError, ModelError
from isthmus.evaluation import bind, combine_states
from isthmus.replica import with_state
from isthmus.states import state_of
from isthmus.symmetry import discover, verify

X = normal(4, 3)


class Twice(nn.Module):
    """A table of six words: its columns are units; the second holder of its memory reads them out."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.stem, self.table = nn.Linear(3, 6), nn.Linear(6, 5, bias=False)
        weight = self.table.weight
        if how == "the same":
            self.again = weight
        elif how == "a parameter of it":
            self.again = nn.Parameter(weight)
        elif how == "its data":
            self.again = nn.Parameter(weight.data)
        elif how == "a buffer":
            self.register_buffer("again", weight.data)
        elif how == "a buffer that is not saved":
            self.register_buffer("again", weight.data, persistent=False)
        elif how == "a list":
            self.held = [weight]
        elif how == "some rows":
            self.again = nn.Parameter(weight.data[:3])
        elif how == "its transpose":
            self.again = nn.Parameter(weight.data.t())
        elif how == "rows of a list":
            self.held = [weight.data[:3]]

    def forward(self, x: Tensor) -> Tensor:
        again = self.held[0] if hasattr(self, "held") else self.again
        if self.how == "its transpose":
            again = again.t()
        h = self.stem(x).relu()
        return self.table(h) + ((h @ again.T).tanh().sum(-1, keepdim=True))


ONE = ["the same", "a parameter of it", "its data", "a buffer", "a buffer that is not saved", "a list"]
PARTS = ["some rows", "its transpose", "rows of a list"]


@pytest.mark.parametrize("how", ONE)
def test_one_memory_under_two_names_moves_as_one(how: str) -> None:
    model = _tied(how)
    names = [n for n in ("again", "table.weight") if n in model.state_dict()]
    expected = group(6, "stem.weight[0]", "stem.bias[0]", *(f"{n}[1]" for n in names))
    spec = discover(model, X)
    assert described(spec) == {expected}
    assert verify(spec, model, X, generator=seeded(1)).passed
    for name in names if len(names) > 1 else ():
        slot = next(s for s in next(iter(spec.groups.values())).slots if s.tensor == name)
        torn = spec.without_slot(next(iter(spec.groups)), slot)
        assert verify(torn, model, X, draws=1).max_relative_error == float("inf")


@pytest.mark.parametrize("how", PARTS)
def test_memory_that_overlaps_in_part_is_pinned(how: str) -> None:
    model = _tied(how)
    spec = discover(model, X)
    assert spec.groups == {}
    assert any(
        "shares a part of its memory with" in p.reason for p in spec.pinned if p.tensor == "table.weight"
    )
    assert verify(spec, model, X).passed


@pytest.mark.parametrize("how", [*ONE, *PARTS])
def test_apply_loading_and_running_agree(how: str) -> None:
    a, b = _tied(how, 0), _tied(how, 1)
    right = b(X).detach()
    alignment = isthmus.align(a, b, args=X, method="weights")
    turned = {name: torch.arange(g.size).roll(1) for name, g in alignment.spec.groups.items()}
    moved = isthmus.Alignment(turned, alignment.spec, "turned")
    state = moved.apply(state_of(b))
    for found in (
        moved.apply(b)(X),
        with_state(a, state)(X),
        bind(a, state)(isthmus.Batch((X,))),
        with_state(a, combine_states([state, state], lambda pair: (pair[0] + pair[1]) / 2))(X),
    ):
        torch.testing.assert_close(found.detach(), right, rtol=0, atol=1e-5)
    loss = (
        isthmus.line(a, b, [(X, torch.arange(4))], points=2, alignment=moved, bootstrap=0).curves["data"].loss
    )
    assert float(loss[-1]) == pytest.approx(
        float(nn.functional.cross_entropy(right, torch.arange(4))), abs=1e-5
    )


def test_states_that_tear_shared_memory_are_refused() -> None:
    for how, said in (
        ("its data", "share memory"),
        ("some rows", "share memory"),
        ("the same", "are one tensor"),
    ):
        model = _tied(how)
        state = {k: v.clone() for k, v in model.state_dict().items()}
        state["again"] += 1
        with pytest.raises(
            CheckpointError, match=rf"'again' and 'table\.weight' {said} in the model but differ"
        ):
            bind(model, state)
        with pytest.raises(CheckpointError, match=f"{said} in the model but differ in the state"):
            with_state(model, state)


def _tied(how: str, seed: int = 0) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Twice(how).eval()


# --- What a call leaves behind -----------------------------------------------------------------------------------
class Remembering(nn.Module):
    """Leaves something behind that the next call tells the units of ``a`` apart by."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.a, self.b = how, nn.Linear(3, 4), nn.Linear(4, 2)
        self.register_buffer("saved", torch.ones(4))
        self.register_buffer("unsaved", torch.ones(4), persistent=False)
        self.first, self.last, self.calls = True, None, 0

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        if self.how == "a first call fills a buffer":
            if self.first:
                self.saved.copy_(h.abs().amax(0))
                self.first = False
            return self.b(h * self.saved)
        if self.how == "a buffer is replaced":
            y = self.b(h) + (self.saved * torch.arange(4.0)).sum()
            self.saved = h.mean(0)
            return y
        if self.how == "an unsaved buffer is written":
            y = self.b(h) + (self.unsaved * torch.arange(4.0)).sum()
            self.unsaved.copy_(h.mean(0))
            return y
        if self.how == "an attribute is set":
            y = self.b(h) if self.last is None else self.b(h * self.last * torch.arange(4.0))
            self.last = h.mean(0)
            return y
        if self.how == "a mask is set":
            y = self.b(h * self.unsaved) if self.calls else self.b(h)
            self.unsaved[:2] = 0
            self.calls += 1
            return y
        self.calls += 1  # calls are counted
        return self.b(h * torch.arange(4.0)) if self.calls > 1 else self.b(h)


@pytest.mark.parametrize(
    "how",
    [
        "a first call fills a buffer",
        "a buffer is replaced",
        "an unsaved buffer is written",
        "an attribute is set",
    ],
)
def test_what_is_left_for_later_calls_is_pinned(how: str) -> None:
    model = build(lambda: Remembering(how))
    spec = discover(model, X)
    assert spec.groups == {}
    assert verify(spec, model, X).passed


@pytest.mark.parametrize(
    "how",
    [
        "a buffer is replaced",
        "an unsaved buffer is written",
        "an attribute is set",
        "a mask is set",
        "calls are counted",
    ],
)
def test_verification_sees_later_calls(how: str) -> None:
    """The units of ``a`` may change places in the first call, and in no later one."""
    model = build(lambda: Remembering(how))
    plain = build(lambda: nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)))
    found = discover(plain, X)
    renamed = found.to_json().replace('"0.', '"a.').replace('"1.', '"b.')
    spec = type(found).from_json(renamed)
    assert [g.size for g in spec.groups.values()] == [4]
    assert not verify(spec, model, X).passed
    assert model.calls == 0
    assert model.last is None


def test_a_buffer_that_the_first_call_filled_stays_in_its_order() -> None:
    model = build(lambda: Remembering("a first call fills a buffer"))
    model(X)
    spec = discover(model, X)
    assert described(spec) == {group(4, "a.weight[0]", "a.bias[0]", "b.weight[1]", "saved[0]")}
    (name,) = spec.groups
    torn = spec.without_slot(name, next(s for s in spec.groups[name].slots if s.tensor == "saved"))
    assert verify(spec, model, X).passed
    assert not verify(torn, model, X).passed


def test_a_constant_of_equal_entries_that_changes_is_pinned() -> None:
    """Laid out in evaluation from a parameter that starts at zero: equal now, not for every state."""

    class Laid(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.shift = nn.Linear(3, 4), nn.Linear(4, 2), nn.Parameter(torch.zeros(4))

        def eval(self) -> Any:
            super().eval()
            self.laid = torch.as_tensor(self.shift.detach().numpy() + 0.0)  # no exporter follows this
            return self

        def forward(self, x: Tensor) -> Tensor:
            return self.b((self.a(x) + self.laid).relu())

    model = Laid().eval()
    spec = discover(model, X)
    assert spec.groups == {}
    assert any("'laid', which the model keeps outside its state" in p.reason for p in spec.pinned)
    with pytest.raises(
        ModelError, match=r"The trace keeps 'laid', which the module computes from its weights"
    ):
        isthmus.dimension(model, [X])
