"""Who uses the tensors of the state, in all ways through the code, and whether all of them agree to an edit."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from isthmus.folding._graph import LiveWay, described, shape_of
from isthmus.folding._moves import StatePart, part_of, uses_of
from isthmus.symmetry import module_of

__all__ = ["Obstacle", "Refusal", "Use", "TensorUses", "claims"]

_MOST_ENTRIES = 2**24


@dataclass(frozen=True)
class Refusal:
    """Something that stays as it is.

    Attributes:
        name: of the norm, or of the tensor, that stays.
        what: what of it: ``gain``, ``bias``, ``mean`` or ``batch norm``.
        why: one sentence without a full stop.
        tied: all names of a tensor of which some would need one of their own.
        apart: those names; empty where the code itself uses one tensor for both.
        lacking: weights of layers that would need a bias.
    """

    name: str
    what: str
    why: str
    tied: tuple[str, ...] = ()
    apart: tuple[str, ...] = ()
    lacking: tuple[str, ...] = ()

    def __str__(self) -> str:
        """Return one line."""
        return f"{self.name}: {self.what} stays: {self.why}"


@dataclass(frozen=True)
class Use:
    """An operator that is given (a part of) a tensor of the state."""

    user: fx.Node
    operand: fx.Node


@dataclass(frozen=True)
class Obstacle:
    """Why a tensor cannot be edited, and, where a tie is the reason, its names and those that would go apart."""

    text: str
    tied: tuple[str, ...] = ()
    apart: tuple[str, ...] = ()


class TensorUses:
    """The uses of every tensor of a network's state.

    Args:
        ways: all graphs.
    """

    def __init__(self, ways: Sequence[LiveWay]) -> None:
        self.ways = tuple(ways)
        self._found: dict[str, list[tuple[Use, StatePart | None]]] = {}

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor."""
        return shape_of(self._placeholder(name))

    def dtype(self, name: str) -> torch.dtype:
        """Return the dtype of a tensor in the trace."""
        return self._placeholder(name).meta["val"].dtype

    def names(self, name: str) -> tuple[str, ...]:
        """Return all names of a tensor."""
        return self.ways[0].traced.aliases.get(name, (name,))

    def key(self, part: StatePart) -> Any:
        """Return which entries a part is; ``None`` if it cannot be written."""
        return part.key(self.shape(part.name))

    def of(self, name: str) -> list[tuple[Use, StatePart | None]]:
        """Return every use of a tensor, and the part that is used."""
        if name not in self._found:
            self._found[name] = [
                (Use(user, operand), part_of(way, operand))
                for way in self.ways
                for user, operand in uses_of(way, name)
            ]
        return self._found[name]

    def problem(self, part: StatePart, claimed: Collection[Use], what: str) -> Obstacle | None:
        """Return why a part of a tensor cannot be edited; ``None`` if it can.

        Args:
            part: what would be edited.
            claimed: uses that the edit takes into account; all others must be of other entries.
            what: how a message calls those that are claimed.
        """
        key = self.key(part)
        if key is None:
            return Obstacle(f"{part.name!r} is used through a copy that cannot be written")
        shared = self.overlap(part.name)
        if shared is not None:
            return shared
        if not self.dtype(part.name).is_floating_point:
            return Obstacle(f"{part.name!r} holds {self.dtype(part.name)}")
        for use, own in self.of(part.name):
            if use in claimed and own is not None and self.key(own) == key:
                continue
            if own is not None and self._apart(part, own):
                continue
            text = f"{part.name!r} is also used by {described(use.user)}, which is not {what}"
            return self.tie(part.name, text, [c.user for c in claimed])
        return None

    def overlap(self, name: str) -> Obstacle | None:
        """Return the problem of a tensor whose memory another one reaches."""
        for way in self.ways:
            other = next(
                (o for n in self.names(name) if (o := way.traced.overlapping.get(n)) is not None), None
            )
            if other is not None:
                return Obstacle(f"{name!r} shares a part of its memory with {other!r}")
        return None

    def tie(self, name: str, text: str, users: Iterable[fx.Node]) -> Obstacle:
        """Return the problem of a tensor that two would have to be, and under which names some operators use it.

        Args:
            name: of the tensor.
            text: what is in the way.
            users: operators that would need a tensor of their own.
        """
        names = self.names(name)
        if len(names) < 2:
            return Obstacle(text)
        where = {module_of(user) for user in users}
        apart = tuple(n for n in names if n.rpartition(".")[0] in where)
        apart = () if len(apart) == len(names) else apart
        advice = f"; untie=True gives {' and '.join(apart)} a tensor of its own" if apart else ""
        return Obstacle(f"{text} (it is tied: {', '.join(names)}{advice})", names, apart)

    def _apart(self, one: StatePart, other: StatePart) -> bool:
        """Whether two parts of a tensor have no entry in common."""
        shape = self.shape(one.name)
        if torch.Size(shape).numel() > _MOST_ENTRIES or self.key(other) is None:
            return False
        return not bool(torch.isin(one.entries(shape), other.entries(shape)).any())

    def _placeholder(self, name: str) -> fx.Node:
        return next(way.placeholders[name][0] for way in self.ways if name in way.placeholders)


def claims(pairs: Iterable[tuple[fx.Node | None, fx.Node | None]]) -> set[Use]:
    """Return uses from operators and operands."""
    return {Use(user, operand) for user, operand in pairs if user is not None and operand is not None}
