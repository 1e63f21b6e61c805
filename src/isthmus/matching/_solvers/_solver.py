"""Coupling solvers: from gains to the coupling of largest gain within a class of couplings."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import Tensor

from isthmus.couplings import Coupling, Permutation
from isthmus.matching._solvers._sides import Sides

__all__ = ["SidedSolver", "Solver", "as_solver"]


@runtime_checkable
class Solver(Protocol):
    """Turns a gain matrix into the coupling of largest gain within a class of couplings."""

    @property
    def acts(self) -> str:
        """The class of the couplings it finds, such as ``"permutation"``."""
        ...

    def __call__(self, gain: Tensor) -> Coupling:
        r"""Return a coupling that maximises :math:`\langle M, G \rangle`, for gains of shape ``(size, size)``."""
        ...


@runtime_checkable
class SidedSolver(Protocol):
    """Turns the gains of both sides of a group, or one gain matrix, into the best coupling of a class."""

    @property
    def acts(self) -> str:
        """The class of the couplings it finds, such as ``"positive"``."""
        ...

    def __call__(self, gain: Sides | Tensor) -> Coupling:
        """Return a coupling of largest :meth:`Sides.value`; a matrix stands for units that are held and never read."""
        ...


@dataclass(frozen=True)
class _Function:
    """A plain function as a solver; an index tensor, if that is what it returns, stands for its permutation."""

    function: Callable[[Tensor], Tensor | Coupling]
    acts: str = "permutation"

    def __call__(self, gain: Tensor) -> Coupling:
        found = self.function(gain)
        return found if isinstance(found, Coupling) else Permutation(found)


def as_solver(solver: Solver | Callable[[Tensor], Tensor]) -> Solver:
    """Return a solver; a function that returns index tensors is taken as one of permutations."""
    return solver if isinstance(solver, Solver) else _Function(solver)
