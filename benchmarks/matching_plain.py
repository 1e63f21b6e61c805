"""The plain loop of weight matching that :mod:`benchmarks.matching` compares with."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from isthmus.matching._terms import LayeredPair

Permutations = dict[str, Tensor]


class PlainLoop:
    """Weight matching as most scripts do it: everything anew for each group in each sweep, float32 and SciPy."""

    def __init__(self, pair: LayeredPair) -> None:
        layers = pair.layers
        self.structure, self.a, self.b = layers.structure, pair.state_a, pair.state_b
        self.places = {
            group: [
                (name, axis)
                for name in layers.parameters
                for axis, pairs in layers.table.get(name, {}).items()
                if any(g == group for g, _ in pairs)
            ]
            for group in self.structure.sizes
        }
        self.table = layers.table

    def moved(self, name: str, permutations: Mapping[str, Tensor], keep: int) -> Tensor:
        """Return B's tensor with all axes but one relabelled."""
        tensor = self.b[name]
        for axis, pairs in self.table[name].items():
            for group, slot in pairs if axis != keep else ():
                if group in permutations:
                    tensor = tensor.index_select(axis, slot.index.gather_index(permutations[group]))
        return tensor

    def gain(self, group: str, permutations: Mapping[str, Tensor], incoming: bool = False) -> Tensor:
        """Return the gains of a group, float32; rows are units of A, columns those of B in its own order."""
        size = self.structure.sizes[group]
        total = torch.zeros(size, size)
        for name, axis in self.places[group]:
            others = {g for k, pairs in self.table[name].items() if k != axis for g, _ in pairs}
            if incoming and not others <= permutations.keys():
                continue
            a, b = (t.movedim(axis, 0) for t in (self.a[name], self.moved(name, permutations, axis)))
            total += a.reshape(size, -1) @ b.reshape(size, -1).T
        return total

    def single_pass(self) -> Permutations:
        """Return permutations found layer by layer, from what depends on the layers before."""
        found: Permutations = {}
        for group in self.structure.sizes:
            found[group] = solved(self.gain(group, found, incoming=True))
        return found

    def descent(self, start: Permutations | None) -> tuple[Permutations, int]:
        """Return the fixed point of sweeps over all groups, and their number."""
        found = start or {g: torch.arange(n) for g, n in self.structure.sizes.items()}
        sweeps, improved = 0, True
        while improved:
            improved, sweeps = False, sweeps + 1
            for group in self.structure.sizes:
                gain = self.gain(group, found)
                best, rows = solved(gain), torch.arange(len(gain))
                rise = (gain[rows, best].double() - gain[rows, found[group]].double()).sum()
                if float(rise) > 1e-12 * float(gain[rows, best].double().sum().abs()):
                    found, improved = {**found, group: best}, True
        return found, sweeps

    def run(self, start: str) -> tuple[Permutations, int]:
        """Return the result from one of the starts."""
        return self.descent(self.single_pass() if start == "single pass" else None)


def solved(gain: Tensor) -> Tensor:
    """Return the best permutation, by SciPy."""
    return torch.from_numpy(linear_sum_assignment(gain.numpy(), maximize=True)[1])
