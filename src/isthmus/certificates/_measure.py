r"""What a certificate knows about one batch: errors and losses at points, bounds on the spans between them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from isthmus.batches import Batch
from isthmus.certificates._norms import ROUNDOFF
from isthmus.certificates._path import NetworksBetween
from isthmus.certificates._propagate import Ends, segment_bound
from isthmus.errors import DataError, ModelError
from isthmus.losses import class_axis_last, score

__all__ = ["Measured", "PointValues", "Span", "Spans", "measure"]

Spans = Sequence[tuple[float, float]]


@dataclass(frozen=True, eq=False)
class PointValues:
    """Measured at one network of the path: norm of the error and loss of every example, shape ``(n,)``."""

    error: Tensor
    losses: Tensor | None


@dataclass(frozen=True, eq=False)
class Span:
    """Proven between two networks, for every example, shape ``(n,)``.

    Attributes:
        bound: on the error about the chord of the span.
        extra: by how much the loss can lie above its chord; None without targets.
        certain: whether every network of the span classifies the example correctly; None without labels.
    """

    bound: Tensor
    extra: Tensor | None
    certain: Tensor | None


@dataclass(frozen=True, eq=False)
class Measured:
    """Everything about one batch; dictionaries by position and by span.

    Attributes:
        points: measured.
        spans: proven.
        rounding: by how much the computed outputs of A and of B can differ from exact ones.
        loss_rounding: the same for their losses; None without targets.
    """

    points: dict[float, PointValues]
    spans: dict[tuple[float, float], Span]
    rounding: Tensor
    loss_rounding: Tensor | None


def measure(
    path: NetworksBetween, batch: Batch, spans: Spans, loss: str, known: Measured | None = None
) -> Measured:
    """Run a batch along spans of the path.

    Args:
        path: the networks.
        batch: the examples.
        spans: pairs of positions, rising; all of the path if nothing is known.
        loss: ``"cross_entropy"`` or ``"mse"``.
        known: what an earlier call found; returned with the new spans added.

    Raises:
        ModelError: an operator is out of scope, or several inputs by keyword.
        DataError: targets for which no bound on the loss is known.
    """
    batch = path.batch(batch)
    if len(batch.kwargs) > 1:
        raise ModelError(
            "certify: several inputs by keyword are out of scope; wrap the model so that it takes one."
        )
    traced = path.traced(batch)
    outputs: dict[float, Tensor] = {}
    reach: dict[tuple[float, float], Tensor] = {}
    here: Ends | None = None
    at = math.nan
    for start, stop in spans:
        if here is None or at != start:
            here, outputs[start] = path.end(start, traced, batch)
        previous = here
        here, outputs[stop] = path.end(stop, traced, batch)
        at = stop
        reach[start, stop] = segment_bound(traced, previous, here, path.output(traced))
    ends = [outputs[t] if t in outputs else path.end(t, traced, batch)[1] for t in (0.0, 1.0)]
    if batch.targets is not None:
        _check_targets(batch.targets, ends[0], loss)
    points = {t: _point(t, output, ends, batch.targets, loss) for t, output in outputs.items()}
    found = {
        span: _span([outputs[t] for t in span], [points[t].losses for t in span], r[0], batch.targets, loss)
        for span, r in reach.items()
    }
    if known is not None:
        return Measured(known.points | points, known.spans | found, known.rounding, known.loss_rounding)
    rounding = torch.maximum(reach[spans[0]][1], reach[spans[-1]][1])
    # of the chord, the error and the loss themselves
    rounding = rounding + 64 * ROUNDOFF * sum(o.reshape(len(o), -1).norm(dim=1) for o in ends)
    slack = None if batch.targets is None else _change(ends, rounding, batch.targets, loss)
    return Measured(points, found, rounding, slack)


def _check_targets(targets: Any, outputs: Tensor, loss: str) -> None:
    """Refuse targets that are no class of the outputs: the bounds below count every position, and know its class."""
    if not isinstance(targets, Tensor):
        raise DataError(
            f"certify: expected a tensor of targets, found a {type(targets).__name__}. Give (inputs, targets) with the "
            "targets of the scored output, or leave them out for a bound on the outputs alone."
        )
    if loss != "cross_entropy":
        return
    logits = class_axis_last(outputs, targets)
    whole = not (targets.is_floating_point() or targets.is_complex())
    classes = 0 if logits is None else logits.shape[-1]
    if logits is None:
        found = f"targets of shape {tuple(targets.shape)} for outputs of shape {tuple(outputs.shape)}"
    elif whole and targets.numel():
        found = f"labels from {int(targets.min())} to {int(targets.max())} for {classes} classes"
    else:
        found = f"values of {targets.dtype}"
    if (
        logits is None
        or not whole
        or not targets.numel()
        or int(targets.min()) < 0
        or int(targets.max()) >= classes
    ):
        raise DataError(
            f"certify: the bound on the cross-entropy is for one class per position, found {found}. Leave ignored "
            "labels out, or leave out the targets for a bound on the outputs alone."
        )


def _point(
    t: float, output: Tensor, ends: Sequence[Tensor], targets: Tensor | None, loss: str
) -> PointValues:
    error = output - ((1 - t) * ends[0] + t * ends[1])
    losses = None if targets is None else score(output, targets, loss).losses.to(output.device)
    return PointValues(error.reshape(len(error), -1).norm(dim=1), losses)


def _span(
    outputs: Sequence[Tensor],
    losses: Sequence[Tensor | None],
    r: Tensor,
    targets: Tensor | None,
    loss: str,
) -> Span:
    first, last = losses
    if targets is None or first is None or last is None:
        return Span(r, None, None)
    extra = _change(outputs, r, targets, loss)
    if loss == "cross_entropy" and outputs[0].ndim == 2:
        worst = torch.maximum(first, last)
        extra = torch.minimum(extra, math.sqrt(2) * (1 - torch.exp(-worst)) * r + r.square() / 4)
    labels = loss == "cross_entropy" and outputs[0].ndim == 2
    return Span(r, extra, _certain(outputs, r, targets) if labels else None)


def _change(outputs: Sequence[Tensor], r: Tensor, targets: Tensor, loss: str) -> Tensor:
    """Bound the change of every example's loss when an output between two given ones moves by ``r``.

    Cross-entropy has slope at most √2 in the logits of a position; over positions it is averaged, and the mean of
    the norms is at most the norm over the root of their number.
    """
    if loss == "cross_entropy":
        return math.sqrt(2 / max(targets[0].numel(), 1)) * r
    count = outputs[0][0].numel()
    distances = [(o - targets.to(o).reshape(o.shape)).reshape(len(o), -1).norm(dim=1) for o in outputs]
    return (2 * torch.maximum(*distances) * r + r.square()) / count


def _certain(outputs: Sequence[Tensor], r: Tensor, targets: Tensor) -> Tensor:
    """Return for every example whether every network of a span must classify it correctly.

    [O] Theory, section 3.6: the prediction cannot change where every margin of the chord exceeds ``√2 r``.
    """
    labels = targets.long().unsqueeze(1)
    margins = [(o.gather(1, labels) - o).scatter(1, labels, math.inf) for o in outputs]
    return torch.minimum(*margins).min(dim=1).values > math.sqrt(2) * r * (1 + 1e-12)
