"""Couplings between clouds of units: assignment, rotations, factors, ground costs, plans, dimension. Tensors only."""

from isthmus.transport._assignment import Assigned, assign
from isthmus.transport._balance import balancing
from isthmus.transport._costs import ground_cost, w2_matching
from isthmus.transport._dimension import (
    approximate_dimension,
    approximate_dimension_of_moment,
    approximate_dimension_unbiased,
    entropy_rank,
    entropy_rank_of_moment,
    ranks_of_moment,
    stable_rank,
    stable_rank_of_moment,
)
from isthmus.transport._entropic import EntropicPlan, entropic_plan
from isthmus.transport._factors import gain_of_factors, least_squares_factors, norm_factors
from isthmus.transport._rotations import plane_rotations, procrustes

__all__ = [
    "Assigned",
    "assign",
    "ground_cost",
    "w2_matching",
    "balancing",
    "gain_of_factors",
    "least_squares_factors",
    "norm_factors",
    "plane_rotations",
    "procrustes",
    "EntropicPlan",
    "entropic_plan",
    "approximate_dimension",
    "approximate_dimension_of_moment",
    "approximate_dimension_unbiased",
    "entropy_rank",
    "entropy_rank_of_moment",
    "ranks_of_moment",
    "stable_rank",
    "stable_rank_of_moment",
]
