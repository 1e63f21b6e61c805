"""The schema: what a record must hold, and how its errors read."""

from __future__ import annotations

import copy
import io
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from report_samples import make_arrays, make_record

from isthmus.errors import CheckpointError
from isthmus.report import check_record, read_record
from isthmus.report._record import check_arrays

Change = Callable[[dict[str, Any]], Any]


def test_a_good_record_passes_unchanged_and_untouched() -> None:
    record = make_record()
    before = copy.deepcopy(record)
    assert check_record(record) == before
    assert record == before


def test_a_record_survives_json() -> None:
    record = make_record()
    assert check_record(json.loads(json.dumps(record))) == check_record(record)


def test_unknown_keys_are_kept() -> None:
    record = make_record()
    record["methods"]["none"]["later"] = {"x": 1}
    assert check_record(record)["methods"]["none"]["later"] == {"x": 1}  # type: ignore[typeddict-item]


def test_nan_stands_for_none_where_none_is_allowed() -> None:
    record = make_record((4,))
    record["methods"]["weights"]["dimension"]["layers.0"]["centred"] = math.nan
    assert check_record(record)["methods"]["weights"]["dimension"]["layers.0"]["centred"] is None


def test_commit_is_optional() -> None:
    record = make_record((4,))
    del record["versions"]["commit"]
    assert "commit" not in check_record(record)["versions"]


def _set(*path: Any, to: Any) -> Change:
    def change(record: dict[str, Any]) -> None:
        *parents, last = path
        for key in parents:
            record = record[key]
        record[last] = to

    return change


def _drop(*path: Any) -> Change:
    def change(record: dict[str, Any]) -> None:
        *parents, last = path
        for key in parents:
            record = record[key]
        del record[last]

    return change


_LINE = ("methods", "weights", "line", "test")
BROKEN: list[tuple[Change, str]] = [
    (_drop("network"), r"expected the key 'network' at the top level"),
    (_drop("methods", "weights", "seconds"), r"expected the key 'seconds' at methods\.weights"),
    (_drop("methods", "none"), r"expected 'none' \(no relabelling\) as the first method at methods"),
    (_drop("endpoints", "b"), r"expected the keys 'a' and 'b' at endpoints"),
    (_drop("methods", "weights", "line", "test"), r"expected the split 'test' at methods\.weights\.line"),
    (_set("created", to="yesterday"), r"expected an ISO 8601 date and time at created, found 'yesterday'"),
    (_set("network", "parameters", to="many"), r"expected an integer at network\.parameters, found 'many'"),
    (_set("network", "parameters", to=True), r"expected an integer at network\.parameters, found True"),
    (_set("network", "name", to=3), r"expected a text at network\.name, found 3"),
    (_set("network", to=[1]), r"expected a mapping with text keys at network, found \[1\]"),
    (_set("settings", to={1: 2}), r"expected a mapping with text keys at settings"),
    (_set("symmetry", "groups", to="x"), r"expected a list at symmetry\.groups, found 'x'"),
    (_set("symmetry", "fraction_moved", to=1.5), r"between 0 and 1 at symmetry\.fraction_moved, found 1\.5"),
    (_set("methods", "weights", "seconds", to=-1), r"a number >= 0 at methods\.weights\.seconds, found -1"),
    (
        _set("methods", "weights", "barrier", to=math.inf),
        r"finite number at methods\.weights\.barrier, found inf",
    ),
    (
        _set("methods", "weights", "barrier", to=False),
        r"finite number at methods\.weights\.barrier, found False",
    ),
    (_set(*_LINE, "loss", 3, to="x"), r"finite number at methods\.weights\.line\.test\.loss\[3\], found 'x'"),
    (_set(*_LINE, "loss", to=[0.0]), r"11 entries, one per position at methods\.weights\.line\.test\.loss"),
    (_set(*_LINE, "accuracy", to=[0.5] * 10), r"expected 11 entries.*\.accuracy"),
    (_set(*_LINE, "t", 3, to=0.2), r"rise strictly from 0 to 1 at methods\.weights\.line\.test\.t"),
    (_set(*_LINE, "t", 10, to=0.99), r"positions that rise strictly from 0 to 1"),
    (_set(*_LINE, "t", to=[0.0]), r"positions that rise strictly from 0 to 1"),
    (_set(*_LINE, "barrier", to=0.5), r"expected the test line's 0\.5 at methods\.weights\.barrier"),
    (
        _set("methods", "weights", "midpoint_loss", to=9),
        r"0\.\d+ at methods\.weights\.midpoint_loss, found 9",
    ),
    (_set("methods", "weights", "moved", to={"ghost": 1}), r"only groups of the symmetry.*found \['ghost'\]"),
]


@pytest.mark.parametrize(("change", "message"), BROKEN, ids=[message[:60] for _, message in BROKEN])
def test_a_broken_record_is_named(change: Change, message: str) -> None:
    record = make_record((4, 3))
    change(record)
    with pytest.raises(CheckpointError, match=message):
        check_record(record)


def test_arrays_are_sorted_by_group_and_method() -> None:
    record = make_record((5, 3))
    stored = check_arrays(check_record(record), {**make_arrays(record), "later/thing": np.zeros(2)})
    assert set(stored.similarity) == {"layers.0", "layers.1"}
    assert set(stored.permutation) == set(record["methods"])
    assert stored.permutation["weights"]["layers.1"].shape == (3,)


def test_group_names_may_hold_slashes() -> None:
    record = make_record((3,))
    record["symmetry"]["groups"][0]["name"] = "a/b"
    for method in record["methods"].values():
        method["moved"], method["matched_cost"], method["dimension"] = {}, {}, {}
    stored = check_arrays(check_record(record), {"permutation/weights/a/b": np.array([1, 2, 0])})
    assert stored.permutation["weights"]["a/b"].tolist() == [1, 2, 0]


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        (
            "similarity/layers.0",
            np.zeros((3, 4)),
            r"shape \(4, 4\) at array 'similarity/layers\.0', found 'float64",
        ),
        ("similarity/layers.0", np.zeros((4, 4), dtype=int), r"floating-point numbers"),
        ("similarity/layers.0", np.full((4, 4), np.inf), r"without infinity"),
        ("similarity/ghost", np.zeros((4, 4)), r"a group among \['layers\.0'\].*found 'ghost'"),
        ("permutation/ghost/layers.0", np.arange(4), r"a method among .*found 'ghost'"),
        ("permutation/weights/layers.0", np.arange(3), r"each of 0\.\.3 once"),
        ("permutation/weights/layers.0", np.array([0, 1, 2, 2]), r"each of 0\.\.3 once"),
        ("permutation/weights/layers.0", np.arange(4.0), r"each of 0\.\.3 once"),
    ],
)
def test_a_broken_array_is_named(name: str, values: np.ndarray, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        check_arrays(check_record(make_record((4,))), {name: values})


def test_reading_a_folder(tmp_path: Path) -> None:
    record = make_record((4,))
    (tmp_path / "result.json").write_text(json.dumps(record), encoding="utf-8")
    assert read_record(tmp_path)[1] == {}
    np.savez(tmp_path / "relabelling.npz", **make_arrays(record))
    found, arrays = read_record(tmp_path)
    assert found == check_record(record)
    assert set(arrays) == set(make_arrays(record))
    assert arrays["similarity/layers.0"].shape == (4, 4)


def test_reading_a_folder_without_a_result(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"result\.json cannot be read .*with result\.json in it"):
        read_record(tmp_path)


@pytest.mark.parametrize("text", ["{", "[" * 10**6, '{"a":' * 10**5])
def test_reading_broken_json(tmp_path: Path, text: str) -> None:
    (tmp_path / "result.json").write_text(text, encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"result\.json cannot be read"):
        read_record(tmp_path)


def test_reading_a_record_that_does_not_fit(tmp_path: Path) -> None:
    (tmp_path / "result.json").write_text("{}", encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"expected the key 'isthmus_version' at the top level"):
        read_record(tmp_path)


def test_reading_arrays_that_do_not_fit(tmp_path: Path) -> None:
    (tmp_path / "result.json").write_text(json.dumps(make_record((4,))), encoding="utf-8")
    np.savez(tmp_path / "relabelling.npz", **{"permutation/weights/layers.0": np.array([0, 1, 1, 2])})
    with pytest.raises(
        CheckpointError, match=r"each of 0\.\.3 once at array 'permutation/weights/layers\.0'"
    ):
        read_record(tmp_path)


def _npy() -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.arange(3))
    return buffer.getvalue()


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 truncated", b"nonsense", _npy()])
def test_reading_broken_arrays(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "result.json").write_text(json.dumps(make_record((4,))), encoding="utf-8")
    (tmp_path / "relabelling.npz").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"relabelling\.npz cannot be read"):
        read_record(tmp_path)
