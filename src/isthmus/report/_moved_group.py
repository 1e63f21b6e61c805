"""One group of units as a picture of the relabelling needs it: how alike before and after, and what acted on them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from isthmus.report._record import Record, StoredRelabelling

__all__ = ["MovedGroup", "moved_groups"]

_ONE = 1e-12
"""Factors this close to one are one."""


@dataclass(frozen=True)
class MovedGroup:
    """A group, before and after it has moved.

    Attributes:
        name: of the group.
        before: correlation of A's unit ``i`` with B's unit ``j``, shape ``(n, n)``; NaN for a unit that never varies.
        after: the same with unit ``j`` of B relabelled.
        permutation: the unit of B at each place, shape ``(n,)``; ``None`` where units are mixed.
        factors: what units are multiplied by, shape ``(n,)``; ``None`` where that is one for all.
        spectrum: singular values of an invertible map; ``None`` for all else.
    """

    name: str
    before: np.ndarray
    after: np.ndarray
    permutation: np.ndarray | None
    factors: np.ndarray | None
    spectrum: np.ndarray | None

    @property
    def size(self) -> int:
        """Number of units."""
        return len(self.before)

    @property
    def flipped(self) -> int:
        """Units whose sign changes."""
        return 0 if self.factors is None else int((self.factors < 0).sum())

    @property
    def scaled(self) -> bool:
        """Whether a factor has another size than one."""
        return self.factors is not None and bool((np.abs(np.abs(self.factors) - 1) > _ONE).any())

    @property
    def kind(self) -> str:
        """What acted on the units, in words."""
        if self.spectrum is not None:
            return "invertible map"
        if self.permutation is None:
            return "rotation"
        words = [word for word, there in (("signs", self.flipped), ("scales", self.scaled)) if there]
        return " and ".join(words) or "permutation"

    @property
    def means(self) -> tuple[float, float]:
        """Mean correlation of units at the same place, before and after; NaN where none varies."""
        return _mean(np.diagonal(self.before)), _mean(np.diagonal(self.after))


def moved_groups(record: Record, stored: StoredRelabelling, method: str) -> dict[str, MovedGroup]:
    """Return, by name in the record's order, the groups of which a method's arrays show what they became."""
    permutations, after = stored.permutation.get(method, {}), stored.after.get(method, {})
    factors, spectra = stored.factors.get(method, {}), stored.spectrum.get(method, {})
    found: dict[str, MovedGroup] = {}
    for name in [g["name"] for g in record["symmetry"]["groups"] if g["size"]]:
        before, order, scales = stored.similarity.get(name), permutations.get(name), factors.get(name)
        there = after.get(name)
        if before is None or (there is None and order is None):
            continue
        if there is None:
            there = before[:, order] * (1.0 if scales is None else np.sign(scales))
        found[name] = MovedGroup(name, before, there, order, scales, spectra.get(name))
    return found


def _mean(values: np.ndarray) -> float:
    known = values[~np.isnan(values)]
    return float(known.mean()) if known.size else float("nan")
