"""Logits and labels of every position that counts, where a loss is the plain cross-entropy of these."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from isthmus.batches import Batch
from isthmus.losses._functions import widened
from isthmus.losses._scorer import OwnScorer, Scorer, TensorScorer
from isthmus.losses._tensors import CrossEntropy, class_axis_last

__all__ = ["class_rows"]


def class_rows(scorer: Scorer, kept: Any, batch: Batch) -> tuple[Tensor, Tensor, Tensor] | None:
    """Return logits, labels and the examples they belong to, so that the loss is the mean cross-entropy of the rows.

    Args:
        scorer: how the network is scored.
        kept: what it keeps of the outputs.
        batch: the batch they are the outputs of.

    Returns:
        Logits in at least float32, shape ``(rows, classes)``, labels and numbers of examples in the batch, shape
        ``(rows,)``; positions that are ignored are left out. None where the loss is another one: not cross-entropy, of
        probabilities or log-probabilities, with weights or smoothing, or targets that are no labels.
    """
    found = _by_position(scorer, kept, batch)
    if found is None:
        return None
    logits, labels = found
    examples = torch.arange(len(logits), device=logits.device)[:, None].expand(labels.shape)
    counted = labels >= 0
    return logits[counted], labels[counted].long(), examples[counted]


def _by_position(scorer: Scorer, kept: Any, batch: Batch) -> tuple[Tensor, Tensor] | None:
    """Return logits ``(n, positions, classes)`` and labels ``(n, positions)``, below 0 where they do not count."""
    if scorer.kind != "cross_entropy":
        return None
    outputs, targets = scorer.judged(kept, batch)
    if not isinstance(targets, Tensor) or targets.is_floating_point() or targets.is_complex():
        return None
    targets = targets.to(outputs.device)
    if isinstance(scorer, TensorScorer) and isinstance(scorer.loss, CrossEntropy):
        if scorer.loss.log_probabilities:
            return None
        logits = class_axis_last(outputs, targets, prefer_first=scorer.loss.class_axis_first)
    else:
        logits = class_axis_last(outputs, targets) if isinstance(scorer, OwnScorer) else None
    if logits is None:
        return None
    flat = widened(logits).reshape(len(logits), -1, logits.shape[-1])
    return flat, targets.reshape(len(targets), -1)
