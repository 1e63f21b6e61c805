"""Grading: what every operator does to factors and matrices on the units, from a white list of operators."""

from isthmus.symmetry._grading.layers import LAYERS
from isthmus.symmetry._grading.moves import MOVES
from isthmus.symmetry._grading.pointwise import POINTWISE
from isthmus.symmetry._grading.recurrent import RECURRENT
from isthmus.symmetry._grading.reductions import REDUCTIONS
from isthmus.symmetry._grading.walk import Graded, GradeRule, Grading

__all__ = ["RULES", "Graded", "Grading", "GradeRule"]

RULES: dict[str, GradeRule] = {**MOVES, **POINTWISE, **LAYERS, **RECURRENT, **REDUCTIONS}
"""The white list. An operator that is not on it leaves its units nothing but permutations."""
