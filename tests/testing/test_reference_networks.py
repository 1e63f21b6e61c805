"""The hand-written symmetries are sound (they preserve the function) and every slot in them is needed."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from isthmus.errors import ModelError, SymmetryError
from isthmus.testing import (
    REFERENCE_NETWORKS,
    ReferenceGroup,
    ReferenceSlot,
    as_symmetry_spec,
    compare_with_reference,
    mlp,
    randomise_state,
    reference_inputs,
    reference_network,
    reference_spec,
    resnet20,
    vgg16,
    vgg16_bn,
)

# Settings that differ from the small defaults in the ways that move slots: sizes of 1 and 2, other factors.
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    ("mlp", {"depth": 0}),
    ("mlp", {"depth": 1, "width": 2}),
    ("mlp", {"width": 1}),
    ("mlp", {"bias": False, "activation": "tanh"}),
    ("vgg16", {"width": 1 / 32, "image_size": 32}),
    ("vgg16_bn", {"width": 1 / 64, "image_size": 64}),
    ("resnet20", {"width": 1 / 16}),
    ("resnet20_zero_pad", {"width": 1 / 16}),
    ("resnet20_zero_pad", {"width": 0.3}),
    ("densenet", {"width": 1 / 12, "layers": (1, 1, 2)}),
    ("unet", {"width": 1 / 8, "levels": 2}),
    ("mobilenet", {"width": 1 / 16}),
    ("groupnorm_resnet", {"width": 1 / 4, "groups": 1}),
    ("groupnorm_resnet", {"width": 1 / 4, "groups": 4}),
    ("groupnorm_resnet", {"width": 3 / 8, "groups": 2}),
]
CASES = [(name, {}) for name in REFERENCE_NETWORKS] + VARIANTS
IDS = [name + "".join(f"-{k}={v}" for k, v in settings.items()) for name, settings in CASES]

# A cycle, not its own inverse, so that a slot moved the wrong way round is noticed.


def cycle(size: int) -> list[int]:
    return [*range(1, size), 0]


def positions(slot: ReferenceSlot, unit: int) -> list[int]:
    found = [slot.offset + unit * slot.stride]
    for count, stride in slot.copies:
        found = [p + i * stride for p in found for i in range(count)]
    return found


def move(state: dict[str, Tensor], group: ReferenceGroup, slots: list[ReferenceSlot]) -> dict[str, Tensor]:
    """Permute one group by plain loops: an oracle that shares no code with the package."""
    moved = dict(state)
    for slot in slots:
        tensor = moved[slot.tensor]
        index = list(range(tensor.shape[slot.axis]))
        for unit, source in enumerate(cycle(group.size)):
            for target, origin in zip(positions(slot, unit), positions(slot, source), strict=True):
                index[target] = origin
        moved[slot.tensor] = tensor.index_select(slot.axis, torch.tensor(index))
    return moved


def case(name: str, settings: dict[str, Any]) -> tuple[nn.Module, dict[str, Tensor], tuple[Tensor, ...]]:
    generator = torch.Generator().manual_seed(1)
    model = randomise_state(reference_network(name, **settings), generator).double()
    inputs = reference_inputs(name, generator=generator, **settings)
    return model, dict(model.state_dict()), tuple(x.double() for x in inputs)


def relative_change(
    model: nn.Module, inputs: tuple[Tensor, ...], state: dict[str, Tensor], other: dict[str, Tensor]
) -> float:
    with torch.no_grad():
        before, after = functional_call(model, state, inputs), functional_call(model, other, inputs)
    assert before.std() > 0
    return float((before - after).abs().max() / before.abs().max())


@pytest.mark.parametrize(("name", "settings"), CASES, ids=IDS)
def test_each_group_preserves_the_function(name: str, settings: dict[str, Any]) -> None:
    model, state, inputs = case(name, settings)
    everything = state
    for group in reference_spec(name, **settings):
        moved = move(state, group, list(group.slots))
        assert relative_change(model, inputs, state, moved) < 1e-10, group.name
        assert any(not torch.equal(moved[k], state[k]) for k in state), group.name
        everything = move(everything, group, list(group.slots))
    assert relative_change(model, inputs, state, everything) < 1e-10


@pytest.mark.parametrize("name", REFERENCE_NETWORKS)
def test_every_slot_is_needed(name: str) -> None:
    model, state, inputs = case(name, {})
    for group in reference_spec(name):
        for i, slot in enumerate(group.slots):
            rest = [s for j, s in enumerate(group.slots) if j != i]
            changed = relative_change(model, inputs, state, move(state, group, rest))
            assert changed > 1e-9, f"{group.name} without {slot}"


@pytest.mark.parametrize("name", REFERENCE_NETWORKS)
def test_groups_are_not_two_groups_in_one(name: str) -> None:
    """Splitting a group's slots in two and moving only the first half must change the function."""
    model, state, inputs = case(name, {})
    for group in reference_spec(name):
        half = list(group.slots[: len(group.slots) // 2])
        assert relative_change(model, inputs, state, move(state, group, half)) > 1e-9, group.name


@pytest.mark.parametrize("name", REFERENCE_NETWORKS)
def test_every_axis_is_covered_except_inputs_and_outputs(name: str) -> None:
    """No channel was forgotten: only pixels, filters of one channel and class outputs stay put."""
    model = reference_network(name)
    state = {k: v for k, v in model.state_dict().items() if v.ndim}
    covered: dict[tuple[str, int], list[int]] = {}
    for group in reference_spec(name):
        for slot in group.slots:
            seen = covered.setdefault((slot.tensor, slot.axis), [])
            seen += [p for unit in range(group.size) for p in positions(slot, unit)]
    # On a GroupNorm axis each position belongs to a block and to a member.
    times = 2 if name == "groupnorm_resnet" else 1
    last = list(state)[-1].rsplit(".", 1)[0]
    for tensor, values in state.items():
        for axis in range(min(values.ndim, 2)):
            stays = (axis == 1 and (tensor == next(iter(state)) or "depthwise" in tensor)) or (
                axis == 0 and tensor.startswith(last)
            )
            expected = [] if stays else sorted(list(range(values.shape[axis])) * times)
            assert sorted(covered.get((tensor, axis), [])) == expected, (tensor, axis)


def test_real_sizes() -> None:
    """The parameter counts of the published CIFAR networks (and of the paper's MLP), counted by hand."""
    count = {
        "mlp": sum(p.numel() for p in mlp(784, 512, 3, 10).parameters()),
        "resnet20": sum(p.numel() for p in resnet20(shortcut="zero_pad").parameters()),
        "vgg16_bn": sum(p.numel() for p in vgg16_bn().parameters()),
        "vgg16": sum(p.numel() for p in vgg16().parameters()),
    }
    convolutions = 9 * (
        3 * 64 + 64 * 64 + 64 * 128 + 128 * 128 + 128 * 256 + 2 * 256 * 256 + 256 * 512 + 5 * 512**2
    )
    channels = 2 * 64 + 2 * 128 + 3 * 256 + 6 * 512
    assert count["mlp"] == 784 * 512 + 512 + 2 * (512 * 512 + 512) + 5130
    # He et al. 2016, table 6: 0.27 M parameters.
    assert count["resnet20"] == 269_722
    assert count["vgg16_bn"] == convolutions + 2 * channels + 5130
    assert count["vgg16"] == convolutions + channels + 5130


@pytest.mark.parametrize("name", REFERENCE_NETWORKS)
def test_building_is_deterministic_and_leaves_the_global_generator_alone(name: str) -> None:
    before = torch.get_rng_state()
    first, second, other = (reference_network(name, seed=s).state_dict() for s in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(first[k], second[k]) for k in first)
    assert any(not torch.equal(first[k], other[k]) for k in first)


def test_example_inputs_are_fixed_or_drawn() -> None:
    (fixed,) = reference_inputs("vgg16_bn", 3)
    assert fixed.shape == (3, 3, 32, 32)
    assert torch.equal(fixed, reference_inputs("vgg16_bn", 3)[0])
    assert 0 <= float(fixed.min()) < 0.01
    assert 0.99 < float(fixed.max()) <= 1
    (drawn,) = reference_inputs("mlp", generator=torch.Generator().manual_seed(0), inputs=5)
    assert drawn.shape == (2, 5)


def test_bad_settings_are_refused() -> None:
    with pytest.raises(ModelError, match=r"Unknown reference network 'lenet'. Choose one of mlp, vgg16"):
        reference_network("lenet")
    with pytest.raises(
        ModelError, match=r"'densenet' has no setting 'depth'. Choose among classes, width, layers"
    ):
        reference_spec("densenet", depth=3)
    with pytest.raises(ModelError, match="unknown activation 'maxout'"):
        mlp(4, 3, 2, 1, activation="maxout")
    with pytest.raises(ModelError, match="depth of at least 0, found inputs=4, width=0"):
        mlp(4, 0, 2, 1)
    with pytest.raises(ModelError, match="multiple of 32, found 28"):
        vgg16(image_size=28)
    with pytest.raises(ModelError, match="unknown shortcut 'none'"):
        reference_network("resnet20", shortcut="none")
    with pytest.raises(ModelError, match=r"3 groups do not divide channels \[16, 32\]"):
        reference_network("groupnorm_resnet", groups=3, width=1)
    with pytest.raises(ModelError, match="at least one layer in each stage"):
        reference_network("densenet", layers=(2, 0))
    with pytest.raises(ModelError, match="at least two levels, found 1"):
        reference_network("unet", levels=1)


# --- Comparing with a spec ---------------------------------------------------------------------------------


def spec_of(name: str) -> Any:
    return as_symmetry_spec(reference_spec(name), reference_network(name))


@pytest.mark.parametrize("name", REFERENCE_NETWORKS)
def test_a_reference_equals_itself_whatever_the_names_and_the_order(name: str) -> None:
    groups = reference_spec(name)
    renamed = [
        ReferenceGroup(f"g{i}", g.size, tuple(reversed(g.slots))) for i, g in enumerate(reversed(groups))
    ]
    comparison = compare_with_reference(renamed, spec_of(name))
    assert comparison.equal
    assert "equals" in str(comparison)


def test_other_ways_to_write_the_same_index_map_are_equal() -> None:
    model = nn.Linear(12, 1)
    one = as_symmetry_spec([ReferenceGroup("g", 3, (ReferenceSlot("weight", 1, 0, 4, ((4, 1),)),))], model)
    others = (
        (ReferenceSlot("weight", 1, 0, 4, ((2, 2), (2, 1))),),
        (ReferenceSlot("weight", 1, 0, 4, ((2, 1),)), ReferenceSlot("weight", 1, 2, 4, ((2, 1),))),
    )
    for slots in others:
        assert compare_with_reference([ReferenceGroup("h", 3, slots)], one).equal


@pytest.mark.parametrize(
    ("slots", "said"),
    [
        ((ReferenceSlot("a.weight", 0), ReferenceSlot("a.bias", 0)), r"lacks nothing and adds b.weight\[1\]"),
        (
            (ReferenceSlot("a.weight", 0), ReferenceSlot("a.bias", 0), ReferenceSlot("b.weight", 0)),
            r"lacks b.weight\[0\] and adds b.weight\[1\]",
        ),
        ((ReferenceSlot("b.weight", 0),), r"It should move b.weight\[0\]"),
    ],
)
def test_differences_are_found_and_explained(slots: tuple[ReferenceSlot, ...], said: str) -> None:
    model = nn.ModuleDict({"a": nn.Linear(2, 3), "b": nn.Linear(3, 3)})
    truth = ReferenceGroup(
        "hidden", 3, (ReferenceSlot("a.weight", 0), ReferenceSlot("a.bias", 0), ReferenceSlot("b.weight", 1))
    )
    comparison = compare_with_reference([ReferenceGroup("mine", 3, slots)], as_symmetry_spec([truth], model))
    assert not comparison.equal
    assert [g.name for g in comparison.missing] == ["mine"]
    assert comparison.unexpected == ("hidden",)
    assert re.search(said, str(comparison))


def test_a_shifted_slot_is_a_difference() -> None:
    model = nn.Linear(12, 1)
    found = as_symmetry_spec([ReferenceGroup("g", 4, (ReferenceSlot("weight", 1, 4),))], model)
    assert not compare_with_reference([ReferenceGroup("g", 4, (ReferenceSlot("weight", 1, 5),))], found).equal
    assert compare_with_reference([ReferenceGroup("g", 4, (ReferenceSlot("weight", 1, 4),))], found).equal


def test_two_groups_fused_into_one_are_a_difference() -> None:
    model = nn.ModuleDict({"a": nn.Linear(2, 3), "b": nn.Linear(3, 3)})
    apart = [
        ReferenceGroup("one", 3, (ReferenceSlot("a.weight", 0),)),
        ReferenceGroup("two", 3, (ReferenceSlot("b.weight", 1),)),
    ]
    fused = ReferenceGroup("both", 3, (ReferenceSlot("a.weight", 0), ReferenceSlot("b.weight", 1)))
    comparison = compare_with_reference(apart, as_symmetry_spec([fused], model))
    assert len(comparison.missing) == 2
    assert comparison.unexpected == ("both",)


def test_a_reference_for_another_network_is_refused() -> None:
    model = reference_network("mlp")
    with pytest.raises(
        SymmetryError, match=r"'hidden2' does not fit axis 0 of 'layers.2.weight', shape \(5, 7\)"
    ):
        as_symmetry_spec(reference_spec("mlp", depth=4), reference_network("mlp", depth=2))
    with pytest.raises(SymmetryError, match=r"'g' moves axis 0 of 'conv.weight'.*no such tensor"):
        as_symmetry_spec([ReferenceGroup("g", 2, (ReferenceSlot("conv.weight", 0),))], model)
    with pytest.raises(SymmetryError, match=r"moves axis 2 of 'layers.0.weight'.*shape \(7, 12\)"):
        as_symmetry_spec([ReferenceGroup("g", 2, (ReferenceSlot("layers.0.weight", 2),))], model)
