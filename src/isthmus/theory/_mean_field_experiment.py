r"""Theorem 3.1 as an experiment: matched mean-field networks, their error, and how wide is enough."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from isthmus.errors import DataError, ShapeError
from isthmus.theory._inputs import FloatArray, read_array, read_integer, read_number
from isthmus.theory._mean_field import (
    MeanFieldSettings,
    Neuron,
    SharedDraws,
    mean_field_pairs,
    mean_field_sgd,
)
from isthmus.transport import w2_matching

__all__ = ["ChaosTest", "MatchedClouds", "MeanFieldCurve", "WidthBracket", "chaos_test", "curvature_bound"]
__all__ += ["lipschitz_bound", "lmc_error", "match_clouds", "mean_field_curve", "n_min"]

_TEST_POINTS = 400
_TEST_SEED = 20240502


class MatchedClouds(NamedTuple):
    """Clouds of B placed on those of A.

    Attributes:
        matched: B with its neurons reordered, shape ``(seeds, N, D)``.
        w2: squared transport distance of each pair, shape ``(seeds,)``.
    """

    matched: FloatArray
    w2: FloatArray


def match_clouds(theta_a: FloatArray, theta_b: FloatArray) -> MatchedClouds:
    r"""Match mean-field networks in parameter space, each seed on its own.

    **[O]** The cost is :math:`\lVert \theta - \theta' \rVert^2`. Matching the *functions*
    :math:`\sigma_*(\cdot; \theta_i)` instead is wrong: ``(a, w, b)`` and ``(-a, -w, -b)`` compute the same,
    and halfway between them lies the zero function.

    Args:
        theta_a: clouds of A, shape ``(seeds, N, D)``.
        theta_b: clouds of B, same shape.

    Raises:
        ShapeError: the shapes differ.

    Source:
        Theory, section 6.3.
    """
    a, b = _read_pair(theta_a, theta_b)
    matched, distances = np.empty_like(b), np.empty(len(a))
    for s in range(len(a)):
        distances[s], permutation = w2_matching(a[s], b[s])
        matched[s] = b[s][permutation.numpy()]
    return MatchedClouds(matched, distances)


def lmc_error(
    theta_a: FloatArray, theta_b: FloatArray, x: FloatArray, neuron: Neuron, *, points: int = 21
) -> FloatArray:
    r"""Return :math:`|e(t, x)|` of pairs of networks as they are ordered: match them first.

    :math:`e(t, x) = f_{\theta_t}(x) - (1-t) f_A(x) - t f_B(x)`, the error of **[P, Theorem 3.1]**. No assumption.

    Args:
        theta_a: clouds of A, shape ``(seeds, N, D)``.
        theta_b: clouds of B, same shape; weight ``t``.
        x: inputs, shape ``(samples, inputs)``.
        neuron: the neuron both are made of.
        points: equally spaced ``t``, ends included, at least 2.

    Returns:
        Shape ``(seeds, points, samples)``.

    Raises:
        ShapeError: the shapes differ.
        DataError: fewer than two points.

    Source:
        Theory, sections 1.0 and 6.
    """
    a, b = _read_pair(theta_a, theta_b)
    grid = np.linspace(0.0, 1.0, read_integer(points, "lmc_error: points", least=2))
    end_a, end_b = neuron.value(a, x).mean(-1), neuron.value(b, x).mean(-1)
    errors = [
        np.abs(neuron.value((1 - t) * a + t * b, x).mean(-1) - (1 - t) * end_a - t * end_b) for t in grid
    ]
    return np.stack(errors, axis=1)


def curvature_bound(w2: FloatArray, x: FloatArray, neuron: Neuron) -> FloatArray:
    r"""Bound the error of matched networks by their transport distance.

    .. math:: \sup_t |e(t, x)| \le \tfrac18 M_2(x)\, W_2^2

    **[O]**, by Taylor's formula. Deterministic, for every ``x``; assumes only that ``neuron.curvature``
    bounds the Hessian in the parameters.

    Args:
        w2: squared transport distance of each pair, shape ``(seeds,)``.
        x: inputs, shape ``(samples, inputs)``.
        neuron: the neuron.

    Returns:
        Shape ``(seeds, samples)``.

    Source:
        Theory, section 6.2.
    """
    return np.asarray(w2)[:, None] * neuron.curvature(x) / 8


def lipschitz_bound(theta_a: FloatArray, theta_b: FloatArray, x: FloatArray, neuron: Neuron) -> FloatArray:
    r"""Bound the error of networks as they are ordered by the mean distance of their neurons.

    .. math:: \sup_t |e(t, x)| \le \tfrac12 \mathrm{Lip}(x) \cdot \tfrac1N \sum_i \lVert \Delta\theta_i \rVert

    **[O]**, the gap between slopes (Theory, section 3.2) for every neuron. Deterministic, for every ``x``; assumes
    only that ``neuron.lipschitz`` bounds the gradient in the parameters. It is of first order in the distance where
    :func:`curvature_bound` is of second: the smaller of the two where networks are far apart.

    Args:
        theta_a: clouds of A, shape ``(seeds, N, D)``.
        theta_b: clouds of B, same shape; match them first.
        x: inputs, shape ``(samples, inputs)``.
        neuron: the neuron.

    Returns:
        Shape ``(seeds, samples)``.

    Raises:
        ShapeError: the shapes differ.

    Source:
        Theory, section 6.2.
    """
    a, b = _read_pair(theta_a, theta_b)
    return np.linalg.norm(a - b, axis=-1).mean(-1)[:, None] * neuron.lipschitz(x) / 2


@dataclass(frozen=True, eq=False)
class MeanFieldCurve:
    """Matched mean-field pairs against width; every array has shape ``(widths, seeds)``.

    Attributes:
        widths: numbers of neurons.
        w2: squared transport distance of the pair.
        sup_error: largest error over ``t`` and the test inputs.
        bound: largest :func:`curvature_bound` over the test inputs.
        unmatched_error: largest error without matching.
    """

    widths: tuple[int, ...]
    w2: FloatArray
    sup_error: FloatArray
    bound: FloatArray
    unmatched_error: FloatArray


def mean_field_curve(
    settings: MeanFieldSettings,
    widths: Sequence[int],
    seeds: Sequence[int],
    *,
    coupling: SharedDraws = "independent",
    points: int = 21,
) -> MeanFieldCurve:
    """Train pairs at several widths, match them and measure the error on the line.

    The theorem of the paper **[P, Theorem 3.1]** as an experiment **[O]**: the error should fall with the
    width. Errors are taken on 400 fixed test inputs.

    Args:
        settings: see :class:`MeanFieldSettings`.
        widths: numbers of neurons.
        seeds: one pair per seed and width.
        coupling: see :func:`mean_field_pairs`.
        points: points on the line.

    Raises:
        DataError: as :func:`mean_field_pairs`.

    Source:
        Theory, section 6.4.
    """
    x = _test_inputs(settings)
    rows: list[tuple[FloatArray, ...]] = []
    for a, b in mean_field_pairs(settings, widths, seeds, coupling=coupling).values():
        matched, w2 = match_clouds(a, b)
        error = lmc_error(a, matched, x, settings.unit, points=points).max((1, 2))
        plain = lmc_error(a, b, x, settings.unit, points=points).max((1, 2))
        rows.append((w2, error, curvature_bound(w2, x, settings.unit).max(1), plain))
    w2, error, bound, plain = (np.stack(column) for column in zip(*rows, strict=True))
    return MeanFieldCurve(tuple(widths), w2, error, bound, plain)


class WidthBracket(NamedTuple):
    """The least width that is wide enough, up to the resolution of the search.

    Attributes:
        error: the error asked for.
        fails: largest width tried that fails below ``enough``; 0 if the smallest width tried is enough.
        enough: smallest width found to be enough; None if none up to the limit is.
    """

    error: float
    fails: int
    enough: int | None


def n_min(
    settings: MeanFieldSettings,
    errors: float | Sequence[float],
    *,
    delta: float,
    seeds: Sequence[int],
    coupling: SharedDraws = "independent",
    smallest: int = 8,
    largest: int = 2048,
    resolution: float = 1.2,
) -> list[WidthBracket]:
    r"""Find how wide is wide enough: the empirical :math:`N_{min}(\text{error}, \delta)`.

    A width is enough when at least a share ``1 - delta`` of the seeds have
    :math:`\sup_{t, x} |e(t, x)| \le` error. **[O]**, an experiment for **[P, Theorem 3.1]**: widths are
    doubled, then the last doubling is bisected on the log scale. All errors share the trained networks, so
    the answer never rises with the error.

    Args:
        settings: see :class:`MeanFieldSettings`.
        errors: errors asked for, above 0.
        delta: share of seeds allowed to fail, in ``[0, 1)``.
        seeds: the same at every width.
        coupling: see :func:`mean_field_pairs`.
        smallest: first width tried.
        largest: no width above this is tried.
        resolution: stop when the bracket's ends are within this factor, above 1.

    Returns:
        One bracket per error, in the order given.

    Raises:
        DataError: an argument outside its range.

    Source:
        Theory, section 6.5.
    """
    share = read_number(delta, "n_min: delta", least=0)
    if share >= 1:
        raise DataError(f"n_min: expected delta below 1, found {delta}.")
    factor = read_number(resolution, "n_min: resolution", above=1)
    first = read_integer(smallest, "n_min: smallest")
    last = read_integer(largest, "n_min: largest", least=first)
    x = _test_inputs(settings)
    reached: dict[int, float] = {}

    def quantile(width: int) -> float:
        if width not in reached:
            (a, b), *_ = mean_field_pairs(settings, [width], seeds, coupling=coupling).values()
            sups = lmc_error(a, match_clouds(a, b).matched, x, settings.unit).max((1, 2))
            reached[width] = float(np.sort(sups)[math.ceil((1 - share) * len(sups) - 1e-9) - 1])
        return reached[width]

    wanted = [errors] if isinstance(errors, (int, float)) else list(errors)
    brackets = []
    for error in wanted:
        goal = read_number(error, "n_min: errors", above=0)
        fails, enough = 0, first
        while quantile(enough) > goal:
            fails, enough = enough, 2 * enough
            if enough > last:
                break
        if enough > last:
            brackets.append(WidthBracket(goal, fails, None))
            continue
        while fails and enough > factor * fails and enough - fails > 1:
            middle = round(math.sqrt(fails * enough))
            fails, enough = (fails, middle) if quantile(middle) <= goal else (middle, enough)
        brackets.append(WidthBracket(goal, fails, enough))
    return brackets


class ChaosTest(NamedTuple):
    """Squared distances between two runs, and between parts of one very wide network.

    Attributes:
        runs: distance of two independent runs of the given width, shape ``(seeds,)``.
        subsamples: distance of two disjoint subsamples of that width of one wide network, shape ``(seeds,)``.
        ratio: ratio of the means; 1 if the two runs are as good as independent draws from one law.
    """

    runs: FloatArray
    subsamples: FloatArray
    ratio: float


def chaos_test(
    settings: MeanFieldSettings, width: int, seeds: Sequence[int], *, reference_width: int = 4096
) -> ChaosTest:
    """Compare the distance of two runs with that of two samples of neurons of one wide network.

    **[O]**, an experiment for the chaos estimate **[L]** of Mei, Misiakiewicz and Montanari (2019). The noise
    of the gradients moves a whole cloud, so the step must shrink as the width grows for the ratio to stay
    near 1.

    Args:
        settings: see :class:`MeanFieldSettings`.
        width: number of neurons ``N`` of the runs.
        seeds: one pair and one wide network per seed.
        reference_width: neurons of the wide network, at least twice ``width``.

    Raises:
        ShapeError: the wide network is too narrow.
        DataError: as :func:`mean_field_pairs`.

    Source:
        Theory, section 6.4.
    """
    if reference_width < 2 * width:
        raise ShapeError(
            f"chaos_test: two disjoint subsamples of {width} need at least {2 * width} neurons, "
            f"found a reference width of {reference_width}."
        )
    a, b = mean_field_pairs(settings, [width], seeds)[width]
    # Run 2 shares neither initial neurons nor examples with the two runs of the pair.
    wide = mean_field_sgd(settings, [reference_width], seeds, run=2)[reference_width]
    runs = match_clouds(a, b).w2
    subsamples = match_clouds(wide[:, :width], wide[:, width : 2 * width]).w2
    return ChaosTest(runs, subsamples, float(runs.mean() / subsamples.mean()))


def _test_inputs(settings: MeanFieldSettings) -> FloatArray:
    return np.random.default_rng(_TEST_SEED).uniform(-1.0, 1.0, (_TEST_POINTS, settings.inputs))


def _read_pair(theta_a: FloatArray, theta_b: FloatArray) -> tuple[FloatArray, FloatArray]:
    a = read_array(theta_a, "mean field: clouds of A", ndim=3)
    b = read_array(theta_b, "mean field: clouds of B", ndim=3)
    if a.shape != b.shape:
        raise ShapeError(f"Mean field: expected clouds of one shape, found {a.shape} and {b.shape}.")
    return a, b
