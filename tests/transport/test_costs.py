from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest
import torch

from isthmus.errors import DataError, ShapeError
from isthmus.transport import ground_cost, w2_matching


def clouds(seed: int, units: int, features: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.standard_normal((units, features)), rng.standard_normal((units, features))


def test_reference_values():
    # Theory, section 1.1.
    rng = np.random.default_rng(123)
    x, y = rng.standard_normal((64, 5)), rng.standard_normal((64, 5))
    assert w2_matching(x, y)[0] == pytest.approx(2.317291840861777, rel=1e-13)
    assert w2_matching(x, y, np.diag(1 / np.arange(1, 6)))[0] == pytest.approx(0.9574506045487821, rel=1e-13)


@pytest.mark.parametrize("units", [1, 2, 6])
@pytest.mark.parametrize("metric", [False, True])
def test_matching_equals_brute_force(units, metric):
    a, b = clouds(units, units, 3)
    root = np.random.default_rng(9).standard_normal((2, 3))
    sigma = root.T @ root if metric else None  # rank 2: singular on purpose
    differences = a[:, None] - b[None]
    costs = np.einsum("ijk,kl,ijl->ij", differences, np.eye(3) if sigma is None else sigma, differences)
    best = min(costs[range(units), list(p)].mean() for p in permutations(range(units)))
    value, permutation = w2_matching(a, b, sigma)
    assert value == pytest.approx(best, rel=1e-10, abs=1e-14)
    assert costs[range(units), permutation].mean() == pytest.approx(best, rel=1e-10, abs=1e-14)
    np.testing.assert_allclose(ground_cost(a, b, sigma).numpy(), costs, rtol=1e-10, atol=1e-13)


def test_matching_equals_optimal_transport():
    ot = pytest.importorskip("ot")
    for seed in range(5):
        a, b = clouds(seed, 20, 4)
        expected = ot.emd2(np.full(20, 1 / 20), np.full(20, 1 / 20), ot.dist(a, b))
        assert w2_matching(a, b)[0] == pytest.approx(expected, rel=1e-10)


def test_b_moves_towards_a():
    a = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    cycle = torch.tensor([2, 0, 1, 3, 4])
    value, permutation = w2_matching(a[cycle], a)
    assert value == 0.0
    assert permutation.tolist() == cycle.tolist()
    assert torch.equal(a[permutation], a[cycle])


@pytest.mark.parametrize("samples", [3, 40])
def test_features_stand_for_their_second_moment(samples):
    a, b = clouds(3, 12, 8)
    h = np.random.default_rng(4).standard_normal((samples, 8)) + 1.0
    value, permutation = w2_matching(a, b, features=h)
    assert value == pytest.approx(w2_matching(a, b, h.T @ h / samples)[0], rel=1e-12)
    # One-layer identity, Theory, section 1.3.
    outputs = ((h @ a.T - h @ b[permutation.numpy()].T) ** 2).mean()
    assert value == pytest.approx(outputs, rel=1e-12)


def test_large_common_mean_does_not_cancel():
    a, b = clouds(5, 10, 3)
    assert w2_matching(a + 1e6, b + 1e6)[0] == pytest.approx(w2_matching(a, b)[0], rel=1e-8)


def test_weighted_permutation_is_best_in_its_metric():
    a, b = clouds(6, 30, 6)
    sigma = np.diag([9.0, 1.0, 0.1, 0.1, 0.0, 0.0])
    weighted, plain = w2_matching(a, b, sigma), w2_matching(a, b)
    cost = ground_cost(a, b, sigma)
    assert weighted[0] <= float(cost[torch.arange(30), plain[1]].mean()) + 1e-15
    scaled = w2_matching(a, b, 7.0 * sigma)
    assert scaled[0] == pytest.approx(7.0 * weighted[0], rel=1e-12)
    assert torch.equal(scaled[1], weighted[1])


def test_empty_clouds_have_an_empty_cost():
    assert ground_cost(np.zeros((0, 3)), np.zeros((0, 3))).shape == (0, 0)
    assert ground_cost(np.zeros((0, 3)), np.zeros((2, 3))).shape == (0, 2)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((np.zeros((2, 3)), np.zeros((2, 4))), ShapeError, "cloud a has 3 features, cloud b has 4"),
        ((np.zeros((2, 3)), np.zeros((3, 3))), ShapeError, "found 2 and 3"),
        ((np.zeros((0, 3)), np.zeros((0, 3))), ShapeError, "at least 1"),
        ((np.zeros((2, 3)), np.zeros((2, 3)), np.eye(4)), ShapeError, r"expected a metric of shape \(3, 3\)"),
        ((np.zeros((2, 2)), np.zeros((2, 2)), np.triu(np.ones((2, 2)))), DataError, "not symmetric"),
        (
            (np.full((2, 3), np.inf), np.zeros((2, 3))),
            DataError,
            "cloud a: 6 of 6 entries are NaN or infinite",
        ),
        ((np.zeros((2, 3)), np.zeros((2, 3)), np.eye(3), np.eye(3)), DataError, "found both"),
        ((np.zeros((2, 3)), np.zeros((2, 3)), None, np.eye(2)), ShapeError, "expected features of shape"),
        ((np.zeros((2, 3)), np.zeros((2, 3)), None, np.zeros((0, 3))), ShapeError, "samples >= 1"),
    ],
)
def test_bad_clouds(arguments, error, message):
    with pytest.raises(error, match=message):
        w2_matching(*arguments)
