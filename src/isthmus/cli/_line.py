"""The ``line`` command's work: measure, draw, write."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from isthmus.batches import Batches
from isthmus.cli import _console as console
from isthmus.cli._pair import NetworkPair
from isthmus.connectivity import Line
from isthmus.connectivity import line as measure
from isthmus.matching import Alignment
from isthmus.report import draw_line

__all__ = ["write_line"]


def write_line(
    pair: NetworkPair,
    data: Mapping[str, Batches],
    folder: Path,
    alignment: Path | None,
    *,
    points: int,
    loss: str,
    refresh: str | None,
    generator: torch.Generator,
) -> Line:
    """Measure the line of a pair and write ``line.json`` and ``line.png`` into an existing folder."""
    found = None if alignment is None else Alignment.load(alignment)
    measured = measure(
        pair.a,
        pair.b,
        data,
        points=points,
        loss=loss,
        refresh=refresh,
        alignment=found,
        generator=generator,
    )
    name = "without relabelling" if found is None else found.method
    picture = draw_line({split: curve.to_dict() for split, curve in measured.curves.items()}, name)
    console.write_json(folder / "line.json", measured.to_dict())
    (folder / "line.png").write_bytes(picture)
    return measured
