"""Pairs of dimensions under rotary embeddings: found in every usual form, and never where something spoils them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from rotary_networks import (
    BAD,
    GOOD,
    HEADS,
    OTHER,
    SIZE,
    Rotate,
    X,
    angles,
    by_halves,
    doubled,
    interleaved,
    learned,
    network,
    one_other_entry,
    rotate_half,
    swapped,
)
from symmetry_helpers import Net, build, normal, seeded
from torch import Tensor, nn

from isthmus.couplings import Linear, Monomial, Permutation, Rotation
from isthmus.errors import SymmetryError
from isthmus.matching import Problem
from isthmus.symmetry import (
    Acts,
    AxisGroup,
    IndexMap,
    Slot,
    SymmetrySpec,
    apply,
    discover,
    drawn_elements,
    function_change,
    random_element,
    verify,
)


def holds(spec: SymmetrySpec, model: nn.Module) -> None:
    """Check by running, on two inputs, and that what is larger than the class is felt."""
    assert verify(spec, model, X).require().max_relative_error < 1e-12
    for element in drawn_elements(spec, seeded(4), 2):
        assert function_change(spec, element, model, OTHER) < 1e-12


@pytest.mark.parametrize("turn", GOOD, ids=lambda f: f.__name__)
def test_pairs_are_found_in_every_form(turn: Rotate) -> None:
    model = network(turn)
    spec = discover(model, X)
    arrangement, size = GOOD[turn]
    assert [(g.size, g.acts, g.planes) for g in spec.planes.values()] == [
        (size, Acts.COMPLEX, arrangement)
    ] * HEADS
    for group in spec.planes.values():
        assert {(s.tensor, s.power) for s in group.slots} == {
            (f"{layer}.{kind}", power)
            for layer, power in (("q", 1), ("k", -1))
            for kind in ("weight", "bias")
        }
        assert len(group.within) == 1
    holds(spec, model)


@cache
def believed() -> dict[str, AxisGroup]:
    """Return the pairs of a network that has them."""
    planes = discover(network(by_halves), X).planes
    return {n: replace(g, within=(), family="") for n, g in planes.items()}


def test_a_pair_whose_tables_differ_is_left_out() -> None:
    model = network(one_other_entry)
    spec = discover(model, X)
    assert {
        (g.size, tuple(g.slots[0].index.positions().flatten().tolist())) for g in spec.planes.values()
    } == {(2, (start + head * SIZE, start + 4 + head * SIZE)) for start in range(3) for head in range(HEADS)}
    holds(spec, model)


@pytest.mark.parametrize("turn", BAD, ids=lambda f: f.__name__)
def test_what_nearly_turns_pairs_has_none(turn: Rotate) -> None:
    """And somebody who believed in them would change the function."""
    model = network(turn)
    spec = discover(model, X)
    assert not spec.planes
    planted = replace(spec.restrict([]), planes=believed())
    assert not verify(planted, model, X).passed


def test_queries_alone_may_be_turned() -> None:
    model = network(by_halves, lambda _, x: x)
    spec = discover(model, X)
    assert [g.acts for g in spec.planes.values()] == [Acts.COMPLEX] * HEADS
    holds(spec, model)


def test_other_frequencies_of_keys_change_nothing() -> None:
    """Scores depend on both positions then, but pairs turn alike all the same."""
    model = network(by_halves, swapped)
    spec = discover(model, X)
    assert len(spec.planes) == HEADS
    holds(spec, model)


def test_learned_frequencies_keep_their_pairs_in_the_group_that_they_move_with() -> None:
    model = network(learned)
    spec = discover(model, X)
    assert any("freqs" in str(g) for g in spec.groups.values())
    holds(spec, model)


def test_heads_of_keys_that_several_queries_share_turn_all_of_them() -> None:
    model = network(by_halves, kv_heads=1)
    spec = discover(model, X)
    (group,) = spec.planes.values()
    assert {str(s) for s in group.slots if s.tensor.endswith("weight")} == {
        "q.weight[0] (8/1 ×2/8 of 16)",
        "k.weight[0]",
    }
    holds(spec, model)


def _attend(m: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    scores = (query @ key.transpose(-1, -2)).softmax(-1)
    return m.out((scores @ value).transpose(1, 2).flatten(2))


def _keys_as_values(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return _attend(m, by_halves(m, q), by_halves(m, k), k)


def _turned_keys_as_values(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k = by_halves(m, k)
    return _attend(m, by_halves(m, q), k, k + 0 * v)


def _keys_twice(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The second time as they are, against queries as they are: the same pairs would do, but nobody proves it."""
    return _attend(m, by_halves(m, q), by_halves(m, k), v) + _attend(m, q, k, v)


def _keys_otherwise_twice(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return _attend(m, by_halves(m, q), by_halves(m, k), v) + _attend(m, by_halves(m, q), interleaved(m, k), v)


def _weights_measured(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return _attend(m, by_halves(m, q), by_halves(m, k), v) * m.k.weight[0, 0]


def _bias_read(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return _attend(m, by_halves(m, q), by_halves(m, k), v) + m.k.bias[:3]


def _keys_returned(m: Any, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    return _attend(m, by_halves(m, q), by_halves(m, k), v), by_halves(m, k)


def _weighted_product(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = torch.linspace(0.5, 1.5, SIZE)
    scores = torch.einsum("bhld,bhsd,d->bhls", by_halves(m, q), by_halves(m, k), weights).softmax(-1)
    return m.out((scores @ v).transpose(1, 2).flatten(2))


def _keys_flipped(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Dimension i of the queries meets another one of the keys."""
    return _attend(m, by_halves(m, q), by_halves(m, k).flip(-1), v)


def _heads_crossed(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """A head's halves meet those of two heads."""
    k = by_halves(m, k)
    mixed = torch.cat([k[..., : SIZE // 2], k.flip(1)[..., SIZE // 2 :]], -1)
    return _attend(m, by_halves(m, q), mixed, v)


SPOILED = (
    _keys_as_values,
    _turned_keys_as_values,
    _keys_twice,
    _keys_otherwise_twice,
    _weights_measured,
    _bias_read,
    _keys_returned,
    _weighted_product,
    _keys_flipped,
    _heads_crossed,
)


@pytest.mark.parametrize("use", SPOILED, ids=lambda f: f.__name__)
def test_another_use_spoils_the_pairs(use: Callable[..., Any]) -> None:
    model = network(use=use)
    spec = discover(model, X)
    assert not [g for g in spec.planes.values() if g.acts is Acts.COMPLEX]
    assert verify(spec, model, X).passed


def test_only_outputs_that_are_kept_count() -> None:
    model = network(use=_keys_returned)
    spec = discover(model, X, outputs=0)
    assert len(spec.planes) == HEADS
    holds(spec, model)


def test_one_projection_for_both_sides_rotates_and_does_not_scale() -> None:
    def shared(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return _attend(m, by_halves(m, q), by_halves(m, q), v)

    model = network(use=shared)
    spec = discover(model, X)
    assert [g.acts for g in spec.planes.values()] == [Acts.PLANE_ROTATIONS] * HEADS
    holds(spec, model)
    wider = [replace(g, acts=Acts.COMPLEX) for g in spec.planes.values()]
    planted = replace(spec, planes={g.name: g for g in wider})
    assert not verify(planted, model, X).passed


def test_heads_in_one_tensor_for_all() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        query, key = (torch.einsum("bld,hed->bhle", x, w) + b[:, None] for w, b in ((m.q, m.bq), (m.k, m.bk)))
        query, key = by_halves(m, query), by_halves(m, key)
        scores = torch.einsum("bhld,bhsd->bhls", query, key).softmax(-1)
        return torch.einsum("bhls,bsd,hde->ble", scores, x, m.out)

    shape = (HEADS, SIZE, 6)
    model = build(lambda: Net(forward, q=shape, k=shape, bq=shape[:2], bk=shape[:2], out=(HEADS, 6, 3)))
    spec = discover(model, X)
    assert [str(s) for g in spec.planes.values() for s in g.slots if s.tensor == "q"] == [
        "q[1] at [0] 0",
        "q[1] at [0] 1",
    ]
    holds(spec, model)


# --- Elements ---------------------------------------------------------------------------------------------------------
def pair_group(acts: Acts = Acts.COMPLEX, planes: Any = "halves", size: int = 6) -> AxisGroup:
    slots = (Slot("a", 0, IndexMap(6, 6), role="holds", power=1), Slot("b", 0, IndexMap(6, 6), power=-1))
    return AxisGroup("pairs", size, slots, acts=acts, planes=planes)


def spec_of(group: AxisGroup) -> SymmetrySpec:
    return SymmetrySpec({}, (), {"a": (6, 2), "b": (6, 3)}, planes={group.name: group})


@pytest.mark.parametrize("planes", ["halves", "neighbours"])
@pytest.mark.parametrize("acts", [Acts.COMPLEX, Acts.PLANE_ROTATIONS])
def test_elements_keep_inner_products_under_any_angles(acts: Acts, planes: Any) -> None:
    spec = spec_of(pair_group(acts, planes))
    element = random_element(acts, torch.arange(6), seeded(), planes)
    state = {"a": normal(6, 2).double(), "b": normal(6, 3).double()}
    moved = apply(spec, {"pairs": element}, state)
    turn = random_element(Acts.PLANE_ROTATIONS, torch.arange(6), seeded(1), planes).matrix()
    before, after = (s["a"].T @ turn @ s["b"] for s in (state, moved))
    assert float((before - after).abs().max()) < 1e-12
    assert float((moved["a"] - state["a"]).abs().max()) > 0.1
    back = apply(spec, {"pairs": element.inverse()}, moved)
    assert float((back["a"] - state["a"]).abs().max()) < 1e-12


TOO_LARGE = {
    "order": Permutation(torch.tensor([1, 0, 2, 4, 3, 5])),
    "swap within a pair": Permutation(torch.tensor([3, 1, 2, 0, 4, 5])),
    "reflection": Monomial(torch.arange(6), torch.tensor([1.0, 1, 1, -1, 1, 1], dtype=torch.float64)),
    "rotation": Rotation(random_element(Acts.ORTHOGONAL, torch.arange(6), seeded()).matrix()),
    "other pairs": random_element(Acts.COMPLEX, torch.arange(6), seeded(), "neighbours"),
    "map": Linear(torch.eye(6, dtype=torch.float64) + 0.1),
}


@pytest.mark.parametrize("larger", TOO_LARGE)
def test_couplings_of_a_larger_class_are_refused(larger: str) -> None:
    state = {"a": normal(6, 2), "b": normal(6, 3)}
    with pytest.raises(
        SymmetryError, match=r"only complex factors of pairs \(halves\) leave the function alone"
    ):
        apply(spec_of(pair_group()), {"pairs": TOO_LARGE[larger]}, state)


def test_factors_are_refused_where_pairs_only_rotate() -> None:
    stretched = random_element(Acts.COMPLEX, torch.arange(6), seeded(), "halves")
    state = {"a": normal(6, 2), "b": normal(6, 3)}
    with pytest.raises(SymmetryError, match="only rotations of pairs"):
        apply(spec_of(pair_group(Acts.PLANE_ROTATIONS)), {"pairs": stretched}, state)
    assert apply(spec_of(pair_group()), {"pairs": stretched}, state)["a"].shape == (6, 2)


# --- As values --------------------------------------------------------------------------------------------------------
def test_a_spec_with_pairs_is_written_read_and_printed() -> None:
    spec = discover(network(), X)
    again = SymmetrySpec.from_json(spec.to_json())
    assert again == spec
    assert again.planes
    assert "complex factors of pairs" in str(spec)
    whole = spec.with_planes()
    assert list(whole.groups) == [*spec.groups, *spec.planes]
    assert SymmetrySpec.from_json(whole.to_json()) == whole
    assert spec.restrict([]).planes == {}
    name = next(iter(spec.planes))
    assert list(spec.restrict([name]).planes) == [name]


def test_permutations_leave_pairs_alone() -> None:
    """Whoever permutes all groups need not know of pairs, and may ask for them among the groups."""
    model = network()
    spec = discover(model, X)
    assert verify(spec, model, X, symmetry="permutations").elements == 0
    assert verify(spec.with_planes(), model, X).require().elements == 2
    name = next(iter(spec.planes))
    torn = spec.without_slot(name, spec.planes[name].slots[0])
    assert not verify(torn, model, X).passed


@pytest.mark.parametrize(("acts", "planes", "size"), [(Acts.COMPLEX, "", 6), (Acts.GENERAL, "halves", 6)])
def test_groups_say_which_units_make_a_pair(acts: Acts, planes: Any, size: int) -> None:
    with pytest.raises(SymmetryError, match="expected an even number of units and planes"):
        pair_group(acts, planes, size)


def test_planes_are_apart_from_groups() -> None:
    group = pair_group()
    with pytest.raises(SymmetryError, match="among the planes: expected another name"):
        replace(spec_of(group), groups={"pairs": group})
    plain = AxisGroup("pairs", 6, group.slots)
    with pytest.raises(SymmetryError, match="among the planes: expected another name"):
        replace(spec_of(group), planes={"pairs": plain})


def test_unknown_planes_in_a_file_are_refused() -> None:
    text = spec_of(pair_group()).to_json().replace('"halves"', '"thirds"')
    with pytest.raises(SymmetryError, match="expected planes of"):
        SymmetrySpec.from_json(text)


def into_whole_numbers(m: Any, x: Tensor) -> Tensor:
    out = torch.zeros(x.shape, dtype=torch.int32)
    return out.copy_(9 * by_halves(m, x)).to(x.dtype)


def rounded_for_one_half(_: Any, x: Tensor) -> Tensor:
    cos = angles(x.shape[-2]).cos()
    sin = doubled(x.shape[-2]).sin()
    return x * torch.cat([cos, cos.to(torch.bfloat16).to(cos.dtype)], -1) + rotate_half(x) * sin


@pytest.mark.parametrize("turn", [into_whole_numbers, rounded_for_one_half], ids=lambda f: f.__name__)
def test_rounding_turns_nothing(turn: Rotate) -> None:
    assert not discover(network(turn), X).planes


def test_queries_that_are_added_to_their_own_scores_are_not_turned() -> None:
    def use(m: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        q, k, v = (t.repeat(1, 1, 2, 1)[:, :, :SIZE].flatten(0, 1) for t in (query, key, value))
        q, k = by_halves(m, q), by_halves(m, k)
        mixed = torch.baddbmm(q, q, k.mT).softmax(-1) @ v
        return m.out(mixed.unflatten(0, (-1, HEADS)).transpose(1, 2).flatten(2))

    assert not discover(network(use=use), X).planes


def test_another_wish_has_the_pair_of_its_own_groups() -> None:
    problem = Problem(network(by_halves), network(by_halves), args=(X,))
    turned = problem.wanting("all")
    assert turned.spec.groups.keys() > problem.spec.groups.keys()
    assert turned.pair.layers is turned.layers is not problem.layers
