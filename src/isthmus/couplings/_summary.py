"""What a coupling does to its units, in numbers and in words: for messages, tables and records."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any

import torch

from isthmus.couplings._coupling import Coupling
from isthmus.couplings._indices import moved_fraction
from isthmus.couplings._linear import Linear, Rotation
from isthmus.couplings._monomial import Monomial, Permutation
from isthmus.couplings._nested import Nested
from isthmus.couplings._plan import Plan

__all__ = ["CouplingSummary", "summary_of"]

_ONE = 1e-12
"""Factors this close to one are one: rounding of what composes to nothing."""


@dataclass(frozen=True)
class CouplingSummary:
    """What a coupling does to its units.

    Attributes:
        kind: in words: ``"permutation"``, ``"signs"``, ``"scales"``, ``"signs and scales"`` (each with a permutation),
            ``"rotation"``, ``"invertible map"``, ``"blocks"``, ``"transport plan"``; for a class of one's own its name.
        units: of A.
        moved: units that change place, of B's blocks with their members; ``None`` where units are mixed.
        flipped: units whose sign changes; ``None`` where units are mixed.
        factors: smallest, median and largest size of the factors; ``None`` where none differs from one, or units are
            mixed.
        condition: largest by smallest singular value of an invertible map; ``None`` for all others.
        inside: how many blocks move their members by each kind, of a coupling of blocks.
    """

    kind: str
    units: int
    moved: int | None = None
    flipped: int | None = None
    factors: tuple[float, float, float] | None = None
    condition: float | None = None
    inside: tuple[tuple[str, int], ...] = ()

    @property
    def mixes(self) -> bool:
        """Whether units are mixed with one another, so that they cannot be counted."""
        return self.moved is None

    def to_dict(self) -> dict[str, Any]:
        """Return plain values."""
        values = asdict(self)
        values["factors"] = None if self.factors is None else list(self.factors)
        values["inside"] = dict(self.inside)
        return values

    def __str__(self) -> str:
        """Return a few words, such as ``64 units: signs and permutation, 31 flipped, 60 moved``."""
        if self.mixes:
            size = f", {self.units} {'unit' if self.kind == 'transport plan' else 'dimension'}"
            size += "" if self.units == 1 else "s"
            return f"{self.kind}{size}" + (
                f", condition number {self.condition:.3g}" if self.condition else ""
            )
        parts = ["permutation" if self.kind == "permutation" else _and_order(self.kind)]
        if self.kind == "blocks":
            parts = [f"blocks of {', '.join(f'{kind} ({count})' for kind, count in self.inside)}"]
        if self.flipped:
            parts.append(f"{self.flipped} flipped")
        if self.factors is not None:
            low, middle, high = self.factors
            parts.append(f"factors {low:.3g} to {high:.3g}, median {middle:.3g}")
        return f"{self.units} unit{'' if self.units == 1 else 's'}: {', '.join(parts)}, {self.moved} moved"


def _and_order(kind: str) -> str:
    return f"{kind.replace(' and', ',')} and permutation"


def summary_of(coupling: Coupling) -> CouplingSummary:
    """Return what a coupling does to its units.

    Args:
        coupling: of any class; its tensors may carry gradients, which are not followed.

    Example:
        >>> print(summary_of(Monomial(torch.tensor([0, 2, 1]), torch.tensor([1.0, -1.0, 1.0]))))
        3 units: signs and permutation, 1 flipped, 2 moved
    """
    units = coupling.shape[0]
    if isinstance(coupling, Permutation):
        return CouplingSummary("permutation", units, _moved(coupling), 0)
    if isinstance(coupling, Monomial):
        return _of_factors(coupling)
    if isinstance(coupling, Rotation):
        return CouplingSummary("rotation", units)
    if isinstance(coupling, Linear):
        values = torch.linalg.svdvals(coupling.values.detach()) if units else torch.ones(1)
        return CouplingSummary("invertible map", units, condition=float(values[0] / values[-1]))
    if isinstance(coupling, Nested):
        each = units // max(len(coupling.inner), 1)
        kinds = Counter(summary_of(member).kind for member in coupling.inner)
        return CouplingSummary(
            "blocks", units, each * _moved(coupling.outer), inside=tuple(kinds.most_common())
        )
    return CouplingSummary("transport plan" if isinstance(coupling, Plan) else type(coupling).__name__, units)


def _of_factors(coupling: Monomial) -> CouplingSummary:
    factors = coupling.factors.detach().cpu()
    flipped, sizes = int((factors < 0).sum()), factors.abs()
    scaled = bool(((sizes - 1).abs() > _ONE).any())
    kind = " and ".join(word for word, there in (("signs", flipped), ("scales", scaled)) if there)
    spread = (float(sizes.min()), float(sizes.quantile(0.5)), float(sizes.max())) if scaled else None
    return CouplingSummary(kind or "permutation", len(factors), _moved(coupling), flipped, spread)


def _moved(coupling: Permutation | Monomial) -> int:
    return round(moved_fraction(coupling.index) * len(coupling.index))
