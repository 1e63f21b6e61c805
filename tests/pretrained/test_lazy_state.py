"""Lazy states: what is read equals what is stored, and no damage goes unseen."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from isthmus.errors import CheckpointError, MissingExtraError
from isthmus.pretrained import LazyState
from isthmus.states import digest_of

TENSORS = {
    "w": torch.arange(12, dtype=torch.float32).reshape(4, 3),
    "half": torch.arange(6, dtype=torch.bfloat16),
    "scalar": torch.tensor(7),
    "empty": torch.zeros(0, 3),
}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    save_file(TENSORS, tmp_path / "model.safetensors", metadata={"format": "pt"})
    return tmp_path / "model.safetensors"


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    save_file(
        {k: TENSORS[k] for k in ("w", "empty")}, tmp_path / "one.safetensors", metadata={"format": "pt"}
    )
    save_file({k: TENSORS[k] for k in ("half", "scalar")}, tmp_path / "two.safetensors")
    places = {"w": "one", "empty": "one", "half": "two", "scalar": "two"}
    index = {"metadata": {}, "weight_map": {k: f"{v}.safetensors" for k, v in places.items()}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    return tmp_path


@pytest.mark.parametrize("fixture", ["file", "sharded"])
def test_reads_what_is_stored(fixture: str, request: pytest.FixtureRequest) -> None:
    state = LazyState.open(request.getfixturevalue(fixture))
    assert set(state) == set(TENSORS)
    assert len(state) == 4
    for name, tensor in TENSORS.items():
        assert state[name].dtype == tensor.dtype == state.stored(name).dtype
        assert torch.equal(state[name], tensor)
        assert state.shapes()[name].shape == tensor.shape == state.stored(name).shape
    assert torch.equal(state.rows("w", 1, 3), TENSORS["w"][1:3])
    assert torch.equal(state.rows("scalar", 0, 1), TENSORS["scalar"])
    assert state.nbytes == 48 + 12 + 8
    assert state.metadata == {"format": "pt"}
    assert "w" in state
    assert "v" not in state


def test_other_names_share_a_tensor_that_counts_once(file: Path) -> None:
    state = LazyState.open(file).under({"x": "w", "y": "w"})
    assert list(state) == ["x", "y"]
    assert torch.equal(state["y"], TENSORS["w"])
    assert state.nbytes == 48


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such file"):
        LazyState.open(tmp_path / "none.safetensors")


@pytest.mark.parametrize("kept", [1, 4, 40, -1])
def test_a_truncated_file(file: Path, kept: int) -> None:
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(CheckpointError, match="not a whole safetensors file"):
        LazyState.open(file)


def test_another_format(tmp_path: Path) -> None:
    torch.save({"w": torch.zeros(3)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="not a whole safetensors file"):
        LazyState.open(tmp_path)


def test_a_dtype_that_torch_lacks(tmp_path: Path) -> None:
    header = json.dumps({"w": {"dtype": "F8_E8M0", "shape": [2], "data_offsets": [0, 2]}}).encode()
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"\0\0")
    with pytest.raises(CheckpointError, match="dtype F8_E8M0, which cannot be permuted"):
        LazyState.open(tmp_path)


def test_a_folder_without_weights(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"holds neither model\.safetensors nor"):
        LazyState.open(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"It holds pytorch_model\.bin; convert"):
        LazyState.open(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ("[1]", "expected an index with a weight_map from tensor to file, found list"),
        ("{}", "expected an index with a weight_map from tensor to file, found NoneType"),
        ('{"weight_map": 3}', "weight_map from tensor to file, found int"),
        ('{"weight_map": {"w": 3}}', "expected an index with a weight_map"),
        ('{"weight_map": ' + '{"w":' * 10**5, "nested 100001 levels deep"),
        ('{"weight_map": {"w": "a", "w": "b"}}', "holds the key 'w' twice"),
        ('{"weight_map": {}, "metadata": {"total_size": NaN}}', "holds the number NaN"),
    ],
)
def test_an_index_that_is_none(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(text, encoding="utf-8")
    with pytest.raises(CheckpointError, match=message):
        LazyState.open(tmp_path)


def test_an_unreadable_index(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such file"):
        LazyState.open(tmp_path / "none.json")


def test_a_missing_shard(sharded: Path) -> None:
    (sharded / "two.safetensors").unlink()
    with pytest.raises(
        CheckpointError, match=r"lists the shard 'two.safetensors', which is not in the folder"
    ):
        LazyState.open(sharded)


def test_a_shard_outside_the_folder(sharded: Path) -> None:
    path = sharded / "model.safetensors.index.json"
    path.write_text(path.read_text().replace("two.safe", "../two.safe"), encoding="utf-8")
    (sharded / "two.safetensors").rename(sharded.parent / "two.safetensors")
    with pytest.raises(CheckpointError, match=r"'\.\./two.safetensors'.* no file outside of it is read"):
        LazyState.open(sharded)


def test_a_tensor_that_the_index_does_not_list(sharded: Path) -> None:
    more = {"half": TENSORS["half"], "scalar": TENSORS["scalar"], "more": torch.ones(2)}
    save_file(more, sharded / "two.safetensors")
    assert torch.equal(LazyState.open(sharded)["more"], torch.ones(2))
    save_file({k: TENSORS[k] for k in ("w", "empty")} | {"more": torch.zeros(2)}, sharded / "one.safetensors")
    with pytest.raises(CheckpointError, match=r"does not list 'more', which lies in one.* and in two"):
        LazyState.open(sharded)


def test_where_the_index_says_counts(sharded: Path) -> None:
    """One shard may hold a copy of what the index places in another."""
    other = {"w": TENSORS["w"] + 1, "half": TENSORS["half"], "scalar": TENSORS["scalar"]}
    save_file(other, sharded / "two.safetensors")
    assert torch.equal(LazyState.open(sharded)["w"], TENSORS["w"])


def test_notes_of_the_index(sharded: Path) -> None:
    path = sharded / "model.safetensors.index.json"
    notes = {"total_size": 68, "total_parameters": 19}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"metadata": notes}), encoding="utf-8")
    state = LazyState.open(sharded)
    assert state.index_metadata == state.under({"x": "w"}).index_metadata == notes


def test_a_link_to_weights_that_are_gone(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").symlink_to("../../blobs/1234")
    with pytest.raises(CheckpointError, match=r"is a link to \.\./\.\./blobs/1234, which is not there"):
        LazyState.open(tmp_path)


def test_a_shard_of_another_checkpoint(sharded: Path) -> None:
    save_file({"half": TENSORS["half"]}, sharded / "two.safetensors")
    with pytest.raises(CheckpointError, match=r"says that two.safetensors holds 'scalar', but it does not"):
        LazyState.open(sharded)


def test_a_file_that_changes_while_it_is_used(file: Path) -> None:
    state = LazyState.open(file)
    save_file({"other": torch.zeros(1)}, file)
    with pytest.raises(CheckpointError, match="was changed or replaced since it was opened"):
        state["w"]


def test_the_digest_is_computed_once(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = LazyState.open(file)
    expected = digest_of({name: state[name] for name in state})
    assert digest_of(state) == expected
    monkeypatch.setattr(LazyState, "__getitem__", lambda state, name: pytest.fail("read again"))
    assert digest_of(state) == expected


def test_a_tensor_that_cannot_be_read_whole(file: Path) -> None:
    state = LazyState.open(file)
    name, stored = next((n, state.stored(n)) for n in state if state.stored(n).nbytes)
    beyond = LazyState({name: replace(stored, offset=stored.identity.size - 1)})
    with pytest.raises(CheckpointError, match="cannot be read whole"):
        beyond[name]


def test_without_safetensors(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(MissingExtraError, match=r"isthmus\[hf\]"):
        LazyState.open(file)
