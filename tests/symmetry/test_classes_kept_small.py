"""Classes that are not claimed: where units meet what is the same for all of them, whole numbers, or ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from isthmus.symmetry import Acts, SymmetrySpec, discover, drawn_elements, function_change

Function = Callable[..., Tensor]
TOLERANCE = 1e-10


class Written(nn.Module):
    """A network whose function is given, with layers, parameters and buffers by name."""

    def __init__(self, function: Function, parts: Mapping[str, nn.Module | Tensor]) -> None:
        super().__init__()
        self.function = function
        for name, part in parts.items():
            if isinstance(part, nn.Parameter):
                self.register_parameter(name, part)
            elif isinstance(part, Tensor):
                self.register_buffer(name, part)
            else:
                self.add_module(name, part)

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.function(self, *inputs)


def discovered(function: Function, x: Tensor, *, ones: tuple[str, ...] = (), **parts: Any) -> SymmetrySpec:
    """Discover, and hold random elements of the declared classes against the network."""
    torch.manual_seed(0)
    layers = {"first": nn.Linear(4, 6), "second": nn.Linear(4, 6), "last": nn.Linear(6, 3)}
    net = Written(function, {**layers, **parts})
    for name, parameter in net.named_parameters():
        nn.init.ones_(parameter) if name in ones else nn.init.normal_(parameter, std=0.7)
    net = net.eval().double()
    spec = discover(net, x.double(), ones=ones)
    for element in drawn_elements(spec, torch.Generator().manual_seed(1), 3):
        assert function_change(spec, element, net, x.double()) < TOLERANCE, str(spec)
    return spec


def classes(spec: SymmetrySpec) -> set[Acts]:
    return {group.acts for group in spec.groups.values()}


def _started(m: Any, x: Tensor, h: Tensor) -> Tensor:
    return m.last(m.cell(x, (h, h) if isinstance(m.cell, nn.LSTM) else h)[0])


STATES: dict[str, tuple[Callable[[Any, Tensor], Tensor], bool]] = {
    "zeros": (lambda m, x: x.new_zeros(1, 2, 6), True),
    "zeros, expanded": (lambda m, x: torch.zeros(1, 1, 1, dtype=x.dtype).expand(1, 2, 6).contiguous(), True),
    "nothing, filled": (lambda m, x: torch.full((1, 2, 6), 0.0, dtype=x.dtype), True),
    "a parameter for each unit": (lambda m, x: m.each.expand(1, 2, 6).contiguous(), True),
    "ones": (lambda m, x: x.new_ones(1, 2, 6), False),
    "filled": (lambda m, x: torch.full((1, 2, 6), 0.3, dtype=x.dtype), False),
    "one parameter for all": (lambda m, x: m.single.expand(1, 2, 6).contiguous(), False),
    "data, the same for all": (lambda m, x: x[:1].mean(-1, keepdim=True).expand(1, 2, 6).contiguous(), False),
}


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("kind", ["RNN", "LSTM", "GRU"])
def test_units_of_a_cell_start_from_what_changes_as_they_do(kind: str, state: str) -> None:
    """A state that is the same for all units lets them change places, but neither their signs nor their sizes."""
    start, free = STATES[state]
    parts: dict[str, Any] = {
        "each": nn.Parameter(torch.ones(1, 1, 6)),
        "single": nn.Parameter(torch.ones(1, 1, 1)),
    }
    parts["cell"] = getattr(nn, kind)(4, 6)
    spec = discovered(lambda m, x: _started(m, x, start(m, x)), torch.randn(5, 2, 4), **parts)
    assert spec.groups["cell" if "cell" in spec.groups else "each"].acts is (
        Acts.SIGNED if free else Acts.PERMUTATION
    )


WHOLE = torch.tensor([3, -2, 5, 7, -1, 4])
HELD = torch.tensor([True, False, True, True, False, True])


@pytest.mark.parametrize(
    ("function", "parts", "acts"),
    [
        (lambda m, x: F.linear(m.first(x).relu(), m.w.to(x.dtype)), {"w": WHOLE.repeat(3, 1)}, Acts.PERMUTATION),
        (
            lambda m, x: m.last(F.linear(x, m.w.to(x.dtype)).relu()),
            {"w": WHOLE[:, None].repeat(1, 4)},
            Acts.PERMUTATION,
        ),
        (
            lambda m, x: m.last((F.linear(x, m.w.to(x.dtype)) * m.s).relu()),
            {"w": WHOLE[:, None].repeat(1, 4).to(torch.int8), "s": nn.Parameter(torch.ones(6))},
            Acts.POSITIVE,
        ),
        (lambda m, x: m.last(m.first(x) * m.w), {"w": HELD}, Acts.MONOMIAL),
        (lambda m, x: m.last((m.first(x) + m.w).relu()), {"w": WHOLE}, Acts.PERMUTATION),
    ],
    ids=["read", "held", "held with factors", "mask", "added"],
)  # fmt: skip
def test_whole_numbers_and_masks_keep_their_values(
    function: Function, parts: dict[str, Any], acts: Acts
) -> None:
    """A tensor of whole numbers or of truth values changes places, and nothing else."""
    spec = discovered(function, torch.randn(5, 4), **parts)
    group = next(g for g in spec.groups.values() if any(s.tensor == "w" for s in g.slots))
    assert group.acts is acts
    if acts is not Acts.PERMUTATION:
        assert {s.power for s in group.slots if s.tensor == "w"} == {0}


@pytest.mark.parametrize(
    ("function", "acts"),
    [
        (lambda m, x: m.last((m.first(x) * m.g).relu()), Acts.POSITIVE),
        (lambda m, x: m.last(m.first(x) * m.g), Acts.GENERAL),
        (lambda m, x: m.last((m.first(x) * m.g).relu()) + m.last(m.g.expand(5, 6)), Acts.PERMUTATION),
        (lambda m, x: m.last(m.first(x) * m.g) + m.last(m.g.expand(5, 6)), Acts.PERMUTATION),
    ],
    ids=["before a rectifier", "a gain", "read elsewhere", "read elsewhere, without a rectifier"],
)
def test_what_must_stay_ones_is_never_scaled(function: Function, acts: Acts) -> None:
    """Gains after folding hold ones before and after; where they are read otherwise, nothing but places changes."""
    spec = discovered(function, torch.randn(5, 4), g=nn.Parameter(torch.ones(6)), ones=("g",))
    group = next(g for g in spec.groups.values() if any(s.tensor == "first.weight" for s in g.slots))
    assert group.acts is acts
    if acts is Acts.POSITIVE:
        assert {s.power for s in group.slots if s.tensor == "g"} == {0}


@pytest.mark.parametrize(
    ("function", "acts"),
    [
        (lambda m, x: m.last(torch.stack([m.first(x), x.new_ones(5, 6)]).sum(0)), Acts.PERMUTATION),
        (lambda m, x: m.last(torch.cat([m.first(x), x.new_ones(1, 6)]).mean(0)), Acts.PERMUTATION),
        (lambda m, x: m.last(torch.cat([m.first(x), x[:1, :1].expand(1, 6)]).cumsum(0)), Acts.PERMUTATION),
        (lambda m, x: m.last(torch.stack([m.first(x), m.second(x)]).sum(0)), Acts.GENERAL),
        (lambda m, x: m.last(torch.stack([m.first(x).relu(), m.second(x)]).amax(0)), Acts.POSITIVE),
        (lambda m, x: m.last(torch.stack([m.first(x).tanh(), m.second(x)]).sum(0)), Acts.SIGNED),
        (lambda m, x: m.last(torch.stack([m.first(x).tanh(), m.second(x).relu()]).sum(0)), Acts.PERMUTATION),
        (lambda m, x: m.last(m.first(x).clamp(1, -1)), Acts.PERMUTATION),
    ],
)
def test_what_stands_beside_the_units_counts_where_all_of_it_is_used(function: Function, acts: Acts) -> None:
    """Sums run over everything that was put side by side, also over what carries no units."""
    assert discovered(function, torch.randn(5, 4)).groups["first"].acts is acts


def test_further_keys_and_values_change_like_the_others() -> None:
    """The keys and values that attention adds from parameters stand beside those of the tokens."""
    attention = nn.MultiheadAttention(8, 2, batch_first=True, add_bias_kv=True)
    parts: dict[str, Any] = {"attend": attention, "out": nn.Linear(8, 3)}
    spec = discovered(lambda m, x: m.out(m.attend(x, x, x)[0]), torch.randn(2, 5, 8), **parts)
    inner = [g for g in spec.groups.values() if g.size == 4]
    assert len(inner) == 4
    assert {g.acts for g in inner} == {Acts.GENERAL}
    powers = {
        frozenset((s.tensor, s.power) for s in g.slots if s.tensor.startswith("attend.bias")) for g in inner
    }
    assert powers == {frozenset({("attend.bias_k", -1)}), frozenset({("attend.bias_v", 1)})}


def test_sums_that_start_from_zero_limit_nothing() -> None:
    """Zero changes with anything, however it was made; what was zero and then filled does not."""

    def filled(m: Any, x: Tensor) -> Tensor:
        z = torch.zeros(5, 6, dtype=x.dtype)
        z += 1
        return m.last(z + m.first(x).relu())

    start = lambda m, x: m.last(torch.zeros((), dtype=x.dtype) + m.first(x))  # noqa: E731
    assert classes(discovered(start, torch.randn(5, 4))) == {Acts.GENERAL}
    assert classes(discovered(filled, torch.randn(5, 4))) == {Acts.PERMUTATION}
