"""Inverting and composing permutations of nested groups.

An outer permutation acts first, the inner one at the new place of its outer unit:
``new[i, j] = old[outer[i], inner_i[j]]``. So when outer units move, the inner permutations change owners.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

from isthmus.couplings import invert_permutation
from isthmus.errors import SymmetryError

__all__ = ["nested_composition", "nested_inverse"]


class _Group(Protocol):
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
    def groups(self) -> Mapping[str, _Group]: ...


_Origin = dict[tuple[str, int], tuple[str, int]]
"""From an outer unit (group, place) to the outer unit it came from."""


class _Members:
    """Finds the member of a family that belongs to given outer units."""

    def __init__(self, spec: _Spec, *given: Mapping[str, Tensor]) -> None:
        self.groups = spec.groups
        for permutations in given:
            unknown = [n for n in permutations if n not in self.groups]
            if unknown:
                raise SymmetryError(f"no group named {unknown[0]!r}; the spec has {list(self.groups)}.")
        self._by_units = {(g.family, g.within): g.name for g in self.groups.values() if g.within}

    def ordered(self) -> list[_Group]:
        """Return the groups, outer ones before inner ones."""
        return sorted(self.groups.values(), key=lambda g: len(g.within))

    def member(self, group: _Group, origin: _Origin) -> str:
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


def _record(origin: _Origin, target: str, source: str, permutation: Tensor) -> None:
    for place, unit in enumerate(permutation.tolist()):
        origin[target, place] = (source, unit)


def nested_inverse(spec: _Spec, permutations: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the inverse: group by group, but an inner permutation goes back to where its outer unit came from."""
    members = _Members(spec, permutations)
    origin: _Origin = {}  # in the inverse: from a place of the result to the place it is read from
    inverse: dict[str, Tensor] = {}
    for group in members.ordered():
        source = members.member(group, origin)
        moved = permutations.get(source)
        if moved is not None:
            inverse[group.name] = invert_permutation(moved)
        backwards = torch.arange(group.size) if moved is None else inverse[group.name]
        _record(origin, group.name, source, backwards.cpu())
    return inverse


def nested_composition(
    spec: _Spec, first: Mapping[str, Tensor], second: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Return the permutations of moving by ``first`` and then by ``second``."""
    members = _Members(spec, first, second)
    origin: _Origin = {}  # from a place after the second move to the place it had between the two
    composed: dict[str, Tensor] = {}
    for group in members.ordered():
        between = members.member(group, origin)
        one, two = first.get(between), second.get(group.name)
        if one is not None or two is not None:
            size = torch.arange(group.size)
            one, two = (size if one is None else one), (size if two is None else two)
            composed[group.name] = one[two]
        step = second.get(group.name)
        _record(origin, group.name, between, torch.arange(group.size) if step is None else step.cpu())
    return composed
