r"""Running a model on a state, evaluating it, combining states: shared by lines, merges and studies.

Nothing here changes a module or a state. Outputs are scored in at least float32, sums are float64.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.func import functional_call

from isthmus.batches import Batch, Batches, device_of, iterate
from isthmus.errors import CheckpointError, DataError, IsthmusError, IsthmusWarning, ModelError
from isthmus.losses import Loss, Scores, completed, configs_kept, outputs_to_score, scorer_for
from isthmus.states import (
    State,
    check_finite,
    check_same_architecture,
    equal_entries,
    state_of,
    with_versions_of,
)

__all__ = [
    "Evaluation",
    "Relabelling",
    "bind",
    "combine_states",
    "evaluate",
    "floating_dtype",
    "relative_difference",
    "require_counted",
    "require_deterministic",
    "require_evaluation",
    "require_finite",
]


class Relabelling(Protocol):
    """Anything that relabels the units of a state, such as :class:`isthmus.matching.Alignment`."""

    def apply(self, model_or_state: Any, /) -> Any:
        """Return the relabelled state."""
        ...


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


def bind(
    model: nn.Module,
    state: Mapping[str, Tensor] | None = None,
    read: Callable[[Any], Any] | None = None,
) -> Callable[[Batch], Any]:
    """Return a function that runs ``model`` with the tensors of ``state`` on a batch.

    The batch is moved to the model's device, and its floating inputs to the dtype of the state's first
    floating tensor. The function returns :func:`isthmus.batches.main_output`, without gradients.
    Neither the module nor the state is changed, also where a module is used under two names (a plain
    ``torch.func.functional_call`` leaves such a module with the wrong tensors).

    Args:
        model: the module whose code is run.
        state: its tensors by name; None runs the module as it is.
        read: from all that the module returns to what the function returns; default:
            :func:`isthmus.losses.outputs_to_score`.

    Raises:
        CheckpointError: the state's keys are not the module's, or tensors that the module ties differ.
        ShapeError: a tensor has another shape than in the module.
        ModelError: (from the returned function) the model cannot run on the batch, or its outputs are no
            floating tensor.
    """
    tensors = None if state is None else _assignable(model, state)
    dtype = floating_dtype(state_of(model) if state is None else state)

    @torch.no_grad()
    def call(batch: Batch) -> Tensor:
        moved = batch.to(device_of(model), dtype)
        try:
            if tensors is None:
                output = model(*moved.args, **moved.kwargs)
            else:
                output = functional_call(model, tensors, moved.args, dict(moved.kwargs), tie_weights=False)
        except (IsthmusError, torch.OutOfMemoryError):
            raise
        except (RuntimeError, TypeError, ValueError, IndexError, KeyError, AttributeError) as error:
            raise ModelError(
                f"Running {type(model).__name__} on a batch with {_shapes(moved)} failed with "
                f"{type(error).__name__}: {error}. Do the data fit the model?"
            ) from error
        return outputs_to_score(output) if read is None else read(output)

    return call


def evaluate(
    model: nn.Module,
    batches: Batches,
    *,
    state: Mapping[str, Tensor] | None = None,
    loss: Loss | None = None,
) -> Evaluation:
    """Return the mean loss and accuracy of a model over all examples of ``batches``.

    Args:
        model: a module in evaluation mode.
        batches: see :mod:`isthmus.batches`, with targets.
        state: tensors to run the module with; None takes its own.
        loss: see :data:`isthmus.losses.Loss`; by default the network's own for a network of transformers with labels
            among its inputs, else cross-entropy.

    Raises:
        ModelError: the model is in training mode, or a loss is NaN or infinite.
        DataError: no batches, no targets, labels out of range, or none that counts.
    """
    require_evaluation(model)
    data = (completed(model, batch) for batch in iterate(batches))
    first = next(data)
    with configs_kept(model):
        whole = bind(model, state, read=lambda output: output)
        scorer = scorer_for(loss, model, first, whole)
        run = bind(model, state, read=scorer.read)
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
    model: nn.Module, batch: Batch, state: Mapping[str, Tensor] | None = None, name: str = "The model"
) -> None:
    """Check that two runs on one batch give the same outputs, up to the root of the machine precision.

    The global random state is put back afterwards.

    Raises:
        ModelError: the outputs differ.
    """
    run = bind(model, state)
    device = device_of(model)
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
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


def _assignable(model: nn.Module, state: Mapping[str, Tensor]) -> State:
    """Check a state against a module; return its tensors, one name for each place in the module.

    A module reached by two names keeps one: ``functional_call`` would restore it wrongly.
    """
    check_same_architecture(state_of(model), state, "the model", "the state")
    places: State = {}
    seen: dict[tuple[int, str], str] = {}
    ties: dict[int, str] = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        for leaf, own in (*module._parameters.items(), *module._buffers.items()):
            name = f"{prefix}.{leaf}" if prefix else leaf
            if own is None or name not in state:
                continue
            twin = ties.setdefault(id(own), name)
            if state[twin] is not state[name] and not torch.equal(state[twin], state[name]):
                raise CheckpointError(
                    f"{twin!r} and {name!r} are one tensor in the model but differ in the state. "
                    "Give both the same values, or untie them in the model."
                )
            if (id(module), leaf) not in seen:
                places[name] = state[name].to(own.device)
            seen.setdefault((id(module), leaf), name)
    named = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    named |= {name for name, _ in model.named_buffers(remove_duplicate=False)}
    unknown = [name for name in state if name not in named]
    if unknown:
        raise CheckpointError(
            f"The state's key {unknown[0]!r} is no parameter or buffer of the model (a hook renames keys in "
            "its state_dict?), so it cannot be put in place. Pass a model without such hooks."
        )
    return places


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
