"""The bound from weights alone holds, is coarser than the certificate, and refuses what it cannot bound."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from isthmus.certificates._weights_only import certify_weights_only
from isthmus.errors import CheckpointError, DataError, ModelError, ShapeError
from isthmus.matching import align
from isthmus.symmetry import apply, discover
from isthmus.testing import mlp, perturb
from isthmus.theory import certify


def networks(seed: int, **settings: object) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(seed)
    a = mlp(6, 14, **{"depth": 2, "outputs": 3, **settings}).double().eval()  # type: ignore[arg-type]
    b = mlp(6, 14, **{"depth": 2, "outputs": 3, **settings}).double().eval()  # type: ignore[arg-type]
    if seed % 2:  # near one another as well as unrelated
        b.load_state_dict(perturb(a.state_dict(), 0.2, torch.Generator().manual_seed(seed)))
    return a, b


def examples(n: int, seed: int = 0) -> Tensor:
    return torch.randn(n, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def sup_errors(a: nn.Module, b: nn.Module, x: Tensor, points: int = 33) -> Tensor:
    """Largest error on the line, per example."""
    first, last = a.state_dict(), b.state_dict()
    worst = torch.zeros(len(x), dtype=torch.float64)
    with torch.no_grad():
        for t in torch.linspace(0, 1, points, dtype=torch.float64).tolist():
            state = {k: (1 - t) * first[k] + t * last[k] for k in first}
            error = torch.func.functional_call(a, state, (x,)) - ((1 - t) * a(x) + t * b(x))
            worst = torch.maximum(worst, error.norm(dim=1))
    return worst


@pytest.mark.parametrize(
    ("activation", "depth", "seed"),
    [("relu", 0, 0), ("relu", 1, 1), ("relu", 3, 0), ("tanh", 2, 1), ("sigmoid", 1, 0), ("leaky_relu", 2, 1)],
)
def test_the_bound_holds_and_is_coarser_than_one_segment(activation: str, depth: int, seed: int) -> None:
    a, b = networks(seed, activation=activation, depth=depth, bias=seed == 1)
    x = examples(20)
    found = certify_weights_only(a, b, [x[:13], x[13:]])
    assert float(sup_errors(a, b, x).square().mean().sqrt()) <= found.lmc_error
    assert certify(a, b, [x], segments=1).lmc_error <= found.lmc_error + 1e-8
    assert found.barrier == math.sqrt(2) * found.lmc_error
    assert found.examples == 20
    assert len(found.matching) == len(found.errors) == depth + 1


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(150))
def test_the_bound_holds_over_random_pairs(seed: int) -> None:
    a, b = networks(seed, depth=1 + seed % 4, activation=["relu", "tanh", "sigmoid"][seed % 3])
    x = examples(7, seed)
    found = certify_weights_only(a, b, [x])
    assert float(sup_errors(a, b, x, 65).square().mean().sqrt()) <= found.lmc_error


def test_the_distances_bound_the_pre_activations_of_b() -> None:
    a, b = networks(2)
    x = examples(30)
    found = certify_weights_only(a, b, [x])
    h_a, h_b = x, x
    for k, (layer_a, layer_b) in enumerate(zip(a.layers, b.layers, strict=True)):  # type: ignore[arg-type]
        change = functional.linear(h_a, layer_a.weight - layer_b.weight, layer_a.bias - layer_b.bias)
        assert float(change.detach().square().sum(1).mean().sqrt()) == pytest.approx(found.matching[k])
        z_a, z_b = layer_a(h_a).detach(), layer_b(h_b).detach()
        assert float((z_a - z_b).square().sum(1).mean().sqrt()) <= found.distances[k] * (1 + 1e-9)
        h_a, h_b = torch.relu(z_a), torch.relu(z_b)


def test_a_hand_value() -> None:
    """One hidden unit: 1 → 1 → 1, no biases, one example."""
    a, b = mlp(1, 1, 1, 1, bias=False).double().eval(), mlp(1, 1, 1, 1, bias=False).double().eval()
    for model, values in ((a, (3.0, 2.0)), (b, (1.0, 5.0))):
        for layer, value in zip(model.layers, values, strict=True):  # type: ignore[arg-type]
            nn.init.constant_(layer.weight, value)
    found = certify_weights_only(a, b, [torch.tensor([[2.0]])])
    # Z1 = D1 = 2 · 2 = 4, ρ1 = 4/4 = 1; the output: 5 · 1 + 3 · 4 / 4 = 8.
    assert found.matching == pytest.approx((4.0, 18.0))
    assert found.distances[0] == pytest.approx(4.0)
    assert found.errors == pytest.approx((1.0, 8.0))
    assert found.lmc_error == pytest.approx(8.0)


def test_identical_and_relabelled_networks_have_no_error() -> None:
    a, _ = networks(0)
    x = examples(9)
    assert certify_weights_only(a, a, [x]).lmc_error <= 2e-9
    spec = discover(a, x)
    turn = torch.roll(torch.arange(14), 1)
    moved = apply(spec, dict.fromkeys(spec.groups, turn), a.state_dict())
    assert certify_weights_only(a, moved, [x]).lmc_error > 0.1
    b, _ = networks(0)
    b.load_state_dict(moved)
    back = align(a, b, batches=[x], method="covariance").apply(b)
    assert certify_weights_only(a, back, [x]).lmc_error <= 2e-9


class _Refused(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.one, self.two, self.norm = nn.Linear(6, 6), nn.Linear(6, 3), nn.BatchNorm1d(6)

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "branch":
            return self.two(torch.relu(self.one(x)) + x)
        if self.kind == "steep":
            return self.two(functional.gelu(self.one(x)))
        if self.kind == "twice":
            return self.two(torch.tanh(torch.relu(self.one(x))))
        if self.kind == "elu":
            return self.two(functional.elu(self.one(x), alpha=2.0))
        if self.kind == "softplus":
            return self.two(functional.softplus(self.one(x), beta=2.0))
        if self.kind == "jump":
            return self.two(functional.softplus(self.one(x), threshold=1.0))
        if self.kind == "learned limit":
            return self.two(torch.clamp(self.one(x), max=self.one.bias))
        if self.kind == "cast":
            return self.two(self.one(x).float().double())
        if self.kind == "mixed":
            return self.two(self.one(x).unsqueeze(0).flatten(0, 1)[:2])
        if self.kind == "normalised":
            return self.two(torch.relu(self.norm(self.one(x))))
        if self.kind == "made bias":
            return self.two(functional.linear(x, self.one.weight, self.one.bias * 2))
        if self.kind == "turned":
            return self.two(functional.linear(x, self.one.weight.T, self.one.bias))
        if self.kind == "made":
            return self.two(functional.linear(x, self.one.weight * 2))
        return torch.relu(self.one(x))


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("branch", "operator aten.add is out of scope"),
        ("steep", "operator aten.gelu is out of scope"),
        ("twice", "operator aten.tanh is out of scope"),
        ("elu", "operator aten.elu is out of scope"),
        ("softplus", "operator aten.softplus is out of scope"),
        ("jump", "operator aten.softplus is out of scope"),
        ("learned limit", "operator aten.clamp is out of scope"),
        ("cast", "is out of scope"),
        ("mixed", "is out of scope"),
        ("normalised", "batch_norm.* is out of scope"),
        ("made", "operator aten.linear is out of scope"),
        ("made bias", "operator aten.linear is out of scope"),
        ("turned", "operator aten.linear is out of scope"),
        ("head", "end in a linear layer"),
    ],
)
def test_other_networks_are_refused_by_name(kind: str, message: str) -> None:
    model = _Refused(kind).double().eval()
    with pytest.raises(ModelError, match=message):
        certify_weights_only(model, model, [examples(3)])


def test_bad_use_is_refused() -> None:
    a, b = networks(0)
    with pytest.raises(DataError, match="at least one batch"):
        certify_weights_only(a, b, [])
    training = nn.Sequential(nn.Linear(6, 6), nn.Dropout(), nn.Linear(6, 3)).train()
    with pytest.raises(ModelError, match="evaluation"):
        certify_weights_only(training, training, [examples(2)])
    with pytest.raises(ModelError, match="one input tensor"):
        certify_weights_only(a, b, [((examples(2), examples(2)), torch.zeros(2))])
    with pytest.raises(ShapeError, match="different widths"):
        certify_weights_only(a, mlp(6, 13, 2, 3).double(), [examples(2)])
    with pytest.raises(CheckpointError, match=r"layers\.0\.bias"):
        certify_weights_only(
            a, {**b.state_dict(), "layers.0.bias": torch.full((14,), torch.nan)}, [examples(2)]
        )

    class Two(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x, x + 1

    with pytest.raises(ModelError, match="one input and one output"):
        certify_weights_only(Two().eval(), Two().eval(), [examples(2)])
