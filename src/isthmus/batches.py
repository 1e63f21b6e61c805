"""What counts as a batch of data, and how it is fed to a model.

Everything that runs a model takes ``batches``: any iterable (a list, a ``DataLoader``, a generator) of

* a tensor: the single positional input;
* a pair ``(inputs, targets)``, where ``inputs`` is a tensor, a tuple of positional inputs or a mapping;
* a mapping of keyword inputs, whose ``labels`` or ``targets`` entry, if there, is the target;
* a :class:`Batch`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from isthmus.errors import DataError, ModelError

__all__ = ["Batch", "Batches", "as_batch", "first_batch", "iterate", "main_output", "reusable"]

Batches = Iterable[Any]

_TARGET_KEYS = ("labels", "targets", "label", "target")


@dataclass(frozen=True)
class Batch:
    """One batch: positional inputs, keyword inputs and, if known, targets (examples on axis 0)."""

    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict[str, Any])
    targets: Tensor | None = None

    @property
    def size(self) -> int:
        """Number of examples: the length of axis 0 of the first tensor input."""
        for value in (*self.args, *self.kwargs.values()):
            if isinstance(value, Tensor) and value.ndim > 0:
                return value.shape[0]
        raise DataError("A batch holds no tensor input, so its number of examples is unknown.")

    def head(self, examples: int) -> Batch:
        """Return the batch with only its first examples (tensors whose axis 0 lists the examples are cut)."""
        size = self.size

        def cut(value: Any) -> Any:
            listed = isinstance(value, Tensor) and value.ndim > 0 and value.shape[0] == size
            return value[:examples] if listed else value

        return Batch(
            tuple(cut(a) for a in self.args), {k: cut(v) for k, v in self.kwargs.items()}, cut(self.targets)
        )

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Batch:
        """Return the batch with tensors on ``device`` and floating inputs (not targets) in ``dtype``."""

        def move(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            return value.to(device=device, dtype=dtype if value.is_floating_point() else None)

        targets = self.targets if self.targets is None else self.targets.to(device=device)
        return Batch(tuple(move(a) for a in self.args), {k: move(v) for k, v in self.kwargs.items()}, targets)


def as_batch(item: Any) -> Batch:
    """Read one item of a data set as a :class:`Batch`.

    Raises:
        DataError: the item has none of the forms listed in the module's docstring.
    """
    if isinstance(item, Batch):
        return item
    if isinstance(item, Tensor):
        return Batch((item,))
    if isinstance(item, Mapping):
        targets = next((item[k] for k in _TARGET_KEYS if k in item), None)
        return Batch((), {k: v for k, v in item.items() if k not in _TARGET_KEYS}, targets)
    if isinstance(item, Sequence) and not isinstance(item, str) and 1 <= len(item) <= 2:
        inputs, targets = item[0], (item[1] if len(item) == 2 else None)
        if targets is not None:
            targets = torch.as_tensor(targets)
        if isinstance(inputs, Tensor):
            return Batch((inputs,), {}, targets)
        if isinstance(inputs, Mapping):
            return Batch((), dict(inputs), targets)
        if isinstance(inputs, tuple):
            return Batch(inputs, {}, targets)
    raise DataError(
        f"Cannot read a {type(item).__name__} as a batch. Give a tensor, an (inputs, targets) pair, "
        "a mapping of keyword inputs, or an isthmus.batches.Batch."
    )


def iterate(batches: Batches, name: str = "batches") -> Iterator[Batch]:
    """Yield every batch, checked; raise :class:`DataError` when there is none or one is empty."""
    count = 0
    for item in batches:
        batch = as_batch(item)
        if batch.size == 0:
            raise DataError(f"{name}: batch {count} holds no examples. Drop empty batches.")
        if batch.targets is not None and batch.targets.ndim and len(batch.targets) != batch.size:
            raise DataError(
                f"{name}: batch {count} has {batch.size} inputs but {len(batch.targets)} targets. "
                "Inputs and targets must list the same examples."
            )
        count += 1
        yield batch
    if count == 0:
        raise DataError(f"{name}: expected at least one batch, found none. Is the data set empty?")


def reusable(batches: Batches) -> Batches:
    """Return something that can be iterated more than once (a one-shot iterator is read into a list)."""
    return list(batches) if isinstance(batches, Iterator) else batches


def first_batch(batches: Batches, name: str = "batches") -> Batch:
    """Return the first batch of a reusable iterable, checked."""
    return next(iterate(batches, name))


def main_output(output: Any) -> Tensor:
    """Return the tensor that is scored: the output itself, ``.logits``, ``["logits"]`` or the first entry.

    Raises:
        ModelError: no tensor is found there.
    """
    found = output
    if not isinstance(found, Tensor) and getattr(found, "logits", None) is not None:
        found = found.logits
    elif isinstance(found, Mapping):
        found = found["logits"] if "logits" in found else next(iter(found.values()), None)
    elif isinstance(found, (tuple, list)):
        found = found[0] if found else None
    if not isinstance(found, Tensor):
        raise ModelError(
            f"Expected the model to return a tensor, a mapping with 'logits' or a tuple of tensors; "
            f"found {type(output).__name__}. Wrap the model so that it returns the tensor to be scored."
        )
    return found


def device_of(model: nn.Module) -> torch.device:
    """Return the device of the first parameter or buffer, or the CPU for a module without any."""
    for tensor in (*model.parameters(), *model.buffers()):
        return tensor.device
    return torch.device("cpu")
