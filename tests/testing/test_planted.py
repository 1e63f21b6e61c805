"""Planted pairs come with the right answer, in the right direction, and randomised states hide nothing."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from isthmus.errors import SymmetryError
from isthmus.symmetry import apply
from isthmus.testing import (
    REFERENCE_NETWORKS,
    as_symmetry_spec,
    perturb,
    planted_pair,
    randomise_state,
    reference_network,
    reference_spec,
)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("name", REFERENCE_NETWORKS)
def test_the_permutations_bring_b_back_to_a(name: str) -> None:
    model = randomise_state(reference_network(name), generator())
    spec = as_symmetry_spec(reference_spec(name), model)
    pair = planted_pair(model, spec, generator=generator(1))
    assert set(pair.permutations) == set(spec.groups)
    recovered = apply(spec, pair.permutations, pair.state_b)
    for key, tensor in model.state_dict().items():
        assert torch.equal(pair.state_a[key], tensor)
        assert torch.equal(recovered[key], tensor)
    assert any(not torch.equal(pair.state_b[k], pair.state_a[k]) for k in pair.state_a)


def test_direction_by_hand() -> None:
    """``permutation[i]`` is the unit of B that belongs at position ``i`` of A."""
    model = reference_network("mlp", width=5, depth=1)
    spec = as_symmetry_spec(reference_spec("mlp", width=5, depth=1), model)
    seed = next(
        s
        for s in range(20)
        if not torch.equal((p := torch.randperm(5, generator=generator(s)))[p], torch.arange(5))
    )
    pair = planted_pair(model, spec, generator=generator(seed))
    permutation = pair.permutations["hidden0"]
    assert not torch.equal(permutation[permutation], torch.arange(5)), "needs one that is not its own inverse"
    for i in range(5):
        assert torch.equal(
            pair.state_b["layers.0.weight"][permutation[i]], pair.state_a["layers.0.weight"][i]
        )


def test_noise_is_relative_seeded_and_keeps_variances_positive() -> None:
    model = randomise_state(reference_network("resnet20"), generator())
    spec = as_symmetry_spec(reference_spec("resnet20"), model)
    pair = planted_pair(model, spec, 0.5, generator(2))
    again = planted_pair(model, spec, 0.5, generator(2))
    clean = planted_pair(model, spec, 0.0, generator(2))
    assert all(torch.equal(pair.state_b[k], again.state_b[k]) for k in pair.state_b)
    for key, tensor in clean.state_b.items():
        assert pair.state_b[key].dtype == tensor.dtype
        if key.endswith("running_var"):
            assert float(pair.state_b[key].min()) > 0
        if tensor.is_floating_point() and tensor.numel() > 500:
            added = (pair.state_b[key] - tensor).square().mean() / tensor.square().mean()
            assert 0.4 < float(added.sqrt()) < 0.6
    assert torch.equal(pair.state_b["bn1.num_batches_tracked"], clean.state_b["bn1.num_batches_tracked"])


def test_planting_changes_neither_the_model_nor_shares_its_memory() -> None:
    model = reference_network("mlp")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    pair = planted_pair(model, as_symmetry_spec(reference_spec("mlp"), model), 0.1, generator())
    pair.state_a["layers.0.weight"].zero_()
    pair.state_b["layers.0.weight"].zero_()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("noise", [-0.1, float("nan"), float("inf")])
def test_bad_noise_is_refused(noise: float) -> None:
    model = reference_network("mlp")
    with pytest.raises(SymmetryError, match="finite noise level of at least 0, found"):
        planted_pair(model, as_symmetry_spec(reference_spec("mlp"), model), noise)


def test_perturb_without_noise_is_a_copy() -> None:
    state = {"w": torch.ones(3), "n": torch.tensor(4)}
    copied = perturb(state, 0.0)
    assert torch.equal(copied["w"], state["w"])
    assert copied["w"] is not state["w"]


@pytest.mark.parametrize("name", REFERENCE_NETWORKS)
def test_after_randomising_no_tensor_is_constant(name: str) -> None:
    model = reference_network(name)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    fresh = randomise_state(model, generator(3)).state_dict()
    again = randomise_state(model, generator(3)).state_dict()
    for key, tensor in fresh.items():
        assert torch.equal(model.state_dict()[key], before[key])
        assert torch.equal(tensor, again[key])
        if tensor.numel() > 1:
            assert tensor.std() > 0, key
        if key.endswith("running_var"):
            assert 0.5 <= float(tensor.min()) <= float(tensor.max()) <= 1.5


def test_zero_initialised_matrices_are_drawn_with_unit_gain() -> None:
    model = nn.Linear(400, 300)
    nn.init.zeros_(model.weight)
    nn.init.zeros_(model.bias)
    fresh = randomise_state(model, generator())
    assert float(fresh.weight.detach().std()) == pytest.approx(1 / 20, rel=0.02)
    assert float(fresh.bias.detach().std()) == pytest.approx(0.3, rel=0.15)
    # A weight that is already random is kept.
    nn.init.normal_(model.weight)
    assert torch.equal(randomise_state(model, generator()).weight, model.weight)
