r"""The expressions that label axes: what an axis is made of, and which parts of it move together.

Every tensor axis carries an expression:

* :class:`Atom`: ``size`` units that may be permuted freely among themselves;
* :class:`Fixed`: positions that cannot move, with the reason;
* :class:`Product`: a row-major product of factors (an axis of ``channels × height × width`` after a flatten);
* :class:`Sum`: segments one after the other (a concatenation);
* :class:`Woven`: segments whose blocks take turns (a channel shuffle, a stack that was flattened).

Expressions are immutable but for the forward pointer and the pin of atoms; always look at them through
:func:`resolve`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count

__all__ = [
    "ONE",
    "SINGLE",
    "Atom",
    "Expression",
    "Fixed",
    "Pin",
    "Product",
    "Sum",
    "Woven",
    "are_copies",
    "atoms_of",
    "equal_copies",
    "fresh",
    "immovable",
    "pin",
    "product_of",
    "resolve",
    "same",
    "stronger",
    "woven",
]

_serial = count()


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


@dataclass(frozen=True, eq=False)
class Woven:
    """Segments whose blocks take turns, ``(lead, trail)`` for each.

    A period holds one block of every segment: ``len(trail)`` neighbouring positions. With period ``K`` (all trails
    together), unit ``u`` of the lead and place ``r`` of the trail of a segment sit at
    ``u·K + (trails before) + r``. A sum is the case of a single period, a product that of a single segment. The last
    period may be incomplete: then the leads of the last segments have one unit less.
    """

    strands: tuple[tuple[Expression, Expression], ...]

    @property
    def period(self) -> int:
        """Number of positions after which the first segment takes its turn again."""
        return sum(trail.size for _, trail in self.strands)

    @property
    def turns(self) -> int:
        """Number of periods, the last of which may be incomplete."""
        return self.strands[0][0].size

    @property
    def complete(self) -> bool:
        """Whether the last period is complete."""
        return self.strands[-1][0].size == self.turns

    @property
    def size(self) -> int:
        """Number of positions."""
        return sum(lead.size * trail.size for lead, trail in self.strands)

    @property
    def parts(self) -> tuple[Product, ...]:
        """Each segment by itself."""
        return tuple(Product(strand) for strand in self.strands)


Expression = Atom | Fixed | Product | Sum | Woven

ONE = Product(())
SINGLE = Pin("a single unit has nothing to be exchanged with")


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
    return _normal_woven(e) if isinstance(e, Woven) else e


def _normal_product(e: Product) -> Expression:
    factors: list[Expression] = []
    for factor in e.factors:
        resolved = resolve(factor)
        for f in resolved.factors if isinstance(resolved, Product) else (resolved,):
            last = factors[-1] if factors else None
            if f.size == 1:
                continue
            if isinstance(f, Fixed) and isinstance(last, Fixed) and _fusible(last, f):
                factors[-1] = Fixed(last.size * f.size, stronger(last, f))
            else:
                factors.append(f)
    return factors[0] if len(factors) == 1 else Product(tuple(factors)) if factors else ONE


def _fusible(x: Fixed, y: Fixed) -> bool:
    return x.why == y.why or SINGLE in (x.why, y.why)


def stronger(x: Fixed, y: Fixed) -> Pin:
    """Return the reason to keep when two fixed parts fuse: a single unit explains nothing."""
    return y.why if x.why == SINGLE else x.why


def _normal_sum(e: Sum) -> Expression:
    parts: list[Expression] = []
    for part in e.parts:
        resolved = resolve(part)
        for p in resolved.parts if isinstance(resolved, Sum) else (resolved,):
            if p.size == 0:
                continue
            if p.size == 1 and not isinstance(p, Fixed):
                p = Fixed(1, SINGLE)
            last = parts[-1] if parts else None
            if isinstance(p, Fixed) and isinstance(last, Fixed) and _fusible(last, p):
                parts[-1] = Fixed(last.size + p.size, stronger(last, p))
            else:
                parts.append(p)
    if not parts:
        return Fixed(0, SINGLE)
    if len(parts) == 1:
        return ONE if parts[0].size == 1 else parts[0]
    return Sum(tuple(parts))


def _normal_woven(e: Woven) -> Expression:
    """Return neighbours with one lead as one strand; a single turn is a sum, a single strand a product."""
    strands: list[tuple[Expression, Expression]] = []
    for lead, trail in ((resolve(lead), resolve(trail)) for lead, trail in e.strands):
        if trail.size == 0:
            continue
        if strands and same(strands[-1][0], lead):
            strands[-1] = lead, resolve(Sum((strands[-1][1], trail)))
        else:
            strands.append((lead, trail))
    if not strands:
        return Fixed(0, SINGLE)
    if strands[0][0].size == 1:
        return resolve(Sum(tuple(trail for lead, trail in strands if lead.size)))
    return resolve(Product(strands[0])) if len(strands) == 1 else Woven(tuple(strands))


def same(x: Expression, y: Expression) -> bool:
    """Return whether two expressions are known to be the same axis: made of the same atoms in the same way."""
    x, y = resolve(x), resolve(y)
    if x is y:
        return True
    if isinstance(x, Fixed) and isinstance(y, Fixed):
        return x.size == y.size
    if isinstance(x, Product) and isinstance(y, Product):
        return _all_same(x.factors, y.factors)
    if isinstance(x, Woven) and isinstance(y, Woven):
        return x.period == y.period and _all_same(x.parts, y.parts)
    return isinstance(x, Sum) and isinstance(y, Sum) and _all_same(x.parts, y.parts)


def _all_same(x: Sequence[Expression], y: Sequence[Expression]) -> bool:
    return len(x) == len(y) and all(same(a, b) for a, b in zip(x, y, strict=True))


def woven(leads: Sequence[Expression]) -> Expression:
    """Return the axis on which the units of several axes of one length take turns."""
    return resolve(Woven(tuple((lead, ONE) for lead in leads)))


def product_of(axes: Iterable[Expression]) -> Expression:
    """Return the row-major product of several axes."""
    return resolve(Product(tuple(axes)))


def atoms_of(e: Expression) -> Iterator[Atom]:
    """Yield the atoms of an expression, with repetition, in order."""
    e = resolve(e)
    if isinstance(e, Atom):
        yield e
    elif isinstance(e, Product):
        for f in e.factors:
            yield from atoms_of(f)
    elif not isinstance(e, Fixed):
        for p in e.parts:
            yield from atoms_of(p)


def pin(e: Expression, why: Pin) -> None:
    """Forbid every movement inside an expression."""
    for atom in tuple(atoms_of(e)):
        atom.copies = False
        if atom.pinned is None:
            atom.pinned = why
