"""Tensors that are read when they are needed, and large ones in pieces: no network need be in memory to be matched.

An inner product names its tensors by *sources*. A tensor is its own source; one that lies in a file is read for as
long as a sum takes. Sums over large tensors go piece by piece, so that no copy in float64 is larger than a piece.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

__all__ = [
    "Order",
    "Sources",
    "TensorSource",
    "device_of_source",
    "entries_of",
    "narrowed",
    "pieces",
    "read",
    "source_of",
]

Order = Mapping[int, Tensor]
"""By axis, where the entries of B's tensor come from; axes that stay as they are do not appear."""

PIECE = 2**23
"""Entries of a tensor that are worked on at a time: 64 MiB in float64."""


@runtime_checkable
class TensorSource(Protocol):
    """A tensor that is read when it is needed."""

    @property
    def shape(self) -> Sequence[int]:
        """Its shape, known without reading."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """Its dtype, known without reading."""
        ...

    def read(self) -> Tensor:
        """Return the tensor, on the CPU."""
        ...


@runtime_checkable
class Sources(Protocol):
    """A state that knows where its tensors lie."""

    def stored(self, name: str) -> TensorSource:
        """Return where a tensor lies."""
        ...


def source_of(state: Mapping[str, Tensor], name: str) -> Tensor | TensorSource:
    """Return a tensor of a state, unread where the state reads when it is asked."""
    return state.stored(name) if isinstance(state, Sources) else state[name]


@dataclass(frozen=True, eq=False)
class _SegmentSource:
    """A segment of a tensor, read with the whole."""

    source: TensorSource
    cut: tuple[int, int, int]

    @property
    def shape(self) -> Sequence[int]:
        """Its shape."""
        axis, _, length = self.cut
        return tuple(length if k == axis else n for k, n in enumerate(self.source.shape))

    @property
    def dtype(self) -> torch.dtype:
        """Its dtype."""
        return self.source.dtype

    def read(self) -> Tensor:
        """Return the segment."""
        return self.source.read().narrow(*self.cut)


def narrowed(source: Tensor | TensorSource, cut: tuple[int, int, int] | None) -> Tensor | TensorSource:
    """Return a segment of a source: axis, where it begins, and its length; the whole for None."""
    if cut is None:
        return source
    return source.narrow(*cut) if isinstance(source, Tensor) else _SegmentSource(source, cut)


def read(source: Tensor | TensorSource) -> Tensor:
    """Return the tensor of a source."""
    return source if isinstance(source, Tensor) else source.read()


def device_of_source(source: Tensor | TensorSource) -> torch.device:
    """Return where a tensor is once it is read."""
    return source.device if isinstance(source, Tensor) else torch.device("cpu")


def entries_of(source: Tensor | TensorSource) -> int:
    """Return the number of entries, without reading."""
    return math.prod(source.shape)


def pieces(
    a: Tensor, b: Tensor, order: Order, without: Sequence[int] = ()
) -> Iterator[tuple[Tensor, Tensor, Order]]:
    """Yield pieces of two tensors of one shape, cut along an axis, and how B's are still to be reordered.

    Args:
        a: A's tensor.
        b: B's, in its own order; it is put in order along the axis that is cut.
        order: reorders B's.
        without: axes that must stay whole.
    """
    free = [axis for axis in range(a.ndim) if axis not in without]
    if a.numel() <= PIECE or not free:
        yield a, b, order
        return
    cut = max(free, key=lambda axis: a.shape[axis])
    rest = {axis: index for axis, index in order.items() if axis != cut}
    step = max(1, PIECE * a.shape[cut] // a.numel())
    for start in range(0, a.shape[cut], step):
        count = min(step, a.shape[cut] - start)
        where = order[cut][start : start + count].to(b.device) if cut in order else None
        piece = b.narrow(cut, start, count) if where is None else b.index_select(cut, where)
        yield a.narrow(cut, start, count), piece, rest
