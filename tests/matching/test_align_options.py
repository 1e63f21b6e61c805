"""``align`` and :class:`Alignment` at the edges: options, precisions, stored files, nested inverses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from isthmus import Alignment, align, discover
from isthmus.checkpoints import save_state
from isthmus.errors import CheckpointError, DataError, ModelError, OutputError, ShapeError, SymmetryError
from isthmus.matching import METHODS, CoordinateDescent
from isthmus.moments import InputRequest
from isthmus.symmetry import SymmetrySpec
from isthmus.testing import mlp, planted_pair, randomise_state, reference_inputs, reference_network


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def network(seed: int = 0, width: int = 10) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return randomise_state(mlp(6, width, 2, 3), generator(seed)).eval()


def examples(count: int = 80) -> Tensor:
    return torch.randn(count, 6, generator=generator(5))


def equal(one: Alignment, other: Alignment) -> bool:
    return all(torch.equal(p, other.permutations[g]) for g, p in one.permutations.items())


@pytest.mark.parametrize("method", METHODS.usual)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_low_precision_networks_are_aligned_in_float64(dtype: torch.dtype, method: str) -> None:
    a = network().to(dtype)
    spec = discover(a, examples(1).to(dtype))
    pair = planted_pair(a, spec, 0.0, generator(1))
    found = align(a, pair.state_b, batches=[examples()], method=method)
    assert all(torch.equal(found.permutations[g], p) for g, p in pair.permutations.items())
    moved = found.apply(pair.state_b)
    assert all(v.dtype == dtype and torch.equal(v, pair.state_a[k]) for k, v in moved.items())


def test_nested_alignments_invert_and_apply_both_ways() -> None:
    a = randomise_state(reference_network("groupnorm_resnet"), generator()).eval()
    b = randomise_state(reference_network("groupnorm_resnet", seed=1), generator(1)).eval()
    x = reference_inputs("groupnorm_resnet", 8, generator=generator(2))[0]
    found = align(a, b, batches=[x], method="weights")
    moved = found.apply(b)
    assert moved is not b
    torch.testing.assert_close(moved(x), b(x))
    back = found.inverse().apply(moved.state_dict())
    assert all(torch.equal(back[k], v) for k, v in b.state_dict().items())
    assert found.inverse().method == "inverse of weights"
    assert any(share > 0 for share in found.moved.values())


def test_summary_and_moved() -> None:
    spec = discover(network(width=3), examples(1))
    ring = {"layers.0": torch.tensor([1, 2, 0]), "layers.1": torch.tensor([0, 1, 2])}
    found = Alignment(ring, spec, "weights", verification_error=2e-16)
    assert str(found) == (
        "Alignment by weights: 2 groups, 3 of 6 units moved, single pass, outputs of B changed by 2.0e-16. "
        "7 % of 45 entries are pinned: 7 % by the model's output 'output'."
    )
    assert found.moved == {"layers.0": 1.0, "layers.1": 0.0}


def test_stored_alignments_of_nested_groups(tmp_path: Path) -> None:
    a = randomise_state(reference_network("groupnorm_resnet"), generator()).eval()
    x = reference_inputs("groupnorm_resnet", 8, generator=generator(2))[0]
    pair = planted_pair(a, discover(a, (x[:2],)), 0.1, generator(3))
    found = align(a, pair.state_b, batches=[x], method="covariance", schedule=CoordinateDescent(max_sweeps=2))
    found.save(tmp_path / "found.safetensors")
    read = Alignment.load(tmp_path / "found.safetensors")
    assert equal(found, read)
    assert read.spec == found.spec
    assert read.settings == found.settings
    assert "CoordinateDescent" in read.settings["schedule"]


def test_files_that_are_no_alignments(tmp_path: Path) -> None:
    found = align(network(0), network(1), args=examples(2), method="weights")
    with pytest.raises(CheckpointError, match="no such"):
        Alignment.load(tmp_path / "missing.safetensors")
    save_state(tmp_path / "other.safetensors", found.permutations, {"format": "isthmus-alignment-9"})
    with pytest.raises(CheckpointError, match="found format 'isthmus-alignment-9'"):
        Alignment.load(tmp_path / "other.safetensors")
    details = json.dumps({"spec": found.spec.to_json()})
    save_state(
        tmp_path / "part.safetensors",
        found.permutations,
        {"format": "isthmus-alignment-1", "alignment": details},
    )
    with pytest.raises(CheckpointError, match="damaged"):
        Alignment.load(tmp_path / "part.safetensors")
    with pytest.raises(OutputError, match="nothing was changed"):
        found.save(tmp_path / "nowhere" / "found.safetensors")


def test_an_imported_spec_with_groups_left_out() -> None:
    a, b = network(0), network(1)
    spec = discover(a, examples(1))
    handwritten = spec.restrict(["layers.0"]).to_permutation_spec()
    shapes = {k: tuple(v.shape) for k, v in a.state_dict().items()}
    imported = SymmetrySpec.from_permutation_spec(handwritten, shapes)
    found = align(a, b, batches=[examples()], method="activations", spec=imported)
    assert len(found.permutations) == 1
    (only,) = found.permutations.values()
    alone = align(a, b, batches=[examples()], method="activations", spec=spec)
    assert torch.equal(only, alone.permutations["layers.0"])
    assert torch.equal(found.apply(b.state_dict())["layers.2.weight"], b.state_dict()["layers.2.weight"])


def test_a_spec_without_groups_moves_nothing() -> None:
    a, b = network(0), network(1)
    spec = discover(a, examples(1)).restrict([])
    for method in METHODS.usual:
        found = align(a, b, batches=[examples()], method=method, spec=spec)
        assert found.permutations == {}
        assert all(torch.equal(v, b.state_dict()[k]) for k, v in found.apply(b.state_dict()).items())


def test_keyword_inputs_and_without_check() -> None:
    class Model(nn.Module):
        def __init__(self, seed: int) -> None:
            super().__init__()
            self.net = network(seed)

        def forward(self, inputs: Tensor) -> dict[str, Tensor]:
            return {"logits": self.net(inputs)}

    a, b = Model(0).eval(), Model(1).eval()
    batches = [{"inputs": examples(), "labels": torch.zeros(80)}]
    one = align(a, b, batches=batches, method="covariance")
    two = align(a, b, batches=batches, method="covariance", kwargs={"inputs": examples(3)}, check=False)
    assert equal(one, two)
    assert one.verification_error is not None
    assert one.verification_error < 1e-10
    assert two.verification_error is None


def test_the_seed_decides_the_sample_of_wide_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("isthmus.matching._problem.InputRequest", _tiny_sample)
    a, b, x = network(0, 24), network(1, 24), examples(400)
    runs = [align(a, b, batches=[x], method="covariance", seed=s) for s in (0, 0, 1)]
    assert equal(runs[0], runs[1])
    assert not equal(runs[0], runs[2]), "twelve rows are a coarse sample"


def _tiny_sample(*args: Any) -> Any:

    return InputRequest(*args, max_features=4, sample_rows=12)


@pytest.mark.parametrize(
    ("given", "error", "words"),
    [
        ({"method": "weights", "tie_outgoing": True}, DataError, "an option of method 'covariance'"),
        ({"method": "activations", "tie_outgoing": True}, DataError, "an option of method 'covariance'"),
        ({"method": "correlation", "batches": None}, DataError, "compares activations"),
        ({"batches": [torch.ones(3, 5)]}, ModelError, "Cannot trace"),
        ({"batches": [torch.full((3, 6), float("nan"))], "check": False}, DataError, "NaN or infinite"),
        ({"batches": [torch.ones(0, 6)]}, DataError, "holds no examples"),
        ({"batches": ["text"]}, DataError, "Cannot read a str"),
        ({"outputs": "loss"}, SymmetryError, "no output 'loss'"),
    ],
)
def test_bad_options(given: dict[str, Any], error: type[Exception], words: str) -> None:
    settings = {"batches": [examples()], "method": "covariance", **given}
    with pytest.raises(error, match=words):
        align(network(0), network(1), **settings)


def test_networks_that_do_not_fit() -> None:
    a, b = network(0), network(1)
    lacking = {k: v for k, v in b.state_dict().items() if k != "layers.1.bias"}
    with pytest.raises(CheckpointError, match=r"lacks 'layers\.1\.bias'"):
        align(a, lacking, args=examples(2), method="weights")
    extra = {**b.state_dict(), "layers.9.bias": torch.zeros(1)}
    with pytest.raises(CheckpointError, match=r"has 'layers\.9\.bias', unknown to A"):
        align(a, extra, args=examples(2), method="weights")
    b.train()
    wrapped = nn.Sequential(b, nn.Dropout(0.2))
    with pytest.raises(ModelError, match="Network B"):
        align(nn.Sequential(a, nn.Dropout(0.2)).eval(), wrapped, args=examples(2), method="weights")
    found = align(a, network(1), args=examples(2), method="weights")
    with pytest.raises((ShapeError, SymmetryError)):
        found.apply(network(0, 11).state_dict())
