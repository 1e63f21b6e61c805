"""Images in parquet files, as Hugging Face ``datasets`` stores them: a struct of encoded bytes, and a label."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from isthmus.errors import DataError, MissingExtraError
from isthmus.training._raw import MOST_BYTES, Raw

__all__ = ["read_parquet"]

_FORMATS = ("PNG", "JPEG")
"""Decoders that are used; others of Pillow run programs (PostScript) or are little tried."""

_MODES = {"1", "L", "LA", "P", "RGB", "RGBA"}
"""Kinds of pixel that become eight bits by Pillow's rules; it would cut off 16 bits at 255 without a word."""

_MOST_PIXELS = 1 << 20
"""Of one image: told from its header, before it is decoded."""

_MOST_ROWS = 1_000_000

_SHARD = re.compile(r"-(\d+)-of-(\d+)\.parquet")


class _Tools(NamedTuple):
    arrow: ModuleType
    parquet: ModuleType
    compute: ModuleType
    image: ModuleType


def read_parquet(
    paths: Sequence[Path], channels: int, label_columns: Sequence[str] = ("label", "fine_label", "labels")
) -> tuple[Raw, str]:
    """Read images that Hugging Face ``datasets`` stored as parquet: a struct of encoded bytes, and a label.

    Args:
        paths: the shards, in order.
        channels: 1 to decode as grey, 3 as RGB.
        label_columns: names to try, in order.

    Returns:
        ``((pixels, labels), encoding)``, with the name of the images' encoding, ``"PNG"`` or ``"JPEG"``; ``"JPEG"``
        if any image is one.

    Raises:
        DataError: not parquet, no such columns, a shard that is missing, an image that cannot be decoded, is too
            large, or is neither PNG nor JPEG, images of unequal size, or more than fits into memory.
        MissingExtraError: pyarrow or pillow is missing.
    """
    tools = _tools()
    _check_shards(paths)
    pixels: list[NDArray[np.uint8]] = []
    labels: list[NDArray[np.int64]] = []
    encodings: set[str] = set()
    with warnings.catch_warnings():  # of sizes and odd entries: ours is the check, and it is stricter
        warnings.simplefilter("ignore")
        for path in paths:
            images, numbers = _columns(tools, path, label_columns)
            labels.append(numbers)
            for row, encoded in enumerate(images):
                encoding, decoded = _decoded(
                    tools.image, encoded, channels, f"{path}: the image in row {row}"
                )
                encodings.add(encoding)
                pixels.append(decoded)
                if decoded.shape != pixels[0].shape:
                    raise DataError(
                        f"{path}: images of unequal size: {pixels[0].shape[:2]} in row 0, "
                        f"{decoded.shape[:2]} in row {row}. Only data sets of one image size can be read."
                    )
                if len(pixels) * decoded.size > MOST_BYTES:
                    raise DataError(
                        f"{path}: expected at most {MOST_BYTES:,} bytes of pixels, found more by row {row}. "
                        "Only data sets that fit into memory can be read."
                    )
    if not pixels:
        raise DataError(f"{paths[0] if paths else 'parquet'}: holds no images.")
    stacked = np.stack(pixels)
    stacked = stacked[:, None] if channels == 1 else np.ascontiguousarray(stacked.transpose(0, 3, 1, 2))
    return (stacked, np.concatenate(labels)), "JPEG" if "JPEG" in encodings else encodings.pop()


def _check_shards(paths: Sequence[Path]) -> None:
    """Notice when the names of shards promise more of them: a smaller data set would be used without a word."""
    for path in paths:
        named = _SHARD.search(path.name)
        if named is not None and int(named[2]) != len(paths):
            raise DataError(
                f"{path}: expected {int(named[2])} shards beside each other, found {len(paths)}. Get the others too, "
                "and remove those of another copy."
            )


def _columns(
    tools: _Tools, path: Path, label_columns: Sequence[str]
) -> tuple[Iterator[bytes | None], NDArray[np.int64]]:
    """Return the encoded images and the labels of a shard, whose size is checked before it is read."""
    try:
        with tools.parquet.ParquetFile(path) as file:
            names, rows = list(file.schema_arrow.names), file.metadata.num_rows
            size = sum(file.metadata.row_group(i).total_byte_size for i in range(file.num_row_groups))
    except Exception as error:  # a damaged file makes the reader fail in any way at all
        raise DataError(f"{path}: truncated or not a parquet file: {error}. Get it again.") from error
    if not (0 <= rows <= _MOST_ROWS and 0 <= size <= MOST_BYTES):
        raise DataError(
            f"{path}: expected at most {_MOST_ROWS:,} rows and {MOST_BYTES:,} bytes, found {rows:,} rows and "
            f"{size:,} bytes. Is it a file of this data set?"
        )
    wanted = [_column(names, ("img", "image"), path), _column(names, label_columns, path)]
    try:
        table = tools.parquet.read_table(path, columns=wanted)
    except Exception as error:
        raise DataError(f"{path}: truncated or damaged parquet file: {error}. Get it again.") from error
    images, numbers = table.column(wanted[0]), table.column(wanted[1])
    values = numbers.to_numpy()
    if values.dtype.kind not in "iu" or numbers.null_count:
        holes = f" with {numbers.null_count} missing" if numbers.null_count else ""
        raise DataError(f"{path}: expected integer labels, found {values.dtype}{holes}.")
    return _encoded(tools, images, path), values.astype(np.int64)


def _encoded(tools: _Tools, images: Any, path: Path) -> Iterator[bytes | None]:
    kinds = tools.arrow.types
    if kinds.is_struct(images.type):
        fields = [images.type.field(i).name for i in range(images.type.num_fields)]
        if fields.count("bytes") != 1:
            raise DataError(f"{path}: expected images as a struct with 'bytes', found the fields {fields}.")
        images = tools.compute.struct_field(images, "bytes")
    if not (kinds.is_binary(images.type) or kinds.is_large_binary(images.type) or kinds.is_null(images.type)):
        raise DataError(
            f"{path}: expected encoded images as bytes, found {images.type}, which cannot be decoded."
        )
    return (value.as_py() for value in images)


def _column(names: Sequence[str], wanted: Sequence[str], path: Path) -> str:
    found = next((n for n in wanted if n in names), None)
    if found is None or names.count(found) > 1:
        raise DataError(f"{path}: expected a column {' or '.join(map(repr, wanted))}, found {list(names)}.")
    return found


def _decoded(
    image: ModuleType, encoded: bytes | None, channels: int, what: str
) -> tuple[str, NDArray[np.uint8]]:
    """Return an image's encoding and pixels; its size is known before it is decoded."""
    if encoded is None:
        raise DataError(f"{what} cannot be decoded: it is missing. Get the file again.")
    try:
        with image.open(io.BytesIO(encoded), formats=_FORMATS) as opened:
            (width, height), mode = opened.size, opened.mode
            if width * height > _MOST_PIXELS or mode not in _MODES:
                raise DataError(
                    f"{what} cannot be decoded: expected at most {_MOST_PIXELS:,} pixels of eight bits, found "
                    f"{width:,} × {height:,} of mode {mode}."
                )
            return str(opened.format), np.asarray(opened.convert("L" if channels == 1 else "RGB"))
    except DataError:
        raise
    except Exception as error:  # a damaged image makes the decoder fail in any way at all
        reason = "it is neither PNG nor JPEG" if isinstance(error, image.UnidentifiedImageError) else error
        raise DataError(f"{what} cannot be decoded: {reason}. Get the file again.") from error


def _tools() -> _Tools:
    try:
        import pyarrow
        import pyarrow.compute
        import pyarrow.parquet
        from PIL import Image
    except ImportError as error:
        raise MissingExtraError(
            'Reading parquet data sets needs pyarrow and pillow: pip install "isthmus[study]".'
        ) from error
    return _Tools(pyarrow, pyarrow.parquet, pyarrow.compute, Image)
