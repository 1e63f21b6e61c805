"""Lower bounds, low dimension plus noise, concentration (Theory, sections 2.5 to 2.7)."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import chi2, ncx2

from isthmus.errors import DataError, ShapeError
from isthmus.theory import (
    concentration_tail,
    gaussian_volume_lower,
    isotropic_gaussian_upper,
    low_dimension_bounds,
    low_dimension_rows,
    nearest_neighbour_lower,
    rate_curve,
    volume_lower,
    w2_matching,
)
from isthmus.theory._lower import log_ball_volume

TABLE = [  # dimension, rows, volume bound and nearest-neighbour bound per dimension
    (5, 64, 0.0875, 0.324),
    (5, 512, 0.0381, 0.1457),
    (16, 512, 0.192, 0.6115),
    (64, 512, 0.319, 1.186),
    (256, 512, 0.357, 1.563),
]


def gaussian(d: int):
    return lambda rng, m: rng.standard_normal((m, d))


@pytest.mark.parametrize(("d", "m", "volume", "neighbour"), TABLE)
def test_reference_table(d, m, volume, neighbour):
    assert volume_lower(math.log(m), d) / d == pytest.approx(volume, rel=2e-3)
    assert nearest_neighbour_lower(m, d) / d == pytest.approx(neighbour, rel=5e-4)


@pytest.mark.parametrize(("d", "volume"), [(1, 2), (2, math.pi), (3, 4 * math.pi / 3), (4, math.pi**2 / 2)])
def test_ball_volume(d, volume):
    assert math.exp(log_ball_volume(d)) == pytest.approx(volume, rel=1e-12)


def test_volume_bound_by_hand():
    # d/(d+p) R^p with R the radius of the ball that holds 1/m of the densest mass; R shrinks as 1/sqrt(det).
    radius = 1 / (100 * 3.0 * 2)
    assert volume_lower(math.log(100), 1, log_density=math.log(3.0)) == pytest.approx(radius**2 / 3)
    assert volume_lower(math.log(100), 1, log_density=math.log(3.0), power=1) == pytest.approx(radius / 2)
    scaled = volume_lower(math.log(100), 2, log_det=math.log(16.0))
    assert scaled == pytest.approx(4 * volume_lower(math.log(100), 2))
    assert volume_lower(1.0, 2, log_det=-math.inf) == 0


def test_projection_helps_nearly_singular_metrics():
    variances = [1.0, 1.0, 1e-12, 0.0]
    assert gaussian_volume_lower(4.0, variances) == pytest.approx(volume_lower(4.0, 2))
    assert gaussian_volume_lower(4.0, np.ones(6)) >= volume_lower(4.0, 6)


def test_nearest_neighbour_bound_is_the_expected_nearest_distance():
    # One row: the distance of two Gaussian points, 2 d. One axis, two rows: simulated.
    assert nearest_neighbour_lower(1, 4) == pytest.approx(8, rel=3e-3)
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((40000, 1, 3)), rng.standard_normal((40000, 5, 3))
    nearest = ((x - y) ** 2).sum(-1).min(1)
    assert nearest_neighbour_lower(5, 3) == pytest.approx(nearest.mean(), rel=0.015)


def test_quadrature_errs_downwards():
    for d, m in ((1, 4), (5, 64), (5, 1e9), (40, 1e6)):
        fine = nearest_neighbour_lower(m, d, nodes=1500)
        assert 0.9 * fine < nearest_neighbour_lower(m, d) <= fine


def test_inner_integral_is_exact():
    # nodes=1 leaves the single node of the median of |x|^2.
    u = np.linspace(0, 60, 400001)
    median = chi2.median(3)
    integrand = (1 - ncx2.cdf(u, 3, median)) ** 7
    assert nearest_neighbour_lower(7, 3, nodes=1) == pytest.approx(np.trapezoid(integrand, u), rel=1e-6)


def check_lower_bounds(seed: int, largest: int, repeats: int) -> None:
    rng = np.random.default_rng((21, seed))
    d, m = int(rng.integers(1, 14)), int(rng.integers(1, largest))
    curve = rate_curve(gaussian(d), [m], repeats, seed=seed)
    upper = curve.means[0] + 3 * curve.errors[0]
    assert volume_lower(math.log(m), d) <= nearest_neighbour_lower(m, d) <= upper
    assert curve.means[0] - 3 * curve.errors[0] <= isotropic_gaussian_upper(math.log(m), d)
    root = np.sqrt(rng.exponential(size=d))
    curve = rate_curve(lambda g, size: root * g.standard_normal((size, d)), [m], repeats, seed=seed)
    assert gaussian_volume_lower(math.log(m), root**2) <= curve.means[0] + 3 * curve.errors[0]


def test_lower_bounds_hold_on_random_configurations():
    for seed in range(80):
        check_lower_bounds(seed, 40, 10)


@pytest.mark.slow
def test_lower_bounds_hold_on_many_random_configurations():
    for seed in range(80, 480):
        check_lower_bounds(seed, 300, 12)


@pytest.mark.slow
@pytest.mark.parametrize(("d", "m", "volume", "neighbour"), TABLE)
def test_truth_lies_between_the_bounds(d, m, volume, neighbour):
    curve = rate_curve(gaussian(d), [m], 1000 if m == 64 else 8)
    mean, error = curve.means[0] / d, curve.errors[0] / d
    assert volume * 0.99 <= neighbour <= mean + 3 * error
    assert mean - 3 * error <= isotropic_gaussian_upper(math.log(m), d) / d
    assert 1.04 < mean / neighbour < 1.45


@pytest.mark.parametrize("noise", [0.0, 0.1, 0.5])
def test_low_dimension_inequality(noise):
    sizes, repeats = [8, 32, 128], [20, 10, 6]
    signal = rate_curve(gaussian(3), sizes, repeats)
    noisy = rate_curve(lambda rng, m: low_dimension_rows(rng, m, 3, 20, noise), sizes, repeats)
    for i, m in enumerate(sizes):
        bounds = low_dimension_bounds(m, 3, 20, noise, signal_distance=float(signal.means[i]))
        error = 3 * math.hypot(signal.errors[i], noisy.errors[i])
        assert bounds.lower - error <= noisy.means[i] <= bounds.upper + error
        closed = low_dimension_bounds(m, 3, 20, noise)
        assert closed.lower - error <= noisy.means[i] <= closed.upper + error
        assert closed.upper - isotropic_gaussian_upper(math.log(m), 3) == pytest.approx(2 * 17 * noise**2)


def test_low_dimension_uses_the_full_dimension_below_the_noise():
    # Past the crossover the volume bound in all axes beats the signal's own.
    bounds = low_dimension_bounds(1e12, 1, 20, 0.5)
    assert bounds.lower > 100 * nearest_neighbour_lower(1e12, 1)


def test_concentration():
    d, m = 2, 16
    sigma = np.diag([2.0, 0.5])
    rng = np.random.default_rng(1)
    values = np.sqrt(
        [w2_matching(rng.standard_normal((m, d)), rng.standard_normal((m, d)), sigma)[0] for _ in range(400)]
    )
    for excess in (0.1, 0.3, 0.6):
        share = float((values >= values.mean() + excess).mean())
        assert share <= concentration_tail(excess, m, largest_eigenvalue=2.0)
    assert concentration_tail(0.5, 16, largest_eigenvalue=2.0) == pytest.approx(math.exp(-0.5))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: volume_lower(-1.0, 2), DataError, "volume_lower: log_sample_size"),
        (lambda: volume_lower(1.0, 2, power=0), DataError, "power: expected a finite number above 0"),
        (lambda: gaussian_volume_lower(1.0, [-1.0]), DataError, "expected variances of at least 0"),
        (lambda: nearest_neighbour_lower(0, 2), DataError, "nearest_neighbour_lower: sample_size"),
        (lambda: low_dimension_bounds(2, 5, 4, 0.1), ShapeError, "at most 4 signal axes, found 5"),
        (
            lambda: low_dimension_bounds(2, 1, 4, -0.1),
            DataError,
            "noise: expected a finite number at least 0",
        ),
        (
            lambda: low_dimension_rows(np.random.default_rng(0), 2, 3, 2, 0.1),
            ShapeError,
            "at most 2 signal axes",
        ),
        (lambda: concentration_tail(-1, 4), DataError, "excess: expected a finite number at least 0"),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()
