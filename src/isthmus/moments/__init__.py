"""Statistics of activations: streaming, mergeable moments, taken at the layers of a network."""

from isthmus.layers import BatchNorm as BatchNorm  # kept for code that imports these five from here
from isthmus.layers import Convolution as Convolution
from isthmus.layers import Site as Site
from isthmus.layers import find_sites as find_sites
from isthmus.layers import input_rows as input_rows
from isthmus.moments._accumulators import CONSTANT_TOLERANCE, CrossMoment, Moment
from isthmus.moments._collect import (
    CrossRequest,
    InputRequest,
    InputStatistics,
    Request,
    RowSample,
    UnitRequest,
    collected,
    cross_moments,
    input_statistics,
    unit_moments,
)
from isthmus.moments._normalisation import chosen_refresh, refresh_batchnorm
from isthmus.moments._rows import Actions, Frame, Tap
from isthmus.moments._runner import SiteRunner

__all__ = [
    "CONSTANT_TOLERANCE",
    "Actions",
    "CrossMoment",
    "CrossRequest",
    "Frame",
    "InputRequest",
    "InputStatistics",
    "Moment",
    "Request",
    "RowSample",
    "SiteRunner",
    "Tap",
    "UnitRequest",
    "chosen_refresh",
    "collected",
    "cross_moments",
    "input_statistics",
    "refresh_batchnorm",
    "unit_moments",
]
