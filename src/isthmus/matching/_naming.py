"""What may act on units as text, for options, files and tables: ``permutations``, ``all``, ``signed,positive``."""

from __future__ import annotations

from isthmus.matching._classes import Symmetry, classes_of
from isthmus.symmetry import SymmetrySpec

__all__ = ["method_under", "symmetry_named", "symmetry_text"]


def symmetry_named(text: str) -> str | tuple[str, ...]:
    """Return what may act on units as :func:`isthmus.align` takes it, from its text.

    Args:
        text: ``"permutations"``, ``"all"``, or classes with commas between them.

    Raises:
        DataError: an unknown class.

    Example:
        >>> symmetry_named("signed, positive")
        ('signed', 'positive')
    """
    named = text if text in ("permutations", "all") else tuple(name.strip() for name in text.split(","))
    classes_of(SymmetrySpec({}), named)
    return named


def symmetry_text(symmetry: Symmetry) -> str:
    """Return the text that :func:`symmetry_named` reads."""
    return symmetry if isinstance(symmetry, str) else ",".join(map(str, symmetry))


def method_under(method: str, symmetry: Symmetry) -> str:
    """Return how a method is called where it matches by more than permutations: ``"weights, all"``.

    Example:
        >>> method_under("weights", "permutations"), method_under("weights", ["signed", "positive"])
        ('weights', 'weights, signed,positive')
    """
    return method if symmetry == "permutations" else f"{method}, {symmetry_text(symmetry)}"
