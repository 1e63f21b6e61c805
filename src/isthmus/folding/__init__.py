"""Folding: gains, biases and means of norms, and BatchNorm, into the layers around them; the function stays."""

from isthmus.folding._batch_norms import BatchFold, unit_variance
from isthmus.folding._edits import Edits
from isthmus.folding._fold import Folded, fold
from isthmus.folding._gains import NormFold
from isthmus.folding._means import MeanFold
from isthmus.folding._plan import PARTS, FoldPlan, plan_folds
from isthmus.folding._uses import Refusal

__all__ = [
    "PARTS",
    "BatchFold",
    "Edits",
    "FoldPlan",
    "Folded",
    "MeanFold",
    "NormFold",
    "Refusal",
    "fold",
    "plan_folds",
    "unit_variance",
]
