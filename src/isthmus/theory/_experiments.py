r"""The theory's tables as plain data: what the command line prints, the figures draw and a lesson shows.

Every function returns numbers, strings, lists and dictionaries only (``None`` stands for infinite or unknown), which
:func:`isthmus.report.draw_theory` draws and ``json`` writes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

from isthmus.errors import DataError, ShapeError
from isthmus.theory._box import box_upper
from isthmus.theory._dropout import bernoulli_dropout_error, dropout_error
from isthmus.theory._gaussian import isotropic_gaussian_upper
from isthmus.theory._inputs import FloatArray, read_array, read_integer, read_number
from isthmus.theory._low_dimension import low_dimension_bounds, low_dimension_rows
from isthmus.theory._lower import nearest_neighbour_lower, volume_lower
from isthmus.theory._mean_field import MeanFieldSettings, SharedDraws
from isthmus.theory._mean_field_experiment import WidthBracket, chaos_test, mean_field_curve, n_min
from isthmus.theory._rates import RateCurve, fit_dimension, rate_curve, rate_curve_of_rows
from isthmus.theory._tower import Tower
from isthmus.theory._width import (
    entezari_log10_width,
    layer_tolerance,
    log_width_low_dimension,
    log_width_lower,
    log_width_sub_gaussian,
    log_width_upper,
    width_recursion,
)
from isthmus.transport import approximate_dimension, entropy_rank, stable_rank, w2_matching

__all__ = ["Law", "dimension_record", "dropout_record", "mean_field_record", "rate_record", "width_record"]

Law = Literal["gaussian", "uniform", "low-dim"]

_LN10 = math.log(10)

_FEWEST_ROWS = 8
"""Rows below which a layer has no rate: two sizes of disjoint subsamples are needed."""


def width_record(
    input_dimension: int,
    depth: int,
    epsilon: float,
    *,
    delta: float | None = None,
    proxy: float | None = None,
    signal: int | None = None,
    noise: float = 0.1,
    epsilons: Sequence[float] | None = None,
) -> dict[str, Any]:
    r"""Tabulate how wide a network must be, a priori, to be connected within an error.

    **[O]** with the labels of :func:`width_recursion`, :func:`log_width_lower`, :func:`entezari_log10_width`,
    :func:`log_width_sub_gaussian` and :func:`log_width_low_dimension`.

    Args:
        input_dimension: :math:`m_0`.
        depth: number of hidden layers.
        epsilon: root-mean-square error allowed at the output, relative to outputs of order 1.
        delta: probability of failure, or ``None`` for the expectation (see :func:`layer_tolerance`).
        proxy: variance proxy of a first layer with sub-Gaussian weights; ``None`` leaves it out.
        signal: signal axes of a first layer whose weights are of low dimension; ``None`` leaves it out.
        noise: standard deviation of its other axes.
        epsilons: errors for the curves of one hidden layer; nine from 0.01 to 0.5 by default.

    Returns:
        ``layers``: sufficient effective widths for every hidden layer (``fixed_t`` and ``sup_t``, each with
        ``height``, ``value`` and ``text``, see :class:`Tower`); as base-10 logarithms ``necessary`` (first layer, for
        the mean matching error, whatever ``delta``), ``entezari`` (one hidden layer), and ``sub_gaussian`` and
        ``low_dimension`` (first layer; ``fixed_t`` and ``sup_t``, the latter with a ``regime``); ``against_epsilon``
        for one hidden layer, base-10 logarithms; ``against_depth``: the last layer's width for 1 to ``depth`` layers.

    Raises:
        DataError: an argument outside its range.

    Source:
        Theory, sections 4.2 to 4.4.
    """
    wanted = np.geomspace(0.01, 0.5, 9).tolist() if epsilons is None else [float(e) for e in epsilons]
    towers = {
        kind: width_recursion(input_dimension, depth, epsilon, delta=delta, sup_t=kind == "sup_t")
        for kind in _KINDS
    }
    curves: dict[str, list[float]] = {
        "epsilon": wanted,
        "fixed_t": [],
        "sup_t": [],
        "necessary": [],
        "entezari": [],
    }
    for eps in wanted:
        tau2 = _tolerances(1, eps, delta)
        for kind in _KINDS:
            curves[kind].append(log_width_upper(input_dimension, tau2[kind]) / _LN10)
        curves["necessary"].append(_necessary(input_dimension, 1, eps))
        curves["entezari"].append(entezari_log10_width(input_dimension, eps))
    deepest = [
        {
            "depth": layers,
            **{
                kind: _tower(
                    width_recursion(input_dimension, layers, epsilon, delta=delta, sup_t=kind == "sup_t")[-1]
                )
                for kind in _KINDS
            },
        }
        for layers in range(1, depth + 1)
    ]
    tolerances = _tolerances(depth, epsilon, delta)
    return {
        "kind": "width",
        "input_dimension": int(input_dimension),
        "depth": int(depth),
        "epsilon": float(epsilon),
        "delta": None if delta is None else float(delta),
        "layers": [{kind: _tower(towers[kind][k]) for kind in _KINDS} for k in range(depth)],
        "necessary": _necessary(input_dimension, depth, epsilon),
        "entezari": entezari_log10_width(input_dimension, epsilon) if depth == 1 else None,
        "sub_gaussian": None if proxy is None else _sub_gaussian(input_dimension, tolerances, proxy),
        "low_dimension": None
        if signal is None
        else _low_dimension(signal, input_dimension, tolerances, noise),
        "against_epsilon": curves,
        "against_depth": deepest,
    }


_KINDS = ("fixed_t", "sup_t")


def _tolerances(depth: int, epsilon: float, delta: float | None) -> dict[str, float]:
    """Return the squared tolerance per layer, for each ``t`` and for every ``t`` at once."""
    return {kind: layer_tolerance(depth, epsilon, delta=delta, sup_t=kind == "sup_t") ** 2 for kind in _KINDS}


def _necessary(dimension: int, depth: int, epsilon: float) -> float:
    return log_width_lower(dimension, layer_tolerance(depth, epsilon, sup_t=False) ** 2) / _LN10


def _sub_gaussian(dimension: int, tolerances: Mapping[str, float], proxy: float) -> dict[str, float]:
    found = {
        k: log_width_sub_gaussian(dimension, tau2, proxy=proxy) / _LN10 for k, tau2 in tolerances.items()
    }
    return {"proxy": float(proxy), **found}


def _low_dimension(
    signal: int, dimension: int, tolerances: Mapping[str, float], noise: float
) -> dict[str, Any]:
    found = {k: log_width_low_dimension(signal, dimension, tau2, noise) for k, tau2 in tolerances.items()}
    return {
        "signal": int(signal),
        "noise": float(noise),
        **{k: width.log_width / _LN10 for k, width in found.items()},
        "regime": {k: width.regime for k, width in found.items()},
    }


def rate_record(
    law: Law,
    dimension: int,
    sizes: Sequence[int],
    replicates: int | Sequence[int] = 10,
    *,
    signal: int = 3,
    noise: float = 0.0,
    seed: int = 0,
) -> dict[str, Any]:
    r"""Measure :math:`\mathbb E W_2^2` of two samples against their size, between its proven bounds.

    **[P, Theorems 5.3 and 5.4]**, constants **[O]**; labels in detail as in :func:`rate_curve`,
    :func:`volume_lower`, :func:`nearest_neighbour_lower`, :func:`box_upper`,
    :func:`isotropic_gaussian_upper` and :func:`low_dimension_bounds`.

    Args:
        law: ``"gaussian"``, standard; ``"uniform"`` on the unit cube; ``"low-dim"``: ``signal`` standard Gaussian axes
            and noise on the others.
        dimension: number of axes.
        sizes: rows of each sample, rising.
        replicates: pairs per size.
        signal: signal axes of ``"low-dim"``.
        noise: standard deviation of the other axes of ``"low-dim"``.
        seed: see :func:`rate_curve`.

    Returns:
        ``sizes``, ``means``, ``errors``, the bounds ``lower``, ``nearest`` (Gaussian law only), ``upper``, the
        ``trivial`` bound; for ``low-dim`` the ``floor`` :math:`2(D-k)\eta^2`, the noise that stays when only the
        signal is matched (matching the noise too can go below it); and the ``fit`` of the dimension.

    Raises:
        DataError: an unknown law, or an argument outside its range.
        ShapeError: more signal axes than axes.

    Source:
        Theory, sections 2 and 5.
    """
    d = read_integer(dimension, "rate: dimension")
    floor: float | None = None
    nearest: list[float] | None = None
    if law == "gaussian":
        curve = rate_curve(lambda rng, m: rng.standard_normal((m, d)), sizes, replicates, seed=seed)
        lower = [volume_lower(math.log(m), d) for m in curve.sizes]
        nearest = [nearest_neighbour_lower(m, d) for m in curve.sizes]
        upper, trivial = [isotropic_gaussian_upper(math.log(m), d) for m in curve.sizes], 2.0 * d
    elif law == "uniform":
        curve = rate_curve(lambda rng, m: rng.random((m, d)), sizes, replicates, seed=seed)
        lower = [volume_lower(math.log(m), d, log_density=0.0) for m in curve.sizes]
        upper, trivial = [box_upper(m, [1.0] * d) for m in curve.sizes], d / 6
    elif law == "low-dim":
        eta = read_number(noise, "rate: noise", least=0)
        bounds = [low_dimension_bounds(m, signal, d, eta) for m in sizes]
        curve = rate_curve(
            lambda rng, m: low_dimension_rows(rng, m, signal, d, eta), sizes, replicates, seed=seed
        )
        lower, upper = [b.lower for b in bounds], [b.upper for b in bounds]
        floor = 2 * (d - signal) * eta**2
        trivial = 2 * signal + floor
    else:
        raise DataError(f"rate: expected a law among 'gaussian', 'uniform' and 'low-dim', found {law!r}.")
    return {
        "kind": "rate",
        "law": law,
        "dimension": d,
        "signal": int(signal) if law == "low-dim" else None,
        "noise": float(noise) if law == "low-dim" else None,
        **_curve(curve),
        "lower": lower,
        "nearest": nearest,
        "upper": upper,
        "trivial": float(trivial),
        "floor": floor,
        "fit": _fit(curve),
    }


def dimension_record(
    layers: Mapping[str, Any], *, replicates: int = 10, largest: int = 1024, seed: int = 0
) -> dict[str, Any]:
    r"""Measure the dimensions of the clouds of neurons of given layers.

    **[O]** :func:`rate_curve_of_rows` and :func:`fit_dimension`, beside the approximate dimension **[P, section 6]**.

    Args:
        layers: by name, incoming weights with one neuron a row, shape ``(units, features)``.
        replicates: random splits per size.
        largest: largest subsample.
        seed: of the splits.

    Returns:
        ``layers``, one entry each: ``rows``, ``features``, the rate curve, its ``fit``, ``approximate`` and
        ``approximate_centred`` dimension, ``stable_rank``, ``entropy_rank``; and ``skipped``, the names of layers
        with too few or equal neurons.

    Raises:
        DataError: no layer at all has enough neurons.

    Source:
        Theory, sections 5 and 8.
    """
    found, skipped = [], []
    for name, value in layers.items():
        rows = read_array(value, name)
        curve = None
        if len(rows) >= _FEWEST_ROWS:
            half = min(len(rows) // 2, largest)
            sizes = [2**i for i in range(1 if half < 16 else 3, half.bit_length()) if 2**i <= half]
            curve = rate_curve_of_rows(rows, sizes, replicates, seed=seed)
        if curve is None or (curve.means <= 0).any():
            skipped.append(name)
            continue
        found.append(
            {
                "name": name,
                "rows": len(rows),
                "features": rows.shape[1],
                **_curve(curve),
                "fit": _fit(curve),
                "approximate": _finite(approximate_dimension(rows)),
                "approximate_centred": _finite(approximate_dimension(rows, center=True)),
                "stable_rank": _finite(stable_rank(rows)),
                "entropy_rank": _finite(entropy_rank(rows)),
            }
        )
    if not found:
        raise DataError(
            f"dimension: expected at least one layer of {_FEWEST_ROWS} different neurons, found "
            f"{', '.join(layers) or 'no layer'}. Rows must be neurons."
        )
    return {"kind": "dimension", "layers": found, "skipped": skipped}


def mean_field_record(
    settings: MeanFieldSettings,
    widths: Sequence[int],
    seeds: int,
    *,
    steps: Sequence[float] = (),
    errors: Sequence[float] = (),
    delta: float = 0.34,
    reference_width: int = 4096,
    coupling: SharedDraws = "independent",
) -> dict[str, Any]:
    r"""Run Theorem 3.1 as an experiment: error and distance against width, the floor of the step, how wide is enough.

    **[P, Theorem 3.1]**, the experiment **[O]**; assumptions as in :func:`mean_field_curve`, :func:`chaos_test` and
    :func:`n_min`.

    Args:
        settings: see :class:`MeanFieldSettings`.
        widths: numbers of neurons, rising.
        seeds: number of pairs per width.
        steps: SGD steps at which two runs of the largest width are compared with two samples of a wide network.
        errors: errors for which the least sufficient width is sought.
        delta: share of pairs allowed to miss the error.
        reference_width: neurons of the wide network.
        coupling: what the two networks of a pair share, see :func:`mean_field_pairs`; the floor is always that of
            independent runs.

    Returns:
        ``widths``; ``sup_error``, ``w2``, ``bound``, ``unmatched``, each a list per width of one value per seed;
        fitted ``slopes``; ``floor`` and ``n_min``, one entry per step and error.

    Raises:
        DataError: an argument outside its range.
        ShapeError: a reference width below twice the largest width.

    Source:
        Theory, sections 6.4 and 6.5.
    """
    count = read_integer(seeds, "mean field: seeds")
    curve = mean_field_curve(settings, widths, range(count), coupling=coupling)
    floor = []
    for step in steps:
        test = chaos_test(
            _with_step(settings, step), curve.widths[-1], range(count), reference_width=reference_width
        )
        floor.append(
            {
                "step": float(step),
                "runs": float(test.runs.mean()),
                "subsamples": float(test.subsamples.mean()),
                "ratio": test.ratio,
            }
        )
    brackets: list[WidthBracket] = []
    if errors:
        brackets = n_min(settings, list(errors), delta=delta, seeds=range(count), coupling=coupling)
    return {
        "kind": "meanfield",
        "inputs": settings.inputs,
        "parameters": settings.unit.dimension,
        "horizon": settings.horizon,
        "step": settings.step,
        "ridge": settings.ridge,
        "temperature": settings.temperature,
        "coupling": coupling,
        "seeds": count,
        "widths": list(curve.widths),
        "sup_error": curve.sup_error.tolist(),
        "w2": curve.w2.tolist(),
        "bound": curve.bound.tolist(),
        "unmatched": curve.unmatched_error.tolist(),
        "slopes": {
            "sup_error": _slope(curve.widths, curve.sup_error.mean(1)),
            "w2": _slope(curve.widths, curve.w2.mean(1)),
        },
        "floor_width": int(curve.widths[-1]),
        "floor": floor,
        "delta": float(delta),
        "n_min": [{"error": b.error, "fails": b.fails, "enough": b.enough} for b in brackets],
    }


def dropout_record(inputs: int, widths: Sequence[int], seeds: int, *, samples: int = 256) -> dict[str, Any]:
    r"""Compare dropout with the error on the line over width, for random networks of one hidden layer.

    The networks are :math:`\frac1m \sum_i a_i\, \mathrm{relu}(\langle w_i, x \rangle)` with standard Gaussian
    :math:`a_i, w_i` and inputs; pairs are matched in :math:`(w_i, a_i)`. **[O]**, an experiment on **[P, appendix
    B.14]**.

    Args:
        inputs: number of inputs.
        widths: hidden units, rising.
        seeds: pairs per width.
        samples: inputs on which root mean squares are taken.

    Returns:
        ``widths``; ``line`` (largest root-mean-square error over ``t``), ``half``, ``bernoulli``, ``matched`` and
        ``w2``, each the mean over pairs per width; and their fitted ``slopes``.

    Raises:
        DataError: an argument outside its range.
        ShapeError: no widths.

    Source:
        Theory, section 7.
    """
    d, count = read_integer(inputs, "dropout: inputs"), read_integer(seeds, "dropout: seeds")
    sizes = [read_integer(m, "dropout: widths", least=2) for m in widths]
    if not sizes:
        raise ShapeError("dropout: expected at least one width, found none.")
    names = ("line", "half", "bernoulli", "matched", "w2")
    means = np.array(
        [np.mean([_dropout_pair(d, m, s, samples) for s in range(count)], axis=0) for m in sizes]
    )
    columns = {name: means[:, i].tolist() for i, name in enumerate(names)}
    slopes = {name: _slope(sizes, means[:, i]) for i, name in enumerate(names)}
    return {"kind": "dropout", "inputs": d, "seeds": count, "widths": sizes, **columns, "slopes": slopes}


def _dropout_pair(d: int, m: int, seed: int, samples: int) -> tuple[float, ...]:
    rng = np.random.default_rng((seed, m, d))
    x = rng.standard_normal((samples, d))
    (w_a, w_b), (a_a, a_b) = rng.standard_normal((2, m, d)), rng.standard_normal((2, m))
    w2, order = w2_matching(np.column_stack([w_a, a_a]), np.column_stack([w_b, a_b]))
    w_b, a_b = w_b[order.numpy()], a_b[order.numpy()]

    def network(w: FloatArray, a: FloatArray) -> FloatArray:
        return np.maximum(x @ w.T, 0) @ a / m

    ends = network(w_a, a_a), network(w_b, a_b)
    line = max(
        float(
            np.sqrt(np.mean((network((1 - t) * w_a + t * w_b, (1 - t) * a_a + t * a_b) - _mix(ends, t)) ** 2))
        )
        for t in np.linspace(0, 1, 11)
    )
    phi, out = np.maximum(x @ w_a.T, 0), a_a[None] / m
    moment = x.T @ x / samples
    half = dropout_error(phi, out, "half", rng=rng, masks=50)
    matched = dropout_error(phi, out, "matched", rng=rng, masks=50, input_weight=w_a, second_moment=moment)
    return line, half, bernoulli_dropout_error(phi, out), matched, w2


def _mix(ends: tuple[FloatArray, FloatArray], t: float) -> FloatArray:
    return (1 - t) * ends[0] + t * ends[1]


def _with_step(settings: MeanFieldSettings, step: float) -> MeanFieldSettings:
    return MeanFieldSettings(**{**vars(settings), "step": float(step)})


def _tower(tower: Tower) -> dict[str, Any]:
    return {"height": tower.height, "value": tower.value, "text": str(tower)}


def _curve(curve: RateCurve) -> dict[str, Any]:
    return {
        "sizes": list(curve.sizes),
        "means": curve.means.tolist(),
        "errors": [_finite(e) for e in curve.errors],
        "replicates": list(curve.replicates),
    }


def _fit(curve: RateCurve) -> dict[str, Any] | None:
    if len(curve.sizes) < 2:
        return None
    fit = fit_dimension(curve)
    return {
        "slope": fit.slope,
        "slope_error": _finite(fit.slope_error),
        "local_slopes": fit.local_slopes.tolist(),
        "dim_asymptotic": _finite(fit.dim_asymptotic),
        "dim_calibrated": _finite(fit.dim_calibrated),
    }


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def _slope(widths: Sequence[int], values: FloatArray) -> float | None:
    if len(widths) < 2 or (values <= 0).any():
        return None
    return float(np.polyfit(np.log(widths), np.log(values), 1)[0])
