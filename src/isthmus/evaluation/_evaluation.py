r"""Running a model on a state, evaluating it, combining states: shared by lines, merges and studies.

Nothing here changes a module or a state. Outputs are scored in at least float32, sums are float64.
"""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from isthmus.batches import Batch, Batches, device_of, iterate
from isthmus.errors import DataError, IsthmusError, IsthmusWarning, ModelError
from isthmus.losses import (
    Loss,
    Scores,
    completed,
    configs_kept,
    outputs_to_score,
    scorer_for,
)
from isthmus.replica import Replica
from isthmus.states import (
    State,
    check_finite,
    check_same_architecture,
    equal_entries,
    with_versions_of,
)

__all__ = [
    "Bound",
    "Evaluation",
    "Relabels",
    "bind",
    "check_frame",
    "combine_states",
    "evaluate",
    "floating_dtype",
    "relative_difference",
    "require_counted",
    "require_deterministic",
    "require_evaluation",
    "require_finite",
]


class Relabels(Protocol):
    """Anything that relabels the units of a state, such as :class:`isthmus.matching.Alignment`."""

    def apply(self, model_or_state: Any, /) -> Any:
        """Return the relabelled state."""
        ...


EXAMINED = 8
"""Examples on which a private copy is examined."""


def check_frame(relabelling: Relabels, state: Mapping[str, Tensor]) -> None:
    """Let a relabelling that knows the network it leads to say whether a state is that network's."""
    check = getattr(relabelling, "check_frame", None)
    if check is not None:
        check(state)


_DROPOUT = (
    nn.Dropout,
    nn.Dropout1d,
    nn.Dropout2d,
    nn.Dropout3d,
    nn.AlphaDropout,
    nn.FeatureAlphaDropout,
)
_NORMALISATION = (
    nn.modules.batchnorm._BatchNorm,
    nn.InstanceNorm1d,
    nn.InstanceNorm2d,
    nn.InstanceNorm3d,
)


@dataclass(frozen=True)
class Evaluation:
    """How well a network does on data.

    Attributes:
        loss: mean loss, in ``unit``.
        accuracy: share of right predictions, or None where there is no right or wrong.
        examples: number of examples.
        unit: what the loss is measured in.
        notes: what a reader of the numbers should know.
    """

    loss: float
    accuracy: float | None
    examples: int
    unit: str = "nats per example"
    notes: tuple[str, ...] = ()

    @property
    def perplexity(self) -> float | None:
        """The exponential of a loss in nats per token; None for any other."""
        return math.exp(min(self.loss, 700.0)) if self.unit == "nats per token" else None


class Bound:
    """A network's code with the tensors of one state, as a function of batches; see :func:`bind`."""

    def __init__(self, replica: Replica, state: State, read: Callable[[Any], Any] | None = None) -> None:
        self._replica, self._state = replica, state
        self._read = outputs_to_score if read is None else read
        self._device, self._dtype = device_of(replica.module), floating_dtype(state)

    def __call__(self, batch: Batch) -> Any:
        """Return what is read from the outputs of a batch, without gradients.

        Raises:
            ModelError: the model cannot run on the batch, reads tensors that are neither its own nor the state's,
                or its outputs are no floating tensor.
        """
        moved = self._prepared(batch)
        with self._naming(moved):
            output = self._replica.run_on(self._state, moved.args, moved.kwargs)
        return self._read(output)

    def prepare(self, batch: Batch) -> None:
        """Examine the private copy on a batch, if that was not done yet, and put the state in."""
        self._prepared(batch)
        self._replica.fill(self._state)

    def _prepared(self, batch: Batch) -> Batch:
        moved = batch.to(self._device, self._dtype)
        if not self._replica.examined:
            with self._naming(moved):
                self._examine(moved)
        return moved

    def _examine(self, batch: Batch) -> None:
        """Examine on some examples, or on the whole batch where the network does not run on a part."""
        try:
            part = batch.head(EXAMINED)
            self._replica.examine(self._state, part.args, part.kwargs)
        except (ModelError, torch.OutOfMemoryError):
            raise
        except Exception:  # whatever a network raises on a part of a batch
            self._replica.examine(self._state, batch.args, batch.kwargs)

    @contextlib.contextmanager
    def _naming(self, batch: Batch) -> Iterator[None]:
        try:
            yield
        except (IsthmusError, torch.OutOfMemoryError):
            raise
        except (RuntimeError, TypeError, ValueError, IndexError, KeyError, AttributeError) as error:
            raise ModelError(
                f"Running {type(self._replica.source).__name__} on a batch with {_shapes(batch)} failed with "
                f"{type(error).__name__}: {error}. Do the data fit the model?"
            ) from error


def bind(
    model: nn.Module | Replica,
    state: Mapping[str, Tensor] | None = None,
    read: Callable[[Any], Any] | None = None,
) -> Bound:
    """Return a function that runs ``model`` with the tensors of ``state`` on a batch.

    The batch is moved to the model's device, and its floating inputs to the dtype of the state's first
    floating tensor. The function runs without gradients.
    A private copy runs (:class:`isthmus.replica.Replica`): neither the module nor the state is changed, and what
    the module keeps besides its state (attributes computed in evaluation, say) is made anew from the state.

    Args:
        model: the module whose code is run, or a copy of it that several states share.
        state: its tensors by name; None takes the module's own.
        read: from all that the module returns to what the function returns; default:
            :func:`isthmus.losses.outputs_to_score`.

    Raises:
        CheckpointError: the state's keys are not the module's, or tensors that the module ties differ.
        ShapeError: a tensor has another shape than in the module.
        ModelError: no module was given; the function's own errors are those of :class:`Bound`.
    """
    replica = Replica.of(model)
    if state is None:
        return Bound(replica, replica.own_state(), read)
    tensors = {name: tensor.detach() for name, tensor in state.items()}
    replica.check(tensors)
    return Bound(replica, tensors, read)


def evaluate(
    model: nn.Module | Replica,
    batches: Batches,
    *,
    state: Mapping[str, Tensor] | None = None,
    loss: Loss | None = None,
    read: Callable[[Any], Tensor] | None = None,
) -> Evaluation:
    """Return the mean loss and accuracy of a model over all examples of ``batches``.

    Args:
        model: a module in evaluation mode, or a private copy of it that is used again.
        batches: see :mod:`isthmus.batches`, with targets.
        state: tensors to run the module with; None takes its own.
        loss: see :data:`isthmus.losses.Loss`; by default the network's own for a network of transformers with labels
            among its inputs, else cross-entropy.
        read: from all that the network returns to the output that is scored; by default ``logits``, else the first.

    Raises:
        ModelError: the model is in training mode, or a loss is NaN or infinite.
        DataError: no batches, no targets, labels out of range, or none that counts.
    """
    require_evaluation(model.source if isinstance(model, Replica) else model)
    replica = Replica.of(model)
    model = replica.source
    data = (completed(model, batch) for batch in iterate(batches))
    first = next(data)
    with configs_kept(model):
        whole = bind(replica, state, read=lambda output: output)
        scorer = scorer_for(loss, model, first, whole, read)
        run = bind(replica, state, read=scorer.read)
        parts, examples = list[Scores](), 0
        for batch in chain((first,), data):
            moved = scorer.prepare(batch).to(device_of(model))
            parts.append(scorer.score(run(moved), moved))
            examples += batch.size
    found = Scores.cat(parts)
    require_finite(found.losses, "The loss of the model")
    require_counted(found, "The loss of the model")
    for note in scorer.notes:
        warnings.warn(note, IsthmusWarning, stacklevel=2)
    return Evaluation(found.loss, found.accuracy, examples, scorer.unit(first), scorer.notes)


def require_evaluation(model: nn.Module, name: str = "The model") -> None:
    """Check that no submodule is in a training mode that would change what it computes.

    Looked at: dropout with a positive rate (also inside recurrent and attention modules), randomised ReLU,
    batch normalisation, and instance normalisation with running statistics.

    Raises:
        ModelError: naming the submodules, or what was given in place of a module.
    """
    if not isinstance(model, nn.Module):
        raise ModelError(
            f"{name}: expected a torch.nn.Module, since its code is run, found {type(model).__name__}. "
            "Load the state into a module."
        )
    guilty = [
        f"{path or type(module).__name__} ({type(module).__name__})"
        for path, module in model.named_modules()
        if module.training and _mode_matters(module)
    ]
    if guilty:
        more = f" and {len(guilty) - 3} more" if len(guilty) > 3 else ""
        raise ModelError(
            f"{name} is in training mode: {', '.join(guilty[:3])}{more} would compute something else in "
            "evaluation. Call model.eval() first."
        )


def require_deterministic(
    model: nn.Module | Replica,
    batch: Batch,
    state: Mapping[str, Tensor] | None = None,
    name: str = "The model",
    read: Callable[[Any], Any] | None = None,
) -> None:
    """Check that two runs on one batch give the same outputs, up to the root of the machine precision.

    The global random state stays where it is. ``read`` is that of :func:`bind`.

    Raises:
        ModelError: the outputs differ.
    """
    run = bind(model, state, read)
    first, second = run(batch), run(batch)
    difference = relative_difference(first, second)
    if difference > torch.finfo(first.dtype).eps ** 0.5:
        raise ModelError(
            f"{name} is random in evaluation: two runs on one batch differ by {difference:.2g} of the "
            "largest output. Switch off sampling, noise and functional dropout (F.dropout needs "
            "training=self.training)."
        )


def require_finite(losses: Tensor, what: str) -> None:
    """Check per-example losses, shape ``(n,)``; ``what`` names them in the message.

    Raises:
        ModelError: some are NaN or infinite.
    """
    bad = int((~losses.isfinite()).sum())
    if bad:
        raise ModelError(
            f"{what} is NaN or infinite on {bad} of {len(losses)} examples. Look for NaN in the inputs, a "
            "diverged network, or overflow in half precision (run in float32)."
        )


def require_counted(scores: Scores, what: str) -> None:
    """Check that some labels count; ``what`` names their loss in the message.

    Raises:
        DataError: all of them are ignored.
    """
    if float(scores.weights.sum()) == 0:
        raise DataError(
            f"{what} is a mean over nothing: every label is one that is ignored. Give data with labels, or name the "
            'ignored one, as in loss="cross_entropy(ignore_index=255)".'
        )


def relative_difference(reference: Tensor, other: Tensor) -> float:
    """Return the largest absolute difference over the largest entry of ``reference``.

    NaN in the same places count as equal; other NaN, and other shapes, give infinity.
    """
    if reference.shape != other.shape:
        return float("inf")
    wide = torch.promote_types(reference.dtype, torch.float32)
    reference = reference.detach().to(wide)
    other = other.detach().to(device=reference.device, dtype=wide)
    if reference.numel() == 0 or torch.allclose(reference, other, rtol=0.0, atol=0.0, equal_nan=True):
        return 0.0
    scale = reference.abs().max().clamp(min=torch.finfo(reference.dtype).tiny)
    return float(((reference - other).abs().max() / scale).nan_to_num(nan=float("inf"), posinf=float("inf")))


def combine_states(
    states: Sequence[Mapping[str, Tensor]],
    function: Callable[[list[Tensor]], Tensor],
    *,
    names: Sequence[str] | None = None,
    check: bool = True,
) -> State:
    """Combine states of one architecture, tensor by tensor.

    Args:
        states: at least one mapping with the same keys and shapes.
        function: of the float64 (or complex128) versions of one tensor in every state.
        names: how error messages call the states; by default "model 0", "model 1" and so on.
        check: whether keys, shapes and finiteness are checked.

    Returns:
        A state with fresh tensors in the dtype and on the device of the first state. Integer and boolean
        tensors (such as ``num_batches_tracked``) are copies of the first state's. Tensors that share memory
        in the first state, and are equal in the others, share memory in the result.

    Raises:
        CheckpointError: keys differ, or an entry is NaN or infinite.
        ShapeError: shapes differ.
    """
    if check:
        names = [f"model {k}" for k in range(len(states))] if names is None else names
        for name, state in zip(names, states, strict=True):
            check_same_architecture(states[0], state, names[0], name)
            check_finite(state, name)
    first_names: dict[tuple[object, ...], str] = {}
    combined: State = {}
    for key, tensor in states[0].items():
        twin = first_names.setdefault(_memory(key, tensor), key)
        if twin != key and all(equal_entries(state[twin], state[key]) for state in states[1:]):
            combined[key] = combined[twin]
        else:
            combined[key] = _combined([state[key] for state in states], function)
    return with_versions_of(states[0], combined)


def _shapes(batch: Batch) -> str:
    """Name the inputs of a batch and their shapes."""
    named = [(None, x) for x in batch.args] + list(batch.kwargs.items())
    words = [
        f"{name + ' of ' if name else ''}{tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__}"
        for name, x in named
    ]
    return "inputs " + ", ".join(words)


def _memory(key: str, tensor: Tensor) -> tuple[object, ...]:
    """Return a key that two tensors share exactly when they are the same view of the same memory."""
    pointer = tensor.data_ptr() if not tensor.is_meta else 0
    if pointer == 0:
        return (key,)
    return (tensor.device, pointer, tensor.dtype, tensor.shape, tensor.stride())


def _combined(tensors: list[Tensor], function: Callable[[list[Tensor]], Tensor]) -> Tensor:
    first = tensors[0].detach()
    if not (first.is_floating_point() or first.is_complex()):
        return first.clone()
    wide = torch.complex128 if first.is_complex() else torch.float64
    result = function([t.detach().to(device=first.device, dtype=wide) for t in tensors])
    return result.to(first.dtype, copy=True)


def floating_dtype(state: Mapping[str, Tensor]) -> torch.dtype | None:
    """Return the dtype of the first floating tensor, to which floating inputs are cast; None without any."""
    return next((t.dtype for t in state.values() if t.is_floating_point()), None)


def _mode_matters(module: nn.Module) -> bool:
    if isinstance(module, _DROPOUT):
        return module.p > 0
    if isinstance(module, nn.RReLU):
        return module.lower != module.upper
    if isinstance(module, (nn.MultiheadAttention, nn.RNNBase)):
        return module.dropout > 0
    if isinstance(module, _NORMALISATION):
        return module.track_running_stats
    return False
