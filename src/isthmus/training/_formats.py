"""File formats of image data sets: IDX, CIFAR batches (binary and Python) and Hugging Face parquet.

Every reader returns ``(pixels, labels)``: uint8 of shape ``(n, channels, height, width)`` and int64 of shape
``(n,)``. Sizes that a file promises are compared with what is there, and with a limit, before memory is
taken for them.
"""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from isthmus.errors import DataError
from isthmus.training._parquet import read_parquet
from isthmus.training._pickle import PlainReader, StoredArray
from isthmus.training._raw import MOST_BYTES, Raw

__all__ = [
    "Raw",
    "read_bytes",
    "read_cifar_binary",
    "read_cifar_pickle",
    "read_idx",
    "read_parquet",
]

_GZIP_HEAD = b"\x1f\x8b"
_IDX_UBYTE = 0x08
_CIFAR_PIXELS = 3 * 32 * 32
_CHUNK = 1 << 20


def read_bytes(path: Path, most: int = MOST_BYTES) -> bytes:
    """Return the content of a file, unzipped when it is gzip (told by its first bytes, not by its name).

    Args:
        path: the file.
        most: bytes that the content may have; a file that unzips to more is not read to its end.

    Raises:
        DataError: the file cannot be read, is empty or too large, or is a truncated or damaged gzip file.
    """
    try:
        with path.open("rb") as file:
            zipped = file.read(len(_GZIP_HEAD)) == _GZIP_HEAD
            file.seek(0)
            content = _up_to(gzip.GzipFile(fileobj=file), most) if zipped else file.read(most + 1)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(
            f"{path}: truncated or damaged gzip file: {error}. Delete it and get it again."
        ) from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}. Check the data folder.") from error
    if len(content) > most:
        raise DataError(
            f"{path}: expected at most {most:,} bytes{', unzipped' if zipped else ''}, found more. "
            "Is it a file of this data set?"
        )
    if not content:
        raise DataError(f"{path}: is empty. Delete it and get it again.")
    return content


def _up_to(file: gzip.GzipFile, most: int) -> bytes:
    """Read one byte more than allowed at most, piece by piece: few bytes can unzip to very many."""
    content = bytearray()
    while len(content) <= most and (chunk := file.read(min(_CHUNK, most + 1 - len(content)))):
        content += chunk
    return bytes(content)


def read_idx(content: bytes, name: str, dimensions: int) -> NDArray[np.uint8]:
    """Read an IDX file of unsigned bytes, the format of MNIST.

    The header is two zero bytes, the type (8 for unsigned bytes), the number of dimensions, then each length
    as a big-endian 32-bit integer.

    Args:
        content: the unzipped file.
        name: how errors call it.
        dimensions: 3 for images, 1 for labels.

    Raises:
        DataError: a wrong magic number, or another number of bytes than the header promises.
    """
    magic = int.from_bytes(content[:4], "big")
    expected = (_IDX_UBYTE << 8) + dimensions
    if len(content) < 4 or magic != expected:
        raise DataError(
            f"{name}: expected an IDX file of {dimensions}-dimensional bytes (magic number "
            f"0x{expected:08x}), found 0x{magic:08x}. Were images and labels exchanged, or is it "
            "another format?"
        )
    header = 4 + 4 * dimensions
    if len(content) < header:
        raise DataError(f"{name}: truncated IDX header. Delete the file and get it again.")
    shape = struct.unpack(f">{dimensions}I", content[4:header])
    found, promised = len(content) - header, math.prod(shape)  # exact: products beyond 64 bits must not wrap
    if found != promised:
        raise DataError(
            f"{name}: expected {promised} bytes for shape {shape}, found {found}. "
            "The file is truncated or damaged; delete it and get it again."
        )
    if 0 in shape[1:]:
        raise DataError(f"{name}: expected images of at least one pixel, found shape {shape}.")
    try:
        return np.frombuffer(content, np.uint8, offset=header).reshape(shape)
    except ValueError as error:  # no images, each of more pixels than NumPy can count
        raise DataError(f"{name}: expected images, found shape {shape}. Get the file again.") from error


def read_cifar_binary(content: bytes, name: str, label_bytes: int) -> Raw:
    """Read one CIFAR batch in binary form: records of label bytes and 3 × 32 × 32 pixels.

    Args:
        content: the file.
        name: how errors call it.
        label_bytes: 1 for CIFAR-10, 2 for CIFAR-100 (coarse, then fine; the fine label is returned).

    Raises:
        DataError: no whole number of records.
    """
    record = label_bytes + _CIFAR_PIXELS
    if not content or len(content) % record:
        raise DataError(
            f"{name}: expected records of {record} bytes, found {len(content)} bytes. "
            "The file is truncated or damaged; delete it and get it again."
        )
    table = np.frombuffer(content, np.uint8).reshape(-1, record)
    return table[:, label_bytes:].reshape(-1, 3, 32, 32), table[:, label_bytes - 1].astype(np.int64)


def read_cifar_pickle(content: bytes, name: str, label_key: str) -> Raw:
    """Read one CIFAR batch in Python form, through an unpickler that can only build arrays.

    Args:
        content: the file.
        name: how errors call it.
        label_key: ``"labels"`` for CIFAR-10, ``"fine_labels"`` for CIFAR-100.

    Raises:
        DataError: the pickle asks for anything else, is damaged, or has other entries.
    """
    try:
        batch = PlainReader(content).load()
    except Exception as error:  # a damaged pickle makes the reader fail in any way at all
        raise DataError(
            f"{name}: not a CIFAR batch, refused or damaged: {error}. Delete the file and get it again."
        ) from error
    entries = batch if isinstance(batch, dict) else {}
    pixels, labels = entries.get(b"data"), entries.get(label_key.encode())
    if (
        not isinstance(pixels, StoredArray)
        or not isinstance(labels, list)
        or pixels.kind != "u1"
        or pixels.shape != (len(labels), _CIFAR_PIXELS)
        or len(pixels.content) != math.prod(pixels.shape)
    ):
        raise DataError(
            f"{name}: expected 'data' of n × {_CIFAR_PIXELS} bytes and n '{label_key}', found something "
            "else. Is it a batch of another data set?"
        )
    if any(type(number) is not int or not 0 <= number < 2**31 for number in labels):
        raise DataError(
            f"{name}: expected '{label_key}' to be numbers from 0, found others. Get the file again."
        )
    table = np.frombuffer(pixels.content, np.uint8).reshape(
        pixels.shape, order="F" if pixels.fortran else "C"
    )
    return np.ascontiguousarray(table).reshape(-1, 3, 32, 32), np.asarray(labels, dtype=np.int64)
