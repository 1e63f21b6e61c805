"""Inverting and composing couplings of nested groups.

An outer permutation acts first, the inner one at the new place of its outer unit:
``new[i, j] = old[outer[i], inner_i[j]]``. So when outer units move, the inner permutations change owners.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch

from isthmus.couplings import Coupling, Monomial, Permutation
from isthmus.errors import SymmetryError

__all__ = ["nested_composition", "nested_inverse"]


class _SizedGroup(Protocol):
    @property
    def name(self) -> str: ...
    @property
    def size(self) -> int: ...
    @property
    def within(self) -> tuple[tuple[str, int], ...]: ...
    @property
    def family(self) -> str: ...


class _Spec(Protocol):
    @property
    def groups(self) -> Mapping[str, _SizedGroup]: ...


_Origin = dict[tuple[str, int], tuple[str, int]]
"""From an outer unit (group, place) to the outer unit it came from."""


class _Members:
    """Finds the member of a family that belongs to given outer units."""

    def __init__(self, spec: _Spec, *given: Mapping[str, Coupling]) -> None:
        self.groups = spec.groups
        for permutations in given:
            unknown = [n for n in permutations if n not in self.groups]
            if unknown:
                raise SymmetryError(f"no group named {unknown[0]!r}; the spec has {list(self.groups)}.")
        self._by_units = {(g.family, g.within): g.name for g in self.groups.values() if g.within}

    def ordered(self) -> list[_SizedGroup]:
        """Return the groups, outer ones before inner ones."""
        return sorted(self.groups.values(), key=lambda g: len(g.within))

    def member(self, group: _SizedGroup, origin: _Origin) -> str:
        """Return the member of the group's family at the outer units that this group's units came from."""
        if not group.within:
            return group.name
        units = tuple(origin.get(w, w) for w in group.within)
        found = self._by_units.get((group.family, units))
        if found is None:
            raise SymmetryError(
                f"group {group.name!r} is nested in {dict(group.within)}, but the spec has no group of its family "
                f"in {dict(units)}. Restrict a spec to whole families of nested groups."
            )
        return found


def _record(
    origin: _Origin, target: _SizedGroup, source: str, coupling: Coupling | None, spec: _Spec
) -> None:
    """Note where each unit of a group that others are nested in came from."""
    if not any(target.name == outer for group in spec.groups.values() for outer, _ in group.within):
        return
    if not isinstance(coupling, Permutation | Monomial | None):
        raise SymmetryError(
            f"group {target.name!r}: others are nested in its units, so its coupling must keep them apart, found "
            f"{coupling!r}."
        )
    units = torch.arange(target.size) if coupling is None else coupling.index
    for place, unit in enumerate(units.tolist()):
        origin[target.name, place] = (source, unit)


def nested_inverse(spec: _Spec, couplings: Mapping[str, Coupling]) -> dict[str, Coupling]:
    """Return the inverse: group by group, but an inner coupling goes back to where its outer unit came from."""
    members = _Members(spec, couplings)
    origin: _Origin = {}  # in the inverse: from a place of the result to the place it is read from
    inverse: dict[str, Coupling] = {}
    for group in members.ordered():
        source = members.member(group, origin)
        moved = couplings.get(source)
        if moved is not None:
            inverse[group.name] = moved.inverse()
        _record(origin, group, source, inverse.get(group.name), spec)
    return inverse


def nested_composition(
    spec: _Spec, first: Mapping[str, Coupling], second: Mapping[str, Coupling]
) -> dict[str, Coupling]:
    """Return the couplings of moving by ``first`` and then by ``second``."""
    members = _Members(spec, first, second)
    origin: _Origin = {}  # from a place after the second move to the place it had between the two
    composed: dict[str, Coupling] = {}
    for group in members.ordered():
        between = members.member(group, origin)
        one, two = first.get(between), second.get(group.name)
        if one is not None and two is not None:
            composed[group.name] = one.then(two)
        elif one is not None or two is not None:
            composed[group.name] = one if one is not None else two  # pyright: ignore[reportArgumentType]
        _record(origin, group, between, two, spec)
    return composed
