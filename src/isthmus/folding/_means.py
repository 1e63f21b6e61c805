"""The mean over the channels of a stream, out of what writes it: a LayerNorm takes it out anyway."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import fx

from isthmus.folding._edits import Centred, EditStep
from isthmus.folding._gains import NormFold
from isthmus.folding._graph import LiveWay, described, shape_of
from isthmus.folding._moves import StatePart
from isthmus.folding._norms import Norm, ignores_mean, norms_of
from isthmus.folding._readers import NotLinear, readers_of
from isthmus.folding._streams import NotCentred, ResidualStream, Writer, stream_of
from isthmus.folding._uses import Obstacle, Refusal, TensorUses, Use
from isthmus.symmetry import bound_arguments

__all__ = ["MeanFold", "find_mean_folds"]


@dataclass(frozen=True, eq=False)
class MeanFold:
    """A stream whose mean over the channels becomes zero.

    Attributes:
        name: the norms that read it, the first named.
        norms: the norms that read it.
        writers: from tensor to the axis that lists the channels.
    """

    name: str
    norms: tuple[str, ...]
    writers: tuple[tuple[str, int], ...]

    @property
    def own(self) -> tuple[str, ...]:
        """Names of norms' tensors that change: none."""
        return ()

    @property
    def into(self) -> tuple[str, ...]:
        """Names of the tensors that change."""
        return tuple(name for name, _ in self.writers)

    def __str__(self) -> str:
        """Return one line."""
        return f"{self.name}: mean out of {', '.join(self.into)}, which write what the LayerNorm reads"

    def steps(self) -> Iterable[EditStep]:
        """Yield the steps."""
        for name, axis in self.writers:
            yield Centred(name, axis)


@dataclass
class _MeanStream:
    stream: ResidualStream
    norms: list[str]
    problem: Obstacle | None = None

    @property
    def name(self) -> str:
        return " and ".join(dict.fromkeys(self.norms[:1]))


def find_mean_folds(uses: TensorUses, norms: Sequence[NormFold]) -> tuple[list[MeanFold], list[Refusal]]:
    """Return the streams whose mean can go, and those whose mean stays.

    Args:
        uses: of the tensors.
        norms: gains and biases that are folded.
    """
    found = [stream for way in uses.ways for stream in _streams(way)]
    harmless = _harmless(uses, norms)
    changed = True
    while changed:
        changed = False
        alive = [f for f in found if f.problem is None]
        for one in alive:
            one.problem = _problem(uses, one, alive, harmless)
            changed = changed or one.problem is not None
    folds = [_fold(uses, f) for f in found if f.problem is None]
    folds = list({f.into: f for f in folds if f.writers}.values())
    refusals = [
        Refusal(f.name, "mean", p.text, p.tied, p.apart) for f in found if (p := f.problem) is not None
    ]
    return folds, list(dict.fromkeys(refusals))


def _streams(way: LiveWay) -> list[_MeanStream]:
    """Return every stream that a LayerNorm of one graph reads, once."""
    norms = {norm.node: norm for norm in norms_of(way)}
    found: list[_MeanStream] = []
    for norm in norms.values():
        start = _start(norm)
        if start is None:
            continue
        known = next(
            (f for f in found if f.problem is None and f.stream.axes.get(start[0]) == start[1]), None
        )
        if known is not None:
            known.norms.append(norm.name)
            continue
        try:
            found.append(_MeanStream(stream_of(way, *start, norms), [norm.name]))
        except NotCentred as why:
            found.append(_MeanStream(ResidualStream(way), [norm.name], Obstacle(str(why))))
    return found


def _start(norm: Norm) -> tuple[fx.Node, int] | None:
    """Return what a LayerNorm takes the mean of, and its channels."""
    if ignores_mean(norm):
        return norm.source, norm.axis
    if norm.kind == "LayerNorm" and norm.source.target == torch.ops.aten.sub.Tensor:
        value = bound_arguments(norm.source)["self"]
        return (value, norm.axis) if isinstance(value, fx.Node) else None
    return None


def _axis(uses: TensorUses, part: StatePart, axis: int) -> int | None:
    """Return the axis of a tensor that is, whole, the axis of a part of it."""
    whole = torch.empty(uses.shape(part.name), device="meta")
    if uses.key(part) is None:
        return None
    view = part.of(whole)
    own = (view.shape[axis], view.stride(axis))
    fitting = [a for a in range(whole.ndim) if (whole.shape[a], whole.stride(a)) == own and own[0] > 1]
    return fitting[0] if len(fitting) == 1 else None


def _claimed(uses: TensorUses, writers: Iterable[Writer]) -> dict[Use, int | None]:
    return {Use(w.user, w.operand): _axis(uses, w.part, w.axis) for w in writers}


def _problem(
    uses: TensorUses,
    one: _MeanStream,
    alive: Sequence[_MeanStream],
    harmless: dict[Use, tuple[str, int | None]],
) -> Obstacle | None:
    """Return why the mean of a stream cannot go: one of its writers is used otherwise too."""
    claimed: dict[Use, int | None] = {}
    for other in alive:
        claimed |= _claimed(uses, other.stream.writers)
    for writer in one.stream.writers:
        name, axis = writer.part.name, _axis(uses, writer.part, writer.axis)
        if axis is None:
            return Obstacle(f"only parts of {name!r} write it")
        shared = uses.overlap(name)
        if shared is not None:
            return shared
        for use, _ in uses.of(name):
            if claimed.get(use, -1) != axis and harmless.get(use) != (name, axis):
                text = f"{name!r}, which writes it, is also used by {described(use.user)}"
                return uses.tie(name, text, [use.user])
    return None


def _harmless(uses: TensorUses, folds: Sequence[NormFold]) -> dict[Use, tuple[str, int | None]]:
    """Return uses by readers of a LayerNorm without gain or bias, whose result has mean zero: they read no mean."""
    moved = {part.name for fold in folds if fold.moves_bias and (part := fold.bias) is not None}
    found: dict[Use, tuple[str, int | None]] = {}
    for way in uses.ways:
        for norm in norms_of(way):
            if not ignores_mean(norm) or norm.problem or norm.gain is not None:
                continue
            if norm.bias is not None and norm.bias.name not in moved:
                continue
            try:
                readers = readers_of(way, norm.node, norm.axis)
            except NotLinear:
                continue
            for r in readers:
                # all channels have mean zero, a part of them has another one
                if r.lengths is None and torch.equal(
                    r.index.sort().values, torch.arange(shape_of(norm.node)[norm.axis])
                ):
                    found[Use(*r.weight_use)] = (r.weight.name, _axis(uses, r.weight, r.axis))
    return found


def _fold(uses: TensorUses, found: _MeanStream) -> MeanFold:
    writers = {w.part.name: _axis(uses, w.part, w.axis) for w in found.stream.writers}
    named = tuple((name, axis) for name, axis in writers.items() if axis is not None)
    norms = list(dict.fromkeys(found.norms))
    more = f" and {len(norms) - 1} more" if len(norms) > 1 else ""
    return MeanFold(f"{norms[0]}{more}", tuple(norms), named)
