"""File formats of image data sets: IDX, CIFAR batches (binary and Python) and Hugging Face parquet.

Every reader returns ``(pixels, labels)``: uint8 of shape ``(n, channels, height, width)`` and int64 of shape
``(n,)``. Nothing here unpickles anything but arrays, lists, strings and numbers.
"""

from __future__ import annotations

import gzip
import io
import pickle
import struct
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from isthmus.errors import DataError, MissingExtraError

__all__ = [
    "Raw",
    "read_bytes",
    "read_cifar_binary",
    "read_cifar_pickle",
    "read_idx",
    "read_parquet",
]

Raw = tuple[NDArray[np.uint8], NDArray[np.int64]]

_GZIP_HEAD = b"\x1f\x8b"
_IDX_UBYTE = 0x08
_CIFAR_PIXELS = 3 * 32 * 32


def read_bytes(path: Path) -> bytes:
    """Return the content of a file, unzipped when it is gzip (told by its first bytes, not by its name).

    Raises:
        DataError: the file cannot be read, is empty, or is a truncated or damaged gzip file.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}. Check the data folder.") from error
    if content.startswith(_GZIP_HEAD):
        try:
            content = gzip.decompress(content)
        except (EOFError, OSError, zlib.error) as error:
            raise DataError(
                f"{path}: truncated or damaged gzip file: {error}. Delete it and get it again."
            ) from error
    if not content:
        raise DataError(f"{path}: is empty. Delete it and get it again.")
    return content


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
    found, promised = len(content) - header, int(np.prod(shape, dtype=np.int64))
    if found != promised:
        raise DataError(
            f"{name}: expected {promised} bytes for shape {shape}, found {found}. "
            "The file is truncated or damaged; delete it and get it again."
        )
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape)


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


class _ArraysOnly(pickle.Unpickler):
    """An unpickler that knows NumPy arrays and nothing else that could run code."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("numpy", "ndarray"):
            return np.ndarray
        if (module, name) == ("numpy", "dtype"):
            return np.dtype
        # "numpy.core.multiarray" in old files, "numpy._core.multiarray" in new ones.
        if module.startswith("numpy.") and module.endswith("core.multiarray") and name == "_reconstruct":
            return np.empty(0).__reduce__()[0]
        if (module, name) == ("_codecs", "encode"):
            return _encode
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


def _encode(text: str, encoding: str) -> bytes:
    return text.encode(encoding)


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
        batch = _ArraysOnly(io.BytesIO(content), encoding="bytes").load()
    except Exception as error:  # a damaged pickle makes the reader fail in any way at all
        raise DataError(
            f"{name}: not a CIFAR batch, refused or damaged: {error}. Delete the file and get it again."
        ) from error
    pixels = batch.get(b"data") if isinstance(batch, dict) else None
    labels = batch.get(label_key.encode()) if isinstance(batch, dict) else None
    if (
        not isinstance(pixels, np.ndarray)
        or pixels.dtype != np.uint8
        or pixels.shape[1:] != (_CIFAR_PIXELS,)
        or not isinstance(labels, list)
        or len(labels) != len(pixels)
    ):
        raise DataError(
            f"{name}: expected 'data' of n × {_CIFAR_PIXELS} bytes and n '{label_key}', found something "
            "else. Is it a batch of another data set?"
        )
    return pixels.reshape(-1, 3, 32, 32), np.asarray(labels, dtype=np.int64)


def read_parquet(
    paths: Sequence[Path], channels: int, label_columns: Sequence[str] = ("label", "fine_label", "labels")
) -> tuple[Raw, str]:
    """Read images that Hugging Face ``datasets`` stored as parquet: a struct of encoded bytes, and a label.

    Args:
        paths: the shards, in order.
        channels: 1 to decode as grey, 3 as RGB.
        label_columns: names to try, in order.

    Returns:
        ``((pixels, labels), encoding)``, with the name of the images' encoding, such as ``"JPEG"``.

    Raises:
        DataError: not parquet, no such columns, an image that cannot be decoded, or images of unequal size.
        MissingExtraError: pyarrow or pillow is missing.
    """
    pyarrow, parquet, open_image = _parquet_tools()
    pixels: list[NDArray[np.uint8]] = []
    labels: list[NDArray[np.int64]] = []
    encoding = ""
    for path in paths:
        try:
            table = parquet.read_table(path)
        except (pyarrow.ArrowException, OSError) as error:
            raise DataError(f"{path}: truncated or not a parquet file: {error}. Get it again.") from error
        images = _column(table, ("img", "image"), path)
        if pyarrow.types.is_struct(images.type):
            images = images.combine_chunks().field("bytes")
        column = _column(table, label_columns, path).to_numpy()
        if column.dtype.kind not in "iu":
            raise DataError(f"{path}: expected integer labels, found {column.dtype}.")
        labels.append(column.astype(np.int64))
        for row, encoded in enumerate(images.to_pylist()):
            try:
                with open_image(io.BytesIO(encoded)) as image:
                    encoding = encoding or str(image.format)
                    pixels.append(np.asarray(image.convert("L" if channels == 1 else "RGB")))
            except (OSError, TypeError, ValueError) as error:
                raise DataError(
                    f"{path}: the image in row {row} cannot be decoded: {error}. Get the file again."
                ) from error
            if pixels[-1].shape != pixels[0].shape:
                raise DataError(
                    f"{path}: images of unequal size: {pixels[0].shape[:2]} in row 0, "
                    f"{pixels[-1].shape[:2]} in row {row}. Only data sets of one image size can be read."
                )
    if not pixels:
        raise DataError(f"{paths[0] if paths else 'parquet'}: holds no images.")
    stacked = np.stack(pixels)
    stacked = stacked[:, None] if channels == 1 else np.ascontiguousarray(stacked.transpose(0, 3, 1, 2))
    return (stacked, np.concatenate(labels)), encoding


def _column(table: Any, names: Sequence[str], path: Path) -> Any:
    found = next((n for n in names if n in table.column_names), None)
    if found is None:
        raise DataError(
            f"{path}: expected a column {' or '.join(map(repr, names))}, found {table.column_names}."
        )
    return table.column(found)


def _parquet_tools() -> tuple[Any, Any, Callable[[io.BytesIO], Any]]:
    try:
        import pyarrow
        import pyarrow.parquet
        from PIL import Image
    except ImportError as error:
        raise MissingExtraError(
            'Reading parquet data sets needs pyarrow and pillow: pip install "isthmus[study]".'
        ) from error
    return pyarrow, pyarrow.parquet, Image.open
