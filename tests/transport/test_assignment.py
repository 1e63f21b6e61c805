"""The contract of ``assign``: shape, dtype, range, no repeats, optimal value."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest
import torch

from isthmus.errors import DataError, ShapeError
from isthmus.transport import assign


def brute_force(matrix: np.ndarray, maximize: bool) -> float:
    tall = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    sums = [
        sum(tall[i, j] for i, j in enumerate(chosen))
        for chosen in permutations(range(tall.shape[1]), tall.shape[0])
    ]
    return max(sums) if maximize else min(sums)


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize(
    "shape", [(0, 0), (0, 3), (3, 0), (1, 1), (1, 2), (2, 1), (2, 2), (3, 5), (5, 3), (6, 6)]
)
def test_assignment_is_the_best_of_all(shape, maximize):
    matrix = np.random.default_rng(0).standard_normal(shape)
    found = assign(matrix, maximize=maximize)
    used = found.columns[found.columns >= 0]
    assert found.columns.dtype == torch.int64
    assert found.columns.shape == (shape[0],)
    assert len(used) == min(shape) == len(set(used.tolist()))
    rows = torch.nonzero(found.columns >= 0).flatten()
    assert found.value == pytest.approx(matrix[rows, used].sum(), abs=1e-12)
    assert found.value == pytest.approx(brute_force(matrix, maximize), abs=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.int64, torch.bool])
def test_planted_cycle_has_the_direction_of_the_convention(dtype):
    # Row i of A sits on column p[i] of B, so that b[columns] lies on a. A 3-cycle tells p from its inverse.
    gain = torch.eye(3)[:, torch.tensor([2, 0, 1])].to(dtype)
    before = gain.clone()
    found = assign(gain, maximize=True)
    assert found.columns.tolist() == [1, 2, 0]
    assert found.value == 3.0
    assert torch.equal(gain, before)


def test_infinite_entries_forbid():
    cost = np.array([[0.0, np.inf], [5.0, 1.0]])
    assert assign(cost).columns.tolist() == [0, 1]
    assert assign(-cost, maximize=True).columns.tolist() == [0, 1]


@pytest.mark.parametrize(
    ("matrix", "error", "message"),
    [
        (np.zeros(3), ShapeError, "expected 2 axes"),
        (np.array([[np.nan, 1.0]]), DataError, "1 of 2 entries are NaN"),
        (np.array([[1j]]), DataError, "expected real entries"),
        (np.array([[-np.inf, 1.0]]), DataError, "chosen at any price"),
        (np.full((2, 2), np.inf), DataError, "uses a forbidden"),
    ],
)
def test_bad_matrices(matrix, error, message):
    with pytest.raises(error, match=message):
        assign(matrix)


def test_infinite_gain_is_refused():
    with pytest.raises(DataError, match="Forbid a pair with -inf when maximising"):
        assign(np.array([[np.inf]]), maximize=True)


@pytest.mark.parametrize("shape", [(6, 6), (4, 7), (7, 4)])
def test_without_a_proof_the_pairs_are_the_same(shape):
    gains = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    plain, proven = assign(gains, maximize=True, proof=False), assign(gains, maximize=True)
    assert torch.equal(plain.columns, proven.columns)
    assert plain.value == proven.value
    assert proven.gap == 0.0
    assert np.isnan(plain.gap)
    assert bool(plain.row_duals.isnan().all())
    forbidden = torch.full(shape, -torch.inf)
    with pytest.raises(DataError, match="every complete pairing uses a forbidden"):
        assign(forbidden, maximize=True, proof=False)
    with pytest.raises(DataError, match="are NaN"):
        assign(torch.full(shape, torch.nan), proof=False)
