"""Words, numbers and tables of ``reproducing.md``; see ``make_reproducing.py``."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]
Lines = Iterator[str]


def prose(text: str) -> Lines:
    """Return a paragraph, wrapped, and an empty line."""
    yield textwrap.fill(text, 118, break_long_words=False, break_on_hyphens=False)
    yield ""


def head(name: str, places: Sequence[float]) -> Lines:
    """Return the head of a table over the places of the horizontal axis."""
    yield f"| {name} | " + " | ".join(f"{p:.3g}" if p < 1 else f"{p:g}" for p in places) + " |"
    yield "| --- " * (len(places) + 1) + "|"


def printed(points: Sequence[Any], decimals: int = 3) -> dict[float, str]:
    """Print means and standard errors, by place."""
    return {p.x: f"{p.mean:.{decimals}f}{spread(p.error, decimals)}" for p in points}


def entry(name: str, at: Mapping[float, str], places: Sequence[float]) -> str:
    """Return a row of a table; empty where a place has no records."""
    return f"| {name} | " + " | ".join(at.get(float(p), "") for p in places) + " |"


def spread(error: float | None, decimals: int = 3) -> str:
    """Print a standard error, if there is one."""
    return "" if error is None else f" ± {error:.{decimals}f}"


def accuracy(rows: Sequence[Row]) -> str:
    """Print the mean midpoint accuracy in %."""
    return f"{100 * sum(r['midpoint_accuracy'] for r in rows) / len(rows):.1f}" if rows else ""


def interval(found: Mapping[str, Any]) -> str:
    """Print a correlation."""
    if found["value"] is None:
        return "undefined: all barriers or all dimensions are equal"
    return f"{found['value']:.2f}" + (
        "" if found["low"] is None else f" [{found['low']:.2f}, {found['high']:.2f}]"
    )


def duration(seconds: float) -> str:
    """Print a time."""
    minutes = round(seconds / 60)
    return (
        f"{seconds:.0f} s"
        if minutes < 2
        else f"{minutes} min"
        if minutes < 100
        else f"{seconds / 3600:.1f} h"
    )


def test(rows: Sequence[Row]) -> list[Row]:
    """Return the rows of the test split."""
    return [r for r in rows if r["split"] == "test"]


def of(rows: Sequence[Row], method: str) -> list[Row]:
    """Return the rows of a method."""
    return [r for r in rows if r["method"] == method]


def split(rows: Sequence[Row], columns: Sequence[str]) -> dict[tuple[Any, ...], list[Row]]:
    """Return the rows by the values of some columns."""
    parts: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        parts.setdefault(tuple(row[c] for c in columns), []).append(row)
    return parts


def bullet(text: str) -> str:
    """Return an entry of a list, wrapped."""
    return textwrap.fill(
        f"- {text}", 118, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False
    )
