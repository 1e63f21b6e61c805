"""Matching: match = objective × coupling solver × schedule; ``align`` is the front door."""

from isthmus.matching._align import OnStage, align, silent, solve
from isthmus.matching._alignment import Alignment
from isthmus.matching._by_class import ByClass
from isthmus.matching._classes import Symmetry, classes_of, solvers_of
from isthmus.matching._constant import CONSTANT_UNITS
from isthmus.matching._dimension import (
    Dimension,
    DimensionTable,
    dimension,
    dimensions_of,
    dimensions_of_both,
)
from isthmus.matching._frank_wolfe import FrankWolfe
from isthmus.matching._grids import Cluster, Facet, Grid, Structure
from isthmus.matching._incremental import Incremental
from isthmus.matching._kronecker import kronecker_objective
from isthmus.matching._layers import Layers, View
from isthmus.matching._line_factors import LayerErrors, line_factors
from isthmus.matching._match import match
from isthmus.matching._methods import METHODS, Found, Method, Methods, by_gradient, method_named
from isthmus.matching._naming import method_under, symmetry_named, symmetry_text
from isthmus.matching._nested import Gain, couple, total_gain
from isthmus.matching._objectives import InnerProduct, MomentObjective, Objective, Term, TermObjective
from isthmus.matching._problem import Problem
from isthmus.matching._schedules import CoordinateDescent, Match, Schedule, SinglePass, Status, Then
from isthmus.matching._solvers import (
    Assignment,
    BalancedProcrustes,
    ComplexFactors,
    LeastSquares,
    PlaneRotations,
    Procrustes,
    ScaledAssignment,
    SidedSolver,
    Sides,
    SignedAssignment,
    Solver,
    assignment_solver,
)
from isthmus.matching._terms import (
    LayeredPair,
    activation_objective,
    covariance_objective,
    incoming_weight_objective,
    weight_objective,
)
from isthmus.matching._trained import GradientSearch
from isthmus.matching._working import Working, working

__all__ = [
    "CONSTANT_UNITS",
    "METHODS",
    "Alignment",
    "Assignment",
    "BalancedProcrustes",
    "ComplexFactors",
    "ByClass",
    "Cluster",
    "InnerProduct",
    "CoordinateDescent",
    "Dimension",
    "DimensionTable",
    "Facet",
    "Found",
    "FrankWolfe",
    "Gain",
    "GradientSearch",
    "Grid",
    "Incremental",
    "LayerErrors",
    "Layers",
    "LeastSquares",
    "Match",
    "Method",
    "Methods",
    "MomentObjective",
    "Objective",
    "OnStage",
    "LayeredPair",
    "PlaneRotations",
    "Problem",
    "Procrustes",
    "Schedule",
    "ScaledAssignment",
    "SidedSolver",
    "Sides",
    "SignedAssignment",
    "SinglePass",
    "Solver",
    "Status",
    "Structure",
    "Symmetry",
    "Term",
    "TermObjective",
    "Then",
    "View",
    "Working",
    "activation_objective",
    "align",
    "by_gradient",
    "classes_of",
    "assignment_solver",
    "couple",
    "covariance_objective",
    "dimension",
    "dimensions_of",
    "dimensions_of_both",
    "incoming_weight_objective",
    "kronecker_objective",
    "line_factors",
    "match",
    "method_named",
    "method_under",
    "silent",
    "solve",
    "solvers_of",
    "symmetry_named",
    "symmetry_text",
    "total_gain",
    "weight_objective",
    "working",
]
