"""Write a report: all of it is made in memory first, so a failure leaves nothing half-written."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from isthmus.errors import CheckpointError, OutputError
from isthmus.report._draw_layers import cost_picture, descent_picture, dimension_picture
from isthmus.report._draw_lines import accuracy_picture, barrier_picture, loss_picture
from isthmus.report._draw_relabelling import relabelling_picture
from isthmus.report._format import best_method
from isthmus.report._page import page
from isthmus.report._panels import Picture, png, render, tile
from isthmus.report._record import Record, StoredRelabelling, check_arrays, check_record

__all__ = ["unwritable", "write_report"]


def write_report(
    record: Mapping[str, Any], arrays: Mapping[str, Any], out_dir: str | Path, *, pictured: str | None = None
) -> dict[str, Path]:
    """Write ``report.html`` and its figures as PNG files into a folder.

    The page is self-contained: it opens from disk, loads nothing, and holds every figure. Files of the same
    names are replaced, each in one step, once all of them could be written.

    Args:
        record: a result record, see :class:`isthmus.report.Record`.
        arrays: ``similarity/<group>``, ``permutation/<method>/<group>`` and, where more than permutations acts,
            ``factors/…``, ``spectrum/…`` and ``after/<method>/<group>``, as stored in ``relabelling.npz``.
        out_dir: the folder; made if it does not exist.
        pictured: the method whose relabelling is drawn; by default the one with the lowest barrier.

    Returns:
        The path of every file by name, ``report``, ``loss`` and ``barriers`` always, ``accuracy``,
        ``matched-cost``, ``dimension``, ``relabelling`` and ``descent`` where the record has what they show.

    Raises:
        CheckpointError: the record or an array does not fit the schema.
        OutputError: the folder cannot be written.
        MissingExtraError: matplotlib or jinja2 is not installed.
    """
    clean = check_record(record)
    relabelling = check_arrays(clean, arrays)
    if pictured is not None and pictured not in clean["methods"]:
        raise CheckpointError(
            f"drawing the relabelling of {pictured!r}: expected a method of the record, "
            f"{list(clean['methods'])}. Pass one of these as pictured, or leave it out."
        )
    drawn = [
        (picture, [render(panel) for panel in picture.panels])
        for picture in _pictures(clean, relabelling, pictured)
    ]
    files = {
        picture.name: (f"{picture.name}.png", png(tile(images, picture.columns))) for picture, images in drawn
    }
    html = page(clean, [(picture, [png(image) for image in images]) for picture, images in drawn])
    return _write_together(Path(out_dir), {"report": ("report.html", html.encode("utf-8")), **files})


def _pictures(record: Record, relabelling: StoredRelabelling, pictured: str | None) -> list[Picture]:
    method = pictured or best_method(record) or "none"
    pictures = [
        loss_picture(record),
        barrier_picture(record),
        accuracy_picture(record),
        relabelling_picture(record, relabelling, method),
        cost_picture(record),
        dimension_picture(record),
        descent_picture(record),
    ]
    return [picture for picture in pictures if picture is not None]


def _write_together(folder: Path, files: Mapping[str, tuple[str, bytes]]) -> dict[str, Path]:
    """Write all files under temporary names, then give them their own once every content is safe."""
    paths = {key: folder / name for key, (name, _) in files.items()}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with ExitStack() as unfinished:
            ready: list[tuple[Path, Path]] = []
            for key, (name, content) in files.items():
                part = folder / f".{name}.{os.getpid()}.part"
                unfinished.callback(part.unlink, missing_ok=True)
                part.write_bytes(content)
                ready.append((part, paths[key]))
            for part, path in ready:
                part.replace(path)
    except OSError as error:
        raise unwritable(folder, error) from error
    return paths


def unwritable(folder: Path, error: OSError) -> OutputError:
    """Return the error of a report that cannot be written to a folder."""
    return OutputError(
        f"Writing the report to {folder}: {error.strerror or error}. No file was left half-written. "
        "Choose a folder that can be written and has space."
    )
