"""What a barrier consists of: an exact split of the loss, and the layers in which it arises; and a forecast of it."""

from isthmus.explanation._explain import Explanation, explain
from isthmus.explanation._forecast import (
    BarrierForecast,
    ForecastRule,
    PairMoments,
    fit_forecast,
    pair_moments,
)
from isthmus.explanation._layers import LayerStatistics
from isthmus.explanation._prefixes import Stage
from isthmus.explanation._split import BarrierSplit, ClassShare

__all__ = [
    "BarrierForecast",
    "BarrierSplit",
    "ClassShare",
    "Explanation",
    "ForecastRule",
    "LayerStatistics",
    "PairMoments",
    "Stage",
    "explain",
    "fit_forecast",
    "pair_moments",
]
