"""Data sets as values: pixels, labels, and which examples they are; and batches of them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import overload

import torch
from torch import Tensor

from isthmus.errors import DataError
from isthmus.training._normalise import Normalisation, Normalise, normalisation_of, read_normalise
from isthmus.training._seeds import seeded_generator

__all__ = ["Dataset", "DatasetBatches", "Described", "Outline", "to_batches"]


@dataclass(frozen=True, eq=False)
class Dataset:
    """Labelled examples held in memory, stored as they come, scaled to [0, 1] and normalised on use.

    Attributes:
        name: such as ``"mnist"``.
        split: ``"train"`` or ``"test"``.
        values: what is stored, shape ``(n, channels, height, width)`` or ``(n, features)``; uint8 for images.
        labels: class numbers, int64, shape ``(n,)``.
        classes: name of each class; labels lie in ``[0, len(classes))``.
        scale: what ``values`` are divided by to lie in [0, 1].
        examples: position of every example in the published order of the split, int64, shape ``(n,)``;
            by default 0, 1, ….
        note: what a reader of results should know, such as lossy images; may be empty.
        normalisation: what inputs in [0, 1] are shifted and scaled by on use, if anything.

    Raises:
        DataError: no examples, unequal lengths, labels out of range, or values that are not finite or do not
            lie in [0, 1] after scaling.
    """

    name: str
    split: str
    values: Tensor
    labels: Tensor
    classes: tuple[str, ...]
    scale: float = 1.0
    examples: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    note: str = ""
    normalisation: Normalisation | None = None

    def __post_init__(self) -> None:
        """Check the tensors against each other."""
        where = f"{self.name} {self.split}"
        count = len(self.values) if self.values.ndim else 0
        if count == 0:
            raise DataError(f"{where}: holds no examples. Check the files or the size of the subset.")
        if self.labels.shape != (count,) or self.labels.dtype != torch.int64:
            raise DataError(
                f"{where}: expected {count} int64 labels, one per example, found "
                f"{self.labels.dtype} of shape {tuple(self.labels.shape)}."
            )
        bad = (self.labels < 0) | (self.labels >= len(self.classes))
        if bool(bad.any()):
            first = int(bad.nonzero()[0, 0])
            raise DataError(
                f"{where}: labels must lie in 0..{len(self.classes) - 1}; example {first} has label "
                f"{int(self.labels[first])}, and {int(bad.sum())} in all are out of range. Is the file "
                "damaged, or of a data set with more classes?"
            )
        low, high = (float(v) / self.scale for v in (self.values.min(), self.values.max()))
        if not (low >= 0 and high <= 1):
            raise DataError(f"{where}: expected inputs in [0, 1] after scaling, found {low:g} to {high:g}.")
        if self.normalisation is not None:
            self.normalisation.check(self.values.shape[1] if self.values.ndim > 1 else 1, where)
        if len(self.examples) == 0:
            object.__setattr__(self, "examples", torch.arange(count))

    def __repr__(self) -> str:
        """Return one line: name, split, and how many examples of which shape."""
        return f"Dataset({self.name!r}, {self.split!r}, {len(self)} examples of {self.input_shape})"

    def __len__(self) -> int:
        """Return the number of examples."""
        return len(self.labels)

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one example."""
        return tuple(self.values.shape[1:])

    @property
    def inputs(self) -> Tensor:
        """All inputs as float32 in [0, 1], then normalised: a new tensor each time, four times the bytes of uint8."""
        return self._scaled(self.values)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of values, scale, normalisation and labels, hexadecimal: the same when the data are the same."""
        also = "" if self.normalisation is None else f" {self.normalisation}"
        digest = hashlib.sha256(
            f"{self.values.dtype} {tuple(self.values.shape)} {self.scale!r} {len(self.classes)}{also}\n".encode()
        )
        for tensor in (self.values, self.labels):
            digest.update(tensor.contiguous().cpu().numpy().data)
        return digest.hexdigest()

    def batch(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Return ``(inputs, labels)`` of the examples at ``index``, int64; inputs as in :attr:`inputs`."""
        return self._scaled(self.values.index_select(0, index)), self.labels.index_select(0, index)

    def subset(self, index: Tensor) -> Dataset:
        """Return the data set of the examples at ``index``, int64, in that order."""
        return replace(
            self, values=self.values[index], labels=self.labels[index], examples=self.examples[index]
        )

    def shuffled(self, seed: int = 0) -> Dataset:
        """Return the examples in an order drawn from ``seed``."""
        return self.subset(torch.randperm(len(self), generator=seeded_generator(seed, "shuffle")))

    def take(self, count: int, seed: int = 0) -> Dataset:
        """Return ``count`` examples drawn without replacement, so that no slice sorted by class is taken.

        Raises:
            DataError: fewer than 1 or more than there are.
        """
        if not 1 <= count <= len(self):
            raise DataError(f"{self.name} {self.split}: cannot take {count} of {len(self)} examples.")
        order = torch.randperm(len(self), generator=seeded_generator(seed, "shuffle"))
        return self.subset(order[:count])

    def to(self, device: torch.device | str) -> Dataset:
        """Return the data set with values and labels on a device."""
        return replace(self, values=self.values.to(device), labels=self.labels.to(device))

    def normalised(self, normalise: Normalise | None, *, train: Dataset | None = None) -> Dataset:
        """Return the data set with its inputs shifted and scaled on use.

        Args:
            normalise: see :func:`isthmus.study.read_normalise`.
            train: the training split, whose mean and standard deviation ``"train"`` takes; by default this data set,
                which must be one then.

        Raises:
            DataError: something else, or another number of channels.
        """
        chosen = read_normalise(normalise)
        if isinstance(chosen, str):
            source = self if train is None else train
            if source.split not in ("train", "data"):
                raise DataError(
                    f"{self.name} {self.split}: normalise 'train' takes mean and deviation of the training set, "
                    "which was not given. Give it, or MEAN/STD."
                )
            chosen = normalisation_of(source.values, source.scale, f"{source.name} {source.split}")
        return replace(self, normalisation=chosen)

    def _scaled(self, values: Tensor) -> Tensor:
        if self.normalisation is not None:
            return self.normalisation.apply(values.float() / self.scale)
        return values.float() if self.scale == 1.0 else values.float().div_(self.scale)


@dataclass(frozen=True)
class Outline:
    """A data set as it was published, without its examples.

    Attributes:
        name: such as ``"mnist"``.
        classes: name of each class.
        input_shape: shape of one example.
        examples: how many there are.
        digest: empty, for there is nothing to make it of.
    """

    name: str
    classes: tuple[str, ...]
    input_shape: tuple[int, ...]
    examples: int
    digest: str = ""

    def __len__(self) -> int:
        """Return the number of examples."""
        return self.examples


Described = Dataset | Outline
"""What is known of a data set, with its examples or without."""


class DatasetBatches(Sequence[tuple[Tensor, Tensor]]):
    """Batches of a data set, made when asked for; can be iterated any number of times.

    Attributes:
        dataset: where the examples come from.
        order: positions in ``dataset`` in the order they are used, int64.
        batch_size: examples per batch; the last may be smaller.
        device: where the batches are put.
    """

    def __init__(
        self, dataset: Dataset, order: Tensor, batch_size: int, device: torch.device | str | None = None
    ) -> None:
        self.dataset, self.order, self.batch_size, self.device = dataset, order, batch_size, device

    @property
    def examples(self) -> Tensor:
        """Which examples are used: their positions in the published order of the split, int64."""
        return self.dataset.examples[self.order]

    def __len__(self) -> int:
        """Return the number of batches."""
        return -(-len(self.order) // self.batch_size)

    @overload
    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]: ...

    @overload
    def __getitem__(self, index: slice) -> DatasetBatches: ...

    def __getitem__(self, index: int | slice) -> tuple[Tensor, Tensor] | DatasetBatches:
        """Return one batch ``(inputs, labels)``, or the batches of a slice."""
        if isinstance(index, slice):
            if index.step not in (None, 1):
                raise DataError("Batches can only be sliced without a step.")
            start, stop, _ = index.indices(len(self))
            order = self.order[start * self.batch_size : stop * self.batch_size]
            return DatasetBatches(self.dataset, order, self.batch_size, self.device)
        number = range(len(self))[index]
        inputs, labels = self.dataset.batch(
            self.order[number * self.batch_size : (number + 1) * self.batch_size]
        )
        return (inputs, labels) if self.device is None else (inputs.to(self.device), labels.to(self.device))

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield every batch in order."""
        return (self[number] for number in range(len(self)))


def to_batches(
    dataset: Dataset,
    batch_size: int = 500,
    *,
    limit: int | None = None,
    seed: int | None = 0,
    device: torch.device | str | None = None,
) -> DatasetBatches:
    """Cut a data set into batches, shuffled once, so that even the first batches hold every class.

    Args:
        dataset: the data.
        batch_size: examples per batch.
        limit: use only so many examples (the first of the shuffled order); all by default.
        seed: of the shuffle; ``None`` keeps the order of the data set.
        device: where the batches are put.

    Returns:
        A sequence of ``(inputs, labels)`` that can be iterated again and again; ``.examples`` says which
        examples it uses.

    Raises:
        DataError: a batch size or limit below 1.
    """
    if batch_size < 1 or (limit is not None and limit < 1):
        raise DataError(f"to_batches: batch size {batch_size} and limit {limit} must be at least 1.")
    count = len(dataset)
    order = torch.arange(count)
    if seed is not None:
        order = torch.randperm(count, generator=seeded_generator(seed, "shuffle"))
    return DatasetBatches(dataset, order[:limit], batch_size, device)
