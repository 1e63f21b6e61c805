"""Losses: by name, of torch, of the network itself, or a function; and how they are averaged over batches.

What runs a network on data asks :func:`scorer_for` once and then scores batch by batch. Nothing here changes a module.
"""

from isthmus.losses._class_rows import class_rows
from isthmus.losses._functions import widened
from isthmus.losses._own import completed, completed_batches, configs_kept, is_pretrained
from isthmus.losses._scorer import Loss, Scorer, outputs_to_score, score, scorer_for
from isthmus.losses._scores import Scores, averaged, mean_over_rows, unless_equal
from isthmus.losses._tensors import class_axis_last

__all__ = [
    "Loss",
    "Scorer",
    "Scores",
    "averaged",
    "class_axis_last",
    "class_rows",
    "completed",
    "completed_batches",
    "configs_kept",
    "is_pretrained",
    "mean_over_rows",
    "outputs_to_score",
    "score",
    "scorer_for",
    "unless_equal",
    "widened",
]
