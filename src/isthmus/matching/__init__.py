"""Matching: match = objective × coupling solver × schedule; ``align`` is the front door."""

from isthmus.matching._align import align
from isthmus.matching._alignment import Alignment
from isthmus.matching._constant import CONSTANT_UNITS
from isthmus.matching._dimension import Dimension, DimensionTable, dimension
from isthmus.matching._grids import Cluster, Facet, Grid, Structure
from isthmus.matching._match import match
from isthmus.matching._methods import METHODS
from isthmus.matching._nested import Gain, Solver, couple, total_gain
from isthmus.matching._objectives import (
    AbstractObjective,
    Comparison,
    MomentObjective,
    Term,
    TermObjective,
)
from isthmus.matching._schedules import (
    AbstractSchedule,
    CoordinateDescent,
    Match,
    SinglePass,
    assignment_solver,
)

__all__ = [
    "CONSTANT_UNITS",
    "METHODS",
    "AbstractObjective",
    "AbstractSchedule",
    "Alignment",
    "Cluster",
    "Comparison",
    "CoordinateDescent",
    "Dimension",
    "DimensionTable",
    "Facet",
    "Gain",
    "Grid",
    "Match",
    "MomentObjective",
    "SinglePass",
    "Solver",
    "Structure",
    "Term",
    "TermObjective",
    "align",
    "assignment_solver",
    "couple",
    "dimension",
    "match",
    "total_gain",
]
