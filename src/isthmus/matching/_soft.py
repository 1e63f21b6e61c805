"""Soft permutations: doubly stochastic matrices in place of permutations, for searches that move between them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Never

import torch
from torch import Tensor

from isthmus.couplings import Coupling, Permutation, index_of
from isthmus.errors import ShapeError
from isthmus.matching._solvers import assignment_solver
from isthmus.symmetry import Couplings, Slot, carry_tensor

__all__ = ["SoftPermutation", "as_matrices", "carried_softly", "rounded"]


@dataclass(frozen=True, eq=False)
class SoftPermutation:
    """A matrix with rows and columns of sum one, which acts on readers as on holders; gradients pass.

    Attributes:
        values: shape ``(size, size)``; only its shape is looked at.
    """

    values: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """Number of units, twice."""
        return len(self.values), len(self.values)

    def carry(self, units: Tensor, axis: int = 0) -> Tensor:
        """Return mixtures of the units, in their dtype."""
        front = units.movedim(axis, 0)
        mixed = self.values.to(units) @ front.reshape(len(front), -1)
        return mixed.reshape(front.shape).movedim(0, axis)

    def carry_readers(self, units: Tensor, axis: int = 0) -> Tensor:
        """Return mixtures of the readers by the same weights: for a permutation, its inverse transposed."""
        return self.carry(units, axis)

    def then(self, after: Coupling) -> Coupling:
        """Return this mixture followed by another coupling."""
        return SoftPermutation(after.matrix().to(self.values) @ self.values)

    def inverse(self) -> Never:
        """Refuse: nothing undoes a mixture.

        Raises:
            ShapeError: always.
        """
        raise ShapeError(
            "SoftPermutation: nothing undoes a mixture of units. Round it to a permutation first."
        )

    def matrix(self) -> Tensor:
        """Return the matrix, float64."""
        return self.values.double()


def carried_softly(tensor: Tensor, movers: Mapping[int, Sequence[tuple[str, Slot]]], at: Couplings) -> Tensor:
    """Return a tensor carried by couplings that treat what holds units and what reads them alike."""
    slots = {
        axis: [(name, replace(slot, role="holds", power=None)) for name, slot in pairs]
        for axis, pairs in movers.items()
    }
    return carry_tensor(tensor, slots, at)


def as_matrices(at: Couplings, sizes: Mapping[str, int], dtype: torch.dtype) -> dict[str, Tensor]:
    """Return permutations as matrices; a group that is not listed is where it was."""
    found: dict[str, Tensor] = {}
    for name, size in sizes.items():
        index = index_of(at[name]) if name in at else torch.arange(size)
        found[name] = torch.eye(size, dtype=dtype)[index]
    return found


def rounded(matrices: Mapping[str, Tensor]) -> dict[str, Permutation]:
    """Return the permutations nearest to matrices: those of the largest sum of entries."""
    return {name: assignment_solver(matrix.detach().double()) for name, matrix in matrices.items()}
