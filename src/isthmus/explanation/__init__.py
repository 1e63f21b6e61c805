"""What a barrier consists of: an exact split of the loss, and the layers in which it arises."""

from isthmus.explanation._explain import Explanation, explain
from isthmus.explanation._layers import LayerStatistics
from isthmus.explanation._prefixes import Stage
from isthmus.explanation._split import BarrierSplit, ClassShare

__all__ = ["BarrierSplit", "ClassShare", "Explanation", "LayerStatistics", "Stage", "explain"]
