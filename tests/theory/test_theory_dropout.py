"""Dropout stability of one hidden layer (Theory, section 7) and the dimensions of section 8."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from isthmus.errors import DataError, ShapeError
from isthmus.theory import (
    approximate_dimension,
    approximate_dimension_unbiased,
    bernoulli_dropout_error,
    dropout_error,
    entropy_rank,
    stable_rank,
)


def layer(seed: int, units: int = 40, features: int = 3, samples: int = 100):
    """Return inputs, incoming weights, activations and outgoing weights of a random ReLU layer."""
    rng = np.random.default_rng(seed)
    x, w = rng.standard_normal((samples, features)), rng.standard_normal((units, features))
    return x, w, np.maximum(x @ w.T, 0), rng.standard_normal((2, units))


@pytest.mark.parametrize("p", [0.0, 0.2, 0.5, 0.8])
def test_exact_bernoulli_equals_simulation(p):
    _, _, phi, a = layer(0)
    masks = (np.random.default_rng(1).random((2000, 40)) >= p) / (1 - p)
    squares = [(((phi * (mask - 1)) @ a.T) ** 2).sum(1).mean() for mask in masks]
    assert bernoulli_dropout_error(phi, a, p) == pytest.approx(math.sqrt(np.mean(squares)), rel=0.05)


def test_half_by_enumeration():
    # Two units: one is kept and doubled, so the output moves by plus or minus the difference of the two.
    _, _, phi, a = layer(2, units=2)
    moved = (phi * [1.0, -1.0]) @ a.T
    found = dropout_error(phi, a, "half", rng=np.random.default_rng(0), masks=3)
    assert found == pytest.approx(math.sqrt((moved**2).sum(1).mean()))
    assert dropout_error(phi[:, :1], a[:, :1], "half", rng=np.random.default_rng(0)) == 0


def test_half_is_unbiased_with_an_odd_number_of_units():
    _, _, phi, a = layer(3, units=3)
    # Each pair of three is kept, scaled by 3/2.
    squares = [
        (((phi * (np.where(np.arange(3) == out, 0, 1.5) - 1)) @ a.T) ** 2).sum(1).mean() for out in range(3)
    ]
    found = dropout_error(phi, a, "half", rng=np.random.default_rng(0), masks=4000)
    assert found == pytest.approx(math.sqrt(np.mean(squares)), rel=0.02)


def test_matched_pairs_of_twins_cost_nothing():
    # Twins are only kept apart by the random halves: four units, two pairs of twins.
    _, w, _, a = layer(4, units=2)
    x = np.random.default_rng(0).standard_normal((50, 3))
    w, a = np.repeat(w, 2, axis=0), np.repeat(a, 2, axis=1)
    phi = np.maximum(x @ w.T, 0)
    found = [
        dropout_error(phi, a, "matched", rng=np.random.default_rng(s), input_weight=w) for s in range(12)
    ]
    assert min(found) == pytest.approx(0, abs=1e-12)
    assert dropout_error(phi, a, "half", rng=np.random.default_rng(0)) > 0.1


@pytest.mark.parametrize("units", [1, 2, 7, 40])
def test_matched_masks_keep_one_of_each_pair(units):
    from isthmus.theory._dropout import _matched_masks

    _, w, phi, a = layer(5, units=units)
    masks = _matched_masks(phi, a, w, None, 50, np.random.default_rng(0))
    assert set(np.unique(masks)) <= {0.0, 1.0, 2.0}
    assert (masks.sum(1) == units).all()
    if units > 1:
        assert masks.mean(0) == pytest.approx(1, abs=0.5)


def test_matching_beats_random_halves_and_ignores_the_scale_of_layers():
    x, w, phi, a = layer(6, units=256)
    sigma = x.T @ x / len(x)
    half = dropout_error(phi, a, "half", rng=np.random.default_rng(0))
    matched = [
        dropout_error(
            phi * c, a / c, "matched", rng=np.random.default_rng(0), input_weight=w * c, second_moment=sigma
        )
        for c in (1.0, 1e3, 1e-3)
    ]
    assert matched[0] < 0.7 * half
    assert matched == pytest.approx([matched[0]] * 3)


def test_half_falls_as_the_root_of_the_width():
    widths, errors = [32, 64, 128, 256, 512, 1024], []
    for m in widths:
        runs = [layer(seed, m, 3) for seed in range(12)]
        errors.append(
            np.mean(
                [
                    dropout_error(phi, a / m, "half", rng=np.random.default_rng(s), masks=20)
                    for s, (_, _, phi, a) in enumerate(runs)
                ]
            )
        )
    assert -0.56 <= np.polyfit(np.log(widths), np.log(errors), 1)[0] <= -0.42


def test_tensors_are_taken():
    _, w, phi, a = layer(7)
    tensors = [torch.from_numpy(v).float().requires_grad_() for v in (phi, a, w)]
    assert bernoulli_dropout_error(*tensors[:2]) == pytest.approx(bernoulli_dropout_error(phi, a), rel=1e-6)
    found = dropout_error(*tensors[:2], "matched", rng=np.random.default_rng(0), input_weight=tensors[2])
    assert found == pytest.approx(
        dropout_error(phi, a, "matched", rng=np.random.default_rng(0), input_weight=w), rel=1e-5
    )


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda p, a: bernoulli_dropout_error(p, a[:, :3]), ShapeError, "40 activations but 3 columns"),
        (lambda p, a: bernoulli_dropout_error(p, a, 1.0), DataError, "probability below 1, found 1.0"),
        (
            lambda p, a: bernoulli_dropout_error(p, a, -0.1),
            DataError,
            "probability: expected a finite number",
        ),
        (
            lambda p, a: dropout_error(p, a, "all", rng=np.random.default_rng(0)),
            DataError,
            "kind 'half' or 'matched', found 'all'",
        ),
        (
            lambda p, a: dropout_error(p, a, "half", rng=np.random.default_rng(0), masks=0),
            DataError,
            "masks: expected a finite number at least 1",
        ),
        (
            lambda p, a: dropout_error(p, a, "matched", rng=np.random.default_rng(0)),
            ShapeError,
            "give input_weight",
        ),
        (
            lambda p, a: dropout_error(
                p, a, "matched", rng=np.random.default_rng(0), input_weight=np.ones((3, 3))
            ),
            ShapeError,
            "expected 40 rows of input_weight, found 3",
        ),
    ],
)
def test_bad_input(call, error, message):
    _, _, phi, a = layer(8)
    with pytest.raises(error, match=message):
        call(phi, a)


def test_dimension_references():
    matrix = np.random.default_rng(0).standard_normal((512, 64))
    assert approximate_dimension(matrix) == pytest.approx(56.573236258244, rel=1e-10)
    assert approximate_dimension(matrix) == pytest.approx(512 * 64 / (512 + 64 + 1), abs=1)
    assert approximate_dimension(matrix.T * 1e30) == pytest.approx(56.573236258244, rel=1e-10)
    assert stable_rank(matrix) == pytest.approx(36.0895, abs=1e-4)
    assert entropy_rank(matrix) == pytest.approx(59.9312, abs=1e-4)


def test_u_statistic_removes_the_bias_of_few_samples():
    spectrum = 1 / np.arange(1, 65)
    truth = spectrum.sum() ** 2 / (spectrum**2).sum()
    assert truth == pytest.approx(13.811, abs=1e-3)
    draws = [np.random.default_rng(s).standard_normal((200, 64)) * np.sqrt(spectrum) for s in range(40)]
    plug_in = np.mean([approximate_dimension(h) for h in draws])
    unbiased = np.mean([approximate_dimension_unbiased(h) for h in draws])
    assert plug_in < 0.96 * truth
    assert unbiased == pytest.approx(truth, rel=0.025)
