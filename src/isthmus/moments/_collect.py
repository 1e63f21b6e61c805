"""Statistics of a network over data: moments of what flows into layers, and cross-moments of a pair."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from isthmus.batches import Batch, Batches, iterate
from isthmus.errors import DataError
from isthmus.layers import Site, input_rows
from isthmus.moments._accumulators import CrossMoment, Moment
from isthmus.moments._blocks import CrossStream, Stream
from isthmus.moments._rows import Actions, Frame, Tap, framed_rows, unit_rows
from isthmus.moments._runner import SiteRunner

__all__ = ["InputStatistics", "RowSample", "cross_moments", "input_statistics", "unit_moments"]

_Key = TypeVar("_Key", bound=Hashable)
MAX_FEATURES = 2304
"""Widest row for which the full second moment is kept (float64: 42 MB); wider ones keep a sample of rows."""
SAMPLE_ROWS = 4096
"""Rows kept per site where the row is too wide for its second moment."""


@dataclass(frozen=True, eq=False)
class RowSample:
    """A uniform sample of the rows of a stream (reservoir sampling, Vitter 1985, algorithm R).

    Attributes:
        count: rows seen.
        rows: rows kept, in the stream's dtype, shape ``(at most capacity, features)``.
        capacity: most rows that are kept.
    """

    count: int
    rows: Tensor
    capacity: int

    def update(self, block: Tensor, generator: torch.Generator) -> RowSample:
        """Return the sample after more rows, shape ``(n, features)``, were seen."""
        free = max(self.capacity - self.count, 0)
        kept = torch.cat([self.rows, block[:free]]) if free else self.rows.clone()
        late = block[free:]
        if len(late):
            seen = self.count + free + 1 + torch.arange(len(late))
            draw = (torch.rand(len(late), generator=generator, dtype=torch.float64) * seen).long()
            chosen = torch.nonzero(draw < self.capacity).flatten()
            last = {int(draw[k]): int(k) for k in chosen.tolist()}
            if last:
                slots = torch.tensor(list(last), device=kept.device)
                kept[slots] = late[torch.tensor(list(last.values()), device=late.device)]
        return RowSample(self.count + len(block), kept, self.capacity)


@dataclass(frozen=True, eq=False)
class InputStatistics:
    """Uncentred second moment ``Σ = E[h hᵀ]`` and mean of what flows into a site, exact or from sampled rows.

    The state is one of a full :class:`Moment` and, for rows wider than the bound, a :class:`RowSample`.
    """

    source: Moment | RowSample

    @property
    def mean(self) -> Tensor:
        """Mean row, float64, shape ``(features,)``."""
        return self.source.mean if isinstance(self.source, Moment) else self.source.rows.double().mean(0)

    @property
    def second_moment_diagonal(self) -> Tensor:
        """``E[h_k²]`` of every feature, float64, shape ``(features,)``."""
        if isinstance(self.source, Moment):
            return self.source.variance + self.source.mean.square()
        return self.source.rows.double().square().mean(0)

    def multiply(self, weights: Tensor) -> Tensor:
        """Return ``weights @ Σ`` for float64 weights of shape ``(m, features)``; never forms a sampled ``Σ``."""
        if isinstance(self.source, Moment):
            mean = self.source.mean.to(weights.device)
            centred = weights @ self.source.scatter.to(weights.device) / self.source.count
            return centred + torch.outer(weights @ mean, mean)
        rows = self.source.rows.to(weights)
        return (weights @ rows.T) @ rows / len(rows)


def input_statistics(
    runner: SiteRunner,
    state: Mapping[str, Tensor],
    batches: Batches,
    sites: Iterable[str],
    generator: torch.Generator,
    *,
    max_features: int = MAX_FEATURES,
    sample_rows: int = SAMPLE_ROWS,
) -> dict[str, InputStatistics]:
    """Collect, in one pass over the data, the second moments of what flows into sites.

    Memory: ``8·features²`` bytes per site up to ``max_features`` features, and the rows of a block
    (:mod:`isthmus.moments._blocks`); beyond that ``sample_rows·features`` entries in the model's dtype.

    Args:
        runner: the network.
        state: its tensors.
        batches: the data.
        sites: names of the sites.
        generator: draws the sampled rows of wide sites.
        max_features: widest row whose full second moment is kept.
        sample_rows: rows kept of wider ones.

    Returns:
        Statistics by site name. Positions of convolutions count as samples.

    Raises:
        DataError: no data, or NaN or infinite activations.
    """
    wanted = set(sites)
    found: dict[str, Stream | RowSample] = {}

    def watch(site: Site, activation: Tensor) -> None:
        if site.name not in wanted:
            return
        for rows in input_rows(activation, site.convolution):
            width = rows.shape[1]
            current = found.get(site.name)
            if width <= max_features:
                stream = current if isinstance(current, Stream) else Stream(width)
                found[site.name] = stream
                stream.update(rows)
            else:
                _refuse_non_finite(rows, site.name)
                empty = RowSample(0, rows.new_empty(0, width), sample_rows)
                sample = current if isinstance(current, RowSample) else empty
                found[site.name] = sample.update(rows, generator)

    for batch in iterate(batches):
        runner.run(state, batch, inflow=watch)
    return {
        name: InputStatistics(source.result() if isinstance(source, Stream) else source)
        for name, source in found.items()
    }


def _refuse_non_finite(rows: Tensor, name: str) -> None:
    if not bool(torch.isfinite(rows).all()):
        raise DataError(
            f"Statistics of what flows into {name!r}: NaN or infinite values. "
            "The network diverged or the inputs are damaged."
        )


def cross_moments(
    runner: SiteRunner,
    state_a: Mapping[str, Tensor],
    state_b: Mapping[str, Tensor],
    batches: Batches,
    taps: Mapping[_Key, Sequence[Tap]],
    frame: Frame | None = None,
) -> dict[_Key, list[CrossMoment]]:
    """Collect, in one pass over the data, the joint moments of two networks' units at every tap.

    Rows are paired as they come, unless a ``frame`` says that some of them are units which B may list in another
    order than A (:mod:`isthmus.moments._rows`).

    Args:
        runner: the architecture of both networks.
        state_a: tensors of A.
        state_b: tensors of B.
        batches: the data.
        taps: what is looked at, by any key, such as the name of a group.
        frame: how B's rows are brought into A's order.

    Returns:
        Per key, one cross-moment per tap; rows are units of A, columns units of B.

    Raises:
        DataError: no data, or NaN or infinite activations.
    """
    found = {g: [CrossStream(t.units) for t in listed] for g, listed in taps.items()}
    for batch in iterate(batches):
        actions = None if frame is None else runner.actions(batch, frame.spec, state_a)
        seen_a = _tapped(runner, state_a, batch, taps, _reader(actions, frame, moves=False))
        seen_b = _tapped(runner, state_b, batch, taps, _reader(actions, frame, moves=True))
        for key, listed in taps.items():
            for k, tap in enumerate(listed):
                found[key][k].update(seen_a[tap], seen_b[tap])
    return {key: [stream.result() for stream in streams] for key, streams in found.items()}


def unit_moments(
    runner: SiteRunner, state: Mapping[str, Tensor], batches: Batches, taps: Mapping[_Key, Sequence[Tap]]
) -> dict[_Key, list[Moment]]:
    """Collect, in one pass over the data, the moments of one network's units at every tap."""
    found = {g: [Stream(t.units) for t in listed] for g, listed in taps.items()}
    for batch in iterate(batches):
        seen = _tapped(runner, state, batch, taps, unit_rows)
        for key, listed in taps.items():
            for stream, tap in zip(found[key], listed, strict=True):
                stream.update(seen[tap])
    return {key: [stream.result() for stream in streams] for key, streams in found.items()}


_Reader = Callable[[Tensor, Site, Tap], Tensor]
"""Reads the rows of a tap off an activation."""


def _reader(actions: Actions | None, frame: Frame | None, *, moves: bool) -> _Reader:
    if actions is None or frame is None:
        return unit_rows
    return lambda activation, site, tap: framed_rows(activation, site, tap, actions, frame, moves=moves)


def _tapped(
    runner: SiteRunner,
    state: Mapping[str, Tensor],
    batch: Batch,
    taps: Mapping[_Key, Sequence[Tap]],
    read: _Reader,
) -> dict[Tap, Tensor]:
    by_site: dict[tuple[str, bool], list[Tap]] = {}
    for listed in taps.values():
        for tap in listed:
            by_site.setdefault((tap.site, tap.inflow), []).append(tap)
    seen: dict[Tap, Tensor] = {}

    def watch(inflow: bool, site: Site, activation: Tensor) -> None:
        for tap in by_site.get((site.name, inflow), ()):
            seen[tap] = read(activation, site, tap)

    runner.run(
        state,
        batch,
        inflow=lambda site, x: watch(True, site, x),
        outflow=lambda site, x: watch(False, site, x),
    )
    return seen
