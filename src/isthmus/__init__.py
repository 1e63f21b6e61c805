"""Isthmus: linear mode connectivity modulo permutation.

Find the relabelling of one network's hidden units that brings it close to another, prove that it changes nothing,
measure the straight line between the two, and merge.

    >>> import torch, isthmus
    >>> a, b = (torch.nn.Sequential(torch.nn.Linear(4, 16), torch.nn.ReLU(), torch.nn.Linear(16, 3)) for _ in "ab")
    >>> alignment = isthmus.align(a, b, args=torch.zeros(1, 4), method="weights")
    >>> sorted(alignment.permutations["0"].tolist()) == list(range(16))
    True
"""

from isthmus.batches import Batch
from isthmus.connectivity import Curve, Line, interpolate, line, line_along, loss_barrier
from isthmus.errors import (
    CheckpointError,
    DataError,
    IsthmusError,
    MissingExtraError,
    ModelError,
    OutputError,
    ShapeError,
    SymmetryError,
    VerificationError,
)
from isthmus.matching import METHODS, Alignment, DimensionTable, align, dimension, match
from isthmus.merging import merge
from isthmus.paths import Path, Refreshed, Repaired, Straight
from isthmus.symmetry import AxisGroup, SymmetrySpec, Verification, apply, discover, verify

__version__ = "0.1.0"

__all__ = [
    "discover",
    "SymmetrySpec",
    "AxisGroup",
    "apply",
    "verify",
    "Verification",
    "align",
    "match",
    "METHODS",
    "Alignment",
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
    "merge",
    "dimension",
    "DimensionTable",
    "Batch",
    "IsthmusError",
    "CheckpointError",
    "DataError",
    "MissingExtraError",
    "ModelError",
    "OutputError",
    "ShapeError",
    "SymmetryError",
    "VerificationError",
]
