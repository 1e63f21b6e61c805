r"""Which units may move differently for every unit of another axis: the dimensions of each head by themselves.

After interpretation the symmetry is a product of symmetric groups, one per atom. An atom ``d`` that sits beside
an atom ``o`` wherever it occurs may often be permuted independently for every unit of ``o`` (a wreath product).
This holds when

1. in every value of the computation each position with a coordinate in ``d`` has exactly one coordinate in
   ``o``, so that ``new[i, j] = old[i, d_i(j)]`` means something; and
2. no operator mixes entries of different units of ``o`` that have the same unit of ``d``: where entries are
   mixed along ``o``, they are mixed along ``d`` together with it; and where they are mixed along ``d``, all
   operands are aligned along ``o``.

Operators that give every entry back with its coordinates, or compute it from entries with the same coordinates,
satisfy the second condition by themselves. One that brings entries to other positions of an axis (a flip, a look-up
by numbers) mixes along it, even though each entry comes from a single one. Whether the units of ``o`` can move plays
no role: dimensions of heads that are pinned (by slopes that differ, say) still move inside each head.

Example:
    Six units are looked at as two blocks ``o`` of three members ``d``: unit 4 has coordinate 1 in both. The sum over
    the members mixes along ``d`` and keeps ``o``, so members move inside each block by themselves:

    >>> import torch, isthmus
    >>> class Net(torch.nn.Module):
    ...     def __init__(self, summed):
    ...         super().__init__()
    ...         self.summed, self.inner = summed, torch.nn.Linear(2, 6)
    ...         self.outer = torch.nn.Linear(2 if summed == 2 else 3, 1)
    ...
    ...     def forward(self, x):
    ...         return self.outer(self.inner(x).tanh().view(-1, 2, 3).square().sum(self.summed))
    >>> for group in isthmus.discover(Net(summed=2).eval(), torch.zeros(1, 2)).groups.values():
    ...     print(group.name, group.within, group.slots[0].index.positions().tolist())
    inner () [[0, 1, 2], [3, 4, 5]]
    inner#2[0] (('inner', 0),) [[0], [1], [2]]
    inner#2[1] (('inner', 1),) [[3], [4], [5]]

    The sum over the blocks mixes units 1 and 4, which have the same coordinate in ``d`` and others in ``o``: the second
    condition fails for ``d`` inside ``o``. It holds the other way round, so blocks move inside each member:

    >>> for group in isthmus.discover(Net(summed=1).eval(), torch.zeros(1, 2)).groups.values():
    ...     print(group.name, group.within, group.slots[0].index.positions().tolist())
    inner#2 () [[0, 3], [1, 4], [2, 5]]
    inner[0] (('inner#2', 0),) [[0], [3]]
    inner[1] (('inner#2', 1),) [[1], [4]]
    inner[2] (('inner#2', 2),) [[2], [5]]
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from isthmus.symmetry._axes import Atom, Expression, Fixed, Product, Sum, Woven, resolve
from isthmus.symmetry._operation import Mixing, OperatorStep, Selection
from isthmus.symmetry._values import Value

__all__ = ["outer_atoms", "used_atoms"]

_Coordinates = dict[Atom, int]
_Selected = dict[Atom, frozenset[Atom]]
"""From an axis that is looked up to the axes of the index tensor that gives its coordinate."""


def used_atoms(steps: Iterable[OperatorStep]) -> set[Atom]:
    """Return the atoms that take part in some computation, not only in views, slices and copies."""
    axes = {id(a): a for step in steps if step.kind != "moves" for v in step.inputs for a in v.axes}
    return {atom for axis in axes.values() for atom in _atoms(axis)}


def outer_atoms(values: Iterable[Value], steps: Iterable[OperatorStep]) -> dict[Atom, tuple[Atom, ...]]:
    """Return, for every free atom that can move independently inside others, these others, outermost first."""
    steps = list(steps)
    allowed: dict[Atom, set[Atom]] = {}
    found = _selected(steps)
    seen: set[tuple[int, ...]] = set()
    for value in values:
        key = tuple(id(a) for a in value.axes)
        if key not in seen:
            seen.add(key)
            _restrict_by_value(value, allowed, found)
    for step in steps:
        onto_itself = (s.moved for s in step.selections if _reads_its_own_axis(s))
        for mixing in (*step.mixings, *onto_itself):
            _restrict_by_mixing(mixing, allowed, found)
    _close(allowed)
    return {d: tuple(sorted(outers, key=lambda o: (len(allowed.get(o, ())), o.serial)))
            for d, outers in allowed.items() if outers and d.pinned is None}  # fmt: skip


def _atoms(e: Expression) -> Iterator[Atom]:
    e = resolve(e)
    if isinstance(e, Atom):
        yield e
    elif not isinstance(e, Fixed):
        for part in e.factors if isinstance(e, Product) else e.parts:
            yield from _atoms(part)


def _covered(e: Expression) -> _Coordinates:
    """Return the atoms in which every position has a coordinate, and how many."""
    e = resolve(e)
    if isinstance(e, Atom):
        return {e: 1}
    if isinstance(e, Fixed):
        return {}
    if isinstance(e, Product):
        return _added(*(_covered(f) for f in e.factors))
    parts = [_covered(p) for p in e.parts]
    return {a: n for a, n in parts[0].items() if all(p.get(a) == n for p in parts[1:])}


def _added(*several: Mapping[Atom, int]) -> _Coordinates:
    total: _Coordinates = {}
    for one in several:
        for atom, n in one.items():
            total[atom] = total.get(atom, 0) + n
    return total


def _walk(e: Expression, around: _Coordinates) -> Iterator[tuple[Atom, _Coordinates]]:
    """Yield every atom of an axis with the other coordinates of its positions."""
    e = resolve(e)
    if isinstance(e, Atom):
        yield e, around
    elif isinstance(e, (Sum, Woven)):
        for part in e.parts:
            yield from _walk(part, around)
    elif isinstance(e, Product):
        covered = [_covered(f) for f in e.factors]
        for k, factor in enumerate(e.factors):
            yield from _walk(factor, _added(around, *(c for j, c in enumerate(covered) if j != k)))


def _selected(steps: Iterable[OperatorStep]) -> _Selected:
    """Return the axes whose coordinate an index tensor gives: the same tensor at the same places, wherever used."""
    given: dict[Atom, set[tuple[int, frozenset[Atom]]]] = {}
    for step in steps:
        for selection in step.selections:
            axis = resolve(selection.pointer.axis)
            places = frozenset(atom for place in selection.places for atom in _atoms(place))
            whole = all(_identified(place) for place in selection.places)
            if isinstance(axis, Atom):
                token = selection.pointer.token if whole and places else -1
                given.setdefault(axis, set()).add((token, places))
    return {
        axis: next(iter(ways))[1] for axis, ways in given.items() if len(ways) == 1 and -1 not in dict(ways)
    }


def _reads_its_own_axis(selection: Selection) -> bool:
    """Return whether an axis was looked up at places of its own: entries of one unit come to stand at another."""
    looked_up = set(_atoms(selection.pointer.axis))
    return any(atom in looked_up for place in selection.places for atom in _atoms(place))


def _identified(e: Expression) -> bool:
    """Return whether every position of an axis is known by its coordinates in atoms."""
    e = resolve(e)
    if isinstance(e, Product):
        return all(_identified(f) for f in e.factors)
    return isinstance(e, Atom)


def _restrict_by_value(value: Value, allowed: dict[Atom, set[Atom]], found: _Selected) -> None:
    covered = [_covered(a) for a in value.axes]
    for k, axis in enumerate(value.axes):
        if isinstance(resolve(axis), Fixed):
            continue
        others = _added(*(c for j, c in enumerate(covered) if j != k))
        for atom, around in _walk(axis, others):
            if atom.pinned is not None:
                continue
            here = {o for o, n in around.items() if n == 1 and o is not atom}
            here |= {o for o, places in found.items() if o not in around and places <= here}
            allowed[atom] = allowed[atom] & here if atom in allowed else here


def _restrict_by_mixing(mixing: Mixing, allowed: dict[Atom, set[Atom]], found: _Selected) -> None:
    places = [_letters(operand) for operand in mixing.operands]
    for place in places:
        for axis, chosen in found.items():
            if axis not in place and all(atom in place for atom in chosen):
                place[axis] = set().union(*(place[atom] for atom in chosen))
    for d in {atom for place in places for atom in place if allowed.get(atom)}:
        if mixing.total:
            allowed[d] = set()
        else:
            allowed[d] = {o for o in allowed[d] if _compatible(o, d, places, mixing.joint)}


def _letters(operand: Iterable[tuple[str, Expression]]) -> dict[Atom, set[str]]:
    found: dict[Atom, set[str]] = {}
    for letter, axis in operand:
        for atom in _atoms(axis):
            found.setdefault(atom, set()).add(letter)
    return found


def _compatible(o: Atom, d: Atom, places: list[dict[Atom, set[str]]], joint: frozenset[str]) -> bool:
    """Return whether one mixing respects permutations of ``d`` that differ between the units of ``o``."""
    aligned: set[frozenset[str]] = set()
    for place in places:
        inner, outer = place.get(d), place.get(o, set())
        if inner is None:
            continue
        if outer & joint and not inner <= joint:
            return False
        if inner & joint:
            aligned.add(frozenset(outer))
    return len(aligned) <= 1 and frozenset() not in aligned


def _close(allowed: dict[Atom, set[Atom]]) -> None:
    """Keep an outer atom only with its own outer atoms, so that nested groups form a hierarchy."""
    changed = True
    while changed:
        changed = False
        for d, outers in allowed.items():
            kept = {o for o in outers if o.pinned is not None or allowed.get(o, set()) <= outers}
            if d in kept or any(d in allowed.get(o, ()) for o in kept):
                kept = {o for o in kept if d not in allowed.get(o, ())}
            if kept != outers:
                allowed[d] = kept
                changed = True
