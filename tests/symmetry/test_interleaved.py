"""Stacks, strides and shuffles: parts that take turns on an axis have nothing to do with each other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from symmetry_helpers import Expected, Net, build, check, group, normal
from torch import Tensor, nn

X = normal(2, 3)


def pair(join: Callable[[Tensor, Tensor], Tensor]) -> nn.Module:
    """Two layers of four units, put together on one axis of eight."""
    parts = {"a": nn.Linear(3, 4), "b": nn.Linear(3, 4), "out": nn.Linear(8, 2)}
    return build(lambda: Net(lambda m, x: m.out(join(m.a(x).tanh(), m.b(x).tanh())), **parts))


def halves(a: str, b: str) -> Expected:
    own = {name: (f"{name}.weight[0]", f"{name}.bias[0]") for name in "ab"}
    return {
        group(4, *own["a"], f"out.weight[1] ({a} of 8)"),
        group(4, *own["b"], f"out.weight[1] ({b} of 8)"),
    }


IN_TURN, ONE_AFTER_THE_OTHER = halves("4/2", "1+4/2"), halves("4/1", "4+4/1")


def shuffled(x: Tensor, groups: int) -> Tensor:
    return x.view(len(x), groups, -1).transpose(1, 2).reshape(len(x), -1)


def written(a: Tensor, b: Tensor) -> Tensor:
    new = torch.zeros(2, 8)
    new[:, ::2], new[:, 1::2] = a, b
    return new


def written_one_by_one(a: Tensor, b: Tensor) -> Tensor:
    new = torch.empty(2, 4, 2)
    new[:, :, 0], new[..., 1] = a, b
    return new.flatten(1)


@pytest.mark.parametrize(
    ("join", "expected"),
    [
        (lambda a, b: torch.stack([a, b], -1).flatten(1), IN_TURN),
        (lambda a, b: torch.stack([a, b], -1).relu().mul(2).reshape(2, 8), IN_TURN),
        (lambda a, b: torch.stack([a, b], 1).view(2, 8), ONE_AFTER_THE_OTHER),
        (lambda a, b: torch.stack([b, a]).flip(0).movedim(0, -1).reshape(2, 8), IN_TURN),
        (lambda a, b: torch.cat([t.exp() for t in torch.stack([a, b]).unbind(0)], 1), ONE_AFTER_THE_OTHER),
        (lambda a, b: torch.cat([a[..., None], b[..., None]], -1).view(2, -1), IN_TURN),
        (lambda a, b: shuffled(torch.cat([a, b], 1), 2), IN_TURN),
        (lambda a, b: shuffled(shuffled(torch.cat([a, b], 1), 2), 4), ONE_AFTER_THE_OTHER),
        (written, IN_TURN),
        (written_one_by_one, IN_TURN),
        (lambda a, b: torch.stack([a, b], 1).softmax(-1).view(2, 8), ONE_AFTER_THE_OTHER),
    ],
    ids=range(11),
)
def test_two_layers_on_one_axis(join: Callable[[Tensor, Tensor], Tensor], expected: Expected) -> None:
    check(pair(join), X, expected)


@pytest.mark.parametrize(
    "join",
    [
        lambda a, b: torch.stack([a, b], 1).softmax(1).view(2, 8),
        lambda a, b: (torch.stack([a, b], -1) @ torch.tensor([[1.0, 2.0], [3.0, 4.0]])).flatten(1),
        lambda a, b: torch.stack([a, b], 1).cumsum(1).view(2, 8),
    ],
)
def test_what_mixes_the_parts_ties_them(join: Callable[[Tensor, Tensor], Tensor]) -> None:
    spec = check(pair(join), X)
    assert sorted(g.size for g in spec.groups.values()) == [4]


def reading(size: int, read: Callable[[Tensor], tuple[Tensor, ...]]) -> nn.Module:
    """One layer, of which parts are read by layers of their own."""
    widths = [t.shape[1] for t in read(torch.zeros(2, size))]
    readers = {f"r{k}": nn.Linear(n, 2) for k, n in enumerate(widths)}

    def forward(m: Any, x: Tensor) -> Tensor:
        return sum(getattr(m, f"r{k}")(t.tanh()) for k, t in enumerate(read(m.a(x))))  # type: ignore[return-value]

    return build(lambda: Net(forward, a=nn.Linear(3, size), **readers))


def split(*parts: str) -> Expected:
    sizes = [int(p.split("+")[-1].split("/")[0]) for p in parts]
    return {
        group(n, f"a.weight[0] ({p})", f"a.bias[0] ({p})", f"r{k}.weight[1]")
        for k, (n, p) in enumerate(zip(sizes, parts, strict=True))
    }


@pytest.mark.parametrize(
    ("size", "read", "expected"),
    [
        (8, lambda h: (h[:, ::2], h[:, 1::2]), split("4/2 of 8", "1+4/2 of 8")),
        (8, lambda h: h.view(2, 4, 2).unbind(-1), split("4/2 of 8", "1+4/2 of 8")),
        (8, lambda h: (h.view(2, 4, 2)[..., 1], h.view(2, 4, 2)[..., 0]), split("1+4/2 of 8", "4/2 of 8")),
        (7, lambda h: (h[:, ::2], h[:, 1::2]), split("4/2 of 7", "1+3/2 of 7")),
        (9, lambda h: (h[:, ::3], h[:, 1::3], h[:, 2::3]), split("3/3 of 9", "1+3/3 of 9", "2+3/3 of 9")),
    ],
)
def test_a_layer_read_in_turn(size: int, read: Callable[..., Any], expected: Expected) -> None:
    check(reading(size, read), X, expected)


def test_an_interleaved_gate_ties_neighbours() -> None:
    model = build(
        lambda: Net(
            lambda m, x: m.b(m.a(x)[:, ::2] * m.a(x)[:, 1::2].sigmoid()), a=nn.Linear(3, 8), b=nn.Linear(4, 2)
        )
    )
    check(model, X, {group(4, "a.weight[0] (4/2 ×2/1 of 8)", "a.bias[0] (4/2 ×2/1 of 8)", "b.weight[1]")})


def test_a_shuffle_of_unequal_parts_keeps_what_stands_in_turn() -> None:
    parts = {"a": nn.Linear(3, 5), "b": nn.Linear(3, 3), "out": nn.Linear(8, 2)}
    model = build(lambda: Net(lambda m, x: m.out(shuffled(torch.cat([m.a(x), m.b(x)], 1), 2)), **parts))
    expected = {
        group(4, "a.weight[0] (4/1 of 5)", "a.bias[0] (4/1 of 5)", "out.weight[1] (4/2 of 8)"),
        group(3, "b.weight[0]", "b.bias[0]", "out.weight[1] (3+3/2 of 8)"),
    }
    check(model, X, expected)


def test_blocks_of_unequal_length_take_turns() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        a, b = m.a(x).tanh().view(2, 4, 1), m.b(x).tanh().view(2, 4, 3)
        return m.out(torch.cat([a, b], 2).flatten(1))

    parts = {"a": nn.Linear(3, 4), "b": nn.Linear(3, 12), "out": nn.Linear(16, 2)}
    spec = check(build(lambda: Net(forward, **parts)), X)
    assert sorted(g.size for g in spec.groups.values()) == [3, 3, 3, 3, 4, 4]
    slots = {str(s) for g in spec.groups.values() for s in g.slots if s.tensor == "out.weight"}
    assert {"out.weight[1] (4/4 of 16)", "out.weight[1] (1+4/4 ×3/1 of 16)"} <= slots


def test_images_pass_a_shuffle_and_a_pixel_shuffle() -> None:
    """Written by hand: the halves that meet in the shuffle, then three channels of four pixels each."""

    def forward(m: Any, x: Tensor) -> Tensor:
        a, b = m.a(x).relu(), m.b(x).relu()
        both = torch.cat([a, b], 1).unflatten(1, (2, 6)).transpose(1, 2).flatten(1, 2)
        return m.out(torch.nn.functional.pixel_shuffle(m.c(both).relu(), 2))

    parts = {"a": nn.Conv2d(3, 6, 1), "b": nn.Conv2d(3, 6, 3, padding=1), "c": nn.Conv2d(12, 12, 1)}
    model = build(lambda: Net(forward, **parts, out=nn.Conv2d(3, 2, 1)))
    expected = {
        group(6, "a.weight[0]", "a.bias[0]", "c.weight[1] (6/2 of 12)"),
        group(6, "b.weight[0]", "b.bias[0]", "c.weight[1] (1+6/2 of 12)"),
        group(3, "c.weight[0] (3/4 ×4/1 of 12)", "c.bias[0] (3/4 ×4/1 of 12)", "out.weight[1]"),
    }
    check(model, normal(2, 3, 4, 4), expected)


def test_stacked_states_reach_the_layers_one_by_one() -> None:
    def forward(m: Any, x: Tensor, z: Tensor) -> Tensor:
        return m.out(m.layer(x, torch.stack([m.first(z), m.second(z)]))[0])

    parts = {
        "first": nn.Linear(3, 4),
        "second": nn.Linear(3, 4),
        "layer": nn.GRU(5, 4, 2),
        "out": nn.Linear(4, 2),
    }
    spec = check(build(lambda: Net(forward, **parts)), (normal(3, 2, 5), X), every_slot=False)
    assert sorted(g.size for g in spec.groups.values()) == [4, 4]
