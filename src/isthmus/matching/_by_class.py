"""Groups matched by the solver of their own class: permutations, signs, factors, rotations and maps in one descent."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from isthmus.couplings import Coupling, Monomial, Permutation
from isthmus.matching._grids import Cluster
from isthmus.matching._nested import Gain, best_change, couple
from isthmus.matching._objectives import TermObjective
from isthmus.matching._sided import Compared, compared_of, each_compared, sides_of
from isthmus.matching._solvers import (
    Assignment,
    LeastSquares,
    ScaledAssignment,
    SidedSolver,
    assignment_solver,
)
from isthmus.matching._working import At
from isthmus.symmetry import AxisGroup

__all__ = ["ByClass", "Sided"]

CHANGE_NORMS = frozenset({"positive", "monomial", "general", "complex"})
"""Classes whose couplings change norms, so that inner products alone do not measure distances."""
TURN = frozenset({"orthogonal", "mean-fixing"})
"""Classes of rotations."""
TELL_SIDES = CHANGE_NORMS | {"signed"}
"""Classes that act otherwise on what holds the units than on what reads them, or not at all on some of it."""

MOST_CONDITION = 1e5
"""Condition number of a group's map beyond which it is not changed further: float32 would feel it."""

_MANY_PAIRS = 100
"""Pairs of blocks beyond which they are ranked by maps nearly the best, and only the chosen are solved to the end."""
_ROUGH = 1e-4
"""Rise of a step, relative to a pair's norms, at which a map is near enough to its best to rank the pair.

Pairs that belong together take one or two steps; random pairs of heads (64 dimensions of 768) take a hundred, of which
the last ninety raise the value by a thousandth of the norms."""
_ROUNDS = 5
"""Rounds over the groups of a nest whose families meet."""
_LITTLE = 1e-6
"""Rise of the value in a round, relative to it, that asks for no other round."""


@dataclass(frozen=True, eq=False)
class ByClass:
    """A solver for each group by its own class; groups that are not listed are permuted.

    A schedule that is given one asks it group by group. As a plain solver of one gain matrix it finds permutations.

    Attributes:
        solvers: by group name.
        acts: says that classes are mixed.
    """

    solvers: Mapping[str, SidedSolver] = field(default_factory=dict[str, SidedSolver])
    acts: str = "by class"

    def __call__(self, gain: Tensor) -> Permutation:
        """Return the permutation of largest gain."""
        return assignment_solver(gain)

    def of(self, group: str) -> SidedSolver:
        """Return the solver of a group."""
        return self.solvers.get(group, assignment_solver)

    def turns(self, group: str) -> bool:
        """Return whether a group is rotated."""
        return self.of(group).acts in TURN

    def permutes(self, cluster: Sequence[str]) -> bool:
        """Return whether all groups of a cluster are permuted, and no more."""
        return all(isinstance(self.of(name), Assignment) for name in cluster)


class Sided:
    """A term objective whose groups are matched by class while a schedule runs.

    Where a class changes norms, the value is minus half the squared distance, whatever the objective's own is. Nested
    groups whose outer units are permuted are matched pair by pair: every block of A with every block of B gets its best
    members, and the blocks are assigned by what these are worth, which is the exact optimum. Nests that are deeper, or
    whose families meet on one axis (grouped queries), are improved group after group, from three starts: where they
    are, what the families would be alone, and what is permuted matched first by what nothing else moves.

    Args:
        objective: what is matched.
        solver: a solver for each group.
    """

    def __init__(self, objective: TermObjective, solver: ByClass) -> None:
        changing = any(s.acts in CHANGE_NORMS for s in solver.solvers.values())
        self._objective = objective.with_costs() if changing else objective
        self._solver = solver
        self.structure = objective.structure
        self.value = self._objective.value

    def depends(self, cluster: Cluster) -> frozenset[str]:
        """Return the groups whose moves can change what is best for a cluster: it may be among them."""
        compared = (t.inner_product.groups for t in self._objective.terms(cluster))
        return frozenset(cluster).union(*compared)

    def rise(self, cluster: Cluster, at: At, changed: At, threshold: float) -> tuple[float, bool]:
        """Return by how much a change raises the value, and that this is exact."""
        return self.value(changed, cluster) - self.value(at, cluster), True

    def change(
        self, cluster: Cluster, at: At, *, names: Sequence[str] | None = None, measured: bool = False
    ) -> tuple[dict[str, Coupling], float]:
        """Return the best change of a cluster (see :class:`isthmus.matching.Working`)."""
        if self._solver.permutes(cluster):
            gains = self._objective.gains(cluster, at, all_terms=names is None)
            return best_change(gains, cluster, assignment_solver, names=names, measured=measured)
        found = self._found(cluster, at, all_terms=names is None)
        gain = self.value(self.structure.followed(at, cluster, found), cluster) if measured else 0.0
        return found, gain

    def _found(self, cluster: Cluster, at: At, *, all_terms: bool) -> dict[str, Coupling]:
        terms = self._objective.terms(cluster)
        if len(cluster) == 1:
            name = cluster[0]
            one_by_one = each_compared(terms, at, cluster, all_terms=all_terms)
            return {name: held_back(self._alone(name, one_by_one)[0], at.get(name), self._solver.of(name))}
        compared = compared_of(terms, at, cluster, all_terms=all_terms)
        nest = _nest_of([self.structure.spec.groups[name] for name in cluster])
        gains = self._objective.gains(cluster, at, all_terms=all_terms)
        starts = [self._permuted_first(cluster, gains)]
        if nest is not None and self._solver.permutes([nest.outer]):
            found = self._pairs(nest, compared, [g for g in gains if list(g.members) == [nest.outer]])
            if nest.parts(gains):
                return found
            starts.append(found)
        return self._in_turn(cluster, at, starts)

    def _alone(
        self, group: str, compared: Iterable[Compared], other: str | None = None, *, rough: bool = False
    ) -> tuple[Coupling, float]:
        """Return the best coupling of a group of A with one of B, and what it is worth; roughly, to rank many pairs."""
        solver = self._solver.of(group)
        if rough and isinstance(solver, LeastSquares):
            solver = replace(solver, tolerance=max(solver.tolerance, _ROUGH))
        size = self.structure.sizes[group]
        sides = sides_of(compared, group, size, other, sided=solver.acts in TELL_SIDES)
        found = solver(sides)
        return found, sides.value(found)

    def _pairs(
        self, nest: _NestFamilies, compared: Sequence[Compared], alone: Sequence[Gain]
    ) -> dict[str, Coupling]:
        """Return the best blocks and members: every pair of blocks has its best members."""
        size = self.structure.sizes[nest.outer]
        worth = torch.zeros(size, size, dtype=torch.float64)
        for gain in alone:
            worth += gain.reduced(nest.outer).cpu()
        members: dict[tuple[int, int], dict[str, Coupling]] = {}
        rough = size * size > _MANY_PAIRS
        for i in range(size):
            for k in range(size):
                found = {a: self._alone(a, compared, b, rough=rough) for a, b in nest.pairs(i, k)}
                members[i, k] = {name: coupling for name, (coupling, _) in found.items()}
                worth[i, k] += sum(value for _, value in found.values())
        blocks = assignment_solver(worth)
        chosen = list(enumerate(blocks.index.tolist()))
        if rough:
            members |= {
                (i, k): {a: self._alone(a, compared, b)[0] for a, b in nest.pairs(i, k)} for i, k in chosen
            }
        inner = [members[pair] for pair in chosen]
        return {nest.outer: blocks, **{name: c for part in inner for name, c in part.items()}}

    def within(self, cluster: Cluster, at: At, blocks: Permutation) -> dict[str, Coupling] | None:
        """Return the change of a nest whose blocks are paired as given: the best members of each pair.

        ``None`` where families of the nest meet, or blocks are more than permuted.
        """
        nest = _nest_of([self.structure.spec.groups[name] for name in cluster])
        if nest is None or not self._solver.permutes([nest.outer]):
            return None
        if not nest.parts(self._objective.gains(cluster, at)):
            return None
        compared = compared_of(self._objective.terms(cluster), at, cluster)
        pairs = [pair for i, k in enumerate(blocks.index.tolist()) for pair in nest.pairs(i, k)]
        return {nest.outer: blocks, **{a: self._alone(a, compared, b)[0] for a, b in pairs}}

    def _permuted_first(self, cluster: Cluster, gains: Sequence[Gain]) -> dict[str, Coupling]:
        """Return the best change of what is permuted in a cluster, by the cells that nothing else in it moves."""
        names = [n for n in cluster if self._solver.permutes([n])]
        rigid = [g for g in gains if set(g.members) <= set(names)]
        known = [n for n in names if any(n in g.members for g in rigid)]
        return couple(rigid, known, assignment_solver) if known else {}

    def _in_turn(
        self, cluster: Cluster, at: At, starts: Sequence[dict[str, Coupling]]
    ) -> dict[str, Coupling]:
        """Return a change of a cluster made of changes of its groups, from the start that ends at the largest value."""
        ends = [self._climbed(cluster, at, {}), *(self._climbed(cluster, at, start) for start in starts)]
        total, _ = max(ends, key=lambda end: end[1])
        identity = {n: Permutation.identity(self.structure.sizes[n]) for n in cluster}
        return {**identity, **total}

    def _climbed(
        self, cluster: Cluster, at: At, start: dict[str, Coupling]
    ) -> tuple[dict[str, Coupling], float]:
        """Return what becomes of a change when its groups are changed further in turn, and its value.

        Each further change is kept if it raises the value; after some rounds the schedule goes on.
        """
        total, now = dict(start), self.structure.followed(at, cluster, start) if start else dict(at)
        value = self.value(now, cluster)
        # Larger classes first: an order that is right looks wrong while its members are not turned yet.
        names = sorted(cluster, key=lambda name: self._solver.permutes([name]))
        for _ in range(_ROUNDS):
            before = value
            for name in names:
                together = self.structure.followed(total, cluster, self._step(name, cluster, now))
                there = self.structure.followed(at, cluster, together)
                reached = self.value(there, cluster)
                if reached > value:
                    total, now, value = together, there, reached
            if value - before <= _LITTLE * abs(value):
                break
        return total, value

    def _step(self, name: str, cluster: Cluster, now: At) -> dict[str, Coupling]:
        """Return the best change of one group of a cluster, all others staying."""
        if self._solver.permutes([name]):
            return couple(self._objective.gains(cluster, now), [name], assignment_solver)
        change, _ = self._alone(name, compared_of(self._objective.terms(cluster), now, cluster))
        return {name: held_back(change, now.get(name), self._solver.of(name))}


def held_back(step: Coupling, current: Coupling | None, solver: SidedSolver) -> Coupling:
    """Return a change that keeps within its solver's bounds what it makes of where the group is.

    A solver bounds the change; sweep after sweep, changes within bounds add up to couplings without. Factors are cut to
    the bound, maps beyond it stay where they are.
    """
    if isinstance(solver, ScaledAssignment) and isinstance(step, Monomial):
        total = step if current is None else current.then(step)
        assert isinstance(total, Monomial)
        sizes = total.factors.abs()
        return Monomial(step.index, step.factors * sizes.clamp(1 / solver.most, solver.most) / sizes)
    if solver.acts == "general" and current is not None:
        total = current.matrix(), step.matrix()
        if float(torch.linalg.cond(total[1] @ total[0])) > MOST_CONDITION:
            return Permutation.identity(step.shape[0])
    return step


@dataclass(frozen=True)
class _NestFamilies:
    """An outer group and the families of groups inside its units: by family, the member of each unit."""

    outer: str
    families: tuple[tuple[str, ...], ...]

    def parts(self, gains: Sequence[Gain]) -> bool:
        """Return whether families share no cells, so that what one of them gains does not depend on another."""
        family_of = {name: k for k, members in enumerate(self.families) for name in members}
        return all(len({family_of[n] for n in g.members if n in family_of}) <= 1 for g in gains)

    def pairs(self, i: int, k: int) -> list[tuple[str, str]]:
        """Return the inner groups of block ``i`` of A with those of block ``k`` of B."""
        return [(members[i], members[k]) for members in self.families]


def _nest_of(groups: Sequence[AxisGroup]) -> _NestFamilies | None:
    """Return a cluster as one outer group with families inside each of its units, ``None`` if it is none."""
    outer = [g for g in groups if not g.within]
    if len(outer) != 1:
        return None
    families: dict[str, dict[int, str]] = {}
    for group in groups:
        if group is outer[0]:
            continue
        if len(group.within) != 1 or group.within[0][0] != outer[0].name:
            return None
        families.setdefault(group.family, {})[group.within[0][1]] = group.name
    size = outer[0].size
    if any(sorted(members) != list(range(size)) for members in families.values()):
        return None
    return _NestFamilies(outer[0].name, tuple(tuple(m[i] for i in range(size)) for m in families.values()))
