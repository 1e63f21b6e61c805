"""Losses that score one tensor of outputs, example by example, whatever batch an example is in."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from isthmus.errors import DataError, ShapeError
from isthmus.losses._scores import Scores, averaged

__all__ = ["CrossEntropy", "Elementwise", "TensorLoss", "class_axis_last", "right_labels"]

IGNORED = -100
_REDUCTIONS = ("mean", "sum", "none")


class TensorLoss(Protocol):
    """What scores a tensor of outputs."""

    @property
    def name(self) -> str:
        """As shown."""
        ...

    def scores(self, outputs: Tensor, targets: Any) -> Scores:
        """Score outputs, in at least float32, with examples on axis 0."""
        ...

    def vectors(self, outputs: Tensor, targets: Any) -> tuple[Tensor, Tensor | None]:
        """Return the outputs as ``(n, positions, entries)``, and which positions count: ``(n, positions)`` or None."""
        ...

    def unit(self, targets: Any) -> str:
        """Return what a loss is measured in."""
        ...

    @property
    def kind(self) -> str:
        """``"cross_entropy"``, ``"mse"`` or ``"bce"`` where it is plainly that, else ``"other"``."""
        ...

    def counted(self, targets: Any) -> Any:
        """Return targets; labels that do not count are below 0."""
        ...


@dataclass(frozen=True, eq=False)
class CrossEntropy:
    """Cross-entropy or negative log-likelihood, as :class:`torch.nn.CrossEntropyLoss` and ``NLLLoss``.

    Attributes:
        ignore_index: label of positions that do not count.
        label_smoothing: see :class:`torch.nn.CrossEntropyLoss`.
        weight: of each class; the mean then is over the weights of the labels, as in torch.
        reduction: ``"sum"`` adds an example's positions instead of averaging over all.
        class_axis_first: whether axis 1 is that of the classes where the last one fits as well.
        log_probabilities: whether the outputs are those, not logits.
        name: as shown.
    """

    ignore_index: int = IGNORED
    label_smoothing: float = 0.0
    weight: Tensor | None = None
    reduction: str = "mean"
    class_axis_first: bool = False
    log_probabilities: bool = False
    name: str = "cross_entropy"

    def __post_init__(self) -> None:
        """Check the options."""
        check_reduction(self.reduction, self.name)
        if not 0 <= self.label_smoothing <= 1:
            raise DataError(
                f"{self.name}: expected label_smoothing from 0 to 1, found {self.label_smoothing}."
            )
        if self.weight is not None and (self.weight.ndim != 1 or bool((self.weight < 0).any())):
            raise DataError(
                f"{self.name}: expected one weight of at least 0 for each class, found {tuple(self.weight.shape)}."
            )
        if self.weight is not None and self.label_smoothing > 0 and bool((self.weight == 0).any()):
            raise DataError(
                f"{self.name}: with label_smoothing, a class of weight 0 adds to a mean without counting in it. Give "
                "such classes a small weight, or smooth nothing."
            )

    def scores(self, outputs: Tensor, targets: Any) -> Scores:
        """Score logits by labels, or by probabilities of the classes."""
        targets = tensor_targets(targets, outputs, self.name)
        if targets.is_floating_point() and targets.shape == outputs.shape and outputs.ndim > 1:
            return self._soft(outputs, targets)
        logits = self._by_class(outputs, targets)
        if logits is None:
            raise ShapeError(
                f"Cross-entropy of outputs {tuple(outputs.shape)} and targets {tuple(targets.shape)}: "
                "expected targets of shape (n,) or (n, positions), and one more axis, of classes, in the "
                'outputs. Use loss="mse" (on the command line --loss mse) or a function for other targets.'
            )
        counted = self._counted(targets)
        labels = targets.long() if counted is None else targets.long().where(counted, 0)
        self._check_labels(targets, counted, logits.shape[-1])
        right = (logits.argmax(-1) == targets).float()
        values, weights = self._values(logits, labels, counted)
        return self._scores(values, weights, right, counted)

    def vectors(self, outputs: Tensor, targets: Any) -> tuple[Tensor, Tensor | None]:
        """Return the outputs of each position, of which those that are ignored do not count."""
        logits = self._by_class(outputs, targets) if isinstance(targets, Tensor) else None
        if logits is None:
            return outputs.reshape(len(outputs), 1, -1), None
        counted = self._counted(targets)
        flat = None if counted is None else counted.reshape(len(outputs), -1)
        return logits.reshape(len(outputs), -1, logits.shape[-1]), flat

    def unit(self, targets: Any) -> str:
        """Return nats, and of what."""
        positions = isinstance(targets, Tensor) and targets.ndim > 1 and not targets.is_floating_point()
        each = "per position" if positions and self.reduction != "sum" else "per example"
        return f"nats {each}"

    @property
    def kind(self) -> str:
        """Without weights and the like, plain cross-entropy."""
        plain = self.weight is None and self.label_smoothing == 0 and self.reduction != "sum"
        return "cross_entropy" if plain else "other"

    def counted(self, targets: Any) -> Any:
        """Return labels, below 0 where they are ignored."""
        labels = isinstance(targets, Tensor) and not targets.is_floating_point()
        return targets.where(targets != self.ignore_index, -1) if labels else targets

    def _by_class(self, outputs: Tensor, targets: Tensor) -> Tensor | None:
        return class_axis_last(outputs, targets, prefer_first=self.class_axis_first)

    def _counted(self, targets: Tensor) -> Tensor | None:
        """Return which positions count, or None for all."""
        counted = targets != self.ignore_index
        return None if bool(counted.all()) else counted

    def _values(self, logits: Tensor, labels: Tensor, counted: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return losses of the positions, and their weights where these are not all 1."""
        if self.weight is None and self.label_smoothing == 0:
            logs = logits if self.log_probabilities else logits.log_softmax(-1)
            return -logs.gather(-1, labels.unsqueeze(-1)).squeeze(-1), counted
        weight = torch.ones(logits.shape[-1]) if self.weight is None else self.weight
        if len(weight) != logits.shape[-1]:
            raise ShapeError(f"{self.name}: {len(weight)} class weights for {logits.shape[-1]} classes.")
        weight = weight.to(logits)
        logs = logits if self.log_probabilities else logits.log_softmax(-1)
        own = weight[labels]
        chosen = -logs.gather(-1, labels.unsqueeze(-1)).squeeze(-1) * own
        spread = -(logs * weight).nan_to_num(0.0).sum(-1) / logits.shape[-1]
        mixed = (1 - self.label_smoothing) * chosen + self.label_smoothing * spread
        factors = own if counted is None else own * counted
        # Means are over the weights of the labels, so a position's value is its share divided by its weight.
        return torch.where(own > 0, mixed / own.where(own > 0, 1.0), 0.0), factors

    def _soft(self, outputs: Tensor, targets: Tensor) -> Scores:
        """Score logits by probabilities."""
        axis = self._soft_axis(targets)
        logits, shares = outputs.movedim(axis, -1), targets.to(outputs.dtype).movedim(axis, -1)
        classes = logits.shape[-1]
        shares = (1 - self.label_smoothing) * shares + self.label_smoothing / classes
        weight = torch.ones(classes) if self.weight is None else self.weight
        logs = logits if self.log_probabilities else logits.log_softmax(-1)
        values = -(logs * shares * weight.to(logits)).sum(-1)
        right = (logits.argmax(-1) == shares.argmax(-1)).float()
        return self._scores(values, None, right, None)

    def _soft_axis(self, targets: Tensor) -> int:
        """Return the axis of the classes: the one along which the targets sum to 1."""
        if targets.ndim == 2 or self.class_axis_first:
            return 1
        fits = [k for k in (1, -1) if torch.allclose(targets.sum(k), targets.new_ones(()), atol=1e-3)]
        if len(fits) != 1:
            raise DataError(
                f"Cross-entropy with probabilities of shape {tuple(targets.shape)} as targets: expected that they sum "
                f"to 1 along axis 1 or along the last one, found {len(fits)} such axes. Pass "
                'loss=torch.nn.CrossEntropyLoss() for classes on axis 1, and loss="mse" (on the command line --loss '
                "mse) for values such as those of images."
            )
        return fits[0]

    def _check_labels(self, targets: Tensor, counted: Tensor | None, classes: int) -> None:
        if targets.is_floating_point() or targets.is_complex():
            raise DataError(
                f"Cross-entropy needs class indices, found targets of {targets.dtype}. "
                'Pass integer labels, or use loss="mse" (on the command line --loss mse).'
            )
        labels = targets if counted is None else targets[counted]
        if labels.numel() == 0:
            return
        low, high = int(labels.min()), int(labels.max())
        if low < 0 or high >= classes:
            odd = high if low >= 0 else low
            raise DataError(
                f"Labels run from {low} to {high}, but the model has {classes} outputs: expected "
                f"0..{classes - 1}. Is this the right data set for this model? A label that marks what is not "
                f'counted is named by loss="cross_entropy(ignore_index={odd})" (on the command line '
                f"--ignore-index {odd}); now it is {self.ignore_index}."
            )

    def _scores(
        self, values: Tensor, weights: Tensor | None, right: Tensor, counted: Tensor | None
    ) -> Scores:
        losses, totals = averaged(values, weights)
        if self.reduction == "sum":
            losses, totals = losses * totals, torch.ones_like(totals)
        return Scores(losses, totals, *averaged(right, counted))


@dataclass(frozen=True, eq=False)
class Elementwise:
    """A loss of outputs and targets of one shape, averaged over an example's outputs.

    Attributes:
        name: as shown.
        values: of outputs and targets; shape ``(n, ...)``.
        reduction: ``"sum"`` adds an example's values; ``"mean"`` averages over all.
        measured_in: unit of a value.
        threshold: outputs above it answer yes to a target of at least 0.5; None where there is no right or wrong.
        labels: whether targets are whole numbers, of any shape, rather than values in the shape of the outputs.
        title: how messages call it, where not by its name.
    """

    name: str
    values: Callable[[Tensor, Tensor], Tensor]
    reduction: str = "mean"
    measured_in: str = "loss"
    threshold: float | None = None
    labels: bool = False
    title: str = ""

    def __post_init__(self) -> None:
        """Check the options."""
        check_reduction(self.reduction, self.name)

    def scores(self, outputs: Tensor, targets: Any) -> Scores:
        """Score outputs by targets."""
        targets = tensor_targets(targets, outputs, self.name)
        if not self.labels:
            targets = self._fitted(outputs, targets)
        try:
            values = self.values(outputs, targets)
        except RuntimeError as error:
            raise ShapeError(
                f"{self.name} cannot score outputs {tuple(outputs.shape)} by targets {tuple(targets.shape)} of "
                f"{targets.dtype}: {error}"
            ) from error
        if values.ndim == 0 or len(values) != len(outputs):
            raise ShapeError(
                f"{self.name} gave values of shape {tuple(values.shape)} for {len(outputs)} examples; expected them on "
                "axis 0."
            )
        losses, weights = averaged(values)
        if self.reduction == "sum":
            losses, weights = losses * weights, torch.ones_like(weights)
        if self.threshold is None:
            return Scores(losses, weights)
        right = ((outputs > self.threshold) == (targets >= 0.5)).float()
        return Scores(losses, weights, *averaged(right))

    def vectors(self, outputs: Tensor, targets: Any) -> tuple[Tensor, Tensor | None]:
        """Return all outputs of an example as one position."""
        return outputs.reshape(len(outputs), 1, -1), None

    def unit(self, targets: Any) -> str:
        """Return the unit of a value."""
        return f"{self.measured_in} per example" if self.reduction == "sum" else self.measured_in

    @property
    def kind(self) -> str:
        """The squared error and the yes-or-no loss by name."""
        return self.name if self.name in ("mse", "bce") else "other"

    def counted(self, targets: Any) -> Any:
        """Return the targets."""
        return targets

    def _fitted(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return targets in the shape of the outputs, where one value for each example allows that."""
        single = outputs.numel() == len(outputs) == targets.numel() and len(targets) == len(outputs)
        wanted = targets.reshape(outputs.shape) if single else targets
        if wanted.shape != outputs.shape:
            raise ShapeError(
                f"{(self.title or self.name).capitalize()} of outputs {tuple(outputs.shape)} and targets "
                f"{tuple(targets.shape)}: expected equal shapes."
            )
        return wanted.to(outputs.dtype)


def check_reduction(reduction: str, name: str) -> None:
    """Check the reduction of a loss.

    Raises:
        DataError: it is none of torch's.
    """
    if reduction not in _REDUCTIONS:
        raise DataError(f"{name}: expected a reduction among {', '.join(_REDUCTIONS)}, found {reduction!r}.")


def tensor_targets(targets: Any, outputs: Tensor, name: str) -> Tensor:
    """Return targets on the device of the outputs.

    Raises:
        DataError: there are none, or no tensor.
    """
    if targets is None:
        raise DataError(
            "Cannot compute a loss: the batch has no targets. Give batches of (inputs, targets); "
            "to pass a single batch, put it in a list."
        )
    if not isinstance(targets, Tensor):
        raise DataError(
            f"The loss {name!r} needs a tensor of targets, found a {type(targets).__name__}. Pass loss= a function of "
            "(outputs, targets), which gets them as they are, and return one value per example."
        )
    return targets.to(outputs.device)


def class_axis_last(outputs: Tensor, targets: Tensor, *, prefer_first: bool = False) -> Tensor | None:
    """Return the outputs with their axis of classes last, or None when the targets are no labels of them.

    The axis of classes is the last one, or axis 1 where only that fits (the layout of convolutions); where both fit,
    ``prefer_first`` takes axis 1, as torch's losses do.
    """
    if outputs.ndim < 2 or outputs.ndim != targets.ndim + 1:
        return None
    last = outputs.shape[:-1] == targets.shape
    first = outputs.shape[:1] + outputs.shape[2:] == targets.shape
    if first and (prefer_first or not last):
        return outputs.movedim(1, -1)
    return outputs if last else None


def right_labels(outputs: Tensor, targets: Any) -> tuple[Tensor, Tensor] | tuple[None, None]:
    """Return the share of right labels of each example and their number, or nothing if targets are no labels."""
    if not isinstance(targets, Tensor) or targets.is_floating_point() or targets.is_complex():
        return None, None
    logits = class_axis_last(outputs, targets)
    if logits is None or int(targets.min()) < 0 or int(targets.max()) >= logits.shape[-1]:
        return None, None
    return averaged((logits.argmax(-1) == targets).float())


def squared_error(outputs: Tensor, targets: Tensor) -> Tensor:
    """Return squared differences."""
    return (outputs - targets).square()


def binary_cross_entropy(outputs: Tensor, targets: Tensor) -> Tensor:
    """Return the cross-entropy of logits and yes-or-no targets."""
    return F.binary_cross_entropy_with_logits(outputs, targets, reduction="none")
