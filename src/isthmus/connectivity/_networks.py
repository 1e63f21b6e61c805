"""The networks of a line as they are run on a batch: by the engine where they can be traced, else by their code."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor

from isthmus.batches import Batch, device_of
from isthmus.connectivity._curve import MIDPOINT
from isthmus.connectivity._engine import Engine, ReadyTensors, autocast
from isthmus.errors import IsthmusError
from isthmus.evaluation import bind, floating_dtype, relative_difference
from isthmus.paths import Path, mixed
from isthmus.replica import Replica
from isthmus.states import State

__all__ = ["EndB", "Networks", "PlainNetworks", "TracedNetworks", "traced_or_plain"]

Run = Callable[[Batch], Any]
StateAt = Callable[[float], State]
T = TypeVar("T")

KEPT_BYTES = 2**30
DISAGREEMENT = 1.0
"""Most that an engine's outputs may differ from the network's, in roots of the machine precision."""


@dataclass(frozen=True)
class EndB:
    """The network at ``t = 1`` as it was trained, which a relabelled state only stands for.

    Attributes:
        state: its tensors.
        replica: its own code; None where A's code runs it.
        error: how far its outputs are from those of the path's end, relative to the largest.
        same: whether the path's end was seen to compute what it computes, to the last bit.
    """

    state: State
    replica: Replica | None = None
    error: float = 0.0
    same: bool = True


class Networks(Protocol):
    """The two ends of a line and its points."""

    def begin(self, ts: Sequence[float]) -> None:
        """Take the points that are run from now on, ``0 < t < 1``."""
        ...

    def pieces(self, batches: Iterable[Batch], *, whole: bool) -> Iterator[Batch]:
        """Yield the data on the right device and in the right dtype, in pieces that are run at once.

        ``whole`` keeps the batches as they are, for losses that depend on them.
        """
        ...

    def outputs(self, batch: Batch, *, ends: bool) -> Iterator[Any]:
        """Yield the outputs of A and of B, if ``ends``, and those at each point."""
        ...


class _Points(Generic[T]):
    """The states of the points: kept if all fit in 1 GiB or are costly, else made anew for each batch."""

    def __init__(self, make: Callable[[float], T], size: int, costly: bool) -> None:
        self._make, self._size, self._costly = make, size, costly
        self._kept: dict[float, T] = {}
        self.ts: tuple[float, ...] = ()

    def begin(self, ts: Sequence[float]) -> None:
        self.ts, self._kept = tuple(ts), {}

    @property
    def keeps(self) -> bool:
        return self._costly or self._size * len(self.ts) <= KEPT_BYTES

    def at(self, t: float) -> T:
        found = self._kept[t] if t in self._kept else self._make(t)
        if self.keeps:
            self._kept[t] = found
        return found


class PlainNetworks:
    """Every network run by its own code.

    Args:
        a: runs A and the points.
        run_b: runs B.
        path: gives the states.
        state_at: its states, if some are kept.
        low: whether products are in bfloat16.
        read: from all that a network returns to what is scored (see :func:`isthmus.evaluation.bind`).
    """

    def __init__(
        self,
        a: Replica,
        run_b: Run,
        path: Path,
        state_at: StateAt,
        low: bool,
        read: Callable[[Any], Any] | None = None,
    ) -> None:
        state = path.ends[0]
        self._run_a, self._run_b, self._low = bind(a, state, read), run_b, low
        self._device, self._dtype = device_of(a.module), floating_dtype(state)
        costly = not _all_straight(state, path)
        self._points = _Points(lambda t: bind(a, state_at(t), read), _bytes(state), costly)

    def begin(self, ts: Sequence[float]) -> None:
        """Take the points."""
        self._points.begin(ts)

    def pieces(self, batches: Iterable[Batch], *, whole: bool = True) -> Iterator[Batch]:
        """Yield the batches as they are."""
        for batch in batches:
            yield batch.to(self._device, self._dtype)

    def outputs(self, batch: Batch, *, ends: bool) -> Iterator[Any]:
        """Yield the outputs, one network after another."""
        for run in (self._run_a, self._run_b) if ends else ():
            yield self._called(run, batch)
        for t in self._points.ts:
            yield self._called(self._points.at(t), batch)

    def _called(self, run: Run, batch: Batch) -> Any:
        with autocast(self._device, self._low):
            return run(batch)


class TracedNetworks:
    """Networks run by engines.

    Args:
        a: engine of A's code.
        b: engine of B's; None where the path's end computes the same.
        state_b: of B.
        path: gives the states.
        state_at: its states, if some are kept.
        plain: runs batches of another form than the first.
    """

    def __init__(
        self,
        a: Engine,
        b: Engine | None,
        state_b: State,
        path: Path,
        state_at: StateAt,
        plain: PlainNetworks,
    ) -> None:
        state_a, end = path.ends
        self._a, self._b, self._plain = a, b, plain
        self._ends = a.ready(state_a, end=True), a.ready(end, end=True)
        self._start_b = None if b is None else b.ready(state_b, end=True)
        straight = _all_straight(a.names, path)

        def make(t: float) -> ReadyTensors:
            return a.ready(mixed(state_a, end, t, a.names) if straight else state_at(t))

        self._points = _Points(make, _bytes(state_a), not straight)

    @property
    def splits(self) -> bool:
        """Whether batches may be cut into pieces."""
        return self._a.piece is not None

    def begin(self, ts: Sequence[float]) -> None:
        """Take the points."""
        self._points.begin(ts)
        self._plain.begin(ts)

    def pieces(self, batches: Iterable[Batch], *, whole: bool = False) -> Iterator[Batch]:
        """Yield the data, if allowed regrouped: few enough examples for the cache, enough for fast products."""
        moved = self._plain.pieces(batches)
        piece = self._a.piece
        if whole or piece is None or not self._points.keeps:
            yield from moved
            return
        waiting: list[Batch] = []
        for batch in moved:
            if waiting and not (
                sum(b.size for b in waiting) + batch.size <= piece and _alike(waiting[0], batch)
            ):
                yield from _cut(waiting, piece)
                waiting = []
            waiting.append(batch)
        yield from _cut(waiting, piece)

    def outputs(self, batch: Batch, *, ends: bool) -> Iterator[Tensor]:
        """Yield the outputs; layers on the data are computed at the ends only."""
        if not self._a.fits(batch):
            yield from self._plain.outputs(batch, ends=ends)
            return
        found = self._a.outputs(
            batch,
            self._ends,
            self._points.ts,
            self._points.at,
            with_start=ends,
            with_end=ends and self._b is None,
        )
        if ends:
            yield next(found)
            if self._b is not None and self._start_b is not None:
                yield self._b.run(batch, self._start_b)
        yield from found


def traced_or_plain(
    path: Path,
    replica: Replica,
    end_b: EndB,
    low: bool,
    example: Batch,
    read: Callable[[Any], Any] | None = None,
) -> tuple[Networks, str]:
    """Return networks that run by engines if these agree with the networks' code on an example.

    Args:
        path: from A to a state that stands for B.
        replica: the code of A and of the points, in evaluation mode.
        end_b: B as it was trained.
        low: whether products are in bfloat16.
        example: some examples of the data.
        read: see :class:`PlainNetworks`; steps give a tensor only, so with it the networks' own code runs.

    Returns:
        The networks, and how they run: ``"traced"``, or ``"plain"`` with the reason.
    """
    state_a, _ = path.ends
    state_at = path.at if _all_straight(state_a, path) else _remembering(path.at, MIDPOINT)
    other = end_b.replica
    run_b = bind(replica if other is None else other, end_b.state, read)
    plain = PlainNetworks(replica, run_b, path, state_at, low, read)
    if read is not None:
        return plain, "plain (the loss reads more than the first tensor)"
    exact = PlainNetworks(replica, run_b, path, state_at, low=False)
    try:
        moved = example.to(device_of(replica.module), floating_dtype(state_a))
        a = Engine(replica, moved, straight=frozenset(path.straight))
        b = None if end_b.same else a if other is None else Engine(other, moved)
        if example.size > 1:  # one cannot show whether outputs depend on the batch: then nothing is regrouped
            a.measure(moved, a.ready(state_a, end=True))
        traced = TracedNetworks(a, b, end_b.state, path, state_at, exact)
        difference = _largest_difference(traced, exact, moved)
    except (IsthmusError, RuntimeError, TypeError, AttributeError, KeyError, IndexError) as error:
        return plain, f"plain ({str(error).splitlines()[0]})"
    if difference > DISAGREEMENT:
        return plain, f"plain (its trace computes something else: outputs differ by {difference:.2g})"
    if low:
        b = None if b is None else b.lowered()
        traced = TracedNetworks(a.lowered(), b, end_b.state, path, state_at, plain)
    return traced, "traced"


def _all_straight(names: Iterable[str], path: Path) -> bool:
    return frozenset(path.straight).issuperset(names)


def _largest_difference(traced: TracedNetworks, plain: PlainNetworks, example: Batch) -> float:
    """Return how far two ways of running A, B and the midpoint differ, in roots of the machine precision.

    The traced networks run the example in two parts, which shows networks whose outputs depend on the batch.
    """
    for networks in (traced, plain):
        networks.begin([MIDPOINT])
    halves = [example]
    if traced.splits and example.size > 1:
        halves = [Batch((x,)) for x in example.args[0].tensor_split(2)]
    parts = [list(traced.outputs(half, ends=True)) for half in halves]
    wanted = list(plain.outputs(example, ends=True))
    found = [torch.cat(outputs) for outputs in zip(*parts, strict=True)]
    unit = torch.finfo(wanted[0].dtype).eps ** 0.5
    return max(relative_difference(w, f) for w, f in zip(wanted, found, strict=True)) / unit


def _alike(first: Batch, other: Batch) -> bool:
    """Tell whether two batches, both of one positional tensor, can be run as one."""
    one = [
        b.args[0]
        for b in (first, other)
        if len(b.args) == 1 and not b.kwargs and isinstance(b.args[0], Tensor)
    ]
    two = [b.targets for b in (first, other) if isinstance(b.targets, Tensor)]
    return all(len(pair) == 2 and pair[0].shape[1:] == pair[1].shape[1:] for pair in (one, two))


def _cut(batches: Sequence[Batch], piece: int) -> Iterator[Batch]:
    """Yield batches that are alike, or a single one, in equal pieces of at most ``piece`` examples."""
    if len(batches) == 1 and (batches[0].size <= piece or not _alike(batches[0], batches[0])):
        yield from batches
        return
    count = -(-sum(b.size for b in batches) // piece)
    inputs = torch.cat([b.args[0] for b in batches]).tensor_split(count)
    targets = torch.cat([b.targets for b in batches]).tensor_split(count)
    for x, y in zip(inputs, targets, strict=True):
        yield Batch((x,), {}, y)


def _remembering(state_at: StateAt, chosen: float) -> StateAt:
    """Return the function with its value at one position kept."""
    kept: dict[float, State] = {}

    def call(t: float) -> State:
        if t not in kept:
            found = state_at(t)
            if t != chosen:
                return found
            kept[t] = found
        return kept[t]

    return call


def _bytes(state: Mapping[str, Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in state.values())
