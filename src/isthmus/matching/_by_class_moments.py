r"""Groups matched by the solver of their class where activations are compared."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from isthmus.couplings import Coupling, Monomial, Permutation
from isthmus.matching._by_class import ByClass
from isthmus.matching._grids import Cluster
from isthmus.matching._nested import best_change, total_gain
from isthmus.matching._objectives import MomentObjective, UnitSpreads
from isthmus.matching._solvers import (
    ScaledAssignment,
    Sides,
    SignedAssignment,
    Solver,
    assignment_solver,
)
from isthmus.matching._working import At, Plain, Products, Working, working
from isthmus.transport import norm_factors

__all__ = ["SidedMoments"]


class SidedMoments:
    r"""A moment objective whose groups are matched by class while a schedule runs.

    Rotations take the gain matrix as it is: for a residual stream, the covariance of the normed activations at all
    places that read it. Signs take its size. Factors are found after the pairs, from how much the units vary,
    :math:`\lambda^2 = E h_A^2 / E h_B^2`: the regression of one unit on the other shrinks what it explains badly, and
    shrinking is what averaged networks suffer from. Clusters that are seen nowhere, and those that invertible maps act
    on, are matched by the fallback.

    Args:
        objective: what is matched.
        solver: a solver for each group.
        fallback: the objective's own, at work.
    """

    def __init__(self, objective: MomentObjective, solver: ByClass, fallback: Working) -> None:
        self._objective, self._solver, self._fallback = objective, solver, fallback
        self.value = objective.value

    def depends(self, cluster: Cluster) -> frozenset[str]:
        """Return the groups whose moves can change what is best for a cluster."""
        return frozenset(self._objective.structure.sizes)

    def change(
        self, cluster: Cluster, at: At, *, names: Sequence[str] | None = None, measured: bool = False
    ) -> tuple[dict[str, Coupling], float]:
        """Return the best change of a cluster (see :class:`isthmus.matching.Working`)."""
        if cluster not in self._objective.seen:
            return self._fallback.change(cluster, at, names=names, measured=measured)
        gains = self._objective.gains(cluster, at, all_terms=names is None)
        if self._solver.permutes(cluster):
            return best_change(gains, cluster, assignment_solver, names=names, measured=measured)
        (name,) = cluster
        total = torch.stack([g.reduced(name) for g in gains]).sum(0)
        found = {name: self._solved(name, total, self._objective.units[cluster], at.get(name))}
        return found, total_gain(gains, found) if measured else 0.0

    def rise(self, cluster: Cluster, at: At, changed: At, threshold: float) -> tuple[float, bool]:
        """Return by how much a change raises the value, and that this is exact."""
        return self.value(changed, cluster) - self.value(at, cluster), True

    def _solved(self, name: str, gain: Tensor, units: UnitSpreads, current: Coupling | None) -> Coupling:
        solver = self._solver.of(name)
        if not isinstance(solver, ScaledAssignment):
            return solver(Sides.of_gain(gain))
        order = SignedAssignment()(gain) if solver.signed else assignment_solver(gain)
        nothing = torch.zeros_like(gain[0])
        energy = _energy_at(units.energy_b.cpu(), current).to(gain.device)
        factors = norm_factors((units.energy_a, nothing), (energy, nothing), most=math.inf)
        chosen = factors.gather(1, order.index[:, None].to(factors.device))[:, 0].cpu()
        if solver.rule == "least squares":
            chosen = chosen * _agreement(gain, units, order.index, current)
        chosen = chosen.clamp(1 / solver.alone, solver.alone)
        signs = order.factors if isinstance(order, Monomial) else 1.0
        return Monomial(order.index, chosen * signs)


def _agreement(gain: Tensor, units: UnitSpreads, index: Tensor, current: Coupling | None) -> Tensor:
    """Return the correlations of pairs, by whose sizes a regression shrinks what the spreads ask for."""
    spread = _energy_at(units.b.cpu(), current)[index] * units.a.cpu()
    chosen = gain.gather(1, index[:, None].to(gain.device))[:, 0].abs().cpu()
    return torch.where(spread > 0, chosen / spread.clamp(min=1e-300).sqrt(), 1.0)


def _energy_at(energy: Tensor, current: Coupling | None) -> Tensor:
    """Return the mean squares of B's units where they have been carried to."""
    if isinstance(current, Permutation):
        return energy[current.index]
    if isinstance(current, Monomial):
        return energy[current.index] * current.factors.detach().cpu().square()
    return energy


@working.register(MomentObjective)
def _(objective: MomentObjective, solver: Solver, products: Products | None) -> Working:
    if not isinstance(solver, ByClass):
        return Plain(objective, solver)
    return SidedMoments(objective, solver, working(objective.fallback, solver, products))
