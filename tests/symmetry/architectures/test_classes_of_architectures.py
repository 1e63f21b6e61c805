"""The classes of the suite's networks: as a reader sees them, true of random elements, and tight where planted larger."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers", reason="the suite builds networks from transformers configurations")

from classes import INCOMPLETE, READ, found_classes, read_classes
from suite import EXPECTED, build

from isthmus.symmetry import Acts, AxisGroup, SymmetrySpec, discover, drawn_elements, function_change, verify

FAST = ("lstm", "swiglu", "wavenet_normalised", "deep_sets", "conv_mixer", "fused_attention_block")
CASES = [pytest.param(name, marks=[] if name in FAST else [pytest.mark.slow]) for name in READ]
TOLERANCE = 1e-10
NEXT = {
    Acts.PERMUTATION: Acts.POSITIVE,
    Acts.SIGNED: Acts.MONOMIAL,
    Acts.POSITIVE: Acts.MONOMIAL,
    Acts.MONOMIAL: Acts.GENERAL,
    Acts.MEAN_FIXING: Acts.ORTHOGONAL,
    Acts.ORTHOGONAL: Acts.GENERAL,
}


@cache
def built(name: str) -> tuple[Any, Any, dict[str, Any], SymmetrySpec]:
    model, args, kwargs, outputs = build(name)
    return model, args, kwargs, discover(model, args, kwargs, outputs=outputs)


def other(given: Any) -> Any:
    """Return inputs of the same kind with other values: tokens in another order, other numbers."""
    if isinstance(given, dict):
        return {k: other(v) for k, v in given.items()}
    if isinstance(given, (tuple, list)):
        return type(given)(other(v) for v in given)
    if not isinstance(given, Tensor):
        return given
    return 1.7 * given + 0.1 if given.is_floating_point() else given.flip(0)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", CASES)
def test_classes_are_those_of_a_reader_and_hold(name: str) -> None:
    model, args, kwargs, spec = built(name)
    found = verify(spec, model, args, kwargs, generator=torch.Generator().manual_seed(1))
    assert found.passed, f"{found}\n{spec}"
    assert found.tolerance <= TOLERANCE
    for element in drawn_elements(spec, torch.Generator().manual_seed(2), 2):
        assert function_change(spec, element, model, other(args), other(kwargs)) < TOLERANCE
    wanted, seen = read_classes(name), found_classes(spec)
    if name not in INCOMPLETE:
        assert seen == wanted, f"missing {wanted - seen}, unexpected {seen - wanted}\n{spec}"
        return
    assert seen != wanted, f"{name} is complete now: take it out of the list"
    for (size, acts), number in (seen - wanted).items():
        larger = sum(n for (s, a), n in (wanted - seen).items() if s == size and a.contains(acts))
        assert larger >= number, f"not smaller than what a reader sees: {number} of {size} {acts}"


def planted(spec: SymmetrySpec, group: AxisGroup) -> Iterator[tuple[str, SymmetrySpec]]:
    """Yield specs of somebody who believed in the next larger class, or got a power wrong."""
    larger = NEXT.get(group.acts)
    if larger is not None:
        powers = [
            (s.power if s.power and group.acts is not Acts.PERMUTATION else -1 if s.role == "reads" else 1)
            for s in group.slots
        ]
        slots = tuple(replace(s, power=p) for s, p in zip(group.slots, powers, strict=True))
        yield f"{larger}", spec.with_group(replace(group, acts=larger, slots=slots))
    reading = [s for s in group.slots if s.power and s.role == "reads"] or [s for s in group.slots if s.power]
    if group.acts is not Acts.PERMUTATION:
        chosen = reading[0]
        if group.acts.mixes:
            yield f"without {chosen}", spec.without_slot(group.name, chosen)
        else:
            slots = tuple(replace(s, power=0) if s is chosen else s for s in group.slots)
            yield f"power 0 of {chosen}", spec.with_group(replace(group, slots=slots))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", CASES)
def test_planted_errors_are_caught(name: str) -> None:
    """Left out are groups in which a reader sees more than is found, those whose units have units of their own, and
    experts that no token of the example chooses, whose orders are not felt either.
    """
    model, args, kwargs, spec = built(name)
    outer = {name for group in spec.groups.values() for name in group.within}
    larger = {size for size, _ in read_classes(name) - found_classes(spec)}
    missed: list[str] = []
    for group in spec.groups.values():
        if group.name in outer or (name in INCOMPLETE and group.size in larger):
            continue
        alone_spec = spec.restrict([group.name])
        torn = alone_spec.without_slot(group.name, group.slots[0])
        turned = {group.name: torch.arange(group.size).roll(1)}
        if "expert" in group.name and function_change(torn, turned, model, args, kwargs) < TOLERANCE:
            continue
        for error, worse in planted(alone_spec, group):
            alone = drawn_elements(worse, torch.Generator().manual_seed(3), 2)
            if max(function_change(worse, element, model, args, kwargs) for element in alone) < TOLERANCE:
                missed.append(f"{group.name} ({group.acts}): {error}")
    assert not missed, "\n".join(missed)


def test_the_lists_are_long_and_their_kinds_exist() -> None:
    assert len(READ) >= 60
    assert set(INCOMPLETE) <= set(READ) <= set(EXPECTED)
    general = {"value dimensions", "hidden units", "query–key dimensions", "dimensions in a head"}
    for name, kinds in READ.items():
        unknown = {k for k in kinds if k not in EXPECTED[name] and not any(k.startswith(g) for g in general)}
        assert not unknown, (name, unknown)
