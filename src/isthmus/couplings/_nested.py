"""Couplings of units that contain units: blocks are coupled, and the members of each block."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from isthmus.couplings._coupling import Coupling, check_units, follow, is_orthogonal
from isthmus.couplings._linear import Linear, Rotation
from isthmus.couplings._monomial import Permutation
from isthmus.errors import ShapeError

__all__ = ["Nested"]


@dataclass(frozen=True, eq=False, repr=False)
class Nested:
    """Blocks of units (heads) that change places, and within each block its members (dimensions of a head).

    Blocks move first, members at the new place of their block: member ``j`` of block ``i`` of A is made of the
    members of block ``outer.index[i]`` of B by ``inner[i]``.

    Attributes:
        outer: order of the blocks.
        inner: for each block of A, the coupling of its members; all of one shape.

    Raises:
        ShapeError: another number of inner couplings than of blocks, or couplings of different shapes.
    """

    outer: Permutation
    inner: Sequence[Coupling]

    def __post_init__(self) -> None:
        """Check that there is one coupling for each block."""
        object.__setattr__(self, "inner", tuple(self.inner))
        shapes = {c.shape for c in self.inner}
        if len(self.inner) != self.outer.shape[0] or len(shapes) > 1:
            raise ShapeError(
                f"Nested: expected one inner coupling for each of {self.outer.shape[0]} blocks, all of one shape, "
                f"found {len(self.inner)} of {sorted(shapes)}."
            )

    @property
    def shape(self) -> tuple[int, int]:
        """Number of members of all blocks, of A and of B."""
        rows, columns = self.inner[0].shape if self.inner else (0, 0)
        return len(self.inner) * rows, len(self.inner) * columns

    @property
    def orthogonal(self) -> bool:
        """Whether the inverse is the transpose: where it is for all members."""
        return all(is_orthogonal(c) for c in self.inner)

    def carry(self, units: Tensor, axis: int = 0) -> Tensor:
        """Return the members in order, block by block."""
        return self._each(units, axis, readers=False)

    def carry_readers(self, units: Tensor, axis: int = 0) -> Tensor:
        """Return the readers of the members, block by block."""
        return self._each(units, axis, readers=True)

    def _each(self, units: Tensor, axis: int, *, readers: bool) -> Tensor:
        check_units(self, units, axis)
        if not self.inner:
            return units
        blocks = units.chunk(len(self.inner), axis)
        moved = [
            (c.carry_readers if readers else c.carry)(blocks[k], axis)
            for c, k in zip(self.inner, self.outer.index.tolist(), strict=True)
        ]
        return torch.cat(moved, axis)

    def then(self, after: Coupling) -> Coupling:
        """Return this coupling followed by another."""
        follow(self, after)
        if isinstance(after, Nested) and len(after.inner) == len(self.inner):
            inner = [
                self.inner[k].then(c) for c, k in zip(after.inner, after.outer.index.tolist(), strict=True)
            ]
            return Nested(Permutation.known(self.outer.index[after.outer.index]), inner)
        if self.orthogonal and is_orthogonal(after):
            return Rotation(self.matrix()).then(after)
        return Linear(self.matrix(), self.inverse().matrix()).then(after)

    def inverse(self) -> Nested:
        """Return the coupling that undoes this one: members go back with their blocks."""
        outer = self.outer.inverse()
        return Nested(outer, [self.inner[k].inverse() for k in outer.index.tolist()])

    def matrix(self) -> Tensor:
        """Return the matrix of all members, float64."""
        columns = self.shape[1] // max(len(self.inner), 1)
        rows: list[Tensor] = []
        for coupling, k in zip(self.inner, self.outer.index.tolist(), strict=True):
            values = coupling.matrix()
            before, after = k * columns, self.shape[1] - (k + 1) * columns
            rows.append(torch.nn.functional.pad(values, (before, after)))
        return torch.cat(rows) if rows else torch.zeros(0, 0, dtype=torch.float64)

    def __repr__(self) -> str:
        """Return one line."""
        inside = type(self.inner[0]).__name__ if self.inner else "nothing"
        return f"Nested({len(self.inner)} blocks of {inside}, {self.shape[0]} units)"
