"""How the networks of transformers compute their own losses, taken apart into examples.

Each convention is a guess that is believed only where it gives the network's own number (:mod:`isthmus.losses._own`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from isthmus.batches import Batch
from isthmus.losses._scores import Scores, averaged
from isthmus.losses._tensors import (
    IGNORED,
    CrossEntropy,
    Elementwise,
    binary_cross_entropy,
    squared_error,
)

__all__ = ["CONVENTIONS", "Convention", "conventions_for"]

_SEGMENTATION_IGNORED = 255

OutputView = Callable[[Mapping[str, Any]], Tensor | None]
RowScores = Callable[[Tensor, Batch], Scores | None]
Judged = Callable[[Tensor, Batch], tuple[Tensor, Tensor] | None]


@dataclass(frozen=True, eq=False)
class Convention:
    """One way to compute a loss.

    Attributes:
        name: as shown.
        unit: of the loss.
        view: from a network's outputs to the tensor that is scored, or None where they are of another kind.
        rows: from that tensor and the batch to scores, or None where the targets are of another kind.
        kind: ``"cross_entropy"``, ``"mse"``, ``"bce"``, ``"spans"``, ``"contrastive"`` or ``"pairwise"`` where the loss
            is plainly that, else ``"other"``.
        judged: from that tensor and the batch to outputs and targets, labels below 0 where they are ignored.
    """

    name: str
    unit: str
    view: OutputView
    rows: RowScores
    kind: str = "other"
    judged: Judged = lambda tensor, batch: None


def conventions_for(config: Any) -> list[Convention]:
    """Return all conventions, with the ignored labels that a configuration names, the usual ones first."""
    padding = getattr(config, "pad_token_id", None)
    ignored = getattr(config, "semantic_loss_ignore_index", _SEGMENTATION_IGNORED)
    patch = getattr(config, "patch_size", None)
    found = list(CONVENTIONS)
    found.append(_segmentation(int(ignored)))
    if isinstance(padding, int) and padding >= 0:
        found += [_next_tokens(padding), _tokens(padding)]
    if isinstance(patch, int):
        found.append(_masked_image(patch))
    return found


def _logits(outputs: Mapping[str, Any]) -> Tensor | None:
    found = outputs.get("logits")
    return found if isinstance(found, Tensor) and found.is_floating_point() and found.ndim > 0 else None


def _labels(batch: Batch) -> Tensor | None:
    return batch.targets if isinstance(batch.targets, Tensor) else None


def _whole(labels: Tensor | None) -> bool:
    return labels is not None and not labels.is_floating_point() and not labels.is_complex()


def _next_tokens(ignored: int) -> Convention:
    """Position ``t`` predicts token ``t + 1``; a prefix without labels, such as an image, is left out."""

    def aligned(logits: Tensor, batch: Batch) -> tuple[Tensor, Tensor] | None:
        labels = _labels(batch)
        if labels is None or not _whole(labels) or labels.ndim != 2 or logits.ndim != 3:
            return None
        length = labels.shape[1]
        if len(labels) != len(logits) or length > logits.shape[1]:
            return None
        return logits[:, logits.shape[1] - length :][:, :-1], labels[:, 1:].contiguous()

    name = "next tokens" if ignored == IGNORED else f"next tokens, {ignored} ignored"
    return _of_labels(name, "nats per token", aligned, ignored)


def _tokens(ignored: int) -> Convention:
    """Return the convention by which every position predicts its own label; a single label is the class."""

    def aligned(logits: Tensor, batch: Batch) -> tuple[Tensor, Tensor] | None:
        labels = _labels(batch)
        if labels is None or not _whole(labels) or logits.ndim < 2:
            return None
        if logits.ndim == 2 and labels.shape == (len(logits), 1):
            labels = labels[:, 0]
        if labels.ndim != logits.ndim - 1 or labels.shape != logits.shape[:-1]:
            return None
        return logits, labels

    name = "labels" if ignored == IGNORED else f"labels, {ignored} ignored"
    return _of_labels(name, "nats per label", aligned, ignored)


def _of_labels(name: str, unit: str, aligned: Judged, ignored: int) -> Convention:
    """Return a convention that is the cross-entropy of logits and labels brought into line with each other."""
    loss = CrossEntropy(ignore_index=ignored)

    def rows(logits: Tensor, batch: Batch) -> Scores | None:
        found = aligned(logits, batch)
        return None if found is None else loss.scores(*found)

    def judged(logits: Tensor, batch: Batch) -> tuple[Tensor, Tensor] | None:
        found = aligned(logits, batch)
        return None if found is None else (found[0], loss.counted(found[1]))

    return Convention(name, unit, _logits, rows, loss.kind, judged)


def _multi_label(logits: Tensor, batch: Batch) -> Scores | None:
    labels = _labels(batch)
    if labels is None or labels.shape != logits.shape or not labels.is_floating_point():
        return None
    return Elementwise("labels", binary_cross_entropy, threshold=0.0).scores(logits, labels)


def _numbers(logits: Tensor, batch: Batch) -> tuple[Tensor, Tensor] | None:
    labels = _labels(batch)
    if labels is None or labels.numel() != logits.numel() or len(labels) != len(logits):
        return None
    return logits, labels.reshape(logits.shape)


def _regression(logits: Tensor, batch: Batch) -> Scores | None:
    found = _numbers(logits, batch)
    return None if found is None else Elementwise("labels", squared_error).scores(*found)


def _span_logits(outputs: Mapping[str, Any]) -> Tensor | None:
    ends = [outputs.get(f"{end}_logits") for end in ("start", "end")]
    known = [v for v in ends if isinstance(v, Tensor) and v.ndim == 2]
    return torch.stack(known, -1) if len(known) == 2 else None


def _spans(logits: Tensor, batch: Batch) -> Scores | None:
    """Mean of the losses of start and end; positions behind the text do not count."""
    places = _places(logits, batch)
    if places is None:
        return None
    inside = places < logits.shape[1]
    if bool((inside[:, 0] != inside[:, 1]).any()):
        return None  # the means over starts and over ends are then over different examples
    chosen = places.where(inside, 0)
    values = -logits.log_softmax(1).gather(1, chosen.unsqueeze(1)).squeeze(1).mean(-1)
    right = (logits.argmax(1) == places).all(-1).float()
    return Scores(*averaged(values, inside[:, 0]), *averaged(right, inside[:, 0]))


def _places(logits: Tensor, batch: Batch) -> Tensor | None:
    """Return starts and ends, shape ``(n, 2)``; the length of the text for those behind it."""
    found = [batch.kwargs.get(f"{end}_positions") for end in ("start", "end")]
    known = [v.reshape(len(logits)) for v in found if isinstance(v, Tensor)]
    return torch.stack(known, -1).clamp(0, logits.shape[1]) if len(known) == 2 else None


def _judged_spans(logits: Tensor, batch: Batch) -> tuple[Tensor, Tensor] | None:
    places = _places(logits, batch)
    return None if places is None else (logits, places.where(places < logits.shape[1], -1))


def _pairs(outputs: Mapping[str, Any]) -> Tensor | None:
    """Similarities of each text (rows) with each picture or sound (columns)."""
    found = outputs.get("logits_per_text")
    square = isinstance(found, Tensor) and found.ndim == 2 and found.shape[0] == found.shape[1]
    return found if square else None


def _contrastive(logits: Tensor, batch: Batch) -> Scores | None:
    """Score each text among the pictures of the batch, and each picture among its texts."""
    own = torch.arange(len(logits), device=logits.device)
    values = (
        F.cross_entropy(logits, own, reduction="none") + F.cross_entropy(logits.T, own, reduction="none")
    ) / 2
    return Scores(*averaged(values), *averaged(_retrieved(logits)))


def _pairwise(logits: Tensor, batch: Batch) -> Scores | None:
    """Score whether each text and each picture belong together, every pair by itself."""
    signs = 2 * torch.eye(len(logits), device=logits.device, dtype=logits.dtype) - 1
    return Scores(*averaged(-F.logsigmoid(signs * logits).sum(-1)), *averaged(_retrieved(logits)))


def _retrieved(logits: Tensor) -> Tensor:
    own = torch.arange(len(logits), device=logits.device)
    return ((logits.argmax(1) == own).float() + (logits.argmax(0) == own).float()) / 2


def _segmentation(ignored: int) -> Convention:
    """Classes of pixels, from logits enlarged to the size of the labels."""
    loss = CrossEntropy(ignore_index=ignored, class_axis_first=True)

    def rows(logits: Tensor, batch: Batch) -> Scores | None:
        labels = _labels(batch)
        if labels is None or not _whole(labels) or labels.ndim != 3 or logits.ndim != 4:
            return None
        large = F.interpolate(logits, size=labels.shape[-2:], mode="bilinear", align_corners=False)
        return loss.scores(large, labels)

    return Convention(f"pixels, {ignored} ignored", "nats per pixel", _logits, rows)


def _masked_image(patch: int) -> Convention:
    """Absolute error of the pixels of masked patches."""

    def view(outputs: Mapping[str, Any]) -> Tensor | None:
        found = outputs.get("reconstruction")
        return found if isinstance(found, Tensor) and found.ndim == 4 else None

    def rows(pixels: Tensor, batch: Batch) -> Scores | None:
        masked, wanted = batch.kwargs.get("bool_masked_pos"), batch.kwargs.get("pixel_values")
        if not isinstance(masked, Tensor) or not isinstance(wanted, Tensor) or wanted.shape != pixels.shape:
            return None
        height, width = pixels.shape[2] // patch, pixels.shape[3] // patch
        if masked.numel() != len(pixels) * height * width:
            return None
        mask = masked.reshape(-1, height, width).repeat_interleave(patch, 1).repeat_interleave(patch, 2)
        return Scores(*averaged((pixels - wanted).abs(), mask.unsqueeze(1).expand_as(pixels)))

    return Convention("masked pixels", "absolute error", view, rows)


CONVENTIONS: tuple[Convention, ...] = (
    _next_tokens(IGNORED),
    _tokens(IGNORED),
    Convention("yes-or-no labels", "nats per label", _logits, _multi_label, "bce", _numbers),
    Convention("squared error", "squared error", _logits, _regression, "mse", _numbers),
    Convention("spans", "nats per end", _span_logits, _spans, "spans", _judged_spans),
    Convention("pairs in the batch", "nats per pair", _pairs, _contrastive, "contrastive"),
    Convention("pairs one by one", "nats per text", _pairs, _pairwise, "pairwise"),
)
