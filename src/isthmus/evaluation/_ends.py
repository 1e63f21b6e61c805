"""The two networks between which something is measured, checked."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from isthmus.errors import ModelError
from isthmus.evaluation._evaluation import Relabels, check_frame, require_evaluation
from isthmus.states import State, check_finite, check_same_architecture, state_of

__all__ = ["checked_ends"]


def checked_ends(
    model_a: nn.Module,
    model_b: nn.Module | Mapping[str, Tensor],
    alignment: Relabels | None,
    doing: str,
) -> tuple[State, State, State]:
    """Return the states of A, of B, and of B as an alignment lines it up.

    Args:
        model_a: A, in whose code all are run.
        model_b: B, or its state.
        alignment: B's relabelling towards A.
        doing: how messages begin, such as ``"Measuring a line"``.

    Raises:
        ModelError: A is no module, or a module is in training mode.
        CheckpointError: different keys, or NaN or infinite entries.
        ShapeError: different shapes.
    """
    if not isinstance(model_a, nn.Module):
        raise ModelError(
            f"{doing}: expected model_a to be a torch.nn.Module, found {type(model_a).__name__}. "
            "Only model_b may be a state: it is run in model_a's code."
        )
    require_evaluation(model_a, "Model A")
    if isinstance(model_b, nn.Module):
        require_evaluation(model_b, "Model B")
    state_a, state_b = state_of(model_a, "A"), state_of(model_b, "B")
    check_same_architecture(state_a, state_b)
    check_finite(state_a, "A")
    check_finite(state_b, "B")
    if alignment is None:
        return state_a, state_b, state_b
    end = state_of(alignment.apply(state_b), "aligned B")
    check_frame(alignment, state_a)
    check_same_architecture(state_a, end, "A", "aligned B")
    check_finite(end, "aligned B")
    return state_a, state_b, end
