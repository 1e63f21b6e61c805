"""Statistics of activations: streaming, mergeable moments, and where in a network they are taken."""

from isthmus.moments._accumulators import CONSTANT_TOLERANCE, CrossMoment, Moment
from isthmus.moments._channels import ChannelMoment
from isthmus.moments._collect import (
    InputStatistics,
    RowSample,
    cross_moments,
    input_statistics,
    unit_moments,
)
from isthmus.moments._normalisation import (
    Refresh,
    averaged_statistics,
    chosen_refresh,
    keeps_running_statistics,
    refresh_batchnorm,
    some_layers,
    statistics_names,
)
from isthmus.moments._patches import Convolution, input_rows
from isthmus.moments._rows import Actions, Frame, Tap
from isthmus.moments._runner import SiteRunner
from isthmus.moments._sites import BatchNorm, Site, find_sites

__all__ = [
    "CONSTANT_TOLERANCE",
    "Actions",
    "BatchNorm",
    "ChannelMoment",
    "Convolution",
    "CrossMoment",
    "Frame",
    "InputStatistics",
    "Moment",
    "Refresh",
    "RowSample",
    "Site",
    "SiteRunner",
    "Tap",
    "averaged_statistics",
    "chosen_refresh",
    "cross_moments",
    "find_sites",
    "input_rows",
    "input_statistics",
    "keeps_running_statistics",
    "refresh_batchnorm",
    "some_layers",
    "statistics_names",
    "unit_moments",
]
