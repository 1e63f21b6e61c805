"""The loss that a network computes itself: taken apart into examples where that gives its own number, else as it is."""

from __future__ import annotations

import functools
import inspect
import math
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from isthmus.batches import Batch, Batches, as_batch, device_of, main_output
from isthmus.errors import DataError, IsthmusError, ModelError
from isthmus.losses._conventions import Convention, conventions_for
from isthmus.losses._functions import widened
from isthmus.losses._scores import Scores
from isthmus.losses._tensors import IGNORED
from isthmus.streams import Mapped

__all__ = [
    "Owned",
    "as_mapping",
    "completed",
    "completed_batches",
    "configs_kept",
    "is_pretrained",
    "own_loss",
    "probes",
    "with_labels",
]

_PROBE_EXAMPLES = 16
_AGREEMENT = 1e-4
"""Most that our loss of a batch may differ from the network's, relative to the larger of it and 1; more in half
precision. A wrong convention differs in the first digits."""

BY = ("example", "batch")


class Owned(NamedTuple):
    """What is kept of a network's outputs: the tensor that is compared, and the network's own loss, 0-dimensional.

    The mean of two networks' outputs has no loss of its own.
    """

    tensor: Tensor
    loss: Tensor | None


def is_pretrained(model: nn.Module) -> bool:
    """Return whether a module is a network of transformers, or only passes its inputs on to one."""
    library = sys.modules.get("transformers.modeling_utils")
    return library is not None and isinstance(_unwrapped(model), library.PreTrainedModel)


def _unwrapped(model: Any) -> nn.Module:
    """Return the network inside ``torch.compile``, data parallelism and adapters of peft."""
    inner: Any = model
    while True:
        if hasattr(inner, "get_base_model"):
            found = inner.get_base_model()
        else:
            found = inner._modules.get("_orig_mod", None)
            if found is None and isinstance(inner, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
                found = inner.module
        if not isinstance(found, nn.Module) or found is inner:
            return inner
        inner = found


def _config(model: nn.Module) -> Any:
    return getattr(_unwrapped(model), "config", None)


def completed(model: nn.Module, batch: Batch) -> Batch:
    """Add what collators leave to a network of transformers.

    An encoder-decoder makes the tokens that its decoder reads from the labels. Networks that could keep a cache for the
    next token are told not to: it is no output that counts, and cannot be traced.
    """
    if not is_pretrained(model):
        return batch
    names, more = _parameters(model), dict[str, Any]()
    if "use_cache" in names:
        more["use_cache"] = False
    config: Any = _config(model)
    text = isinstance(batch.targets, Tensor) and batch.targets.ndim == 2
    if text and getattr(config, "is_encoder_decoder", False) and "decoder_input_ids" in names:
        made = None if "decoder_inputs_embeds" in batch.kwargs else _shifted(model, batch.targets)
        if made is not None:
            more["decoder_input_ids"] = made
    missing = {k: v for k, v in more.items() if k not in batch.kwargs}
    return replace(batch, kwargs={**batch.kwargs, **missing}) if missing else batch


def completed_batches(model: nn.Module, batches: Batches) -> Batches:
    """Return batches completed for a network of transformers; for any other network, themselves."""
    if not is_pretrained(model):
        return batches
    change = functools.partial(completed, model)
    if isinstance(batches, Iterator):
        return (change(as_batch(item)) for item in batches)
    return Mapped(change, batches)


def _shifted(model: nn.Module, labels: Tensor) -> Tensor | None:
    """Return the decoder's tokens by the network's own function, or None where it has none or cannot."""
    model = _unwrapped(model)
    config: Any = model.config
    method = getattr(model, "prepare_decoder_input_ids_from_labels", None)
    function = getattr(sys.modules[type(model).__module__], "shift_tokens_right", None)
    try:
        if method is not None:
            return method(labels)
        if function is not None:
            options = (config.pad_token_id, getattr(config, "decoder_start_token_id", None))
            return function(labels, *options[: len(inspect.signature(function).parameters) - 1])
    except (AttributeError, ValueError, TypeError):  # a configuration without the tokens that are needed
        return None
    return None


def with_labels(model: nn.Module, batch: Batch) -> Batch:
    """Return a batch whose inputs hold all that a network needs to compute its loss."""
    names = _parameters(model)
    more: dict[str, Any] = {}
    if batch.targets is not None:
        key = next((k for k in ("labels", batch.target_key, "targets", "label") if k in names), None)
        if key is not None:
            more[key] = batch.targets
        elif "**" in names:
            more[batch.target_key or "labels"] = batch.targets
    if "return_loss" in names and "labels" not in names:
        more["return_loss"] = True
    if is_pretrained(model) and names & {"return_dict", "**"}:
        more["return_dict"] = True
    return replace(batch, kwargs={**batch.kwargs, **more})


def as_mapping(output: Any) -> Mapping[str, Any]:
    """Return what a network returned by name; a single tensor, or a tuple, has no loss."""
    if isinstance(output, Mapping):
        return output
    if is_dataclass(output) and not isinstance(output, type):
        return {f.name: getattr(output, f.name) for f in fields(output)}
    names = ("loss", "logits")
    return {k: getattr(output, k) for k in names if getattr(output, k, None) is not None}


def own_loss(output: Any, model: nn.Module) -> Tensor:
    """Return the loss in a network's outputs, 0-dimensional.

    Raises:
        ModelError: there is none.
    """
    found = as_mapping(output).get("loss")
    if not isinstance(found, Tensor) or found.numel() != 1:
        shown = "none" if found is None else f"one of shape {tuple(getattr(found, 'shape', ()))}"
        raise ModelError(
            f"{type(model).__name__} was to compute its own loss, as loss='model' means, but returned {shown}. Give "
            "batches with the labels that it reads, such as {'input_ids': ..., 'labels': ...}, or pass loss= a "
            "function of (outputs, targets) that returns one value per example."
        )
    return found.reshape(())


@dataclass(frozen=True, eq=False)
class OwnReader:
    """From a network's outputs to what is kept of them."""

    model: nn.Module
    convention: Convention | None

    def __call__(self, output: Any) -> Owned:
        loss = own_loss(output, self.model)
        named = as_mapping(output)
        found = None if self.convention is None else self.convention.view(named)
        if found is None:
            found = _compared(output, named)
        return Owned(found, loss)


def _compared(output: Any, named: Mapping[str, Any]) -> Tensor:
    """Return the tensor in which two networks are compared."""
    found = main_output(output)
    if found.is_floating_point() and found.ndim > 0:
        return found
    floating = (
        v for k, v in named.items() if k != "loss" and isinstance(v, Tensor) and v.is_floating_point()
    )
    return next((v for v in floating if v.ndim > 0), found)


def scored(kept: Owned, batch: Batch, convention: Convention | None) -> Scores:
    """Score what was kept of a network's outputs on a batch.

    Raises:
        ModelError: the convention, which was right on the first batch, gives another number than the network.
    """
    if convention is None:
        assert kept.loss is not None
        return Scores(kept.loss.cpu().double().reshape(1), torch.tensor([float(batch.size)]).double())
    rows = convention.rows(widened(kept.tensor), batch)
    if rows is None or not agrees(rows, kept):
        assert kept.loss is not None
        ours = "nothing" if rows is None else f"{rows.loss:.6g}"
        raise ModelError(
            f"The network's own loss of a batch is {float(kept.loss):.6g}, but what it computed on the first batch "
            f"({convention.name}) gives {ours} here: its loss depends on more than outputs and labels. Pass "
            "loss='model(by=\"batch\")' to take its own number for each batch."
        )
    return rows


def agrees(rows: Scores, kept: Owned) -> bool:
    """Return whether scores average to the network's own loss of the batch; where nothing counts, they do."""
    if kept.loss is None or float(rows.weights.sum()) == 0:
        return True
    own, ours = float(kept.loss.detach()), rows.loss
    kinds = [t.dtype for t in (kept.tensor, kept.loss) if t.is_floating_point()]
    tolerance = max(_AGREEMENT, *(8 * torch.finfo(kind).eps for kind in kinds))
    return (
        math.isclose(own, ours, rel_tol=tolerance, abs_tol=tolerance)
        or (own == ours)
        or (own != own and ours != ours)
    )


def probes(model: nn.Module, batch: Batch, device: torch.device) -> Iterator[Batch]:
    """Yield the start of a batch, then variants in which conventions that agree on it part.

    Labels are ignored in the ways that configurations know, tokens are masked, and positions lie behind the text. Off
    the CPU a label that a network does not know ends the process, so there only such as every network knows are tried.
    """
    start = batch.head(_PROBE_EXAMPLES)
    yield start
    labels, harmless = start.targets, device.type == "cpu"
    if isinstance(labels, Tensor) and not labels.is_floating_point() and labels.numel() > 1:
        for other in _ignored_labels(model, labels.ndim, harmless):
            yield replace(start, targets=labels.where(~_some(labels), other))
    mask = start.kwargs.get("attention_mask")
    if isinstance(mask, Tensor) and mask.ndim == 2 and mask.shape[1] > 1:
        shorter = mask.clone()
        shorter[::2, -1] = 0
        yield replace(start, kwargs={**start.kwargs, "attention_mask": shorter})
    ends = [k for k in ("start_positions", "end_positions") if isinstance(start.kwargs.get(k), Tensor)]
    if ends and harmless and start.size > 1:
        moved = {k: start.kwargs[k].clone() for k in ends}
        for positions in moved.values():
            positions[0] = 2**20
        yield replace(start, kwargs={**start.kwargs, **moved})


def _ignored_labels(model: nn.Module, axes: int, harmless: bool) -> list[int]:
    """Return labels that a network may ignore."""
    config = _config(model)
    pixels = getattr(config, "semantic_loss_ignore_index", None)
    padding = getattr(config, "pad_token_id", None)
    wanted = [IGNORED] if harmless or axes < 3 else []
    wanted += [pixels] if axes == 3 else [padding] if axes == 2 else []
    return [v for v in wanted if isinstance(v, int) and not isinstance(v, bool)]


def _some(labels: Tensor) -> Tensor:
    """Return a mask of some of the labels, the first among them and not the last."""
    generator = torch.Generator().manual_seed(0)
    some = torch.rand(labels.shape, generator=generator) < 0.4
    some.view(-1)[0], some.view(-1)[-1] = True, False
    return some.to(labels.device)


def convention_of(model: nn.Module, batch: Batch, run: Any) -> Convention | None:
    """Return the convention that gives a network's own loss on all probes, or None.

    Args:
        model: the network.
        batch: the first of the data.
        run: from a batch with labels to the network's outputs.

    Raises:
        ModelError: the network computes no loss on the batch.
    """
    left = conventions_for(_config(model))
    informed = False
    for index, probe in enumerate(probes(model, batch, device_of(model))):
        try:
            output = run(with_labels(model, probe))
            own = own_loss(output, model)
        except (IsthmusError, AssertionError, AttributeError):
            if index == 0:
                raise
            continue  # the network refuses labels of this kind, so no data will hold them
        if not bool(own.isfinite()):
            continue
        informed = True
        left = [c for c in left if _fits(c, output, own, probe)]
    return left[0] if left and informed else None


def _fits(convention: Convention, output: Any, own: Tensor, batch: Batch) -> bool:
    seen = convention.view(as_mapping(output))
    if seen is None:
        return False
    moved = batch.to(seen.device)
    try:
        rows = convention.rows(widened(seen), moved)
    except IsthmusError:  # labels that this convention does not know
        return False
    if rows is None or float(rows.weights.sum()) == 0:
        return False
    return agrees(rows, Owned(seen, own))


@contextmanager
def configs_kept(*models: Any) -> Iterator[None]:
    """Put back the ``problem_type`` that networks of transformers note in their configuration when they see labels."""
    configs: list[Any] = [_config(m) for m in models if isinstance(m, nn.Module) and is_pretrained(m)]
    before = [(c, c.problem_type) for c in configs if hasattr(c, "problem_type")]
    try:
        yield
    finally:
        for config, kind in before:
            config.problem_type = kind


def check_by(by: Any) -> str:
    """Return how the network's own loss is taken.

    Raises:
        DataError: an unknown way.
    """
    if by not in BY:
        raise DataError(f'loss="model(by={by!r})": expected by="example" or by="batch".')
    return by


def _parameters(model: nn.Module) -> set[str]:
    """Return the names of the inputs of a network, ``**`` among them where it takes any."""
    found = inspect.signature(_unwrapped(model).forward).parameters
    return {"**" if p.kind is p.VAR_KEYWORD else n for n, p in found.items()}
