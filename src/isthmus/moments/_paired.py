"""Joint second moments of what flows into the same layers of two networks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from isthmus.batches import Batch
from isthmus.layers import Site, input_rows
from isthmus.moments._blocks import Stream
from isthmus.moments._collect import MAX_FEATURES, SAMPLE_ROWS, InputStatistics, RowSample
from isthmus.moments._runner import SiteRunner

__all__ = ["PairedInputRequest"]

BATCH_ROWS = 2048
"""Rows of a layer that are taken from a batch: images have thousands of positions, all much alike."""


class PairedInputRequest:
    """Second moments of the rows of both networks side by side, at layers that read the same number of features.

    Of each batch at most :data:`BATCH_ROWS` rows of a layer count, drawn uniformly and the same for both networks.

    Args:
        sites: names of the layers.
        generator: draws rows.

    Notes:
        Memory: as :func:`isthmus.moments.input_statistics` with rows of twice the length, and one batch of A's rows.
    """

    reads_b = True

    def __init__(self, sites: Iterable[str], generator: torch.Generator) -> None:
        self._wanted, self._generator = set(sites), generator
        self._waiting: dict[str, tuple[Tensor, Tensor]] = {}
        self._found: dict[str, Stream | RowSample] = {}

    def start(self, runner: SiteRunner, state_a: Mapping[str, Tensor], batch: Batch) -> None:
        """Forget the rows of the batch before."""
        self._waiting = {}

    def see(self, site: Site, activation: Tensor, *, inflow: bool, of_b: bool) -> None:
        """Keep A's rows, and put B's beside them."""
        if not inflow or site.name not in self._wanted:
            return
        rows = torch.cat(list(input_rows(activation, site.convolution)))
        if not of_b:
            chosen = torch.arange(len(rows))
            if len(rows) > BATCH_ROWS:
                chosen = torch.randperm(len(rows), generator=self._generator)[:BATCH_ROWS]
            chosen = chosen.to(rows.device)
            self._waiting[site.name] = rows[chosen], chosen
            return
        of_a, chosen = self._waiting.pop(site.name)
        self._add(site.name, torch.cat([of_a, rows[chosen]], dim=1))

    def _add(self, name: str, rows: Tensor) -> None:
        width, current = rows.shape[1], self._found.get(name)
        if width <= MAX_FEATURES:
            stream = current if isinstance(current, Stream) else Stream(width)
            self._found[name] = stream
            stream.update(rows)
            return
        empty = RowSample(0, rows.new_empty(0, width), SAMPLE_ROWS)
        sample = current if isinstance(current, RowSample) else empty
        self._found[name] = sample.update(rows, self._generator)

    def end(self) -> None:
        """Do nothing: rows were added when B's came."""

    def result(self) -> dict[str, InputStatistics]:
        """Return statistics of rows ``[h_A, h_B]`` by layer."""
        return {
            name: InputStatistics(source.result() if isinstance(source, Stream) else source)
            for name, source in self._found.items()
        }
