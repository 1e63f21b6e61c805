r"""Moments of float32 streams: products of blocks in float32, sums over blocks in float64.

Rows are put together until there are :data:`ROWS` of them. A block is centred by its own mean, multiplied in float32
in pieces of 256 rows, and merged into a float64 moment. With :math:`u = 2^{-24}` and the centred columns
:math:`x, y` of a block, its entry of the scatter is off by less than :math:`272\,u\,\lVert x \rVert \lVert y \rVert`:
256 for the sums, 8 for adding up the pieces, the rest for centring. So a covariance is off by less than
:math:`1.7 \times 10^{-5}` standard deviations times standard deviations, and in practice a hundred times less. Units
that never vary stay exactly constant. Narrow streams are multiplied in float64: there the conversion costs little.

Memory, per stream: the rows of a block in the stream's dtype, twice that while it is multiplied, and three matrices of
the size of the moment.
"""

from __future__ import annotations

import torch
from torch import Tensor

from isthmus.moments._accumulators import CrossMoment, Moment

__all__ = ["ROWS", "CrossStream", "Stream"]

ROWS = 2048
"""Rows of a block."""
NARROW = 128
"""Units below which products are formed in float64."""
_PIECE = 256


class Stream:
    """Collects the moment of one stream of rows.

    Args:
        units: length of a row.
    """

    def __init__(self, units: int) -> None:
        self._moment: Moment | None = None
        self._units, self._waiting = units, list[Tensor]()

    def update(self, rows: Tensor) -> None:
        """Add rows, shape ``(n, units)``."""
        if self._moment is None:
            self._moment = Moment.empty(self._units, rows.device)
        if rows.dtype != torch.float32 or self._units < NARROW or rows.shape[1] != self._units:
            self._moment = self._moment.update(rows)
            return
        self._waiting.append(rows.clone())  # the network may overwrite them before the block is full
        if sum(map(len, self._waiting)) >= ROWS:
            self._merge()

    def result(self) -> Moment:
        """Return the moment of all rows."""
        self._merge()
        return Moment.empty(self._units) if self._moment is None else self._moment

    def _merge(self) -> None:
        rows, self._waiting = _joined(self._waiting), []
        if self._moment is None or not len(rows):
            return
        mean, centred, shift = _centred(rows)
        if centred is None:
            self._moment.update(rows)  # raises, and says what is wrong
            return
        scatter = _product(centred, centred).addr_(shift, shift, alpha=-len(rows))
        self._moment = self._moment.merge(Moment(len(rows), mean, scatter))


class CrossStream:
    """Collects the cross-moment of two streams of rows.

    Args:
        units: length of a row, the same in both.
    """

    def __init__(self, units: int) -> None:
        self._moment: CrossMoment | None = None
        self._units, self._waiting = units, list[tuple[Tensor, Tensor]]()

    def update(self, rows_a: Tensor, rows_b: Tensor) -> None:
        """Add paired rows, shapes ``(n, units)``."""
        if self._moment is None:
            self._moment = CrossMoment.empty(self._units, self._units, rows_a.device)
        wide = self._units >= NARROW and rows_a.shape == rows_b.shape and rows_a.shape[1] == self._units
        if not wide or rows_a.dtype != torch.float32 or rows_b.dtype != torch.float32:
            self._moment = self._moment.update(rows_a, rows_b)
            return
        self._waiting.append((rows_a.clone(), rows_b.clone()))
        if sum(len(a) for a, _ in self._waiting) >= ROWS:
            self._merge()

    def result(self) -> CrossMoment:
        """Return the moment of all rows."""
        self._merge()
        return CrossMoment.empty(self._units, self._units) if self._moment is None else self._moment

    def _merge(self) -> None:
        rows_a, rows_b = (_joined([pair[k] for pair in self._waiting]) for k in (0, 1))
        self._waiting = []
        if self._moment is None or not len(rows_a):
            return
        (mean_a, a, shift_a), (mean_b, b, shift_b) = _centred(rows_a), _centred(rows_b)
        if a is None or b is None:
            self._moment.update(rows_a, rows_b)  # raises, and says what is wrong
            return
        count = len(rows_a)
        spreads = [
            (x.square().sum(0, dtype=torch.float64) - count * s.square()).clamp_min(0.0)
            for x, s in ((a, shift_a), (b, shift_b))
        ]
        scatter = _product(a, b).addr_(shift_a, shift_b, alpha=-count)
        self._moment = self._moment.merge(CrossMoment(count, mean_a, mean_b, scatter, *spreads))


def _joined(parts: list[Tensor]) -> Tensor:
    return torch.cat(parts) if parts else torch.zeros(0)


def _centred(rows: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
    """Return the mean, the rows minus the mean in float32, and the mean of these; no rows if not finite."""
    mean = rows.mean(0, dtype=torch.float64)
    if not bool(torch.isfinite(mean).all()):
        return mean, None, mean
    near = mean.float()
    return mean, rows - near, mean - near.double()


def _product(a: Tensor, b: Tensor) -> Tensor:
    """Return ``a.T @ b`` in float64, formed in float32."""
    total = torch.zeros(a.shape[1], b.shape[1], dtype=torch.float32, device=a.device)
    for x, y in zip(a.split(_PIECE), b.split(_PIECE), strict=True):
        total.addmm_(x.T, y)
    return total.double()
