r"""Frank–Wolfe: all groups at once, between permutations, on the whole of an objective.

Coordinate descent moves one cluster at a time and stops where none of them alone improves the value. Here every group
has a doubly stochastic matrix, the value is a polynomial of their entries, and each step asks for the permutations that
its gradient likes best (one exact assignment for each group) and moves towards all of them together, as far as is
best: along a segment the value is a polynomial in one variable, whose maximum is found exactly.

Source:
    Frank and Wolfe 1956. Crisostomi et al. 2024 (C²M³, algorithm 1) use it to match two networks by weights; there the
    line is searched on a grid, and what is compared are the weights of plain layers. Here it is every inner product
    of an objective, metrics and squared distances included, and the result is never worse than the start.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, cast

import numpy as np
import torch
from torch import Tensor

from isthmus.couplings import Permutation
from isthmus.errors import DataError
from isthmus.matching._grids import Structure
from isthmus.matching._objectives import InnerProduct, Measure, Objective, TermObjective
from isthmus.matching._schedules import Match, Status, started
from isthmus.matching._soft import SoftPermutation, as_matrices, carried_softly, rounded
from isthmus.matching._solvers import Solver
from isthmus.matching._sources import TensorSource, read
from isthmus.symmetry import Couplings

__all__ = ["FrankWolfe"]

Matrices = Mapping[str, Tensor]


class _Listing(Protocol):
    structure: Structure

    @property
    def compared(self) -> Sequence[InnerProduct]: ...


@dataclass(frozen=True)
class FrankWolfe:
    """Move all groups together between permutations, and round at the end.

    Attributes:
        max_steps: steps after which it stops.
        tolerance: it stops where no direction promises a rise of more than this, relative to the value.
        centred: groups without a start begin in the middle of all permutations, where every pair is as likely as any
            other, instead of where B's units are.

    Raises:
        DataError: a number out of range.
    """

    max_steps: int = 60
    tolerance: float = 1e-5
    centred: bool = True

    def __post_init__(self) -> None:
        """Check the settings."""
        if self.max_steps < 0 or self.tolerance < 0:
            raise DataError(
                f"FrankWolfe: expected max_steps and tolerance of at least 0, found {self.max_steps} and "
                f"{self.tolerance}."
            )

    def run(
        self, objective: Objective, solver: Solver, start: Couplings | None, generator: torch.Generator
    ) -> Match:
        """Return the rounded end of the search, or the start where that is worth more by the objective's value.

        Args:
            objective: it lists the inner products that its value is the sum of (``compared``).
            solver: unused: assignments are exact.
            start: permutations to start from.
            generator: unused.

        Raises:
            DataError: an objective that lists nothing, a solver that does more than permute, or a start that does.
        """
        parts = _parts_of(objective, solver)
        sizes = objective.structure.sizes
        given = started(start)
        first = {name: given.get(name, Permutation.identity(size)) for name, size in sizes.items()}
        if not all(isinstance(coupling, Permutation) for coupling in first.values()):
            raise DataError(
                "FrankWolfe permutes units: expected permutations to start from, found other couplings."
            )
        relaxed = _Relaxation(parts, _measured_by_cost(objective))
        at = as_matrices(first, sizes, relaxed.dtype)
        if self.centred:
            at.update({n: torch.full_like(m, 1 / len(m)) for n, m in at.items() if n not in given})
        for _ in range(self.max_steps):
            value, gradient = relaxed.gradient(at)
            corner = as_matrices(rounded(gradient), sizes, relaxed.dtype)
            promise = sum(float((gradient[n] * (corner[n] - m)).sum()) for n, m in at.items())
            if promise <= self.tolerance * abs(value):
                break
            step = relaxed.best_step(at, corner, value)
            if step <= 0:
                break
            at = {name: torch.lerp(matrix, corner[name], step) for name, matrix in at.items()}
        before, found = objective.value(first), {**given, **rounded(at)}
        after = objective.value(found)
        if after < before:
            found, after = {**given, **first}, before
        return Match(found, (before, after), Status.ROUNDED)


def _parts_of(objective: Objective, solver: Solver) -> Sequence[InnerProduct]:
    if not hasattr(objective, "compared"):
        raise DataError(
            f"FrankWolfe needs an objective that lists what it compares (compared), found {type(objective).__name__}. "
            "Use it with weights-incoming, weights, covariance or kronecker."
        )
    if solver.acts != "permutation":
        raise DataError(
            f"FrankWolfe permutes units, found a solver of class {solver.acts!r}. Use symmetry='permutations'."
        )
    return cast(_Listing, objective).compared


def _measured_by_cost(objective: Objective) -> bool:
    """Return whether the value is minus half the squared distances, rather than the inner products."""
    plain = getattr(objective, "plain", objective)
    measure: Measure = plain.measure if isinstance(plain, TermObjective) else InnerProduct.inner
    return measure is not InnerProduct.inner


class _Relaxation:
    """The value of an objective at doubly stochastic matrices."""

    def __init__(self, parts: Sequence[InnerProduct], by_cost: bool) -> None:
        self._parts, self._by_cost = [part for part in parts if part.groups], by_cost
        dtypes = [x.dtype for part in self._parts for x in (*part.a, *part.b)]
        self.dtype = torch.float64 if torch.float64 in dtypes else torch.float32
        slots = (sum(len(pairs) for pairs in m.values()) for part in self._parts for m in part.movers)
        self._degree = max(slots, default=1) * (2 if by_cost else 1)

    def _value(self, at: Matrices) -> Tensor:
        couplings = {name: SoftPermutation(matrix) for name, matrix in at.items()}
        total = torch.zeros((), dtype=torch.float64)
        for part in self._parts:
            moved = [
                carried_softly(read(b).to(self.dtype), movers, couplings)
                for b, movers in zip(part.b, part.movers, strict=True)
            ]
            total = total + _inner(part.a, moved)
            if self._by_cost:
                lifted = moved if part.metric is None else part.metric(tuple(x.double() for x in moved))
                total = total - _inner(lifted, moved) / 2
        return total

    def value(self, at: Matrices) -> float:
        """Return the value, up to what no relabelling changes."""
        with torch.no_grad():
            return float(self._value(at))

    def gradient(self, at: Matrices) -> tuple[float, dict[str, Tensor]]:
        """Return the value and its gradient by every matrix, float64."""
        leaves = {name: matrix.detach().requires_grad_() for name, matrix in at.items()}
        value = self._value(leaves)
        found = torch.autograd.grad(value, list(leaves.values()), allow_unused=True)
        zeros = (torch.zeros_like(m) if g is None else g for m, g in zip(at.values(), found, strict=True))
        return float(value.detach()), {name: g.double() for name, g in zip(at, zeros, strict=True)}

    def best_step(self, at: Matrices, corner: Matrices, value: float) -> float:
        """Return where between here (0) and the corner (1) the value is largest: that of a polynomial, exactly."""
        points = np.linspace(0.0, 1.0, self._degree + 1)
        values = [value]
        for point in points[1:]:
            between = {name: torch.lerp(m, corner[name], float(point)) for name, m in at.items()}
            values.append(self.value(between))
        curve = np.polynomial.Polynomial.fit(points, np.array(values), self._degree)
        turns = [float(r.real) for r in curve.deriv().roots() if abs(r.imag) < 1e-9 and 0 < r.real < 1]
        best = max((0.0, 1.0, *turns), key=lambda t: float(curve(t)))
        return best if float(curve(best)) > values[0] else 0.0


def _inner(a: Sequence[Tensor | TensorSource], b: Sequence[Tensor]) -> Tensor:
    return sum(
        ((read(x).to(y) * y).sum(dtype=torch.float64).cpu() for x, y in zip(a, b, strict=True)),
        torch.zeros((), dtype=torch.float64),
    )
