"""The result of a study as tables: barriers, method by swept value, beside the endpoints."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from isthmus.errors import DataError
from isthmus.report._study_figures import sweep_of
from isthmus.report._study_summary import Row, with_symmetries

__all__ = ["BarrierTable", "PlaceRow", "Spread", "barrier_tables"]


@dataclass(frozen=True)
class Spread:
    """A mean over pairs.

    Attributes:
        mean: of the values.
        deviation: their standard deviation over pairs (of a sample: divided by ``n − 1``); ``None`` for one pair.
        n: pairs.
    """

    mean: float
    deviation: float | None
    n: int


@dataclass(frozen=True)
class PlaceRow:
    """One value of what was swept.

    Attributes:
        place: the value.
        pairs: how many were measured there.
        loss: mean loss of the endpoints.
        accuracy: mean accuracy of the endpoints, between 0 and 1, or ``None`` where there is none.
        barriers: per method; one that was not measured there is left out.
    """

    place: float
    pairs: int
    loss: Spread | None
    accuracy: Spread | None
    barriers: Mapping[str, Spread]


@dataclass(frozen=True)
class BarrierTable:
    """The barriers of one combination of what else was swept, on one split.

    Attributes:
        about: the combination in words, and how the line was refreshed; may be empty.
        swept: name of the column that the rows go through.
        split: of the data.
        methods: in the order of the study.
        rows: one per value of ``swept``, rising.
    """

    about: str
    swept: str
    split: str
    methods: tuple[str, ...]
    rows: tuple[PlaceRow, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return asdict(self)


def barrier_tables(rows: Sequence[Row], split: str = "test") -> list[BarrierTable]:
    """Return the barriers of a study's rows: mean and standard deviation over pairs, and the endpoints.

    Args:
        rows: as :func:`isthmus.study.read_rows` returns them.
        split: of the data.

    Returns:
        A table for each combination of what was swept beside the first swept number, and for each way to refresh.
        A method has a column for each symmetry that it matched by, such as ``"weights, all"``.

    Raises:
        DataError: no rows of this split.
    """
    wanted = [row for row in with_symmetries(rows) if row["split"] == split]
    if not wanted:
        raise DataError(
            f"Study tables: expected rows of the split {split!r}, found none. Has a pair been measured?"
        )
    sweep = sweep_of(wanted)
    tables: list[BarrierTable] = []
    for combination in sweep.combinations:
        for refresh in dict.fromkeys(row["refresh"] for row in combination.rows):
            part = [row for row in combination.rows if row["refresh"] == refresh]
            words = [combination.words, "" if refresh == "none" else f"refresh: {refresh}"]
            methods = tuple(dict.fromkeys(row["method"] for row in part))
            places = sorted({row[sweep.x] for row in part}, key=float)
            listed = tuple(
                _place(place, [r for r in part if r[sweep.x] == place], methods) for place in places
            )
            tables.append(BarrierTable(", ".join(w for w in words if w), sweep.x, split, methods, listed))
    return tables


def _place(place: float, rows: Sequence[Row], methods: Sequence[str]) -> PlaceRow:
    ends = {
        (row["seed_a"], row["seed_b"]): row for row in rows
    }  # the endpoints are the same for every method
    loss, accuracy = (
        _spread([_mean(row[f"{what}_a"], row[f"{what}_b"]) for row in ends.values()])
        for what in ("loss", "accuracy")
    )
    found = {m: _spread([row["barrier"] for row in rows if row["method"] == m]) for m in methods}
    return PlaceRow(
        float(place), len(ends), loss, accuracy, {m: s for m, s in found.items() if s is not None}
    )


def _mean(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else (a + b) / 2


def _spread(values: Sequence[float | None]) -> Spread | None:
    known = [value for value in values if value is not None and math.isfinite(value)]
    if not known:
        return None
    return Spread(float(np.mean(known)), float(np.std(known, ddof=1)) if len(known) > 1 else None, len(known))
