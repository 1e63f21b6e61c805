"""Factors of units: the best of all, within their bounds, whatever the norms."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from isthmus.transport import gain_of_factors, least_squares_factors, norm_factors

GRID = torch.logspace(-4, 4, 8001, dtype=torch.float64)


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def best_on_grid(
    p: Tensor, q: Tensor, n: Tensor, m: Tensor, most: float = 1e4, signed: bool = False
) -> Tensor:
    inside = GRID[(most >= GRID) & (1 / most <= GRID)]
    factors = torch.cat([inside, -inside]) if signed else inside
    shaped = factors.reshape(-1, 1, 1)
    return gain_of_factors(shaped, p, q, (n, m)).amax(0)


def cases(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return inner products of units whose norms differ by orders of magnitude."""
    spread = (2 * normal(4, 9, seed=seed + 100)).exp()
    a, b, r, s = (normal(9, 3, seed=4 * seed + k) * spread[k][:, None] for k in range(4))
    return a @ b.T, r @ s.T, b.square().sum(1), s.square().sum(1)


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("most", [1e4, 3.0, 1.0])
def test_no_other_factor_within_the_bounds_is_better(most: float, signed: bool) -> None:
    for seed in range(12):
        p, q, n, m = cases(seed)
        found = least_squares_factors(p, q, (n, m), signed=signed, most=most)
        assert bool((found.abs() <= most * (1 + 1e-12)).all())
        assert bool((found.abs() >= (1 - 1e-12) / most).all())
        assert signed or bool((found > 0).all())
        best = gain_of_factors(found, p, q, (n, m))
        scale = (n + m).expand_as(best) + p.abs() + q.abs()
        assert bool((best >= best_on_grid(p, q, n, m, most, signed) - 1e-12 * scale).all())


def test_two_valleys_are_both_looked_at() -> None:
    """B's unit is small on both sides: growing either one is a valley, and the deeper one is taken."""
    n = m = torch.tensor([1.0], dtype=torch.float64)
    for p, q, expected in ((10.0, 9.0, 10.0), (9.0, 10.0, 0.1)):
        found = least_squares_factors(torch.tensor([[p]]).double(), torch.tensor([[q]]).double(), (n, m))
        assert float(found) == pytest.approx(expected, rel=0.02)
    bounded = least_squares_factors(
        torch.tensor([[10.0]]).double(),
        torch.tensor([[9.9]]).double(),
        (n, torch.tensor([50.0]).double()),
        most=2.0,
    )
    grid = torch.linspace(0.5, 2.0, 4001, dtype=torch.float64)
    value = gain_of_factors(
        grid, torch.tensor(10.0).double(), torch.tensor(9.9).double(), (n, torch.tensor(50.0).double())
    )
    assert float(bounded) == pytest.approx(float(grid[value.argmax()]), abs=1e-3)


def test_derivatives_vanish_at_inner_factors() -> None:
    p, q, n, m = cases(3)
    found = least_squares_factors(p, q, (n, m))
    slope = p - q / found**2 - n * found + m / found**3
    scale = p.abs() + q.abs() / found**2 + n * found + m / found**3
    assert float((slope / scale).abs().max()) < 1e-9


def test_ties_are_settled_alike() -> None:
    one = torch.ones(1, dtype=torch.float64)
    for both in (4.0, 2.0, 8.0, 1000.0):  # two: the valley is flat to fourth order
        p = torch.full((1, 1), both, dtype=torch.float64)
        found = least_squares_factors(p, p, (one, one))
        assert float(found) >= 1.0
        assert float(gain_of_factors(found, p, p, (one, one))) >= float(best_on_grid(p, p, one, one)) - 1e-12
    zero = torch.zeros(1, 1, dtype=torch.float64)
    assert float(least_squares_factors(zero, zero, (one, one), signed=True)) == 1.0
    assert float(least_squares_factors(zero, zero, (one, 16 * one))) == pytest.approx(2.0)


def test_one_side_alone_is_a_regression() -> None:
    zero = torch.zeros(1, dtype=torch.float64)
    p, nothing = torch.tensor([[6.0, -6.0]]).double(), torch.zeros(1, 2).double()
    n = torch.tensor([2.0, 2.0]).double()
    held = least_squares_factors(p, nothing, (n, zero.expand(2)), most=100.0)
    assert held.tolist() == [[3.0, 0.01]]
    assert least_squares_factors(p, nothing, (n, zero.expand(2)), signed=True, most=100.0).tolist() == [
        [3.0, -3.0]
    ]
    read = least_squares_factors(nothing, p, (zero.expand(2), n), most=100.0)
    assert read[0].tolist() == pytest.approx([1 / 3, 100.0])
    neither = least_squares_factors(nothing, nothing, (zero.expand(2), zero.expand(2)))
    assert neither.tolist() == [[1.0, 1.0]]


def test_norms_meet_in_the_middle_of_their_logarithms() -> None:
    a, r, b, s = (normal(5, seed=k).exp() for k in range(4))
    found = norm_factors((a, r), (b, s))
    for i in range(5):
        for j in range(5):
            grid = GRID
            gap = (a[i].sqrt().log() - (grid * b[j].sqrt()).log()) ** 2
            gap = gap + (r[i].sqrt().log() - (s[j].sqrt() / grid).log()) ** 2
            assert float(found[i, j]) == pytest.approx(float(grid[gap.argmin()]), rel=3e-3)


def test_a_missing_side_leaves_norms_to_the_other() -> None:
    zero, two, one = (torch.tensor([x]).double() for x in (0.0, 4.0, 1.0))
    assert float(norm_factors((two, zero), (one, one))) == pytest.approx(2.0)
    assert float(norm_factors((zero, two), (one, one))) == pytest.approx(0.5)
    assert float(norm_factors((zero, two), (one, zero))) == 1.0
    assert float(norm_factors((two, one), (one, one), most=1.1)) == pytest.approx(1.1)
    assert norm_factors((two[:0], two[:0]), (one[:0], one[:0])).shape == (0, 0)


def test_no_gap_between_tiny_and_huge_norms() -> None:
    for size in (1e-30, 1e30):
        p = torch.tensor([[size]]).double()
        norm = torch.tensor([size]).double()
        assert float(least_squares_factors(p, p, (norm, norm))) == pytest.approx(1.0)
    assert math.isfinite(float(least_squares_factors(p, p, (norm, 1e-60 * norm))))
