"""The output of a network that is scored, where it returns several."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from isthmus.losses import Loss, is_pretrained, outputs_to_score
from isthmus.symmetry import Outputs, named_outputs, output_reader

__all__ = ["compared", "name_of_scored", "reader"]

TakeOutput = Callable[[Any], Tensor]


def reader(outputs: Outputs) -> TakeOutput | None:
    """Return the function that picks the output that a line scores (see :func:`isthmus.symmetry.output_reader`)."""
    return output_reader(outputs, "Measuring a line")


def compared(read: TakeOutput | None, loss: Loss | None, model: nn.Module) -> TakeOutput:
    """Return the function that picks the output in which two networks are compared: the scored one.

    A loss that the network computes itself reads what it reads, whatever was chosen.
    """
    named = isinstance(loss, str) and loss.partition("(")[0].strip() == "model"
    own = named or (loss is None and is_pretrained(model))
    return outputs_to_score if read is None or own else read


def name_of_scored(output: Any, scored: Tensor) -> str | None:
    """Return the name of a tensor among a network's outputs."""
    return next((name for name, t in named_outputs(output, Tensor).items() if t is scored), None)
