"""Solvers by class: best in their class, planted truth recovered, ties and zeros settled alike, nothing mutated."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from isthmus.couplings import Coupling, Linear, Monomial, Permutation, Rotation
from isthmus.errors import DataError, ShapeError
from isthmus.matching import (
    Assignment,
    BalancedProcrustes,
    ComplexFactors,
    LeastSquares,
    PlaneRotations,
    Procrustes,
    ScaledAssignment,
    SidedSolver,
    Sides,
    SignedAssignment,
    Solver,
)

SOLVERS: dict[str, SidedSolver] = {
    "permutation": Assignment(),
    "signed": SignedAssignment(),
    "positive": ScaledAssignment(),
    "monomial": ScaledAssignment(signed=True),
    "norms": ScaledAssignment("norms"),
    "orthogonal": Procrustes(),
    "mean-fixing": Procrustes(fix_mean=True),
    "planes": PlaneRotations(),
    "complex": ComplexFactors(),
    "general": BalancedProcrustes(),
    "least squares": LeastSquares(),
}


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def permutation(size: int, seed: int) -> Tensor:
    return torch.randperm(size, generator=torch.Generator().manual_seed(seed))


def drawn(acts: str, size: int, seed: int) -> Coupling:
    """Return a random coupling of a class, well conditioned."""
    order, factors = permutation(size, seed), normal(size, seed=seed)
    signs = torch.where(normal(size, seed=seed + 1) < 0, -1.0, 1.0).double()
    if acts == "permutation":
        return Permutation(order)
    if acts == "signed":
        return Monomial(order, signs)
    if acts in ("positive", "norms"):
        return Monomial(order, factors.exp())
    if acts == "monomial":
        return Monomial(order, signs * factors.exp())
    if acts in ("orthogonal", "mean-fixing"):
        return Procrustes(fix_mean=acts != "orthogonal")(normal(size, size, seed=seed))
    if acts == "planes":
        return PlaneRotations()(normal(size, size, seed=seed))
    if acts == "complex":
        turn = PlaneRotations()(normal(size, size, seed=seed)).values
        return Linear(turn * (0.5 * normal(size // 2, seed=seed)).exp().repeat(2))
    return Linear(torch.eye(size).double() + 0.2 * normal(size, size, seed=seed))


def units(size: int, seed: int, reads: bool = True) -> tuple[Tensor, Tensor]:
    return normal(size, 2 * size + 3, seed=seed), normal(size, size + 4 if reads else 0, seed=seed + 1)


def sides_of(coupling: Coupling, size: int, seed: int, noise: float = 0.0) -> Sides:
    """Return the sides of B and of A, which is B carried by the coupling."""
    b, s = units(size, seed)
    a, r = coupling.carry(b), coupling.carry_readers(s)
    shaken = [x + noise * normal(*x.shape, seed=seed + 9) for x in (a, r)]
    return Sides.between((shaken[0], b), (shaken[1], s))


def distance(coupling: Coupling, a: Tensor, b: Tensor, r: Tensor, s: Tensor) -> float:
    held, read = a - coupling.carry(b), r - coupling.carry_readers(s)
    return float(held.square().sum() + read.square().sum())


@pytest.mark.parametrize("acts", SOLVERS)
@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_a_planted_coupling_is_found(acts: str, size: int) -> None:
    if acts in ("planes", "complex") and size % 2:
        pytest.skip("planes take two units")
    for seed in range(3):
        planted = drawn(acts, size, seed)
        found = SOLVERS[acts](sides_of(planted, size, 40 + seed))
        assert torch.allclose(found.matrix(), planted.matrix(), atol=1e-6), (acts, seed)


@pytest.mark.parametrize("acts", SOLVERS)
def test_the_value_is_minus_half_the_squared_distance(acts: str) -> None:
    (a, r), (b, s) = units(6, 1), units(6, 3)
    sides = Sides.between((a, b), (r, s))
    for seed in range(3):
        coupling = drawn(acts, 6, seed)
        constant = float(a.square().sum() + r.square().sum())
        assert sides.value(coupling) == pytest.approx(
            0.5 * (constant - distance(coupling, a, b, r, s)), rel=1e-10
        )


@pytest.mark.parametrize("acts", [a for a in SOLVERS if a not in ("norms", "general")])
def test_no_random_coupling_of_the_class_is_better(acts: str) -> None:
    for start in range(4):
        (a, r), (b, s) = units(6, start), units(6, start + 50)
        sides = Sides.between((a, b), (r, s))
        best = sides.value(SOLVERS[acts](sides))
        for seed in range(40):
            assert sides.value(drawn(acts, 6, seed)) <= best


@pytest.mark.parametrize("acts", ["signed", "positive", "monomial"])
def test_enumeration_finds_nothing_better(acts: str) -> None:
    """All permutations, and for each of its pairs the best factor of a fine grid."""
    grid = (
        torch.ones(1).double() if acts == "signed" else torch.logspace(-1.5, 1.5, 1501, dtype=torch.float64)
    )
    grid = grid if acts == "positive" else torch.cat([grid, -grid])
    for seed in range(4):
        (a, r), (b, s) = units(4, seed), units(4, seed + 50)
        b, s = b * normal(4, seed=seed).exp()[:, None], s * normal(4, seed=seed + 1).exp()[:, None]
        sides = Sides.between((a, b), (r, s))
        pair = torch.tensor(
            [
                [
                    float(
                        (
                            (a[i] - grid[:, None] * b[j]).square().sum(1)
                            + (r[i] - s[j] / grid[:, None]).square().sum(1)
                        ).min()
                    )
                    for j in range(4)
                ]
                for i in range(4)
            ],
            dtype=torch.float64,
        )
        best = min(
            sum(float(pair[i, k]) for i, k in enumerate(order)) for order in itertools.permutations(range(4))
        )
        found = distance(SOLVERS[acts](sides), a, b, r, s)
        assert found <= best * (1 + 1e-12)
        assert found == pytest.approx(best, rel=1e-3)


def test_what_is_only_reordered_takes_no_factor() -> None:
    """Signs do not reach it: were it added to the other gains, they would be chosen for it."""
    held = torch.tensor([[-1.0, 0.5], [0.5, -1.0]]).double()
    zero = torch.zeros(2, 2).double()
    unmoved = torch.tensor([[0.0, 3.0], [3.0, 0.0]]).double()
    found = SignedAssignment()(Sides(held, zero, unmoved))
    assert found.index.tolist() == [1, 0]
    assert found.factors.tolist() == [1.0, 1.0]
    ones = torch.ones(2).double()
    scaled = ScaledAssignment(signed=True)(Sides(held, zero, 0 * unmoved, None, (ones, ones)))
    assert scaled.index.tolist() == [0, 1]
    assert scaled.factors.tolist() == pytest.approx([-1.3802775690976141] * 2)  # x⁴ = x³ + 1
    assert ScaledAssignment(signed=True)(Sides(held, zero, unmoved, None, (ones, ones))).index.tolist() == [
        1,
        0,
    ]


def test_both_sides_count_for_signs() -> None:
    held = torch.tensor([[1.0]]).double()
    assert SignedAssignment()(Sides(held, -2 * held, 0 * held)).factors.tolist() == [-1.0]
    assert SignedAssignment()(Sides(held, -0.5 * held, 0 * held)).factors.tolist() == [1.0]


def test_zeros_keep_their_signs_and_ties_are_settled_alike() -> None:
    for zero in (torch.zeros(3, 3), -torch.zeros(3, 3)):
        found = SignedAssignment()(zero)
        assert found.factors.tolist() == [1.0, 1.0, 1.0]
        assert torch.equal(found.index, Assignment()(zero).index)
    for solver in SOLVERS.values():
        tied = Sides.between((torch.ones(4, 5), torch.ones(4, 5)), (torch.ones(4, 2), torch.ones(4, 2)))
        assert torch.equal(solver(tied).matrix(), solver(tied).matrix())


def test_forbidden_pairs_are_not_paired() -> None:
    gain = torch.tensor([[-math.inf, -1.0], [5.0, 9.0]]).double()
    assert SignedAssignment()(gain).index.tolist() == [1, 0]
    assert SignedAssignment()(gain).factors.tolist() == [-1.0, 1.0]
    zero, ones = torch.zeros(2, 2).double(), torch.ones(2).double()
    for held, read in ((gain, zero), (zero, gain)):
        found = ScaledAssignment()(Sides(held, read, zero, None, (ones, ones)))
        assert found.index.tolist() == [1, 0]


@pytest.mark.parametrize("acts", SOLVERS)
def test_no_units_and_one(acts: str) -> None:
    empty = torch.zeros(0, 3)
    assert SOLVERS[acts](Sides.between((empty, empty), (empty, empty))).shape == (0, 0)
    if acts not in ("planes", "complex"):
        one = torch.ones(1, 3)
        assert SOLVERS[acts](Sides.between((one, one), (one, one))).matrix().item() == pytest.approx(1.0)


@pytest.mark.parametrize("acts", SOLVERS)
def test_nothing_is_mutated_and_gradients_are_not_needed(acts: str) -> None:
    values = [normal(4, 6, seed=k).requires_grad_() for k in range(4)]
    sides = Sides.between((values[0], values[1]), (values[2], values[3]))
    before = [x.clone() for x in (sides.holders, sides.readers, sides.unmoved)]
    found = SOLVERS[acts](sides)
    assert not found.matrix().requires_grad
    assert all(
        torch.equal(x, y) for x, y in zip(before, (sides.holders, sides.readers, sides.unmoved), strict=True)
    )
    assert isinstance(SOLVERS[acts], Solver)
    assert isinstance(SOLVERS[acts], SidedSolver)


def test_classes_are_named_as_groups_name_them() -> None:
    assert [s.acts for s in SOLVERS.values()] == [
        "permutation",
        "signed",
        "positive",
        "monomial",
        "positive",
        "orthogonal",
        "mean-fixing",
        "plane-rotations",
        "complex",
        "general",
        "general",
    ]


def test_one_matrix_stands_for_units_that_are_held() -> None:
    gain = normal(5, 5, seed=1)
    assert torch.equal(Procrustes()(gain).values, Procrustes()(Sides.of_gain(gain)).values)
    assert Assignment()(gain) == Assignment()(Sides.of_gain(gain))


def test_the_regression_of_activations_and_their_energy() -> None:
    """Held by both, read by none: E h_A h_B / E h_B², or the root of E h_A² / E h_B²."""
    h = normal(1000, 3, seed=1)
    h_a, h_b = 2 * h + 0.1 * normal(1000, 3, seed=2), h[:, [1, 2, 0]]
    zero = torch.zeros(3, 3).double()
    gain = h_a.T @ h_b / 1000
    of_a, of_b = ((x.square().mean(0), torch.zeros(3).double()) for x in (h_a, h_b))
    sides = Sides(gain, zero, zero, of_a, of_b)
    expected = (h_a * h).mean(0) / h.square().mean(0)
    found = ScaledAssignment()(sides)
    assert found.index.tolist() == [2, 0, 1]
    assert torch.allclose(found.factors, expected)
    energy = ScaledAssignment("norms")(sides)
    assert torch.allclose(energy.factors, (h_a.square().mean(0) / h.square().mean(0)).sqrt())
    assert ScaledAssignment(alone=1.5)(sides).factors.tolist() == [1.5, 1.5, 1.5]
    assert ScaledAssignment(most=1.25)(sides).factors.tolist() == [1.25, 1.25, 1.25]


def test_norms_are_matched_in_the_geometric_mean() -> None:
    (a, r), (b, s) = units(5, 3), units(5, 60)
    found = ScaledAssignment("norms")(Sides.between((a, b), (r, s)))
    b, s = b[found.index], s[found.index]
    expected = (a.norm(dim=1) * s.norm(dim=1) / (b.norm(dim=1) * r.norm(dim=1))).sqrt()
    assert torch.allclose(found.factors, expected)
    signed = ScaledAssignment("norms", signed=True)(Sides.between((-a, a), (-r, r)))
    assert signed.factors.tolist() == pytest.approx([-1.0] * 5)


def test_norm_factors_with_their_own_permutation_are_the_best_of_all_permutations() -> None:
    (a, r), (b, s) = units(4, 3), units(4, 60)
    sides = Sides.between((a, b), (r, s))

    def value(order: tuple[int, ...]) -> float:
        index = torch.tensor(order)
        ratio = a.norm(dim=1) * s[index].norm(dim=1) / (b[index].norm(dim=1) * r.norm(dim=1))
        return sides.value(Monomial(index, ratio.sqrt()))

    best = max(value(order) for order in itertools.permutations(range(4)))
    assert sides.value(ScaledAssignment("norms")(sides)) == pytest.approx(best)


@pytest.mark.parametrize("solver", [BalancedProcrustes(), LeastSquares()])
def test_circuits_stay_exactly_and_directions_that_vanish_do_no_harm(solver: SidedSolver) -> None:
    (a, r), (b, s) = units(6, 1), units(6, 30)
    b[2], s[4] = 0.0, 0.0  # a direction that nothing holds, and one that nothing reads
    found = solver(Sides.between((a, b), (r, s)))
    circuit, before = found.carry_readers(s).T @ found.carry(b), s.T @ b
    assert torch.allclose(circuit, before, atol=1e-9 * float(before.abs().max()))
    assert float(torch.linalg.cond(found.matrix())) <= 1e8


def test_balanced_circuits_meet_whatever_their_own_factors() -> None:
    """Factors that differ by an ill-shaped map hide one circuit; Procrustes alone does not find it."""
    b, s = units(5, 2)
    hidden = Linear(
        torch.diag(torch.tensor([0.02, 0.3, 1.0, 4.0, 60.0]).double()) @ drawn("general", 5, 3).matrix()
    )
    a, r = hidden.carry(b), hidden.carry_readers(s)
    sides = Sides.between((a, b), (r, s))
    found = BalancedProcrustes()(sides)
    assert torch.allclose(found.carry(b), a, rtol=1e-6, atol=1e-6)
    assert torch.allclose(found.carry_readers(s), r, rtol=1e-6, atol=1e-6)
    assert distance(Procrustes()(sides), a, b, r, s) > 1.0


def test_the_gradient_vanishes_at_least_squares() -> None:
    (a, r), (b, s) = units(5, 8), units(5, 90)
    found = LeastSquares()(Sides.between((a, b), (r, s)))
    x = torch.zeros(5, 5, dtype=torch.float64, requires_grad=True)
    matrix = torch.linalg.matrix_exp(x) @ found.matrix()
    loss = (a - matrix @ b).square().sum() + (r - torch.linalg.inv(matrix).T @ s).square().sum()
    loss.backward()
    assert x.grad is not None
    assert float(x.grad.abs().max()) < 1e-3 * float(loss.detach())
    for other in (BalancedProcrustes(), Procrustes()):
        assert float(loss.detach()) <= distance(other(Sides.between((a, b), (r, s))), a, b, r, s)


def test_steps_stop_at_the_bound_on_the_condition() -> None:
    planted = Linear(torch.diag(torch.tensor([1e3, 1.0, 1e-3]).double()))
    found = LeastSquares(condition=100.0)(sides_of(planted, 3, 5))
    assert float(torch.linalg.cond(found.matrix())) <= 100.0 * (1 + 1e-9)


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: ScaledAssignment("mean"), "expected rule 'least squares' or 'norms', found 'mean'"),  # pyright: ignore
        (lambda: ScaledAssignment(most=math.inf), "a finite largest factor of at least 1, found inf"),
        (lambda: ScaledAssignment(alone=0.5), "a finite largest factor of at least 1, found 0.5"),
        (lambda: PlaneRotations("thirds"), "expected planes 'halves' or 'neighbours', found 'thirds'"),  # pyright: ignore
        (lambda: PlaneRotations()(torch.zeros(3, 3)), "expected an even number of units, found 3"),
        (lambda: ComplexFactors("thirds"), "ComplexFactors: expected planes 'halves' or 'neighbours'"),  # pyright: ignore
        (lambda: ComplexFactors()(torch.zeros(3, 3)), "ComplexFactors: expected an even number of units"),
        (
            lambda: BalancedProcrustes(0.5),
            "BalancedProcrustes: expected a finite largest factor of at least 1",
        ),
        (lambda: LeastSquares(math.inf), "LeastSquares: expected a finite bound on the condition number"),
    ],
)
def test_bad_settings_are_refused(make: Callable[[], object], text: str) -> None:
    with pytest.raises(DataError, match=text):
        make()


def test_sides_that_do_not_fit_or_lack_something_are_refused() -> None:
    square, wide = torch.zeros(2, 2).double(), torch.zeros(2, 3).double()
    with pytest.raises(
        ShapeError, match=r"expected readers of shape \(2, 2\), as the holders have, found \(2, 3\)"
    ):
        Sides(square, wide, square)
    with pytest.raises(ShapeError, match=r"expected inner products of 2 units of A, found shape \(3,\)"):
        Sides(square, square, square, (torch.zeros(3), torch.zeros(2)))
    with pytest.raises(
        ShapeError,
        match="the norms of network B's units, by what holds and what reads them, found gains alone",
    ):
        ScaledAssignment()(square)
    norms = (torch.ones(2).double(), torch.ones(2).double())
    with pytest.raises(ShapeError, match="the norms of network A's units"):
        ScaledAssignment("norms")(Sides(square, square, square, None, norms))
    with pytest.raises(
        ShapeError, match="the inner products of network A's units with one another, found their norms alone"
    ):
        BalancedProcrustes()(Sides(square, square, square, norms, norms))


def test_planes_of_neighbours_and_of_halves() -> None:
    gain = normal(4, 4, seed=1)
    near, far = PlaneRotations("neighbours")(gain).values, PlaneRotations()(gain).values
    assert near[0, 2] == near[0, 3] == far[0, 1] == far[0, 3] == 0
    assert near[0, 1] != 0
    assert far[0, 2] != 0


def test_complex_factors_of_neighbours_and_where_no_norms_are_known() -> None:
    b, s = units(4, 1)
    turn = PlaneRotations("neighbours")(normal(4, 4, seed=3)).values
    planted = Linear(turn * torch.tensor([0.5, 0.5, 3.0, 3.0]).double())
    sides = Sides.between((planted.carry(b), b), (planted.carry_readers(s), s))
    assert torch.allclose(ComplexFactors("neighbours")(sides).matrix(), planted.matrix(), atol=1e-6)
    gain = normal(4, 4, seed=1)
    assert torch.allclose(ComplexFactors()(gain).matrix(), PlaneRotations()(gain).values)


def test_rotations_are_rotations() -> None:
    assert isinstance(Procrustes()(normal(5, 5, seed=1)), Rotation)
    found = Procrustes(fix_mean=True)(normal(5, 5, seed=1))
    assert torch.allclose(found.values.sum(1), torch.ones(5).double(), atol=1e-14)
