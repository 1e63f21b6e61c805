"""The algebra of axis labels against brute force: which permutations survive a sequence of operations."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from isthmus.symmetry import IndexMap
from isthmus.symmetry._axes import (
    ONE,
    Atom,
    Expression,
    Fixed,
    Occurrence,
    Pin,
    Product,
    Sum,
    UnsplittableError,
    atoms_of,
    cut,
    fresh,
    occurrences,
    phases,
    pin,
    product_of,
    resolve,
    split_leading,
    split_trailing,
    unify,
    weave,
    woven,
)

Permutation = tuple[int, ...]
Constraint = Callable[[Permutation], bool]
WHY = Pin("because", "op", "module")


def index_maps(axis: Expression) -> dict[Atom, list[IndexMap]]:
    found: dict[Atom, list[IndexMap]] = {}
    for o in occurrences(axis):
        if isinstance(o, Occurrence):
            index = IndexMap(axis.size, o.atom.size, o.offset, o.stride, o.copies)
            found.setdefault(o.atom, []).append(index)
    return found


def joint_movements(*axes: Expression) -> Iterator[tuple[Permutation, ...]]:
    """Yield what every choice of one permutation per atom does to the axes."""
    maps = [index_maps(axis) for axis in axes]
    atoms = list({atom: None for m in maps for atom in m})
    for chosen in itertools.product(*(itertools.permutations(range(a.size)) for a in atoms)):
        moved: list[Permutation] = []
        for axis, found in zip(axes, maps, strict=True):
            index = torch.arange(axis.size)
            for atom, permutation in zip(atoms, chosen, strict=True):
                for where in found.get(atom, []):
                    index = index[where.gather_index(torch.tensor(permutation))]
            moved.append(tuple(index.tolist()))
        yield tuple(moved)


def movements(axis: Expression) -> set[Permutation]:
    return {moved[0] for moved in joint_movements(axis)}


def respects_split(size: int) -> Constraint:
    """The permutation acts on (leading, trailing) coordinates separately."""

    def holds(p: Permutation) -> bool:
        rows = [p[k : k + size] for k in range(0, len(p), size)]
        lead = [r[0] // size for r in rows]
        trail = [v % size for v in rows[0]]
        return all(v == lead[i] * size + trail[j] for i, r in enumerate(rows) for j, v in enumerate(r))

    return holds


def respects_cut(length: int) -> Constraint:
    return lambda p: all(v < length for v in p[:length])


def respects_phases(number: int) -> Constraint:
    return lambda p: all(v % number == k % number for k, v in enumerate(p))


def survivors(size: int, constraints: list[Constraint]) -> set[Permutation]:
    return {p for p in itertools.permutations(range(size)) if all(c(p) for c in constraints)}


STEPS = st.lists(st.tuples(st.sampled_from(["split", "cut", "phases"]), st.integers(1, 5)), max_size=4)
DEMANDS = {"split": respects_split, "cut": respects_cut, "phases": respects_phases}
REFINE: dict[str, Callable[[Expression, int], object]] = {
    "split": split_trailing,
    "cut": cut,
    "phases": phases,
}


def perform(axis: Expression, steps: list[tuple[str, int]]) -> tuple[list[Constraint], bool]:
    """Refine an axis; return what that demands, and whether every step was possible."""
    constraints: list[Constraint] = []
    complete = True
    for kind, size in steps:
        if not 0 < size < axis.size or (kind == "split" and axis.size % size):
            continue
        constraints.append(DEMANDS[kind](size))
        # an incomplete last period beside other structure is taken apart position by position
        complete &= kind != "phases" or axis.size % size == 0 or not constraints[:-1]
        try:
            REFINE[kind](axis, size)
        except UnsplittableError:
            pin(axis, WHY)
            complete = False
    return constraints, complete


@settings(max_examples=150, deadline=None)
@given(size=st.integers(0, 6), steps=STEPS)
def test_refinements_keep_exactly_the_permutations_that_respect_them(
    size: int, steps: list[tuple[str, int]]
) -> None:
    axis = fresh(size) if size else Fixed(0, WHY)
    constraints, complete = perform(axis, steps)
    allowed = survivors(size, constraints)
    found = movements(axis)
    assert found <= allowed
    if complete:
        assert found == allowed


@settings(max_examples=150, deadline=None)
@given(size=st.sampled_from([2, 3, 4, 6]), one=STEPS, two=STEPS)
def test_unified_axes_move_alike(size: int, one: list[tuple[str, int]], two: list[tuple[str, int]]) -> None:
    x, y = fresh(size), fresh(size)
    constraints = perform(x, one)[0] + perform(y, two)[0]
    unify(x, y)
    allowed = survivors(size, constraints)
    for moved_x, moved_y in joint_movements(x, y):
        assert moved_x == moved_y
        assert moved_x in allowed


@settings(max_examples=60, deadline=None)
@given(sizes=st.lists(st.integers(1, 3), min_size=1, max_size=3))
def test_a_reshape_there_and_back_keeps_the_parts(sizes: list[int]) -> None:
    atoms = [fresh(n) for n in sizes]
    whole = product_of(atoms)
    assert whole.size == math.prod(sizes)
    parts: list[Expression] = []
    for n in reversed(sizes):
        whole, part = split_trailing(whole, n)
        parts.insert(0, part)
    for atom, part in zip(atoms, parts, strict=True):
        assert resolve(atom) is resolve(part)


def test_compatible_groupings_meet_in_a_common_refinement() -> None:
    x, y = fresh(12), fresh(12)
    split_trailing(x, 2)
    split_trailing(y, 4)
    unify(x, y)
    assert [a.size for a in atoms_of(x)] == [3, 2, 2]
    assert list(atoms_of(x)) == list(atoms_of(y))


def test_incompatible_groupings_are_pinned_and_say_so() -> None:
    x, y = fresh(6), fresh(6)
    split_trailing(x, 2)
    split_trailing(y, 3)
    unify(x, y)
    for axis in (x, y):
        fixed = [found[0] for found in occurrences(axis) if isinstance(found, tuple)]
        assert sum(part.size for part in fixed) == sum(a.size for a in atoms_of(axis))
        assert {part.why.reason for part in fixed} == {"two incompatible groupings of one axis meet here"}


def test_segments_meet_segments() -> None:
    x, y = fresh(6), fresh(6)
    cut(x, 2)
    cut(y, 4)
    unify(x, y)
    assert [a.size for a in atoms_of(x)] == [2, 2, 2]
    assert movements(x) == survivors(6, [respects_cut(2), respects_cut(4)])


def test_a_segment_of_a_product_is_cut_between_units_only() -> None:
    axis = product_of((fresh(3), fresh(4)))
    head, tail = cut(axis, 4)
    assert (head.size, tail.size) == (4, 8)
    with pytest.raises(UnsplittableError):
        cut(product_of((fresh(3), fresh(4))), 6)


def test_a_concatenation_splits_into_equal_units() -> None:
    axis = Sum((product_of((fresh(2), fresh(3))), product_of((fresh(4), fresh(3)))))
    lead, trail = split_trailing(axis, 3)
    assert (lead.size, trail.size) == (6, 3)
    assert len(set(atoms_of(axis))) == 3


def test_splits_that_do_not_divide_are_refused() -> None:
    for size in (0, 4):
        with pytest.raises(UnsplittableError):
            split_trailing(fresh(6), size)
    with pytest.raises(UnsplittableError):
        split_leading(fresh(6), 4)
    with pytest.raises(UnsplittableError):
        split_trailing(product_of((fresh(2), fresh(3))), 2)


def test_leading_and_trailing_factors() -> None:
    axis = fresh(6)
    lead, trail = split_leading(axis, 2)
    assert (lead.size, trail.size) == (2, 3)
    assert [e.size for e in split_trailing(axis, 1)] == [6, 1]
    assert split_trailing(axis, 6)[0] is ONE


def test_fixed_positions_split_and_cut_anywhere() -> None:
    axis = Product((Fixed(2, WHY), Fixed(3, Pin("another reason"))))
    assert [e.size for e in split_trailing(axis, 2)] == [3, 2]
    assert [e.size for e in cut(axis, 1)] == [1, 5]


def test_fixed_neighbours_fuse_and_keep_the_reason() -> None:
    fused = resolve(Sum((Fixed(2, WHY), fresh(1), Fixed(3, WHY))))
    assert isinstance(fused, Fixed)
    assert (fused.size, fused.why) == (6, WHY)
    product = resolve(Product((Fixed(2, WHY), ONE, Fixed(3, WHY))))
    assert isinstance(product, Fixed)
    assert product.size == 6


def test_pinning_reaches_every_part_once() -> None:
    axis = fresh(6)
    lead, _ = split_trailing(axis, 2)
    pin(lead, WHY)
    pin(axis, Pin("later"))
    parts = [o for o in occurrences(axis) if not isinstance(o, Occurrence)]
    assert {p.why.reason for p, _ in parts} == {"because", "later"}
    assert movements(axis) == {tuple(range(6))}


def test_units_of_an_axis_cannot_be_parts_of_themselves() -> None:
    atom = fresh(4)
    unify(atom, product_of((atom,)))
    assert resolve(atom) is atom
    small = fresh(2)
    nested = product_of((small, fresh(2)))
    big = fresh(4)
    unify(big, nested)
    unify(big, Sum((small, small)))
    assert movements(big) <= survivors(4, [respects_split(2), respects_cut(2)])


def test_an_axis_equal_to_one_that_holds_it_is_pinned() -> None:
    atom = fresh(2)
    holder = Sum((atom, Fixed(0, WHY)))
    unify(atom, holder)
    assert movements(atom) == {(0, 1), (1, 0)}
    wrapped = Product((atom, ONE))
    unify(wrapped, atom)
    assert resolve(wrapped) is resolve(atom)


def test_unequal_lengths_are_a_mistake_of_the_caller() -> None:
    with pytest.raises(ValueError, match="cannot unify axes of 2 and 3 positions"):
        unify(fresh(2), fresh(3))


def test_occurrences_give_the_index_maps_of_a_flatten() -> None:
    channels, height, width = fresh(3), Fixed(2, WHY), Fixed(2, WHY)
    maps = index_maps(product_of((channels, height, width)))
    assert [m for found in maps.values() for m in found] == [IndexMap(12, 3, 0, 4, ((4, 1),))]
    assert next(iter(maps.values()))[0].positions().tolist() == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]


def test_occurrences_of_nested_factors_and_segments() -> None:
    outer, inner, tail = fresh(2), fresh(3), fresh(4)
    maps = index_maps(Sum((product_of((outer, inner)), tail)))
    assert [m[0] for m in maps.values()] == [
        IndexMap(10, 2, 0, 3, ((3, 1),)),
        IndexMap(10, 3, 0, 1, ((2, 3),)),
        IndexMap(10, 4, 6, 1),
    ]
    fixed = [o for o in occurrences(Sum((Fixed(2, WHY), fresh(2)))) if not isinstance(o, Occurrence)]
    assert [positions for _, positions in fixed] == [2]


def test_one_atom_at_two_places_of_an_axis() -> None:
    atom = Atom(3)
    twice = index_maps(Sum((atom, atom)))[atom]
    assert [m.offset for m in twice] == [0, 3]
    square = index_maps(product_of((atom, atom)))[atom]
    assert [m.stride for m in square] == [3, 1]
    cycle = torch.tensor([1, 2, 0])
    moved = torch.arange(9)[square[0].gather_index(cycle)][square[1].gather_index(cycle)]
    expected = torch.arange(9).reshape(3, 3)[cycle][:, cycle].reshape(-1)
    assert torch.equal(
        torch.arange(9)[square[0].gather_index(cycle)[square[1].gather_index(cycle)]], expected
    )
    assert torch.equal(moved, expected)


def test_woven_axes_are_placed_cut_and_read_by_phase() -> None:
    one, two = fresh(5), fresh(5)
    axis = woven([one, two])
    assert [m for found in index_maps(axis).values() for m in found] == [
        IndexMap(10, 5, 0, 2),
        IndexMap(10, 5, 1, 2),
    ]
    head, tail = cut(axis, 5)  # one, two, one, two, one | two, one, two, one, two
    assert [[m.offset, m.stride, m.size] for f in index_maps(head).values() for m in f] == [
        [0, 2, 3],
        [1, 2, 2],
    ]
    assert [[m.offset, m.stride, m.size] for f in index_maps(tail).values() for m in f] == [
        [0, 2, 3],
        [1, 2, 2],
    ]
    (first, first_rest), (second, second_rest) = tuple(atoms_of(one)), tuple(atoms_of(two))
    assert tuple(atoms_of(head)) == (first, second)
    assert tuple(atoms_of(tail)) == (second_rest, first_rest)


def test_woven_axes_meet_products_and_each_other() -> None:
    same = woven([fresh(2), fresh(2)])
    unify(same, product_of((fresh(2), Fixed(2, WHY))))
    assert movements(same) == survivors(4, [respects_split(2), respects_phases(2)])
    halves, thirds = woven([fresh(3), fresh(3)]), woven([fresh(2), fresh(2), fresh(2)])
    unify(halves, thirds)
    assert movements(halves) == movements(thirds) == {tuple(range(6))}
    blocks = fresh(6)
    strands = weave(blocks, 2, [1, 2])
    assert [(lead.size, trail.size) for lead, trail in strands] == [(2, 1), (2, 2)]
    allowed = {p for p in survivors(6, []) if {p[0], p[3]} == {0, 3} and {v // 3 for v in p[1:3]} <= {0, 1}}
    assert len(movements(blocks)) == 8
    assert movements(blocks) <= allowed


def test_phases_beside_segments_and_what_is_left_over() -> None:
    head, tail = fresh(3), fresh(3)
    even, odd = phases(Sum((head, tail)), 2)
    assert (even.size, odd.size) == (3, 3)
    assert movements(Sum((head, tail))) <= survivors(6, [respects_phases(2), respects_cut(3)])
    assert len(movements(Sum((head, tail)))) == 4
    assert [p.size for p in phases(fresh(5), 2)] == [3, 2]
    assert [p.size for p in phases(product_of((fresh(3), fresh(2))), 4)] == [2, 2, 1, 1]
    with pytest.raises(UnsplittableError):
        phases(product_of((fresh(3), fresh(5))), 4)
    assert [p.size for p in phases(product_of((Fixed(3, WHY), Fixed(4, WHY))), 6)] == [2] * 6


@settings(max_examples=60, deadline=None)
@given(one=STEPS, two=STEPS)
def test_woven_axes_that_meet_move_alike(one: list[tuple[str, int]], two: list[tuple[str, int]]) -> None:
    x, y = fresh(6), fresh(6)
    demands = perform(x, one)[0] + perform(y, two)[0]
    unify(x, y)
    for moved_x, moved_y in joint_movements(x, y):
        assert moved_x == moved_y
        assert all(holds(moved_x) for holds in demands)
