"""``align``: the methods do what their formulas say, recover what was planted, and refuse bad input."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from isthmus import Alignment, align, apply, discover
from isthmus.errors import (
    CheckpointError,
    DataError,
    ModelError,
    ShapeError,
    SymmetryError,
    VerificationError,
)
from isthmus.matching import METHODS, CoordinateDescent, SinglePass
from isthmus.testing import mlp, planted_pair, randomise_state, reference_inputs, reference_network
from isthmus.transport import w2_matching


def trained_like(width: int = 16, depth: int = 2, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return randomise_state(mlp(6, width, depth, 3), torch.Generator().manual_seed(seed)).eval()


def examples(count: int = 300, *shape: int, seed: int = 1) -> Tensor:
    return torch.randn(count, *(shape or (6,)), generator=torch.Generator().manual_seed(seed))


def hidden(model: nn.Module, x: Tensor) -> list[Tensor]:
    """Return inputs of every layer, float64."""
    found: list[Tensor] = [x.double()]
    layers = next(iter(copy.deepcopy(model).double().children()))
    for layer in layers:  # type: ignore[union-attr]
        found.append(torch.relu(layer(found[-1])).detach())
    return found


def best(gain: Tensor) -> Tensor:
    return torch.as_tensor(linear_sum_assignment(gain.numpy(), maximize=True)[1])


def hand_matched(method: str, a: nn.Module, b: nn.Module, x: Tensor) -> list[Tensor]:
    """Return the permutations of a plain MLP straight from the formulas of the methods note."""
    sa, sb = ({k: v.double() for k, v in m.state_dict().items()} for m in (a, b))
    ha, hb = hidden(a, x), hidden(b, x)
    before = torch.arange(x.shape[1])
    found: list[Tensor] = []
    for k in range(len(ha) - 2):
        wa, wb = sa[f"layers.{k}.weight"], sb[f"layers.{k}.weight"][:, before]
        ba, bb = sa[f"layers.{k}.bias"], sb[f"layers.{k}.bias"]
        if method == "weights-incoming":
            gain = wa @ wb.T
        elif method == "covariance":
            one = torch.cat([ha[k], torch.ones(len(x), 1, dtype=torch.float64)], 1)
            moment = one.T @ one / len(x)
            gain = torch.cat([wa, ba[:, None]], 1) @ moment @ torch.cat([wb, bb[:, None]], 1).T
        else:
            ca, cb = (h[k + 1] - h[k + 1].mean(0) for h in (ha, hb))
            gain = ca.T @ cb / len(x)
            if method == "correlation":
                gain = gain / (ca.square().mean(0).sqrt()[:, None] * cb.square().mean(0).sqrt())
        before = best(gain)
        found.append(before)
    return found


@pytest.mark.parametrize("method", ["weights-incoming", "covariance", "activations", "correlation"])
def test_layer_by_layer_methods_equal_their_formulas(method: str) -> None:
    x = examples()
    torch.manual_seed(3)
    a, b = mlp(6, 16, 2, 3).eval(), mlp(6, 16, 2, 3).eval()
    with torch.no_grad():
        for name, parameter in (*a.named_parameters(), *b.named_parameters()):
            if name.endswith("bias"):
                parameter.uniform_(0, 1)
    found = align(a, b, batches=[x[:200], x[200:]], method=method)
    units = [h.var(0) for m in (a, b) for h in hidden(m, x)[1:-1]]
    assert min(float(v.min()) for v in units) > 0, "dead units would make the optimum ambiguous"
    for (name, permutation), expected in zip(
        found.permutations.items(), hand_matched(method, a, b, x), strict=True
    ):
        assert torch.equal(permutation, expected), name


def test_full_weight_matching_is_a_fixed_point_of_its_formula() -> None:
    a, b = trained_like(), trained_like(seed=1)
    found = align(a, b, args=examples(2), method="weights")
    assert found.status == "converged"
    assert list(found.sweeps) == sorted(found.sweeps)
    sa, sb = ({k: v.double() for k, v in m.state_dict().items()} for m in (a, b))
    p, q = found.permutations["layers.0"], found.permutations["layers.1"]
    one = sa["layers.0.weight"] @ sb["layers.0.weight"].T + torch.outer(
        sa["layers.0.bias"], sb["layers.0.bias"]
    )
    one = one + sa["layers.1.weight"].T @ sb["layers.1.weight"][q]
    two = sa["layers.1.weight"] @ sb["layers.1.weight"][:, p].T
    two = (
        two
        + torch.outer(sa["layers.1.bias"], sb["layers.1.bias"])
        + sa["layers.2.weight"].T @ sb["layers.2.weight"]
    )
    for gain, chosen in ((one, p), (two, q)):
        rows = torch.arange(len(chosen))
        assert float(gain[rows, chosen].sum()) == pytest.approx(
            float(gain[rows, best(gain)].sum()), rel=1e-12
        )


def test_covariance_with_white_inputs_and_no_bias_is_naive_matching() -> None:
    torch.manual_seed(0)
    a, b = mlp(6, 16, 1, 3, bias=False).eval(), mlp(6, 16, 1, 3, bias=False).eval()
    white = 6**0.5 * torch.linalg.qr(torch.randn(6, 6))[0]
    one = align(a, b, batches=[white], method="covariance")
    two = align(a, b, args=white, method="weights-incoming")
    assert torch.equal(one.permutations["layers.0"], two.permutations["layers.0"])


def test_the_matched_cost_is_the_transport_distance_of_pre_activations() -> None:
    """Theory, section 1.3: the covariance cost of a first layer is the W2² of its neurons in the input's metric."""
    torch.manual_seed(0)
    a, b, x = mlp(6, 16, 1, 3, bias=False).eval(), mlp(6, 16, 1, 3, bias=False).eval(), examples()
    found = align(a, b, batches=[x], method="covariance")
    moment = x.double().T @ x.double() / len(x)
    wa, wb = (m.state_dict()["layers.0.weight"].double() for m in (a, b))
    value, _ = w2_matching(wa, wb, sigma=moment)
    before, after = found.costs["layers.0"]
    assert after == pytest.approx(value, rel=1e-9)
    direct = (x.double() @ (wa - wb[found.permutations["layers.0"]]).T).square().mean(0).mean()
    assert after == pytest.approx(float(direct), rel=1e-9)
    assert before > after


DEAR = {"vgg16_bn": "covariance", "resnet20": "correlation"}
"""Networks that one method meets by default, the others among the slow tests."""


@pytest.mark.parametrize("method", METHODS.usual)
@pytest.mark.parametrize("name", ["mlp", "groupnorm_resnet"])
def test_planted_permutations_are_recovered_whatever_the_method(name: str, method: str) -> None:
    check_planted(name, method)


@pytest.mark.parametrize(
    ("name", "method"),
    [
        pytest.param(name, method, marks=() if method == quick else pytest.mark.slow)
        for name, quick in DEAR.items()
        for method in METHODS.usual
    ],
)
def test_planted_permutations_of_deep_networks_are_recovered(name: str, method: str) -> None:
    check_planted(name, method)


def check_planted(name: str, method: str) -> None:
    generator = torch.Generator().manual_seed(1)
    model = randomise_state(reference_network(name), generator).eval()
    inputs = reference_inputs(name)
    spec = discover(model, inputs)
    pair = planted_pair(model, spec, 0.01, generator)
    x = torch.randn(64, *inputs[0].shape[1:], generator=generator)
    found = align(model, pair.state_b, batches=[(x,)], method=method, spec=spec)
    for group, truth in pair.permutations.items():
        assert torch.equal(found.permutations[group], truth), group
    assert found.verification_error is not None
    assert found.verification_error <= 1e-10


def test_a_ring_of_three_units_moves_the_right_way() -> None:
    a = trained_like(3, 1)
    ring = torch.tensor([1, 2, 0])
    spec = discover(a, examples(1))
    b = apply(spec, {"layers.0": ring}, a.state_dict())
    found = align(a, b, args=examples(2), method="weights")
    assert found.permutations["layers.0"].tolist() == [2, 0, 1]
    back = found.apply(b)
    assert all(torch.equal(back[k], v) for k, v in a.state_dict().items())
    again = found.inverse().apply(back)
    assert all(torch.equal(again[k], v) for k, v in b.items())


def test_nothing_is_mutated_and_the_same_seed_gives_the_same_result() -> None:
    a, b, x = trained_like(24, 3), trained_like(24, 3, seed=1), examples()
    before = [v.clone() for m in (a, b) for v in m.state_dict().values()]
    results = []
    for global_seed in (1, 2):
        torch.manual_seed(global_seed)
        # Weights have many fixed points: the order of the sweeps decides which one is found.
        results.append(
            [
                align(
                    a, b, batches=[x], method="weights", schedule=CoordinateDescent(order="random"), seed=seed
                )
                for seed in range(4)
            ]
        )
    after = [v for m in (a, b) for v in m.state_dict().values()]
    assert all(torch.equal(v, w) for v, w in zip(before, after, strict=True))
    for one, other in zip(*results, strict=True):
        assert one.sweeps == other.sweeps
        assert all(torch.equal(p, other.permutations[group]) for group, p in one.permutations.items())
    assert len({found.sweeps for found in results[0]}) > 1, "the seed plays a part"


def test_forms_of_input(tmp_path: Path) -> None:
    a, b, x = trained_like(), trained_like(seed=1), examples()
    whole = align(a, b, batches=[x], method="activations")
    once = align(a, b.state_dict(), batches=(part for part in x.split(100)), method="activations")
    pairs = align(a, b, batches=[(x, torch.zeros(len(x)))], method="activations", args=x[:3])
    for other in (once, pairs):
        assert all(torch.equal(p, other.permutations[g]) for g, p in whole.permutations.items())
    moved = whole.apply(b)
    assert isinstance(moved, nn.Module)
    torch.testing.assert_close(moved(x), b(x))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_dtypes_are_kept(dtype: torch.dtype) -> None:
    a, b, x = trained_like().to(dtype), trained_like(seed=1).to(dtype), examples()
    found = align(a, b, batches=[x], method="covariance")
    moved = found.apply(b.state_dict())
    assert all(v.dtype == dtype for v in moved.values())


@pytest.mark.parametrize(
    "schedule",
    [SinglePass(), CoordinateDescent(), CoordinateDescent(order="random"), CoordinateDescent(max_sweeps=1)],
)
@pytest.mark.parametrize("method", METHODS.usual)
def test_every_method_runs_with_every_schedule(method: str, schedule: Any) -> None:
    a, b, x = trained_like(), trained_like(seed=1), examples()
    found = align(a, b, batches=[x], method=method, schedule=schedule)
    assert list(found.sweeps) == sorted(found.sweeps)
    for permutation in found.permutations.values():
        assert sorted(permutation.tolist()) == list(range(16))
    torch.testing.assert_close(found.apply(b)(x), b(x))


def test_tied_outgoing_weights_lower_the_whole_error() -> None:
    """Units with all but equal incoming weights are told apart by what reads them."""
    a, x = trained_like(12, 2), examples()
    layers: Any = a.layers
    with torch.no_grad():
        layers[0].weight.copy_(layers[0].weight[:1] + 1e-3 * examples(12))
        layers[0].bias.fill_(1.0)
        layers[1].weight.copy_(examples(12, 12, seed=3))
    truth = torch.arange(12).roll(1)
    b = apply(discover(a, x[:1]), {"layers.0": truth.argsort()}, a.state_dict())
    b["layers.0.weight"] = b["layers.0.weight"] + 1e-3 * examples(12, seed=2)

    def whole(found: Alignment) -> float:
        """Squared error of all pre-activations, every layer reading A's inputs."""
        own, other = a.state_dict(), found.apply(b)
        names = (f"layers.{k}.weight" for k in range(3))
        return sum(
            float((h @ (own[name] - other[name]).double().T).square().sum(1).mean())
            for name, h in zip(names, hidden(a, x), strict=False)
        )

    plain, tied = (align(a, b, batches=[x], method="covariance", tie_outgoing=t) for t in (False, True))
    assert whole(tied) < 0.5 * whole(plain)
    assert torch.equal(tied.permutations["layers.0"], truth)
    assert list(tied.sweeps) == sorted(tied.sweeps)
    assert tied.settings["tie_outgoing"] is True


def test_alignments_are_stored_whole(tmp_path: Path) -> None:
    a, b, x = trained_like(), trained_like(seed=1), examples()
    found = align(a, b, batches=[x], method="correlation", seed=3)
    found.save(tmp_path / "ab.safetensors")
    read = Alignment.load(tmp_path / "ab.safetensors")
    assert all(torch.equal(p, read.permutations[g]) for g, p in found.permutations.items())
    for field in (
        "spec",
        "method",
        "sweeps",
        "status",
        "costs",
        "notes",
        "settings",
        "seed",
        "verification_error",
    ):
        assert getattr(read, field) == getattr(found, field), field
    assert "correlation" in str(read)
    (tmp_path / "other.safetensors").write_bytes((tmp_path / "ab.safetensors").read_bytes()[:100])
    with pytest.raises(CheckpointError):
        Alignment.load(tmp_path / "other.safetensors")
    from isthmus.checkpoints import save_state

    save_state(tmp_path / "state.safetensors", a.state_dict())
    with pytest.raises(CheckpointError, match="expected an alignment"):
        Alignment.load(tmp_path / "state.safetensors")


def test_a_wrong_spec_is_refused() -> None:
    a, b = trained_like(), trained_like(seed=1)
    spec = discover(a, examples(1))
    group = spec.groups["layers.0"]
    with pytest.raises(VerificationError, match=r"layers\.0"):
        align(a, b, args=examples(2), method="weights", spec=spec.without_slot("layers.0", group.slots[0]))


def test_only_the_groups_of_a_restricted_spec_move() -> None:
    a, b = trained_like(), trained_like(seed=1)
    spec = discover(a, examples(1)).restrict(["layers.1"])
    found = align(a, b, args=examples(2), method="weights", spec=spec)
    assert list(found.permutations) == ["layers.1"]
    assert torch.equal(found.apply(b.state_dict())["layers.0.weight"], b.state_dict()["layers.0.weight"])


def test_dead_units_are_reported_and_paired_by_weights() -> None:
    """Activations say nothing about units that never vary: their weights do."""
    a, x = trained_like(12, 1), examples()
    with torch.no_grad():
        for unit in (1, 5, 7):
            a.layers[0].bias[unit] = -100.0  # type: ignore[index, union-attr]
    spec = discover(a, x[:1])
    pair = planted_pair(a, spec, 0.0, torch.Generator().manual_seed(0))
    for method in ("activations", "correlation"):
        found = align(a, pair.state_b, batches=[x], method=method)
        assert torch.equal(found.permutations["layers.0"], pair.permutations["layers.0"])
        assert any("never vary" in note for note in found.notes)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"method": "telepathy"}, DataError, "unknown method 'telepathy'"),
        ({"method": "covariance", "batches": None}, DataError, "pass batches"),
        ({"batches": None, "args": None}, DataError, "example inputs"),
        ({"batches": [], "method": "activations", "args": None}, DataError, "at least one batch"),
        ({"model_b": mlp(6, 16, 3, 3).eval()}, CheckpointError, "different architectures"),
        ({"model_b": mlp(6, 17, 2, 3).eval()}, ShapeError, "different widths"),
    ],
)
def test_bad_input_is_one_clear_error(change: dict[str, Any], error: type[Exception], words: str) -> None:
    given: dict[str, Any] = {
        "model_b": trained_like(seed=1),
        "method": "weights",
        "args": examples(2),
        "batches": [examples()],
    }
    given.update(change)
    with pytest.raises(error, match=words):
        align(trained_like(), given.pop("model_b"), **given)


def test_bad_networks_are_refused() -> None:
    a, b = trained_like(), trained_like(seed=1)
    b.layers[1].weight.data[0, 0] = float("inf")  # type: ignore[index, union-attr]
    with pytest.raises(CheckpointError, match=r"B: 'layers\.1\.weight'"):
        align(a, b, args=examples(2), method="weights")
    noisy = nn.Sequential(nn.Linear(6, 4), nn.Dropout(0.5), nn.Linear(4, 2))
    with pytest.raises(ModelError, match="training mode"):
        align(noisy, noisy, args=examples(2), method="weights")
    found = align(a, trained_like(seed=2), args=examples(2), method="weights")
    with pytest.raises((SymmetryError, ShapeError)):
        found.apply(mlp(6, 9, 2, 3).state_dict())
