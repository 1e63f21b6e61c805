"""Links in a model folder: what they may lead to."""

from __future__ import annotations

import os
from pathlib import Path

from isthmus.errors import CheckpointError, printable

__all__ = ["require_inside", "roots_of"]

_REPOSITORIES = ("models--", "datasets--", "spaces--")


def roots_of(folder: Path) -> tuple[Path, ...]:
    """Return the folders, all links followed, below which the files of a model folder may really lie.

    That is the folder itself and, for a snapshot in the hub's cache (``models--org--name/snapshots/<revision>``, whose
    files are links to ``../../blobs``), the folder of this one repository in the cache.
    """
    real = Path(os.path.realpath(folder))
    for above in (real, *real.parents):
        if above.parent.name == "snapshots" and above.parent.parent.name.startswith(_REPOSITORIES):
            return real, above.parent.parent
    return (real,)


def require_inside(path: Path, roots: tuple[Path, ...]) -> Path:
    """Return where a file or folder really lies.

    What lies elsewhere may be anything of the reader's own, such as keys and passwords, and a result made of it may be
    published; so only what belongs to the model is read.

    Raises:
        CheckpointError: a link leads outside of ``roots``.
    """
    real = Path(os.path.realpath(path))
    if not any(real.is_relative_to(root) for root in roots):
        what = "the folder " if real.is_dir() else ""
        raise CheckpointError(
            f"{printable(path)}: is a link to {what}{printable(real)}, outside the model folder, which is not read. "
            "Put the file or folder itself there, or remove the link."
        )
    return real
