"""Measuring the straight line between two networks: losses, barriers, the error of linear connectivity.

This package measures and never edits weights: repairs along the path come in as functions of a state.
"""

from isthmus.connectivity._barrier import Barrier, loss_barrier
from isthmus.connectivity._curve import Curve, Line
from isthmus.connectivity._line import line
from isthmus.connectivity._path import interpolate

__all__ = ["line", "Line", "Curve", "interpolate", "loss_barrier", "Barrier"]
