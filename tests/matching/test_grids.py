"""Clusters, facets and grids: which groups are matched together and how they share an axis."""

from __future__ import annotations

import pytest
import torch

from isthmus.couplings import index_of
from isthmus.errors import SymmetryError
from isthmus.matching import Facet, Structure
from isthmus.matching._grids import clusters_of, facets_of
from isthmus.symmetry import AxisGroup, IndexMap, Slot, SymmetrySpec, apply


def spec_of(shape: dict[str, tuple[int, ...]], *groups: AxisGroup) -> SymmetrySpec:
    return SymmetrySpec({g.name: g for g in groups}, (), shape)


def nested(blocks: int = 3, members: int = 4) -> SymmetrySpec:
    """Blocks of an axis, each with a permutation of its own for its members; rows of ``w``, columns of ``v``."""
    length = blocks * members
    outer = IndexMap(length, blocks, 0, members, ((members, 1),))
    groups = [AxisGroup("block", blocks, (Slot("w", 0, outer), Slot("v", 1, outer)))]
    for i in range(blocks):
        inner = IndexMap(length, members, i * members)
        groups.append(
            AxisGroup(f"m[{i}]", members, (Slot("w", 0, inner), Slot("v", 1, inner)), (("block", i),), "m[*]")
        )
    return spec_of({"w": (length, 5), "v": (2, length)}, *groups)


def shared(blocks: int = 3, members: int = 4) -> SymmetrySpec:
    """Blocks of an axis, and one permutation of the members that is the same in all blocks."""
    length = blocks * members
    outer = IndexMap(length, blocks, 0, members, ((members, 1),))
    inner = IndexMap(length, members, 0, 1, ((blocks, members),))
    return spec_of(
        {"w": (length, 5)},
        AxisGroup("block", blocks, (Slot("w", 0, outer),)),
        AxisGroup("member", members, (Slot("w", 0, inner),)),
    )


def experts(count: int = 3, hidden: int = 4) -> SymmetrySpec:
    """Experts on axis 0 of a stacked weight; the hidden units of each expert on axis 1, in its block."""
    groups = [AxisGroup("expert", count, (Slot("w", 0, IndexMap(count, count)),))]
    for i in range(count):
        slot = Slot("w", 1, IndexMap(hidden, hidden), ((0, IndexMap(count, 1, i)),))
        groups.append(AxisGroup(f"h[{i}]", hidden, (slot,), (("expert", i),), "h[*]"))
    return spec_of({"w": (count, hidden, 5)}, *groups)


def facets(spec: SymmetrySpec, tensor: str) -> list[Facet]:
    by_axis = spec.slots_by_tensor()[tensor]
    return [f for c in clusters_of(spec) for f in facets_of(spec, c, spec.shapes[tensor], by_axis)]


def random_permutations(spec: SymmetrySpec, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randperm(g.size, generator=generator) for name, g in spec.groups.items()}


def moved_cells(facet: Facet, spec: SymmetrySpec, tensor: str, seed: int) -> None:
    """Moving a tensor by the spec moves its cells as the grids say."""
    from isthmus.matching._nested import Gain

    shape = spec.shapes[tensor]
    state = {name: torch.arange(torch.Size(s).numel()).reshape(s) for name, s in spec.shapes.items()}
    permutations = random_permutations(spec, seed)
    moved = apply(spec, permutations, state)[tensor]
    front = tuple(range(len(facet.axes)))
    old, new = (t.movedim(facet.axes, front).flatten(0, len(front) - 1) for t in (state[tensor], moved))
    for grid in facet.grids:
        index = Gain(torch.zeros(len(grid.positions), len(grid.positions)), grid.members).index(permutations)
        assert torch.equal(new[grid.positions], old[grid.positions[index]]), shape


@pytest.mark.parametrize("build", [nested, shared, experts])
def test_grids_move_as_the_spec_does(build: object) -> None:
    spec = build()  # type: ignore[operator]
    for tensor in spec.shapes:
        for facet in facets(spec, tensor):
            for seed in range(5):
                moved_cells(facet, spec, tensor, seed)


def test_nested_groups_are_one_cluster_with_one_facet_per_axis() -> None:
    spec = nested()
    assert clusters_of(spec) == [("block", "m[0]", "m[1]", "m[2]")]
    (facet,) = facets(spec, "w")
    assert facet.axes == (0,)
    assert facet.groups == {"block", "m[0]", "m[1]", "m[2]"}
    (grid,) = facet.grids
    assert grid.positions.shape == (12, 1)
    assert torch.equal(grid.positions_of("block"), torch.arange(12).reshape(3, 4))
    assert grid.positions_of("m[2]").flatten().tolist() == [8, 9, 10, 11]
    assert [f.axes for f in facets(spec, "v")] == [(1,)]


def test_groups_without_a_common_position_stay_apart() -> None:
    """Two segments of a concatenation, and the two axes of a matrix."""
    spec = spec_of(
        {"w": (7, 7)},
        AxisGroup("left", 3, (Slot("w", 0, IndexMap(7, 3)),)),
        AxisGroup("right", 4, (Slot("w", 0, IndexMap(7, 4, 3)),)),
        AxisGroup("in", 7, (Slot("w", 1, IndexMap(7, 7)),)),
        AxisGroup("idle", 2, ()),
    )
    assert clusters_of(spec) == [("left",), ("right",), ("in",), ("idle",)]
    assert [(f.cluster, f.axes) for f in facets(spec, "w")] == [
        (("left",), (0,)),
        (("right",), (0,)),
        (("in",), (1,)),
    ]


def test_a_group_with_two_segments_of_one_axis_has_both_as_copies() -> None:
    slots = (Slot("w", 0, IndexMap(6, 3)), Slot("w", 0, IndexMap(6, 3, 3)))
    spec = spec_of({"w": (6, 2)}, AxisGroup("g", 3, slots))
    (facet,) = facets(spec, "w")
    assert facet.grids[0].positions.tolist() == [[0, 3], [1, 4], [2, 5]]


def test_blocks_on_another_axis_make_one_facet_of_both_axes() -> None:
    (facet,) = facets(experts(3, 4), "w")
    assert facet.axes == (1, 0)
    assert facet.grids[0].positions.shape == (12, 1)


def test_a_part_of_the_axis_without_members_gets_its_own_grid() -> None:
    """Axis of 3 blocks of 4, of which only the first 3 positions of each block are members."""
    outer = IndexMap(12, 3, 0, 4, ((4, 1),))
    groups = [AxisGroup("block", 3, (Slot("w", 0, outer),))]
    for i in range(3):
        slot = Slot("w", 0, IndexMap(12, 3, 4 * i))
        groups.append(AxisGroup(f"m[{i}]", 3, (slot,), (("block", i),), "m[*]"))
    spec = spec_of({"w": (12, 2)}, *groups)
    (facet,) = facets(spec, "w")
    assert sorted(len(g.positions) for g in facet.grids) == [3, 9]
    for seed in range(3):
        moved_cells(facet, spec, "w", seed)


def test_overlaps_that_are_no_nest_are_refused() -> None:
    one, two = IndexMap(6, 4), IndexMap(6, 4, 2)
    with pytest.raises(SymmetryError, match="move the same positions, and not independently"):
        spec_of(
            {"w": (6, 2)},
            AxisGroup("one", 4, (Slot("w", 0, one),)),
            AxisGroup("two", 4, (Slot("w", 0, two),)),
        )


@pytest.mark.parametrize("build", [nested, experts])
def test_a_structure_composes_changes(build: object) -> None:
    spec = build()  # type: ignore[operator]
    structure = Structure(spec, tuple(clusters_of(spec)))
    first, second = random_permutations(spec, 1), random_permutations(spec, 2)
    both = structure.followed(first, structure.clusters[0], second)
    state = {name: torch.randn(s) for name, s in spec.shapes.items()}
    stepwise = apply(spec, second, apply(spec, first, state))
    assert all(torch.equal(v, stepwise[k]) for k, v in apply(spec, both, state).items())


def test_a_flat_structure_composes_three_cycles() -> None:
    structure = Structure.flat({"g": 3, "other": 2})
    assert structure.clusters == (("g",), ("other",))
    assert dict(structure.sizes) == {"g": 3, "other": 2}
    ring, swap = torch.tensor([1, 2, 0]), torch.tensor([1, 0, 2])
    once = structure.followed({}, ("g",), {"g": ring})
    assert index_of(once["g"]).tolist() == [1, 2, 0]
    units = torch.tensor([10, 20, 30])
    twice = structure.followed(once, ("g",), {"g": swap})
    assert torch.equal(units[index_of(twice["g"])], units[ring][swap])
    assert not torch.equal(units[index_of(twice["g"])], units[swap][ring])
