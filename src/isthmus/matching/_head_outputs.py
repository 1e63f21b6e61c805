r"""Heads of attention paired by what they write, not by their circuits.

Where invertible maps act within heads, methods by activations match heads by the weights of their query-key and
value-output circuits. Here the pairs come from activations: head :math:`h` writes :math:`c_h = W_h x_h` to what
follows, which no map within the head changes, and

.. math:: \max_\pi \sum_h \mathbb E \langle \tilde c^A_h, \tilde c^B_{\pi(h)} \rangle
          = \max_\pi \sum_h \operatorname{tr} W^A_h \,\mathrm{Cov}(x^A_h, x^B_{\pi(h)})\, {W^B_{\pi(h)}}^{\top}

is the least squared distance between what paired heads write (centred), once B's stream is turned to A's. Within pairs
circuits decide as before.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from isthmus.matching._activations import ActivationMatching
from isthmus.matching._by_class import ByClass, Sided
from isthmus.matching._grids import Cluster
from isthmus.matching._objectives import MomentObjective
from isthmus.matching._schedules import Match
from isthmus.matching._solvers import assignment_solver
from isthmus.matching._terms import weight_objective
from isthmus.matching._working import At
from isthmus.symmetry import Relabelling

__all__ = ["HeadMatching"]


@dataclass(eq=False)
class HeadMatching(ActivationMatching):
    """Pairs heads by what they write, and all else as :class:`ActivationMatching` does.

    Heads that only permutations act within are matched by activations already, and stay as they are. So do heads that
    share keys (grouped queries), and those that no plain linear layer reads; a note names the latter two.
    """

    def run(self) -> tuple[Match, MomentObjective]:
        """Return the couplings and the objective."""
        match, objective = super().run()
        at = match.couplings
        for cluster in self.problem.layers.structure.clusters:
            if len(cluster) > 1 and not self._by_moments(cluster):
                at = self._paired(cluster, at)
        return replace(match, couplings=at, sweeps=(objective.value(at),)), objective

    def _paired(self, cluster: Cluster, at: At) -> At:
        """Return couplings with the heads of a cluster paired by what they write, if that can be told."""
        assert isinstance(self.solver, ByClass)
        others = {name: coupling for name, coupling in at.items() if name not in cluster}
        (outer, *more) = [n for n in cluster if not self.problem.spec.groups[n].within]
        worth = None if more else self._worth(cluster, outer, others)
        change = None
        if worth is not None:
            work = Sided(weight_objective(self.problem.pair), self.solver)
            change = work.within(cluster, others, assignment_solver(worth))
        if change is None:
            self.notes += (f"{outer}: what its units write is not compared; matched by circuits",)
            return at
        return {**at, **change}

    def _worth(self, cluster: Cluster, outer: str, others: At) -> Tensor | None:
        """Return the mean inner products of what heads write, shape ``(heads, heads)``, or ``None``."""
        problem, size = self.problem, self.problem.spec.groups[outer].size
        moved = Relabelling(problem.spec, dict(others)).apply(problem.state_b)
        sites = {site.name: site for site in problem.layers.sites}
        worth = torch.zeros(size, size, dtype=torch.float64)
        told = False
        views = problem.seen.views[cluster]
        for view, moment in zip(views, problem.joint_moments().get(cluster, []), strict=False):
            site, own = sites[view.tap.site], view.grid.members.get(outer)
            if not view.tap.inflow or own is None:
                continue
            axes, cells = problem.state_a[site.weight].ndim, view.tap.positions
            if axes != 2 or site.norm is not None or cells.shape[1] != 1:
                return None
            read = [
                state[site.weight].detach().cpu().double().movedim(site.in_axis, 0)[cells[:, 0]]
                for state in (problem.state_a, moved)
            ]
            gain = moment.covariance.cpu() * (read[0] @ read[1].T)
            worth += torch.stack([torch.stack([gain[i][:, k].sum() for k in own]) for i in own])
            told = True
        return worth if told else None
