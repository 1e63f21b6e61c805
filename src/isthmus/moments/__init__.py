"""Statistics of activations: streaming, mergeable moments, taken at the layers of a network."""

from isthmus.moments._accumulators import CONSTANT_TOLERANCE, CrossMoment, Moment
from isthmus.moments._averages import (
    averaged_buffers,
    averaged_statistics,
    buffers_note,
    some_layers,
    statistics_note,
)
from isthmus.moments._channels import ChannelMoment
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
from isthmus.moments._contributions import OutputMomentRequest, OutputProjections, SlopeRequest
from isthmus.moments._normalisation import (
    Refresh,
    chosen_refresh,
    keeps_running_statistics,
    refresh_batchnorm,
    statistics_names,
)
from isthmus.moments._rows import Actions, Frame, Tap
from isthmus.moments._runner import SiteRunner

__all__ = [
    "CONSTANT_TOLERANCE",
    "Actions",
    "ChannelMoment",
    "CrossMoment",
    "CrossRequest",
    "Frame",
    "InputRequest",
    "InputStatistics",
    "Moment",
    "OutputMomentRequest",
    "OutputProjections",
    "Request",
    "Refresh",
    "RowSample",
    "SiteRunner",
    "SlopeRequest",
    "Tap",
    "UnitRequest",
    "averaged_buffers",
    "averaged_statistics",
    "buffers_note",
    "chosen_refresh",
    "collected",
    "cross_moments",
    "input_statistics",
    "keeps_running_statistics",
    "refresh_batchnorm",
    "some_layers",
    "statistics_names",
    "statistics_note",
    "unit_moments",
]
