"""Downloads that survive bad lines: mirrors, retries, resumption, and a checksum before anything is used."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from isthmus.errors import DataError, MissingExtraError

__all__ = ["OnProgress", "RemoteFile", "fetch"]

OnProgress = Callable[[str, int, int | None], None]
"""Called with the file's name, the bytes there are, and the bytes expected (``None`` when unknown)."""

_CHUNK = 1 << 16
# Seconds to connect, and between two chunks.
_TIMEOUT = (10.0, 30.0)


@dataclass(frozen=True)
class RemoteFile:
    """A file to be had from any of several places.

    Attributes:
        name: file name.
        md5: checksum, hexadecimal.
        mirrors: base addresses, ending in ``/``, tried in order.
    """

    name: str
    md5: str
    mirrors: tuple[str, ...]


def fetch(
    file: RemoteFile,
    folder: Path,
    *,
    on_progress: OnProgress | None = None,
    attempts: int = 3,
    pause: float = 1.0,
) -> Path:
    """Return the path of a file in ``folder``, downloading it if it is not there or not intact.

    A dropped connection is resumed where it broke, by the same or the next mirror. Nothing appears under the
    file's name before its checksum is right. Two processes that want the same file wait for each other.

    Args:
        file: what to get.
        folder: where to keep it; made if missing.
        on_progress: told how far the download is.
        attempts: rounds over all mirrors.
        pause: seconds before the second round, doubled before each further one.

    Raises:
        DataError: every mirror failed every time (each reason is given), or the folder cannot be written to.
        MissingExtraError: pooch is missing.
    """
    pooch, requests, urllib3, filelock = _tools()
    partial = folder / f".{file.name}.part"
    reasons: dict[str, str] = {}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(folder / f".{file.name}.lock"), _quiet(pooch):
            for attempt in range(attempts):
                if attempt:
                    time.sleep(pause * 2 ** (attempt - 1))
                for mirror in file.mirrors:
                    try:
                        found = pooch.retrieve(
                            mirror + file.name,
                            known_hash=f"md5:{file.md5}",
                            fname=file.name,
                            path=folder,
                            downloader=_ResumingDownloader(file.name, partial, on_progress),
                        )
                        return Path(found)
                    except (requests.RequestException, urllib3.exceptions.HTTPError, ValueError) as error:
                        reasons[mirror] = _reason(error)
    except OSError as error:
        raise DataError(
            f"Cannot keep {file.name} in {folder}: {error.strerror or error}. "
            "Check that the folder is writable and has room, or give another data folder."
        ) from error
    tried = "".join(f"\n  {mirror}: {reason}" for mirror, reason in reasons.items())
    raise DataError(
        f"Could not download {file.name} in {attempts} rounds over {len(file.mirrors)} places:{tried}\n"
        f"Without a network, put the file (MD5 {file.md5}) into {folder}, or give a data folder that has it."
    )


class _ResumingDownloader:
    """Downloader for pooch that keeps what it has in ``partial`` and asks only for the rest."""

    def __init__(self, name: str, partial: Path, on_progress: OnProgress | None) -> None:
        self.name, self.partial, self.on_progress = name, partial, on_progress

    def __call__(self, url: str, output_file: str, pooch: Any, check_only: bool = False) -> None:
        """Fetch ``url`` into ``output_file``."""
        import requests

        have = self.partial.stat().st_size if self.partial.exists() else 0
        # Without this header some servers zip the zipped file once more.
        headers = {"Accept-Encoding": "identity"}
        if have:
            headers["Range"] = f"bytes={have}-"
        with requests.get(url, headers=headers, stream=True, timeout=_TIMEOUT) as response:
            if response.status_code == requests.codes.requested_range_not_satisfiable:
                # What is kept is longer than the file: not a part of it. The next attempt starts afresh.
                self.partial.unlink()
            response.raise_for_status()
            resumed = response.headers.get("Content-Range", "").startswith(f"bytes {have}-") and have > 0
            have = have if resumed else 0
            length = response.headers.get("Content-Length")
            total = None if length is None else have + int(length)
            with self.partial.open("ab" if resumed else "wb") as kept:
                for chunk in response.raw.stream(_CHUNK, decode_content=False):
                    kept.write(chunk)
                    have += len(chunk)
                    if self.on_progress is not None:
                        self.on_progress(self.name, have, total)
        if total is not None and have < total:
            raise requests.ConnectionError(f"the connection was dropped after {have} of {total} bytes")
        self.partial.replace(output_file)


def _reason(error: Exception) -> str:
    text = f"{type(error).__name__}: {error}".splitlines()[0]
    if isinstance(error, ValueError) and "hash" in text:
        return "wrong checksum: the file there is damaged or another one"
    if "NameResolutionError" in text:
        return "the host cannot be found; is there a network?"
    # Errors of requests repeat the address and the library's internals; the system's own words are inside.
    system = re.findall(r"\[Errno -?\d+\] ([\w ,]+)", text)
    if system:
        return system[-1]
    return text if len(text) <= 200 else text[:200] + "…"


@contextmanager
def _quiet(pooch: Any) -> Iterator[None]:
    """Keep pooch's own messages off the terminal; progress is reported through the callback."""
    logger: logging.Logger = pooch.get_logger()
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _tools() -> Sequence[Any]:
    try:
        import filelock
        import pooch
        import requests
        import urllib3
    except ImportError as error:
        raise MissingExtraError(
            'Downloading data sets needs pooch: pip install "isthmus[study]", or give a data folder.'
        ) from error
    return pooch, requests, urllib3, filelock
