"""What a person wrote down and what discovery finds are the same, and neither survives the loss of a slot."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from isthmus.symmetry import discover, verify
from isthmus.testing import (
    REFERENCE_NETWORKS,
    as_symmetry_spec,
    compare_with_reference,
    randomise_state,
    reference_inputs,
    reference_network,
    reference_spec,
)

VARIANTS: list[tuple[str, dict[str, Any]]] = [
    ("mlp", {"depth": 0}),
    ("mlp", {"depth": 1, "width": 2, "activation": "tanh"}),
    ("vgg16_bn", {"width": 1 / 64, "image_size": 64}),
    ("resnet20_zero_pad", {"width": 0.3}),
    ("groupnorm_resnet", {"width": 1 / 4, "groups": 1}),
    ("groupnorm_resnet", {"width": 1 / 4, "groups": 4}),
]
CASES = [(name, {}) for name in REFERENCE_NETWORKS] + VARIANTS
IDS = [name + "".join(f"-{k}={v}" for k, v in settings.items()) for name, settings in CASES]


@pytest.mark.parametrize(("name", "settings"), CASES, ids=IDS)
def test_discovery_finds_the_reference(name: str, settings: dict[str, Any]) -> None:
    model = randomise_state(reference_network(name, **settings), torch.Generator().manual_seed(0))
    found = discover(model, reference_inputs(name, **settings))
    comparison = compare_with_reference(reference_spec(name, **settings), found)
    assert comparison.equal, str(comparison)


@pytest.mark.parametrize("name", REFERENCE_NETWORKS)
def test_a_spec_without_one_slot_fails_verification(name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    model = randomise_state(reference_network(name), generator)
    inputs = reference_inputs(name, generator=generator)
    spec = as_symmetry_spec(reference_spec(name), model)
    assert verify(spec, model, inputs, generator=generator).max_relative_error < 1e-10
    groups = list(spec.groups.values())
    for group, slot in ((groups[0], groups[0].slots[-1]), (groups[-1], groups[-1].slots[0])):
        broken = verify(spec.without_slot(group.name, slot), model, inputs, generator=generator)
        assert not broken.passed
        assert group.name in broken.guilty
