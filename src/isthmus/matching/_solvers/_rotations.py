"""Couplings that rotate units: orthogonal matrices, with or without a fixed mean, and rotations of planes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from isthmus.couplings import Rotation
from isthmus.errors import DataError
from isthmus.matching._solvers._sides import Sides, as_sides
from isthmus.transport import plane_rotations, procrustes

__all__ = ["PlaneRotations", "Procrustes"]


@dataclass(frozen=True)
class Procrustes:
    """The rotation or reflection of largest gain: symmetries of what sees inner products alone.

    The inverse of a rotation is its transpose, so what holds the units and what reads them count alike. Directions
    without a gain stay where they are (see :func:`isthmus.transport.procrustes`).

    Attributes:
        fix_mean: only rotations that keep the mean of the units, as layer normalisation, which subtracts it, asks for.

    Source:
        Schönemann 1966; for residual streams Theus 2025.
    """

    fix_mean: bool = False

    @property
    def acts(self) -> str:
        """The class: orthogonal matrices, or those that keep the mean."""
        return "mean-fixing" if self.fix_mean else "orthogonal"

    def __call__(self, gain: Sides | Tensor) -> Rotation:
        """Return the rotation."""
        return Rotation(procrustes(as_sides(gain).total, fix_mean=self.fix_mean).cpu())


@dataclass(frozen=True)
class PlaneRotations:
    """The rotation of largest gain that turns each plane of two units: symmetries of rotary embeddings.

    Queries and keys of a head turn alike, plane by plane, and scores stay as they are.

    Attributes:
        planes: ``"halves"``: unit ``i`` with ``i + size / 2``, as Llama has it; ``"neighbours"``: units ``2i`` and
            ``2i + 1``, as in the paper.

    Raises:
        DataError: unknown planes.

    Source:
        Su 2021 (rotary embeddings); the angle is :func:`isthmus.transport.plane_rotations`.
    """

    planes: Literal["halves", "neighbours"] = "halves"
    acts: str = "plane-rotations"

    def __post_init__(self) -> None:
        """Check the planes."""
        if self.planes not in ("halves", "neighbours"):
            raise DataError(
                f"PlaneRotations: expected planes 'halves' or 'neighbours', found {self.planes!r}."
            )

    def __call__(self, gain: Sides | Tensor) -> Rotation:
        """Return the rotation.

        Raises:
            DataError: an odd number of units.
        """
        total = as_sides(gain).total
        if len(total) % 2:
            raise DataError(f"PlaneRotations: expected an even number of units, found {len(total)}.")
        units = torch.arange(len(total))
        pairs = units.reshape(2, -1).T if self.planes == "halves" else units.reshape(-1, 2)
        return Rotation(plane_rotations(total, pairs).cpu())
