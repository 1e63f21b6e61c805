"""Couplings: what each class promises, checked against its matrix."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from isthmus.couplings import Coupling, Linear, Monomial, Nested, Permutation, Plan, Rotation, is_orthogonal
from isthmus.errors import ShapeError


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def order(size: int, seed: int = 0) -> Tensor:
    return torch.randperm(size, generator=torch.Generator().manual_seed(seed))


def rotation(size: int, seed: int = 0) -> Tensor:
    return torch.linalg.qr(normal(size, size, seed=seed))[0]


INVERTIBLE: dict[str, Callable[[int], Coupling]] = {
    "permutation": lambda seed: Permutation(order(6, seed)),
    "monomial": lambda seed: Monomial(order(6, seed), normal(6, seed=seed) + 0.1),
    "rotation": lambda seed: Rotation(rotation(6, seed)),
    "linear": lambda seed: Linear(normal(6, 6, seed=seed)),
    "nested": lambda seed: Nested(
        Permutation(order(3, seed)), [Permutation(order(2, seed + k)) for k in range(3)]
    ),
    "nested rotations": lambda seed: Nested(
        Permutation(order(3, seed)), [Rotation(rotation(2, seed + k)) for k in range(3)]
    ),
}
PLANS: dict[str, Callable[[int], Coupling]] = {
    "narrow": lambda seed: Plan(normal(4, 6, seed=seed).abs()),
    "wide": lambda seed: Plan(normal(9, 6, seed=seed).abs()),
}


@pytest.mark.parametrize("kind", [*INVERTIBLE, *PLANS])
def test_holders_are_multiplied_by_the_matrix(kind: str) -> None:
    coupling = {**INVERTIBLE, **PLANS}[kind](1)
    assert isinstance(coupling, Coupling)
    rows, columns = coupling.shape
    matrix = coupling.matrix()
    assert matrix.shape == (rows, columns)
    assert matrix.dtype == torch.float64
    held = normal(columns, 5)
    torch.testing.assert_close(coupling.carry(held), matrix @ held, rtol=1e-12, atol=1e-12)
    cube = normal(2, columns, 3)
    expected = torch.einsum("ik,akb->aib", matrix, cube)
    torch.testing.assert_close(coupling.carry(cube, 1), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(coupling.carry(cube, -2), expected, rtol=1e-12, atol=1e-12)
    single = coupling.carry(held.float())
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), matrix @ held, rtol=1e-5, atol=1e-5)
    assert "\n" not in repr(coupling)


@pytest.mark.parametrize("kind", INVERTIBLE)
def test_readers_undo_holders(kind: str) -> None:
    coupling = INVERTIBLE[kind](2)
    held, read = normal(6, 4), normal(3, 6, seed=1)
    function = coupling.carry_readers(read, 1) @ coupling.carry(held)
    torch.testing.assert_close(function, read @ held, rtol=1e-10, atol=1e-10)
    inverse = coupling.inverse()
    torch.testing.assert_close(inverse.carry(coupling.carry(held)), held, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(
        coupling.inverse().matrix() @ coupling.matrix(), torch.eye(6).double(), rtol=0, atol=1e-10
    )


@pytest.mark.parametrize(("first", "second"), list(itertools.product(INVERTIBLE, INVERTIBLE)))
def test_composition_is_the_product_of_the_matrices(first: str, second: str) -> None:
    one, two = INVERTIBLE[first](3), INVERTIBLE[second](4)
    both = one.then(two)
    torch.testing.assert_close(both.matrix(), two.matrix() @ one.matrix(), rtol=1e-10, atol=1e-10)
    held, read = normal(6, 4), normal(3, 6, seed=1)
    torch.testing.assert_close(both.carry(held), two.carry(one.carry(held)), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(
        both.carry_readers(read, 1),
        two.carry_readers(one.carry_readers(read, 1), 1),
        rtol=1e-8,
        atol=1e-8,
    )


def test_composition_keeps_the_smallest_class() -> None:
    p, m, q = (INVERTIBLE[k](5) for k in ("permutation", "monomial", "rotation"))
    assert type(p.then(p)) is Permutation
    assert type(p.then(m)) is Monomial
    assert type(m.then(p)) is Monomial
    assert type(q.then(q)) is Rotation
    signs = Monomial(order(6, 7), torch.tensor([1.0, -1.0, 1.0, 1.0, -1.0, -1.0]))
    assert type(m.then(q)) is type(q.then(m)) is Linear
    nest = INVERTIBLE["nested"](5)
    for one in (p, signs, nest, INVERTIBLE["nested rotations"](5)):
        assert type(one.then(q)) is type(q.then(one)) is Rotation
    assert type(INVERTIBLE["linear"](5).then(q)) is Linear
    assert type(nest.then(nest)) is Nested
    assert type(nest.inverse()) is Nested


def test_orthogonal_couplings_are_their_own_inverse_transposed() -> None:
    signs = Monomial(order(6, 7), torch.tensor([1.0, -1.0, 1.0, 1.0, -1.0, -1.0]))
    for kind, coupling in {**{k: make(3) for k, make in INVERTIBLE.items()}, "signs": signs}.items():
        matrix = coupling.matrix()
        same = torch.allclose(matrix @ matrix.T, torch.eye(6).double(), atol=1e-10)
        assert is_orthogonal(coupling) == same == (kind not in ("monomial", "linear"))
    assert not is_orthogonal(PLANS["narrow"](1))


def test_members_follow_their_block() -> None:
    nest = Nested(
        Permutation(torch.tensor([1, 0])),
        [Permutation(torch.tensor([1, 0, 2])), Permutation(torch.tensor([0, 2, 1]))],
    )
    units = torch.tensor([0, 1, 2, 10, 11, 12])
    assert nest.carry(units).tolist() == [11, 10, 12, 0, 2, 1]


def test_a_plan_that_copies_units_changes_nothing() -> None:
    """Three units of B for five of A: each of A's is a copy, and readers are shared out."""
    owners = torch.tensor([0, 1, 1, 2, 2])
    plan = Plan(torch.eye(3)[owners] / 5)
    held, read = normal(3, 4), normal(2, 3, seed=1)
    wide = plan.carry(held)
    torch.testing.assert_close(wide, held[owners])
    torch.testing.assert_close(plan.carry_readers(read, 1) @ wide, read @ held)


def test_a_plan_that_joins_units_averages_them_and_adds_their_readers() -> None:
    plan = Plan(torch.tensor([[1.0, 1.0, 0.0], [0.0, 0.0, 2.0]]))
    assert plan.carry(torch.tensor([1.0, 3.0, 7.0])).tolist() == [2.0, 7.0]
    assert plan.carry_readers(torch.tensor([1.0, 3.0, 7.0])).tolist() == [4.0, 7.0]


def test_a_uniform_plan_on_a_permutation_is_that_permutation() -> None:
    index = order(6)
    plan, permutation = Plan(Permutation(index).matrix() / 6), Permutation(index)
    held = normal(6, 3)
    torch.testing.assert_close(plan.carry(held), permutation.carry(held))
    torch.testing.assert_close(plan.carry_readers(held), permutation.carry_readers(held))


def test_plans_compose_where_the_mass_between_them_agrees() -> None:
    first = Plan(torch.full((4, 6), 1 / 24))
    second = Plan(torch.eye(4).repeat_interleave(2, 0) / 8)
    held = normal(6, 2)
    torch.testing.assert_close(first.then(second).carry(held), second.carry(first.carry(held)))
    shuffle = Permutation(order(4))
    torch.testing.assert_close(first.then(shuffle).carry(held), shuffle.carry(first.carry(held)))
    before = Permutation(order(6, 2))
    torch.testing.assert_close(before.then(first).carry(held), first.carry(before.carry(held)))
    with pytest.raises(ShapeError, match="take the mass that the first one gives"):
        first.then(Plan(torch.tensor([[1.0, 2.0, 3.0, 4.0]])))
    with pytest.raises(ShapeError, match="only a Permutation or another Plan can follow"):
        first.then(Rotation(rotation(4)))
    with pytest.raises(ShapeError, match="mixing them before has no mass"):
        Rotation(rotation(6)).then(first)


def test_gradients_reach_the_numbers_of_a_coupling() -> None:
    held, read = normal(6, 4), normal(3, 6, seed=1)
    for make, values in (
        (lambda v: Monomial(order(6), v), torch.ones(6, dtype=torch.float64)),
        (Linear, normal(6, 6)),
        (Rotation, rotation(6)),
        (Plan, normal(6, 6).abs()),
    ):
        values = values.clone().requires_grad_()
        coupling = make(values)
        (coupling.carry(held).square().sum() + coupling.carry_readers(read, 1).sum()).backward()
        assert values.grad is not None
        assert bool(values.grad.abs().sum() > 0)


def test_permutations_are_values() -> None:
    one, other = Permutation(torch.tensor([1, 0])), Permutation([1, 0])  # pyright: ignore[reportArgumentType]
    assert one == other
    assert hash(one) == hash(other)
    assert one != Permutation.identity(2)
    assert one.moves
    assert not Permutation.identity(2).moves
    assert one.moved_fraction == 1.0
    assert repr(one) == "Permutation(2 units, 100% moved)"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Permutation(torch.tensor([0, 0])), "exactly once"),
        (lambda: Permutation(torch.tensor([0.5, 0.1])), "expected integers"),
        (lambda: Monomial(order(3), torch.tensor([1.0, 0.0, 1.0])), "not zero"),
        (lambda: Monomial(order(3), torch.tensor([1.0, torch.inf, 1.0])), "finite"),
        (lambda: Monomial(order(3), torch.ones(2)), "3 real factors"),
        (lambda: Rotation(normal(3, 3)), "orthonormal rows"),
        (lambda: Rotation(normal(3, 2)), "square matrix"),
        (lambda: Rotation(torch.full((2, 2), torch.nan)), "finite real numbers"),
        (lambda: Linear(torch.ones(2, 2)), "singular"),
        (lambda: Linear(torch.eye(2), 2 * torch.eye(2)), "differs from the identity by 1.0e"),
        (lambda: Linear(torch.eye(2), torch.eye(3)), r"inverse of shape \(2, 2\)"),
        (lambda: Plan(torch.tensor([[1.0, -1.0]])), "not negative"),
        (lambda: Plan(torch.tensor([[1.0, 0.0]])), "unit 1 of B has no mass"),
        (lambda: Plan(torch.ones(3)), "expected a matrix of mass"),
        (lambda: Plan(torch.ones(2, 3)).inverse(), "nothing undoes"),
        (lambda: Nested(Permutation(order(2)), [Permutation(order(2))]), "one inner coupling for each of 2"),
        (lambda: Permutation(order(3)).then(Permutation(order(4))), "the second expects 4"),
        (lambda: Permutation(order(3)).carry(torch.ones(4)), "expected 3 units on axis 0, found 4"),
        (lambda: Permutation(order(3)).carry(torch.ones(3), 1), "expected axis 1 to exist"),
    ],
)
def test_bad_couplings_are_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ShapeError, match=message):
        make()
