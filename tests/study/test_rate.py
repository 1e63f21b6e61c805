"""The theory's exponent that figures show beside fitted ones."""

from __future__ import annotations

import pytest

from isthmus.errors import DataError
from isthmus.study import transport_exponent


def test_the_exponent_is_that_of_the_nearest_neighbour_law() -> None:
    # Its slopes on m = 64 … 1024 (Theory, section 5.1), fitted there with other weights, hence the tolerance.
    widths = [64, 128, 256, 512, 1024]
    for dimension, slope in ((3, -0.616), (5, -0.384), (8, -0.256), (12, -0.186), (20, -0.128)):
        assert transport_exponent(widths, dimension) == pytest.approx(slope, abs=0.005)


def test_it_tends_to_minus_two_over_the_dimension() -> None:
    assert transport_exponent([1e5, 1e6, 1e7], 5) == pytest.approx(-2 / 5, abs=0.02)
    assert transport_exponent([8, 64, 8, 16], 5) == pytest.approx(transport_exponent([64, 16, 8], 5))


def test_one_width_has_no_exponent() -> None:
    with pytest.raises(DataError, match=r"at least two different widths, found \[8, 8\]"):
        transport_exponent([8, 8], 5)
