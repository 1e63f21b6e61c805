"""Alignments as values and files: whole, equal byte for byte, and applied to the network they were found for."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import isthmus
from isthmus.checkpoints import load_metadata, load_state, save_state
from isthmus.errors import CheckpointError, IsthmusWarning, ShapeError, SymmetryError
from isthmus.matching import Alignment
from isthmus.states import digest_of
from isthmus.testing import mlp


@pytest.fixture(scope="module")
def pair() -> tuple[nn.Module, nn.Module]:
    made = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        made.append(mlp(5, 7, 2, 3).eval())
    return made[0], made[1]


@pytest.fixture(scope="module")
def found(pair: tuple[nn.Module, nn.Module]) -> Alignment:
    return isthmus.align(*pair, args=(torch.zeros(2, 5),), method="weights")


def rewritten(path: Path, found: Alignment, **changes: Any) -> Path:
    """Write an alignment with some of its details changed, None for left out."""
    found.save(path)
    details = json.loads(load_metadata(path)["alignment"])
    details.update(changes)
    details = {k: v for k, v in details.items() if v is not None}
    save_state(path, load_state(path), {"format": "isthmus-alignment-1", "alignment": json.dumps(details)})
    return path


def test_the_network_it_was_found_for_is_taken(pair, found) -> None:
    a, b = pair
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # untrained networks are near chance
        warnings.filterwarnings("error", message="This alignment is applied to another network")
        for network in (
            b,
            b.state_dict(),
            copy.deepcopy(b),
            {k: v.clone() for k, v in b.state_dict().items()},
        ):
            found.apply(network)
        assert isthmus.line(a, b, [(torch.randn(4, 5), torch.arange(4) % 3)], alignment=found).barrier >= 0
        isthmus.merge([a, b], alignments=[found])


def test_the_wrong_way_round_is_refused(pair, found) -> None:
    a, b = pair
    with pytest.raises(
        SymmetryError, match=r"moves network B towards A, and it is applied to A: the wrong way round"
    ):
        found.apply(a)
    with pytest.raises(SymmetryError, match="the wrong way round"):
        isthmus.line(b, a, [(torch.randn(4, 5), torch.arange(4) % 3)], alignment=found)
    with pytest.raises(SymmetryError, match="the wrong way round"):
        isthmus.merge([b, a], alignments=[found])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found.apply(a, check=False)


def test_the_inverse_goes_the_other_way(pair, found) -> None:
    a, b = pair
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        back = found.inverse().apply(found.apply(b))
        assert digest_of(back.state_dict()) == digest_of(b.state_dict())
        found.inverse().apply(a)
        assert found.inverse().inverse().apply(b) is not None
    with pytest.raises(SymmetryError, match="the wrong way round"):
        found.inverse().apply(b)


@pytest.mark.parametrize("kind", ["average", "later", "cast", "part"])
def test_other_networks_get_a_warning(kind, pair, found) -> None:
    _, b = pair
    state: dict[str, Tensor] = {k: v.clone() for k, v in b.state_dict().items()}
    if kind == "average":
        state = {k: 0.9 * v + 0.1 * torch.randn_like(v) for k, v in state.items()}
    if kind == "later":
        name = next(iter(state))
        state[name][0, 0] += 1e-3
    if kind == "cast":
        state = {k: v.double() for k, v in state.items()}
    if kind == "part":
        state["extra"] = torch.zeros(1)
    with pytest.warns(IsthmusWarning, match="applied to another network than the one it was found for"):
        moved = found.apply(state)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        quiet = found.apply(state, check=False)
    assert digest_of(moved) == digest_of(quiet)


def test_one_network_with_itself_has_no_wrong_way(pair) -> None:
    a, _ = pair
    same = isthmus.align(a, copy.deepcopy(a), args=(torch.zeros(2, 5),), method="weights")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        same.apply(a)
        same.inverse().apply(a)


def test_digests_know_names_shapes_dtypes_and_bytes() -> None:
    state = {
        "a": torch.arange(6.0).reshape(2, 3),
        "b": torch.tensor(True),
        "c": torch.zeros(0),
        "d": torch.tensor(1),
    }
    same = {
        "d": state["d"],
        "c": state["c"],
        "b": state["b"],
        "a": torch.arange(6.0).reshape(3, 2).t().t().reshape(2, 3),
    }
    turned = {**state, "a": torch.tensor([[0.0, 3.0], [1.0, 4.0], [2.0, 5.0]]).t()}
    assert digest_of(state) == digest_of(same) == digest_of(turned)
    others = [
        {**state, "a": state["a"].reshape(3, 2)},
        {**state, "a": state["a"].double()},
        {**state, "a": -state["a"]},
        {**state, "b": torch.tensor(False)},
        {**state, "c": torch.zeros(0, 1)},
        {**state, "e": torch.zeros(0)},
        {k: v for k, v in state.items() if k != "d"},
        {("z" if k == "a" else k): v for k, v in state.items()},
    ]
    assert len({digest_of(s) for s in (state, *others)}) == len(others) + 1
    for dtype in (torch.float16, torch.bfloat16, torch.int8, torch.complex64, torch.float8_e4m3fn):
        assert digest_of({"a": torch.ones(3).to(dtype)}) != digest_of({"a": torch.zeros(3).to(dtype)})
    assert digest_of({"a": torch.empty(2, device="meta")}) != digest_of({"a": torch.empty(3, device="meta")})


def test_a_file_keeps_everything(found, pair, tmp_path) -> None:
    found.save(tmp_path / "ab.safetensors")
    again = Alignment.load(tmp_path / "ab.safetensors")
    assert (again.digest_a, again.digest_b) == (found.digest_a, found.digest_b)
    assert list(again.permutations) == list(found.permutations)
    again.save(tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "ab.safetensors").read_bytes()
    with pytest.raises(SymmetryError, match="the wrong way round"):
        again.apply(pair[0])
    found.save(tmp_path / "ab.pt")
    assert Alignment.load(tmp_path / "ab.pt").digest_b == found.digest_b


def test_equal_runs_write_equal_files(found, tmp_path) -> None:
    contents = set()
    for k in range(6):  # two keys come in either order by chance
        found.save(tmp_path / f"{k}.safetensors")
        contents.add((tmp_path / f"{k}.safetensors").read_bytes())
    code = (
        "import sys, torch, isthmus\n"
        "from isthmus.testing import mlp\n"
        "made = []\n"
        "for seed in (0, 1):\n"
        "    torch.manual_seed(seed)\n"
        "    made.append(mlp(5, 7, 2, 3).eval())\n"
        "isthmus.align(*made, args=(torch.zeros(2, 5),), method='weights').save(sys.argv[1])\n"
    )
    path = tmp_path / "process.safetensors"
    environment = {**os.environ, "PYTHONHASHSEED": "1"}  # the hashes of this process are others
    subprocess.run([sys.executable, "-c", code, str(path)], check=True, env=environment)
    contents.add(path.read_bytes())
    assert len(contents) == 1


def test_metadata_of_any_file_come_in_order(tmp_path) -> None:
    notes = {k: f'{k} ü " \\ \n' for k in "qwertyuiop"}
    for k in range(5):
        save_state(tmp_path / f"{k}.safetensors", {"b": torch.arange(3), "a": torch.ones(2, 2)}, notes)
        assert load_metadata(tmp_path / f"{k}.safetensors") == notes
        assert torch.equal(load_state(tmp_path / f"{k}.safetensors")["b"], torch.arange(3))
    assert len({(tmp_path / f"{k}.safetensors").read_bytes() for k in range(5)}) == 1


def test_earlier_files_are_read(found, pair, tmp_path) -> None:
    old = rewritten(
        tmp_path / "old.safetensors", found, digest=None, digest_a=None, digest_b=None, groups=None
    )
    again = Alignment.load(old)
    assert again.digest_a == again.digest_b == ""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again.apply(pair[0])
        again.apply(pair[1])


def test_files_that_were_changed_are_refused(found, tmp_path) -> None:
    path = tmp_path / "ab.safetensors"
    with pytest.raises(CheckpointError, match="changed after it was written"):
        Alignment.load(rewritten(path, found, method="another"))
    with pytest.raises(CheckpointError, match="changed after it was written"):
        Alignment.load(rewritten(path, found, digest_b=found.digest_a))
    found.save(path)
    moves, notes = load_state(path), load_metadata(path)
    name = next(iter(moves))
    swapped = {**moves, name: moves[name].roll(1)}
    save_state(path, swapped, notes)
    with pytest.raises(CheckpointError, match="changed after it was written"):
        Alignment.load(path)
    save_state(path, {k: v for k, v in moves.items() if k != name}, notes)
    with pytest.raises(CheckpointError, match=f"{name!r} is missing or not one of them"):
        Alignment.load(path)
    save_state(path, {**moves, "more": torch.arange(3)}, notes)
    with pytest.raises(CheckpointError, match="'more' is missing or not one of them"):
        Alignment.load(path)


@pytest.mark.parametrize(
    "bad",
    [
        torch.tensor([0, 0, 1, 2, 3, 4, 5]),
        torch.tensor([-1, 0, 1, 2, 3, 4, 5]),
        torch.tensor([1, 2, 3, 4, 5, 6, 7]),
        torch.arange(6),
        torch.arange(7.0),
        torch.ones(7, dtype=torch.bool),
        torch.arange(7).reshape(1, 7),
    ],
    ids=["repeated", "negative", "out of range", "short", "floats", "booleans", "two axes"],
)
def test_permutations_are_checked_when_made_and_when_read(bad, found, tmp_path) -> None:
    name = next(iter(found.permutations))
    with pytest.raises(ShapeError, match=f"permutation of group {name!r}"):
        Alignment({**found.permutations, name: bad}, found.spec, "weights")
    with pytest.raises(SymmetryError, match="no group named 'gone'"):
        Alignment({"gone": torch.arange(3)}, found.spec, "weights")
    path = rewritten(tmp_path / "ab.safetensors", found, digest=None)
    save_state(path, {**load_state(path), name: bad}, load_metadata(path))
    with pytest.raises(
        CheckpointError, match=f"the alignment in it is damaged: .*permutation of group {name!r}"
    ):
        Alignment.load(path)


@pytest.mark.parametrize("change", ["stride", "copies", "twice", "deep", "list"])
def test_index_maps_are_checked_when_read(change, found, tmp_path) -> None:
    spec = json.loads(found.spec.to_json())
    slots = spec["groups"][0]["slots"]
    text = ""
    if change == "stride":
        slots[0]["stride"] = 0
    if change == "copies":
        slots[0]["copies"] = [[2, 0]]
    if change == "twice":
        slots.append(slots[0])
    if change == "deep":
        text = "[" * 100_000
    path = rewritten(tmp_path / "ab.safetensors", found, digest=None, spec=text or json.dumps(spec))
    if change == "list":
        save_state(path, load_state(path), {"format": "isthmus-alignment-1", "alignment": "[]"})
    with pytest.raises(CheckpointError, match="the alignment in it is damaged"):
        Alignment.load(path)


def test_an_alignment_used_with_another_network_as_its_frame_is_warned_of() -> None:
    """The first network of a line or a merge must be the one towards which B was moved."""
    a, b, c = (seeded_net(k) for k in range(3))
    data = [(torch.randn(20, 4, generator=torch.Generator().manual_seed(0)), torch.arange(20) % 3)]
    ab = isthmus.align(a, b, batches=data, method="weights")
    with pytest.warns(IsthmusWarning, match="brings B close to another network than the one it is used with"):
        isthmus.line(c, b, data, alignment=ab, points=3, bootstrap=0)
    with pytest.warns(IsthmusWarning, match="brings B close to another network"):
        isthmus.merge([c, b], alignments=[ab])
    isthmus.merge([a, b], alignments=[ab])


def seeded_net(seed: int) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(4, 9), nn.ReLU(), nn.Linear(9, 3)).eval()
