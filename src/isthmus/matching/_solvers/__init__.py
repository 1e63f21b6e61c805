"""Coupling solvers, one for each class of couplings: each turns gains into the best coupling of its class."""

from isthmus.matching._solvers._assignments import (
    Assignment,
    ScaledAssignment,
    SignedAssignment,
    assignment_solver,
)
from isthmus.matching._solvers._general import BalancedProcrustes, LeastSquares
from isthmus.matching._solvers._planes import ComplexFactors
from isthmus.matching._solvers._rotations import PlaneRotations, Procrustes
from isthmus.matching._solvers._sides import Sides, as_sides
from isthmus.matching._solvers._solver import SidedSolver, Solver, as_solver

__all__ = [
    "Assignment",
    "BalancedProcrustes",
    "ComplexFactors",
    "LeastSquares",
    "PlaneRotations",
    "Procrustes",
    "ScaledAssignment",
    "SidedSolver",
    "Sides",
    "SignedAssignment",
    "Solver",
    "as_sides",
    "as_solver",
    "assignment_solver",
]
