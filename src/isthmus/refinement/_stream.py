"""Training batches in a random order, with some of them held out; where one stands is the number of the step alone."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch

from isthmus.batches import Batch, Batches, held, iterate, reusable
from isthmus.errors import DataError
from isthmus.streams import limited

__all__ = ["TrainingStream", "position"]

LARGE = 512
"""Examples beyond which a batch that may be cut is cut."""
HELD_OUT = 2000
"""Examples that are held out at most, where that is a batch or more."""
_SHARE = 0.2
"""Share of the data that is held out at most, where that is a batch or more."""
_GOLDEN = (5**0.5 - 1) / 2


class TrainingStream:
    """Batches of training data without end, and those that were held out of them.

    Data that fit into memory are visited in another random order in every pass; others in the order in which they
    come, the first batches being held out. The batch of a step is a function of the seed and of the number of the
    step, so a stream can be taken up anywhere.

    Args:
        batches: training data with targets (see :mod:`isthmus.batches`).
        seed: of the orders.
        batch_size: examples of a batch; None leaves batches as they come, but for those of more than 512 examples,
            which are cut where ``cut`` allows it.
        cut: whether examples may be scored apart from their batch.
        held_out: data to hold out instead.

    Attributes:
        held_out: the batches held out.

    Raises:
        DataError: too few examples to hold any out, or a batch size below 1.
    """

    def __init__(
        self,
        batches: Batches,
        seed: int,
        *,
        batch_size: int | None = None,
        cut: bool = True,
        held_out: Batches | None = None,
    ) -> None:
        whole = reusable(batches) if batch_size is None else limited(batches, batch_size=batch_size)
        found = held(_Cut(whole) if batch_size is None and cut else whole)
        self._seed, self._skipped = seed, 0
        self._listed = list(iterate(found)) if isinstance(found, list) else None
        self._source, self._reader, self._next = found, iter(()), -1
        self._order = (-1, torch.zeros(0))
        self.held_out = list(iterate(held_out, "held_out")) if held_out is not None else self._apart()

    def _apart(self) -> list[Batch]:
        """Take batches out of the data."""
        if self._listed is None:
            found: list[Batch] = []
            for batch in iterate(self._source):
                if found and sum(b.size for b in found) + batch.size > HELD_OUT:
                    break
                found.append(batch)
            self._skipped = len(found)
            return found
        if len(self._listed) == 1:
            return self._halved()
        total, out, left = sum(b.size for b in self._listed), list[Batch](), list[Batch]()
        most = min(HELD_OUT, _SHARE * total)
        for k in torch.randperm(len(self._listed), generator=_source(self._seed, 0)).tolist():
            batch = self._listed[k]
            takes = not out or sum(b.size for b in out) + batch.size <= most
            (out if takes else left).append(batch)
        self._listed = left
        return out

    def _halved(self) -> list[Batch]:
        """Take some examples out of the only batch."""
        assert self._listed is not None
        (only,) = self._listed
        if only.size < 2:
            raise DataError(
                "Refining on the path: expected at least two examples, one of them to be held out, found one. Give "
                "more training data."
            )
        count = max(1, min(HELD_OUT, round(_SHARE * only.size)))
        self._listed = [only.rows(count, only.size)]
        return [only.rows(0, count)]

    def batch(self, step: int) -> Batch:
        """Return the batch of a step, counted from 0.

        Raises:
            DataError: nothing is left after some was held out.
        """
        if self._listed is None:
            return self._streamed(step)
        turn, place = divmod(step, len(self._listed))
        if self._order[0] != turn:
            drawn = torch.randperm(len(self._listed), generator=_source(self._seed, turn + 1))
            self._order = (turn, drawn)
        return self._listed[int(self._order[1][place])]

    def _streamed(self, step: int) -> Batch:
        """Return the next batch of data that are read as they come; taking up later reads up to there."""
        if step < self._next or self._next < 0:
            self._reader, self._next = self._passes(), 0
        while True:
            batch = next(self._reader)
            self._next += 1
            if self._next > step:
                return batch

    def _passes(self) -> Iterator[Batch]:
        while True:
            count = 0
            for k, batch in enumerate(iterate(self._source)):
                if k >= self._skipped:
                    count += 1
                    yield batch
            if not count:
                raise DataError(
                    f"Refining on the path: all {self._skipped} batches are held out, none is left. Give more training "
                    "data, or held_out=."
                )


class _Cut:
    """Batches of which large ones are cut into equal parts of at most 512 examples."""

    def __init__(self, batches: Batches) -> None:
        self._batches = batches

    def __iter__(self) -> Iterator[Batch]:
        for batch in iterate(self._batches):
            parts = -(-batch.size // LARGE)
            bounds = [round(k * batch.size / parts) for k in range(parts + 1)]
            for start, stop in itertools.pairwise(bounds):
                yield batch if parts == 1 else batch.rows(start, stop)


def position(seed: int, step: int) -> float:
    """Return the position on the path of a step: multiples of the golden ratio, which leave no gap."""
    first = float(torch.rand((), dtype=torch.float64, generator=_source(seed, -1)))
    return (first + step * _GOLDEN) % 1.0


def _source(seed: int, turn: int) -> torch.Generator:
    return torch.Generator().manual_seed((seed * 1_000_003 + turn + 1) % 2**63)
