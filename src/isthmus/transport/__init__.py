"""Couplings between clouds of units: assignment, ground costs, entropic plans, dimension. Tensors only."""

from isthmus.transport._assignment import Assigned, assign
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

__all__ = [
    "Assigned",
    "assign",
    "ground_cost",
    "w2_matching",
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
