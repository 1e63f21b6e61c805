"""Statistics over data: moments of what flows into layers, joint moments of a pair, all in one pass if need be.

A :class:`Request` says what is wanted; :func:`collected` runs each network once on every batch and serves all requests.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor

from isthmus.batches import Batch, Batches, iterate
from isthmus.errors import DataError
from isthmus.layers import Site, input_rows
from isthmus.moments._accumulators import CrossMoment, Moment
from isthmus.moments._blocks import CrossStream, Stream
from isthmus.moments._rows import Actions, Frame, Tap, framed_rows, unit_rows
from isthmus.moments._runner import SiteRunner

__all__ = [
    "CrossRequest",
    "InputRequest",
    "InputStatistics",
    "Request",
    "RowSample",
    "UnitRequest",
    "collected",
    "cross_moments",
    "input_statistics",
    "unit_moments",
]

_NameT = TypeVar("_NameT", bound=Hashable)


@runtime_checkable
class Differentiating(Protocol):
    """A request that differentiates the outputs by what it sees."""

    def finish(self, output: Any, *, of_b: bool) -> None:
        """Take the output of a network that has been run, before the next network is."""
        ...


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


class Request(Protocol):
    """A statistic that is collected in a pass over the data, and its state while the pass runs."""

    reads_b: bool
    """Whether network B is run too."""

    def start(self, runner: SiteRunner, state_a: Mapping[str, Tensor], batch: Batch) -> None:
        """Begin a batch."""
        ...

    def see(self, site: Site, activation: Tensor, *, inflow: bool, of_b: bool) -> None:
        """Add a value that flows into a site or comes out of it."""
        ...

    def end(self) -> None:
        """End a batch, which every network has seen."""
        ...

    def result(self) -> Any:
        """Return the statistic."""
        ...


def collected(
    runner: SiteRunner,
    batches: Batches,
    requests: Sequence[Request],
    state_a: Mapping[str, Tensor],
    state_b: Mapping[str, Tensor] | None = None,
) -> list[Any]:
    """Serve several requests in one pass over the data: each network is run once on each batch.

    Args:
        runner: the architecture.
        batches: the data.
        requests: fresh ones; each result is as if it were collected alone.
        state_a: tensors of A.
        state_b: tensors of B, where a request looks at both.

    Returns:
        One result for each request.

    Raises:
        DataError: no data, or NaN or infinite activations.
    """
    graded = [request for request in requests if isinstance(request, Differentiating)]
    if graded:
        learnt = runner.parameters
        state_a, state_b = _with_gradients(state_a, learnt), state_b and _with_gradients(state_b, learnt)

    def run(state: Mapping[str, Tensor], batch: Batch, listening: Sequence[Request], *, of_b: bool) -> None:
        def watch(inflow: bool, site: Site, activation: Tensor) -> None:
            for request in listening:
                seen = activation if isinstance(request, Differentiating) else activation.detach()
                request.see(site, seen, inflow=inflow, of_b=of_b)

        output = runner.run(
            state,
            batch,
            inflow=lambda site, x: watch(True, site, x),
            outflow=lambda site, x: watch(False, site, x),
            gradients=bool(graded),
        )
        for request in listening:
            if isinstance(request, Differentiating):
                request.finish(output, of_b=of_b)

    for batch in iterate(batches) if requests else ():
        for request in requests:
            request.start(runner, state_a, batch)
        run(state_a, batch, requests, of_b=False)
        readers = [request for request in requests if request.reads_b]
        if readers:
            assert state_b is not None, "a request that looks at B needs B"
            run(state_b, batch, readers, of_b=True)
        for request in requests:
            request.end()
    return [request.result() for request in requests]


def _with_gradients(state: Mapping[str, Tensor], learnt: Collection[str]) -> dict[str, Tensor]:
    """Return a state whose floating parameters ask for derivatives; the caller's tensors do not."""
    return {
        name: tensor.detach().requires_grad_() if name in learnt and tensor.is_floating_point() else tensor
        for name, tensor in state.items()
    }


class InputRequest:
    """Second moments of what flows into sites of one network, A or B (see :func:`input_statistics`)."""

    def __init__(
        self,
        sites: Iterable[str],
        generator: torch.Generator,
        max_features: int = MAX_FEATURES,
        sample_rows: int = SAMPLE_ROWS,
        *,
        of_b: bool = False,
    ) -> None:
        self.reads_b = of_b
        self._wanted, self._generator = set(sites), generator
        self._max_features, self._sample_rows = max_features, sample_rows
        self._found: dict[str, Stream | RowSample] = {}

    def start(self, runner: SiteRunner, state_a: Mapping[str, Tensor], batch: Batch) -> None:
        """Do nothing: every row counts by itself."""

    def see(self, site: Site, activation: Tensor, *, inflow: bool, of_b: bool) -> None:
        """Add the rows that flow into a site."""
        if not inflow or of_b != self.reads_b or site.name not in self._wanted:
            return
        for rows in input_rows(activation, site.convolution):
            width = rows.shape[1]
            current = self._found.get(site.name)
            if width <= self._max_features:
                stream = current if isinstance(current, Stream) else Stream(width)
                self._found[site.name] = stream
                stream.update(rows)
            else:
                _refuse_non_finite(rows, site.name)
                empty = RowSample(0, rows.new_empty(0, width), self._sample_rows)
                sample = current if isinstance(current, RowSample) else empty
                self._found[site.name] = sample.update(rows, self._generator)

    def end(self) -> None:
        """Do nothing."""

    def result(self) -> dict[str, InputStatistics]:
        """Return statistics by site."""
        return {
            name: InputStatistics(source.result() if isinstance(source, Stream) else source)
            for name, source in self._found.items()
        }


def _refuse_non_finite(rows: Tensor, name: str) -> None:
    if not bool(torch.isfinite(rows).all()):
        raise DataError(
            f"Statistics of what flows into {name!r}: NaN or infinite values. "
            "The network diverged or the inputs are damaged."
        )


class _Tapped:
    """Rows of units at taps, of one network or of both, batch after batch."""

    def __init__(self, taps: Mapping[Any, Sequence[Tap]], frame: Frame | None = None) -> None:
        self._taps, self._frame = taps, frame
        self._by_site: dict[tuple[str, bool], list[Tap]] = {}
        for tap in (tap for listed in taps.values() for tap in listed):
            self._by_site.setdefault((tap.site, tap.inflow), []).append(tap)
        self._seen: tuple[dict[Tap, Tensor], dict[Tap, Tensor]] = ({}, {})
        self._actions: Actions | None = None

    def start(self, runner: SiteRunner, state_a: Mapping[str, Tensor], batch: Batch) -> None:
        """Begin a batch: find how groups move activations of its shapes."""
        self._seen = ({}, {})
        if self._frame is not None:
            self._actions = runner.actions(batch, self._frame.spec, state_a)

    def see(self, site: Site, activation: Tensor, *, inflow: bool, of_b: bool) -> None:
        """Keep the rows of the taps at a site."""
        for tap in self._by_site.get((site.name, inflow), ()):
            self._seen[of_b][tap] = self._rows(site, activation, tap, of_b)

    def _rows(self, site: Site, activation: Tensor, tap: Tap, of_b: bool) -> Tensor:
        if self._actions is None or self._frame is None:
            return unit_rows(activation, site, tap)
        return framed_rows(activation, site, tap, self._actions, self._frame, moves=of_b)


class CrossRequest(_Tapped):
    """Joint moments of the units of both networks at taps (see :func:`cross_moments`)."""

    reads_b = True

    def __init__(self, taps: Mapping[Any, Sequence[Tap]], frame: Frame | None = None) -> None:
        super().__init__(taps, frame)
        self._found = {key: [CrossStream(t.units) for t in listed] for key, listed in taps.items()}

    def end(self) -> None:
        """Add a batch."""
        a, b = self._seen
        for key, listed in self._taps.items():
            for stream, tap in zip(self._found[key], listed, strict=True):
                stream.update(a[tap], b[tap])

    def result(self) -> dict[Any, list[CrossMoment]]:
        """Return one cross-moment per tap, by key."""
        return {key: [stream.result() for stream in streams] for key, streams in self._found.items()}


class UnitRequest(_Tapped):
    """Moments of the units of one network, A or B, at taps (see :func:`unit_moments`)."""

    def __init__(self, taps: Mapping[Any, Sequence[Tap]], *, of_b: bool = False) -> None:
        super().__init__(taps)
        self.reads_b = of_b
        self._found = {key: [Stream(t.units) for t in listed] for key, listed in taps.items()}

    def end(self) -> None:
        """Add a batch."""
        seen = self._seen[self.reads_b]
        for key, listed in self._taps.items():
            for stream, tap in zip(self._found[key], listed, strict=True):
                stream.update(seen[tap])

    def result(self) -> dict[Any, list[Moment]]:
        """Return one moment per tap, by key."""
        return {key: [stream.result() for stream in streams] for key, streams in self._found.items()}


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
    return collected(runner, batches, [InputRequest(sites, generator, max_features, sample_rows)], state)[0]


def cross_moments(
    runner: SiteRunner,
    state_a: Mapping[str, Tensor],
    state_b: Mapping[str, Tensor],
    batches: Batches,
    taps: Mapping[_NameT, Sequence[Tap]],
    frame: Frame | None = None,
) -> dict[_NameT, list[CrossMoment]]:
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
    return collected(runner, batches, [CrossRequest(taps, frame)], state_a, state_b)[0]


def unit_moments(
    runner: SiteRunner, state: Mapping[str, Tensor], batches: Batches, taps: Mapping[_NameT, Sequence[Tap]]
) -> dict[_NameT, list[Moment]]:
    """Collect, in one pass over the data, the moments of one network's units at every tap."""
    return collected(runner, batches, [UnitRequest(taps)], state)[0]
