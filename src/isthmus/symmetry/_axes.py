r"""The algebra of axis labels: how expressions are refined, joined and pinned.

Operations *refine* atoms (into products, sums or woven segments), *join* them (union-find through
:attr:`Atom.forward`) or *pin* them; a pinned atom stays an atom, because it matters which axes count the same units
even when these cannot move. Each of the three replaces the symmetric group of an atom by a subgroup, so every step
is sound: ignorance can only lose symmetry, never invent it.

The expressions themselves live in ``_expressions``, their positions in ``_placements``; both are passed on here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from isthmus.symmetry._expressions import (
    ONE,
    SINGLE,
    Atom,
    Expression,
    Fixed,
    Pin,
    Product,
    Sum,
    Woven,
    are_copies,
    atoms_of,
    equal_copies,
    fresh,
    immovable,
    pin,
    product_of,
    resolve,
    same,
    stronger,
    woven,
)
from isthmus.symmetry._placements import Occurrence, Placement, merged_copies, occurrences, placements

__all__ = [
    "ONE",
    "Atom",
    "Expression",
    "Fixed",
    "Occurrence",
    "Pin",
    "Placement",
    "Product",
    "Sum",
    "UnsplittableError",
    "Woven",
    "are_copies",
    "atoms_of",
    "cut",
    "equal_copies",
    "fresh",
    "immovable",
    "merged_copies",
    "occurrences",
    "phases",
    "pin",
    "placements",
    "product_of",
    "resolve",
    "same",
    "split_leading",
    "split_trailing",
    "unify",
    "weave",
    "woven",
]

_READ_APART = Pin("neighbouring positions are read apart")


class UnsplittableError(Exception):
    """An axis cannot be divided as asked; the caller pins it (never shown to users)."""


def _refine(atom: Atom, form: Expression) -> None:
    """Replace an atom by a finer or joined form, which inherits its pin and loses what the atom is not."""
    if not atom.copies:
        for part in atoms_of(form):
            part.copies = False
    atom.forward = form
    if atom.pinned is not None:
        pin(form, atom.pinned)


def _all_fixed(e: Expression) -> Fixed | None:
    """Return an expression in which nothing moves as one fixed part, or ``None`` when something does."""
    if any(atom.pinned is None for atom in atoms_of(e)):
        return None
    whys = [found[0].why for found in occurrences(e) if isinstance(found, tuple)]
    why = next((w for w in whys if w != SINGLE), SINGLE)
    return Fixed(e.size, why)


def split_trailing(e: Expression, size: int) -> tuple[Expression, Expression]:
    """Write ``e`` as a product whose fastest factor has ``size`` positions; refines atoms where needed.

    Raises:
        UnsplittableError: the structure of ``e`` does not allow it (atoms met on the way may stay refined).
    """
    e = resolve(e)
    if size == 1:
        return e, ONE
    if size == e.size:
        return ONE, e
    if size == 0 or e.size % size:
        raise UnsplittableError
    try:
        return _split_by_structure(e, size)
    except UnsplittableError:
        fixed = _all_fixed(e)
        if fixed is None:
            raise
        return Fixed(e.size // size, fixed.why), Fixed(size, fixed.why)


def _split_by_structure(e: Expression, size: int) -> tuple[Expression, Expression]:
    if isinstance(e, Fixed):
        return Fixed(e.size // size, e.why), Fixed(size, e.why)
    if isinstance(e, Atom):
        new = equal_copies if e.copies else fresh
        lead, trail = new(e.size // size), new(size)
        _refine(e, Product((lead, trail)))
        return lead, trail
    if isinstance(e, Product):
        return _split_product(e, size)
    if isinstance(e, Woven):
        return _split_woven(e, size)
    pairs = [split_trailing(part, size) for part in e.parts]
    for _, trail in pairs[1:]:
        unify(pairs[0][1], trail)
    return resolve(Sum(tuple(lead for lead, _ in pairs))), resolve(pairs[0][1])


def _split_product(e: Product, size: int) -> tuple[Expression, Expression]:
    rest, last = e.factors[:-1], e.factors[-1]
    try:
        if last.size >= size:
            lead, trail = split_trailing(last, size)
            return resolve(Product((*rest, lead))), trail
        if size % last.size:
            raise UnsplittableError
        lead, trail = split_trailing(Product(rest), size // last.size)
        return lead, resolve(Product((trail, last)))
    except UnsplittableError:
        one, two = _all_fixed(rest[-1]), _all_fixed(last)
        if one is None or two is None:
            raise
        fused = Fixed(one.size * two.size, stronger(one, two))
        return split_trailing(Product((*rest[:-1], fused)), size)


def _split_woven(e: Woven, size: int) -> tuple[Expression, Expression]:
    if not e.complete:
        raise UnsplittableError
    if size % e.period == 0:
        pairs = [split_trailing(lead, size // e.period) for lead, _ in e.strands]
        for lead, _ in pairs[1:]:
            unify(pairs[0][0], lead)
        inner = tuple((turn, trail) for (_, turn), (_, trail) in zip(pairs, e.strands, strict=True))
        return resolve(pairs[0][0]), resolve(Woven(inner))
    runs = _runs(e, size)
    if runs is None:
        for lead, _ in e.strands[1:]:
            unify(e.strands[0][0], lead)
        period = resolve(Sum(tuple(trail for _, trail in e.strands)))
        return split_trailing(Product((e.strands[0][0], period)), size)
    leads: list[tuple[Expression, Expression]] = []
    trails: list[Expression] = []
    for run in runs:
        for lead, _ in run[1:]:
            unify(run[0][0], lead)
        block, trail = split_trailing(Sum(tuple(t for _, t in run)), size)
        leads.append((run[0][0], block))
        trails.append(trail)
    for trail in trails[1:]:
        unify(trails[0], trail)
    return resolve(Woven(tuple(leads))), resolve(trails[0])


def _runs(e: Woven, size: int) -> list[list[tuple[Expression, Expression]]] | None:
    """Return neighbouring strands in runs of whole blocks of ``size``, or ``None`` if strands do not fit."""
    runs: list[list[tuple[Expression, Expression]]] = [[]]
    filled = 0
    for lead, trail in e.strands:
        if filled and filled % size == 0:
            runs.append([])
            filled = 0
        if filled + trail.size > size and (filled or trail.size % size):
            return None
        runs[-1].append((lead, trail))
        filled += trail.size
    return runs if filled % size == 0 else None


def split_leading(e: Expression, size: int) -> tuple[Expression, Expression]:
    """Write ``e`` as a product whose slowest factor has ``size`` positions (see :func:`split_trailing`)."""
    if size == 0 or e.size % size:
        raise UnsplittableError
    return split_trailing(e, e.size // size)


def cut(e: Expression, length: int) -> tuple[Expression, Expression]:
    """Write ``e`` as two segments, the first with ``length`` positions (``0 < length < e.size``).

    Raises:
        UnsplittableError: the cut runs through the inside of a product.
    """
    e = resolve(e)
    try:
        return _cut_by_structure(e, length)
    except UnsplittableError:
        fixed = _all_fixed(e)
        if fixed is None:
            raise
        return Fixed(length, fixed.why), Fixed(e.size - length, fixed.why)


def _cut_by_structure(e: Expression, length: int) -> tuple[Expression, Expression]:
    if isinstance(e, Fixed):
        return Fixed(length, e.why), Fixed(e.size - length, e.why)
    if isinstance(e, Atom):
        new = equal_copies if e.copies else fresh
        head, tail = new(length), new(e.size - length)
        _refine(e, Sum((head, tail)))
        return head, tail
    if isinstance(e, Product):
        first, rest = e.factors[0], e.factors[1:]
        inner = math.prod(f.size for f in rest)
        if length % inner:
            raise UnsplittableError
        head, tail = cut(first, length // inner)
        return resolve(Product((head, *rest))), resolve(Product((tail, *rest)))
    return _cut_woven(e, length) if isinstance(e, Woven) else _cut_sum(e, length)


def _cut_woven(e: Woven, length: int) -> tuple[Expression, Expression]:
    """Cut where a period ends, or inside one: then the second piece begins with the segments that remain."""
    turns, rest = divmod(length, e.period)
    heads: list[tuple[Expression, Expression]] = []
    before: list[tuple[Expression, Expression]] = []
    after: list[tuple[Expression, Expression]] = []
    place = 0
    for lead, trail in e.strands:
        done, left = (trail, None) if place + trail.size <= rest else (None, trail)
        if place < rest < place + trail.size:
            done, left = cut(trail, rest - place)
        for part, units, tails in ((done, turns + 1, before), (left, turns, after)):
            if part is not None:
                head, tail = _cut_anywhere(lead, units)
                heads.append((head, part))
                tails.append((tail, part))
        place += trail.size
    return resolve(Woven(tuple(heads))), resolve(Woven((*after, *before)))


def _cut_anywhere(e: Expression, length: int) -> tuple[Expression, Expression]:
    """Cut an axis, perhaps at one of its ends."""
    if length == 0:
        return Fixed(0, SINGLE), e
    return (e, Fixed(0, SINGLE)) if length == e.size else cut(e, length)


def _cut_sum(e: Sum, length: int) -> tuple[Expression, Expression]:
    done = 0
    for k, part in enumerate(e.parts):
        if done + part.size == length:
            return resolve(Sum(e.parts[: k + 1])), resolve(Sum(e.parts[k + 1 :]))
        if done + part.size > length:
            head, tail = cut(part, length - done)
            return resolve(Sum((*e.parts[:k], head))), resolve(Sum((tail, *e.parts[k + 1 :])))
        done += part.size
    raise UnsplittableError


def unify(x: Expression, y: Expression) -> None:
    """Demand that two axes of equal length move together, position by position.

    Where their structures cannot be brought to a common refinement, both are pinned.
    """
    x, y = resolve(x), resolve(y)
    if x is y or x.size == 1:
        return
    if x.size != y.size:
        raise ValueError(f"cannot unify axes of {x.size} and {y.size} positions")
    if isinstance(x, Fixed):
        pin(y, x.why)
    elif isinstance(y, Fixed):
        pin(x, y.why)
    elif isinstance(x, Atom):
        _forward(x, y)
    elif isinstance(y, Atom):
        _forward(y, x)
    else:
        try:
            if isinstance(x, Product) and isinstance(y, Product):
                _unify_products(x, y)
            elif not isinstance(x, Sum) and not isinstance(y, Sum):
                _unify_woven(x, y)
            else:
                _unify_sums(x, y)
        except UnsplittableError:
            fixed = _all_fixed(x) or _all_fixed(y)
            why = Pin("two incompatible groupings of one axis meet here") if fixed is None else fixed.why
            pin(x, why)
            pin(y, why)


def _forward(atom: Atom, target: Expression) -> None:
    if any(a is atom for a in atoms_of(target)):
        pin(target, Pin("an axis is required to move like a part of itself"))
    else:
        _refine(atom, target)


def _unify_products(x: Product, y: Product) -> None:
    last_x, last_y = x.factors[-1], y.factors[-1]
    size = min(last_x.size, last_y.size)
    lead_x, trail_x = split_trailing(x, size)
    lead_y, trail_y = split_trailing(y, size)
    unify(trail_x, trail_y)
    unify(lead_x, lead_y)


def _unify_sums(x: Expression, y: Expression) -> None:
    first = min(_first_length(x), _first_length(y))
    head_x, tail_x = cut(x, first)
    head_y, tail_y = cut(y, first)
    unify(head_x, head_y)
    unify(tail_x, tail_y)


def _first_length(e: Expression) -> int:
    return e.parts[0].size if isinstance(e, Sum) else e.size


def _unify_woven(x: Product | Woven, y: Product | Woven) -> None:
    """Join two axes at the period after which both repeat, strand by strand."""
    periods = [e.period for e in (x, y) if isinstance(e, Woven)]
    period = math.lcm(*periods)
    one, two = _strands(x, period), _strands(y, period)
    while one:
        (lead_x, trail_x), (lead_y, trail_y) = one.pop(0), two.pop(0)
        size = min(trail_x.size, trail_y.size)
        for lead, trail, rest in ((lead_x, trail_x, one), (lead_y, trail_y, two)):
            if trail.size > size:
                rest.insert(0, (lead, cut(trail, size)[1]))
        unify(lead_x, lead_y)
        unify(*(t if t.size == size else cut(t, size)[0] for t in (trail_x, trail_y)))


def _strands(e: Product | Woven, period: int) -> list[tuple[Expression, Expression]]:
    """Write an axis as strands of a given period, a multiple of its own."""
    if isinstance(e, Product):
        return [split_trailing(e, period)]
    turns = period // e.period
    if turns > 1 and not e.complete:
        raise UnsplittableError
    columns = [(phases(lead, turns), trail) for lead, trail in e.strands]
    return [(column[k], trail) for k in range(turns) for column, trail in columns]


def phases(e: Expression, number: int) -> list[Expression]:
    """Write ``e`` as ``number`` woven axes: the ``k``-th holds the positions ``k``, ``k + number``, and so on.

    Raises:
        UnsplittableError: the structure of ``e`` does not allow it (atoms met on the way may stay refined).
    """
    e = resolve(e)
    if number == 1:
        return [e]
    try:
        return _phases_by_structure(e, number)
    except UnsplittableError:
        fixed = _all_fixed(e)
        if fixed is None:
            raise
        return _phases_by_structure(fixed, number)


def _phases_by_structure(e: Expression, number: int) -> list[Expression]:
    sizes = [(e.size - k + number - 1) // number for k in range(number)]
    if isinstance(e, Fixed):
        return [Fixed(size, e.why) for size in sizes]
    if isinstance(e, Atom):
        new = equal_copies if e.copies else fresh
        apart = [new(size) if size else Fixed(0, SINGLE) for size in sizes]
        _refine(e, woven(apart))
        return [resolve(a) for a in apart]
    if isinstance(e, Sum):
        return _phases_of_sum(e.parts, number)
    if e.size == 1:
        return _phases_by_structure(Fixed(1, SINGLE), number)
    strands, rest = e if isinstance(e, Woven) else _as_woven(e), e.size % number
    if not rest or strands.period % number == 0:
        return _phases_of_strands(strands, number)
    main, left = cut(e, e.size - rest) if e.size > rest else (Fixed(0, SINGLE), e)
    single: list[Expression] = []
    while left.size:
        head, left = _cut_anywhere(left, 1)
        single.append(head)
    return _phases_of_sum((main, *single), number)


def _as_woven(e: Product) -> Woven:
    return Woven(((Product(e.factors[:-1]), e.factors[-1]),))


def _phases_of_sum(parts: Sequence[Expression], number: int) -> list[Expression]:
    """Write segments as woven axes: each goes on with the phase at which the one before it stopped."""
    found: list[list[Expression]] = [[] for _ in range(number)]
    place = 0
    for part in parts:
        for k, phase in enumerate(phases(part, number)):
            found[(place + k) % number].append(phase)
        place += part.size
    return [resolve(Sum(tuple(several))) for several in found]


def _phases_of_strands(e: Woven, number: int) -> list[Expression]:
    period = e.period
    if not e.complete and period % number and e.size % number == 0:
        raise UnsplittableError
    if all(trail.size % number == 0 for _, trail in e.strands):
        inner = [(lead, phases(trail, number)) for lead, trail in e.strands]
        return [resolve(Woven(tuple((lead, trail[k]) for lead, trail in inner))) for k in range(number)]
    if period % number and number % period:
        common = math.lcm(period, number)
        if e.size % common:
            raise UnsplittableError
        finer = phases(e, common)
        return [woven(finer[k::number]) for k in range(number)]
    for _, trail in e.strands:
        pin(trail, _READ_APART)
    repeats = max(number // period, 1)
    each = [(phases(lead, repeats), trail.size) for lead, trail in e.strands]
    leads = [column[k] for k in range(repeats) for column, length in each for _ in range(length)]
    return [woven(leads[k::number]) for k in range(number)]


def weave(e: Expression, turns: int, blocks: Sequence[int]) -> list[tuple[Expression, Expression]]:
    """Write ``e`` as strands of given blocks: ``turns`` periods, each with one block of every strand.

    Raises:
        UnsplittableError: the structure of ``e`` does not allow it (atoms met on the way may stay refined).
    """
    e = resolve(e)
    if isinstance(e, Atom):
        new = equal_copies if e.copies else fresh
        strands = [(new(turns), new(block)) for block in blocks]
        _refine(e, resolve(Woven(tuple(strands))))
        return strands
    if all(block == 1 for block in blocks):
        return [(phase, ONE) for phase in phases(e, len(blocks))]
    lead, rest = split_trailing(e, sum(blocks))
    strands = []
    for block in blocks:
        trail, rest = cut(rest, block) if block < rest.size else (rest, ONE)
        strands.append((lead, trail))
    return strands
