"""Empirical rates and the dimension behind them (Theory, section 5)."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from isthmus.errors import DataError, ShapeError
from isthmus.theory import (
    RateCurve,
    fit_dimension,
    low_dimension_bounds,
    low_dimension_rows,
    rate_curve,
    rate_curve_of_rows,
)

SIZES, REPLICATES = [64, 128, 256, 512, 1024], [40, 24, 14, 8, 4]


def gaussian(d: int):
    return lambda rng, m: rng.standard_normal((m, d))


def power_law(slope: float, sizes=(16, 32, 64, 128), errors: float = 0.01) -> RateCurve:
    means = 3.0 * np.array(sizes, dtype=float) ** slope
    return RateCurve(tuple(sizes), means, errors * means, (5,) * len(sizes), "sampler")


@pytest.mark.parametrize(
    ("d", "slope", "low", "high"),
    [
        (3, -0.598, -0.70, -0.52),
        (5, -0.407, -0.45, -0.36),
        (8, -0.272, -0.31, -0.235),
        (12, -0.194, -0.22, -0.17),
        (20, -0.132, -0.15, -0.115),
    ],
)
def test_gaussian_slopes(d, slope, low, high):
    fit = fit_dimension(rate_curve(gaussian(d), SIZES, REPLICATES))
    assert low < fit.slope < high
    assert fit.slope == pytest.approx(slope, abs=6e-4)
    assert fit.slope_error < 0.014
    # The asymptotic reading is too small in high dimension, the calibrated one is not.
    assert fit.dim_calibrated == pytest.approx(d, rel=0.08)
    assert abs(fit.dim_calibrated - d) < abs(fit.dim_asymptotic - d) or d < 8


@pytest.mark.slow
@pytest.mark.parametrize(("d", "slope"), [(3, -0.650), (5, -0.450), (8, -0.306), (12, -0.215), (20, -0.142)])
def test_uniform_slopes(d, slope):
    fit = fit_dimension(rate_curve(lambda rng, m: rng.random((m, d)), SIZES, REPLICATES), calibrate=False)
    assert fit.slope == pytest.approx(slope, abs=6e-4)
    assert math.isnan(fit.dim_calibrated)


def test_fit_recovers_a_power_law():
    fit = fit_dimension(power_law(-0.25))
    assert fit.slope == pytest.approx(-0.25)
    assert fit.dim_asymptotic == pytest.approx(8)
    assert fit.local_slopes == pytest.approx([-0.25] * 3)
    assert fit.local_errors == pytest.approx([0.01 * math.sqrt(2) / math.log(2)] * 3)
    # Four equal weights of 100 on an equispaced grid: the textbook error of a slope.
    assert fit.slope_error == pytest.approx(0.01 / (math.log(2) * math.sqrt(5)))
    assert fit_dimension(power_law(-0.25, errors=1e-9)).slope_error == pytest.approx(
        1 / (200 * math.log(2) * math.sqrt(5))
    )


def test_fit_trusts_precise_points():
    curve = power_law(-0.25)
    bent = np.array([1.0, 1.0, 1.0, 2.0]) * curve.means
    loose = RateCurve(
        curve.sizes, bent, np.array([0.01, 0.01, 0.01, 2.0]) * bent, curve.replicates, "sampler"
    )
    assert fit_dimension(loose, calibrate=False).slope == pytest.approx(-0.25, abs=0.01)


def test_slopes_no_dimension_has():
    assert fit_dimension(power_law(0.1)).dim_asymptotic == math.inf
    assert fit_dimension(power_law(0.0)).dim_calibrated == math.inf
    assert fit_dimension(power_law(-20.0)).dim_calibrated == 0.5


def test_curves_are_deterministic_and_use_the_documented_seeds():
    curve = rate_curve(gaussian(2), [4], 3, seed=5)
    from isthmus.theory import w2_matching

    draws = [
        [np.random.default_rng((5, 4, r, i)).standard_normal((4, 2)) for i in range(2)] for r in range(3)
    ]
    values = [w2_matching(a, b)[0] for a, b in draws]
    assert curve.means[0] == np.mean(values)
    assert curve.errors[0] == pytest.approx(np.std(values, ddof=1) / math.sqrt(3))
    assert curve.source == "sampler"


def test_one_replicate_has_no_error_but_a_fit():
    curve = rate_curve(gaussian(4), [8, 64], 1)
    assert np.isnan(curve.errors).all()
    assert math.isfinite(fit_dimension(curve).slope)


def test_samplers_may_return_tensors():
    generator = torch.Generator().manual_seed(0)
    curve = rate_curve(lambda rng, m: torch.randn(m, 2, generator=generator), [4, 8], 2)
    assert (curve.means > 0).all()


def test_rows_of_a_layer():
    rng = np.random.default_rng(0)
    weight = torch.from_numpy(rng.standard_normal((256, 6))).float()
    curve = rate_curve_of_rows(weight, replicates=12)
    assert curve.sizes == (8, 16, 32, 64, 128)
    assert curve.source == "rows"
    fit = fit_dimension(curve)
    assert fit.dim_calibrated == pytest.approx(6, rel=0.25)
    reference = rate_curve(gaussian(6), curve.sizes, 12)
    gap = np.abs(curve.means - reference.means)
    assert (gap < 3.5 * np.hypot(curve.errors, reference.errors)).all()


def test_rows_of_a_small_layer():
    assert rate_curve_of_rows(np.random.default_rng(0).standard_normal((7, 2))).sizes == (2,)
    assert rate_curve_of_rows(np.random.default_rng(0).standard_normal((31, 2))).sizes == (2, 4, 8)
    # Subsamples are disjoint: the rows of a simplex never coincide.
    assert rate_curve_of_rows(np.eye(8), [4], 5).means[0] == pytest.approx(2.0)


def test_errors_of_rows_are_honest():
    """The stated errors cover the spread over independent layers, also where one split uses every row."""
    sizes = [8, 32, 64]
    curves = [
        rate_curve_of_rows(np.random.default_rng((9, s)).standard_normal((128, 5)), sizes, 6, seed=s)
        for s in range(60)
    ]
    actual = np.std([c.means for c in curves], axis=0)
    stated = np.mean([c.errors for c in curves], axis=0)
    assert (actual < 1.3 * stated).all()
    assert (actual > 0.3 * stated).all()


def test_two_regimes():
    sizes, repeats = [32, 64, 128, 256], [16, 12, 8, 6]
    clean = rate_curve(gaussian(3), sizes, repeats)
    noisy = rate_curve(lambda rng, m: low_dimension_rows(rng, m, 3, 64, 0.1), sizes, repeats)
    for i, m in enumerate(sizes):
        bounds = low_dimension_bounds(m, 3, 64, 0.1, signal_distance=float(clean.means[i]))
        assert bounds.lower < noisy.means[i] < bounds.upper
    local = [fit_dimension(c, calibrate=False).local_slopes[-1] for c in (clean, noisy)]
    assert local[1] - local[0] >= 0.15


@pytest.mark.slow
def test_two_regimes_at_the_sizes_of_the_note():
    sizes = [32, 64, 128, 256, 512, 1024]
    clean = rate_curve(gaussian(3), sizes, 6)
    noisy = rate_curve(lambda rng, m: low_dimension_rows(rng, m, 3, 64, 0.1), sizes, 6)
    assert clean.means == pytest.approx([1.246, 0.809, 0.537, 0.361, 0.240, 0.150], rel=0.12)
    assert noisy.means == pytest.approx([2.451, 1.996, 1.705, 1.506, 1.354, 1.241], rel=0.05)
    bounds = [
        low_dimension_bounds(m, 3, 64, 0.1, signal_distance=float(w))
        for m, w in zip(sizes, clean.means, strict=True)
    ]
    assert all(b.lower < w < b.upper for b, w in zip(bounds, noisy.means, strict=True))
    local = [fit_dimension(c, calibrate=False).local_slopes[-1] for c in (clean, noisy)]
    assert local[1] - local[0] >= 0.15


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: rate_curve(gaussian(2), [8, 8]), DataError, "strictly rising sizes"),
        (lambda: rate_curve(gaussian(2), []), DataError, "strictly rising sizes"),
        (lambda: rate_curve(gaussian(2), [0, 8]), DataError, "sizes: expected a finite number at least 1"),
        (lambda: rate_curve(gaussian(2), [4, 8], [1]), ShapeError, "2 numbers of replicates, found 1"),
        (lambda: rate_curve(gaussian(2), [4], 0), DataError, "replicates"),
        (lambda: rate_curve(lambda rng, m: np.ones((3, 2)), [4]), ShapeError, "for 4 rows, found"),
        (lambda: rate_curve_of_rows(np.ones((3, 2))), ShapeError, "at least 4 rows, found 3"),
        (lambda: rate_curve_of_rows(np.ones((9, 2)), [5]), ShapeError, "need 10 rows, found 9"),
        (lambda: fit_dimension(power_law(-0.2, sizes=(4,))), ShapeError, "at least two sizes"),
        (
            lambda: fit_dimension(rate_curve(lambda rng, m: np.ones((m, 2)), [2, 4])),
            DataError,
            "a mean distance is 0",
        ),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()
