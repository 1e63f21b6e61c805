"""The class of every group: the largest one that all operators which touch its units allow."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import fx

from isthmus.symmetry._acts import Acts
from isthmus.symmetry._axes import Atom
from isthmus.symmetry._demands import Cause, Demands, Settled
from isthmus.symmetry._grading import RULES, Grading
from isthmus.symmetry._slots import AxisGroup, Limit, Role, Slot
from isthmus.symmetry._spec import SymmetrySpec
from isthmus.symmetry._spots import Place, Spot, between
from isthmus.symmetry._trace import Trace

__all__ = ["with_acts"]


def with_acts(
    spec: SymmetrySpec,
    traced: Trace,
    values: Mapping[fx.Node, Any],
    outer: Iterable[Atom] = (),
    *,
    ones: Iterable[str] = (),
    zeros: Iterable[str] = (),
) -> SymmetrySpec:
    """Return a spec whose groups say what may act on them, and whose slots say with which power.

    Args:
        spec: as discovered, with roles.
        traced: the network.
        values: labels of all nodes of its graphs.
        outer: atoms whose units have units of their own, such as heads.
        ones: tensors that hold nothing but ones, such as gains after folding.
        zeros: tensors that hold nothing but zeros.
    """
    ones, zeros = frozenset(ones), frozenset(zeros)
    grading = Grading(RULES, ones, zeros)
    for way in (traced, *traced.others):
        grading.run(way, values)
    for atom in outer:
        grading.of_atom(atom).outer = True
    found = _Classes(spec, grading, traced)
    groups = {name: found.classified(group) for name, group in spec.groups.items()}
    return replace(spec, groups=groups, ones=tuple(sorted(ones)), zeros=tuple(sorted(zeros)))


@dataclass(frozen=True)
class _Verdict:
    settled: Settled
    limits: tuple[Limit, ...]


class _Classes:
    """Puts the verdicts on atoms into the groups."""

    def __init__(self, spec: SymmetrySpec, grading: Grading, traced: Trace) -> None:
        self._grading, self._traced = grading, traced
        self._roles: dict[int, Role] = {}
        self._places = {
            (name, k): self._unknowns(group, slot)
            for name, group in spec.groups.items()
            for k, slot in enumerate(group.slots)
        }
        for name, group in spec.groups.items():
            for k, slot in enumerate(group.slots):
                for _, unknown in self._places[name, k]:
                    self._roles.setdefault(unknown, slot.role)
        self._verdicts: dict[Atom, _Verdict] = {}

    def classified(self, group: AxisGroup) -> AxisGroup:
        """Return a group with its class, the limits to it, and the powers of its slots."""
        places = [self._places[group.name, k] for k in range(len(group.slots))]
        atoms = {spot.atom for place in places for spot, _ in place}
        if len(atoms) != 1 or not all(places):
            return group
        verdict = self._verdict(next(iter(atoms)))
        acts = verdict.settled.acts
        if acts is Acts.PERMUTATION:
            return replace(group, limits=verdict.limits)
        powers = [{verdict.settled.powers[u] for _, u in place} for place in places]
        if any(len(several) > 1 for several in powers):
            return group
        slots = [
            replace(slot, power=several.pop())
            for slot, several in zip(group.slots, powers, strict=True)
            if not (acts.mixes and self._is_folded(slot))
        ]
        return replace(group, acts=acts, limits=verdict.limits, slots=tuple(slots))

    def _is_folded(self, slot: Slot) -> bool:
        name = self._traced.first_name(slot.tensor)
        return name in self._grading.ones or name in self._grading.zeros

    def _unknowns(self, group: AxisGroup, slot: Slot) -> list[tuple[Spot, int]]:
        """Return the spots that a slot stands for, with their unknowns: several where segments were joined."""
        known = self._grading.unknowns.get(self._traced.first_name(slot.tensor), [])
        spots = [spot for spot, _ in known if spot.axis == slot.axis and spot.atom.size == group.size]
        if not spots:
            return []
        one, two = _ends(slot, spots[0].rank)
        found = [spots[k] for atom in {s.atom for s in spots} for k in between(spots, atom, (one, two))]
        blocked = {axis for axis, _ in slot.block}
        alike = [
            spot
            for spot in spots
            if any(
                spot.atom is own.atom
                and (spot.placement.offset, spot.placement.stride)
                == (own.placement.offset, own.placement.stride)
                and (
                    spot is own or (spot.segment is not None and spot.segment[0] not in (*blocked, slot.axis))
                )
                for own in found
            )
        ]
        return [(spot, unknown) for spot, unknown in known if any(spot is own for own in alike)]

    def _verdict(self, atom: Atom) -> _Verdict:
        if atom not in self._verdicts:
            demands = self._grading.of_atom(atom)
            settled = demands.settle(self._roles)
            limits = () if demands.outer else self._limits(demands, settled.acts)
            self._verdicts[atom] = _Verdict(settled, limits)
        return self._verdicts[atom]

    def _limits(self, demands: Demands, acts: Acts) -> tuple[Limit, ...]:
        """Return what would act on the units, were it not for one operator."""
        by_operator: dict[str, list[Cause]] = {}
        for cause in demands.limiting():
            by_operator.setdefault(cause.operator, []).append(cause)
        found: list[Limit] = []
        for operator, causes in by_operator.items():
            without = demands.settle(self._roles, operator).acts
            if without is not acts and without.contains(acts):
                found.append(Limit(without, operator, tuple(sorted({c.module for c in causes}))))
        return tuple(found)


def _ends(slot: Slot, rank: int) -> tuple[Place, Place]:
    """Return where units 0 and 1 of a slot are in its tensor."""
    found: list[Place] = []
    for unit in (0, 1):
        at = [0] * rank
        at[slot.axis] = slot.index.offset + unit * slot.index.stride
        for axis, index in slot.block:
            at[axis] = index.offset
        found.append(tuple(at))
    return found[0], found[1]
