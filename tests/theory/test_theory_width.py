"""Sufficient and necessary widths, towers, deep Gaussian networks (Theory, section 4)."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from isthmus.errors import DataError, ShapeError
from isthmus.theory import (
    Tower,
    closed_form_upper,
    entezari_log10_width,
    gaussian_lmc_bound,
    grouped_lmc_error,
    isotropic_gaussian_upper,
    layer_tolerance,
    log_width_low_dimension,
    log_width_lower,
    log_width_sub_gaussian,
    log_width_upper,
    property1_recursion,
    rate_curve,
    sub_gaussian_upper,
    width_recursion,
)

LOG10 = math.log(10)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((5, 1, 0.1), [(0, 6.63e10)]),
        ((5, 2, 0.5), [(0, 5.64e8), (1, 7.72e8)]),
        ((5, 3, 0.5), [(0, 4.43e9), (1, 6.64e9), (2, 6.64e9)]),
        ((784, 1, 0.1), [(1, 1274.24)]),
        ((784, 3, 0.1), [(1, 1655.3), (2, 1655.7), (3, 1655.7)]),
    ],
)
def test_reference_recursions(arguments, expected):
    found = width_recursion(*arguments, sup_t=False)
    assert [t.height for t in found] == [height for height, _ in expected]
    assert [t.value for t in found] == pytest.approx([value for _, value in expected], rel=0.01)


@pytest.mark.parametrize(
    ("d", "epsilon", "fixed", "sup", "necessary", "entezari"),
    [
        (5, 0.1, 10.82, 11.77, 5.67, 14),
        (5, 0.01, 15.96, 16.84, 10.67, 28),
        (10, 0.1, 18.81, 20.68, 11.20, 24),
        (50, 0.1, 84.24, 94.24, 54.87, 104),
        (784, 0.1, 1274.2, 1418.9, 851.0, 1572),
        (784, 0.5, 718.8, 846.9, 303.0, 473),
    ],
)
def test_two_layer_table(d, epsilon, fixed, sup, necessary, entezari):
    assert width_recursion(d, 1, epsilon, sup_t=False)[0].log10 == pytest.approx(fixed, abs=0.06)
    assert width_recursion(d, 1, epsilon)[0].log10 == pytest.approx(sup, abs=0.06)
    assert log_width_lower(d, (epsilon / 2) ** 2) / LOG10 == pytest.approx(necessary, abs=0.06)
    assert entezari_log10_width(d, epsilon) == pytest.approx(entezari, abs=0.6)


@pytest.mark.parametrize(("d", "slope"), [(5, 5.1), (10, 10.3), (50, 49.4)])
def test_slope_in_epsilon_is_the_dimension(d, slope):
    first, second = (width_recursion(d, 1, e, sup_t=False)[0].log10 for e in (0.1, 0.01))
    assert second - first == pytest.approx(slope, abs=0.06)
    assert second - first == pytest.approx(d, rel=0.06)


def test_second_tower_counts_the_digits_per_neuron():
    first, second = width_recursion(784, 2, 0.1, sup_t=False)
    digits = log_width_upper(1e8, 0.025**2) / LOG10 / 1e8
    assert second.value - first.value == pytest.approx(math.log10(digits), abs=1e-4)


def test_tower_normal_form_orders_numbers():
    rising = [
        Tower(0, 0.0),
        Tower(0, 7.0),
        Tower(0, 1e299),
        Tower(1, 301.0),
        Tower(1, 1e250),
        Tower(2, 300.5),
    ]
    rising += [Tower(2, 1e9), Tower(3, 305.0)]
    assert rising == sorted(rising, reverse=True)[::-1]
    assert all(a < b for a, b in itertools.pairwise(rising))
    assert Tower(1, 2.0) == Tower(0, 100.0)
    assert Tower(0, 1e305) == Tower(1, 305.0)
    assert Tower(2, 2.5) == Tower(1, 10**2.5)
    assert (Tower(1, 1274.24).log10, Tower(0, 1000.0).log10, Tower(2, 400.0).log10) == (
        1274.24,
        3.0,
        math.inf,
    )
    assert Tower(0, 0.0).log10 == -math.inf
    assert str(Tower(2, 1655.7)) == "10^10^1655.7"


def test_deep_towers_gain_one_height_a_layer_and_grow():
    widths = width_recursion(100, 6, 0.3)
    assert [t.height for t in widths] == [0, 1, 2, 3, 4, 5]
    assert all(a < b for a, b in itertools.pairwise(widths))
    assert widths[1].value == pytest.approx(log_width_upper(widths[0].value, (0.6 / 66) ** 2) / LOG10)


def test_easy_errors_need_one_neuron():
    assert width_recursion(7, 3, 40.0) == [Tower(0, 1.0)] * 3
    assert log_width_upper(5, 2.0) == log_width_upper(1e9, 2.0) == log_width_sub_gaussian(3, 20.0) == 0
    assert log_width_lower(5, 2.0) == 0


@pytest.mark.parametrize("d", [1, 2, 5, 8, 300, 2000, 2001, 1e5, 1e12])
def test_widths_are_consistent(d):
    tolerances = np.geomspace(1e-9, 1.9, 25)
    upper = np.array([log_width_upper(d, t) for t in tolerances])
    lower = np.array([log_width_lower(d, t) for t in tolerances])
    sub_gaussian = np.array([log_width_sub_gaussian(d, t) for t in tolerances])
    assert (np.diff(upper) < 0).all()
    assert (np.diff(lower) <= 0).all()
    assert (lower <= upper).all()
    assert (lower <= sub_gaussian).all()
    for t, log_m, log_s in zip(tolerances, upper, sub_gaussian, strict=True):
        bound = isotropic_gaussian_upper(log_m, int(d)) if d <= 2000 else closed_form_upper(log_m, d)
        assert bound <= t * d * (1 + 1e-6)
        assert sub_gaussian_upper(log_s, d) <= t * d * (1 + 1e-9)


def test_necessary_width_inverts_the_volume_bound_by_hand():
    # d = 1, density at most 1/2 on an interval of length 2: a ball of radius R holds m R <= 1 of the mass.
    assert math.exp(log_width_lower(1, 1e-4, log_density=math.log(0.5))) == pytest.approx(1 / math.sqrt(3e-4))
    wider = log_width_lower(2, 1e-4, log_det=math.log(9.0)) - log_width_lower(2, 1e-4)
    assert wider == pytest.approx(math.log(3.0))


def test_low_dimension_references():
    found = [log_width_low_dimension(5, 784, 0.01, noise) for noise in (0.0, 0.005, 0.01)]
    assert [f.regime for f in found] == ["signal", "signal", "full"]
    assert [f.log_width / LOG10 for f in found[:2]] == pytest.approx([9.236, 10.955], abs=1e-3)
    assert found[2].log_width == pytest.approx(log_width_upper(784, 0.01 * 5 / (5 + 779 * 1e-4)))
    assert log_width_low_dimension(6, 6, 0.01, 3.0).log_width == log_width_upper(6, 0.01)


def test_low_dimension_takes_the_cheaper_way_near_the_noise_floor():
    # The floor 2 (d - k) eta^2 / k is 99.9999 % of the tolerance, but one more axis costs little.
    noise = math.sqrt(0.01 * 5 / 2 * (1 - 1e-6))
    assert log_width_low_dimension(5, 6, 0.01, noise).regime == "full"


def test_layer_tolerance():
    assert layer_tolerance(3, 0.6, sup_t=False) == pytest.approx(0.1)
    assert layer_tolerance(3, 0.6) == pytest.approx(0.05)
    assert layer_tolerance(3, 0.6, delta=0.25) == pytest.approx(0.0125)
    assert layer_tolerance(3, 0.6, delta=0.25, sup_t=False) == pytest.approx(0.05)
    # The tolerances make the bound of the theorem equal to epsilon.
    for depth in (1, 2, 5):
        assert gaussian_lmc_bound([layer_tolerance(depth, 0.3) ** 2] * depth).sup_t == pytest.approx(0.3)
        fixed = [layer_tolerance(depth, 0.3, sup_t=False) ** 2] * depth
        assert gaussian_lmc_bound(fixed).fixed_t == pytest.approx(0.3)


def test_theorem_recursion_by_hand():
    bound = gaussian_lmc_bound([0.04, 0.09])
    assert bound.layers == pytest.approx((0.2, 0.5))
    assert bound.fixed_t == pytest.approx(1.0)
    assert bound.sup_t == pytest.approx(1.7)
    scaled = gaussian_lmc_bound(
        [0.04, 0.09], variances=[2, 3, 4], bias_variance=0.1, activation_gain=0.5, input_second_moment=1.5
    )
    first = math.sqrt(3.1 * 0.04)
    second = math.sqrt(3) * first + math.sqrt((3 * 1.55 + 0.1) * 0.09)
    assert scaled.layers == pytest.approx((first, second))
    assert scaled.fixed_t == pytest.approx(4 * second)
    assert scaled.sup_t == pytest.approx(2 * (2 * second + (math.sqrt(3) * 2 * first + 2 * second) / 2))


def test_paper_recursion():
    assert property1_recursion(0, 1, 1, 4, 0.1) == pytest.approx(0.8)
    assert property1_recursion(1, 2, 3, [4, 5], [0.5, 0.1]) == pytest.approx(6 * (6 + 8) + 2)
    # The squared form is weaker than the sum of roots it comes from.
    squared = property1_recursion(0, 1, 1, [1, 1], [0.04, 0.09])
    assert squared >= gaussian_lmc_bound([0.04, 0.09]).layers[-1] ** 2


def measured_distances(widths: tuple[int, ...], input_dimension: int) -> list[float]:
    """Mean squared distance per dimension of two Gaussian samples, layer by layer."""
    dimensions = (input_dimension, *widths[:-1])
    return [
        float(rate_curve(lambda rng, n, d=d: rng.standard_normal((n, d)), [m], 3).means[0]) / d
        for m, d in zip(widths, dimensions, strict=True)
    ]


def data(samples: int = 100, features: int = 5) -> np.ndarray:
    x = np.random.default_rng(1).standard_normal((samples, features))
    return x / np.sqrt((x**2).mean())


def check_theorem(widths: tuple[int, ...], copies: int) -> tuple[float, float]:
    runs = [grouped_lmc_error(data(), widths, np.random.default_rng(s), copies=copies) for s in range(3)]
    bound = gaussian_lmc_bound(measured_distances(widths, 5))
    fixed = math.sqrt(float(np.mean([r.error**2 for r in runs], axis=0).max()))
    return bound.fixed_t / fixed, bound.sup_t / float(np.mean([r.sup for r in runs]))


@pytest.mark.parametrize(
    ("widths", "copies"), [((1,), 1), ((2,), 3), ((64,), 1), ((64,), 2), ((8, 32), 2), ((4, 16, 64), 2)]
)
def test_theorem_bounds_the_grouped_construction(widths, copies):
    fixed, sup = check_theorem(widths, copies)
    assert 1 <= fixed < 60
    assert fixed < sup < 150


@pytest.mark.slow
@pytest.mark.parametrize(
    ("widths", "copies", "most"), [((256,), 1, 8), ((1024,), 1, 8), ((16, 64), 4, 20), ((8, 64, 256), 1, 45)]
)
def test_theorem_bounds_wider_constructions(widths, copies, most):
    fixed, sup = check_theorem(widths, copies)
    assert 1 <= fixed < most
    assert sup >= fixed


def test_grouped_construction_matches_better_than_chance():
    run = grouped_lmc_error(data(), (64,), np.random.default_rng(0), points=3)
    assert run.error[0] == pytest.approx(0, abs=1e-12)
    assert run.error[-1] == pytest.approx(0, abs=1e-12)
    assert run.sup == run.error[1] > 0
    # The transported rows cost less than two unmatched ones, whose mean cost is 2 trace(Sigma) / 5 = 2.
    assert run.costs[0] < 1
    wide = grouped_lmc_error(data(), (64,), np.random.default_rng(0), points=3, activation=np.tanh)
    assert wide.sup < run.sup


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: Tower(-1, 2.0), DataError, "height of at least 0"),
        (lambda: Tower(0, math.nan), DataError, "finite value of at least 0"),
        (lambda: log_width_upper(0, 0.1), DataError, "dimension: expected a finite number at least 1"),
        (lambda: log_width_upper(2.5, 0.1), DataError, "expected a whole number, found 2.5"),
        (lambda: log_width_upper(5, 1e-30), DataError, "finer than the cells resolve"),
        (lambda: log_width_lower(5, 0.0), DataError, "tolerance: expected a finite number above 0"),
        (lambda: log_width_sub_gaussian(5, -1.0), DataError, "tolerance per dimension"),
        (lambda: log_width_low_dimension(5, 4, 0.1, 0.1), DataError, "dimension: expected .* at least 5"),
        (lambda: layer_tolerance(0, 0.1), DataError, "depth: expected a finite number at least 1"),
        (lambda: layer_tolerance(1, 0.1, delta=1.5), DataError, "delta: .* above 0 and at most 1"),
        (lambda: width_recursion(0, 1, 0.1), DataError, "input_dimension"),
        (lambda: entezari_log10_width(3, 0.0), DataError, "epsilon: expected a finite number above 0"),
        (lambda: gaussian_lmc_bound([]), ShapeError, "one distance per hidden layer"),
        (lambda: gaussian_lmc_bound([0.1], variances=[1.0]), ShapeError, "expected 2 variances, found 1"),
        (lambda: gaussian_lmc_bound([-0.1]), DataError, "distances: expected a finite number at least 0"),
        (lambda: property1_recursion(0, 1, 1, [1, 2], [0.1]), ShapeError, "as many widths as errors"),
        (
            lambda: grouped_lmc_error(np.ones((2, 2)), [], np.random.default_rng(0)),
            ShapeError,
            "at least one hidden layer",
        ),
        (
            lambda: grouped_lmc_error(np.ones((2, 2)), [0], np.random.default_rng(0)),
            DataError,
            "effective_widths",
        ),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()
