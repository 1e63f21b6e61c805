"""Applying permutations: direction, purity, devices, dtypes, and what is refused."""

from __future__ import annotations

import pytest
import torch

from isthmus.errors import ShapeError, SymmetryError
from isthmus.symmetry import AxisGroup, IndexMap, Slot, SymmetrySpec, apply

CYCLE = torch.tensor([1, 2, 0])


def whole(tensor: str, axis: int, size: int) -> Slot:
    return Slot(tensor, axis, IndexMap(size, size))


SPEC = SymmetrySpec(
    {
        "rows": AxisGroup("rows", 3, (whole("w", 0, 3), whole("b", 0, 3))),
        "columns": AxisGroup("columns", 3, (Slot("w", 1, IndexMap(6, 3, 0, 2, ((2, 1),))), whole("v", 0, 3))),
        "factor": AxisGroup("factor", 2, (Slot("w", 1, IndexMap(6, 2, 0, 1, ((3, 2),))),)),
        "one": AxisGroup("one", 1, (whole("s", 0, 1),)),
    },
    (),
    {"w": (3, 6), "b": (3,), "v": (3,), "s": (1,), "n": ()},
)


def state(dtype: torch.dtype = torch.float32, device: str = "cpu") -> dict[str, torch.Tensor]:
    numbers = torch.arange(18.0).reshape(3, 6)
    plain = {"w": numbers, "b": torch.arange(3.0), "v": torch.arange(3.0) + 10, "s": torch.ones(1)}
    return (
        {**{k: t.to(dtype) for k, t in plain.items()}, "n": torch.tensor(7)}
        if device == "cpu"
        else {
            **{k: t.to(device) for k, t in plain.items()},
            "n": torch.tensor(7, device=device),
        }
    )


def test_entry_i_is_the_old_unit_placed_at_i() -> None:
    old = state()
    new = apply(SPEC, {"rows": CYCLE}, old)
    assert torch.equal(new["w"], old["w"][[1, 2, 0]])
    assert new["b"].tolist() == [1, 2, 0]
    assert new["v"] is old["v"]


def test_all_copies_of_a_unit_move_along() -> None:
    old = state()
    new = apply(SPEC, {"columns": CYCLE}, old)
    assert torch.equal(new["w"], old["w"][:, [2, 3, 4, 5, 0, 1]])
    assert new["v"].tolist() == [11, 12, 10]


def test_groups_on_one_axis_and_on_two_axes_compose() -> None:
    old = state()
    new = apply(SPEC, {"rows": CYCLE, "columns": CYCLE, "factor": torch.tensor([1, 0])}, old)
    expected = old["w"].reshape(3, 3, 2)[CYCLE][:, CYCLE][:, :, [1, 0]].reshape(3, 6)
    assert torch.equal(new["w"], expected)


def test_two_steps_equal_one_composed_step() -> None:
    other = torch.tensor([2, 1, 0])
    twice = apply(SPEC, {"rows": other}, apply(SPEC, {"rows": CYCLE}, state()))
    once = apply(SPEC, {"rows": CYCLE[other]}, state())
    assert all(torch.equal(twice[k], once[k]) for k in once)


def test_the_input_stays_untouched_and_missing_groups_stay() -> None:
    old = state()
    kept = {k: t.clone() for k, t in old.items()}
    permutations = {"rows": CYCLE.clone()}
    new = apply(SPEC, permutations, old)
    assert all(torch.equal(old[k], kept[k]) for k in old)
    assert torch.equal(permutations["rows"], CYCLE)
    assert new["w"] is not old["w"]
    assert apply(SPEC, {}, old) == old
    identity = apply(SPEC, {"rows": torch.arange(3), "one": torch.zeros(1, dtype=torch.int64)}, old)
    assert identity["w"] is old["w"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.bool])
def test_dtypes_are_kept(dtype: torch.dtype) -> None:
    new = apply(SPEC, {"rows": CYCLE}, state(dtype))
    assert new["w"].dtype == dtype
    assert torch.equal(new["w"], state(dtype)["w"][CYCLE])


def test_the_meta_device_works() -> None:
    new = apply(SPEC, {"rows": CYCLE, "columns": CYCLE}, state(device="meta"))
    assert new["w"].is_meta
    assert new["w"].shape == (3, 6)


def test_bad_input_is_refused() -> None:
    with pytest.raises(SymmetryError, match=r"no group named 'x'; the spec has \['rows', 'columns'"):
        apply(SPEC, {"x": CYCLE}, state())
    with pytest.raises(ShapeError, match=r"permutation of group 'rows': expected shape \(3,\), found \(2,\)"):
        apply(SPEC, {"rows": torch.arange(2)}, state())
    with pytest.raises(
        ShapeError, match=r"permutation of group 'rows': expected each of 0\.\.2 exactly once"
    ):
        apply(SPEC, {"rows": torch.tensor([0, 0, 1])}, state())
    with pytest.raises(ShapeError, match=r"'w': the spec expects shape \(3, 6\), the state has \(3, 5\)"):
        apply(SPEC, {"rows": CYCLE}, {**state(), "w": torch.zeros(3, 5)})
    lacking = {k: t for k, t in state().items() if k != "b"}
    with pytest.raises(SymmetryError, match="the state has no tensor 'b', which the spec moves"):
        apply(SPEC, {"rows": CYCLE}, lacking)
