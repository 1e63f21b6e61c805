"""Units of the state that are followed, what spoils them, and which pairs of them turn together."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

__all__ = ["Plane", "Units"]


@dataclass(frozen=True)
class Plane:
    """Two units of one tensor that turn together, in this order.

    Attributes:
        tensor: name of the tensor.
        first: number of its first unit, in row-major order of the tensor's entries.
        second: number of the second one.
        inverse: whether the inverse transpose acts on them.
    """

    tensor: str
    first: int
    second: int
    inverse: bool


@dataclass
class Units:
    """Numbers of the units of all tensors that are followed.

    A unit of a tensor is all entries with the same coordinates on the axes that a layer keeps; it has the number of the
    first of them. Each may belong to one plane: two units in an order. Planes are tied to one another, with a bit that
    says whether one is acted on by the inverse transpose of what acts on the other.

    Attributes:
        shapes: by tensor.
        kept: axes of a tensor on which its units lie.
    """

    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict[str, tuple[int, ...]])
    kept: dict[str, tuple[int, ...]] = field(default_factory=dict[str, tuple[int, ...]])
    _starts: dict[str, int] = field(default_factory=dict[str, int])
    _count: int = 0
    _spoiled: set[int] = field(default_factory=set[int])
    _spoiled_tensors: set[str] = field(default_factory=set[str])
    _partner: dict[int, tuple[int, int]] = field(default_factory=dict[int, tuple[int, int]])
    _above: dict[int, tuple[int, bool]] = field(default_factory=dict[int, tuple[int, bool]])
    _contradictory: set[int] = field(default_factory=set[int])
    _rows: dict[int, set[object]] = field(default_factory=dict[int, set[object]])

    def start(self, tensor: str, shape: tuple[int, ...], kept: tuple[int, ...]) -> int:
        """Return the number of a tensor's first unit; units on other axes than before spoil the tensor."""
        if tensor not in self._starts:
            self._starts[tensor], self._count = self._count, self._count + math.prod(shape)
            self.shapes[tensor], self.kept[tensor] = shape, kept
        elif self.kept[tensor] != kept:
            self.spoil_tensor(tensor)
        return self._starts[tensor]

    @property
    def tensors(self) -> tuple[str, ...]:
        """Names of the tensors that are followed."""
        return tuple(self._starts)

    def tensor_of(self, unit: int) -> str:
        """Return the tensor of a unit."""
        return self.tensors[bisect_right(list(self._starts.values()), unit) - 1]

    # --- Spoiling ----------------------------------------------------------------------------------------------

    def spoil(self, units: Tensor | Iterable[int]) -> None:
        """Say that units are used in a way that turns nothing."""
        listed = units.unique().tolist() if isinstance(units, Tensor) else units
        self._spoiled.update(u for u in listed if u >= 0)

    def spoil_tensor(self, tensor: str) -> None:
        """Say so of all units of a tensor."""
        self._spoiled_tensors.add(tensor)

    # --- Planes ------------------------------------------------------------------------------------------------

    def pair(self, first: int, second: int) -> bool:
        """Put two units into a plane; return whether they are in it now, and in no other."""
        found = self._partner.get(first), self._partner.get(second)
        if found == (None, None):
            self._partner[first], self._partner[second] = (second, 1), (first, -1)
            return True
        return found == ((second, 1), (first, -1))

    def partners(self) -> tuple[Tensor, Tensor]:
        """Return, by unit, the other one of its plane (itself if it has none) and 1, or -1 for second ones, or 0."""
        partner, sign = torch.arange(self._count), torch.zeros(self._count, dtype=torch.int64)
        if self._partner:
            at = torch.tensor(list(self._partner))
            values = torch.tensor(list(self._partner.values()))
            partner[at], sign[at] = values[:, 0], values[:, 1]
        return partner, sign

    def tie(self, one: int, other: int, *, inverse: bool, row: object) -> None:
        """Tie the planes of two first units, seen in a row of an inner product."""
        self._rows.setdefault(one, set()).add(row)
        self._rows.setdefault(other, set()).add(row)
        (above, bit), (below, other_bit) = self._top(one), self._top(other)
        differs = bit ^ other_bit ^ inverse
        if above == below:
            if differs:
                self._contradictory.add(above)
            return
        self._above[below] = (above, differs)
        if below in self._contradictory:
            self._contradictory.add(above)

    def _top(self, unit: int) -> tuple[int, bool]:
        bit = False
        while unit in self._above:
            unit, step = self._above[unit]
            bit ^= step
        return unit, bit

    def settled(self) -> list[tuple[list[Plane], bool, frozenset[object]]]:
        """Return the planes that turn together and are not spoiled, whether they may be scaled, and where they meet."""
        together: dict[int, list[int]] = {}
        for first in self._rows:
            together.setdefault(self._top(first)[0], []).append(first)
        found: list[tuple[list[Plane], bool, frozenset[object]]] = []
        names, starts = self.tensors, list(self._starts.values())
        owners = {unit: names[bisect_right(starts, unit) - 1] for unit in self._rows}
        for top, firsts in together.items():
            pairs = [(first, self._partner[first][0]) for first in firsts]
            if any(u in self._spoiled for pair in pairs for u in pair):
                continue
            if any(owners[first] in self._spoiled_tensors for first in firsts):
                continue
            planes = [
                Plane(
                    owners[one],
                    one - self._starts[owners[one]],
                    two - self._starts[owners[one]],
                    self._top(one)[1],
                )
                for one, two in pairs
            ]
            rows = frozenset(row for first in firsts for row in self._rows[first])
            found.append((planes, top not in self._contradictory, rows))
        return found
