"""Alignments by couplings of every kind: stored, inverted, composed, and refused where they are damaged."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from isthmus.checkpoints import load_metadata, load_state, save_state
from isthmus.couplings import Coupling, Linear, Monomial, Nested, Permutation, Plan, Rotation
from isthmus.errors import CheckpointError, SymmetryError
from isthmus.matching import Alignment
from isthmus.matching._stored import from_stored
from isthmus.symmetry import Acts, SymmetrySpec, discover
from isthmus.testing import mlp


def coupled(kind: str, size: int, seed: int) -> Coupling:
    source = torch.Generator().manual_seed(seed)
    values = torch.randn(size, size, generator=source, dtype=torch.float64)
    order = torch.randperm(size, generator=source)
    return {
        "permutation": lambda: Permutation(order),
        "monomial": lambda: Monomial(order, values[0]),
        "rotation": lambda: Rotation(torch.linalg.qr(values)[0]),
        "linear": lambda: Linear(values),
        "plan": lambda: Plan(values.abs()),
        "nested": lambda: Nested(
            Permutation(torch.tensor([1, 0])), [coupled("rotation", size // 2, seed + k) for k in (1, 2)]
        ),
    }[kind]()


def anything(spec: SymmetrySpec) -> SymmetrySpec:
    """Return a spec that lets any coupling act, as that of a linear network does."""
    for group in spec.groups.values():
        spec = spec.with_group(replace(group, acts=Acts.GENERAL))
    return spec


ANY = ("permutation", "monomial", "rotation", "linear", "plan", "nested")


@pytest.mark.parametrize("kind", ANY)
def test_couplings_of_every_kind_are_stored(kind: str, tmp_path: Path) -> None:
    spec = anything(discover(mlp(3, 4, 3, 2), torch.zeros(1, 3)))
    names = list(spec.groups)
    given: dict[str, Coupling] = {names[0]: coupled(kind, 4, 1), names[1]: coupled("permutation", 4, 2)}
    found = Alignment(given, spec, "mine", notes=("one",), seed=7)
    found.save(tmp_path / "one.safetensors")
    again = Alignment.load(tmp_path / "one.safetensors")
    assert list(again.couplings) == names[:2]
    for name, coupling in given.items():
        assert type(again.couplings[name]) is type(coupling)
        assert torch.equal(again.couplings[name].matrix(), coupling.matrix())
        if kind != "plan":
            assert torch.equal(again.couplings[name].inverse().matrix(), coupling.inverse().matrix())
    again.save(tmp_path / "two.safetensors")
    assert (tmp_path / "one.safetensors").read_bytes() == (tmp_path / "two.safetensors").read_bytes()
    expected = "isthmus-alignment-1" if kind == "permutation" else "isthmus-alignment-2"
    assert load_metadata(tmp_path / "one.safetensors")["format"] == expected
    assert "\n" not in repr(again)
    words = {
        "monomial": "signs and scales",
        "rotation": "rotation",
        "linear": "invertible map",
        "nested": "blocks",
    }
    assert (f"(1 by {words.get(kind, 'transport plan')})" in str(again)) == (kind != "permutation")
    assert again.larger == ((names[0],) if kind != "permutation" else ())
    if kind != "permutation":
        with pytest.raises(SymmetryError, match=f"group {names[0]!r}: expected a permutation, found"):
            _ = again.permutations


@pytest.mark.parametrize("kind", [k for k in ANY if k not in ("plan", "nested")])
def test_couplings_of_every_kind_invert_and_compose(kind: str) -> None:
    model = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 4), nn.Linear(4, 2)).double()
    spec = discover(model, torch.zeros(1, 3).double())
    one, two = (
        Alignment(
            {n: coupled(kind, g.size, seed + k) for k, (n, g) in enumerate(spec.groups.items())},
            spec,
            str(seed),
        )
        for seed in (3, 30)
    )
    state = {n: t.detach() for n, t in model.state_dict().items()}
    there = one.apply(state)
    for name, tensor in one.inverse().apply(there).items():
        assert torch.allclose(tensor, state[name], atol=1e-9)
    both = one.then(two)
    assert both.method == "3, then 30"
    for name, tensor in both.apply(state).items():
        assert torch.allclose(tensor, two.apply(there)[name], atol=1e-9)
    x = torch.randn(6, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    assert torch.allclose(both.apply(model)(x), model(x), atol=1e-9)


def test_alignments_of_other_networks_do_not_compose() -> None:
    one, other = (
        Alignment({}, discover(mlp(3, width, 3, 2), torch.zeros(1, 3)), "weights") for width in (4, 5)
    )
    with pytest.raises(SymmetryError, match="expected the groups of one network"):
        one.then(other)


def test_files_of_couplings_that_were_damaged_are_refused(tmp_path: Path) -> None:
    spec = discover(mlp(3, 4, 1, 2), torch.zeros(1, 3))
    (name,) = spec.groups
    path = tmp_path / "ab.safetensors"
    nest = coupled("nested", 4, 1)
    Alignment({name: nest}, spec, "mine").save(path)
    tensors, metadata = load_state(path), load_metadata(path)
    details = json.loads(metadata["alignment"])

    def write(change: dict[str, object], left: dict[str, Tensor]) -> None:
        text = json.dumps({**{k: v for k, v in details.items() if k != "digest"}, **change})
        save_state(path, left, {**metadata, "alignment": text})

    missing = next(k for k in tensors if "values" in k)
    write({}, {k: t for k, t in tensors.items() if k != missing})
    with pytest.raises(
        CheckpointError, match=r"expected one coupling for each of its 1 groups, but .* is missing"
    ):
        Alignment.load(path)
    kind = {**details["couplings"][name]}
    write(
        {"couplings": {name: {**kind, "inner": [{**kind["inner"][0], "kind": "spiral"}, kind["inner"][1]]}}},
        tensors,
    )
    with pytest.raises(
        CheckpointError, match="A coupling is stored as 'spiral'; this version knows 'permutation'"
    ):
        Alignment.load(path)
    write({"couplings": {name: {**kind, "outer": kind["inner"][0]}}}, tensors)
    with pytest.raises(CheckpointError, match="is missing or not one of them"):
        Alignment.load(path)
    swapped = {**tensors, missing: tensors[missing] + 1}
    write({}, swapped)
    with pytest.raises(
        CheckpointError, match="the alignment in it is damaged: ShapeError: Rotation: expected orthonormal"
    ):
        Alignment.load(path)


def test_an_outer_coupling_that_is_no_permutation_is_refused() -> None:
    rotation = {"kind": "rotation", "tensors": {"values": "v"}}
    with pytest.raises(CheckpointError, match="The outer coupling of a nested one is stored as 'rotation'"):
        from_stored({"kind": "nested", "outer": rotation, "inner": []}, {"v": torch.eye(2)})


def test_couplings_of_classes_of_ones_own_are_not_stored(tmp_path: Path) -> None:
    class Mine:
        shape = (4, 4)
        carry = carry_readers = then = inverse = matrix = lambda self, *args: None

    spec = discover(mlp(3, 4, 1, 2), torch.zeros(1, 3))
    (name,) = spec.groups
    with pytest.raises(
        CheckpointError, match=r"moves by .*, of a class that files do not know\. Express it as one of"
    ):
        Alignment({name: Mine()}, spec, "mine").save(tmp_path / "ab.safetensors")
    assert not (tmp_path / "ab.safetensors").exists()


def test_what_moves_is_what_is_not_itself() -> None:
    spec = anything(discover(mlp(3, 4, 1, 2), torch.zeros(1, 3)))
    (name,) = spec.groups
    turn = torch.eye(4).double()
    turn[:2, :2] = torch.tensor([[0.6, -0.8], [0.8, 0.6]], dtype=torch.float64)
    for coupling, share in (
        (Monomial(torch.arange(4), torch.tensor([2.0, -1.0, 1.0, 1.0])), 0.0),
        (Monomial(torch.tensor([1, 0, 2, 3]), torch.ones(4)), 0.5),
        (Rotation(turn), 0.5),
        (Linear(2 * torch.eye(4)), 0.0),
    ):
        found = Alignment({name: coupling}, spec, "mine")
        assert found.moved == {name: share}
        assert f"moved={round(4 * share)} of 4 units" in repr(found)
        assert found.kinds == {type(coupling).__name__: 1}
