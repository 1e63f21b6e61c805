"""From planes that turn together to groups of a spec: by head where they form one, plane by plane elsewhere."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from math import prod
from typing import Any

import torch

from isthmus.errors import SymmetryError
from isthmus.symmetry._acts import Acts
from isthmus.symmetry._overlaps import check_overlaps
from isthmus.symmetry._planes.units import Plane, Units
from isthmus.symmetry._slots import AxisGroup, IndexMap, Planes, Slot
from isthmus.symmetry._spec import SymmetrySpec

__all__ = ["groups_of"]

_HeadBlock = tuple[tuple[int, int], ...]
_Member = tuple[str, int, _HeadBlock, int, int, int]
"""Tensor, axis, block, power, distance of the second unit, position of the first one."""


def groups_of(spec: SymmetrySpec, units: Units, names: Mapping[str, Sequence[str]]) -> dict[str, AxisGroup]:
    """Return the groups of planes of a network.

    Args:
        spec: the groups whose units change places.
        units: with all that is known of them.
        names: all names of each tensor.
    """
    heads: dict[Any, list[tuple[_Member, ...]]] = {}
    for planes, scaled, rows in units.settled():
        members = _members(units, planes)
        if members is not None:
            first = members[0][5]
            pattern = tuple((*m[:5], m[5] - first) for m in members)
            heads.setdefault((rows, scaled, pattern), []).append(members)
    listed: list[AxisGroup] = []
    for (_, scaled, _), alike in heads.items():
        acts = Acts.COMPLEX if scaled else Acts.PLANE_ROTATIONS
        for run, arrangement in _runs(sorted(alike, key=_first)):
            slots = [
                replace(slot, tensor=name)
                for slot in _slots(run, units)
                for name in names.get(slot.tensor, (slot.tensor,))
            ]
            size = slots[0].index.size
            listed.append(AxisGroup("", size, tuple(slots), acts=acts, planes=arrangement))
    return _placed(spec, listed)


def _first(members: Sequence[_Member]) -> int:
    return members[0][5]


def _members(units: Units, planes: Sequence[Plane]) -> tuple[_Member, ...] | None:
    """Return the places of planes, with the first unit before the second; ``None`` where they cannot be written."""
    found: list[_Member] = []
    backwards: set[bool] = set()
    for plane in planes:
        shape, kept = units.shapes[plane.tensor], units.kept[plane.tensor]
        one, two = (_coordinates(u, shape) for u in (plane.first, plane.second))
        differing = [k for k in kept if one[k] != two[k]]
        if len(differing) != 1:
            return None
        axis = differing[0]
        block = tuple((k, one[k]) for k in kept if k != axis)
        backwards.add(two[axis] < one[axis])
        start, gap = min(one[axis], two[axis]), abs(two[axis] - one[axis])
        found.append((plane.tensor, axis, block, -1 if plane.inverse else 1, gap, start))
    if len(backwards) > 1:
        return None
    powers = {m[3] for m in found}
    listed = sorted(found, key=lambda m: (m[0], m[1], m[2], m[5]))
    flip = powers == {-1}  # the inverse transpose of everything is as good
    return tuple((*m[:3], 1 if flip else m[3], *m[4:]) for m in listed)


def _coordinates(number: int, shape: Sequence[int]) -> tuple[int, ...]:
    found: list[int] = []
    for size in reversed(shape):
        number, rest = divmod(number, size)
        found.append(rest)
    return tuple(reversed(found))


def _runs(
    alike: Sequence[tuple[_Member, ...]],
) -> Iterable[tuple[list[tuple[_Member, ...]], Planes]]:
    """Yield planes in runs that fill a range of units, halves apart or side by side, and those left over alone."""
    gaps = {m[4] for members in alike for m in members}
    gap = gaps.pop() if len(gaps) == 1 else 0
    step = 2 if gap == 1 else 1
    run: list[tuple[_Member, ...]] = []
    for members in alike:
        if run and _first(members) != _first(run[-1]) + step:
            yield from _split(run, gap)
            run = []
        run.append(members)
    yield from _split(run, gap)


def _split(
    run: Sequence[tuple[_Member, ...]], gap: int
) -> Iterable[tuple[list[tuple[_Member, ...]], Planes]]:
    if gap == 1 and run:
        yield list(run), "neighbours"
    elif gap == len(run) > 1:
        yield list(run), "halves"
    else:
        for members in run:
            yield [members], "halves"


def _slots(run: Sequence[tuple[_Member, ...]], units: Units) -> list[Slot]:
    """Return the slots of a run of planes; what lies at equal distances on one axis is one slot with copies."""
    size, alike = 2 * len(run), dict[tuple[str, int, _HeadBlock, int, int], list[int]]()
    for tensor, axis, block, power, gap, start in run[0]:
        alike.setdefault((tensor, axis, block, power, gap if len(run) == 1 else 1), []).append(start)
    slots: list[Slot] = []
    for (tensor, axis, block, power, stride), starts in alike.items():
        shape = units.shapes[tensor]
        steps = {b - a for a, b in pairwise(starts)}
        even = len(steps) == 1 and min(steps) >= size * stride
        copies = ((len(starts), steps.pop()),) if even else ()
        where = tuple((k, IndexMap(shape[k], 1, at)) for k, at in block)
        for start in starts[:1] if even else starts:
            index = IndexMap(shape[axis], size, start, stride, copies)
            slots.append(Slot(tensor, axis, index, where, "holds", power))
    return slots


# --- Among the other groups ------------------------------------------------------------------------------------


def _placed(spec: SymmetrySpec, listed: Sequence[AxisGroup]) -> dict[str, AxisGroup]:
    """Name groups, and nest each in the units of other groups that hold all of it."""
    places = _Places(spec)
    families: dict[Any, list[AxisGroup]] = {}
    for group in listed:
        within = places.outer_units(group)
        if within is not None:
            base = min((s.tensor for s in group.slots), key=list(spec.shapes).index).rpartition(".")[0]
            alike = tuple((s.tensor, s.axis, s.index.stride, s.power) for s in group.slots)
            key = base, tuple(name for name, _ in within), group.size, group.acts, group.planes, alike
            families.setdefault(key, []).append(replace(group, within=within))
    found: dict[str, AxisGroup] = {}
    for (base, outer, *_), members in families.items():
        for group in _family(spec, base, outer, members, found):
            found[group.name] = group
    return found


def _family(
    spec: SymmetrySpec,
    base: str,
    outer: Sequence[str],
    members: Sequence[AxisGroup],
    taken: Mapping[str, AxisGroup],
) -> list[AxisGroup]:
    """Return the groups of a family with their names; none where an outer unit lacks one, or positions are taken."""
    stem, k = f"{base}#planes" if base else "planes", 1
    while any(name.startswith(f"{stem}[") for name in taken):
        k += 1
        stem = f"{base}#planes{k}" if base else f"planes{k}"
    units: dict[tuple[tuple[str, int], ...], int] = {}
    named: list[AxisGroup] = []
    for group in members:
        turn = units.get(group.within, 0)
        units[group.within] = turn + 1
        own = [str(unit) for _, unit in group.within] or [str(turn)]
        own += [str(turn)] if group.within and turn else []
        family = f"{stem}[{','.join('*' for _ in group.within)}]" + (f"[{turn}]" if turn else "")
        named.append(replace(group, name=f"{stem}[{','.join(own)}]", family=family if group.within else ""))
    wanted = prod(spec.groups[name].size for name in outer)
    if outer and (len(units) != wanted or len(set(units.values())) > 1):
        return []
    try:
        check_overlaps({**spec.groups, **taken, **{group.name: group for group in named}})
    except SymmetryError:  # where they would move what others move, they are left out
        return []
    return named


class _Places:
    """Finds which units of other groups the positions of slots belong to."""

    def __init__(self, spec: SymmetrySpec) -> None:
        self._spec = spec
        self._by_tensor = spec.slots_by_tensor()

    def outer_units(self, group: AxisGroup) -> tuple[tuple[str, int], ...] | None:
        """Return the groups that hold all of a group in one unit, outermost first; ``None`` where one cuts it."""
        held: dict[str, set[int]] = {}
        met: dict[str, int] = {}
        for slot in group.slots:
            for name, units in self._units_at(slot).items():
                if units is None:
                    return None
                met[name] = met.get(name, 0) + 1
                held.setdefault(name, set()).update(units)
        whole = [name for name, number in met.items() if number == len(group.slots) and len(held[name]) == 1]
        whole = [name for name in whole if set(dict(self._spec.groups[name].within)) <= set(whole)]
        whole.sort(key=lambda name: len(self._spec.groups[name].within))
        found = tuple((name, next(iter(held[name]))) for name in whole)
        consistent = all(w in found for name in whole for w in self._spec.groups[name].within)
        return found if consistent else ()

    def _units_at(self, slot: Slot) -> dict[str, set[int] | None]:
        """Return, by group, the units that the copies of a slot belong to; ``None`` where one copy has several."""
        found: dict[str, set[int] | None] = {}
        block = dict(slot.block)
        for axis, others in self._by_tensor.get(slot.tensor, {}).items():
            for name, other in others:
                where = slot.index if axis == slot.axis else block.get(axis)
                if where is None or not _meet(other, slot):
                    continue
                unit = torch.full((where.length,), -1)
                positions = other.index.positions()
                unit[positions.reshape(-1)] = torch.arange(other.index.size).repeat_interleave(
                    positions.shape[1] if positions.ndim > 1 else 1
                )
                there = unit[where.positions()]
                if not bool((there >= 0).any()):
                    continue
                same = bool((there == there[:1]).all()) and bool((there >= 0).all())
                own = set(there[0].tolist()) if same else None
                before = found.get(name, set())
                found[name] = None if own is None or before is None else before | own
        return found


def _meet(other: Slot, slot: Slot) -> bool:
    """Return whether a slot's block leaves another one any of its entries."""
    own = {**dict(slot.block), slot.axis: slot.index}
    for axis, index in other.block:
        if axis in own and not set(index.positions().flatten().tolist()) & set(
            own[axis].positions().flatten().tolist()
        ):
            return False
    return True
