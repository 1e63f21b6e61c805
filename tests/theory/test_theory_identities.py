"""Permutations as optimal transport (Theory, section 1)."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest
import torch

from isthmus.errors import DataError, ShapeError
from isthmus.theory import equipartition, layer_output_error, w2_matching


def clouds(seed: int, m: int = 6, d: int = 4) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    root = rng.standard_normal((d, d))
    return rng.standard_normal((m, d)), rng.standard_normal((m, d)), root @ root.T


def test_reference_values():
    rng = np.random.default_rng(123)
    x, y = rng.standard_normal((64, 5)), rng.standard_normal((64, 5))
    assert w2_matching(x, y)[0] == pytest.approx(2.317291840861777, rel=1e-12)
    weighted = w2_matching(x, y, np.diag(1 / np.arange(1.0, 6.0)))[0]
    assert weighted == pytest.approx(0.9574506045487821, rel=1e-12)


@pytest.mark.parametrize("seed", range(4))
def test_matching_is_the_best_of_all_permutations(seed):
    a, b, sigma = clouds(seed)
    cost = [
        np.mean([(a[i] - b[p[i]]) @ sigma @ (a[i] - b[p[i]]) for i in range(6)])
        for p in permutations(range(6))
    ]
    assert w2_matching(a, b, sigma)[0] == pytest.approx(min(cost), rel=1e-10)


@pytest.mark.parametrize("m", [1, 2, 30])
def test_matching_equals_exact_transport(m):
    ot = pytest.importorskip("ot")
    a, b, sigma = clouds(7, m)
    root = np.linalg.cholesky(sigma)
    exact = ot.emd2(np.full(m, 1 / m), np.full(m, 1 / m), ot.dist(a @ root, b @ root))
    assert w2_matching(a, b, sigma)[0] == pytest.approx(float(exact), rel=1e-10)


@pytest.mark.parametrize(("copies", "targets"), [(1, 5), (2, 1), (4, 12), (3, 7)])
def test_equal_groups_are_an_optimal_transport(copies, targets):
    ot = pytest.importorskip("ot")
    rng = np.random.default_rng(copies * 10 + targets)
    atoms, goals = rng.standard_normal((copies * targets, 3)), rng.standard_normal((targets, 3))
    found = equipartition(atoms, goals)
    assert np.bincount(found.labels, minlength=targets).tolist() == [copies] * targets
    assert found.value == pytest.approx(((atoms - goals[found.labels]) ** 2).sum(1).mean(), rel=1e-12)
    sizes = np.full(len(atoms), 1 / len(atoms)), np.full(targets, 1 / targets)
    assert found.value == pytest.approx(float(ot.emd2(*sizes, ot.dist(atoms, goals))), rel=1e-10)


def test_equal_groups_in_a_metric_take_tensors():
    a, _, sigma = clouds(3, 6)
    found = equipartition(torch.from_numpy(a).float(), a[:3], torch.from_numpy(sigma))
    root = np.linalg.cholesky(sigma)
    assert found.value == pytest.approx(equipartition(a @ root, a[:3] @ root).value, rel=1e-5)


@pytest.mark.parametrize("samples", [3, 40])
def test_one_layer_identity(samples):
    rng = np.random.default_rng(samples)
    x, a, b = (rng.standard_normal(s) for s in ((samples, 5), (7, 5), (7, 5)))
    for permutation in (rng.permutation(7), np.roll(np.arange(7), 1)):
        difference = a - b[permutation]
        norm = np.trace(difference @ (x.T @ x / samples) @ difference.T) / 7
        assert layer_output_error(a, b, permutation, x) == pytest.approx(norm, rel=1e-12)
    value, best = w2_matching(a, b, features=x)
    assert layer_output_error(a, b, best, x) == pytest.approx(value, rel=1e-12)


@pytest.mark.parametrize("seed", range(5))
def test_weighted_permutation_costs_least_in_its_own_metric(seed):
    a, b, sigma = clouds(seed, 20, 6)
    weighted, plain = w2_matching(a, b, sigma), w2_matching(a, b)
    moved = a - b[plain[1].numpy()]
    assert weighted[0] <= np.trace(moved @ sigma @ moved.T) / 20 + 1e-12
    assert torch.equal(w2_matching(a, b, np.eye(6))[1], plain[1])
    assert torch.equal(w2_matching(a, b, 7.5 * sigma)[1], weighted[1])


def test_isotropy_is_the_worst_metric():
    # Theory, section 1.4: for Gaussian rows the mean cost is at most its isotropic value at equal trace.
    spectra = [np.ones(6), [3, 1, 1, 0.5, 0.3, 0.2], [5, 0.5, 0.2, 0.1, 0.1, 0.1], [6, 0, 0, 0, 0, 0]]
    draws = [np.random.default_rng(s).standard_normal((2, 64, 6)) for s in range(20)]
    means = [np.mean([w2_matching(a, b, np.diag(s))[0] for a, b in draws]) for s in spectra]
    assert means[0] > means[1] > means[2] > means[3]


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: equipartition(np.zeros((5, 2)), np.zeros((2, 2))), ShapeError, "5 atoms cannot be split"),
        (lambda: equipartition(np.zeros((0, 2)), np.zeros((1, 2))), ShapeError, "non-empty"),
        (lambda: equipartition(np.zeros(4), np.zeros((1, 2))), ShapeError, "expected 2 axes"),
        (lambda: equipartition([[np.nan]], [[1.0]]), DataError, "1 of 1 entries are NaN"),
        (lambda: equipartition(torch.ones(1, 1) * 1j, [[1.0]]), DataError, "expected real entries"),
        (
            lambda: layer_output_error(np.eye(2), np.eye(3), [0, 1], np.eye(2)),
            ShapeError,
            "two weights of one shape",
        ),
        (
            lambda: layer_output_error(np.eye(2), np.eye(2), [0, 0], np.eye(2)),
            ShapeError,
            "each of 0..1 exactly once",
        ),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()
