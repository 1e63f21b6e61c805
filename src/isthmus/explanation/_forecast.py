r"""Telling a barrier before the line is measured, from moments of the two ends.

One pass over training data gives, for every layer, the share :math:`k_\ell` of the variance that the mean of the two
networks' outputs keeps (:attr:`isthmus.explanation.LayerStatistics.kept`), the spread of the logits and the ends'
losses. The logarithm of the barrier is regressed (ridge) on

.. math:: \log(1-\prod_\ell k_\ell), \quad \sum_\ell\log k_\ell, \quad \log\text{spread}, \quad \text{depth},
    \quad \log\text{loss},

the hidden layers' product and sum. Coefficients belong to the kind of networks, data and training that they were fitted
on: there are none built in.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from isthmus.batches import Batches, first_batch, iterate, reusable
from isthmus.errors import DataError, ModelError
from isthmus.evaluation import Relabels, bind, require_evaluation
from isthmus.explanation._layers import LayerTally
from isthmus.losses import Loss, Scores, completed, scorer_for
from isthmus.paths import seen_layers, watched
from isthmus.replica import Replica
from isthmus.states import check_finite, check_same_architecture, state_of

__all__ = ["BarrierForecast", "ForecastRule", "PairMoments", "fit_forecast", "pair_moments"]

FEWEST = 20
"""Pairs from which a rule is fitted: four for each of its numbers, nearly."""
_FLOOR, _LEAST, _RIDGE = 0.01, 1e-3, 1.0
"""Added to barriers, and to losses and lost shares, before logarithms are taken; and the penalty on a coefficient."""
_LEVEL = 0.9


@dataclass(frozen=True)
class PairMoments:
    """What one pass over training data tells of two networks that are lined up.

    Attributes:
        kept: share of the variance that the mean of both outputs keeps, by layer, the last one's with them.
        spread: standard deviation of the logits about their mean over classes, of A and B together.
        loss: mean of the two losses on these data.
    """

    kept: tuple[float, ...]
    spread: float
    loss: float

    @property
    def features(self) -> Tensor:
        """What the rule reads, float64, shape ``(5,)``."""
        total = sum(math.log(max(k, _LEAST)) for k in self.kept[:-1])
        gone = math.log(1 - math.exp(min(total, 0.0)) + _LEAST)
        sizes = math.log(self.spread + _LEAST), float(len(self.kept) - 1), math.log(self.loss + _LEAST)
        return torch.tensor([gone, total, *sizes], dtype=torch.float64)


@dataclass(frozen=True)
class BarrierForecast:
    """A barrier that was told and not measured.

    Attributes:
        barrier: the forecast, in the unit of the barriers that the rule was fitted on.
        low: lower end of the interval that held 90 % of the pairs that were left out of fits.
        high: its upper end.
        familiar: whether every number that the rule reads lies among those it was fitted on.
        most: the barrier that may be.
        merge: False where even the lower end is above ``most``, True where the upper one is below, else None.
    """

    barrier: float
    low: float
    high: float
    familiar: bool
    most: float

    @property
    def merge(self) -> bool | None:
        """Whether to merge, or None where the forecast cannot tell."""
        if self.low > self.most:
            return False
        return True if self.high <= self.most and self.familiar else None

    def __str__(self) -> str:
        words = {
            False: "do not merge",
            True: "merging should do",
            None: "measure the line before merging",
        }
        strange = "" if self.familiar else " These networks are unlike those the rule was fitted on."
        interval = f"90 %: {self.low:.3g} to {self.high:.3g}"
        return f"Barrier forecast {self.barrier:.3g} ({interval}): {words[self.merge]}.{strange}"


@dataclass(frozen=True, eq=False)
class ForecastRule:
    """A rule that was fitted on pairs whose barrier was measured (:func:`fit_forecast`).

    Attributes:
        coefficients: of the standardised features, after the constant, float64, shape ``(6,)``.
        centre: mean of each feature, shape ``(5,)``.
        width: standard deviation of each.
        range: smallest and largest of each, shape ``(2, 5)``.
        error: factor by which barriers (plus .01) of pairs that were left out differ from their forecast, in 90 % of
            them.
        rank: rank correlation (Spearman) of forecast and barrier over pairs that were left out.
        mean_error: mean absolute difference of the two, in the barriers' unit.
        pairs: number of pairs.
    """

    coefficients: Tensor
    centre: Tensor
    width: Tensor
    range: Tensor
    error: float
    rank: float
    mean_error: float
    pairs: int

    def __call__(self, moments: PairMoments, most: float = 0.1) -> BarrierForecast:
        """Return the forecast for a pair.

        Args:
            moments: see :func:`pair_moments`.
            most: the largest barrier with which merging is worth it, nats for cross-entropy.
        """
        features = moments.features
        value = float(_design(features[None], self.centre, self.width) @ self.coefficients)
        middle = math.exp(value)
        low, high = middle / self.error, middle * self.error
        inside = (features >= self.range[0] - _EDGE) & (features <= self.range[1] + _EDGE)
        told = [max(0.0, v - _FLOOR) for v in (middle, low, high)]
        return BarrierForecast(*told, familiar=bool(inside.all()), most=most)


_EDGE = 1e-9


def pair_moments(
    model_a: nn.Module,
    model_b: nn.Module | Mapping[str, Tensor],
    batches: Batches,
    *,
    alignment: Relabels | None = None,
    loss: Loss | None = None,
) -> PairMoments:
    """Return what a forecast reads: one pass of A and one of B, and no network between them.

    Args:
        model_a: a module in evaluation mode.
        model_b: another of the same architecture, or its state.
        batches: training data with targets.
        alignment: relabelling of B.
        loss: see :data:`isthmus.losses.Loss`.

    Raises:
        ModelError: training mode, or fewer than two layers whose outputs can be seen.
        CheckpointError, ShapeError: different architectures, or NaN or infinite weights.
        DataError: no data, or no targets.
    """
    require_evaluation(model_a, "Model A")
    first = state_of(model_a, "A")
    last = state_of(model_b if alignment is None else alignment.apply(state_of(model_b, "B")), "aligned B")
    check_same_architecture(first, last, "A", "B")
    for state, name in ((first, "A"), (last, "B")):
        check_finite(state, name)
    replica, data = Replica(model_a), reusable(batches)
    shown = completed(model_a, first_batch(data))
    scorer = scorer_for(loss, model_a, shown, bind(replica, first, read=lambda output: output))
    layers, tally = seen_layers(replica, first, scorer.prepare(shown)), LayerTally(0.5)
    scores: list[list[Scores]] = [[], []]
    squares, count = 0.0, 0
    for given in iterate(data):
        batch = scorer.prepare(completed(model_a, given))
        for k, state in enumerate((first, last)):
            run = bind(replica, state, scorer.read)
            run.prepare(batch)
            with watched(replica.module, layers, tally.seeing(k)):
                kept = run(batch)
            scores[k].append(scorer.score(kept, batch))
            vectors, _ = scorer.vectors(scorer.tensor(kept), batch)
            centred = vectors.double() - vectors.double().mean(-1, keepdim=True)
            squares, count = squares + float(centred.square().sum()), count + centred.numel()
        tally.end()
    shares = tuple(layer.kept for layer in tally.result(layers) if layer.kept is not None)
    if len(shares) < 2:
        raise ModelError(
            f"Forecasting a barrier: expected two layers or more whose outputs can be seen, found {len(shares)}. "
            "Measure the line."
        )
    mean = sum(Scores.cat(one).loss for one in scores) / 2
    return PairMoments(shares, math.sqrt(squares / count), mean)


def fit_forecast(
    moments: Sequence[PairMoments], barriers: Sequence[float], groups: Sequence[Hashable] | None = None
) -> ForecastRule:
    """Fit a rule to pairs whose barrier was measured, and judge it on pairs that were left out one after another.

    Args:
        moments: of every pair.
        barriers: of every pair, on whatever data the forecast shall be about.
        groups: what belongs together, such as one pair lined up in several ways: it is left out together. None takes
            each by itself.

    Raises:
        DataError: fewer than 20 groups, lists of different lengths, or a barrier that is negative or not finite.
    """
    labels = list(range(len(moments))) if groups is None else list(groups)
    if not len(moments) == len(barriers) == len(labels):
        raise DataError(
            f"Fitting a forecast: expected a barrier and a group for each of {len(moments)} pairs, found "
            f"{len(barriers)} barriers and {len(labels)} groups."
        )
    if not all(math.isfinite(b) and b >= 0 for b in barriers):
        raise DataError("Fitting a forecast: expected barriers that are finite and not negative.")
    kinds = list(dict.fromkeys(labels))
    if len(kinds) < FEWEST:
        raise DataError(
            f"Fitting a forecast: expected {FEWEST} pairs or more, found {len(kinds)}. Measure more of them, with "
            "other widths, depths or learning rates."
        )
    features = torch.stack([m.features for m in moments])
    values = torch.tensor([math.log(b + _FLOOR) for b in barriers], dtype=torch.float64)
    left_out = torch.zeros_like(values)
    for kind in kinds:
        out = torch.tensor([label == kind for label in labels])
        coefficients, centre, width = _ridge(features[~out], values[~out])
        left_out[out] = _design(features[out], centre, width) @ coefficients
    coefficients, centre, width = _ridge(features, values)
    misses = (left_out - values).abs().sort().values
    at = min(len(misses), math.ceil(_LEVEL * (len(misses) + 1))) - 1
    return ForecastRule(
        coefficients,
        centre,
        width,
        torch.stack([features.amin(0), features.amax(0)]),
        error=math.exp(float(misses[at])),
        rank=_rank_correlation(left_out, values),
        mean_error=float((left_out.exp() - values.exp()).abs().mean()),
        pairs=len(kinds),
    )


def _ridge(features: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    centre, spread = features.mean(0), features.std(0, correction=0)
    width = torch.where(spread > 0, spread, torch.ones_like(spread))
    design = _design(features, centre, width)
    penalty = _RIDGE * torch.eye(design.shape[1], dtype=torch.float64)
    penalty[0, 0] = 0
    return torch.linalg.solve(design.T @ design + penalty, design.T @ values), centre, width


def _design(features: Tensor, centre: Tensor, width: Tensor) -> Tensor:
    scaled = (features - centre) / width
    return torch.cat([torch.ones(len(scaled), 1, dtype=torch.float64), scaled], 1)


def _rank_correlation(first: Tensor, second: Tensor) -> float:
    ranks = [_ranks(v) - (len(v) - 1) / 2 for v in (first, second)]
    return float(ranks[0] @ ranks[1] / (ranks[0].norm() * ranks[1].norm()))


def _ranks(values: Tensor) -> Tensor:
    """Return ranks from 0, equal values with their mean rank."""
    _, inverse, counts = values.unique(return_inverse=True, return_counts=True)
    ends = counts.cumsum(0).double()
    return ((ends + (ends - counts)) / 2 - 0.5)[inverse]
