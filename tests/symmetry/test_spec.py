"""Index maps, slots, groups and specs as values: positions, checks, printing, JSON."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from symmetry_helpers import build, described, normal
from torch import nn

from isthmus.errors import SymmetryError
from isthmus.symmetry import AxisGroup, IndexMap, PinnedAxis, Slot, SymmetrySpec, discover


@pytest.mark.parametrize(
    ("index", "positions", "text"),
    [
        (IndexMap(3, 3), [[0], [1], [2]], "all"),
        (IndexMap(6, 2, 3), [[3], [4]], "3+2/1 of 6"),
        (IndexMap(6, 3, 0, 2, ((2, 1),)), [[0, 1], [2, 3], [4, 5]], "3/2 ×2/1 of 6"),
        (IndexMap(6, 2, 0, 1, ((3, 2),)), [[0, 2, 4], [1, 3, 5]], "2/1 ×3/2 of 6"),
        (
            IndexMap(9, 2, 1, 2, ((2, 4), (2, 1))),
            [[1, 2, 5, 6], [3, 4, 7, 8]],
            "1+2/2 ×2/4 ×2/1 of 9",
        ),
        (IndexMap(0, 0), [], "all"),
        (IndexMap(1, 1), [[0]], "all"),
    ],
)
def test_positions_of_units(index: IndexMap, positions: list[list[int]], text: str) -> None:
    assert index.positions().tolist() == positions
    assert str(index) == text
    assert index.covered == sum(map(len, positions))


def test_gathering_moves_all_copies_of_a_unit() -> None:
    index = IndexMap(8, 3, 1, 2, ((2, 1),))
    gathered = index.gather_index(torch.tensor([1, 2, 0]))
    assert gathered.tolist() == [0, 3, 4, 5, 6, 1, 2, 7]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"length": 4, "size": 5}, "last position 4 lies outside an axis of 4"),
        ({"length": 6, "size": 3, "stride": 2, "copies": ((2, 2),)}, "last position 6 lies outside"),
        ({"length": 6, "size": 3, "offset": -1}, "must not be negative"),
        ({"length": 6, "size": 2, "copies": ((2, -1),)}, "must not be negative"),
    ],
)
def test_impossible_index_maps_are_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(SymmetryError, match=said):
        IndexMap(**settings)


def whole(tensor: str, axis: int, size: int) -> Slot:
    return Slot(tensor, axis, IndexMap(size, size))


def test_specs_check_their_slots() -> None:
    with pytest.raises(SymmetryError, match=r"group 'g' has 3 units, but its slot w\[0\] has 4"):
        AxisGroup("g", 3, (whole("w", 0, 4),))
    group = AxisGroup("g", 4, (whole("w", 1, 4),))
    with pytest.raises(SymmetryError, match="group 'g': the network has no tensor 'w'"):
        SymmetrySpec({"g": group}, (), {"v": (4,)})
    for shape in ((4,), (4, 5)):
        with pytest.raises(SymmetryError, match=r"expects axis 1 of length 4, but 'w' has shape"):
            SymmetrySpec({"g": group}, (), {"w": shape})


def small_spec() -> SymmetrySpec:
    group = AxisGroup("hidden", 3, (whole("a", 0, 3), Slot("b", 1, IndexMap(6, 3, 0, 2, ((2, 1),)))))
    pinned = (
        PinnedAxis("b", 0, 2, "the model's output 'y'"),
        PinnedAxis("a", 1, 4, "reason", "aten.x", "m.0"),
    )
    return SymmetrySpec({"hidden": group}, pinned, {"a": (3, 4), "b": (2, 6), "c": (5,)}, ("y",))


def test_json_round_trip() -> None:
    spec = small_spec()
    again = SymmetrySpec.from_json(spec.to_json())
    assert again == spec
    assert again.to_json() == spec.to_json()
    found = discover(build(lambda: nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))), normal(1, 3))
    assert SymmetrySpec.from_json(found.to_json()) == found


def _with_role(role: Any) -> Callable[[dict[str, Any]], str]:
    def changed(data: dict[str, Any]) -> str:
        data["groups"][0]["slots"][0]["role"] = role
        return json.dumps(data)

    return changed


def test_roles_are_written_read_and_printed_where_there_are_any() -> None:
    found = discover(build(lambda: nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))), normal(1, 3))
    again = SymmetrySpec.from_json(found.to_json())
    assert [slot.role for slot in again.groups["0"].slots] == ["holds", "holds", "reads"]
    assert str(again) == str(found)
    lines = str(found).splitlines()
    assert [line.split() for line in lines if "[" in line and "pinned" not in line][:3] == [
        ["0", "4", "positive", "scales", "holds", "0.weight[0]"],
        ["holds", "0.bias[0]"],
        ["reads", "2.weight[1]"],
    ]
    assert lines[3].split() == ["group", "units", "acts", "role", "moves"]
    bare = small_spec()
    assert "role" not in bare.to_json()
    assert "group   units  moves\nhidden      3  a[0]\n               b[1]" in str(bare)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda d: "not json", "not a symmetry spec in JSON: JSONDecodeError"),
        (lambda d: "[]", "not a symmetry spec in JSON: TypeError"),
        (lambda d: json.dumps({**d, "format": 99}), "expected symmetry spec format .*, found 99"),
        (_with_role("guards"), "expected a role of 'holds', 'reads', 'both', 'scales', '', found 'guards'"),
        (_with_role(["holds"]), r"expected a role of .*, found \['holds'\]"),
        (lambda d: json.dumps({k: v for k, v in d.items() if k != "groups"}), "KeyError: 'groups'"),
        (lambda d: json.dumps({**d, "shapes": {}}), "KeyError"),
        (lambda d: json.dumps({**d, "shapes": {**d["shapes"], "a": [2, 4]}}), "outside an axis of 2"),
    ],
)
def test_other_json_is_refused(change: Any, said: str) -> None:
    text = change(json.loads(small_spec().to_json()))
    with pytest.raises(SymmetryError, match=said):
        SymmetrySpec.from_json(text)


def test_printing() -> None:
    text = str(small_spec())
    assert "1 group, 82.8% of 29 entries move" in text
    assert "hidden      3  a[0]" in text
    assert "b[1] (3/2 ×2/1 of 6)" in text
    assert "  b[0]: 2 positions: the model's output 'y'" in text
    assert "a[1]: 4 positions: reason [aten.x in m.0]" in text
    assert "pinned" not in str(SymmetrySpec({}))
    assert str(small_spec().groups["hidden"]) == "hidden: 3 units in a[0], b[1] (3/2 ×2/1 of 6)"


def test_fraction_moved_counts_every_entry_once() -> None:
    assert small_spec().fraction_moved == pytest.approx(24 / 29)
    assert SymmetrySpec({}).fraction_moved == 0
    both = AxisGroup("g", 2, (whole("w", 0, 2), Slot("w", 1, IndexMap(4, 2))))
    assert SymmetrySpec({"g": both}, (), {"w": (2, 4)}).fraction_moved == 1
    half = AxisGroup("g", 2, (Slot("w", 1, IndexMap(4, 2)),))
    assert SymmetrySpec({"g": half}, (), {"w": (2, 4)}).fraction_moved == 0.5


def test_restricting_and_editing() -> None:
    spec = small_spec()
    slot = spec.groups["hidden"].slots[0]
    assert [str(s) for s in spec.without_slot("hidden", slot).groups["hidden"].slots] == [
        "b[1] (3/2 ×2/1 of 6)"
    ]
    assert spec.restrict([]).groups == {}
    assert spec.restrict(["hidden"]) == spec
    with pytest.raises(SymmetryError, match=r"unknown groups \['x'\]; the spec has \['hidden'\]"):
        spec.restrict(["x"])
    assert described(spec.with_group(AxisGroup("new", 5, (whole("c", 0, 5),)))) >= described(spec)
