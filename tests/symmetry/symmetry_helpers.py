"""What the symmetry tests share: describing groups, planting faults, checking a module from end to end."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from isthmus.symmetry import Slot, SymmetrySpec, discover, verify
from isthmus.testing import randomise_state

Expected = set[tuple[int, frozenset[str]]]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=seeded(seed))


class Net(nn.Module):
    """A function as a module: parts are modules, or shapes of parameters drawn from torch's generator."""

    def __init__(self, function: Callable[..., Any], **parts: Any) -> None:
        super().__init__()
        self.function = function
        for name, part in parts.items():
            if isinstance(part, nn.Module):
                self.add_module(name, part)
            else:
                self.register_parameter(name, nn.Parameter(torch.randn(part)))

    def forward(self, *inputs: Tensor) -> Any:
        return self.function(self, *inputs)


def build(factory: Any, seed: int = 0) -> nn.Module:
    """Build a module from seeded initial values, norms randomised, in evaluation mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return randomise_state(factory(), seeded(seed)).eval()


def described(spec: SymmetrySpec) -> Expected:
    """Return the groups without their names: size and slots as text."""
    return {(g.size, frozenset(map(str, g.slots))) for g in spec.groups.values() if g.size > 1}


def group(size: int, *slots: str) -> tuple[int, frozenset[str]]:
    return size, frozenset(slots)


def removals(spec: SymmetrySpec) -> list[tuple[str, Slot]]:
    """Return every slot whose removal must be noticed (without it something else of its group still moves)."""
    groups = [(name, g) for name, g in spec.groups.items() if g.size > 1 and len(g.slots) > 1]
    return [(name, slot) for name, g in groups for slot in g.slots]


def check(
    model: nn.Module,
    args: Any,
    expected: Expected | None = None,
    *,
    kwargs: dict[str, Any] | None = None,
    outputs: Any = None,
    every_slot: bool = True,
    unseen: frozenset[str] = frozenset(),
) -> SymmetrySpec:
    """Discover; compare with what is expected; verify; remove each slot in turn and see verification fail.

    Args:
        model: the module.
        args: its inputs.
        expected: groups as text.
        kwargs: keyword inputs.
        outputs: what must be preserved.
        every_slot: whether slots are removed one by one.
        unseen: tensors that do not influence the function, so that nobody can notice a slot on them.
    """
    spec = discover(model, args, kwargs, outputs=outputs)
    if expected is not None:
        assert described(spec) == expected, f"{spec}"
    found = verify(spec, model, args, kwargs, generator=seeded(1))
    assert found.passed, f"{found}\n{spec}"
    if every_slot:
        for name, slot in removals(spec):
            if slot.tensor in unseen:
                continue
            alone = spec.restrict([name]).without_slot(name, slot)
            broken = verify(alone, model, args, kwargs, generator=seeded(1), draws=1)
            assert not broken.passed, f"{name} without {slot} passes:\n{spec}"
    return spec
