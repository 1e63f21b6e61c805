r"""The rise of the cross-entropy above its chord, split exactly, example by example.

With logits :math:`f_A, f_B` of the ends and :math:`f_t` of the point, :math:`\bar f=(1-t)f_A+tf_B` and the error
:math:`E=f_t-\bar f` (the vector whose norm is the LMC error), the loss of an example with label :math:`y` rises above
the chord by

.. math:: D - J - E_y, \qquad D=\operatorname{lse}(f_t)-\operatorname{lse}(f_t-E), \qquad
    J=(1-t)\operatorname{lse}(f_A)+t\operatorname{lse}(f_B)-\operatorname{lse}(\bar f)\ge 0 ,

which is algebra (Bae 2026): :math:`J` is what an ensemble of the two gains by convexity, and the rest is zero where
:math:`E` is. So the error of linear connectivity is the only way in which a barrier arises.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["BarrierSplit", "ClassShare", "SplitTally"]

_CLASSES = 10
"""Classes that are told at most."""
_HALF = 0.5


@dataclass(frozen=True)
class ClassShare:
    """What one class adds to the rise of the loss.

    Attributes:
        label: number of the class.
        rows: number of its labels in the data.
        share: part of the whole rise, no unit; below 0 where the class does better than the chord.
        rise: mean rise over its rows, nats.
    """

    label: int
    rows: int
    share: float
    rise: float


@dataclass(frozen=True)
class BarrierSplit:
    """The rise of the cross-entropy above its chord, and what it consists of; means over all labels, in nats.

    Attributes:
        rise: ``spread - ensemble_gain - own``, up to rounding.
        error: standard error of the rise over the rows, as if these were independent; None of a single row.
        spread: mean of ``D``: by how much the error ``E`` raises the normaliser, at most its largest entry.
        ensemble_gain: mean of ``J``: what the mean of the two networks' logits gains over the chord.
        own: mean of ``E_y``: by how much the error raises the logit of the right class.
        rows: number of labels.
        half: smallest share of the rows that carry half of the rise; None where the loss does not rise.
        classes: the classes that add most to it, largest first, ten at most.
        scale: the part of the rise that one factor on the logits of the point takes away, fitted on these data; None
            where the loss does not rise.
    """

    rise: float
    error: float | None
    spread: float
    ensemble_gain: float
    own: float
    rows: int
    half: float | None
    classes: tuple[ClassShare, ...]
    scale: float | None


class SplitTally:
    """Collects the split of a stream of rows.

    Args:
        t: the position.
    """

    def __init__(self, t: float) -> None:
        self._t = t
        self._terms: list[Tensor] = []
        self._labels: list[Tensor] = []
        self._cooled: Tensor | None = None

    def update(self, first: Tensor, second: Tensor, point: Tensor, labels: Tensor) -> None:
        """Add rows: logits of A, of B and of the point, shape ``(rows, classes)``, and their labels."""
        f_a, f_b, f_t = (v.double() for v in (first, second, point.to(first.device)))
        middle = torch.lerp(f_a, f_b.to(f_a.device), self._t)
        error = f_t - middle
        spread = f_t.logsumexp(-1) - (f_t - error).logsumexp(-1)
        gain = torch.lerp(f_a.logsumexp(-1), f_b.logsumexp(-1), self._t) - middle.logsumexp(-1)
        own = error.gather(-1, labels[:, None]).squeeze(-1)
        right = f_t.gather(-1, labels[:, None]).squeeze(-1)
        self._terms.append(torch.stack([spread, gain, own]).cpu())
        self._labels.append(labels.cpu())
        factors = _FACTORS.to(f_t.device)
        tried = torch.stack([(k * f_t).logsumexp(-1).sum() - (k * right).sum() for k in factors]).cpu()
        self._cooled = tried if self._cooled is None else self._cooled + tried

    def result(self) -> BarrierSplit | None:
        """Return the split, or None where no label counts."""
        if not self._terms or sum(map(len, self._labels)) == 0 or self._cooled is None:
            return None
        spread, gain, own = torch.cat(self._terms, 1)
        labels, rises = torch.cat(self._labels), spread - gain - own
        rise, rows = float(rises.mean()), len(rises)
        one = int((_FACTORS - 1).abs().argmin())
        saved = float(self._cooled[one] - self._cooled.min()) / rows
        return BarrierSplit(
            rise=rise,
            error=float(rises.std()) / rows**0.5 if rows > 1 else None,
            spread=float(spread.mean()),
            ensemble_gain=float(gain.mean()),
            own=float(own.mean()),
            rows=rows,
            half=_carrying_half(rises),
            classes=_by_class(rises, labels),
            scale=saved / rise if rise > 0 else None,
        )


_FACTORS = torch.logspace(-1, 1, 81, dtype=torch.float64)
"""Factors on the logits that are tried, in steps of 6 %, among them 1."""


def _carrying_half(rises: Tensor) -> float | None:
    """Return the smallest share of rows whose rises sum to half of all."""
    total = rises.sum()
    if not float(total) > 0:
        return None
    running = rises.sort(descending=True).values.cumsum(0)
    return (int((running < _HALF * total).sum()) + 1) / len(rises)


def _by_class(rises: Tensor, labels: Tensor) -> tuple[ClassShare, ...]:
    total = float(rises.sum())
    if not total > 0:
        return ()
    size = int(labels.max()) + 1
    sums = torch.zeros(size, dtype=torch.float64).index_add_(0, labels, rises)
    counts = labels.bincount(minlength=size)
    order: Sequence[int] = sums.argsort(descending=True, stable=True).tolist()
    return tuple(
        ClassShare(k, int(counts[k]), float(sums[k]) / total, float(sums[k]) / int(counts[k]))
        for k in order[:_CLASSES]
        if counts[k]
    )
