"""Shards: the bytes of the format, sizes, and folders that are whole or not there."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from isthmus.errors import DataError, OutputError, ShapeError
from isthmus.pretrained._folder import free_target, output_folder
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
    names = (".out.0123abcd.partial", ".other.0123abcd.partial", ".out.notes.partial")
    gone, *others = (tmp_path / name for name in names)
    for folder in (gone, *others):
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(b"half")
    with output_folder(tmp_path / "out"):
        assert not gone.exists()
        assert all(folder.exists() for folder in others)


def test_a_run_whose_new_folder_is_taken_for_abandoned_takes_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another run may see the folder between its making and its locking."""
    made = 0
    mkdir = Path.mkdir

    def raced(self: Path, *arguments: object, **options: object) -> None:
        nonlocal made
        mkdir(self, *arguments, **options)  # type: ignore[arg-type]
        if self.name.endswith(".partial"):
            made += 1
            if made == 1:
                self.rmdir()

    monkeypatch.setattr(Path, "mkdir", raced)
    with output_folder(tmp_path / "out") as folder:
        (folder / "x").write_text("1")
    assert made == 2
    assert (tmp_path / "out" / "x").exists()


def test_a_run_whose_folders_all_vanish_gives_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mkdir = Path.mkdir

    def raced(self: Path, *arguments: object, **options: object) -> None:
        mkdir(self, *arguments, **options)  # type: ignore[arg-type]
        if self.name.endswith(".partial"):
            self.rmdir()

    monkeypatch.setattr(Path, "mkdir", raced)
    with pytest.raises(OutputError, match="other runs keep removing"), output_folder(tmp_path / "out"):
        pass


def test_without_locks_nothing_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether the writer is gone cannot be known then."""
    monkeypatch.setitem(sys.modules, "fcntl", None)
    (tmp_path / ".out.0123abcd.partial").mkdir()
    with output_folder(tmp_path / "out") as folder:
        (folder / "x").write_text("1")
    assert sorted(p.name for p in tmp_path.iterdir()) == [".out.0123abcd.partial", "out"]


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


def test_a_target_whose_parent_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OutputError, match=r"Check that the folder .*file is writable"):
        output_folder(tmp_path / "file" / "out").__enter__()
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="needs a file system that cannot be written")
def test_a_target_that_cannot_be_written() -> None:
    with pytest.raises(OutputError, match=r"Cannot write /proc/model/out: .* nothing was changed"):
        output_folder("/proc/model/out").__enter__()


def test_a_link_is_followed(tmp_path: Path) -> None:
    """A link may lead to another disk, where the hidden folder must lie as well."""
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "disk" / "model")
    with output_folder(tmp_path / "out") as folder:
        assert folder.parent == (tmp_path / "disk").resolve()
        (folder / "x").write_text("1")
    assert (tmp_path / "out").is_symlink()
    assert (tmp_path / "disk" / "model" / "x").exists()


def test_a_mount_point_is_refused_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.path.ismount", lambda path: Path(path) == tmp_path / "out")
    (tmp_path / "out").mkdir()
    with pytest.raises(OutputError, match=r"it is a mount point.* such as .*out/model"):
        free_target(tmp_path / "out")


def test_too_little_room_is_seen_before_any_work(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"it needs 1e\+09 GB, but the disk of .* has .* GB free"):
        output_folder(tmp_path / "new" / "out", 10**18).__enter__()
    assert list(tmp_path.iterdir()) == []
