"""How a refinement is run: its budget, its rate and its data."""

from __future__ import annotations

import math
from dataclasses import dataclass

from isthmus.errors import DataError

__all__ = ["STEPS", "RefineSettings"]

STEPS = 500
"""Steps where neither these nor seconds are given."""


@dataclass(frozen=True)
class RefineSettings:
    """What a refinement is allowed and how it moves.

    Attributes:
        steps: of the optimiser, one batch each; None where seconds alone limit it, and 500 where nothing does.
        seconds: of the process's clock; None for no limit. What is reached then depends on the machine.
        rate: at which the optimiser begins, per step: of logarithms of factors, and of angles and entries of matrices a
            tenth of it. It falls to 0 along half a cosine.
        spread: width of the interval around the middle of the path from which positions are taken: 1 is the whole path,
            0 the middle alone; None is 0 where factors alone are learnt, else 1.
        every: steps between looks at what is held out.
        seed: of the order of the batches and of the positions.

    Raises:
        DataError: a budget, a rate or a distance that is not positive.
    """

    steps: int | None = None
    seconds: float | None = None
    rate: float = 0.2
    spread: float | None = None
    every: int = 50
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the numbers."""
        for name in ("steps", "seconds", "rate", "every"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise DataError(f"Refining on the path: expected {name} above 0, found {value!r}.")
        if self.spread is not None and not 0 <= self.spread <= 1:
            raise DataError(f"Refining on the path: expected spread from 0 to 1, found {self.spread!r}.")
        if self.steps is None and self.seconds is None:
            object.__setattr__(self, "steps", STEPS)

    def spent(self, step: int, seconds: float) -> float:
        """Return the share of the budget that is spent, from 0 to 1."""
        shares = [0.0]
        if self.steps is not None:
            shares.append(step / self.steps)
        if self.seconds is not None:
            shares.append(seconds / self.seconds)
        return min(1.0, max(shares))
