"""Values that are linear in units of the state: which units each entry is a sum of, and with what coefficients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from isthmus.symmetry._planes.symbols import Coefficients

__all__ = ["FOREIGN", "NOTHING", "UnitForm", "joined", "mapped", "summed"]

NOTHING, FOREIGN = -1, -2
"""Instead of a unit: no term, and a term of something else than units."""
_MOST_TERMS = 8


@dataclass(frozen=True)
class UnitForm:
    """Sums of units with coefficients, entry by entry.

    Attributes:
        units: numbers of units, int64, shape ``(terms, *shape)``.
        coefficients: numbers of coefficients, same shape; 0 where there is no unit.
        is_complex: whether the last axis holds real and imaginary parts of a value of one axis less.
    """

    units: Tensor
    coefficients: Tensor
    is_complex: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the value."""
        return tuple(self.units.shape[1:])

    def multiplied(self, numbers: Coefficients, symbols: Tensor) -> UnitForm:
        """Return the form multiplied by a table of real entries, broadcast."""
        units, symbols = torch.broadcast_tensors(self.units, symbols)
        made = numbers.times(self.coefficients.expand(units.shape), symbols)
        return UnitForm(units, torch.where(units >= 0, made, 0))

    def expanded(self, shape: Sequence[int]) -> UnitForm:
        """Return the form broadcast to a shape."""
        units, coefficients = (part.expand(len(part), *shape) for part in (self.units, self.coefficients))
        return UnitForm(units, coefficients)

    def negated(self, numbers: Coefficients) -> UnitForm:
        """Return the form with the opposite sign."""
        made = numbers.negated(self.coefficients)
        return UnitForm(self.units, torch.where(self.units >= 0, made, 0), self.is_complex)

    def turned(self, numbers: Coefficients, real: Tensor, imaginary: Tensor) -> UnitForm | None:
        """Return a complex form multiplied by a table of complex entries, given their parts."""
        one, two = self._part(0), self._part(1)
        upper = summed(
            one.multiplied(numbers, real),
            two.multiplied(numbers, imaginary).negated(numbers),
            self.shape[:-1],
        )
        lower = summed(one.multiplied(numbers, imaginary), two.multiplied(numbers, real), self.shape[:-1])
        if upper is None or lower is None or upper.shape != lower.shape:
            return None
        parts = [torch.stack(pair, -1) for pair in zip(_both(upper), _both(lower), strict=True)]
        return UnitForm(parts[0], parts[1], is_complex=True)

    def _part(self, k: int) -> UnitForm:
        return UnitForm(self.units[..., k], self.coefficients[..., k])


def _both(form: UnitForm) -> tuple[Tensor, Tensor]:
    return form.units, form.coefficients


def summed(one: UnitForm, other: UnitForm, shape: Sequence[int] | None = None) -> UnitForm | None:
    """Return the sum of two forms, broadcast; ``None`` for one of too many terms."""
    common = torch.broadcast_shapes(one.shape, other.shape)
    if shape is not None and tuple(shape) != tuple(common):
        common = torch.broadcast_shapes(common, tuple(shape))
    units, coefficients = (
        torch.cat([part.expand(len(part), *common) for part in pair])
        for pair in ((one.units, other.units), (one.coefficients, other.coefficients))
    )
    used = (units != NOTHING).flatten(1).any(1)
    if int(used.sum()) > _MOST_TERMS:
        return None
    return UnitForm(units[used], coefficients[used])


def mapped(form: UnitForm, move: Callable[[Tensor], Any]) -> Any:
    """Return what a move of entries makes of a form: one form, a list of them, or ``None`` where it cannot."""
    made = [(move(u), move(c)) for u, c in zip(form.units, form.coefficients, strict=True)]
    if not made or any(u is None for u, _ in made):
        return None
    if isinstance(made[0][0], Tensor):
        return UnitForm(torch.stack([u for u, _ in made]), torch.stack([c for _, c in made]))
    return [
        UnitForm(torch.stack([u[k] for u, _ in made]), torch.stack([c[k] for _, c in made]))
        for k in range(len(made[0][0]))
    ]


def joined(forms: Sequence[UnitForm | None], shapes: Sequence[Sequence[int]]) -> list[UnitForm]:
    """Return forms with one number of terms; entries of what is none are foreign."""
    terms = max(len(f.units) for f in forms if f is not None)
    found: list[UnitForm] = []
    for form, shape in zip(forms, shapes, strict=True):
        units = torch.full((terms, *shape), NOTHING)
        coefficients = torch.zeros_like(units)
        if form is None:
            units[0] = FOREIGN
        else:
            units[: len(form.units)], coefficients[: len(form.units)] = form.units, form.coefficients
        found.append(UnitForm(units, coefficients))
    return found
