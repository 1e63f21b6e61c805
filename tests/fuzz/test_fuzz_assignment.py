"""Assignments of matrices nobody would choose, against exact optima, the proof that is returned, and each other.

Penalties take part in the optimum by their number first and the other entries second. So the optimum is known exactly
from the same problem with a penalty of a size that SciPy does not round, and is priced with the entries as they are.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment

from isthmus.transport import Assigned, _assignment, assign

_MILD = 1e6
"""A penalty above all sums of other entries, and small enough that float64 sums of both are precise."""


@dataclass(frozen=True)
class Problem:
    """A matrix to minimise and one of mild penalties with the same optimal pairings."""

    matrix: np.ndarray
    mild: np.ndarray


def entries(rng: np.random.Generator, rows: int, columns: int) -> np.ndarray:
    kind = rng.integers(8)
    if kind == 0:
        return rng.integers(-9, 10, (rows, columns)).astype(float)
    if kind == 1:
        return rng.standard_normal((rows, columns))
    if kind == 2:
        return rng.standard_normal((rows, 3)) @ rng.standard_normal((3, columns))
    if kind == 3:
        return rng.integers(0, 2, (rows, columns)).astype(float)
    if kind == 4:  # duplicated rows and columns
        base = rng.standard_normal((rows, columns))
        return base[rng.integers(0, (rows + 2) // 3, rows)][:, rng.integers(0, (columns + 2) // 3, columns)]
    if kind == 5:  # dead units
        base = rng.standard_normal((rows, columns))
        return base * (rng.random((rows, 1)) < 0.7) * (rng.random((1, columns)) < 0.7)
    if kind == 6:  # planted, with differences far below the spread
        return 1e-9 * rng.random((rows, columns)) + (rng.permutation(rows)[:, None] != np.arange(columns))
    return np.square(rng.random((rows, 1, 2)) - rng.random((1, columns, 2))).sum(2)


def problem(rng: np.random.Generator, largest: int) -> Problem:
    rows = int(rng.integers(0, largest))
    columns = rows if rng.random() < 0.6 else int(rng.integers(0, largest))
    base = entries(rng, rows, columns)
    way = rng.integers(5)
    if way == 0:
        penalty = 10.0 ** rng.choice([6, 9, 12, 15, 16, 18, 22, 30, 100, 200, 280])
        penalised = rng.random((rows, columns)) < rng.choice([0.02, 0.1, 0.3, 0.5, 0.8, 0.95])
        if rng.random() < 0.2:
            penalised[:, : columns // 3] = True
        return Problem(np.where(penalised, penalty, base), np.where(penalised, _MILD, base))
    if way == 1:  # another scale, down to subnormal numbers, by a power of two: the same pairings
        scale = 2.0 ** int(rng.choice([-1060, -1000, -300, 60, 300, 900]))
        whole = np.round(base * 64)
        return Problem(whole * scale, whole)
    if way == 2:  # rows and columns of other levels; those of the longer side change the optimum
        offsets = 2.0 ** rng.integers(-10, 40, (rows, 1)) * rng.integers(-3, 4, (rows, 1))
        whole = np.round(base * 64)
        return Problem(whole + offsets, whole if rows <= columns else whole + offsets)
    if way == 3:  # rows of other scales
        return Problem(*[np.round(base * 64) * 2.0 ** rng.integers(-20, 20, (rows, 1))] * 2)
    return Problem(base, base)


def exact(matrix: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> Fraction:
    return sum((Fraction(float(x)) for x in matrix[rows, columns]), Fraction(0))


def check(given: Problem, found: Assigned, maximize: bool) -> None:
    """Hold a result to the exact optimum and to its own proof, in rational arithmetic."""
    sign = -1 if maximize else 1
    columns = found.columns.numpy()
    rows = np.flatnonzero(columns >= 0)
    columns = columns[rows]
    assert len(rows) == min(given.matrix.shape) == len(set(columns.tolist()))
    value = exact(given.matrix, rows, columns)
    assert found.value == sign * float(value)
    best = exact(given.matrix, *linear_sum_assignment(given.mild))
    size = sum((abs(Fraction(float(x))) for x in given.matrix[rows, columns]), Fraction(0))
    excess = value - best
    assert excess <= size / 10**13
    assert excess <= Fraction(found.gap) + size / 10**13
    # The duals as returned: feasible without any rounding, and, for a gap of zero, not loose.
    u, v = sign * found.row_duals.numpy(), sign * found.column_duals.numpy()
    reduced = given.matrix - v
    slack = reduced - u[:, None]
    close = slack <= 4 * np.finfo(float).eps * (abs(u)[:, None] + abs(v) + abs(given.matrix))
    places = np.argwhere(close)  # all others are positive beyond any rounding
    for i, j in places[np.argsort(slack[close], kind="stable")[:60]]:
        assert Fraction(float(u[i])) + Fraction(float(v[j])) <= Fraction(float(given.matrix[i, j]))
    bound = sum((Fraction(float(x)) for x in (*u, *v)), Fraction(0))
    if found.gap == 0.0:
        assert value - bound <= size / 10**9
    else:
        assert abs(value - bound - Fraction(found.gap)) <= Fraction(found.gap) / 10**6 + size / 10**13


def misleading(rng: np.random.Generator, shape: tuple[int, int]) -> Assigned:
    """Return a warm start from another problem, scale or planet."""
    kind = rng.integers(4)
    rows, columns = shape
    if kind == 0:
        return assign(rng.standard_normal(shape) * 10.0 ** rng.integers(-12, 25))
    scale = 10.0 ** rng.integers(-12, 25)
    pairs = torch.from_numpy(rng.integers(-1, max(columns, 1), rows))
    pairs = pairs.clamp(max=columns - 1)
    if kind == 1:  # a permutation, or as much of one as there is
        pairs = torch.from_numpy(rng.permutation(max(rows, columns))[:rows])
        pairs = torch.where(pairs < columns, pairs, -1)
    duals = [torch.from_numpy(scale * rng.standard_normal(n)) for n in shape]
    if kind == 2:
        duals = [d + scale for d in duals]
    return Assigned(pairs, 0.0, duals[0], duals[1], 0.0)


def trial(seed: int, largest: int) -> None:
    rng = np.random.default_rng(seed)
    given = problem(rng, largest)
    maximize = bool(rng.random() < 0.5)
    matrix = -given.matrix if maximize else given.matrix
    layout = rng.integers(4)
    if layout == 1:
        matrix = np.asfortranarray(matrix)
    if layout == 2:
        matrix = np.repeat(matrix, 2, 1)[:, ::2]
    if layout == 3:
        matrix = matrix[::-1][::-1]
    warm = misleading(rng, matrix.shape) if rng.random() < 0.4 else None
    before = matrix.copy()
    check(given, assign(matrix, maximize=maximize, warm=warm), maximize)
    assert np.array_equal(matrix, before)


@pytest.fixture(params=["as installed", "compiled", "scipy"])
def engine(request, monkeypatch) -> str:
    if request.param == "compiled":
        pytest.importorskip("numba")
        monkeypatch.setattr(_assignment, "_LARGE", 0)
    if request.param == "scipy":
        monkeypatch.setattr(_assignment, "_compiled", lambda: None)
    return request.param


@pytest.mark.parametrize("block", range(4))
def test_unlikely_matrices(block, engine):
    for seed in range(100 * block, 100 * block + 100):
        trial(seed, 50)


@pytest.mark.slow
@pytest.mark.parametrize("block", range(60))
def test_many_unlikely_matrices(block, engine):
    for seed in range(10_000 + 200 * block, 10_200 + 200 * block):
        trial(seed, 60 if block < 50 else 330)


@pytest.mark.parametrize("seed", range(6))
def test_small_problems_against_every_pairing(seed, engine):
    from itertools import permutations

    rng = np.random.default_rng(seed)
    for _ in range(20):
        rows, columns = sorted(rng.integers(1, 6, 2).tolist())
        powers = rng.integers(-40, 60, (rows, columns))
        matrix = rng.integers(-9, 10, (rows, columns)) * 2.0 ** np.where(rng.random() < 0.5, powers, 0)
        least = min(exact(matrix, np.arange(rows), np.array(p)) for p in permutations(range(columns), rows))
        found = assign(matrix)
        assert abs(Fraction(found.value) - least) <= Fraction(math.ulp(found.value)) * 64


@pytest.mark.parametrize(
    "dtype",
    [
        torch.float16,
        torch.bfloat16,
        torch.float32,
        torch.bool,
        torch.uint8,
        torch.int16,
        torch.int32,
        torch.int64,
    ],
)
def test_dtypes_are_exact(dtype, engine):
    generator = torch.Generator().manual_seed(0)
    for size in (0, 1, 2, 33):
        raw = torch.randn(size, size, generator=generator) * 3
        matrix = (raw > 0) if dtype == torch.bool else raw.abs().to(dtype)
        wide = matrix.double().numpy()
        check(Problem(wide, wide), assign(matrix), False)
