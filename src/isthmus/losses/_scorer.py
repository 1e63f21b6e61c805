"""What runs and scores batches needs to know of a loss: how to feed the network, what to keep, how to score it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, is_dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from isthmus.batches import Batch, main_output
from isthmus.errors import DataError, IsthmusError, ModelError
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
from isthmus.losses._tensors import CrossEntropy, TensorLoss, class_axis_last

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
        """Score what was kept of the outputs on a batch."""
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
    by_example: bool = True
    read: None = None

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
    notes: tuple[str, ...] = ()
    by_example: bool = False

    @property
    def name(self) -> str:
        """Name of the function."""
        return getattr(self.function, "__name__", type(self.function).__name__)

    @property
    def read(self) -> Callable[[Any], Any] | None:
        """Keep all outputs, where they are more than a tensor."""
        return widened if self.whole else None

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
) -> Scorer:
    """Return how a network is scored on data.

    Args:
        loss: see :data:`Loss`; None is the network's own loss for a network of transformers whose batches have labels
            that it reads, else cross-entropy.
        model: the network.
        batch: the start of the data.
        run: from a batch to all that the network returns.

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
        notes = (*_doubts(named, run(batch), batch.targets), *_not_moved(named, model, batch))
        return TensorScorer(named, notes)
    if not callable(loss):
        raise DataError(
            f'Unknown loss of type {type(loss).__name__}: expected "cross_entropy", "mse", "bce", "model", a loss of '
            "torch.nn, or a function of (outputs, targets)."
        )
    return FunctionScorer(loss, whole=not isinstance(run(batch), Tensor))


def _doubts(loss: TensorLoss, output: Any, targets: Any) -> tuple[str, ...]:
    """Return what of a network's outputs may be meant otherwise than it is read."""
    notes: list[str] = []
    scored = outputs_to_score(output)
    if scored.ndim == 0:
        raise ModelError(
            "The first tensor that the model returns is a single number, so it cannot be scored example by example. "
            "Return the logits or predictions first, or pass loss= a function of (outputs, targets)."
        )
    several = [t for t in _tensors(output) if t.is_floating_point() and t.ndim > 0]
    if len(several) > 1 and not _has_logits(output):
        notes.append(
            f"The network returns {len(several)} tensors, of which the first, {_shape(scored)}, is scored. For another "
            "one pass loss= a function of (outputs, targets), or let the network name it 'logits'."
        )
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


def _are_probabilities(logits: Tensor) -> bool:
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    tolerance = 1e-4 if wide.dtype == logits.dtype else 1e-2
    return bool((wide >= 0).all()) and bool(((wide.sum(-1) - 1).abs() < tolerance).all())


def _tensors(output: Any) -> list[Tensor]:
    if isinstance(output, Tensor):
        return [output]
    if is_dataclass(output) and not isinstance(output, (type, Mapping)):
        output = vars(output)
    if isinstance(output, Mapping):
        output = list(output.values())
    return [t for part in output for t in _tensors(part)] if isinstance(output, (tuple, list)) else []


def _has_logits(output: Any) -> bool:
    named = isinstance(output, Mapping) and output.get("logits") is not None
    return named or isinstance(getattr(output, "logits", None), Tensor)


def _shape(tensor: Tensor) -> str:
    return str(tuple(tensor.shape))


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
        _refuse_own_tokens(batch)
        return "cross_entropy"
    way_out = 'pass loss= one of "cross_entropy", "mse" and "bce", or a function of (outputs, targets).'
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
    tokens = _tokens_of(batch)
    plain = batch.target_key is None and tokens is not None and _are_next(tokens, batch.targets)
    return "cross_entropy" if plain else "model"


def _tokens_of(batch: Batch) -> Tensor | None:
    """Return the tokens of a batch whose targets have the same shape."""
    tokens = batch.kwargs.get("input_ids", batch.args[0] if batch.args else None)
    targets = batch.targets
    if not isinstance(tokens, Tensor) or not isinstance(targets, Tensor) or tokens.is_floating_point():
        return None
    return tokens if tokens.shape == targets.shape and tokens.ndim == 2 else None


def _refuse_own_tokens(batch: Batch) -> None:
    """Refuse targets that are the tokens themselves: whether the network shifts them is unknown."""
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


def _not_moved(loss: TensorLoss, model: nn.Module, batch: Batch) -> tuple[str, ...]:
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


def _are_next(tokens: Tensor, targets: Tensor) -> bool:
    """Return whether every target that counts is the next token already, as in ``(text[:-1], text[1:])``."""
    counted = targets[:, :-1] >= 0
    same, following = (targets == tokens)[:, :-1][counted], (targets[:, :-1] == tokens[:, 1:])[counted]
    return bool(following.all()) and not bool(same.all())


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
