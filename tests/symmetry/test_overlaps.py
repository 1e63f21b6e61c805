"""Index maps and slots that would destroy entries, or move them twice: refused on construction and on load."""

from __future__ import annotations

import json
from itertools import permutations
from typing import Any

import pytest
import torch

from isthmus.couplings import compose_permutations, invert_permutation
from isthmus.errors import ShapeError, SymmetryError
from isthmus.symmetry import AxisGroup, IndexMap, Slot, SymmetrySpec, apply


@pytest.mark.parametrize(
    "given",
    [
        (3, 3, 0, 0),  # all units at one position
        (6, 3, 0, 0, ((2, 1),)),
        (6, 3, 0, 2, ((2, 0),)),  # all copies at one position
        (6, 3, 0, 1, ((2, 1),)),  # copy 1 of a unit is copy 0 of the next
        (9, 3, 0, 2, ((2, 4),)),
        (12, 2, 0, 1, ((3, 2), (2, 4))),
        (8, 4, 0, 2, ((2, 1), (2, 0))),
    ],
    ids=str,
)
def test_maps_that_share_positions(given: Any) -> None:
    with pytest.raises(SymmetryError, match="share a position, so moving them would destroy entries"):
        IndexMap(*given)


@pytest.mark.parametrize(
    "given",
    [
        (0, 0),
        (1, 1, 0, 0),  # one unit needs no stride
        (6, 3, 0, 2, ((2, 1),)),
        (6, 3, 0, 1, ((2, 3),)),
        (12, 2, 0, 6, ((3, 2), (2, 1))),
        (10, 2, 0, 3, ((3, 2),)),  # 0 2 4 and 3 5 7: strides that interleave
        (2**40, 2**20, 5, 7),
    ],
    ids=str,
)
def test_maps_that_do_not(given: Any) -> None:
    index = IndexMap(*given)
    if index.length < 100:
        places = index.positions().reshape(-1)
        assert len(places.unique()) == len(places) == index.covered


@pytest.mark.parametrize("place", range(4))
@pytest.mark.parametrize("value", [0.5, 2.0, True, "2", None, float("nan")])
def test_maps_of_other_things_than_whole_numbers(place: int, value: Any) -> None:
    given = [6, 3, 0, 2]
    given[place] = value
    with pytest.raises(SymmetryError, match="expected whole numbers, found"):
        IndexMap(*given)


@pytest.mark.parametrize("given", [(6, -3), (6, 3, -1), (6, 3, 0, -1), (-6, 0), (6, 3, 0, 1, ((-2, 3),))])
def test_negative_maps(given: Any) -> None:
    with pytest.raises(SymmetryError, match="must not be negative"):
        IndexMap(*given)


@pytest.mark.parametrize(
    "permutation", [[0, 0, 1], [0, 1, 3], [-1, 0, 1], [0, 1], [0.0, 1.0, 2.0], [True, False, True], "abc"]
)
def test_a_map_moves_only_by_permutations(permutation: Any) -> None:
    with pytest.raises(ShapeError, match="permutation"):
        IndexMap(6, 3, 0, 2, ((2, 1),)).gather_index(permutation)
    if permutation not in ("abc", [0, 1]):
        with pytest.raises(ShapeError, match="permutation"):
            invert_permutation(torch.tensor(permutation))
        with pytest.raises(ShapeError, match="permutation"):
            compose_permutations(torch.arange(3), torch.tensor(permutation))


def spec(*groups: AxisGroup, **shapes: tuple[int, ...]) -> SymmetrySpec:
    return SymmetrySpec({g.name: g for g in groups}, (), shapes)


def group(name: str, *slots: Slot, **options: Any) -> AxisGroup:
    return AxisGroup(name, slots[0].index.size, slots, **options)


whole = Slot("w", 0, IndexMap(6, 6))
BAD: dict[str, tuple[AxisGroup, ...]] = {
    "a slot twice": (group("p", whole, whole),),
    "a slot twice, two units": (group("p", *[Slot("w", 0, IndexMap(6, 2, 0, 3, ((3, 1),)))] * 2),),
    "two groups on one slot": (group("p", whole), group("q", whole)),
    "two groups of two units": tuple(group(n, Slot("w", 0, IndexMap(6, 2))) for n in "pq"),
    "segments that overlap": (
        group("p", Slot("w", 0, IndexMap(6, 3))),
        group("q", Slot("w", 0, IndexMap(6, 3, 2))),
    ),
    "overlapping segments of one group": (
        group("p", Slot("w", 0, IndexMap(6, 3)), Slot("w", 0, IndexMap(6, 3, 2))),
    ),
    "a part of another's copies": (
        group("p", Slot("w", 0, IndexMap(6, 2, 0, 3, ((3, 1),)))),
        group("q", Slot("w", 0, IndexMap(6, 3))),
    ),
    "nested in another unit": (
        group("p", Slot("w", 0, IndexMap(6, 2, 0, 3, ((3, 1),)))),
        group("q", Slot("w", 0, IndexMap(6, 3, 3)), within=(("p", 0),), family="q"),
    ),
    "nested in no unit": (
        group("p", Slot("w", 0, IndexMap(6, 2, 0, 3, ((3, 1),)))),
        group("q", Slot("w", 0, IndexMap(6, 3)), within=(("p", 5),), family="q"),
    ),
    "one block of two": tuple(
        group(n, Slot("v", 0, IndexMap(3, 3), ((1, IndexMap(2, 1, 1)),))) for n in "pq"
    ),
    "a whole axis and a block of it": (
        group("p", Slot("v", 0, IndexMap(3, 3))),
        group("q", Slot("v", 0, IndexMap(3, 3), ((1, IndexMap(2, 1, 1)),))),
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_slots_that_are_not_independent(name: str) -> None:
    with pytest.raises(SymmetryError, match="move the same positions, and not independently"):
        spec(*BAD[name], w=(6,), v=(3, 2))


GOOD: dict[str, tuple[AxisGroup, ...]] = {
    "segments": (group("p", Slot("w", 0, IndexMap(6, 3))), group("q", Slot("w", 0, IndexMap(6, 3, 3)))),
    "interleaved": (group("p", Slot("w", 0, IndexMap(6, 3, 0, 2))), group("q", Slot("w", 0, IndexMap(6, 3, 1, 2)))),
    "digits": (
        group("p", Slot("w", 0, IndexMap(6, 2, 0, 3, ((3, 1),)))),
        group("q", Slot("w", 0, IndexMap(6, 3, 0, 1, ((2, 3),)))),
    ),
    "a digit of one of two segments": (
        group("p", Slot("u", 0, IndexMap(8, 2, 0, 3, ((3, 1),))), Slot("u", 0, IndexMap(8, 2, 6))),
        group("q", Slot("u", 0, IndexMap(8, 3, 0, 1, ((2, 3),)))),
    ),
    "the same group twice in a square": (
        group("p", Slot("s", 0, IndexMap(9, 3, 0, 3, ((3, 1),))), Slot("s", 0, IndexMap(9, 3, 0, 1, ((3, 3),)))),
    ),
    "nested": (
        group("p", Slot("w", 0, IndexMap(6, 2, 0, 3, ((3, 1),)))),
        *(
            group(f"q{u}", Slot("w", 0, IndexMap(6, 3, 3 * u)), within=(("p", u),), family="q")
            for u in range(2)
        ),
    ),
    "blocks": tuple(
        group(f"p{k}", Slot("v", 0, IndexMap(3, 3), ((1, IndexMap(2, 1, k)),))) for k in range(2)
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", GOOD)
def test_slots_that_are_independent_lose_nothing(name: str) -> None:
    shapes = {"w": (6,), "v": (3, 2), "u": (8,), "s": (9,)}
    made = spec(*GOOD[name], **shapes)
    again = SymmetrySpec.from_json(made.to_json())
    assert again == made
    state = {n: torch.arange(float(torch.tensor(s).prod())).reshape(s) for n, s in shapes.items()}
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        moves = {g.name: torch.randperm(g.size, generator=generator) for g in made.groups.values()}
        moved = apply(made, moves, state)
        for n, tensor in state.items():
            assert torch.equal(moved[n].reshape(-1).sort().values, tensor.reshape(-1))
        back = apply(made, made.invert(moves), moved)
        assert all(torch.equal(back[n], state[n]) for n in state)


def test_every_pair_of_small_maps_loses_nothing_or_is_refused() -> None:
    """All maps of an axis of 6, in pairs: what is accepted undoes itself, whatever the order of the groups."""
    maps = []
    for size, offset, stride in ((s, o, t) for s in (2, 3, 6) for o in range(6) for t in range(4)):
        for copies in ((), ((2, 1),), ((2, 3),), ((3, 1),), ((3, 2),), ((2, 2),)):
            try:
                maps.append(IndexMap(6, size, offset, stride, copies))
            except SymmetryError:
                continue
    state = {"w": torch.arange(6)}
    accepted = 0
    for first in maps[:: max(1, len(maps) // 40)]:
        for second in maps:
            pair = group("p", Slot("w", 0, first)), group("q", Slot("w", 0, second))
            try:
                made = [spec(*order, w=(6,)) for order in permutations(pair)]
            except SymmetryError:
                continue
            accepted += 1
            moves = {g.name: torch.arange(g.size).roll(1) for g in pair}
            one, other = (apply(s, moves, state)["w"] for s in made)
            assert torch.equal(one, other)
            assert torch.equal(one.sort().values, state["w"])
    assert accepted > 20


def changed(path: list[Any], value: Any) -> str:
    """Return the JSON of a spec with one entry changed."""
    data = json.loads(spec(*GOOD["nested"], w=(6,)).to_json())
    place = data
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return json.dumps(data)


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        (["groups", 0, "slots", 0, "stride"], 0, "share a position"),
        (["groups", 0, "slots", 0, "copies"], [[3, 0]], "share a position"),
        (["groups", 0, "slots", 0, "offset"], 0.5, "expected whole numbers"),
        (["groups", 0, "slots", 0, "offset"], -1, "expected whole numbers"),
        (["groups", 0, "slots", 0, "offset"], 3, "lies outside an axis of 6"),
        (["groups", 0, "slots", 0, "offset"], "1", "expected whole numbers"),
        (["groups", 0, "slots", 0, "axis"], 1, "IndexError"),
        (["groups", 0, "slots", 0, "axis"], -1, "expected whole numbers"),
        (["groups", 0, "slots", 0, "tensor"], "gone", "KeyError"),
        (["groups", 0, "slots", 0, "tensor"], {}, "TypeError"),
        (["groups", 0, "size"], 2.0, "expected whole numbers"),
        (["groups", 0, "size"], True, "expected whole numbers"),
        (["groups", 0, "size"], 10**30, "lies outside"),
        (["groups", 1, "within"], [["p", 1]], "not independently"),
        (["groups", 1, "within"], [["p", -1]], "expected whole numbers"),
        (["groups", 1, "name"], "p", "two groups have the same name"),
        (["groups", 1, "slots", 0, "offset"], 1, "not independently"),
        (["shapes", "w"], [6.0], "expected whole numbers"),
        (["shapes", "w"], 6, "TypeError"),
        (["groups"], {"p": 1}, "TypeError"),
        (["pinned"], [{"tensor": "w"}], "TypeError"),
        (["format"], 99, "found 99"),
    ],
)  # fmt: skip
def test_specs_that_were_edited(path: list[Any], value: Any, words: str) -> None:
    with pytest.raises(SymmetryError, match=words):
        SymmetrySpec.from_json(changed(path, value))


@pytest.mark.parametrize("text", ["", "[]", "null", "{", "[" * 100_000, '{"format": 2}'])
def test_texts_that_are_no_spec(text: str) -> None:
    with pytest.raises(SymmetryError, match="not a symmetry spec in JSON"):
        SymmetrySpec.from_json(text)


def test_a_group_under_another_name() -> None:
    with pytest.raises(SymmetryError, match="group 'q': its own name is 'p'"):
        SymmetrySpec({"q": group("p", whole)}, (), {"w": (6,)})
