"""What the tests of SciPy, lapx, optax and POT ask of their exact solvers, asked of ours with matrices of our own."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment
from scipy.sparse import csr_array
from scipy.sparse.csgraph import min_weight_full_bipartite_matching

from isthmus.errors import DataError, ShapeError
from isthmus.transport import _assignment, assign, ground_cost

INF = np.inf


@pytest.fixture(params=["compiled", "scipy"], autouse=True)
def engine(request, monkeypatch) -> str:
    if request.param == "compiled":
        pytest.importorskip("numba")
        monkeypatch.setattr(_assignment, "_LARGE", 0)
    else:
        monkeypatch.setattr(_assignment, "_compiled", lambda: None)
    return request.param


# SciPy: known answers, square and not, with both signs; each solved by hand here.
KNOWN = [
    ([[250, 90, 240], [260, 255, 400], [180, 140, 175]], [1, 0, 2], 90 + 260 + 175),
    ([[250, 90, 240, 3], [260, 255, 400, 5], [180, 140, 175, 4]], [1, 3, 2], 90 + 5 + 175),
    ([[7, 7, 9], [3, 6, 6], [6, 4, 6]], None, 9 + 3 + 4),
    ([[1, 4, 6], [6, 9, 11], [0, 4, 8]], None, 6 + 9 + 0),
    ([[13, 5, 10], [17, 16, 15], [20, 14, 18]], None, 5 + 17 + 18),
    ([[9, 5, 13, 0], [16, 17, 16, 14], [13, 16, 14, 7], [10, 12, 10, 3]], None, 5 + 16 + 13 + 3),
    ([[], []], [-1, -1], 0),
]


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("matrix", "columns", "value"), KNOWN)
def test_known_answers(matrix, columns, value, transposed, sign):
    costs = sign * np.array(matrix, dtype=float).reshape(len(matrix), -1)
    costs = costs.T if transposed else costs
    found = assign(costs, maximize=sign < 0)
    assert found.value == sign * value
    assert found.gap == 0.0
    if columns is not None and not transposed:
        assert found.columns.tolist() == columns


def test_a_forbidden_square_problem_with_one_answer():
    costs = np.array(
        [
            [11.0, 20.0, INF, INF, INF],
            [12.0, INF, 12.0, INF, INF],
            [INF, 11.0, 10.0, 15.0, 9.0],
            [15.0, INF, INF, 22.0, INF],
            [13.0, INF, INF, INF, 15.0],
        ]
    )
    pairings = [p for p in itertools.permutations(range(5)) if np.isfinite(costs[np.arange(5), p]).all()]
    best = min(pairings, key=lambda p: costs[np.arange(5), p].sum())
    found = assign(costs)
    assert found.columns.tolist() == list(best)
    assert found.value == costs[np.arange(5), best].sum()


@pytest.mark.parametrize("kind", ["two blocks", "a row", "a column", "everything", "crowding"])
def test_problems_without_an_answer_end(kind):
    costs = np.zeros((5, 5))
    if kind == "two blocks":  # two rows share three columns, three share two
        costs[np.ix_([0, 4], [3, 4])] = INF
        costs[np.ix_([1, 2, 3], [0, 1, 2])] = INF
    if kind == "a row":
        costs[2] = INF
    if kind == "a column":
        costs[:, 1] = INF
    if kind == "everything":
        costs[:] = INF
    if kind == "crowding":
        costs[:3, 2:] = INF
    with pytest.raises(DataError, match="uses a forbidden"):
        assign(costs)
    with pytest.raises(DataError, match="uses a forbidden"):
        assign(costs + 19.0 * np.arange(25).reshape(5, 5))


def test_sparse_problems_agree_with_a_sparse_solver():
    rng = np.random.default_rng(3)
    answers = 0
    for _ in range(40):
        held = rng.random((60, 60)) < 0.09
        dense = np.where(held, rng.integers(1, 100, held.shape), INF)
        sparse = csr_array(np.where(held, dense, 0.0))
        try:
            value = dense[min_weight_full_bipartite_matching(sparse)].sum()
        except ValueError:
            with pytest.raises(DataError, match="uses a forbidden"):
                assign(dense)
            continue
        answers += 1
        assert assign(dense).value == value
    assert 5 < answers < 40


@pytest.mark.parametrize("shape", [(3, 3), (3, 5), (5, 3)], ids=str)
@pytest.mark.parametrize("dtype", [np.int32, np.int64, np.float32, np.float64])
@pytest.mark.parametrize(("low", "high"), [(1e9, 2e9), (5e8, 2e9), (-1e9, 0.0)])
def test_all_costs_large(low, high, dtype, shape):
    # lapx: kernels with a fixed "large" number take such costs for forbidden pairs.
    costs = np.full(shape, high, dtype)
    k = min(shape)
    rows, columns = np.roll(np.arange(shape[0]), 1)[:k], np.roll(np.arange(shape[1]), -1)[:k]
    costs[rows, columns] = low
    found = assign(costs)
    assert found.value == k * low
    assert found.columns[rows].tolist() == columns.tolist()


@pytest.mark.parametrize("shape", [(64, 64), (48, 64), (64, 48)], ids=str)
def test_integers_times_a_power_of_two(shape):
    costs = np.random.default_rng(5).integers(-16, 17, shape) * 2.0**24
    assert assign(costs).value == costs[linear_sum_assignment(costs)].sum()


@pytest.mark.parametrize("offset", [0.0, -30.0, 30.0])
def test_rectangles_need_no_padding(offset):
    # Padding with zeros or the largest cost goes wrong for negative or forbidden entries.
    costs = np.array([[3.0, 5.0, 7.0, 9.0], [2.0, 3.0, 5.0, 9.0]]) + offset
    assert assign(costs).value == 6.0 + 2 * offset
    assert assign(costs.T).columns.tolist() == [0, 1, -1, -1]
    forbidden = np.array([[INF, 12.0, 9.0], [9.0, INF, 8.0]]) + offset
    assert assign(forbidden).value == 18.0 + 2 * offset
    assert assign(forbidden).columns.tolist() == [2, 0]


def test_near_ties_end():
    # Rows that are alike but for the last digits made a reduction loop for ever: a tall problem, mostly at a penalty.
    rng = np.random.default_rng(11)
    step = rng.random(3)
    costs = np.full((7, 3), 1000.0)
    for row in (0, 1, 5, 6):
        costs[row, :2] = step[:2] + 0.1 * row
    costs[2, 1:] = step[1:] + 0.2
    costs += 1e-17 * rng.standard_normal(costs.shape)
    found = assign(costs)
    assert found.value == pytest.approx(costs[linear_sum_assignment(costs)].sum(), abs=1e-12)


@pytest.mark.parametrize("penalty", [2**31 - 1, 2**53])
def test_the_largest_integer_as_penalty(penalty):
    rng = np.random.default_rng(7)
    costs = rng.integers(1, 1000, (80, 80))
    costs[rng.random((80, 80)) < 0.7] = penalty
    np.fill_diagonal(costs, 999)
    found = assign(costs)
    wide = costs.astype(float)
    assert found.value == wide[linear_sum_assignment(np.minimum(wide, 1e6))].sum()
    assert found.gap == 0.0


@pytest.mark.parametrize("rows", [0, 1, 2, 4, 8, 16])
@pytest.mark.parametrize("columns", [0, 1, 2, 4, 8, 16])
def test_the_shape_of_an_answer(rows, columns):
    # optax: its grid of shapes, singly and in batches
    costs = torch.randn(3, rows, columns, generator=torch.Generator().manual_seed(0))
    found = assign(costs)
    assert found.columns.shape == (3, rows)
    assert found.columns.dtype == torch.int64
    total = 0.0
    for k in range(3):
        used = found.columns[k][found.columns[k] >= 0]
        assert len(used) == min(rows, columns) == len(used.unique())
        total += float(costs[k].double().numpy()[linear_sum_assignment(costs[k].double().numpy())].sum())
    assert found.value == pytest.approx(total, abs=1e-9)


@pytest.mark.parametrize("shape", [(), (3,), (1, 2, 2, 2)])
def test_wrong_numbers_of_axes(shape):
    with pytest.raises(ShapeError, match="expected 2 axes"):
        assign(np.zeros(shape))


def test_one_bad_matrix_in_a_batch():
    good = np.array([[[0.0, 4.0], [4.0, 1.0]], [[4.0, 2.0], [0.0, 4.0]]])
    bad = good.copy()
    bad[1, :, 1] = INF
    with pytest.raises(DataError, match="uses a forbidden"):
        assign(bad)
    assert assign(good).value == 3.0


def test_transport_between_equal_numbers_of_points_is_an_assignment():
    # POT: on a line the optimal plan is the sorted one; primal, dual and the mirrored problem agree.
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((70, 1)), 1.0 + 2.0 * rng.standard_normal((70, 1))
    costs = ground_cost(torch.from_numpy(x), torch.from_numpy(y)).numpy()
    found, mirrored = assign(costs), assign(costs.T)
    sorted_cost = float(np.square(np.sort(x, 0) - np.sort(y, 0)).sum())
    assert found.value == pytest.approx(sorted_cost, rel=1e-12)
    assert mirrored.value == pytest.approx(found.value, rel=1e-14)
    assert float(found.row_duals.sum() + found.column_duals.sum()) == pytest.approx(found.value, rel=1e-12)
    reduced = costs - found.row_duals.numpy()[:, None] - found.column_duals.numpy()
    assert np.abs(reduced[np.arange(70), found.columns]).max() < 1e-12


def test_transport_of_points_onto_themselves_is_free():
    points = torch.randn(60, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = assign(torch.cdist(points, points))
    assert found.value == pytest.approx(0.0, abs=1e-6)
    order = torch.roll(torch.arange(60), 1)
    shifted = (points[:, None] - points[order]).square().sum(-1)
    assert assign(shifted).columns.tolist() == torch.argsort(order).tolist()


def test_transport_of_a_shifted_cloud_costs_the_shift():
    # Every plan of squared distances between x and x + s costs |s|^2 at least, and the identity reaches it.
    points = torch.randn(50, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    shift = torch.tensor([3.0, -4.0], dtype=torch.float64)
    found = assign(ground_cost(points, points + shift))
    assert found.value / 50 == pytest.approx(25.0, rel=1e-12)
    assert found.columns.tolist() == list(range(50))
