"""The field's pair of dictionaries: export, import, and what it cannot express."""

from __future__ import annotations

from typing import Any

import pytest
from symmetry_helpers import build, described, normal
from torch import nn

from isthmus.errors import SymmetryError
from isthmus.symmetry import PermutationSpec, SymmetrySpec, discover

SHAPES = {"0.weight": (4, 3), "0.bias": (4,), "2.weight": (2, 4), "2.bias": (2,)}
PLACES = {"P": [("0.weight", 0), ("0.bias", 0), ("2.weight", 1)]}


def net() -> nn.Module:
    return build(lambda: nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)))


def test_export_lists_both_halves() -> None:
    pair = discover(net(), normal(1, 3)).to_permutation_spec()
    assert pair.perm_to_axes == {"0": PLACES["P"]}
    assert pair.axes_to_perm == {
        "0.weight": ("0", None),
        "0.bias": ("0",),
        "2.weight": (None, "0"),
        "2.bias": (None,),
    }


@pytest.mark.parametrize(
    "given",
    [
        PLACES,
        {"P": [("0.weight", -2), ("0.bias", 0), ("2.weight", -1)]},
        {"0.weight": ("P", None), "0.bias": ("P",), "2.weight": (None, "P"), "2.bias": (None,)},
        PermutationSpec.from_places(PLACES, SHAPES),
    ],
    ids=["perm_to_axes", "negative axes", "axes_to_perm", "pair"],
)
def test_import_of_either_half(given: Any) -> None:
    spec = SymmetrySpec.from_permutation_spec(given, SHAPES)
    assert described(spec) == described(discover(net(), normal(1, 3)))
    assert spec.to_permutation_spec() == PermutationSpec.from_places(PLACES, SHAPES)
    assert spec.shapes == SHAPES


def test_parts_of_axes_cannot_be_exported() -> None:
    model = build(lambda: nn.Sequential(nn.Conv2d(1, 3, 1), nn.Flatten(), nn.Linear(12, 2)))
    with pytest.raises(
        SymmetryError, match=r"group '0' acts on a part: slot 2.weight\[1\] \(3/4 ×4/1 of 12\)"
    ):
        discover(model, normal(1, 1, 2, 2)).to_permutation_spec()


def test_two_groups_on_one_axis_cannot_be_exported() -> None:
    places = {n: [("w", 0)] for n in "pq"}
    with pytest.raises(SymmetryError, match=r"one permutation per axis, but 'p' and 'q' both act on w\[0\]"):
        PermutationSpec.from_places(places, {"w": (3,)})


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"P": [("x", 0)]}, "permutation 'P': the network has no tensor 'x'"),
        ({"P": [("0.bias", 1)]}, r"'0.bias' has shape \(4,\), so no axis 1"),
        ({"P": [("0.weight", 0), ("2.bias", 0)]}, r"unequal length: 0.weight\[0\] of 4, 2.bias\[0\] of 2"),
        ({"P": ["0.weight"]}, r"expected \(tensor, axis\) pairs, found '0.weight'"),
        ({"P": [("0.weight", "0")]}, r"expected \(tensor, axis\) pairs"),
        ({"0.bias": ("P", None)}, r"axes_to_perm lists 2 axes for '0.bias', which has shape \(4,\)"),
    ],
)
def test_bad_pairs_are_refused(given: Any, said: str) -> None:
    with pytest.raises(SymmetryError, match=said):
        SymmetrySpec.from_permutation_spec(given, SHAPES)
