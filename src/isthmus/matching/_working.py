"""The protocol between schedules and objectives: best change of a cluster, rise of the value, dependence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import singledispatch
from typing import Literal, Protocol

from isthmus.couplings import Coupling
from isthmus.matching._grids import Cluster
from isthmus.matching._nested import best_change
from isthmus.matching._objectives import Objective
from isthmus.matching._solvers import Solver

__all__ = ["Plain", "Products", "Working", "working"]

Products = Literal["float64", "float32", "bfloat16"]
"""Precision of the products of large groups; what is found is optimal for the float64 gains in any case."""

At = Mapping[str, Coupling]
"""Where all groups are during a search: couplings by group, no index tensors."""


class Working(Protocol):
    """An objective and a solver while a schedule runs; it may remember what it computed."""

    def depends(self, cluster: Cluster) -> frozenset[str]:
        """Return the groups whose moves can change what is best for a cluster."""
        ...

    def change(
        self, cluster: Cluster, at: At, *, names: Sequence[str] | None = None, measured: bool = False
    ) -> tuple[dict[str, Coupling], float]:
        """Return the best change of a cluster from where it is, and its matched gain if that is to be ``measured``.

        Args:
            cluster: the groups.
            at: where all groups are.
            names: match only these, by what depends on no group that is not matched yet (a single pass).
            measured: whether the gain is wanted; else the number says nothing.
        """
        ...

    def rise(self, cluster: Cluster, at: At, changed: At, threshold: float) -> tuple[float, bool]:
        """Return by how much a change of a cluster raises the value, and whether that is exact.

        If not, it is at least on the right side of the threshold.
        """
        ...

    def value(self, at: At) -> float:
        """Return the value of couplings (see :class:`Objective`)."""
        ...


class Plain:
    """Any objective with any solver; it remembers nothing."""

    def __init__(self, objective: Objective, solver: Solver) -> None:
        self._objective, self._solver, self.value = objective, solver, objective.value

    def depends(self, cluster: Cluster) -> frozenset[str]:
        """Return all groups: any of them may matter."""
        return frozenset(self._objective.structure.sizes)

    def change(
        self, cluster: Cluster, at: At, *, names: Sequence[str] | None = None, measured: bool = False
    ) -> tuple[dict[str, Coupling], float]:
        """Return the best change of a cluster (see :class:`Working`)."""
        gains = self._objective.gains(cluster, at, all_terms=names is None)
        return best_change(gains, cluster, self._solver, names=names, measured=measured)

    def rise(self, cluster: Cluster, at: At, changed: At, threshold: float) -> tuple[float, bool]:
        """Return by how much a change raises the value, and that this is exact."""
        return self._objective.value(changed, cluster) - self._objective.value(at, cluster), True


@singledispatch
def working(objective: Objective, solver: Solver, products: Products | None) -> Working:
    """Return an objective and a solver as schedules use them.

    Register a class of objectives with ``working.register`` to give it a memory of its own.

    Args:
        objective: what is matched.
        solver: what couples one gain matrix.
        products: precision of large products; None asks for everything to be computed anew each time.
    """
    return Plain(objective, solver)
