"""Reading some files of an archive in memory: nothing is unpacked onto the disk, and no link is followed."""

from __future__ import annotations

import gzip
import tarfile
from collections.abc import Collection
from pathlib import Path, PurePosixPath
from typing import IO, Any

from isthmus.errors import DataError
from isthmus.training._raw import MOST_BYTES

__all__ = ["read_members"]

_MOST_MEMBERS = 1000
"""Of an archive; the published ones have ten."""

_GZIP_HEAD = b"\x1f\x8b"


def read_members(archive: Path, wanted: Collection[str]) -> dict[str, bytes]:
    """Return the contents of the wanted files of a tar archive, zipped (gzip) or not, by their last names.

    Args:
        archive: the archive.
        wanted: names without folders.

    Raises:
        DataError: the archive is truncated or damaged, unzips to more than :data:`MOST_BYTES`, or a wanted file is a
            link or a device, lies outside the archive's folder, or occurs twice.
    """
    try:
        with archive.open("rb") as file:
            zipped = file.read(len(_GZIP_HEAD)) == _GZIP_HEAD
            file.seek(0)
            stream: Any = gzip.GzipFile(fileobj=file) if zipped else file
            bounded: Any = _LimitedFile(stream, archive)
            with tarfile.open(fileobj=bounded, mode="r:") as tar:
                return _read(tar, archive, wanted)
    except DataError:
        raise
    except Exception as error:  # a damaged archive makes the reader fail in any way at all
        raise DataError(f"{archive}: truncated or damaged archive: {error}. Get it again.") from error


def _read(tar: tarfile.TarFile, archive: Path, wanted: Collection[str]) -> dict[str, bytes]:
    contents: dict[str, bytes] = {}
    for count, member in enumerate(tar, 1):
        if count > _MOST_MEMBERS:
            raise DataError(
                f"{archive}: expected at most {_MOST_MEMBERS} members, found more. Is it this data set?"
            )
        path = PurePosixPath(member.name)
        if path.name not in wanted:
            continue
        if not member.isreg() or member.issparse() or path.is_absolute() or ".." in path.parts:
            raise DataError(
                f"{archive}: expected {path.name} to be an ordinary file inside the archive, found {member.name!r}, "
                f"{_kind(member)}. Get the published archive."
            )
        if path.name in contents:
            raise DataError(f"{archive}: holds {path.name} twice. Get the published archive.")
        file = tar.extractfile(member)
        assert file is not None, "it is an ordinary file"
        contents[path.name] = file.read()
        if len(contents[path.name]) != member.size:
            raise DataError(
                f"{archive}: truncated or damaged archive: {path.name} ends too early. Get it again."
            )
    return contents


def _kind(member: tarfile.TarInfo) -> str:
    kinds = {"a symbolic link": member.issym(), "a hard link": member.islnk(), "a folder": member.isdir()}
    kinds |= {"a device": member.isdev(), "a sparse file": member.issparse()}
    return next((kind for kind, true in kinds.items() if true), "a file outside its folder")


class _LimitedFile:
    """A file of which no more may be read than :data:`MOST_BYTES`, whatever its headers promise."""

    def __init__(self, stream: IO[bytes], archive: Path) -> None:
        self._stream, self._archive, self.name = stream, archive, str(archive)

    def read(self, size: int) -> bytes:
        self._check(self.tell() + size)
        return self._stream.read(size)

    def seek(self, place: int) -> int:
        self._check(place)
        return self._stream.seek(place)

    def tell(self) -> int:
        return self._stream.tell()

    def _check(self, end: int) -> None:
        if not 0 <= end <= MOST_BYTES:
            raise DataError(
                f"{self._archive}: expected at most {MOST_BYTES:,} bytes, unzipped, found a member that ends at "
                f"{end:,}. Is it this data set?"
            )
