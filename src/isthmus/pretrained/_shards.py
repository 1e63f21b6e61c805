"""Writing safetensors shards tensor by tensor, without holding a shard in memory.

The format (https://github.com/huggingface/safetensors, "Format"): eight bytes with the length of the header,
little endian; the header, JSON from name to dtype, shape and offsets, padded with spaces; then all tensors, row
after row, without gaps.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from isthmus.errors import DataError, ShapeError
from isthmus.pretrained._lazy import DTYPES, TRANSFORMERS_WEIGHTS, WeightNames

__all__ = ["DEFAULT_SHARD_SIZE", "PlannedTensor", "parse_size", "plan_shards", "write_file", "write_shards"]

DEFAULT_SHARD_SIZE = "5GB"
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
_ALIGNMENT = 8


@dataclass(frozen=True)
class PlannedTensor:
    """A tensor that will be written: its name in the file, dtype and shape."""

    key: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


def parse_size(size: int | str) -> int:
    """Return a number of bytes, given as one or as text such as ``"5GB"`` (10⁹) or ``"4GiB"`` (2³⁰).

    Raises:
        DataError: no such size, or none above zero.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", str(size))
    if (
        match is None
        or match[2].upper() not in _UNITS
        or (found := int(float(match[1]) * _UNITS[match[2].upper()])) < 1
    ):
        raise DataError(f'Shard size {size!r}: expected a number of bytes, or text such as "5GB" or "500MB".')
    return found


def plan_shards(tensors: Iterable[PlannedTensor], limit: int) -> list[list[PlannedTensor]]:
    """Fill shards in order, each up to ``limit`` bytes; a larger tensor gets a shard of its own."""
    shards: list[list[PlannedTensor]] = [[]]
    filled = 0
    for tensor in tensors:
        if shards[-1] and filled + tensor.nbytes > limit:
            shards.append([])
            filled = 0
        shards[-1].append(tensor)
        filled += tensor.nbytes
    return shards


def write_shards(
    folder: Path,
    tensors: Sequence[PlannedTensor],
    blocks: Callable[[PlannedTensor], Iterable[Tensor]],
    *,
    limit: int,
    metadata: Mapping[str, str] | None = None,
    index_metadata: Mapping[str, Any] | None = None,
    files: WeightNames = TRANSFORMERS_WEIGHTS,
) -> list[str]:
    """Write tensors into shards and, if there are several, their index; each file is flushed to the disk.

    Args:
        folder: an existing folder.
        tensors: all tensors, in the order in which they are written.
        blocks: gives the blocks of rows (axis 0) of a tensor, in order; asked once for each.
        limit: bytes of tensors per shard.
        metadata: strings for the header of every shard.
        index_metadata: notes for the index, beside the total size.
        files: what the files are called.

    Returns:
        Names of the shards.

    Raises:
        ShapeError: the blocks do not add up to the planned tensor.
        OSError: from the file system.
    """
    shards = plan_shards(tensors, limit)
    names = files.shards(len(shards))
    for name, shard in zip(names, shards, strict=True):
        (folder / name).open("xb").close()
        write_file(folder / name, shard, blocks, metadata)
    if len(shards) > 1:
        placed = {t.key: name for name, shard in zip(names, shards, strict=True) for t in shard}
        notes = {**(index_metadata or {}), "total_size": sum(t.nbytes for t in tensors)}
        index = {"metadata": notes, "weight_map": placed}
        (folder / files.index).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return names


def write_file(
    path: Path,
    tensors: Sequence[PlannedTensor],
    blocks: Callable[[PlannedTensor], Iterable[Tensor]],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write tensors into one file and flush it to the disk (see :func:`write_shards`)."""
    with path.open("wb") as file:
        file.write(_header(tensors, metadata or {}))
        for tensor in tensors:
            _write_tensor(file, tensor, blocks(tensor))
        file.flush()
        os.fsync(file.fileno())


def _header(tensors: Sequence[PlannedTensor], metadata: Mapping[str, str]) -> bytes:
    entries: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for t in tensors:
        end = offset + t.nbytes
        entries[t.key] = {"dtype": _NAMES[t.dtype], "shape": list(t.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def _write_tensor(file: IO[bytes], tensor: PlannedTensor, blocks: Iterable[Tensor]) -> None:
    written = 0
    for block in blocks:
        if block.dtype != tensor.dtype or tuple(block.shape[1:]) != tensor.shape[1:]:
            raise ShapeError(
                f"Writing {tensor.key!r}: expected rows of {tensor.dtype} and shape {tensor.shape[1:]}, found "
                f"{block.dtype} and {tuple(block.shape[1:])}."
            )
        if block.numel():
            written += file.write(block.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    if written != tensor.nbytes:
        raise ShapeError(f"Writing {tensor.key!r}: expected {tensor.nbytes} bytes, got {written}.")
