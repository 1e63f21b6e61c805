"""Balancing: both factors of a circuit with the same inner products, and the circuit unchanged."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from isthmus.errors import DataError, ShapeError
from isthmus.transport import balancing


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("size", [1, 2, 6])
def test_balanced_factors_have_the_singular_values_of_the_circuit(size: int) -> None:
    held, read = normal(size, 10, seed=1), 3 * normal(size, 8, seed=2)
    found = balancing(held @ held.T, read @ read.T)
    held_there, read_there = found @ held, torch.linalg.inv(found).T @ read
    gram = held_there @ held_there.T
    assert torch.allclose(gram, read_there @ read_there.T, rtol=1e-9, atol=1e-9)
    sizes = torch.linalg.svdvals(read.T @ held)[:size]
    assert torch.allclose(torch.linalg.eigvalsh(gram).flip(0), sizes, rtol=1e-9)
    assert torch.allclose(read_there.T @ held_there, read.T @ held, atol=1e-9)


def test_no_other_map_makes_the_factors_smaller() -> None:
    held, read = normal(4, 9, seed=3), normal(4, 9, seed=4)
    found = balancing(held @ held.T, read @ read.T)

    def size(matrix: Tensor) -> float:
        return float((matrix @ held).square().sum() + (torch.linalg.inv(matrix).T @ read).square().sum())

    for seed in range(30):
        assert size((torch.eye(4).double() + 0.1 * normal(4, 4, seed=seed)) @ found) > size(found)


def test_vanishing_directions_are_balanced_within_the_bound() -> None:
    held, read = normal(4, 9, seed=3), normal(4, 9, seed=4)
    held[1] = 0.0
    found = balancing(held @ held.T, read @ read.T, most=5.0)
    assert float(torch.linalg.cond(found)) <= 25.0 * (1 + 1e-9)
    nothing = torch.zeros(4, 4)
    assert torch.equal(balancing(held @ held.T, nothing), torch.eye(4, dtype=torch.float64))
    assert torch.equal(balancing(nothing, held @ held.T), torch.eye(4, dtype=torch.float64))
    assert balancing(torch.zeros(0, 0), torch.zeros(0, 0)).shape == (0, 0)


def test_bad_products_are_refused() -> None:
    eye = torch.eye(3)
    with pytest.raises(
        ShapeError, match="expected inner products of the same units with one another, found shapes"
    ):
        balancing(eye, torch.eye(2))
    with pytest.raises(ShapeError, match="expected inner products of the same units"):
        balancing(eye[:2], eye[:2])
    with pytest.raises(DataError, match="balancing: readers: 3 of 9 entries are NaN or infinite"):
        balancing(eye, torch.diag(torch.full((3,), math.nan)))
    with pytest.raises(DataError, match=r"expected a largest factor of at least 1, found 0\.5"):
        balancing(eye, eye, most=0.5)
