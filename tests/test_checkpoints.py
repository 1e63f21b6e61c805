"""Checkpoints: what is written is read back, bad files are refused, and nothing is half-written."""

from __future__ import annotations

import errno
import os
import pickle
import stat
import sys
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from isthmus.checkpoints import check_format, load_metadata, load_state, read_checkpoint, save_state
from isthmus.errors import CheckpointError, MissingExtraError, OutputError
from isthmus.files import atomic_folder, atomic_path

SUFFIXES = (".safetensors", ".pt", ".pth")


def example() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "weight": torch.randn(5, 4, generator=generator),
        "transposed": torch.randn(4, 5, generator=generator).T,
        "half": torch.randn(3, generator=generator).to(torch.bfloat16),
        "double": torch.randn(2, generator=generator, dtype=torch.float64),
        "steps": torch.tensor(7),
        "none": torch.empty(0, 3),
    }


class Malicious:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("should-never-exist",)


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("metadata", [None, {"seed": "3", "text": "é\n"}])
def test_round_trip(tmp_path: Path, suffix: str, metadata: dict[str, str] | None) -> None:
    path = tmp_path / f"state{suffix}"
    save_state(path, example(), metadata)
    loaded = load_state(str(path))
    assert set(loaded) == set(example())
    for key, tensor in example().items():
        assert torch.equal(loaded[key], tensor)
        assert loaded[key].dtype == tensor.dtype
    assert load_metadata(path) == (metadata or {})
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_tied_parameters_and_views_of_one_storage(tmp_path: Path, suffix: str) -> None:
    shared = torch.arange(12.0).reshape(3, 4)
    save_state(tmp_path / f"s{suffix}", {"a": nn.Parameter(shared), "b": shared, "row": shared[1]})
    loaded = load_state(tmp_path / f"s{suffix}")
    assert torch.equal(loaded["a"], shared)
    assert torch.equal(loaded["b"], shared)
    assert torch.equal(loaded["row"], shared[1])


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_model_loads_what_it_saved(tmp_path: Path, suffix: str) -> None:
    torch.manual_seed(0)
    model, other = (nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)) for _ in range(2))
    save_state(tmp_path / f"m{suffix}", model.state_dict())
    other.load_state_dict(load_state(tmp_path / f"m{suffix}"))
    assert all(torch.equal(v, other.state_dict()[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize(
    "wrap",
    [
        lambda s: {"state_dict": s, "epoch": 3},
        lambda s: {"model": s, "optimiser": {"lr": 0.1}},
        lambda s: {"model_state_dict": OrderedDict(s)},
        lambda s: {"model": {"state_dict": s}},
    ],
)
def test_nested_states_are_unwrapped(tmp_path: Path, wrap: Any) -> None:
    torch.save(wrap({"w": torch.ones(2)}), tmp_path / "s.pt")
    assert list(load_state(tmp_path / "s.pt")) == ["w"]
    assert load_metadata(tmp_path / "s.pt") == {}


def test_a_tensor_called_model_is_not_unwrapped(tmp_path: Path) -> None:
    torch.save({"model": torch.ones(2)}, tmp_path / "s.pt")
    assert list(load_state(tmp_path / "s.pt")) == ["model"]


# --- Bad files ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_missing_empty_and_unreadable_files(tmp_path: Path, suffix: str) -> None:
    with pytest.raises(CheckpointError, match="no such file"):
        load_state(tmp_path / f"missing{suffix}")
    (tmp_path / f"empty{suffix}").touch()
    with pytest.raises(CheckpointError, match="is empty"):
        load_state(tmp_path / f"empty{suffix}")
    (tmp_path / f"folder{suffix}").mkdir()
    with pytest.raises(CheckpointError, match="cannot be read: Is a directory"):
        load_state(tmp_path / f"folder{suffix}")


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_every_truncation_is_noticed(tmp_path: Path, suffix: str) -> None:
    save_state(tmp_path / f"whole{suffix}", example(), {"k": "v"})
    content = (tmp_path / f"whole{suffix}").read_bytes()
    cut = tmp_path / f"cut{suffix}"
    for length in [1, 2, 7, 8, 9, 12, *range(16, len(content), max(1, len(content) // 25)), len(content) - 1]:
        cut.write_bytes(content[:length])
        with pytest.raises(CheckpointError, match=r"truncated or damaged|looks like|plain pickle"):
            load_state(cut)
        with pytest.raises(CheckpointError):
            load_metadata(cut)


def test_truncated_files_of_the_old_torch_format(tmp_path: Path) -> None:
    torch.save(example(), tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    assert set(load_state(tmp_path / "old.pt")) == set(example())
    content = (tmp_path / "old.pt").read_bytes()
    for length in range(1, len(content), 37):
        (tmp_path / "cut.pt").write_bytes(content[:length])
        with pytest.raises(CheckpointError):
            load_state(tmp_path / "cut.pt")


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_noise_is_never_a_checkpoint(tmp_path: Path, suffix: str) -> None:
    generator = torch.Generator().manual_seed(1)
    for length in (1, 3, 20, 500):
        for start in (b"", b"PK\x03\x04", b"\x80\x02", b"hello"):
            noise = torch.randint(0, 256, (length,), generator=generator, dtype=torch.uint8)
            (tmp_path / f"x{suffix}").write_bytes(start + noise.numpy().tobytes())
            with pytest.raises(CheckpointError):
                load_state(tmp_path / f"x{suffix}")


def test_wrong_suffixes_are_explained(tmp_path: Path) -> None:
    save_state(tmp_path / "a.safetensors", example())
    save_state(tmp_path / "a.pt", example())
    (tmp_path / "a.safetensors").rename(tmp_path / "b.pt")
    (tmp_path / "a.pt").rename(tmp_path / "b.safetensors")
    with pytest.raises(CheckpointError, match=r"expected a torch file.*looks like a safetensors file"):
        load_state(tmp_path / "b.pt")
    with pytest.raises(CheckpointError, match=r"expected a safetensors file.*looks like a torch file"):
        load_state(tmp_path / "b.safetensors")
    for bad, found in (("c.h5", r"'\.h5'"), ("c", "no suffix")):
        with pytest.raises(CheckpointError, match=rf"unknown checkpoint format .*{found}.*Use one of"):
            load_state(tmp_path / bad)
        with pytest.raises(CheckpointError, match="unknown checkpoint format"):
            save_state(tmp_path / bad, example())


def test_code_in_a_pickle_is_refused_and_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"w": torch.ones(1), "x": Malicious()}, tmp_path / "evil.pt")
    torch.save(nn.Linear(2, 2), tmp_path / "module.pt")
    (tmp_path / "raw.pt").write_bytes(pickle.dumps({"w": Malicious()}))
    with pytest.raises(CheckpointError, match=r"refused.*asks to run posix\.mkdir.*Save only tensors"):
        load_state(tmp_path / "evil.pt")
    with pytest.raises(CheckpointError, match=r"refused.*asks to run torch\.nn\.modules\.linear\.Linear"):
        load_state(tmp_path / "module.pt")
    with pytest.raises(CheckpointError, match=r"refused.*plain pickle"):
        load_state(tmp_path / "raw.pt")
    with pytest.raises(CheckpointError, match="refused"):
        load_metadata(tmp_path / "evil.pt")
    assert not (tmp_path / "should-never-exist").exists()


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_torchscript_archives_are_refused(tmp_path: Path) -> None:
    torch.jit.script(nn.Linear(2, 2)).save(tmp_path / "s.pt")
    with pytest.raises(CheckpointError, match="TorchScript archive"):
        load_state(tmp_path / "s.pt")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (torch.ones(3), "expected a dictionary from name to tensor, found Tensor"),
        ([torch.ones(3)], "found list"),
        ({}, "holds no tensors"),
        ({"state_dict": {}}, "holds no tensors"),
        ({"w": torch.ones(2), "epoch": 3}, "expected a tensor under 'epoch', found int"),
    ],
)
def test_other_contents_are_refused(tmp_path: Path, value: Any, message: str) -> None:
    torch.save(value, tmp_path / "s.pt")
    with pytest.raises(CheckpointError, match=message):
        load_state(tmp_path / "s.pt")


# --- Writing -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_failing_write_leaves_the_old_file(
    tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import safetensors
    import safetensors.torch

    path = tmp_path / f"s{suffix}"
    save_state(path, {"w": torch.ones(2)})

    def full_disk(value: Any, target: Path, **_: Any) -> None:
        Path(target).write_bytes(b"half of it")
        if suffix == ".safetensors":
            raise safetensors.SafetensorError("I/O error: No space left on device (os error 28)")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(torch, "save", full_disk)
    monkeypatch.setattr(safetensors.torch, "save_file", full_disk)
    with pytest.raises(OutputError, match=r"Cannot write .*No space left on device.*nothing was changed"):
        save_state(path, {"w": torch.zeros(2)})
    assert torch.equal(load_state(path)["w"], torch.ones(2))
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_folders_that_cannot_be_written_to(tmp_path: Path, suffix: str) -> None:
    with pytest.raises(
        OutputError, match=r"Cannot write .*No such file or directory.*folder .*missing exists"
    ):
        save_state(tmp_path / "missing" / f"s{suffix}", example())
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match=r"Cannot write .*Not a directory"):
        save_state(tmp_path / "file" / f"s{suffix}", example())
    (tmp_path / f"taken{suffix}").mkdir()
    with pytest.raises(OutputError, match=r"Cannot write"):
        save_state(tmp_path / f"taken{suffix}", example())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", f"taken{suffix}"]


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may write to a read-only folder")
def test_a_read_only_folder(tmp_path: Path) -> None:
    folder = tmp_path / "locked"
    folder.mkdir(mode=0o500)
    with pytest.raises(OutputError, match="Permission denied"):
        save_state(folder / "s.pt", example())


def test_interrupting_a_write_leaves_nothing_behind(tmp_path: Path) -> None:
    target = tmp_path / "result.json"
    target.write_text("old")

    def interrupted() -> None:
        with atomic_path(target) as temporary:
            temporary.write_text("ne")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]
    with atomic_path(target) as temporary:
        temporary.write_text("new")
        assert target.read_text() == "old"
    assert target.read_text() == "new"


def test_files_of_a_folder_appear_together(tmp_path: Path) -> None:
    target = tmp_path / "new" / "results"
    with atomic_folder(target) as temporary:
        (temporary / "a.txt").write_text("a")
        (temporary / "inside").mkdir()
        (temporary / "inside" / "b.txt").write_text("b")
        assert not (target / "a.txt").exists()
    assert sorted(p.name for p in target.iterdir()) == ["a.txt", "inside"]
    with atomic_folder(target) as temporary:
        (temporary / "a.txt").write_text("again")
        assert (target / "a.txt").read_text() == "a"
    assert (target / "a.txt").read_text() == "again"
    assert (target / "inside" / "b.txt").read_text() == "b"


@pytest.mark.parametrize("existed", [False, True])
@pytest.mark.parametrize("failure", [KeyboardInterrupt(), ValueError("x"), OSError(errno.ENOENT, "not ours")])
def test_a_failure_leaves_a_folder_as_it_was(tmp_path: Path, existed: bool, failure: BaseException) -> None:
    target = tmp_path / "new" / "results"
    if existed:
        target.mkdir(parents=True)
        (target / "a.txt").write_text("old")

    def fail() -> None:
        with atomic_folder(target) as temporary:
            (temporary / "a.txt").write_text("ne")
            raise failure

    with pytest.raises(type(failure)) as caught:
        fail()
    assert caught.value is failure
    if existed:
        assert [p.read_text() for p in target.iterdir()] == ["old"]
    else:
        assert list(tmp_path.iterdir()) == []


def test_a_full_disk_and_an_unusable_folder_are_one_error(tmp_path: Path) -> None:
    def fill() -> None:
        with atomic_folder(tmp_path / "results") as temporary:
            (temporary / "a.txt").write_text("half")
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OutputError, match=r"output folder .*results: No space left on device. Make room"):
        fill()
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").touch()
    reached = False
    with pytest.raises(OutputError, match=r"Cannot write to the output folder .*file"):  # noqa: SIM117
        with atomic_folder(tmp_path / "file" / "inside"):
            reached = True
    assert not reached
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


@pytest.mark.skipif(
    not Path("/proc/self").exists(), reason="no folder here that even the superuser cannot write"
)
def test_a_read_only_output_folder_is_found_before_any_work() -> None:
    reached = False
    with pytest.raises(OutputError, match=r"Cannot write to the output folder /proc/isthmus"):  # noqa: SIM117
        with atomic_folder("/proc/isthmus/results"):
            reached = True
    assert not reached


def test_formats_are_told_by_the_suffix() -> None:
    for suffix in SUFFIXES:
        check_format(f"a{suffix}")
    with pytest.raises(CheckpointError, match=r"unknown checkpoint format '\.bin'"):
        check_format("a.bin")


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_what_the_reader_says_of_a_damaged_file_is_one_sentence(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"s{suffix}"
    save_state(path, example())
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(CheckpointError, match=r"truncated or damaged \([^()]*\)\. Copy or make it again\.$"):
        load_state(path)


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_a_plain_pickle_is_refused_without_a_warning(tmp_path: Path, protocol: int) -> None:
    (tmp_path / "s.pt").write_bytes(pickle.dumps({"w": 1.0}, protocol=protocol))
    with pytest.raises(CheckpointError, match=r"needs code execution|truncated or damaged"):
        load_state(tmp_path / "s.pt")


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_written_files_have_ordinary_permissions(tmp_path: Path, suffix: str) -> None:
    (tmp_path / "ordinary").touch()
    save_state(tmp_path / f"s{suffix}", example())
    modes = {stat.S_IMODE(p.stat().st_mode) for p in tmp_path.iterdir()}
    assert len(modes) == 1


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_what_is_not_a_tensor_or_a_string_is_not_written(tmp_path: Path, suffix: str) -> None:
    with pytest.raises(CheckpointError, match=r"expected a tensor under 'w', found list"):
        save_state(tmp_path / f"s{suffix}", {"w": [1.0]})  # type: ignore[dict-item]
    with pytest.raises(CheckpointError, match=r"metadata must map strings to strings, found {'seed': 3}"):
        save_state(tmp_path / f"s{suffix}", example(), {"seed": 3})  # type: ignore[dict-item]
    assert list(tmp_path.iterdir()) == []


def test_without_safetensors_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_state(tmp_path / "s.safetensors", example())
    monkeypatch.setitem(sys.modules, "safetensors", None)
    for action in (lambda p: save_state(p, example()), load_state, load_metadata):
        with pytest.raises(MissingExtraError, match=r'pip install "isthmus\[io\]"'):
            action(tmp_path / "s.safetensors")
    assert [p.name for p in tmp_path.iterdir()] == ["s.safetensors"]


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.middle, self.head = nn.Embedding(5, 3), nn.Linear(3, 3), nn.Linear(3, 5, bias=False)
        self.head.weight = self.embed.weight


@pytest.mark.parametrize("name", ["embed.weight", "head.weight"])
@pytest.mark.parametrize("before", ["", "module."])
def test_tied_weights_may_be_in_the_file_once(tmp_path: Path, name: str, before: str) -> None:
    saved, path = Tied().state_dict(), tmp_path / "tied.safetensors"
    save_state(path, {before + k: v for k, v in saved.items() if k == name or "middle" in k})
    found = read_checkpoint(path, like=Tied())
    assert list(found.state) == list(saved)
    assert all(torch.equal(found.state[k], v) for k, v in saved.items())
    assert "is not in the file and was taken from" in found.notes[-1]
    untied = Tied()
    untied.head.weight = nn.Parameter(torch.zeros(5, 3))
    assert set(read_checkpoint(path, like=untied).state) == set(saved) - {"embed.weight", "head.weight"} | {
        name
    }
