r"""Coupling groups that share an axis: which blocks belong together, and which members within them.

For an outer group of ``G`` blocks with members inside, the gain of pairing block ``i`` of A with block ``k`` of
B depends on how their members are paired. :func:`couple` first gives every pair of blocks its best members
(``G²`` small assignments), pairs the blocks by these gains, and then alternates between members and blocks
until the total gain stops rising. Where every block has a permutation of its own for its members, the first step
is already the exact optimum; where all blocks share one, it is the start of the alternation. Nests of any depth
are solved from the inside out.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from isthmus.couplings import Coupling, Permutation, index_of
from isthmus.matching._solvers import Solver
from isthmus.symmetry import Couplings

__all__ = ["Gain", "best_change", "couple", "total_gain"]


@dataclass(frozen=True, eq=False)
class Gain:
    """A gain matrix, and how groups move its cells.

    Attributes:
        matrix: float64, rows are cells of A, columns cells of B, shape ``(cells, cells)``.
        members: by group, outermost first, the cells of each of its units, int64, shape
            ``(size, cells per unit)``; for a group alone, cell ``u`` is unit ``u``.
    """

    matrix: Tensor
    members: Mapping[str, Tensor]

    def reduced(self, group: str) -> Tensor:
        """Return the gain of pairing units of one group with no other group moving, shape ``(size, size)``."""
        own = self.members[group].to(self.matrix.device)
        if own.shape[1] == 1 and len(own) == len(self.matrix):
            return self.matrix
        return sum(
            (self.matrix[own[:, k]][:, own[:, k]] for k in range(own.shape[1])), self.matrix.new_zeros(())
        )

    def index(self, at: Couplings) -> Tensor:
        """Return the cell of B at each cell of A; groups that are not listed do not move."""
        return _moved_cells(len(self.matrix), self.members, at)

    def moved(self, at: Couplings) -> Gain:
        """Return the gains of moving further from where the couplings have taken B's cells."""
        mixing = self._mixing(at)
        if mixing is not None:
            return Gain(self.matrix @ mixing.T, self.members)
        return Gain(self.matrix[:, self.index(at).to(self.matrix.device)], self.members)

    def value(self, at: Couplings) -> float:
        """Return the total gain of couplings."""
        mixing = self._mixing(at)
        if mixing is not None:
            return float((self.matrix * mixing).sum())
        index = self.index(at)
        return float(self.matrix.gather(1, index[:, None].to(self.matrix.device)).sum())

    def _mixing(self, at: Couplings) -> Tensor | None:
        """Return how the coupling of a group alone mixes cells where it is more than a permutation, else ``None``."""
        if len(self.members) != 1 or (name := next(iter(self.members))) not in at:
            return None
        coupling, own = at[name], self.members[name].to(self.matrix.device)
        if isinstance(coupling, Permutation | Tensor):
            return None
        units = coupling.matrix().detach().to(self.matrix.device)
        cells = torch.eye(len(self.matrix), dtype=torch.float64, device=self.matrix.device)
        for k in range(own.shape[1]):
            cells[own[:, k, None], own[None, :, k]] = units
        return cells


def _moved_cells(cells: int, members: Mapping[str, Tensor], at: Couplings) -> Tensor:
    """Return the cell that ends at each place when groups move, outermost first."""
    index = torch.arange(cells)
    for group, own in members.items():
        if group in at:
            step = torch.arange(cells)
            step[own.flatten()] = own[index_of(at[group])].flatten()
            index = index[step]
    return index


def total_gain(gains: Sequence[Gain], at: Couplings) -> float:
    """Return the sum of all gains under permutations."""
    return sum(g.value(at) for g in gains)


def best_change(
    gains: Sequence[Gain],
    cluster: Sequence[str],
    solver: Solver,
    *,
    names: Sequence[str] | None,
    measured: bool,
) -> tuple[dict[str, Coupling], float]:
    """Return the best change of a cluster by its gains, and its matched gain if that is to be ``measured``.

    Args:
        gains: summed.
        cluster: the groups.
        solver: solves one assignment.
        names: match only those of these groups that have a gain (a single pass); ``None`` for the whole cluster.
        measured: whether the gain is wanted.
    """
    wanted = cluster if names is None else [n for n in names if any(n in g.members for g in gains)]
    assert wanted, "gains are about at least one group that is not matched yet"
    found = couple(gains, wanted, solver, keep=names is None)
    return found, total_gain(gains, found) if measured else 0.0


def couple(
    gains: Sequence[Gain], groups: Sequence[str], solver: Solver, *, keep: bool = False
) -> dict[str, Coupling]:
    """Find permutations of groups with a large total gain.

    Args:
        gains: summed. Groups in them that are not listed in ``groups`` stay where they are.
        groups: the groups to permute, outermost first; each has a gain.
        solver: solves one assignment.
        keep: for nested groups, try to improve on the identity too, so that the result is never worse.

    Returns:
        One permutation per group: the optimum where no groups share an axis, otherwise the best fixed point
        found.
    """
    if len(groups) == 1:
        name = groups[0]
        return {name: solver(_summed([g.reduced(name) for g in gains if name in g.members]))}
    local = [part for g in gains for part in _disjoint(_restricted(g, groups))]
    found: dict[str, Coupling] = {}
    for names in _components(local, groups):
        own = [g for g in local if any(n in g.members for n in names)]
        if len(names) == 1:
            found |= couple(own, names, solver)
        else:
            found |= _couple_nest(own, names, solver, keep)
    return {name: found[name] for name in groups}


def _restricted(gain: Gain, groups: Sequence[str]) -> Gain:
    """Return a gain on the CPU in which only some groups move."""
    return Gain(gain.matrix.cpu(), {name: own for name, own in gain.members.items() if name in groups})


def _summed(matrices: Sequence[Tensor]) -> Tensor:
    return matrices[0] if len(matrices) == 1 else torch.stack(list(matrices)).sum(0)


def _disjoint(gain: Gain) -> list[Gain]:
    """Split a gain whose groups lie on different cells, such as segments of one axis, into one for each."""
    if len(gain.members) <= 1:
        return [gain]
    owner: dict[int, tuple[str, ...]] = {}
    for name, own in gain.members.items():
        for cell in own.flatten().tolist():
            owner[cell] = (*owner.get(cell, ()), name)
    # Thousands of cells have the same few owners, and each set of them merges what it merges once.
    parts = _merged([[name] for name in gain.members], dict.fromkeys(owner.values()))
    if len(parts) <= 1:
        return [gain]
    found: list[Gain] = []
    for names in parts:
        cells = torch.cat([gain.members[name].flatten() for name in names]).unique()
        members = {n: torch.searchsorted(cells, own) for n, own in gain.members.items() if n in names}
        found.append(Gain(gain.matrix[cells][:, cells], members))
    return found


def _components(gains: Sequence[Gain], groups: Sequence[str]) -> list[list[str]]:
    """Split groups into those that are tied through common gains."""
    parts = _merged([[name] for name in groups], (tuple(g.members) for g in gains))
    return [[name for name in groups if name in part] for part in parts]


def _merged(parts: list[list[str]], ties: Iterable[Sequence[str]]) -> list[list[str]]:
    """Merge the parts that have names of one tie."""
    for tie in ties:
        touched = [p for p in parts if any(name in tie for name in p)]
        if len(touched) > 1:
            parts = [p for p in parts if p not in touched] + [[name for p in touched for name in p]]
    return parts


def _couple_nest(
    gains: Sequence[Gain], groups: Sequence[str], solver: Solver, keep: bool
) -> dict[str, Coupling]:
    nest = _NestGains(gains, groups[0], groups[1:])
    best = nest.alternate(nest.best_pairs(solver), solver, keep=False)
    if keep:
        other = nest.alternate(Permutation.identity(nest.size), solver, keep=True)
        best = max(best, other, key=lambda found: total_gain(gains, found))
    return best


class _NestGains:
    """An outer group, the groups inside its blocks, and their gains cut into pairs of blocks."""

    def __init__(self, gains: Sequence[Gain], outer: str, inner: Sequence[str]) -> None:
        self.gains, self.outer, self.inner = gains, outer, list(inner)
        self.blocked = [g for g in gains if outer in g.members]
        self.size = len(self.blocked[0].members[outer])
        self.inside = [[_inside(g, outer, i) for i in range(self.size)] for g in self.blocked]
        self.unblocked = [g for g in gains if outer not in g.members]
        self.homes = [self._blocks_of(g) for g in self.unblocked]

    def _blocks_of(self, gain: Gain) -> list[int]:
        """Return the blocks in which a gain without the outer group has members: all blocks where it has none."""
        found = [
            i for i in range(self.size) if any(n in part[i] for part in self.inside for n in gain.members)
        ]
        return found or list(range(self.size))

    def pair(self, i: int, k: int) -> list[Gain]:
        """Return the gains of members when block ``i`` of A is paired with block ``k`` of B."""
        parts: list[Gain] = []
        for gain, inside in zip(self.blocked, self.inside, strict=True):
            own = gain.members[self.outer]
            parts.append(Gain(gain.matrix[own[i]][:, own[k]], inside[i]))
        return parts

    def best_pairs(self, solver: Solver) -> Coupling:
        """Return the permutation of the blocks when every pair of blocks has its best members."""
        gain = torch.zeros(self.size, self.size, dtype=torch.float64)
        for i in range(self.size):
            shared = [
                Gain(g.matrix / len(homes), g.members)
                for g, homes in zip(self.unblocked, self.homes, strict=True)
                if i in homes
            ]
            for k in range(self.size):
                parts = self.pair(i, k) + shared
                here = [n for n in self.inner if any(n in g.members for g in parts)]
                gain[i, k] = total_gain(parts, couple(parts, here, solver) if here else {})
        return solver(gain)

    def alternate(self, blocks: Coupling, solver: Solver, *, keep: bool) -> dict[str, Coupling]:
        """Improve members and blocks in turn until the total gain stops rising."""
        best = self._with_members(blocks, solver, keep)
        value = total_gain(self.gains, best)
        while True:
            proposal = self._with_members(solver(self._block_gain(best)), solver, keep)
            new = total_gain(self.gains, proposal)
            if not new - value > 1e-12 * max(abs(value), abs(new)):
                return best
            best, value = proposal, new

    def _with_members(self, blocks: Coupling, solver: Solver, keep: bool) -> dict[str, Coupling]:
        order = index_of(blocks)
        parts = [part for i in range(self.size) for part in self.pair(i, int(order[i]))]
        return {self.outer: blocks, **couple([*parts, *self.unblocked], self.inner, solver, keep=keep)}

    def _block_gain(self, at: Couplings) -> Tensor:
        """Return the gain of pairing blocks when the members keep their permutations."""
        total = torch.zeros(self.size, self.size, dtype=torch.float64)
        for gain, inside in zip(self.blocked, self.inside, strict=True):
            own = gain.members[self.outer]
            for i in range(self.size):
                members = _moved_cells(own.shape[1], inside[i], at)
                total[i] += gain.matrix[own[i][None, :], own[:, members]].sum(1)
        return total


def _inside(gain: Gain, outer: str, block: int) -> dict[str, Tensor]:
    """Return the other groups' cells within one block, numbered from its first cell."""
    cells = gain.members[outer][block]
    place = {int(cell): k for k, cell in enumerate(cells)}
    found: dict[str, Tensor] = {}
    for name, own in gain.members.items():
        rows = [] if name == outer else [[place[c] for c in row if c in place] for row in own.tolist()]
        if rows and rows[0]:
            found[name] = torch.tensor(rows)
    return found
