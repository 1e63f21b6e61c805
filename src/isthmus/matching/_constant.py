"""Units that never vary: activations say nothing about them, so their weights decide.

Policy ``constant_units="weights"``. A unit that is constant over the data (a dead one, say) has no covariance with
any other. Activation matching therefore leaves the partners of such units open: it fixes the pairs in which both
units vary, and the units left over are paired among themselves by full weight matching, given everything else.
That is a second, small assignment per group, repeated until no group improves; it never lowers the gain of the
activations, and it does not depend on the order in which the units of B are numbered.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from isthmus.couplings import Coupling, Permutation, identity_permutation, index_of
from isthmus.matching._grids import Cluster, Structure
from isthmus.matching._nested import Gain
from isthmus.matching._objectives import TermObjective, independent
from isthmus.matching._parts import parts_of
from isthmus.matching._schedules import CoordinateDescent, SinglePass
from isthmus.matching._solvers import Solver
from isthmus.symmetry import Couplings

__all__ = ["CONSTANT_UNITS", "pair_constant_units"]

CONSTANT_UNITS = "weights"
"""Name of the policy for units that never vary."""


@dataclass(frozen=True, eq=False)
class _LeftOver:
    """An objective in which only the pairs that are still open may change.

    Attributes:
        inner: decides.
        allowed: by group, which pairs may be chosen, bool, shape ``(size, size)``.
    """

    inner: TermObjective
    allowed: Mapping[str, Tensor]

    @property
    def structure(self) -> Structure:
        whole = self.inner.structure
        return replace(whole, clusters=tuple(c for c in whole.clusters if c[0] in self.allowed))

    def gains(self, cluster: Cluster, at: Couplings, *, all_terms: bool = True) -> Sequence[Gain]:
        name = cluster[0]
        allowed = self.allowed[name]
        order = index_of(at.get(name, identity_permutation(len(allowed))))
        members = {name: torch.arange(len(allowed))[:, None]}
        total = torch.zeros(allowed.shape, dtype=torch.float64).masked_fill_(~allowed, -torch.inf)
        terms = self.inner.terms(cluster)
        if not all_terms:
            terms = independent(terms, at) or terms
        permuted = all(isinstance(c, Permutation | Tensor) for c in at.values())
        by_term = parts_of(terms, name, len(allowed)) if permuted else None
        if by_term is None:
            gains = self.inner.gains(cluster, at, all_terms=all_terms)
            found = torch.stack([g.reduced(name).cpu() for g in gains]).sum(0)
            return [Gain(found + total[:, order], members)]
        # Pairs without a choice need no gain.
        rows = torch.nonzero(allowed.sum(1) > 1).flatten()
        columns = torch.nonzero(allowed[rows].any(0)).flatten()
        for part in (part for parts in by_term for part in parts if len(rows)):
            total[rows[:, None], columns] += part.gains(rows, columns, part.order(at)).cpu()
        return [Gain(total[:, order], members)]

    def value(self, at: Couplings, groups: Iterable[str] | None = None) -> float:
        return self.inner.value(at, groups)

    def cost(self, group: str, at: Couplings) -> float:
        return self.inner.cost(group, at)


def pair_constant_units(
    found: Mapping[str, Coupling],
    constant: Mapping[str, tuple[Tensor, Tensor]],
    weights: TermObjective,
    solver: Solver,
    generator: torch.Generator,
) -> Mapping[str, Coupling]:
    """Pair the units that activation matching leaves open by their weights.

    Args:
        found: by activation matching.
        constant: by group, indices of the units of A and of B that never vary; the group shares no axis.
        weights: full weight matching.
        solver: solves one assignment; honours gains of ``-inf`` as forbidden.
        generator: for the schedules.

    Returns:
        All couplings; pairs of units that both vary are as before.
    """
    allowed = {name: _open_pairs(index_of(found[name]), *units) for name, units in constant.items()}
    objective = _LeftOver(weights, allowed)
    known = {name: c for name, c in found.items() if name not in allowed}
    first = SinglePass().run(objective, solver, known, generator)
    return CoordinateDescent().run(objective, solver, first.couplings, generator).couplings


def _open_pairs(permutation: Tensor, constant_a: Tensor, constant_b: Tensor) -> Tensor:
    """Return which pairs the activations leave open, bool, shape ``(size, size)``."""
    size = len(permutation)
    dead_a, dead_b = torch.zeros(size, dtype=torch.bool), torch.zeros(size, dtype=torch.bool)
    dead_a[constant_a.cpu()], dead_b[constant_b.cpu()] = True, True
    left_a = dead_a | dead_b[permutation]
    left_b = torch.zeros(size, dtype=torch.bool)
    left_b[permutation[left_a]] = True
    allowed = left_a[:, None] & left_b[None, :] & (dead_a[:, None] | dead_b[None, :])
    rows = torch.arange(size)
    allowed[rows[~left_a], permutation[~left_a]] = True
    return allowed
