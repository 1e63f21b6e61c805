"""Numbers for entries and for their coefficients: equal numbers mean equal values, whatever the inputs are."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from fractions import Fraction

import torch
from torch import Tensor

__all__ = ["Coefficients", "Symbols", "equal_slices"]

_SymbolProduct = tuple[Fraction, tuple[int, ...]]


class Symbols:
    """Numbers for the entries of tensors.

    Two entries have one number only where they were computed in one way from entries of equal numbers, so that they are
    equal for every input and every state. Entries of unequal numbers may be equal or not.
    """

    def __init__(self) -> None:
        self._known: dict[Hashable, int] = {}
        self._next = 0

    def block(self, key: Hashable, number: int) -> int:
        """Return the first of a run of numbers: the same one whenever asked for the same key."""
        if key not in self._known:
            self._known[key] = self._next
            self._next += number
        return self._known[key]

    def each(self, head: Hashable, parts: Sequence[Tensor]) -> Tensor:
        """Return the numbers of what a function makes of entries, given theirs, entry by entry."""
        together = torch.broadcast_tensors(*parts)
        unique, inverse = _distinct([part.reshape(-1) for part in together])
        numbers = [self.block((head, *row), 1) for row in unique]
        return torch.tensor(numbers, dtype=torch.int64)[inverse].reshape(together[0].shape)


def _distinct(columns: Sequence[Tensor]) -> tuple[list[tuple[int, ...]], Tensor]:
    """Return the different rows of some columns of numbers, and which of them every row is."""
    code, rows = torch.zeros_like(columns[0]), torch.zeros(1, 0, dtype=torch.int64)
    for column in columns:
        values, own = column.unique(return_inverse=True)
        met, code = (code * len(values) + own).unique(return_inverse=True)
        rows = torch.cat(
            [rows[met // max(len(values), 1)], values[met % max(len(values), 1)].unsqueeze(1)], 1
        )
    return [tuple(row) for row in rows.tolist()], code


def equal_slices(values: Tensor, axis: int) -> Tensor:
    """Return, for every position of an axis, the first one whose slice has the same values."""
    plain = torch.view_as_real(values.resolve_conj()) if values.is_complex() else values
    wide = plain.double() if plain.is_floating_point() else plain
    rows = wide.movedim(axis, 0).reshape(values.shape[axis], -1)
    _, inverse = rows.unique(dim=0, return_inverse=True)
    first = torch.full((int(inverse.max()) + 1 if len(inverse) else 0,), len(inverse))
    first = first.scatter_reduce(0, inverse, torch.arange(len(inverse)), "amin")
    return first[inverse]


class Coefficients:
    """Numbers for products of a rational number and symbols; 0 stands for one."""

    def __init__(self) -> None:
        self._numbers: dict[_SymbolProduct, int] = {(Fraction(1), ()): 0}
        self._listed: list[_SymbolProduct] = [(Fraction(1), ())]

    def of_symbols(self, symbols: Tensor) -> Tensor:
        """Return the numbers of symbols as coefficients."""
        return self.times(torch.zeros_like(symbols), symbols)

    def times(self, coefficients: Tensor, symbols: Tensor) -> Tensor:
        """Return coefficients multiplied by symbols, entry by entry, broadcast."""
        one, two = torch.broadcast_tensors(coefficients, symbols)
        unique, inverse = _distinct([one.reshape(-1), two.reshape(-1)])
        made = [self._number(self._with_symbol(coefficient, symbol)) for coefficient, symbol in unique]
        return torch.tensor(made, dtype=torch.int64)[inverse].reshape(one.shape)

    def scaled(self, coefficients: Tensor, by: Fraction) -> Tensor:
        """Return coefficients multiplied by a number."""
        return self._mapped(coefficients, lambda monomial: (monomial[0] * by, monomial[1]))

    def negated(self, coefficients: Tensor) -> Tensor:
        """Return coefficients with the opposite sign."""
        return self.scaled(coefficients, Fraction(-1))

    def _with_symbol(self, coefficient: int, symbol: int) -> _SymbolProduct:
        number, symbols = self._listed[coefficient]
        return number, tuple(sorted((*symbols, symbol)))

    def _mapped(self, coefficients: Tensor, function: Callable[[_SymbolProduct], _SymbolProduct]) -> Tensor:
        unique, inverse = coefficients.unique(return_inverse=True)
        made = [self._number(function(self._listed[k])) for k in unique.tolist()]
        return torch.tensor(made, dtype=torch.int64)[inverse].reshape(coefficients.shape)

    def _number(self, monomial: _SymbolProduct) -> int:
        if monomial not in self._numbers:
            self._numbers[monomial] = len(self._listed)
            self._listed.append(monomial)
        return self._numbers[monomial]
