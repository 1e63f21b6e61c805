"""Shards: the bytes of the format, sizes, and folders that are whole or not there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from isthmus.errors import DataError, OutputError, ShapeError
from isthmus.pretrained._folder import copy_extras, output_folder
from isthmus.pretrained._lazy import DTYPES
from isthmus.pretrained._shards import PlannedTensor, parse_size, plan_shards, write_shards


@pytest.mark.parametrize(
    ("text", "size"), [(7, 7), ("5GB", 5 * 10**9), ("1.5 kb", 1500), ("2GiB", 2**31), ("500MB", 5 * 10**8)]
)
def test_sizes(text: int | str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "5 apples", "-3", 0, "0GB", "5GBB"])
def test_sizes_that_are_none(text: int | str) -> None:
    with pytest.raises(DataError, match="expected a number of bytes"):
        parse_size(text)


def planned(key: str, count: int) -> PlannedTensor:
    return PlannedTensor(key, torch.float32, (count,))


def test_shards_are_filled_in_order() -> None:
    tensors = [planned("a", 2), planned("b", 1), planned("big", 9), planned("c", 1), planned("d", 0)]
    shards = plan_shards(tensors, 12)
    assert [[t.key for t in s] for s in shards] == [["a", "b"], ["big"], ["c", "d"]]
    assert plan_shards([], 12) == [[]]


@pytest.mark.parametrize("limit", [1, 64, 10**6])
def test_every_dtype_is_written_as_safetensors_reads_it(tmp_path: Path, limit: int) -> None:
    generator = torch.Generator().manual_seed(0)
    values: dict[str, torch.Tensor] = {"scalar": torch.tensor(2.5), "empty": torch.zeros(0, 4)}
    for name, dtype in DTYPES.items():
        values[f"é/{name}"] = torch.randint(0, 2, (5, 3), generator=generator).to(dtype)
    plan = [PlannedTensor(k, v.dtype, tuple(v.shape)) for k, v in values.items()]

    def blocks(tensor: PlannedTensor) -> list[torch.Tensor]:
        value = values[tensor.key]
        return (
            [value]
            if value.ndim == 0
            else list(value.mT.contiguous().mT.split(2))
            if value.ndim > 1
            else [value]
        )

    names = write_shards(tmp_path, plan, blocks, limit=limit, metadata={"format": "pt"})
    found = {k: v for name in names for k, v in load_file(tmp_path / name).items()}
    assert found.keys() == values.keys()
    for key, value in values.items():
        assert found[key].dtype == value.dtype
        assert torch.equal(found[key], value), key
    index = tmp_path / "model.safetensors.index.json"
    assert index.exists() == (limit < 10**6)
    if index.exists():
        text = json.loads(index.read_text())
        assert text["metadata"]["total_size"] == sum(t.nbytes for t in plan)
        assert all(k in load_file(tmp_path / v) for k, v in text["weight_map"].items())


@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        ([torch.zeros(2)], "expected 12 bytes, got 8"),
        ([torch.zeros(4)], "expected 12 bytes, got 16"),
        ([torch.zeros(3).double()], "expected rows of torch.float32"),
        ([torch.zeros(3, 1)], "expected rows of torch.float32 and shape"),
    ],
)
def test_blocks_that_do_not_add_up(tmp_path: Path, blocks: list[torch.Tensor], message: str) -> None:
    with pytest.raises(ShapeError, match=message):
        write_shards(tmp_path, [planned("w", 3)], lambda _: blocks, limit=100)


def test_a_folder_appears_when_it_is_whole(tmp_path: Path) -> None:
    target = tmp_path / "new" / "model [1]"
    with output_folder(target) as folder:
        (folder / "x").write_text("1")
        assert not target.exists()
    assert [p.name for p in target.iterdir()] == ["x"]
    assert [p.name for p in target.parent.iterdir()] == [target.name]


def test_an_empty_folder_may_be_there(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with output_folder(tmp_path / "out") as folder:
        (folder / "x").write_text("1")
    assert (tmp_path / "out" / "x").exists()


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_nothing_is_left_after_a_failure(tmp_path: Path, error: type[BaseException]) -> None:
    def fail() -> None:
        with output_folder(tmp_path / "out") as folder:
            (folder / "x").write_text("1")
            raise error

    with pytest.raises(error):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_an_output_error(tmp_path: Path) -> None:
    def fail() -> None:
        with output_folder(tmp_path / "out"):
            raise OSError(28, "No space left on device")

    with pytest.raises(OutputError, match="No space left on device"):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_what_is_there_stays(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "x").write_text("old")
    with pytest.raises(OutputError, match="it is there already"), output_folder(tmp_path / "out"):
        pass
    assert (tmp_path / "out" / "x").read_text() == "old"


def test_folders_that_were_abandoned_are_removed(tmp_path: Path) -> None:
    gone, other = tmp_path / ".out.12.partial", tmp_path / ".other.12.partial"
    for folder in (gone, other):
        folder.mkdir()
        (folder / ".lock").write_bytes(b"")
    with output_folder(tmp_path / "out"):
        assert not gone.exists()
        assert other.exists()


def test_of_two_runs_at_once_the_first_to_finish_wins(tmp_path: Path) -> None:
    def both() -> None:
        with output_folder(tmp_path / "out") as slow:
            with output_folder(tmp_path / "out") as fast:
                assert slow.exists()
                (fast / "x").write_text("fast")
            (slow / "x").write_text("slow")

    with pytest.raises(OutputError, match="Cannot write"):
        both()
    assert (tmp_path / "out" / "x").read_text() == "fast"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_files_beside_the_weights_are_copied(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    (source / "sub").mkdir(parents=True)
    (source / ".git").mkdir()
    target.mkdir()
    kept = ["config.json", "tokenizer.model", "sub/vocab.txt", "training_args.bin", "code.py"]
    stale = [
        "pytorch_model.bin",
        "sub/model.onnx",
        "adapter_model.safetensors",
        "pytorch_model.bin.index.json",
    ]
    for name in (*kept, *stale, "model.safetensors", "README.md", ".git/config"):
        (source / name).write_text(name)
    (source / "linked.txt").symlink_to(source / "config.json")
    assert sorted(copy_extras(source, target, {"model.safetensors"})) == sorted(stale)
    found = sorted(p.relative_to(target).as_posix() for p in target.rglob("*") if p.is_file())
    assert found == sorted([*kept, "linked.txt"])
    assert not (target / "linked.txt").is_symlink()
