"""Statistics of activations: streaming, mergeable moments, and where in a network they are taken."""

from isthmus.moments._accumulators import CONSTANT_TOLERANCE, CrossMoment, Moment
from isthmus.moments._collect import (
    InputStatistics,
    RowSample,
    cross_moments,
    input_statistics,
    unit_moments,
)
from isthmus.moments._normalisation import chosen_refresh, refresh_batchnorm
from isthmus.moments._patches import Convolution, input_rows
from isthmus.moments._rows import Actions, Frame, Tap
from isthmus.moments._runner import SiteRunner
from isthmus.moments._sites import BatchNorm, Site, find_sites, tensors_met

__all__ = [
    "CONSTANT_TOLERANCE",
    "Actions",
    "BatchNorm",
    "Convolution",
    "CrossMoment",
    "Frame",
    "InputStatistics",
    "Moment",
    "RowSample",
    "Site",
    "SiteRunner",
    "Tap",
    "chosen_refresh",
    "cross_moments",
    "find_sites",
    "input_rows",
    "input_statistics",
    "refresh_batchnorm",
    "tensors_met",
    "unit_moments",
]
