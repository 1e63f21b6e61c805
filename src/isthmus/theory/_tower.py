"""Numbers too large to write: towers of powers of ten."""

from __future__ import annotations

import math
from dataclasses import dataclass

from isthmus.errors import DataError

__all__ = ["Tower"]

_LARGEST_DIGITS = 300.0


@dataclass(frozen=True, order=True)
class Tower:
    """The number ``10^(10^(... value))`` with ``height`` powers of ten; never evaluated.

    Kept in one normal form, so that comparing two towers compares the numbers: ``value`` is a float below
    ``1e300``, and at least 300 unless ``height`` is 0.

    Attributes:
        height: number of powers of ten, at least 0. At 0 the number is ``value`` itself, at 1 ``value`` is
            its logarithm to base 10, at 2 the logarithm of that, and so on.
        value: see above.

    Example:
        >>> str(Tower(1, 1274.24)), Tower(1, 3.0)
        ('10^1274.24', Tower(height=0, value=1000.0))
    """

    height: int
    value: float

    def __post_init__(self) -> None:
        if self.height < 0 or math.isnan(self.value) or math.isinf(self.value) or self.value < 0:
            raise DataError(
                f"Tower: expected a height of at least 0 and a finite value of at least 0, "
                f"found {self.height} and {self.value}."
            )
        height, value = self.height, float(self.value)
        while value >= 10.0**_LARGEST_DIGITS:
            height, value = height + 1, math.log10(value)
        while height > 0 and value < _LARGEST_DIGITS:
            height, value = height - 1, 10.0**value
        object.__setattr__(self, "height", height)
        object.__setattr__(self, "value", value)

    def __str__(self) -> str:
        return "10^" * self.height + f"{self.value:.6g}"

    @property
    def log10(self) -> float:
        """Logarithm to base 10; infinite where it is beyond floating point, minus infinity for zero."""
        if self.height == 0:
            return math.log10(self.value) if self.value > 0 else -math.inf
        return self.value if self.height == 1 else math.inf
