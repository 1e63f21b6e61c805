r"""Whether a network does better than one that looks at no input: a barrier between networks at chance means nothing.

For classes, the best constant prediction is the labels' distribution :math:`p`: its cross-entropy is the entropy of
:math:`p`, and always naming the most frequent class is right with :math:`\max p`. For squared error it is the
targets' mean, at the cost of their variance; for yes-or-no targets the share of yes at each output; for
spans the shares of each start and end; and for pairs in a batch, that all partners are alike. A network counts
as near chance if its loss is not below that of the constant by two standard errors and :data:`NEAR` of it; for
classes also if neither accuracy nor loss is *clearly* better, by two standard errors and :data:`CLEAR` of what there
is to gain. An accuracy that gains more than :data:`SKILLED` of that is no chance, whatever the loss: such a network
is overconfident, and that is said instead.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from isthmus.losses import Scores, class_axis_last

__all__ = ["Constant", "TargetTally", "chance_note"]

NEAR = 0.01
CLEAR = 0.05
SKILLED = 0.25
_ERRORS = 2.0
_ADVICE = "and do labels and outputs belong together?"
_OF_VALUES = "Are the inputs normalised as in training"
_OF_TOKENS = "Do the tokens come from the tokenizer of these networks"
_FREQUENT = "the most frequent class"


@dataclass(frozen=True)
class Constant:
    """The best prediction that looks at no input.

    Attributes:
        loss: its mean loss, None where that is not known (a loss function of one's own).
        accuracy: its share of right predictions, None for regression.
        predicting: what is right so often.
    """

    loss: float | None
    accuracy: float | None
    predicting: str = _FREQUENT


class TargetTally:
    """Collects what the best constant prediction needs, over the targets of a data set.

    Args:
        loss: ``"cross_entropy"``, ``"mse"``, ``"bce"``, ``"spans"``, ``"contrastive"``, ``"pairwise"``, or anything
            else for a loss whose constant is not known.
    """

    def __init__(self, loss: object) -> None:
        self._loss = loss
        self._shares: Tensor | None = None
        self._count, self._mean, self._scatter = 0, torch.zeros(()), torch.zeros(())
        self._known = True
        self._pairs: list[tuple[int, float]] = []
        self._spans: list[tuple[int, int]] = []

    def update(self, outputs: Tensor, targets: object) -> None:
        """Add the targets of some examples, and the outputs that are scored against them."""
        if self._loss in ("contrastive", "pairwise"):
            self._add_pairs(len(outputs))
        elif not isinstance(targets, Tensor):
            self._known = False
        elif self._loss == "spans":
            inside = targets.reshape(-1, 2)
            self._spans += [(a, b) for a, b in inside.tolist() if a >= 0 and b >= 0]
            self._count = len(self._spans)
        elif self._loss in ("mse", "bce"):
            self._add_values(targets)
        else:
            self._add_labels(outputs, targets)

    def constant(self) -> Constant | None:
        """Return the best constant prediction; None where it is not known, or is never wrong."""
        if not self._known or not self._count:
            return None
        if self._pairs or self._spans:
            found = self._of_pairs() if self._pairs else self._of_spans()
            return found if found.loss and found.loss > 0 else None
        if self._loss == "mse":
            variance = float(self._scatter.mean()) / self._count
            return Constant(variance, None) if variance > 0 else None
        if self._loss == "bce":
            yes = self._mean.clamp(0, 1)
            entropy = float((torch.special.entr(yes) + torch.special.entr(1 - yes)).mean())
            return Constant(entropy, float(torch.maximum(yes, 1 - yes).mean())) if entropy > 0 else None
        assert self._shares is not None
        shares = self._shares / self._shares.sum()
        if not float(shares.max()) < 1.0:
            return None
        entropy = float(torch.special.entr(shares).sum())
        return Constant(entropy if self._loss == "cross_entropy" else None, float(shares.max()))

    def _of_pairs(self) -> Constant:
        """Return the constant prediction of pairs: every partner in the batch is as likely as any other."""
        loss = sum(size * each for size, each in self._pairs) / self._count
        return Constant(loss, len(self._pairs) / self._count, "choosing in the batch at random")

    def _of_spans(self) -> Constant:
        ends = [Counter(end) for end in zip(*self._spans, strict=True)]
        entropy = sum(-n / self._count * math.log(n / self._count) for end in ends for n in end.values()) / 2
        [(_, most)] = Counter(self._spans).most_common(1)
        return Constant(entropy, most / self._count, "the most frequent span")

    def _add_pairs(self, size: int) -> None:
        """Add a batch: the loss of an example where a share of ``1 / size`` is all that is known."""
        rest = (size - 1) * math.log(size / (size - 1)) if size > 1 and self._loss == "pairwise" else 0.0
        self._pairs.append((size, math.log(size) + rest))
        self._count += size

    def _add_labels(self, outputs: Tensor, targets: Tensor) -> None:
        logits = class_axis_last(outputs, targets.to(outputs.device))
        if logits is None or targets.is_floating_point() or targets.is_complex():
            self._known = False
            return
        classes = logits.shape[-1]
        labels = targets.detach().reshape(len(targets), -1).long().cpu()
        counted = (labels >= 0) & (labels < classes)  # others are ignored, or refused where they are scored
        shares = labels[counted].bincount(minlength=classes).double()
        if self._shares is not None and len(self._shares) != classes:
            self._known = False
            return
        self._shares = shares if self._shares is None else self._shares + shares
        self._count += int(counted.any(1).sum())

    def _add_values(self, targets: Tensor) -> None:
        rows = targets.detach().reshape(len(targets), -1).double().cpu()
        if not self._count:
            self._mean, self._scatter = torch.zeros_like(rows[0]), torch.zeros_like(rows[0])
        if rows.shape[1] != len(self._mean):
            self._known = False
            return
        total = self._count + len(rows)
        mean = rows.mean(0)
        shift = mean - self._mean
        self._scatter = self._scatter + (rows - mean).square().sum(0)
        self._scatter = self._scatter + shift.square() * (self._count * len(rows) / total)
        self._mean, self._count = self._mean + shift * (len(rows) / total), total


def chance_note(
    name: str,
    constant: Constant | None,
    ends: Sequence[Scores],
    tokens: bool = False,
) -> str | None:
    """Return a note on endpoints near chance, or None.

    Args:
        name: of the data set.
        constant: the best constant prediction on it.
        ends: scores of A and of B.
        tokens: whether the networks read whole numbers only.
    """
    if constant is None or len(ends[0].losses) < 2:
        return None
    found = [_verdict(constant, end) for end in ends]
    told = [(letter, *v) for letter, v in zip("AB", found, strict=True) if v is not None]
    if not told:
        return None
    chance = any(v[1] == "near chance" for v in told)
    words = "; ".join(f"network {letter} is {what}: {numbers}" for letter, what, numbers in told)
    means = (
        "A barrier between networks at chance means nothing."
        if chance
        else "A barrier in this loss says little."
    )
    return f"On {name!r} {words}. {means} {_OF_TOKENS if tokens else _OF_VALUES}, {_ADVICE}"


def _verdict(constant: Constant, end: Scores) -> tuple[str, str] | None:
    """Return "near chance" or "overconfident" and the numbers, or None for a network better than a constant."""
    numbers: list[str] = []
    loss_near = loss_clear = False
    if constant.loss is not None:
        gap = constant.loss - end.loss
        error = _ERRORS * _standard_error(end.losses, end.weights, end.loss)
        loss_near = gap <= max(error, NEAR * constant.loss)
        loss_clear = gap > max(error, CLEAR * constant.loss)
        numbers.append(f"loss {end.loss:.4g}, {constant.loss:.4g} for the best constant prediction")
    skill, accuracy_clear = 0.0, False
    accuracy = end.accuracy
    if accuracy is not None and constant.accuracy is not None:
        assert end.correct is not None
        assert end.counts is not None
        room = 1 - constant.accuracy
        gained = accuracy - constant.accuracy
        skill = gained / room
        error = _ERRORS * _standard_error(end.correct, end.counts, accuracy)
        accuracy_clear = gained > max(error, CLEAR * room)
        numbers.append(f"accuracy {accuracy:.1%}, {constant.accuracy:.1%} for {constant.predicting}")
    told = "; ".join(numbers)
    if loss_near and skill > SKILLED and accuracy_clear:
        return "overconfident", told
    unclear = accuracy is not None and not (loss_clear or accuracy_clear)
    return ("near chance", told) if loss_near or unclear else None


def _standard_error(values: Tensor, weights: Tensor, mean: float) -> float:
    """Return the standard error of a weighted mean, by the residuals of the ratio."""
    residuals = weights * (values - mean) / weights.mean()
    return float(residuals.std()) / math.sqrt(len(values))
