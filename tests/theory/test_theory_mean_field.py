"""Mean-field two-layer networks (Theory, section 6)."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from isthmus.errors import DataError, ShapeError
from isthmus.theory import (
    MeanFieldSettings,
    TanhNeuron,
    chaos_test,
    curvature_bound,
    lipschitz_bound,
    lmc_error,
    match_clouds,
    mean_field_curve,
    mean_field_pairs,
    mean_field_sgd,
    n_min,
    reference_target,
    w2_matching,
)

SHORT = MeanFieldSettings(horizon=0.5, step=0.05)


def inputs(count: int = 200, features: int = 2) -> np.ndarray:
    return np.random.default_rng(77).uniform(-1, 1, (count, features))


@pytest.mark.parametrize("d", [1, 2, 5])
def test_gradient_by_finite_differences(d):
    rng = np.random.default_rng(d)
    neuron, theta, x = TanhNeuron(d), rng.standard_normal((2, 3, d + 2)), rng.standard_normal((2, 4, d))
    weights = rng.standard_normal((2, 4, 3))
    found = neuron.weighted_gradient(theta, x, weights)
    for k in range(d + 2):
        step = np.zeros(d + 2)
        step[k] = 1e-6
        slope = (neuron.value(theta + step, x) - neuron.value(theta - step, x)) / 2e-6
        assert found[..., k] == pytest.approx((weights * slope).sum(-2), abs=1e-8)


def test_curvature_and_lipschitz_bound_the_derivatives():
    rng = np.random.default_rng(0)
    neuron, x = TanhNeuron(2), rng.uniform(-1, 1, (1, 2))
    theta, largest, steepest = 2 * rng.standard_normal((3000, 4)), 0.0, 0.0

    def gradient(at: np.ndarray) -> np.ndarray:
        return neuron.weighted_gradient(at[:, None, :], x, np.ones((len(at), 1, 1)))[:, 0]

    columns = [(gradient(theta + e) - gradient(theta - e)) / 2e-5 for e in 1e-5 * np.eye(4)]
    largest = np.abs(np.linalg.eigvalsh(np.stack(columns, -1))).max()
    steepest = np.linalg.norm(gradient(theta), axis=1).max()
    assert 0.3 * neuron.curvature(x)[0] < largest <= neuron.curvature(x)[0]
    assert 0.3 * neuron.lipschitz(x)[0] < steepest <= neuron.lipschitz(x)[0]


def test_curvature_reference():
    # Squared norm of (x, 1) equal to 3.
    assert TanhNeuron(2).curvature(np.array([[1.0, 1.0]]))[0] == pytest.approx(3.435, abs=5e-4)


def plain_sgd(
    settings: MeanFieldSettings, width: int, seed: int, streams: tuple[int, int, int]
) -> np.ndarray:
    """The update of the theory, one neuron and one example at a time, one batch entry only."""
    from scipy.special import ndtr, ndtri

    edge = ndtr(-3.0)
    start = np.random.default_rng((seed, streams[0], 0, width))
    theta = ndtri(start.uniform(edge, 1 - edge, (width, settings.inputs + 2)))
    data = np.random.default_rng((seed, streams[1], 1))
    noise = np.random.default_rng((seed, streams[2], 2, width))
    for k in range(settings.steps):
        s = settings.step * (settings.schedule(k * settings.step) if settings.schedule else 1)
        x = data.uniform(-1, 1, (settings.batch, settings.inputs))
        move = np.zeros_like(theta)
        for point in x:
            outer = np.tanh(theta[:, 0])
            inner = np.tanh(theta[:, 1:-1] @ point + theta[:, -1])
            residual = settings.target(point) - np.mean(outer * inner)
            direction = np.column_stack(
                [inner / np.cosh(theta[:, 0]) ** 2, np.outer(outer * (1 - inner**2), np.append(point, 1))]
            )
            move += 2 * s * residual * direction / settings.batch
        theta = (1 - 2 * settings.ridge * s) * theta + move
        if settings.temperature:
            g = noise.standard_normal(theta.shape)
            theta += math.sqrt(2 * s * settings.temperature / theta.shape[1]) * g
    return theta


@pytest.mark.parametrize(
    "settings",
    [
        SHORT,
        MeanFieldSettings(inputs=4, horizon=0.3, step=0.05, ridge=0.1, temperature=0.2),
        MeanFieldSettings(horizon=0.4, step=0.1, batch=3, schedule=lambda time: 1 / (1 + time)),
    ],
)
def test_simulator_equals_the_plain_loop(settings):
    found = mean_field_sgd(settings, [1, 7, 2], [3, 4], run=2)
    assert list(found) == [1, 7, 2]
    for width, theta in found.items():
        assert theta.shape == (2, width, settings.inputs + 2)
        for row, seed in zip(theta, (3, 4), strict=True):
            assert row == pytest.approx(plain_sgd(settings, width, seed, (2, 2, 2)), abs=1e-12)


def test_steps_are_counted_without_rounding_away_one():
    assert MeanFieldSettings(horizon=10, step=0.02).steps == 500
    assert MeanFieldSettings(horizon=0.3, step=0.1).steps == 3
    assert MeanFieldSettings(horizon=0.35, step=0.1).steps == 3
    assert MeanFieldSettings(horizon=0.0).steps == 0


def test_initial_cloud_is_bounded_and_standard():
    theta = mean_field_sgd(MeanFieldSettings(horizon=0.0), [20000], [0])[20000][0]
    assert np.abs(theta).max() <= 3
    assert theta.mean() == pytest.approx(0, abs=0.02)
    assert theta.std() == pytest.approx(0.9866, abs=0.01)


def test_training_learns_the_target():
    x = inputs()
    losses = [
        float(((TanhNeuron(2).value(theta, x).mean(-1) - reference_target(x)) ** 2).mean())
        for theta in (mean_field_sgd(MeanFieldSettings(horizon=t), [128], [0])[128] for t in (0.0, 10.0))
    ]
    assert losses[1] < 0.3 * losses[0]


def test_couplings_share_what_they_say():
    still = MeanFieldSettings(horizon=0.0)
    a, b = mean_field_pairs(still, [16], [0, 1], coupling="same_init")[16]
    assert np.array_equal(a, b)
    assert not np.array_equal(a[0], a[1])
    a, b = mean_field_pairs(still, [16], [0], coupling="independent")[16]
    assert not np.isclose(a, b).any()
    # Streams (initial cloud, examples, noise) of B; those of A are all 0.
    noisy = MeanFieldSettings(horizon=0.3, step=0.1, temperature=1.0)
    for coupling, streams in (("independent", (1, 1, 1)), ("same_data", (1, 0, 1)), ("same_init", (0, 1, 1))):
        a, b = mean_field_pairs(noisy, [5], [8], coupling=coupling)[5]  # type: ignore[arg-type]
        assert a[0] == pytest.approx(plain_sgd(noisy, 5, 8, (0, 0, 0)), abs=1e-12)
        assert b[0] == pytest.approx(plain_sgd(noisy, 5, 8, streams), abs=1e-12)


def test_clouds_are_matched_seed_by_seed():
    rng = np.random.default_rng(0)
    a = rng.standard_normal((2, 3, 4))
    b = np.stack([a[0][[1, 2, 0]], a[1][[2, 0, 1]]])
    found = match_clouds(a, b)
    assert np.array_equal(found.matched, a)
    assert found.w2 == pytest.approx([0, 0], abs=1e-12)


def test_error_on_the_line_by_hand():
    rng = np.random.default_rng(1)
    a, b, x, neuron = rng.standard_normal((1, 3, 4)), rng.standard_normal((1, 3, 4)), inputs(5), TanhNeuron(2)
    error = lmc_error(a, b, x, neuron, points=5)
    assert error.shape == (1, 5, 5)

    def network(theta: np.ndarray) -> np.ndarray:
        return np.mean([np.tanh(r[0]) * np.tanh(x @ r[1:3] + r[3]) for r in theta], axis=0)

    quarter = network(0.75 * a[0] + 0.25 * b[0]) - 0.75 * network(a[0]) - 0.25 * network(b[0])
    assert error[0, 1] == pytest.approx(np.abs(quarter))
    assert error[:, [0, -1]] == pytest.approx(0, abs=1e-15)


def check_curvature_bound(seed: int) -> None:
    rng = np.random.default_rng((31, seed))
    d, n = int(rng.integers(1, 6)), int(rng.integers(1, 30))
    spread = rng.exponential()
    a = rng.standard_normal((1, n, d + 2))
    b = a + spread * rng.standard_normal((1, n, d + 2))
    x, neuron = rng.uniform(-1, 1, (20, d)), TanhNeuron(d)
    matched, w2 = match_clouds(a, b)
    error = lmc_error(a, matched, x, neuron).max(1)
    assert (error <= curvature_bound(w2, x, neuron) + 1e-12).all()
    moved = np.linalg.norm(a - matched, axis=-1).mean()
    bound = lipschitz_bound(a, matched, x, neuron)
    assert bound == pytest.approx(neuron.lipschitz(x)[None] * moved / 2)
    assert (error <= bound + 1e-12).all()
    plain = lmc_error(a, b, x, neuron).max(1)  # any order will do
    assert (plain <= lipschitz_bound(a, b, x, neuron) + 1e-12).all()


def test_error_is_below_its_bounds_on_random_clouds():
    for seed in range(150):
        check_curvature_bound(seed)


def test_error_falls_with_the_width_and_stays_below_its_bound():
    curve = mean_field_curve(MeanFieldSettings(), [32, 64, 128, 256], range(4))
    assert (curve.sup_error <= curve.bound).all()
    sup = curve.sup_error.mean(1)
    assert sup[0] / sup[-1] >= 2.5
    slope = np.polyfit(np.log(curve.widths), np.log(curve.w2.mean(1)), 1)[0]
    assert -0.65 <= slope <= -0.40
    # Without matching nothing improves.
    assert curve.unmatched_error.mean(1)[-1] > 10 * sup[-1]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "slope"),
    [
        (MeanFieldSettings(), -0.52),
        (MeanFieldSettings(inputs=4), -0.40),
        (MeanFieldSettings(step=0.1), -0.50),
        (MeanFieldSettings(ridge=1e-3, temperature=1e-2), -0.52),
        (MeanFieldSettings(inputs=4, ridge=1e-3, temperature=1e-2), -0.39),
    ],
)
def test_curves_of_the_note(settings, slope):
    widths = [32, 64, 128, 256, 512, 1024]
    curve = mean_field_curve(settings, widths, range(12))
    assert (curve.sup_error <= curve.bound).all()
    sup, logs = curve.sup_error.mean(1), np.log(widths)
    assert sup[0] / sup[3] >= 2.5
    assert np.polyfit(logs, np.log(curve.w2.mean(1)), 1)[0] == pytest.approx(slope, abs=0.06)
    assert -0.85 < np.polyfit(logs, np.log(sup), 1)[0] < -0.55


def test_matching_functions_instead_of_parameters_fails():
    """Theory, section 6.3: (a, w, b) and (-a, -w, -b) are one function, and their midpoint is zero."""
    neuron, x = TanhNeuron(2), inputs()
    assert neuron.value(-np.ones((1, 4)), x) == pytest.approx(neuron.value(np.ones((1, 4)), x))
    for a, b in mean_field_pairs(MeanFieldSettings(), [64, 256], [0, 1]).values():
        by_function = np.stack(
            [
                c[w2_matching(neuron.value(t, x).T, neuron.value(c, x).T)[1].numpy()]
                for t, c in zip(a, b, strict=True)
            ]
        )
        errors = [lmc_error(a, c, x, neuron).max((1, 2)).mean() for c in (by_function, b)]
        assert errors[0] > 0.15
        assert errors[0] > 0.7 * errors[1]
        assert lmc_error(a, match_clouds(a, b).matched, x, neuron).max((1, 2)).mean() < 0.2 * errors[0]


def test_subnetworks_move_the_output_by_at_most_their_distance():
    """Theory, section 7.2: |f - f_S| <= Lip(x) W_1(cloud, subcloud)."""
    from isthmus.theory import equipartition

    neuron, x = TanhNeuron(2), inputs()
    for seed, theta in enumerate(mean_field_sgd(SHORT, [64], range(5))[64]):
        kept = theta[np.random.default_rng(seed).permutation(64)[:32]]
        gap = np.abs(neuron.value(theta, x).mean(-1) - neuron.value(kept, x).mean(-1))
        labels = equipartition(theta, kept).labels
        w1 = np.linalg.norm(theta - kept[labels], axis=1).mean()
        assert (gap <= neuron.lipschitz(x) * w1).all()


def test_two_runs_are_as_close_as_two_samples_of_one_wide_network():
    found = chaos_test(MeanFieldSettings(horizon=5, step=0.01), 256, range(6), reference_width=1024)
    assert found.runs.shape == found.subsamples.shape == (6,)
    assert 0.8 < found.ratio < 1.25


@pytest.mark.slow
def test_gradient_noise_moves_whole_clouds():
    ratios = [
        chaos_test(MeanFieldSettings(horizon=5, step=step), 1024, range(6)).ratio for step in (0.2, 0.01)
    ]
    assert ratios[0] > 1.3
    assert 0.8 < ratios[1] < 1.25


def test_smallest_width_never_rises_with_the_error():
    settings = MeanFieldSettings(horizon=1, step=0.1)
    errors = [0.01, 0.02, 0.03, 0.05, 0.08, 0.2]
    found = n_min(settings, errors, delta=0.34, seeds=range(6), largest=512)
    assert [f.error for f in found] == errors
    widths = [f.enough if f.enough is not None else math.inf for f in found]
    assert all(a >= b for a, b in itertools.pairwise(widths))
    assert len(set(widths)) > 3
    for bracket in found:
        if bracket.enough is not None:
            assert bracket.fails < bracket.enough
            assert bracket.enough <= max(1.2 * bracket.fails, bracket.fails + 1, 8)


def test_smallest_width_brackets_are_right():
    settings = MeanFieldSettings(horizon=0.5, step=0.1)
    (bracket,) = n_min(settings, 0.03, delta=0.25, seeds=range(8), resolution=1.5)
    assert bracket.enough is not None
    for width, passes in ((bracket.enough, True), (bracket.fails, False)):
        error = mean_field_curve(settings, [width], range(8)).sup_error[0]
        assert (np.sort(error)[5] <= 0.03) == passes
    assert n_min(settings, 5.0, delta=0.0, seeds=[0])[0] == (5.0, 0, 8)
    assert n_min(settings, 1e-9, delta=0.0, seeds=[0], largest=16)[0] == (1e-9, 16, None)


@pytest.mark.slow
def test_smallest_widths_of_the_note():
    settings = MeanFieldSettings(horizon=5, step=0.05)
    found = n_min(settings, [0.04, 0.02, 0.01], delta=0.34, seeds=range(6))
    for bracket, expected in zip(found, (27, 64, 128), strict=True):
        assert bracket.enough is not None
        assert expected / 2 < bracket.enough < 2 * expected


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: MeanFieldSettings(inputs=0), DataError, "MeanFieldSettings: inputs"),
        (lambda: MeanFieldSettings(step=0.0), DataError, "step: expected a finite number above 0"),
        (lambda: MeanFieldSettings(temperature=-1), DataError, "MeanFieldSettings: temperature"),
        (lambda: mean_field_sgd(SHORT, [], [0]), DataError, "at least one seed and different widths"),
        (lambda: mean_field_sgd(SHORT, [4, 4], [0]), DataError, "at least one seed and different widths"),
        (lambda: mean_field_sgd(SHORT, [4], []), DataError, "at least one seed and different widths"),
        (lambda: mean_field_sgd(SHORT, [0], [0]), DataError, "widths: expected a finite number at least 1"),
        (
            lambda: mean_field_sgd(MeanFieldSettings(horizon=900, step=1, ridge=5.0), [2], [0]),
            DataError,
            "training diverged with step 1",
        ),
        (
            lambda: mean_field_pairs(SHORT, [4], [0], coupling="none"),  # type: ignore[arg-type]
            DataError,
            "expected a coupling among .*, found 'none'",
        ),
        (lambda: match_clouds(np.ones((1, 2, 3)), np.ones((1, 3, 3))), ShapeError, "clouds of one shape"),
        (
            lambda: lmc_error(np.ones((1, 2, 4)), np.ones((1, 2, 4)), inputs(), TanhNeuron(2), points=1),
            DataError,
            "points: expected a finite number at least 2",
        ),
        (
            lambda: n_min(SHORT, 0.0, delta=0.1, seeds=[0]),
            DataError,
            "errors: expected a finite number above 0",
        ),
        (lambda: n_min(SHORT, 0.1, delta=1.0, seeds=[0]), DataError, "delta below 1, found 1.0"),
        (lambda: n_min(SHORT, 0.1, delta=0.1, seeds=[0], resolution=1.0), DataError, "resolution"),
        (lambda: chaos_test(SHORT, 8, [0], reference_width=15), ShapeError, "need at least 16 neurons"),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()
