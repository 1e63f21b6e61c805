"""From what a user types to batches."""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any

import dataset_files as files
import pytest
import torch

from isthmus.errors import DataError, ShapeError
from isthmus.study import Dataset, DatasetBatches, resolve_data

BATCHES = [(torch.zeros(2, 3), torch.tensor([0, 1]))]
TOY = Dataset("toy", "train", torch.zeros(6, 2), torch.arange(6) % 2, ("a", "b"))


def fails() -> None:
    raise RuntimeError("no disk")


def refuses() -> None:
    raise ShapeError("as it is")


@pytest.fixture(autouse=True)
def user_module(monkeypatch: pytest.MonkeyPatch) -> None:
    module: Any = types.ModuleType("user_data")
    module.listed = lambda: BATCHES
    module.generated = lambda: (b for b in BATCHES)
    module.named = lambda: {"train": BATCHES, "shifted": (b for b in BATCHES), "toy": TOY}
    module.toy = lambda: TOY
    module.empty = lambda: []
    module.none_named = lambda: {}
    module.empty_batch = lambda: [(torch.zeros(0, 3), torch.zeros(0))]
    module.text = lambda: "digits"
    module.number = lambda: 3
    module.odd = lambda: [object()]
    module.needs = lambda argument: BATCHES
    module.fails, module.refuses = fails, refuses
    module.constant = 3
    monkeypatch.setitem(sys.modules, "user_data", module)


def test_names() -> None:
    found = resolve_data("digits", batch_size=100, limit=250, seed=3)
    assert list(found) == ["train", "test"]
    train = found["train"]
    assert isinstance(train, DatasetBatches)
    assert [len(y) for _, y in train] == [100, 100, 50]
    assert not torch.equal(train.examples, resolve_data("digits", limit=250)["train"].examples)  # type: ignore[attr-defined]


def test_a_data_folder(tmp_path: Path) -> None:
    files.write_mnist(tmp_path)
    found = resolve_data("mnist", tmp_path, batch_size=8, device="cpu")
    assert {name: [len(y) for _, y in b] for name, b in found.items()} == {
        "train": [8, 8, 4],
        "test": [8, 8, 4],
    }


@pytest.mark.parametrize("function", ["listed", "generated"])
def test_functions_of_one_set_can_be_iterated_again(function: str) -> None:
    found = resolve_data(f"user_data:{function}")
    assert list(found) == ["data"]
    assert len(list(found["data"])) == len(list(found["data"])) == 1


def test_functions_of_several_sets_and_of_data_sets() -> None:
    found = resolve_data("user_data:named", batch_size=4)
    assert [len(list(found[n])) for n in ("train", "shifted", "toy")] == [1, 1, 2]
    assert len(list(found["shifted"])) == 1
    assert len(list(resolve_data("user_data:toy", limit=3, batch_size=1)["data"])) == 3


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("imagenet", r"Unknown data 'imagenet'. Choose one of digits, .*or give package.module:function"),
        ("no_such_module:f", "cannot import 'no_such_module': No module named"),
        (":f", "cannot import ''"),
        ("user_data:absent", "'user_data' has no function 'absent'"),
        ("user_data:", "'user_data' has no function ''"),
        ("user_data:constant", "'user_data' has no function 'constant'"),
        ("user_data:fails", "the function failed: RuntimeError: no disk. It is called without arguments"),
        ("user_data:needs", "the function failed: TypeError: .*missing 1 required positional argument"),
        ("user_data:empty", r"user_data:empty \(data\): expected at least one batch, found none"),
        ("user_data:none_named", "returned an empty mapping"),
        ("user_data:empty_batch", "batch 0 holds no examples"),
        ("user_data:text", "expected an iterable of batches for 'data', found str"),
        ("user_data:number", "expected an iterable of batches for 'data', found int"),
        ("user_data:odd", "Cannot read a object as a batch"),
    ],
)
def test_bad_specs(spec: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        resolve_data(spec)


def test_our_own_errors_pass_through() -> None:
    with pytest.raises(ShapeError, match="as it is"):
        resolve_data("user_data:refuses")


@pytest.mark.parametrize(
    "code", ["raise SystemExit('bye')", "raise RuntimeError('bye')", "bye", "def f(:", "import bye_bye"]
)
def test_modules_that_fail_on_import(code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "fails_on_import.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "fails_on_import", raising=False)
    with pytest.raises(
        DataError, match=r"fails_on_import:f: (cannot import|importing fails_on_import failed)"
    ):
        resolve_data("fails_on_import:f")


def test_functions_that_leave(monkeypatch: pytest.MonkeyPatch) -> None:
    def leaves() -> None:
        raise SystemExit(7)

    monkeypatch.setattr(sys.modules["user_data"], "leaves", leaves, raising=False)
    with pytest.raises(DataError, match="the function failed: SystemExit: 7"):
        resolve_data("user_data:leaves")
