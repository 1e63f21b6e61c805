"""Summaries of a study's rows: means with errors, rank correlations with intervals, fitted exponents."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.stats import rankdata

from isthmus.matching import method_under

__all__ = [
    "Correlation",
    "PlaceMean",
    "endpoints_mean",
    "exponent",
    "rank_correlation",
    "summarise",
    "summarise_lines",
    "swept_columns",
    "with_symmetries",
]

Row = Mapping[str, Any]
"""One row of a study, as :func:`isthmus.study.read_rows` returns them."""

SWEEPABLE = (
    "learning_rate",
    "width",
    "depth",
    "epochs",
    "batch_size",
    "family",
    "optimiser",
    "schedule",
    "momentum",
    "weight_decay",
    "warmup_steps",
    "precision",
    "initialisation",
    "network_settings",
    "data",
    "statistics",
    "normalise",
)
"""Columns that a study may sweep, in the order in which one is chosen for the horizontal axis."""


@dataclass(frozen=True)
class PlaceMean:
    """Mean over the pairs at one place of the horizontal axis.

    Attributes:
        x: the place.
        mean: of the values.
        error: standard error of the mean over pairs; ``None`` for a single pair.
        n: pairs.
    """

    x: float
    mean: float
    error: float | None
    n: int


@dataclass(frozen=True)
class Correlation:
    """Spearman's rank correlation.

    Attributes:
        value: between −1 and 1; ``None`` where one side never varies.
        low: lower end of the 95 % bootstrap interval, or ``None``.
        high: upper end.
        n: pairs of values.
    """

    value: float | None
    low: float | None
    high: float | None
    n: int


def with_symmetries(rows: Iterable[Row]) -> list[Row]:
    """Return the rows with methods named by what they match by, where that is more than permutations."""
    return [
        row
        if row.get("symmetry", "none") in ("none", "permutations")
        else {**row, "method": method_under(row["method"], row["symmetry"])}
        for row in rows
    ]


def swept_columns(rows: Iterable[Row]) -> tuple[str, ...]:
    """Return the columns with more than one value, in the order of :data:`SWEEPABLE`."""
    listed = list(rows)
    return tuple(c for c in SWEEPABLE if len({r.get(c) for r in listed}) > 1)


def summarise(rows: Iterable[Row], x: str, y: str | Callable[[Row], float | None]) -> list[PlaceMean]:
    """Return the mean of ``y`` at every value of the numeric column ``x``, rising.

    Args:
        rows: of one method, refresh and split.
        x: name of the column.
        y: name of a column, or a function of a row; rows where it is ``None`` are left out.
    """
    groups: dict[float, list[float]] = {}
    for row in rows:
        value = row[y] if isinstance(y, str) else y(row)
        if value is not None:
            groups.setdefault(float(row[x]), []).append(float(value))
    return _points(groups)


def summarise_lines(rows: Iterable[Row], column: str) -> list[PlaceMean]:
    """Return the mean over pairs of values along the line, at evenly spaced positions from 0 to 1.

    Args:
        rows: of one method, refresh, split and place, one per pair.
        column: of lists, such as ``"loss_at"``; values that were not finite (``None``) are left out.
    """
    groups: dict[float, list[float]] = {}
    for row in rows:
        for i, value in enumerate(row[column]):
            if value is not None:
                groups.setdefault(i / (len(row[column]) - 1), []).append(float(value))
    return _points(groups)


def _points(groups: Mapping[float, Sequence[float]]) -> list[PlaceMean]:
    points: list[PlaceMean] = []
    for place, values in sorted(groups.items()):
        n = len(values)
        error = float(np.std(values, ddof=1)) / math.sqrt(n) if n > 1 else None
        points.append(PlaceMean(place, float(np.mean(values)), error, n))
    return points


def rank_correlation(
    x: Sequence[float],
    y: Sequence[float],
    clusters: Sequence[Any],
    *,
    strata: Sequence[Any] | None = None,
    resamples: int = 2000,
    seed: int = 0,
) -> Correlation:
    r"""Return Spearman's rank correlation with a percentile bootstrap interval of 95 %.

    Args:
        x: values.
        y: values, as many.
        clusters: what each pair of values belongs to; whole clusters are drawn, since values that share their
            seeds are not independent.
        strata: if given, ranks are taken within each stratum (such as a learning rate) and then pooled, so
            that differences between strata do not count.
        resamples: bootstrap samples.
        seed: of the bootstrap.

    Notes:
        With few clusters the interval is coarse and tends to be too narrow; read it beside ``n``. With fewer than
        three there is none.
    """
    values = np.column_stack([np.asarray(x, float), np.asarray(y, float)])
    within = (
        np.zeros(len(values), int)
        if strata is None
        else np.unique(list(map(str, strata)), return_inverse=True)[1]
    )
    names, member = np.unique(list(map(str, clusters)), return_inverse=True)
    rows_of = [np.flatnonzero(member == k) for k in range(len(names))]
    value = _ranked(values, within)
    generator = np.random.default_rng(seed)
    drawn: list[float] = []
    for _ in range(resamples if len(names) > 2 else 0):
        chosen = np.concatenate([rows_of[k] for k in generator.integers(len(names), size=len(names))])
        found = _ranked(values[chosen], within[chosen])
        if found is not None:
            drawn.append(found)
    low, high = (float(q) for q in np.quantile(drawn, [0.025, 0.975])) if drawn else (None, None)
    return Correlation(value, low, high, len(values))


def _ranked(values: np.ndarray, within: np.ndarray) -> float | None:
    ranks = np.empty_like(values)
    for stratum in np.unique(within):
        rows = within == stratum
        ranked = rankdata(values[rows], axis=0)
        ranks[rows] = ranked - ranked.mean(0)
    norms = np.sqrt((ranks**2).sum(0))
    return float(ranks[:, 0] @ ranks[:, 1] / norms.prod()) if norms.min() > 0 else None


def exponent(points: Sequence[PlaceMean]) -> tuple[float, float] | None:
    """Fit ``mean ∝ x**slope`` by least squares on logarithms; return the slope and its standard error.

    Returns:
        ``None`` with fewer than three points, or where one is not positive: leaving it out would bend the fit.
    """
    used = [p for p in points if p.x > 0 and p.mean > 0]
    if len(used) < max(3, len(points)):
        return None
    x, y = np.log([p.x for p in used]), np.log([p.mean for p in used])
    centred = x - x.mean()
    slope = float(centred @ y / (centred @ centred))
    residual = y - y.mean() - slope * centred
    return slope, float(np.sqrt(residual @ residual / (len(used) - 2) / (centred @ centred)))


def endpoints_mean(column: str) -> Callable[[Row], float] | None:
    """Return the mean of the endpoints that goes with a measure at the midpoint."""
    what = {"midpoint_loss": "loss", "midpoint_accuracy": "accuracy"}.get(column)
    return None if what is None else lambda r: (r[f"{what}_a"] + r[f"{what}_b"]) / 2
