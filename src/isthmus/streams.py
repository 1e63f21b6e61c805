"""Batches changed on the way: cut to a number of examples, regrouped, or mapped by a function."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from itertools import count
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from isthmus.batches import Batch, Batches, as_batch, reusable
from isthmus.errors import DataError, IsthmusError

__all__ = ["Mapped", "guarded", "limited"]


class Mapped:
    """Batches changed by a function on the way: iterable as often as what they come from.

    Args:
        function: from batch to batch.
        batches: any batches.
    """

    def __init__(self, function: Callable[[Batch], Batch], batches: Batches) -> None:
        self._function, self._batches = function, reusable(batches)

    def __iter__(self) -> Iterator[Batch]:
        """Yield the changed batches."""
        return (self._function(as_batch(item)) for item in self._batches)


def limited(batches: Batches, *, limit: int | None = None, batch_size: int | None = None) -> Batches:
    """Return the first examples of any batches, in batches of a given size, read only as far as needed.

    Nothing is drawn at random: these are the first ``limit`` examples in the order in which ``batches`` gives them.
    They are kept once read, so that every later pass sees the same ones, also where ``batches`` shuffles itself
    anew or can be read only once. Without a limit nothing is kept.

    Args:
        batches: see :mod:`isthmus.batches`.
        limit: number of examples; all by default.
        batch_size: examples per batch; None leaves batches as they are but for the last. Neighbouring batches are
            put together where all their tensors have the same shapes but for axis 0, so batches padded to
            different lengths stay apart, and may be smaller. A loss that compares the examples of a batch with
            each other changes with its size.

    Returns:
        Batches that can be iterated any number of times; ``batches`` itself if there is nothing to do.

    Raises:
        DataError: a number below 1.

    Example:
        >>> [len(b.args[0]) for b in limited([torch.zeros(5, 2), torch.zeros(5, 2)], limit=7, batch_size=4)]
        [4, 3]
    """
    for name, value in (("limit", limit), ("batch size", batch_size)):
        if value is not None and value < 1:
            raise DataError(f"Limiting data: expected a {name} of at least 1, found {value}.")
    if limit is None:
        return batches if batch_size is None else _Sized(reusable(batches), None, batch_size)
    return _Kept(_Sized(batches, limit, batch_size))


class _Sized:
    """The first examples of batches, in batches of a size; reads its source anew each time."""

    def __init__(self, batches: Batches, limit: int | None, batch_size: int | None) -> None:
        self._batches, self._limit, self._size = batches, limit, batch_size

    def __iter__(self) -> Iterator[Batch]:
        cut = self._cut()
        return cut if self._size is None else _regrouped(cut, self._size)

    def _cut(self) -> Iterator[Batch]:
        left = self._limit
        for item in self._batches:
            batch = as_batch(item)
            if left is None:
                yield batch
                continue
            yield batch if batch.size <= left else batch.head(left)
            left -= batch.size
            if left <= 0:  # asked before the source is: its next batch may be costly, or never come
                return


class _Kept:
    """Batches kept as they are read, whoever reads them first."""

    def __init__(self, batches: Batches) -> None:
        self._rest, self._seen = iter(batches), list[Batch]()
        self._failure: Exception | None = None

    def __iter__(self) -> Iterator[Batch]:
        for k in count():
            if k == len(self._seen):
                if self._failure is not None:  # a generator that failed would only look finished
                    raise self._failure
                try:
                    self._seen.append(next(self._rest))
                except StopIteration:
                    return
                except Exception as error:
                    self._failure = error
                    raise
            yield self._seen[k]


def _regrouped(batches: Iterable[Batch], size: int) -> Iterator[Batch]:
    """Yield batches of ``size`` examples, and smaller ones before a batch of another form and at the end."""
    waiting: Batch | None = None
    for batch in batches:
        if waiting is not None:
            together = _joined(waiting, batch)
            if together is None:
                yield waiting
            batch = batch if together is None else together
        start = 0
        while batch.size - start >= size:
            yield batch.rows(start, start + size) if batch.size > size else batch
            start += size
        waiting = None
        if start < batch.size:
            waiting = batch if start == 0 else batch.rows(start, batch.size)
    if waiting is not None:
        yield waiting


def _joined(first: Batch, second: Batch) -> Batch | None:
    """Return two batches as one, or None where they are not alike."""
    parts = [(b.args, dict(b.kwargs), b.targets) for b in (first, second)]
    (one, form), (two, other) = (pytree.tree_flatten(p) for p in parts)
    if form != other or first.target_key != second.target_key:
        return None
    found = []
    for a, b in zip(one, two, strict=True):
        if isinstance(a, Tensor) and isinstance(b, Tensor):
            listed = a.ndim > 0 and b.ndim > 0 and len(a) == first.size and len(b) == second.size
            if not listed or a.shape[1:] != b.shape[1:] or a.dtype != b.dtype:
                return None
            found.append(torch.cat([a, b]))
        elif isinstance(a, Tensor) or isinstance(b, Tensor) or a != b:
            return None
        else:
            found.append(a)
    args, kwargs, targets = pytree.tree_unflatten(found, form)
    return replace(first, args=args, kwargs=kwargs, targets=targets)


def guarded(batches: Batches, what: str) -> Iterator[Any]:
    """Yield batches of the user's; whatever reading one raises becomes an error that names the data.

    Args:
        batches: any iterable.
        what: how the message calls them.

    Raises:
        DataError: reading a batch failed.
    """
    reader = iter(batches)
    for number in count():
        try:
            batch = next(reader)
        except StopIteration:
            return
        except (IsthmusError, MemoryError):
            raise
        except (Exception, SystemExit) as error:  # anything user code raises
            raise DataError(
                f"{what}: reading batch {number} failed with {type(error).__name__}: {error}."
            ) from error
        yield batch
