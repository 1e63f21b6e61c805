r"""Both sides of a group: what an objective compares, split by how its tensors answer to a factor on the units.

The gain matrix of a group is the gradient of :math:`\sum \langle a, M b \rangle` through all slots alike, which is all
that permutations and rotations need. Other couplings act as :math:`M` where tensors hold the units (``power`` 1 of the
slot) and as :math:`M^{-\top}` where they read them (``power`` -1), and leave alone what they only reorder (0), so each
slot adds to its own part of :class:`Sides`; the parts add up to the gain matrix again. In the metric of a layer's input
products of units with one another take the metric too: groups act on the outputs, the metric on the inputs.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from isthmus.errors import SymmetryError
from isthmus.matching._grids import Cluster
from isthmus.matching._objectives import InnerProduct, Term, independent
from isthmus.matching._solvers import Sides
from isthmus.matching._sources import read
from isthmus.symmetry import Couplings, Slot

__all__ = ["Compared", "compared_of", "each_compared", "power_of", "sides_of"]

_POWERS = {"holds": 1, "reads": -1, "scales": 0}


def power_of(slot: Slot) -> int | None:
    """Return how a slot answers to a factor on its units: 1 holds, -1 reads, 0 not at all, ``None`` unknown.

    Where discovery did not say (specs written by hand or by earlier versions) the role does. A power beyond one (what
    reads squared units) has a side all the same, and proposals that it makes less than best.
    """
    if slot.power is None:
        return _POWERS.get(slot.role)
    return max(-1, min(1, slot.power))


@dataclass(frozen=True, eq=False)
class Compared:
    """One inner product under couplings: A's tensors and B's as carried so far, with and without the metric.

    Attributes:
        inner_product: what is compared.
        a: A's tensors with the metric.
        own: without it.
        b: B's tensors carried.
        weighted: the same with the metric.
    """

    inner_product: InnerProduct
    a: tuple[Tensor, ...]
    own: tuple[Tensor, ...]
    b: tuple[Tensor, ...]
    weighted: tuple[Tensor, ...]

    @classmethod
    def under(cls, inner_product: InnerProduct, at: Couplings) -> Compared:
        """Return an inner product under couplings."""
        a = tuple(read(x).double() for x in inner_product.a)
        own = a if inner_product.own is None else tuple(read(x).double() for x in inner_product.own)
        b = inner_product.moved(at)
        return cls(inner_product, a, own, b, b if inner_product.metric is None else inner_product.metric(b))

    def slots(self, group: str) -> list[tuple[int, Slot]]:
        """Return the slots of a group that count, each with its tensor's place, in the order of their positions."""
        listed = [(k, slot) for k, slots in enumerate(self.inner_product.counted(group)) for slot in slots]
        return sorted(listed, key=lambda pair: (pair[0], pair[1].axis, pair[1].index.offset))


def each_compared(
    terms: Sequence[Term], at: Couplings, cluster: Cluster, *, all_terms: bool = True
) -> Iterator[Compared]:
    """Yield what the terms of a cluster compare, each once, under couplings: tensors of one at a time are in memory.

    Args:
        terms: of the cluster; those with a scale are approximations that take no part.
        at: couplings of all groups so far.
        cluster: the groups that are matched.
        all_terms: whether what depends on groups not matched yet counts too; if not, only where nothing else is left.
    """
    used = [t for t in terms if t.scale is None]
    if not all_terms:
        known = independent(used, {**at, **dict.fromkeys(cluster, torch.zeros(0))})
        used = known or used
    listed = {id(t.inner_product): t.inner_product for t in used}
    for inner_product in listed.values():
        yield Compared.under(inner_product, at)


def compared_of(
    terms: Sequence[Term], at: Couplings, cluster: Cluster, *, all_terms: bool = True
) -> list[Compared]:
    """Return all that :func:`each_compared` yields, for what is asked of several times."""
    return list(each_compared(terms, at, cluster, all_terms=all_terms))


def sides_of(
    compared: Iterable[Compared], group: str, size: int, other: str | None = None, *, sided: bool = True
) -> Sides:
    """Return the sides of a group, or of one group of A with another of B.

    Args:
        compared: under the current couplings, so what is found from the sides is a change.
        group: whose units of A are paired.
        size: their number.
        other: whose units of B; default: the same group's.
        sided: whether holders and readers must be told apart, which rotations do not ask for.

    Raises:
        SymmetryError: a slot does not say how it answers to a factor, and that is asked for; or the two groups do not
            act on the same tensors alike.
    """
    parts = _PowerSums(size)
    for c in compared:
        slots, theirs = c.slots(group), c.slots(other or group)
        if [(k, s.axis, s.index.size, power_of(s)) for k, s in slots] != [
            (k, s.axis, s.index.size, power_of(s)) for k, s in theirs
        ]:
            raise SymmetryError(
                f"Pairing the units of group {group!r} with those of {other!r}: expected both to act on the same axes "
                "of the same tensors."
            )
        for (k, slot), (_, counterpart) in zip(slots, theirs, strict=True):
            power = power_of(slot)
            if power not in (-1, 0, 1):
                if sided:
                    raise SymmetryError(
                        f"group {group!r}: slot {slot} does not say whether it holds or reads its units, so signs, "
                        "factors and invertible maps cannot be matched through it. Permutations and rotations can."
                    )
                power = 1
            parts.add(power, c, k, slot, counterpart)
    return parts.sides()


class _PowerSums:
    """Adds up the gains and the inner products of slots, by power."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._gains: dict[int, Tensor] = {}
        self._of_a: dict[int, Tensor] = {}
        self._of_b: dict[int, Tensor] = {}

    def add(self, power: int, c: Compared, k: int, slot: Slot, counterpart: Slot) -> None:
        """Add one slot of A with its counterpart of B."""
        a, b = rows_of(c.a[k], slot), rows_of(c.b[k], counterpart)
        own = a if c.own[k] is c.a[k] else rows_of(c.own[k], slot)
        weighted = b if c.weighted[k] is c.b[k] else rows_of(c.weighted[k], counterpart)
        for total, product in ((self._gains, a @ b.T), (self._of_a, a @ own.T), (self._of_b, weighted @ b.T)):
            total[power] = total[power] + product if power in total else product

    def sides(self) -> Sides:
        """Return the sides."""
        device = next((g.device for g in self._gains.values()), torch.device("cpu"))
        nothing = torch.zeros(self._size, self._size, dtype=torch.float64, device=device)
        found = [
            {p: total.get(p, nothing) for p in (1, -1, 0)} for total in (self._gains, self._of_a, self._of_b)
        ]
        gains, of_a, of_b = found
        return Sides(gains[1], gains[-1], gains[0], (of_a[1], of_a[-1]), (of_b[1], of_b[-1]))


def rows_of(tensor: Tensor, slot: Slot) -> Tensor:
    """Return the part of a tensor that a slot acts on, one row for each unit."""
    for axis, where in slot.block:
        tensor = tensor.index_select(axis, where.positions().flatten().to(tensor.device))
    where = slot.index.positions()
    units = tensor.index_select(slot.axis, where.flatten().to(tensor.device)).movedim(slot.axis, 0)
    return units.reshape(len(where), -1)
