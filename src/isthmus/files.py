"""Files: written whole or not at all, read only where they are ordinary files, and recognised again.

Whatever is written goes to a fresh name beside its target and is renamed, so that a full disk, a crash or Ctrl-C
leaves either the old file or the new one, never half of it. Whatever is read may have been made by somebody who
means harm: no pipe is waited for, no text is read beyond a bound, and no nesting goes deeper than one.
"""

from __future__ import annotations

import errno
import json
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from isthmus.errors import CheckpointError, IsthmusError, OutputError, printable

__all__ = [
    "Identity",
    "atomic_folder",
    "atomic_path",
    "identity_of",
    "parse_json",
    "read_json",
    "read_text",
    "refuse_overwriting",
    "require_file",
    "require_utf8",
]

# What a full or read-only disk answers.
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
_LARGEST_TEXT = 32 * 2**20
"""Bytes of a text file that are read unless a caller knows better: an index of 300,000 tensors has about as many."""
_DEEPEST = 64
"""Levels of JSON: the files that are read here have about ten."""
_LARGEST_VALUE = 100
"""Characters of a value that are shown in a message."""
_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}
# A string, closed or not, or one bracket.
_BRACKETS = re.compile(r'"(?:[^"\\]|\\.)*+(?:"|\Z)|[\[\]{}]', re.DOTALL)


# --- Reading -------------------------------------------------------------------------------------------------


class Identity(NamedTuple):
    """Which file a path led to, and in which state: equal ones mean that nobody replaced or changed it."""

    device: int
    inode: int
    size: int
    changed: int
    """Time of the last change, nanoseconds."""


def identity_of(path: str | os.PathLike[str]) -> Identity:
    """Return the identity of the file that a path leads to.

    Raises:
        OSError: there is none.
    """
    found = os.stat(path)
    return Identity(found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)


def require_file(path: str | os.PathLike[str], what: str = "checkpoint") -> Path:
    """Return a path that leads to an ordinary file which may be read and is not empty.

    Opening a pipe waits for ever and reading a device may never end, so the kind is looked at before.

    Args:
        path: to look at; links are followed.
        what: how a message calls the file.

    Raises:
        CheckpointError: there is nothing, a folder, a pipe, a socket or a device, no right to read, or no content.
    """
    target, shown = Path(path), printable(path)
    try:
        found = target.stat()
    except (FileNotFoundError, NotADirectoryError) as error:
        if target.is_symlink():
            raise CheckpointError(
                f"{shown}: is a link to {printable(os.readlink(target))}, which is not there. Copy the {what} again, "
                "or correct the link."
            ) from error
        raise CheckpointError(f"{shown}: no such file. Check the path of the {what}.") from error
    except (OSError, ValueError) as error:  # too long, a circle of links, a null character
        reason = getattr(error, "strerror", None) or error
        raise CheckpointError(f"{shown}: cannot be read: {reason}. Check the path of the {what}.") from error
    kind = stat.S_IFMT(found.st_mode)
    if kind == stat.S_IFDIR:
        raise CheckpointError(f"{shown}: cannot be read: Is a directory. Give the file of the {what}.")
    if kind != stat.S_IFREG:
        raise CheckpointError(
            f"{shown}: is {_KINDS.get(kind, 'no ordinary file')}, which is not read. Write the {what} to an ordinary "
            "file first."
        )
    try:
        with target.open("rb") as file:
            empty = not file.read(1)
    except OSError as error:
        raise CheckpointError(
            f"{shown}: cannot be read: {error.strerror}. Give a readable {what} file."
        ) from error
    if empty:
        raise CheckpointError(f"{shown}: is empty. The file was not written to the end; make it again.")
    return target


def require_utf8(path: str | os.PathLike[str]) -> None:
    """Check that a path is text, as the library of safetensors needs it; on some systems it may be any bytes.

    Raises:
        CheckpointError: it is not.
    """
    try:
        os.fspath(path).encode("utf-8")
    except UnicodeEncodeError as error:
        raise CheckpointError(
            f"{printable(path)}: this path is no text in UTF-8, which safetensors needs. Rename the file or folder."
        ) from error


def read_text(path: str | os.PathLike[str], *, largest: int = _LARGEST_TEXT, what: str = "file") -> str:
    """Read a text file in UTF-8 (a byte order mark is left out), up to a size.

    Args:
        path: an ordinary file.
        largest: bytes that are read.
        what: how a message calls the file.

    Raises:
        CheckpointError: no ordinary file (see :func:`require_file`), a larger one, or no UTF-8.
    """
    target, shown = require_file(path, what), printable(path)
    with target.open("rb") as file:
        content = file.read(largest + 1)
    if len(content) > largest:
        size = target.stat().st_size
        raise CheckpointError(
            f"{shown}: has {max(size, len(content)):,} bytes; of a {what} at most {largest:,} are read. It is not what "
            "its name says, or damaged; copy it again."
        )
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise CheckpointError(
            f"{shown}: cannot be read as text in UTF-8: byte {error.start} is {content[error.start]:#04x}. Copy the "
            f"{what} again, or save it as UTF-8."
        ) from error


def parse_json(text: str, name: str, *, deepest: int = _DEEPEST, allow_infinite: bool = False) -> Any:
    """Parse JSON that somebody else wrote, in bounded time and memory.

    Args:
        text: the JSON.
        name: of the file, for messages.
        deepest: levels of lists and objects.
        allow_infinite: whether ``NaN`` and ``Infinity``, which JSON does not have, are taken as Python writes them.

    Raises:
        CheckpointError: no JSON, nested deeper, a key that one object holds twice, or a number that is none.
    """
    shown = printable(name)
    if (depth := _depth(text)) > deepest:
        raise CheckpointError(
            f"{shown}: cannot be read as JSON: it is nested {depth} levels deep, at most {deepest} are read. It is "
            "damaged or not what its name says; copy it again."
        )

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            seen: set[str] = set()
            twice = next(k for k, _ in pairs if k in seen or seen.add(k))
            raise CheckpointError(
                f"{shown}: holds the key {printable(twice, _LARGEST_VALUE)!r} twice in one object, so it is unknown "
                "which of them counts. Copy it again, or remove one."
            )
        return found

    def constant(text: str) -> float:
        if not allow_infinite:
            raise CheckpointError(
                f"{shown}: holds the number {text}, which JSON does not have. Write a finite number."
            )
        return float(text)

    try:
        return json.loads(text, object_pairs_hook=once, parse_constant=constant)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{shown}: cannot be read as JSON: {printable(error)}. Copy it again."
        ) from error


def read_json(
    path: str | os.PathLike[str],
    *,
    largest: int = _LARGEST_TEXT,
    deepest: int = _DEEPEST,
    allow_infinite: bool = False,
    what: str = "file",
) -> Any:
    """Read a JSON file that somebody else wrote (see :func:`read_text` and :func:`parse_json`)."""
    text = read_text(path, largest=largest, what=what)
    return parse_json(text, str(path), deepest=deepest, allow_infinite=allow_infinite)


def _depth(text: str) -> int:
    """Return how deep brackets are nested, outside of strings."""
    depth = deepest = 0
    for match in _BRACKETS.finditer(text):
        first = match[0][0]
        if first in "[{":
            depth += 1
            deepest = max(deepest, depth)
        elif first in "]}":
            depth -= 1
    return deepest


# --- Writing -------------------------------------------------------------------------------------------------


def refuse_overwriting(
    out: str | os.PathLike[str], inputs: Iterable[str | os.PathLike[str]], *, folder: bool = False
) -> None:
    """Check that what will be written is none of the inputs; ask before long work.

    Links, hard links and other spellings of a path are seen through.

    Args:
        out: a file, or a folder, that will be written.
        inputs: files and folders that are read.
        folder: whether ``out`` is a folder.

    Raises:
        OutputError: ``out`` is an input or a file of an input folder, or a folder inside an input folder.
    """
    for given in inputs:
        source = Path(given)
        if not _is_input(Path(out), source, folder):
            continue
        where = f"the input {printable(source)}"
        if not _same(Path(out), source):
            where = f"a file of {where}" if not folder else f"inside {where}"
        raise OutputError(
            f"Cannot write {printable(out)}: it is {where}, which would be lost or mixed up with the result. Choose "
            "another name; nothing was changed."
        )


def _is_input(out: Path, source: Path, folder: bool) -> bool:
    if _same(out, source):
        return True
    if not source.is_dir():
        return False
    if folder:
        return Path(os.path.realpath(out)).is_relative_to(os.path.realpath(source))
    return out.is_file() and any(_same(out, f) for f in source.rglob("*") if f.is_file())


def _same(a: Path, b: Path) -> bool:
    try:
        return os.path.samefile(a, b)
    except (OSError, ValueError):  # one of them is not there: then they are one only by the same name
        return os.path.realpath(a) == os.path.realpath(b)


@contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a fresh file beside ``path`` to write to, and put it in place of ``path`` if all went well.

    On any exception, Ctrl-C included, the fresh file is removed and ``path`` is as it was before.

    Raises:
        OutputError: the folder is missing, read-only or full (any ``OSError`` while writing), or ``path`` is a pipe, a
            socket or a device, which a file must not replace.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with atomic_path(f"{folder}/result.json") as temporary:
        ...         _ = temporary.write_text("{}")
        ...     sorted(os.listdir(folder))
        ['result.json']
    """
    target = Path(path)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    _refuse_special(target)
    try:
        temporary.open("xb").close()
        yield temporary
        with temporary.open("rb+") as written:
            os.fsync(written.fileno())
        temporary.replace(target)
    except OSError as error:
        raise OutputError(
            f"Cannot write {printable(target)}: {error.strerror or error}. Check that the folder "
            f"{printable(target.parent)} exists, is writable and has room; nothing was changed."
        ) from error
    finally:
        _remove(temporary)


def _refuse_special(target: Path) -> None:
    try:
        kind = stat.S_IFMT(target.lstat().st_mode)
    except (OSError, ValueError):  # not there: the usual case, or the folder says why when it is written to
        return
    if kind not in (stat.S_IFREG, stat.S_IFLNK, stat.S_IFDIR):
        raise OutputError(
            f"Cannot write {printable(target)}: it is {_KINDS.get(kind, 'no ordinary file')}, which a file would "
            "replace. Choose another name; nothing was changed."
        )


@contextmanager
def atomic_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a fresh folder to write files to, and move them all into the folder ``path`` if all went well.

    The fresh folder lies inside ``path``, which is made if need be, so that a folder that cannot be written is
    found before any work is done. On any exception, Ctrl-C included, ``path`` is as it was before. Files of the same
    names are replaced, once every new file is there.

    Raises:
        OutputError: the folder cannot be made or written, or is full.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with atomic_folder(f"{folder}/results") as temporary:
        ...         _ = (temporary / "a.json").write_text("{}")
        ...     sorted(os.listdir(f"{folder}/results"))
        ['a.json']
    """
    target = Path(path)
    made = [folder for folder in (target, *target.parents) if not folder.exists()]
    staging = target / f".isthmus-{os.getpid()}-{secrets.token_hex(4)}.tmp"
    try:
        with _writing(target):
            target.mkdir(parents=True, exist_ok=True)
            staging.mkdir()
        try:
            yield staging
        except OSError as error:
            if isinstance(error, IsthmusError) or error.errno not in _NO_ROOM:
                raise
            raise _unwritable(target, error) from error
        with _writing(target):
            for file in sorted(f for f in staging.rglob("*") if f.is_file()):
                place = target / file.relative_to(staging)
                place.parent.mkdir(parents=True, exist_ok=True)
                file.replace(place)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        for folder in made:
            _remove_if_empty(folder)


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise _unwritable(folder, error) from error


def _unwritable(folder: Path, error: OSError) -> OutputError:
    return OutputError(
        f"Cannot write to the output folder {printable(folder)}: {error.strerror or error}. "
        "Make room, allow writing, or choose another folder; nothing was changed."
    )


def _remove_if_empty(folder: Path) -> None:
    try:
        folder.rmdir()
    except OSError:  # results are in it, or it was never made
        return


def _remove(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError:  # the folder itself is gone or was never there: nothing to remove
        return
