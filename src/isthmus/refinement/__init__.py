r"""Refinement on the path: what the group of a network is free to choose, learnt so that the path loses little.

Matching compares units. What counts in the end is the loss between two networks, and it can be asked for directly: an
alignment is followed by positive factors, rotations and invertible maps, which leave B's function exactly as it is and
are learnt by gradient from the training loss on the path.
"""

from isthmus.refinement._elements import Elements
from isthmus.refinement._path_loss import PathLoss
from isthmus.refinement._refine import refine
from isthmus.refinement._schedule import REFINED, Refine, refined_method
from isthmus.refinement._settings import RefineSettings

__all__ = ["REFINED", "Elements", "PathLoss", "Refine", "RefineSettings", "refine", "refined_method"]
