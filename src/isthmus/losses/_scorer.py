"""What runs and scores batches needs to know of a loss: how to feed the network, what to keep, how to score it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from isthmus.batches import Batch, main_output
from isthmus.errors import DataError, IsthmusError, ModelError
from isthmus.losses._doubts import are_next_tokens, doubts, not_moved, refuse_own_tokens, refuse_values
from isthmus.losses._functions import called, widened
from isthmus.losses._named import parsed_call, tensor_loss
from isthmus.losses._own import (
    Convention,
    Owned,
    OwnReader,
    as_mapping,
    check_by,
    convention_of,
    is_pretrained,
    scored,
    with_labels,
)
from isthmus.losses._scores import Scores
from isthmus.losses._tensors import TensorLoss, class_axis_last

__all__ = ["Loss", "Scorer", "outputs_to_score", "score", "scorer_for"]

Loss = str | Callable[[Any, Any], Any]
"""What a network is measured by:

* ``"cross_entropy"`` (nats; labels of -100 do not count), ``"mse"`` or ``"bce"`` (yes-or-no targets, logits), with
  options as in ``"cross_entropy(ignore_index=255, label_smoothing=0.1, weight=[1, 2])"``;
* a loss of :mod:`torch.nn` such as ``CrossEntropyLoss(weight=...)``, or a function of ``torch.nn.functional``, also
  with options by ``functools.partial``;
* ``"model"``: the loss that the network computes itself from the labels in its inputs;
* a function of the network's outputs (a tensor, or whatever the network returns) and of the targets as the batch has
  them, for one batch. It returns one value per example, shape ``(n,)``, or one for each of its parts, ``(n, ...)``,
  all of which count alike, except the zeros that torch gives where a label is -100; or ``(sum, count)``, two numbers
  or two tensors of shape ``(n,)``, for a mean over anything. It sees the batches as they come.
"""


class Scorer(Protocol):
    """How the outputs of a network are scored."""

    @property
    def name(self) -> str:
        """Name of the loss."""
        ...

    @property
    def notes(self) -> tuple[str, ...]:
        """What a reader of its numbers should know."""
        ...

    @property
    def by_example(self) -> bool:
        """Return whether an example's score is the same in every batch.

        Batches may then be regrouped, and the outputs of several networks scored together.
        """
        ...

    @property
    def read(self) -> Callable[[Any], Any] | None:
        """From a network's outputs to what is kept of them; None keeps :func:`outputs_to_score`."""
        ...

    def prepare(self, batch: Batch) -> Batch:
        """Return the batch that the network is run on."""
        ...

    def score(self, kept: Any, batch: Batch) -> Scores:
        """Score what was kept of the outputs on a batch; gradients pass where these are kept."""
        ...

    def tensor(self, kept: Any) -> Tensor:
        """Return the tensor in which two networks are compared, examples on axis 0."""
        ...

    def mean(self, first: Any, second: Any) -> Any:
        """Return the mean of two networks' outputs, or None where it cannot be scored."""
        ...

    def vectors(self, tensor: Tensor, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """Return outputs to compare as ``(n, positions, entries)``, and which positions count, or None for all."""
        ...

    def unit(self, batch: Batch) -> str:
        """Return what the loss is measured in."""
        ...

    @property
    def kind(self) -> str:
        """``"cross_entropy"`` or ``"mse"`` where the loss is plainly that of :meth:`judged`, else ``"other"``."""
        ...

    def judged(self, kept: Any, batch: Batch) -> tuple[Tensor, Any]:
        """Return outputs, and the targets they are held against; labels below 0 do not count."""
        ...


@dataclass(frozen=True, eq=False)
class TensorScorer:
    """A loss of the main tensor of the outputs."""

    loss: TensorLoss
    notes: tuple[str, ...] = ()
    read: Callable[[Any], Any] | None = None
    by_example: bool = True

    @property
    def name(self) -> str:
        """Name of the loss."""
        return self.loss.name

    def prepare(self, batch: Batch) -> Batch:
        """Return the batch itself."""
        return batch

    def score(self, kept: Tensor, batch: Batch) -> Scores:
        """Score the outputs."""
        return self.loss.scores(widened(kept), batch.targets)

    def tensor(self, kept: Tensor) -> Tensor:
        """Return the outputs."""
        return kept

    def mean(self, first: Tensor, second: Tensor) -> Tensor:
        """Return the mean of two outputs."""
        return _mean(first, second)

    def vectors(self, tensor: Tensor, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """Return the outputs by position."""
        return self.loss.vectors(tensor, batch.targets)

    def unit(self, batch: Batch) -> str:
        """Return what the loss is measured in."""
        return self.loss.unit(batch.targets)

    @property
    def kind(self) -> str:
        """Return what the loss plainly is."""
        return self.loss.kind

    def judged(self, kept: Tensor, batch: Batch) -> tuple[Tensor, Any]:
        """Return outputs and targets."""
        return kept, self.loss.counted(batch.targets)


@dataclass(frozen=True, eq=False)
class FunctionScorer:
    """A function of the user's; it is given the batches as they come."""

    function: Callable[[Any, Any], Any]
    whole: bool
    chosen: Callable[[Any], Any] | None = None
    notes: tuple[str, ...] = ()
    by_example: bool = False

    @property
    def name(self) -> str:
        """Name of the function."""
        return getattr(self.function, "__name__", type(self.function).__name__)

    @property
    def read(self) -> Callable[[Any], Any] | None:
        """Keep the output that was chosen, else all, where they are more than a tensor."""
        return widened if self.whole else self.chosen

    def prepare(self, batch: Batch) -> Batch:
        """Return the batch itself."""
        return batch

    def score(self, kept: Any, batch: Batch) -> Scores:
        """Call the function."""
        kept = widened(kept)
        targets = pytree.tree_map(_to_device_of(kept), batch.targets)
        examples = batch.size if self.whole else len(torch.atleast_1d(kept))
        return called(self.function, kept, targets, examples)

    def tensor(self, kept: Any) -> Tensor:
        """Return the main tensor."""
        return outputs_to_score(kept)

    def mean(self, first: Any, second: Any) -> Any:
        """Return the mean of all floating tensors in two outputs."""
        return _mean(first, second)

    def vectors(self, tensor: Tensor, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """Return the outputs by position, if the targets are labels of them."""
        labels = batch.targets if isinstance(batch.targets, Tensor) else None
        return by_position(tensor, labels), None

    def unit(self, batch: Batch) -> str:
        """Return the name of the function."""
        return self.name

    @property
    def kind(self) -> str:
        """A function is no loss that is known."""
        return "other"

    def judged(self, kept: Any, batch: Batch) -> tuple[Tensor, Any]:
        """Return the main tensor and the targets."""
        return self.tensor(kept), batch.targets


@dataclass(frozen=True, eq=False)
class OwnScorer:
    """The loss that the network computes itself."""

    model: nn.Module
    convention: Convention | None
    notes: tuple[str, ...] = ()
    by_example: bool = False

    @property
    def name(self) -> str:
        """How the loss is computed."""
        return f"model ({'by batch' if self.convention is None else self.convention.name})"

    @property
    def read(self) -> OwnReader:
        """Keep the tensor that is compared and the network's loss."""
        return OwnReader(self.model, self.convention)

    def prepare(self, batch: Batch) -> Batch:
        """Return the batch with its labels among the inputs."""
        return with_labels(self.model, batch)

    def score(self, kept: Owned, batch: Batch) -> Scores:
        """Score by the convention, checked against the network's own number; or take that."""
        return scored(kept, batch, self.convention)

    def tensor(self, kept: Owned) -> Tensor:
        """Return the tensor that is scored."""
        return kept.tensor

    def mean(self, first: Owned, second: Owned) -> Owned | None:
        """Return the mean of two outputs; it has no loss of its own, so only a convention can score it."""
        if self.convention is None:
            return None
        return Owned(_mean(first.tensor, second.tensor), None)

    def vectors(self, tensor: Tensor, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """Return the outputs by position: of tokens and labels their classes, of anything else all."""
        labels = batch.targets if isinstance(batch.targets, Tensor) else None
        counted = None
        if labels is not None and not labels.is_floating_point() and tensor.ndim == 3 and labels.ndim == 2:
            labels = tensor[..., 0]
        return by_position(tensor, labels), counted

    def unit(self, batch: Batch) -> str:
        """Return what the loss is measured in."""
        return "the model's own loss" if self.convention is None else self.convention.unit

    @property
    def kind(self) -> str:
        """Return what the convention plainly is."""
        return "other" if self.convention is None else self.convention.kind

    def judged(self, kept: Owned, batch: Batch) -> tuple[Tensor, Any]:
        """Return outputs and targets by the convention."""
        found = None if self.convention is None else self.convention.judged(kept.tensor, batch)
        return (kept.tensor, None) if found is None else found


def scorer_for(
    loss: Loss | None,
    model: nn.Module,
    batch: Batch,
    run: Callable[[Batch], Any],
    read: Callable[[Any], Tensor] | None = None,
) -> Scorer:
    """Return how a network is scored on data.

    Args:
        loss: see :data:`Loss`; None is the network's own loss for a network of transformers whose batches have labels
            that it reads, else cross-entropy.
        model: the network.
        batch: the start of the data.
        run: from a batch to all that the network returns.
        read: from that to the output that is scored; None takes :func:`outputs_to_score`. A loss that the network
            computes itself reads what it reads.

    Raises:
        DataError: an unknown loss.
        ModelError: the network computes no loss of its own where that is asked for, or the convention of its labels
            cannot be told.
    """
    if loss is None:
        loss = _default(model, batch, run)
    name, options = parsed_call(loss) if isinstance(loss, str) else ("", {})
    if name == "model":
        return _own(model, batch, run, **options)
    named = tensor_loss(loss)
    if named is not None:
        output = run(batch) if read is None else read(run(batch))
        told = doubts(named, output, outputs_to_score(output), batch.targets)
        return TensorScorer(named, (*told, *not_moved(named, model, batch)), read)
    if not callable(loss):
        raise DataError(
            f'Unknown loss of type {type(loss).__name__}: expected "cross_entropy", "mse", "bce", "model", a loss of '
            "torch.nn, or a function of (outputs, targets)."
        )
    return FunctionScorer(loss, whole=read is None and not isinstance(run(batch), Tensor), chosen=read)


def _own(
    model: nn.Module, batch: Batch, run: Callable[[Batch], Any], by: Any = "example", **more: Any
) -> OwnScorer:
    if more:
        raise DataError(f'loss="model" has no option {sorted(more)[0]!r}. Known options: by.')
    convention = None
    if check_by(by) == "example":
        convention = convention_of(model, batch, run)
    if convention is not None:
        return OwnScorer(model, convention)
    return OwnScorer(
        model,
        None,
        (
            f"The loss is {type(model).__name__}'s own, one number for each batch, averaged over batches by their "
            "numbers of examples: it depends on how the data are cut into batches.",
        ),
    )


def _default(model: nn.Module, batch: Batch, run: Callable[[Batch], Any]) -> str:
    """Return the loss for a network and its data where none was asked for."""
    if not is_pretrained(model):
        refuse_own_tokens(batch)
        refuse_values(batch.targets)
        return "cross_entropy"
    way_out = (
        'pass loss= one of "cross_entropy", "mse" (for images, say) and "bce" (on the command line --loss), or a '
        "function of (outputs, targets)."
    )
    try:
        found = run(with_labels(model, batch))
    except IsthmusError as error:
        raise ModelError(
            f"{error} Without loss= the network computes its own from the labels; if these are of another kind, "
            f"{way_out}"
        ) from error
    if not isinstance(as_mapping(found).get("loss"), Tensor):
        given = (
            "these batches, which have no labels" if batch.targets is None else "the labels of these batches"
        )
        raise ModelError(
            f"{type(model).__name__} computes no loss from {given}, so how it is to be scored is unknown. Add what it "
            f"reads, such as 'labels', use the class with the head it was trained with, or {way_out}"
        )
    plain = batch.target_key is None and are_next_tokens(batch)
    return "cross_entropy" if plain else "model"


@torch.no_grad()
def score(outputs: Any, targets: Any, loss: Loss = "cross_entropy") -> Scores:
    """Score the outputs of one batch.

    Args:
        outputs: shape ``(n, ...)``. For classes: ``(n, classes)``, ``(n, positions, classes)`` or, as
            convolutions give them, ``(n, classes, height, width)``: every position counts. A function is given
            anything else as it is.
        targets: class indices ``(n,)`` or ``(n, positions...)``, or probabilities of the classes in the shape of the
            outputs; for ``"mse"`` and ``"bce"`` the shape of the outputs.
        loss: see :data:`Loss`; all but ``"model"``, which needs a network.

    Returns:
        Losses and weights and, where the targets are labels, the share of right positions.

    Raises:
        DataError: no targets, labels that are no class indices or lie outside the outputs' range, unknown loss.
        ShapeError: outputs and targets, or the values of a loss function, do not fit together.
    """
    named = tensor_loss(loss)
    if named is not None:
        return named.scores(widened(outputs), targets)
    if not callable(loss):
        raise DataError(f"Unknown loss of type {type(loss).__name__}: expected a name or a function.")
    whole = not isinstance(outputs, Tensor)
    scorer = FunctionScorer(loss, whole)
    if whole:
        return scorer.score(outputs, Batch((main_output(outputs),), {}, targets))
    return scorer.score(outputs, Batch((), {}, targets))


def outputs_to_score(output: Any) -> Tensor:
    """Return the tensor of a network's outputs that is scored.

    Raises:
        ModelError: there is none, or its entries are whole numbers.
    """
    found = main_output(output)
    if not found.is_floating_point():
        raise ModelError(
            f"Expected the model to return floating outputs to be scored, found {found.dtype}. "
            "Return logits or predictions, not labels."
        )
    return found


def by_position(tensor: Tensor, labels: Tensor | None) -> Tensor:
    """Return ``(n, positions, entries)``: classes at each position, or all outputs of an example as one."""
    by_class = None if labels is None else class_axis_last(tensor, labels)
    if by_class is None:
        return tensor.reshape(len(tensor), 1, -1)
    return by_class.reshape(len(tensor), -1, by_class.shape[-1])


def _mean(first: Any, second: Any) -> Any:
    """Return the mean of every floating tensor in two outputs of one form, in at least float32."""

    def middle(a: Any, b: Any) -> Any:
        if not isinstance(a, Tensor) or not a.is_floating_point():
            return a
        wide = torch.promote_types(a.dtype, torch.float32)
        return torch.lerp(a.to(wide), b.to(device=a.device, dtype=wide), 0.5)

    return pytree.tree_map(middle, first, second)


def _to_device_of(kept: Any) -> Callable[[Any], Any]:
    device = next((v.device for v in pytree.tree_leaves(kept) if isinstance(v, Tensor)), None)
    return lambda value: value.to(device) if isinstance(value, Tensor) and device is not None else value
