"""Outputs and targets that may be meant otherwise than they are read: noted, or refused."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import is_dataclass
from typing import Any

import torch
from torch import Tensor, nn

from isthmus.batches import Batch
from isthmus.errors import DataError, ModelError, printable
from isthmus.losses._own import is_pretrained
from isthmus.losses._tensors import CrossEntropy, TensorLoss, class_axis_last

__all__ = ["are_next_tokens", "doubts", "not_moved", "refuse_own_tokens", "refuse_values"]


def doubts(loss: TensorLoss, output: Any, scored: Tensor, targets: Any) -> tuple[str, ...]:
    """Return what of a network's outputs may be meant otherwise than it is read.

    Raises:
        ModelError: a single number would be scored.
    """
    if scored.ndim == 0:
        raise ModelError(
            "The first tensor that the model returns is a single number, so it cannot be scored example by example. "
            "Return the logits or predictions first, or pass loss= a function of (outputs, targets)."
        )
    notes = _one_of_several(output, scored)
    logits = class_axis_last(scored, targets) if isinstance(targets, Tensor) else None
    if not isinstance(loss, CrossEntropy) or loss.log_probabilities:
        return tuple(notes)
    if logits is not None and logits.shape[-1] > 1 and _are_probabilities(logits):
        notes.append(
            "The outputs add up to 1 over the classes: probabilities, where cross-entropy expects logits, so the loss "
            "is not the one that the network was trained by. Return logits, or pass loss= a function of the "
            "probabilities."
        )
    either = scored.ndim > 2 and scored.shape[:-1] == scored.shape[:1] + scored.shape[2:]
    if logits is not None and either and not loss.class_axis_first:
        notes.append(
            f"Outputs {_shape(scored)} for labels {_shape(targets)} can have their classes on axis 1 or on the last; "
            "the last is taken. If they are on axis 1, pass torch.nn.CrossEntropyLoss()."
        )
    return tuple(notes)


def _one_of_several(output: Any, scored: Tensor) -> list[str]:
    """Return a note where the tensor that is scored is one of several, and none is called logits."""
    several = {name: t for name, t in _tensors(output, "") if t.is_floating_point() and t.ndim > 0}
    if len(several) < 2 or _has_logits(output):
        return []
    shown = {name: repr(printable(name)) for name in several}
    first = next((shown[name] for name, t in several.items() if t is scored), "")
    listed = ", ".join(f"{shown[name]} {_shape(t)}" for name, t in several.items())
    return [
        f"The network returns {len(several)} outputs ({listed}), of which the first, {first}, is scored. For another "
        "one let the network return it first or as 'logits', pass loss= a function of (outputs, targets), which gets "
        "all of them, or, to measure a line, outputs= (on the command line --outputs)."
    ]


def _tensors(output: Any, name: str) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors in a network's outputs by name, those called loss left out."""
    if isinstance(output, Tensor):
        yield name, output
        return
    if is_dataclass(output) and not isinstance(output, (type, Mapping)):
        output = vars(output)
    if isinstance(output, (tuple, list)):
        output = dict(enumerate(output))
    for key, part in output.items() if isinstance(output, Mapping) else ():
        if key != "loss":
            yield from _tensors(part, f"{name}.{key}" if name else str(key))


def _has_logits(output: Any) -> bool:
    named = isinstance(output, Mapping) and output.get("logits") is not None
    return named or isinstance(getattr(output, "logits", None), Tensor)


def _shape(tensor: Tensor) -> str:
    return str(tuple(tensor.shape))


def _are_probabilities(logits: Tensor) -> bool:
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    tolerance = 1e-4 if wide.dtype == logits.dtype else 1e-2
    return bool((wide >= 0).all()) and bool(((wide.sum(-1) - 1).abs() < tolerance).all())


def not_moved(loss: TensorLoss, model: nn.Module, batch: Batch) -> tuple[str, ...]:
    """Return a note where a network of transformers is scored on its own tokens, without the move by one place."""
    tokens = _tokens_of(batch)
    if not isinstance(loss, CrossEntropy) or tokens is None or not is_pretrained(model):
        return ()
    counted = loss.counted(batch.targets) >= 0
    if not bool(counted.any()) or not bool((batch.targets == tokens)[counted].all()):
        return ()
    return (
        f"The targets are the input tokens themselves, and {loss.name} compares each with the output at the same "
        f'place. If {type(model).__name__} predicts the next token, this says nothing: leave loss out, or give "model" '
        "(on the command line --loss model), for its own loss, which moves them.",
    )


def refuse_own_tokens(batch: Batch) -> None:
    """Refuse targets that are the tokens themselves: whether the network shifts them is unknown.

    Raises:
        DataError: they are.
    """
    tokens = _tokens_of(batch)
    if tokens is None:
        return
    counted = batch.targets >= 0
    same = bool((batch.targets == tokens)[counted].all())
    if same and len(tokens[counted].unique()) > 1:
        raise DataError(
            "The targets are the network's own input tokens. A network that predicts the next token needs targets "
            "moved by one place, (tokens[:, :-1], tokens[:, 1:]). Give such batches, or pass loss= a function that "
            'moves them, loss="model" if the network returns its own loss, or loss="cross_entropy" if the targets are '
            "meant as they are."
        )


def refuse_values(targets: Any) -> None:
    """Refuse targets that are neither labels nor probabilities of classes, where no loss was asked for.

    Raises:
        DataError: they are values, such as images or yes-or-no answers.
    """
    if not isinstance(targets, Tensor) or not targets.is_floating_point() or targets.ndim < 2:
        return
    one = targets.new_ones(())
    sums = any(torch.allclose(targets.sum(k), one, atol=1e-3) for k in range(1, targets.ndim))
    if not sums or bool((targets < 0).any()):
        raise DataError(
            f"The targets are values of shape {_shape(targets)}, neither labels nor probabilities of classes, which "
            'cross-entropy, the default, needs. For images and other numbers pass loss="mse", for yes-or-no answers '
            'loss="bce" (on the command line --loss mse or --loss bce), or a function of (outputs, targets).'
        )


def _tokens_of(batch: Batch) -> Tensor | None:
    """Return the tokens of a batch whose targets have the same shape."""
    tokens = batch.kwargs.get("input_ids", batch.args[0] if batch.args else None)
    targets = batch.targets
    if not isinstance(tokens, Tensor) or not isinstance(targets, Tensor) or tokens.is_floating_point():
        return None
    return tokens if tokens.shape == targets.shape and tokens.ndim == 2 else None


def are_next_tokens(batch: Batch) -> bool:
    """Return whether every target that counts is the next token already, as in ``(text[:-1], text[1:])``."""
    tokens, targets = _tokens_of(batch), batch.targets
    if tokens is None:
        return False
    counted = targets[:, :-1] >= 0
    same, following = (targets == tokens)[:, :-1][counted], (targets[:, :-1] == tokens[:, 1:])[counted]
    return bool(following.all()) and not bool(same.all())
