r"""Running a model on a state, evaluating it, combining states: shared by lines, merges and studies.

Nothing here changes a module or a state. Outputs are scored in at least float32, sums are float64.
"""

from isthmus.evaluation._ends import checked_ends
from isthmus.evaluation._evaluation import (
    Bound,
    Evaluation,
    Relabels,
    bind,
    check_frame,
    combine_states,
    evaluate,
    floating_dtype,
    relative_difference,
    require_counted,
    require_deterministic,
    require_evaluation,
    require_finite,
)
from isthmus.evaluation._on_tensors import LossOnTensors

__all__ = [
    "Bound",
    "Evaluation",
    "LossOnTensors",
    "Relabels",
    "bind",
    "check_frame",
    "checked_ends",
    "combine_states",
    "evaluate",
    "floating_dtype",
    "relative_difference",
    "require_counted",
    "require_deterministic",
    "require_evaluation",
    "require_finite",
]
