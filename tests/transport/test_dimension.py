from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from isthmus.errors import DataError, ShapeError
from isthmus.transport import (
    approximate_dimension,
    approximate_dimension_of_moment,
    approximate_dimension_unbiased,
    entropy_rank,
    entropy_rank_of_moment,
    stable_rank,
    stable_rank_of_moment,
)

FROM_FACTOR = [approximate_dimension, stable_rank, entropy_rank]
FROM_MOMENT = [approximate_dimension_of_moment, stable_rank_of_moment, entropy_rank_of_moment]
PAIRS = list(zip(FROM_FACTOR, FROM_MOMENT, strict=True))


def gaussian(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape)


def test_reference_values():
    # Theory, section 8.
    x = gaussian(0, 512, 64)
    assert approximate_dimension(x) == pytest.approx(56.573236258244, rel=1e-12)
    assert approximate_dimension(x) == pytest.approx(512 * 64 / (512 + 64 + 1), abs=1.0)
    assert stable_rank(x) == pytest.approx(36.0895, abs=1e-4)
    assert entropy_rank(x) == pytest.approx(59.9312, abs=1e-4)


@pytest.mark.parametrize(("factor", "moment"), PAIRS)
@pytest.mark.parametrize("shape", [(1, 1), (2, 5), (9, 4)])
def test_factor_and_both_moments_agree(factor, moment, shape):
    x = gaussian(1, *shape)
    expected = factor(x)
    assert expected >= 1.0 - 1e-12
    for second_moment in (x @ x.T, x.T @ x):
        assert moment(second_moment) == pytest.approx(expected, rel=1e-10)
    assert factor(torch.from_numpy(x.T)) == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize(("factor", "moment"), PAIRS)
@pytest.mark.parametrize("scale", [1e-200, 1e-30, 1e30, 1e200])
def test_scale_does_not_matter(factor, moment, scale):
    x = gaussian(2, 7, 5)
    assert factor(scale * x) == pytest.approx(factor(x), rel=1e-12)
    assert moment(scale * (x.T @ x)) == pytest.approx(moment(x.T @ x), rel=1e-12)


@pytest.mark.parametrize("seed", range(10))
def test_order_of_the_three(seed):
    x = gaussian(seed, 12, 6) * 2.0 ** -np.arange(6)
    assert 1 <= stable_rank(x) <= approximate_dimension(x) <= entropy_rank(x) <= 6


@pytest.mark.parametrize("function", FROM_FACTOR + FROM_MOMENT)
def test_zero_has_no_dimension_and_rank_one_has_one(function):
    assert math.isnan(function(np.zeros((3, 3))))
    assert function(np.ones((3, 3))) == pytest.approx(1.0, rel=1e-12)


@pytest.mark.parametrize("function", FROM_FACTOR)
def test_centring_removes_the_mean_row(function):
    x = gaussian(3, 50, 6)
    assert function(x + 100.0) == pytest.approx(1.0, abs=0.01)
    assert function(x + 100.0, center=True) == pytest.approx(function(x - x.mean(0)), rel=1e-10)
    assert math.isnan(function(np.full((10, 3), 0.1), center=True))


def test_unbiased_estimate_corrects_few_samples():
    spectrum = 1 / np.arange(1, 65)
    truth = spectrum.sum() ** 2 / (spectrum**2).sum()
    draws = [gaussian(seed, 200, 64) * np.sqrt(spectrum) for seed in range(20)]
    plain = np.mean([approximate_dimension(d) for d in draws])
    unbiased = np.mean([approximate_dimension_unbiased(d) for d in draws])
    assert plain == pytest.approx(13.03, abs=0.3)
    assert unbiased == pytest.approx(truth, abs=0.5)
    gram = draws[0] @ draws[0].T
    off_diagonal = (gram**2).sum() - (gram.diagonal() ** 2).sum()
    by_hand = (gram.trace() ** 2 - (gram.diagonal() ** 2).sum()) / off_diagonal
    assert approximate_dimension_unbiased(1e40 * draws[0]) == pytest.approx(by_hand, rel=1e-10)
    assert math.isnan(approximate_dimension_unbiased(np.eye(4)))


@pytest.mark.parametrize(
    ("function", "matrix", "error", "message"),
    [
        (approximate_dimension, np.zeros((0, 3)), ShapeError, "non-empty"),
        (approximate_dimension, np.zeros(3), ShapeError, "expected 2 axes"),
        (approximate_dimension, np.full((2, 2), np.nan), DataError, "4 of 4 entries"),
        (stable_rank_of_moment, np.zeros((2, 3)), ShapeError, "expected a square"),
        (entropy_rank_of_moment, np.triu(np.ones((3, 3))), DataError, "not symmetric"),
        (approximate_dimension_unbiased, np.ones((1, 3)), ShapeError, "at least 2 samples"),
    ],
)
def test_bad_matrices(function, matrix, error, message):
    with pytest.raises(error, match=message):
        function(matrix)
