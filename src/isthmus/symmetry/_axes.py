r"""The algebra of axis labels: what an axis is made of, and which parts of it move together.

Every tensor axis carries an expression:

* :class:`Atom`: ``size`` units that may be permuted freely among themselves;
* :class:`Fixed`: positions that cannot move, with the reason;
* :class:`Product`: a row-major product of factors (an axis of ``channels × height × width`` after a flatten);
* :class:`Sum`: segments one after the other (a concatenation).

Operations *refine* atoms (into products or sums), *join* them (union-find through :attr:`Atom.forward`) or
*pin* them; a pinned atom stays an atom, because it matters which axes count the same units even when these
cannot move. Each of the three replaces the symmetric group of an atom by a subgroup, so every step is sound:
ignorance can only lose symmetry, never invent it. Expressions are immutable but for the forward pointer and the
pin of atoms; always look at them through :func:`resolve`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import count

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
    "are_copies",
    "atoms_of",
    "cut",
    "equal_copies",
    "fresh",
    "immovable",
    "merged_copies",
    "occurrences",
    "pin",
    "placements",
    "resolve",
    "split_leading",
    "split_trailing",
    "unify",
]

_serial = count()


class UnsplittableError(Exception):
    """An axis cannot be divided as asked; the caller pins it (never shown to users)."""


@dataclass(frozen=True)
class Pin:
    """Why positions cannot move: what happened, in which operator, in which module of the model."""

    reason: str
    operator: str = ""
    module: str = ""


@dataclass(eq=False)
class Atom:
    """``size`` units that can be permuted among themselves, until :attr:`forward` or :attr:`pinned` says otherwise.

    Attributes:
        size: number of units.
        forward: the finer or joined form that replaced the atom.
        pinned: why the units cannot move.
        copies: whether all entries along the axis are equal (an expanded axis, zeros): such an axis follows any
            other one it meets in an elementwise operation, without being tied to it.
    """

    size: int
    forward: Expression | None = None
    pinned: Pin | None = None
    copies: bool = False
    serial: int = field(default_factory=lambda: next(_serial))


@dataclass(frozen=True, eq=False)
class Fixed:
    """``size`` positions that cannot move."""

    size: int
    why: Pin


@dataclass(frozen=True, eq=False)
class Product:
    """Row-major product: the last factor varies fastest. The empty product has size 1."""

    factors: tuple[Expression, ...]

    @property
    def size(self) -> int:
        """Number of positions."""
        return math.prod(f.size for f in self.factors)


@dataclass(frozen=True, eq=False)
class Sum:
    """Segments one after the other."""

    parts: tuple[Expression, ...]

    @property
    def size(self) -> int:
        """Number of positions."""
        return sum(p.size for p in self.parts)


Expression = Atom | Fixed | Product | Sum

ONE = Product(())
_SINGLE = Pin("a single unit has nothing to be exchanged with")


def fresh(size: int) -> Expression:
    """Return a new atom; an axis of length 1 has nothing to permute and is the empty product."""
    return ONE if size == 1 else Atom(size)


def equal_copies(size: int) -> Expression:
    """Return a new axis along which all entries are equal."""
    return ONE if size == 1 else Atom(size, copies=True)


def are_copies(e: Expression) -> bool:
    """Return whether all entries along an axis are known to be equal."""
    e = resolve(e)
    if isinstance(e, Product):
        return all(are_copies(f) for f in e.factors)
    return isinstance(e, Atom) and e.copies


def immovable(size: int, why: Pin) -> Expression:
    """Return a new axis whose positions cannot move, but are known again wherever they are met."""
    return ONE if size == 1 else Atom(size, pinned=why) if size else Fixed(0, why)


def resolve(e: Expression) -> Expression:
    """Return the current form: forwards followed, nesting flattened, neighbouring fixed parts fused."""
    if isinstance(e, Atom):
        if e.forward is None:
            return e
        e.forward = resolve(e.forward)
        return e.forward
    if isinstance(e, Product):
        return _normal_product(e)
    if isinstance(e, Sum):
        return _normal_sum(e)
    return e


def _normal_product(e: Product) -> Expression:
    factors: list[Expression] = []
    for factor in e.factors:
        resolved = resolve(factor)
        for f in resolved.factors if isinstance(resolved, Product) else (resolved,):
            last = factors[-1] if factors else None
            if f.size == 1:
                continue
            if isinstance(f, Fixed) and isinstance(last, Fixed) and _fusible(last, f):
                factors[-1] = Fixed(last.size * f.size, _stronger(last, f))
            else:
                factors.append(f)
    return factors[0] if len(factors) == 1 else Product(tuple(factors)) if factors else ONE


def _fusible(x: Fixed, y: Fixed) -> bool:
    return x.why == y.why or _SINGLE in (x.why, y.why)


def _stronger(x: Fixed, y: Fixed) -> Pin:
    """Return the reason to keep when two fixed parts fuse: a single unit explains nothing."""
    return y.why if x.why == _SINGLE else x.why


def _all_fixed(e: Expression) -> Fixed | None:
    """Return an expression in which nothing moves as one fixed part, or ``None`` when something does."""
    if any(atom.pinned is None for atom in atoms_of(e)):
        return None
    whys = [found[0].why for found in occurrences(e) if isinstance(found, tuple)]
    why = next((w for w in whys if w != _SINGLE), _SINGLE)
    return Fixed(e.size, why)


def _normal_sum(e: Sum) -> Expression:
    parts: list[Expression] = []
    for part in e.parts:
        resolved = resolve(part)
        for p in resolved.parts if isinstance(resolved, Sum) else (resolved,):
            if p.size == 0:
                continue
            if p.size == 1 and not isinstance(p, Fixed):
                p = Fixed(1, _SINGLE)
            last = parts[-1] if parts else None
            if isinstance(p, Fixed) and isinstance(last, Fixed) and _fusible(last, p):
                parts[-1] = Fixed(last.size + p.size, _stronger(last, p))
            else:
                parts.append(p)
    if not parts:
        return Fixed(0, _SINGLE)
    if len(parts) == 1:
        return ONE if parts[0].size == 1 else parts[0]
    return Sum(tuple(parts))


def atoms_of(e: Expression) -> Iterator[Atom]:
    """Yield the atoms of an expression, with repetition, in order."""
    e = resolve(e)
    if isinstance(e, Atom):
        yield e
    elif isinstance(e, Product):
        for f in e.factors:
            yield from atoms_of(f)
    elif isinstance(e, Sum):
        for p in e.parts:
            yield from atoms_of(p)


def pin(e: Expression, why: Pin) -> None:
    """Forbid every movement inside an expression."""
    for atom in tuple(atoms_of(e)):
        atom.copies = False
        if atom.pinned is None:
            atom.pinned = why


def _refine(atom: Atom, form: Expression) -> None:
    """Replace an atom by a finer or joined form, which inherits its pin and loses what the atom is not."""
    if not atom.copies:
        for part in atoms_of(form):
            part.copies = False
    atom.forward = form
    if atom.pinned is not None:
        pin(form, atom.pinned)


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
        fused = Fixed(one.size * two.size, _stronger(one, two))
        return split_trailing(Product((*rest[:-1], fused)), size)


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
    return _cut_sum(e, length)


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


def merged_copies(copies: Iterable[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    """Return ``(count, stride)`` pairs by falling stride, with pairs that follow each other seamlessly merged."""
    result: list[tuple[int, int]] = []
    for number, stride in sorted(copies, key=lambda c: -c[1]):
        if result and result[-1][1] == number * stride:
            result[-1] = (result[-1][0] * number, stride)
        else:
            result.append((number, stride))
    return tuple(result)


@dataclass(frozen=True)
class Placement:
    """Where an atom sits on an axis: unit ``u`` at ``offset + u·stride``, repeated along all ``siblings``.

    Attributes:
        atom: the atom, free or pinned.
        offset: position of unit 0.
        stride: distance of neighbouring units.
        siblings: the other factors of all products around the atom, each with its own stride.
    """

    atom: Atom
    offset: int
    stride: int
    siblings: tuple[tuple[Expression, int], ...]

    @property
    def copies(self) -> tuple[tuple[int, int], ...]:
        """``(count, stride)`` of every direction in which the units are repeated."""
        return merged_copies((e.size, step) for e, step in self.siblings)


def placements(
    e: Expression, offset: int = 0, stride: int = 1, siblings: tuple[tuple[Expression, int], ...] = ()
) -> Iterator[Placement | tuple[Fixed, int]]:
    """Yield where each atom sits on an axis, and each fixed part with the number of positions it takes."""
    e = resolve(e)
    if isinstance(e, Atom):
        yield Placement(e, offset, stride, siblings)
    elif isinstance(e, Fixed):
        yield e, e.size * math.prod(s.size for s, _ in siblings)
    elif isinstance(e, Sum):
        for part in e.parts:
            yield from placements(part, offset, stride, siblings)
            offset += stride * part.size
    else:
        strides = [stride] * len(e.factors)
        for k in range(len(e.factors) - 1, 0, -1):
            strides[k - 1] = strides[k] * e.factors[k].size
        for k, factor in enumerate(e.factors):
            others = tuple((f, strides[j]) for j, f in enumerate(e.factors) if j != k)
            yield from placements(factor, offset, strides[k], siblings + others)


@dataclass(frozen=True)
class Occurrence:
    """Where a free atom sits on an axis: unit ``u``, copy ``(i, …)`` at ``offset + u·stride + Σ i·copy_stride``."""

    atom: Atom
    offset: int
    stride: int
    copies: tuple[tuple[int, int], ...]


def occurrences(e: Expression) -> Iterator[Occurrence | tuple[Fixed, int]]:
    """Yield where each free atom sits on an axis, and each part that cannot move with its number of positions."""
    for found in placements(e):
        if isinstance(found, tuple):
            yield found
        elif found.atom.pinned is not None:
            yield (
                Fixed(found.atom.size, found.atom.pinned),
                found.atom.size * math.prod(n for n, _ in found.copies),
            )
        else:
            yield Occurrence(found.atom, found.offset, found.stride, found.copies)


def product_of(axes: Iterable[Expression]) -> Expression:
    """Return the row-major product of several axes."""
    return resolve(Product(tuple(axes)))
