"""Rotations of largest gain: optimal in their class, exact in what they keep, and the same every time."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.linalg import orthogonal_procrustes

from isthmus.errors import DataError, ShapeError
from isthmus.transport import plane_rotations, procrustes


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


def haar(size: int, seed: int) -> torch.Tensor:
    return torch.linalg.qr(normal(size, size, seed=seed))[0]


def gain_of(matrix: torch.Tensor, gain: torch.Tensor) -> float:
    return float((matrix * gain).sum())


@pytest.mark.parametrize("size", [1, 2, 3, 7, 40])
def test_the_gain_is_the_sum_of_the_singular_values_and_scipy_agrees(size: int) -> None:
    gain = normal(size, size, seed=size)
    found = procrustes(gain)
    assert gain_of(found, gain) == pytest.approx(float(torch.linalg.svdvals(gain).sum()), rel=1e-12)
    a, b = normal(2 * size, size, seed=1), normal(2 * size, size, seed=2)
    expected, _ = orthogonal_procrustes(a.numpy(), b.numpy())  # |a R - b|; ours is |b - a Q^T|, so Q = R^T
    assert torch.allclose(procrustes(b.T @ a), torch.from_numpy(expected).T, atol=1e-9)


@pytest.mark.parametrize("fix_mean", [False, True])
def test_no_random_rotation_is_better(fix_mean: bool) -> None:
    gain = normal(6, 6)
    best = gain_of(procrustes(gain, fix_mean=fix_mean), gain)
    for seed in range(50):
        other = haar(6, seed)
        if fix_mean:
            basis = torch.linalg.qr(torch.cat([torch.ones(6, 1).double(), normal(6, 5, seed=seed)], 1))[0][
                :, 1:
            ]
            other = basis @ haar(5, seed) @ basis.T + 1 / 6
            assert torch.allclose(other.sum(1), torch.ones(6).double())
        assert gain_of(other, gain) <= best


@pytest.mark.parametrize("fix_mean", [False, True])
def test_no_small_turn_improves_on_it(fix_mean: bool) -> None:
    gain = normal(8, 8, seed=3)
    found = procrustes(gain, fix_mean=fix_mean)
    best = gain_of(found, gain)
    for seed in range(20):
        skew = normal(8, 8, seed=seed)
        skew = skew - skew.T
        if fix_mean:
            centre = torch.eye(8, dtype=torch.float64) - 1 / 8
            skew = centre @ skew @ centre
        for size in (1e-3, -1e-3):
            assert gain_of(torch.linalg.matrix_exp(size * skew) @ found, gain) < best


@pytest.mark.parametrize("size", [1, 2, 3, 5, 65])
def test_a_fixed_mean_is_fixed_to_rounding(size: int) -> None:
    found = procrustes(normal(size, size), fix_mean=True)
    ones = torch.ones(size, dtype=torch.float64)
    for matrix in (found, found.T):
        assert float((matrix @ ones - ones).abs().max()) < 1e-14 * size
    assert float((found @ found.T - torch.eye(size)).abs().max()) < 1e-13


@pytest.mark.parametrize("fix_mean", [False, True])
def test_a_planted_rotation_is_found(fix_mean: bool) -> None:
    units = normal(5, 40, seed=1)
    turn = procrustes(normal(5, 5, seed=2), fix_mean=fix_mean)
    found = procrustes((turn @ units) @ units.T, fix_mean=fix_mean)
    assert torch.allclose(found, turn, atol=1e-12)


def test_reflections_count() -> None:
    gain = torch.diag(torch.tensor([1.0, 1.0, -2.0]))
    assert torch.allclose(procrustes(gain), torch.diag(torch.tensor([1.0, 1.0, -1.0]).double()))
    assert float(torch.linalg.det(procrustes(gain))) == pytest.approx(-1)


def test_what_the_gain_does_not_say_stays_where_it_is() -> None:
    assert torch.equal(procrustes(torch.zeros(3, 3)), torch.eye(3, dtype=torch.float64))
    units = normal(4, 6)
    units[2:] = 0.0  # two dead units: the others are turned, these stay
    turn = torch.block_diag(haar(2, 1), torch.eye(2, dtype=torch.float64))
    found = procrustes((turn @ units) @ units.T)
    assert torch.allclose(found, turn, atol=1e-12)
    shaken = procrustes((turn @ units) @ units.T + 1e-16 * normal(4, 4, seed=9))
    assert torch.allclose(shaken, turn, atol=1e-12)


def test_of_all_best_rotations_the_nearest_to_the_identity_is_taken() -> None:
    left, right = normal(6, 3, seed=1), normal(6, 3, seed=2)
    gain = left @ right.T
    found = procrustes(gain)
    u, _, v = torch.linalg.svd(gain)
    for seed in range(30):
        inner = haar(3, seed)
        other = u[:, :3] @ v[:3] + u[:, 3:] @ inner @ v[3:]
        assert gain_of(other, gain) == pytest.approx(gain_of(found, gain), rel=1e-12)
        assert float(other.trace()) <= float(found.trace()) + 1e-12


def test_nothing_is_changed_and_no_gradients_are_needed() -> None:
    gain = torch.randn(4, 4, generator=generator(), requires_grad=True)
    before = gain.detach().clone()
    found = procrustes(gain)
    assert not found.requires_grad
    assert found.dtype == torch.float64
    assert torch.equal(gain.detach(), before)
    assert torch.equal(found, procrustes(gain.detach().numpy()))
    assert procrustes(torch.zeros(0, 0)).shape == (0, 0)
    assert procrustes(torch.zeros(0, 0), fix_mean=True).shape == (0, 0)


def test_bad_gains_are_refused() -> None:
    with pytest.raises(
        ShapeError, match=r"expected a square gain, as many units of A as of B, found shape \(2, 3\)"
    ):
        procrustes(torch.zeros(2, 3))
    with pytest.raises(DataError, match="procrustes: gain: 1 of 4 entries are NaN or infinite"):
        procrustes(torch.tensor([[1.0, math.nan], [0.0, 1.0]]))


def test_planes_turn_by_the_best_angle() -> None:
    gain = normal(4, 4)
    planes = [[0, 2], [1, 3]]
    found = plane_rotations(gain, planes)
    best = gain_of(found, gain)
    angles = np.linspace(0, 2 * math.pi, 721)
    for i, j in planes:
        values = [
            (gain[i, i] + gain[j, j]) * math.cos(t) + (gain[j, i] - gain[i, j]) * math.sin(t) for t in angles
        ]
        found_here = sum(float(found[k, m] * gain[k, m]) for k in (i, j) for m in (i, j))
        assert found_here >= max(map(float, values))
    assert best == pytest.approx(sum(float(found[k, m] * gain[k, m]) for p in planes for k in p for m in p))
    assert torch.allclose(found @ found.T, torch.eye(4, dtype=torch.float64))
    assert float(torch.linalg.det(found)) == pytest.approx(1)


def test_planted_angles_are_found_and_units_in_no_plane_stay() -> None:
    units = normal(5, 30)
    turn = plane_rotations(normal(5, 5, seed=4), [[0, 3], [4, 1]])
    assert torch.equal(turn[2], torch.eye(5, dtype=torch.float64)[2])
    assert torch.allclose(plane_rotations((turn @ units) @ units.T, [[0, 3], [4, 1]]), turn, atol=1e-12)


def test_planes_without_a_gain_stay() -> None:
    for zero in (torch.zeros(2, 2), -torch.zeros(2, 2)):
        assert torch.equal(plane_rotations(zero, [[0, 1]]), torch.eye(2, dtype=torch.float64))
    assert plane_rotations(torch.zeros(0, 0), []).shape == (0, 0)


@pytest.mark.parametrize("planes", [[[0, 0]], [[0, 1], [1, 2]], [[0, 3]], [[-1, 0]]])
def test_planes_share_no_units(planes: list[list[int]]) -> None:
    with pytest.raises(ShapeError, match="expected planes of different units below 3, found"):
        plane_rotations(torch.zeros(3, 3), planes)
