"""Coupling solvers: from a gain matrix to the coupling of largest gain."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import Tensor

from isthmus.couplings import Coupling, Permutation
from isthmus.transport import assign

__all__ = ["Assignment", "Solver", "as_solver", "assignment_solver"]


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


@dataclass(frozen=True)
class Assignment:
    """The permutation of largest total gain: exact linear assignment (:func:`isthmus.transport.assign`)."""

    acts: str = "permutation"

    def __call__(self, gain: Tensor) -> Permutation:
        """Return the permutation; gains of ``-inf`` are forbidden pairs."""
        return Permutation.known(assign(gain, maximize=True, proof=False).columns.cpu())


assignment_solver = Assignment()
"""The usual solver."""


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
