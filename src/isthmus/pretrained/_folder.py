"""Output folders: whole or not there at all."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from isthmus.errors import OutputError

__all__ = ["free_target", "output_folder"]

_ATTEMPTS = 10
"""Names tried for the hidden folder, should another run take one of them for abandoned."""


def free_target(path: str | os.PathLike[str], nbytes: int = 0) -> Path:
    """Return where a folder can be written, links followed; ask before long work.

    Args:
        path: the folder to write: new, or empty.
        nbytes: room that it will need, in bytes.

    Raises:
        OutputError: there is something already, or a mount point, or too little room on the disk.
    """
    target = Path(os.path.realpath(path))
    if os.path.lexists(target) and not (target.is_dir() and not any(target.iterdir())):
        raise OutputError(
            f"Cannot write {path}: it is there already. Remove it, or choose another folder; nothing was changed."
        )
    if target.is_dir() and os.path.ismount(target):
        raise OutputError(
            f"Cannot write {path}: it is a mount point, which no finished folder can replace. Name a new folder "
            f"inside it, such as {target / 'model'}; nothing was changed."
        )
    there = next(folder for folder in target.parents if folder.exists())
    free = shutil.disk_usage(there).free
    if free < nbytes:
        raise OutputError(
            f"Cannot write {path}: it needs {_gigabytes(nbytes)}, but the disk of {there} has "
            f"{_gigabytes(free)} free. Make room, or choose another disk; nothing was changed."
        )
    return target


def _gigabytes(nbytes: int) -> str:
    return f"{nbytes / 10**9:.3g} GB"


@contextlib.contextmanager
def output_folder(path: str | os.PathLike[str], nbytes: int = 0) -> Iterator[Path]:
    """Yield a hidden folder beside ``path`` to write to, and give it the name ``path`` if all went well.

    On any exception the hidden folder is removed. A process that is killed outright leaves it behind, named
    ``.<name>.<random>.partial``; the next run to the same ``path`` removes it and starts clean. A run that is
    still going on holds a lock of the system on its folder, which ends with the process.

    Args:
        path: the folder to write: new, or empty.
        nbytes: room that it will need, in bytes.

    Raises:
        OutputError: ``path`` is there already and is not an empty folder, or cannot be written.
    """
    partial: Path | None = None
    lock: int | None = None
    try:
        target = free_target(path, nbytes)
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(target)
        partial, lock = _locked_folder(target)
        yield partial
        _flush_all(partial)
        partial.replace(target)
        _flush(target.parent)
    except OutputError:
        raise
    except OSError as error:
        raise OutputError(
            f"Cannot write {path}: {error.strerror or error}. Check that the folder {Path(path).absolute().parent} "
            "is writable and has room; nothing was changed."
        ) from error
    finally:
        if partial is not None:
            shutil.rmtree(partial, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def _locked_folder(target: Path) -> tuple[Path, int | None]:
    """Make a hidden folder beside the target and lock it."""
    for _ in range(_ATTEMPTS):
        partial = target.with_name(f".{target.name}.{secrets.token_hex(4)}.partial")
        partial.mkdir()
        with contextlib.suppress(FileNotFoundError):  # removed by a run that found it before it was locked
            lock, held_elsewhere = _lock(partial)
            if not held_elsewhere and partial.exists():
                return partial, lock
            if lock is not None:
                os.close(lock)
    raise OutputError(
        f"Cannot write {target}: other runs keep removing its hidden folder. Let them finish, and run again."
    )


def _lock(folder: Path) -> tuple[int | None, bool]:
    """Lock a folder: the descriptor that holds the lock, None where there are no such locks; is it held already?"""
    try:
        import fcntl

        descriptor = os.open(folder, os.O_RDONLY)
    except (ImportError, PermissionError):  # no such locks, or (Windows) folders cannot be opened
        return None, False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return descriptor, True
    except OSError:  # a file system without them
        os.close(descriptor)
        return None, False
    return descriptor, False


def _remove_abandoned(target: Path) -> None:
    """Remove hidden folders of this target whose writers are gone; where that is unknown, leave them."""
    for folder in target.parent.glob(f".{_escaped(target.name)}.????????.partial"):
        with contextlib.suppress(FileNotFoundError):
            lock, held_elsewhere = _lock(folder)
            if lock is not None:
                if not held_elsewhere:
                    shutil.rmtree(folder, ignore_errors=True)
                os.close(lock)


def _escaped(name: str) -> str:
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)


def _flush_all(folder: Path) -> None:
    """Make a folder's contents last before it gets its name, or a power cut could leave empty files under it."""
    for path in (*folder.rglob("*"), folder):
        _flush(path)


def _flush(path: Path) -> None:
    """Make a file, or the names in a folder, last (where folders can be opened)."""
    with contextlib.suppress(PermissionError):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
