"""The average of checkpoint files without their network: the same numbers as with it, whatever holds them."""

from __future__ import annotations

import json
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from isthmus.checkpoints import load_metadata, load_state, save_state
from isthmus.errors import CheckpointError, DataError, IsthmusWarning, OutputError, ShapeError
from isthmus.merging import merge
from isthmus.pretrained import _files, merge_files

FORMS = ("a.safetensors", "a.pt", "folder")
OUTS = ("out.safetensors", "out.pt")


def network(seed: int) -> nn.Sequential:
    """Networks of one start, a little apart."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3), nn.Embedding(6, 2))
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape)
    return model


def mixed(seed: int) -> dict[str, Tensor]:
    """States of many dtypes and shapes, from one start."""
    start, drawn = torch.Generator().manual_seed(9), torch.Generator().manual_seed(seed)

    def near(*shape: int) -> Tensor:
        return torch.randn(shape, generator=start) + 0.1 * torch.randn(shape, generator=drawn)

    return {
        "w": near(7, 3),
        "half": near(5).to(torch.bfloat16),
        "eight": near(4, 2).to(torch.float8_e4m3fn),
        "double": near(2, 2, 2).double(),
        "scalar": near(),
        "steps": torch.tensor(seed),
        "empty": torch.zeros(0, 3),
        "none": torch.zeros(3, 0),
    }


def stored(path: Path, state: Any) -> Path:
    if path.suffix:
        save_state(path, state)
        return path
    path.mkdir()
    names, half = list(state), len(state) // 2
    places = {n: "one.safetensors" if k < half else "two.safetensors" for k, n in enumerate(names)}
    for file in ("one.safetensors", "two.safetensors"):
        save_file({n: state[n] for n in names if places[n] == file}, path / file)
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    return path


def same(a: Any, b: Any) -> bool:
    return a.keys() == b.keys() and all(
        a[k].dtype == b[k].dtype and a[k].equal(b[k]) for k in a if a[k].itemsize > 1
    )


@pytest.mark.parametrize("out", OUTS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("weights", [None, [3, 1], [0.0, 1.0]])
def test_the_average_is_that_of_the_states(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str, out: str, weights: list[float] | None
) -> None:
    states = [mixed(0), mixed(1)]
    monkeypatch.setattr(_files, "_BLOCK_ENTRIES", 4)  # so that tensors are worked on in several blocks
    paths = [stored(tmp_path / f"{k}{form}", state) for k, state in enumerate(states)]
    seen: list[tuple[str, int, int]] = []
    written = merge_files(paths, tmp_path / out, weights, on_progress=lambda *at: seen.append(at))
    found, expected = load_state(tmp_path / out), merge(states, weights)
    assert same(found, expected)
    assert torch.equal(found["eight"].float(), expected["eight"].float())
    assert (written.path, written.tensors, written.notes) == (tmp_path / out, 8, ())
    assert written.nbytes == sum(t.nbytes for t in expected.values())
    if seen:
        assert {s[0] for s in seen} == set(expected)
        assert {s[2] for s in seen} == {written.nbytes}


def test_files_of_different_forms_and_prefixes(tmp_path: Path) -> None:
    a, b, c = (network(k).state_dict() for k in range(3))
    first = stored(tmp_path / "a.safetensors", a)
    second, third = tmp_path / "b.ckpt", tmp_path / "c.pt"
    torch.save({"state_dict": OrderedDict((f"model.{k}", v) for k, v in b.items()), "epoch": 3}, second)
    torch.save({"raw": a, "ema": OrderedDict((f"module.{k}", v) for k, v in c.items())}, third)
    written = merge_files([first, second, f"{third}::ema"], tmp_path / "out.safetensors", [1, 1, 2])
    assert same(load_state(written.path), merge([a, b, c], [1, 1, 2]))
    assert "b.ckpt: the prefix 'model.' was removed" in written.notes[0]
    assert "c.pt: the prefix 'module.' was removed" in written.notes[1]
    nn.Sequential(*network(0)).load_state_dict(load_state(written.path))


def test_the_names_are_the_first_file_s(tmp_path: Path) -> None:
    a, b = network(0).state_dict(), network(1).state_dict()
    first = stored(tmp_path / "a.safetensors", {f"model.{k}": v for k, v in a.items()})
    second = stored(tmp_path / "b.safetensors", b)
    written = merge_files([first, second], tmp_path / "out.pt")
    assert same(load_state(written.path), {f"model.{k}": v for k, v in merge([a, b]).items()})
    assert "'model.' of the network's names was put before the file's" in written.notes[0]


@pytest.mark.parametrize("out", OUTS)
@pytest.mark.parametrize("form", FORMS[:2])
def test_versions_and_strings_stay(tmp_path: Path, form: str, out: str) -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.GroupNorm(1, 3))
    for name in ("x", "y"):
        save_state(
            tmp_path / f"{name}-{form}", model.state_dict(), {"format": "pt"} if form == FORMS[0] else None
        )
    merge_files([tmp_path / f"x-{form}", tmp_path / f"y-{form}"], tmp_path / out)
    found = load_state(tmp_path / out)
    assert found._metadata == model.state_dict()._metadata  # type: ignore[attr-defined]
    assert load_metadata(tmp_path / out) == ({"format": "pt"} if form == FORMS[0] else {})


def test_tied_tensors_of_torch_files_stay_tied(tmp_path: Path) -> None:
    shared = torch.randn(3, 3)
    for k in range(2):
        torch.save(
            {"a": shared + k, "b": None} | {"b": (tied := shared + k), "a": tied}, tmp_path / f"{k}.pt"
        )
    merge_files([tmp_path / "0.pt", tmp_path / "1.pt"], tmp_path / "out.pt")
    found = torch.load(tmp_path / "out.pt")
    assert found["a"].data_ptr() == found["b"].data_ptr()


@pytest.mark.parametrize("out", OUTS)
def test_strangers_are_warned_of(tmp_path: Path, out: str) -> None:
    paths = []
    for seed in range(2):
        torch.manual_seed(seed)
        paths.append(
            stored(tmp_path / f"{seed}.pt", nn.Sequential(nn.Linear(40, 50), nn.Linear(50, 3)).state_dict())
        )
    with pytest.warns(IsthmusWarning, match=r"The weights of model 1 .* have almost nothing in common"):
        written = merge_files(paths, tmp_path / out)
    assert "their average, without relabelling, is likely near chance" in written.notes[0]
    assert merge_files(paths, tmp_path / out, [1, 0]).notes == ()


def test_running_statistics_are_warned_of(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    paths = [stored(tmp_path / f"{k}.pt", model.state_dict()) for k in range(2)]
    with pytest.warns(
        IsthmusWarning, match=r"The merged running statistics \(1\) are the average of the networks'"
    ):
        written = merge_files(paths, tmp_path / "out.pt")
    assert "Recompute them: run the network on training data" in written.notes[0]
    assert load_state(written.path).keys() == model.state_dict().keys()


def test_what_cannot_be_averaged(tmp_path: Path) -> None:
    a = stored(tmp_path / "a.safetensors", network(0).state_dict())
    other = stored(tmp_path / "other.pt", nn.Linear(2, 2).state_dict())
    wide = stored(tmp_path / "wide.pt", {k: v[:1] for k, v in network(0).state_dict().items()})
    bad = stored(tmp_path / "bad.pt", {k: v * float("nan") for k, v in network(0).state_dict().items()})
    out, before = tmp_path / "out.safetensors", sorted(tmp_path.iterdir())
    for paths, error, message in (
        ([a], DataError, "needs two checkpoints or more, found 1"),
        (
            [a, other],
            CheckpointError,
            r"a\.safetensors and .*other\.pt are different architectures: .*lacks '0\.bias', '0\.weight'",
        ),
        ([a, wide], ShapeError, r"has shape \(4,\), .*wide\.pt has \(1,\)"),
        ([a, bad], CheckpointError, r"bad\.pt: '0\.\w+' has \d+ NaN or infinite of"),
        ([a, tmp_path / "gone.pt"], CheckpointError, r"gone\.pt: no such file"),
    ):
        with pytest.raises(error, match=message):
            merge_files(paths, out)
    with pytest.raises(ShapeError, match="expected 2 weights"):
        merge_files([a, a], out, [1, 2, 3])
    with pytest.raises(DataError, match="weights must be finite"):
        merge_files([a, a], out, [0, 0])
    with pytest.raises(CheckpointError, match=r"unknown checkpoint format '\.ckpt'"):
        merge_files([a, a], tmp_path / "out.ckpt")
    with pytest.raises(OutputError, match=r"it is the input .*a\.safetensors"):
        merge_files([a, other], a)
    complex_file = tmp_path / "complex.pt"
    torch.save({"w": torch.ones(2, dtype=torch.complex128)}, complex_file)
    with pytest.raises(
        DataError, match=r"'w' has dtype torch\.complex128, which safetensors files do not hold"
    ):
        merge_files([complex_file, complex_file], out)
    complex_file.unlink()
    assert sorted(tmp_path.iterdir()) == before


def test_a_file_that_changes_on_the_way(tmp_path: Path) -> None:
    paths = [stored(tmp_path / f"{k}.safetensors", mixed(k)) for k in range(2)]

    def change(name: str, done: int, total: int) -> None:
        save_state(paths[1], mixed(7))

    with pytest.raises(CheckpointError, match="was changed or replaced since it was opened"):
        merge_files(paths, tmp_path / "out.safetensors", on_progress=change)
    assert not (tmp_path / "out.safetensors").exists()
