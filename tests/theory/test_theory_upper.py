"""Upper bounds on the transport distance of two samples (Theory, sections 2.1 to 2.4)."""

from __future__ import annotations

import math

import numpy as np
import pytest

from isthmus.errors import DataError
from isthmus.theory import (
    box_upper,
    closed_form_upper,
    cube_upper,
    gaussian_upper,
    isotropic_gaussian_upper,
    rate_curve,
    sub_gaussian_upper,
    w2_matching,
)
from isthmus.theory._cells import cell_sums

SIZES = (1, 2, 7, 64, 1000, 1e6, 1e40, 1e300)


@pytest.mark.parametrize(
    ("level", "expected"),
    [
        (0, (1, 1, 2, 0.707107, 2.31453)),
        (1, (1.414214, 0.36338, 1.027794, 0.763918, 1.388512)),
        (2, (1.878254, 0.142017, 0.546732, 1.170106, 0.72733)),
    ],
)
def test_cell_sums_of_scale_four(level, expected):
    cells = cell_sums(4.0)
    found = [a[level] for a in (cells.S, cells.v, cells.N, cells.H, cells.C)]
    assert found == pytest.approx(expected, abs=1e-5)


def test_cell_sums_approach_the_limits_of_the_closed_form_from_below():
    # Limits: integrals of f/g^2 and sqrt(f) g^(-3/2) of Gaussian densities of variance 1 (f) and 5 (g).
    cells, k = cell_sums(5.0), np.arange(15)
    v_limit = 2 * math.pi * 5 / 12 / math.sqrt(1 - 2 / 5)
    n_limit = (2 * math.pi) ** 0.5 * 5**0.75 / 6 * math.sqrt(2 * math.pi / (0.5 - 0.3))
    scaled = [4.0**k * cells.v[:15], 2.0 ** (1.5 * k) * cells.N[:15], 2.0 ** (1.5 * k) * cells.C[:15]]
    limits = (v_limit, n_limit, 7 * math.sqrt(2) / 8 * n_limit)
    assert limits == pytest.approx((3.3798, 7.829, 9.688), rel=2e-4)
    for sequence, limit, constant in zip(scaled, limits, (3.39, 7.84, 9.70), strict=True):
        assert (np.diff(sequence) > 0).all()
        assert 0.999 * limit < sequence[-1] < limit < constant
    for sums in (cells.S / 2.0 ** (np.arange(45) / 2), cells.H * math.sqrt(2) / 2.0 ** (np.arange(45) / 2)):
        assert (sums <= 1 + 1e-12).all()


def test_deep_levels_continue_the_exact_ones():
    cells = cell_sums(5.0)
    for sums, rate in ((cells.S, 0.5), (cells.v, -2), (cells.N, -1.5), (cells.H, 0.5), (cells.C, -1.5)):
        assert sums[15] / sums[14] == pytest.approx(2.0**rate, rel=5e-3)
        assert sums[15] >= sums[14] * 2.0**rate * (1 - 1e-9)


@pytest.mark.parametrize("d", [1, 2, 5, 64])
def test_cube_and_box_agree(d):
    for m in SIZES:
        for one_sample in (False, True):
            box = box_upper(m, np.full(d, 0.7), one_sample=one_sample) / (0.49 * d)
            assert cube_upper(math.log(m), d, one_sample=one_sample) == pytest.approx(box, rel=1e-9)


def test_cube_is_the_worst_box():
    rng = np.random.default_rng(0)
    for _ in range(100):
        sides, m = rng.exponential(size=rng.integers(1, 9)), math.exp(rng.uniform(0, 30))
        cube = cube_upper(math.log(m), len(sides)) * (sides**2).sum()
        assert box_upper(m, sides) <= cube * (1 + 1e-12)
    assert box_upper(5, [0.0, 0.0]) == 0


@pytest.mark.parametrize(
    ("d", "constant"),
    # Largest value over all sample sizes. 9.56 and 5.63 for 5 and 6 are those of at most 8 bits per dimension (Theory,
    # section 9).
    [(5, 10.36), (6, 5.69), (8, 3.41), (10, 2.67), (16, 1.96), (32, 1.57), (64, 1.41), (128, 1.33)],
)
def test_rate_constant_of_the_cube(d, constant):
    sizes = np.arange(0.0, 40 * d * math.log(2), 0.2)
    found = max(math.exp(2 * s / d) * cube_upper(s, d) for s in sizes)
    assert found == pytest.approx(constant, abs=0.006)


@pytest.mark.parametrize(
    ("d", "constant", "overall"),
    [
        (5, 57.2, 68.7),
        (6, 35.1, 37.7),
        (8, 21.2, 22.1),
        (10, 16.2, 16.7),
        (16, 11.1, 11.3),
        (64, 6.3, 6.4),
        (256, 5.2, 5.2),
    ],
)
def test_rate_constant_of_the_gaussian(d, constant, overall):
    def largest(bits: float) -> float:
        sizes = np.linspace(0.0, bits * d * math.log(2), 300)
        return max(math.exp(2 * s / d) * isotropic_gaussian_upper(s, d) / d for s in sizes)

    assert largest(8.5) == pytest.approx(constant, rel=6e-3)
    # Beyond 8.5 bits per dimension that constant is exceeded at small d (Theory, section 9): by 20 % at d = 5.
    assert largest(40.0) == pytest.approx(overall, rel=8e-3)


def test_reference_table_of_the_gaussian():
    rows = [(5, 64, 1.94), (5, 512, 1.281), (16, 512, 1.985), (64, 512, 2.0), (256, 512, 2.0)]
    for d, m, expected in rows:
        assert isotropic_gaussian_upper(math.log(m), d) / d == pytest.approx(expected, abs=6e-4)
        assert gaussian_upper(m, np.ones(d)) / d == pytest.approx(expected, abs=6e-4)


BOUNDS = {
    "box": lambda log_m: box_upper(math.exp(log_m), [1.0, 2.0, 0.5]),
    "cube": lambda log_m: cube_upper(log_m, 7),
    "gaussian": lambda log_m: gaussian_upper(math.exp(log_m), [1.0, 2.0, 0.5, 1.0]),
    "isotropic": lambda log_m: isotropic_gaussian_upper(log_m, 6),
    "closed": lambda log_m: closed_form_upper(log_m, 6),
    "sub-gaussian": lambda log_m: sub_gaussian_upper(log_m, 6),
}


@pytest.mark.parametrize("name", BOUNDS)
def test_bounds_fall_with_the_sample_size(name):
    values = np.array([BOUNDS[name](s) for s in np.linspace(0, 200, 60)])
    assert (np.diff(values) <= 1e-12 * values[:-1]).all()
    assert values[-1] < 0.2 * values[0]


def test_no_bound_exceeds_twice_the_trace():
    for m in SIZES:
        assert gaussian_upper(m, [3.0, 1.0]) <= 8
        assert isotropic_gaussian_upper(math.log(m), 9) <= 18
        assert closed_form_upper(math.log(m), 9) <= 18
        assert sub_gaussian_upper(math.log(m), 9, variance=1.0) <= 18
        assert box_upper(m, [1.0, 2.0]) <= 2.5


def test_anisotropic_bound_is_at_most_the_isotropic_one():
    rng = np.random.default_rng(1)
    for _ in range(40):
        variances = rng.exponential(size=rng.integers(1, 12)) ** 2
        m = math.exp(rng.uniform(0, 60))
        isotropic = isotropic_gaussian_upper(math.log(m), len(variances)) * variances.mean()
        assert gaussian_upper(m, variances) <= isotropic * (1 + 1e-12)
    assert gaussian_upper(1e6, [1.0, 1e-4, 1e-4]) < 0.06 * isotropic_gaussian_upper(math.log(1e6), 3)


@pytest.mark.parametrize("d", [5, 8, 100, 1000])
def test_closed_form_is_above_the_exact_sums(d):
    for bits in (0.5, 1, 3, 8, 20):
        log_m = bits * d * math.log(2)
        closed, exact = closed_form_upper(log_m, d), isotropic_gaussian_upper(log_m, d)
        assert exact <= closed * (1 + 1e-12)
        # Above the levels summed exactly the two differ by S_k <= 2^(k/2) only, 0.42 bits per dimension.
        assert isotropic_gaussian_upper(max(log_m - 0.5 * d, 0.0), d) > 0.3 * closed


def test_closed_form_takes_astronomic_sizes():
    for d in (1e3, 1e9, 1e200):
        assert closed_form_upper(30 * d, d) < 1e-5 * d
        assert closed_form_upper(0.01 * d, d) == pytest.approx(2 * d, rel=0.02)


def test_sub_gaussian_bound_formula():
    # By hand: the best of the radii cannot beat a finer grid by more than its spacing allows.
    radii = np.linspace(0.05, 12, 200001)
    for log_m, d in ((50.0, 5), (3000.0, 300)):
        bound = (2 * radii * math.sqrt(cube_upper(log_m, d)) + 4 * np.exp(-(radii**2) / 4)).min() ** 2 * d
        assert bound <= sub_gaussian_upper(log_m, d) <= bound * (1 + 1e-3)
        assert sub_gaussian_upper(log_m, d, proxy=4.0) == pytest.approx(4 * sub_gaussian_upper(log_m, d))
    assert sub_gaussian_upper(0.0, 3) == pytest.approx(3 * 4 * (1 + math.log(2)))


def test_uniform_on_an_interval_has_a_known_mean():
    # Order statistics: 1 / (3 (m + 1)).
    curve = rate_curve(lambda rng, m: rng.random((m, 1)), [1, 8, 32], [4000, 1500, 500], seed=1)
    exact = 1 / (3 * (np.array(curve.sizes) + 1))
    assert (np.abs(curve.means - exact) < 3.5 * curve.errors).all()
    assert all(m < box_upper(size, [1.0]) for m, size in zip(curve.means, curve.sizes, strict=True))


@pytest.mark.slow
def test_uniform_on_an_interval_has_a_known_mean_precisely():
    curve = rate_curve(lambda rng, m: rng.random((m, 1)), [8, 64], 20000)
    exact = 1 / (3 * (np.array(curve.sizes) + 1))
    assert (np.abs(curve.means - exact) < 3 * curve.errors).all()
    assert (curve.errors < 0.01 * exact).all()


LAWS = {
    "uniform": lambda rng, shape: rng.random(shape),
    "corners": lambda rng, shape: rng.integers(0, 2, shape).astype(float),
    "edges": lambda rng, shape: rng.beta(0.2, 0.2, shape),
    "diagonal": lambda rng, shape: rng.random((shape[0], 1)) * np.ones(shape),
}


def check_box(seed: int, largest: int, repeats: int) -> None:
    rng = np.random.default_rng((11, seed))
    d, m = int(rng.integers(1, 9)), int(rng.integers(1, largest))
    sides = rng.exponential(size=d)
    law = LAWS[list(LAWS)[seed % len(LAWS)]]
    curve = rate_curve(lambda g, size: sides * law(g, (size, d)), [m], repeats, seed=seed)
    assert curve.means[0] - 3 * curve.errors[0] <= box_upper(m, sides)
    # Coordinates scaled to [-1, 1] are sub-Gaussian of proxy 1.
    unit = rate_curve(lambda g, size: 2 * law(g, (size, d)) - 1, [m], repeats, seed=seed)
    assert unit.means[0] - 3 * unit.errors[0] <= sub_gaussian_upper(math.log(m), d, variance=1.0)


def check_gaussian(seed: int, largest: int, repeats: int) -> None:
    rng = np.random.default_rng((12, seed))
    d, m = int(rng.integers(1, 12)), int(rng.integers(1, largest))
    variances = rng.exponential(size=d) ** (seed % 3)
    root = np.sqrt(variances)
    curve = rate_curve(lambda g, size: root * g.standard_normal((size, d)), [m], repeats, seed=seed)
    assert curve.means[0] - 3 * curve.errors[0] <= gaussian_upper(m, variances)


@pytest.mark.parametrize("check", [check_box, check_gaussian])
def test_bounds_hold_on_random_configurations(check):
    for seed in range(120):
        check(seed, 40, 6)


@pytest.mark.slow
@pytest.mark.parametrize("check", [check_box, check_gaussian])
def test_bounds_hold_on_many_random_configurations(check):
    for seed in range(120, 620):
        check(seed, 300, 12)


def test_one_sample_bound_is_below_the_two_sample_bound():
    # A sample against its law, here the uniform grid of 512 points standing for the interval.
    grid = (np.arange(512)[:, None] + 0.5) / 512
    rng = np.random.default_rng(5)
    values = [w2_matching(np.repeat(rng.random((16, 1)), 32, axis=0), grid)[0] for _ in range(20)]
    assert np.mean(values) < box_upper(16, [1.0], one_sample=True) < box_upper(16, [1.0])


def test_larger_samples_come_closer():
    # omega(k m) <= omega(m), and unequal sizes lie in between by joint convexity.
    rng = np.random.default_rng(6)

    def mean(size_a: int, size_b: int) -> float:
        def one() -> float:
            a, b = rng.standard_normal((size_a, 3)), rng.standard_normal((size_b, 3))
            return w2_matching(a, np.repeat(b, size_a // size_b, axis=0))[0]

        return float(np.mean([one() for _ in range(150)]))

    assert mean(32, 32) < mean(32, 8) < mean(8, 8)
    assert mean(1, 1) == pytest.approx(6, rel=0.15)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: box_upper(0.5, [1.0]), "box_upper: sample_size: expected a finite number at least 1"),
        (lambda: box_upper(2, [1.0, -1.0]), "expected sides of at least 0, found -1"),
        (lambda: cube_upper(-1.0, 3), "log_sample_size: expected a finite number at least 0"),
        (lambda: cube_upper(1.0, 0), "dimension: expected a finite number at least 1"),
        (lambda: gaussian_upper(4, [1.0, -2.0]), "expected variances of at least 0, found -2"),
        (lambda: gaussian_upper(math.inf, [1.0]), "found inf"),
        (lambda: isotropic_gaussian_upper(1.0, 2.5), "expected a whole number, found 2.5"),  # type: ignore[arg-type]
        (lambda: closed_form_upper(1.0, 4), "at least 5, found 4"),
        (lambda: sub_gaussian_upper(1.0, 4, proxy=0.0), "proxy: expected a finite number above 0"),
        (lambda: sub_gaussian_upper(1.0, 4, variance=-1.0), "variance: expected a finite number at least 0"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(DataError, match=message):
        call()
