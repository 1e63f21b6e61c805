"""Losses that are functions of their user's: what they are given, and what they may return."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from isthmus.errors import ShapeError
from isthmus.losses._scores import Scores, averaged
from isthmus.losses._tensors import IGNORED, right_labels

__all__ = ["called", "widened"]


def called(loss: Callable[[Any, Any], Any], outputs: Any, targets: Any, examples: int) -> Scores:
    """Score the outputs of a batch by a function.

    Args:
        loss: see :data:`isthmus.losses.Loss`.
        outputs: a tensor, or whatever the network returned.
        targets: as the batch has them.
        examples: number of examples.

    Raises:
        ShapeError: the function returned neither values for the examples nor a sum and a count.
    """
    with torch.set_grad_enabled(torch.is_grad_enabled() and carries_gradients(outputs)):
        found = loss(outputs, targets)
    if isinstance(found, (tuple, list)) and len(found) == 2:
        return _summed(found[0], found[1], examples)
    if not isinstance(found, Tensor) or found.shape[:1] != (examples,):
        raise ShapeError(
            f"The loss function returned {_shape(found)} for {examples} examples; expected one value per "
            f"example, shape ({examples},) or ({examples}, ...), or a pair (sum, count) of a mean over something else. "
            f"{_advice(loss)}"
        )
    losses, weights = averaged(found, _counted(found, targets))
    correct, counts = right_labels(outputs, targets) if isinstance(outputs, Tensor) else (None, None)
    return Scores(losses, weights, correct, counts)


def _counted(values: Tensor, targets: Any) -> Tensor | None:
    """Return which values count: not the zeros that torch's losses of parts give where a label is -100."""
    if not isinstance(targets, Tensor) or targets.shape != values.shape or targets.is_floating_point():
        return None
    ignored = (targets.to(values.device) == IGNORED) & (values == 0)
    return ~ignored if bool(ignored.any()) else None


def _summed(total: Any, count: Any, examples: int) -> Scores:
    """Read a pair of sum and count: of each example, or of the batch."""
    try:
        sums, counts = (torch.as_tensor(v).cpu().double().flatten() for v in (total, count))
    except (TypeError, ValueError, RuntimeError):
        sums, counts = torch.zeros(0), torch.zeros(0)
    if len(sums) != len(counts) or len(sums) not in (1, examples):
        raise ShapeError(
            f"The loss function returned a pair of {_shape(total)} and {_shape(count)} for {examples} examples; "
            f"expected (sum, count): two numbers, or two tensors of shape ({examples},)."
        )
    if bool((counts < 0).any()) or bool(((counts == 0) & (sums != 0)).any()):
        raise ShapeError(
            "The loss function returned a pair whose second part is no count: it is below 0, or 0 beside a sum. "
            "Return (sum, count), in this order."
        )
    means = torch.where(counts > 0, sums / counts.where(counts > 0, torch.ones_like(counts)), 0.0)
    return Scores(means, counts)


def widened(outputs: Any) -> Any:
    """Return outputs with floating tensors in at least float32, wherever they are; gradients pass."""

    def widen(value: Any) -> Any:
        if isinstance(value, Tensor) and value.is_floating_point():
            return value.to(torch.promote_types(value.dtype, torch.float32))
        return value

    return pytree.tree_map(widen, outputs)


def carries_gradients(outputs: Any) -> bool:
    """Return whether any tensor in outputs depends on something that is being learnt."""
    return any(isinstance(v, Tensor) and v.requires_grad for v in pytree.tree_leaves(outputs))


def _shape(value: Any) -> str:
    return str(tuple(value.shape)) if isinstance(value, Tensor) else type(value).__name__


def _advice(loss: Any) -> str:
    if getattr(loss, "reduction", None) in ("mean", "sum"):
        return f'It has reduction={loss.reduction!r}: build it with reduction="none".'
    return 'Use reduction="none" and average over positions.'
