r"""Gains of a group's units, side by side: of what holds them, of what reads them, and of what is only reordered.

A coupling :math:`M` acts on tensors that hold the units of B as :math:`M b`, and as :math:`M^{-\top} s` on tensors that
read them, units first. For permutations, signs and rotations the two are the same and one gain matrix says all. For
factors and invertible maps they are not, and the tensors change their norms, so the inner products of B's units with
one another count too.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from isthmus.couplings import Coupling
from isthmus.errors import ShapeError

__all__ = ["Sides", "as_sides"]

Grams = tuple[Tensor, Tensor]
"""Inner products of a network's units with one another, by what holds and by what reads them; or squared norms."""


@dataclass(frozen=True, eq=False)
class Sides:
    r"""What pairing units of A (rows) with units of B (columns) gains on each side.

    Attributes:
        holders: inner products of what holds the units, :math:`G = A B^\top`, float64, shape ``(units, units)``.
        readers: inner products of what reads them, :math:`H = R S^\top`, same shape.
        unmoved: gains of tensors in which units are only reordered, whatever their factor, same shape.
        of_a: inner products of A's units with one another, :math:`(A A^\top, R R^\top)`, each ``(units, units)``, or
            their diagonals ``(units,)``; ``None`` where no solver asks.
        of_b: the same for B, :math:`N = B B^\top` and :math:`K = S S^\top`.

    Raises:
        ShapeError: matrices of different shapes.
    """

    holders: Tensor
    readers: Tensor
    unmoved: Tensor
    of_a: Grams | None = None
    of_b: Grams | None = None

    def __post_init__(self) -> None:
        """Check that all parts are about the same units."""
        rows, columns = self.holders.shape
        for name, part in (("readers", self.readers), ("unmoved", self.unmoved)):
            if part.shape != (rows, columns):
                raise ShapeError(
                    f"Sides: expected {name} of shape {(rows, columns)}, as the holders have, "
                    f"found {tuple(part.shape)}."
                )
        for name, size, grams in (("A", rows, self.of_a), ("B", columns, self.of_b)):
            for gram in grams or ():
                if tuple(gram.shape) not in ((size,), (size, size)):
                    raise ShapeError(
                        f"Sides: expected inner products of {size} units of {name}, found shape {tuple(gram.shape)}."
                    )

    @classmethod
    def between(cls, holders: tuple[Tensor, Tensor], readers: tuple[Tensor, Tensor] | None = None) -> Sides:
        """Return the sides of two lists of units, given as rows.

        Args:
            holders: rows of A and of B that hold the units, each ``(units, features)``.
            readers: rows that read them, the same for both networks; ``None`` where nothing does.

        Example:
            >>> rows = torch.tensor([[3.0, 0.0], [0.0, 1.0]])
            >>> Sides.between((rows, 2 * rows)).holders
            tensor([[18.,  0.],
                    [ 0.,  2.]], dtype=torch.float64)
        """
        a, b = (x.detach().double() for x in holders)
        r, s = (x.detach().double() for x in readers) if readers is not None else (a[:, :0], b[:, :0])
        return cls(
            a @ b.T, r @ s.T, (a @ b.T).new_zeros(len(a), len(b)), (a @ a.T, r @ r.T), (b @ b.T, s @ s.T)
        )

    @classmethod
    def of_gain(cls, gain: Tensor) -> Sides:
        """Return the sides of one gain matrix: units that are held and never read, of which no norms are known."""
        values = gain.detach().double()
        return cls(values, torch.zeros_like(values), torch.zeros_like(values))

    @property
    def total(self) -> Tensor:
        """The sum of all gains: all there is to permutations, signs (without ``unmoved``) and rotations."""
        return self.holders + self.readers + self.unmoved

    def norms(self, network: str = "B") -> Grams:
        """Return the squared norms of a network's units, by holders and by readers, each ``(units,)``.

        Raises:
            ShapeError: they are not known.
        """
        held, read = self._grams(network)
        return tuple(g.diagonal() if g.ndim == 2 else g for g in (held, read))  # pyright: ignore[reportReturnType]

    def grams(self, network: str = "B") -> Grams:
        """Return the inner products of a network's units with one another, each ``(units, units)``.

        Raises:
            ShapeError: they are not known, or their diagonals alone.
        """
        found = self._grams(network)
        if any(g.ndim == 1 for g in found):
            raise ShapeError(
                f"Sides: this needs the inner products of network {network}'s units with one another, found their "
                "norms alone. Give matrices of shape (units, units)."
            )
        return found

    def _grams(self, network: str) -> Grams:
        found = self.of_a if network == "A" else self.of_b
        if found is None:
            raise ShapeError(
                f"Sides: this needs the norms of network {network}'s units, by what holds and what reads them, found "
                "gains alone. Give of_a and of_b, or build the sides with Sides.between."
            )
        return found

    def value(self, coupling: Coupling) -> float:
        r"""Return minus half the squared distance of A to B carried by a coupling, without A's own norms.

        .. math:: \langle G, M \rangle + \langle H, M^{-\top} \rangle + \langle U, [M \ne 0] \rangle
                  - \tfrac12 \operatorname{tr} M N M^\top - \tfrac12 \operatorname{tr} M^{-\top} K M^{-1}

        Where no norms of B are known, the last two are left out: they are the same for all permutations, signs and
        rotations.
        """
        held = coupling.matrix().detach().to(self.holders.device)
        read = coupling.inverse().matrix().detach().T.to(self.holders.device)
        found = (held * self.holders).sum() + (read * self.readers).sum() + ((held != 0) * self.unmoved).sum()
        for matrix, gram in zip((held, read), self.of_b or (), strict=False):
            whole = gram if gram.ndim == 2 else gram.diag()
            found = found - 0.5 * ((matrix @ whole) * matrix).sum()
        return float(found)


def as_sides(gain: Sides | Tensor) -> Sides:
    """Return sides; a gain matrix stands for units that are held and never read."""
    return gain if isinstance(gain, Sides) else Sides.of_gain(gain)
