"""Measuring paths between two networks: losses, barriers, the error of linear connectivity.

This package measures and never edits weights: what happens to them along the way is the path's own
(:mod:`isthmus.paths`).
"""

from isthmus.connectivity._along import line_along
from isthmus.connectivity._barrier import Barrier, loss_barrier
from isthmus.connectivity._curve import Curve, Line
from isthmus.connectivity._line import line
from isthmus.paths import Path, Refreshed, Repaired, Straight, interpolate

__all__ = [
    "line",
    "line_along",
    "Line",
    "Curve",
    "Path",
    "Straight",
    "Refreshed",
    "Repaired",
    "interpolate",
    "loss_barrier",
    "Barrier",
]
