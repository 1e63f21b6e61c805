"""Lazy states: tensors that stay in their safetensors files until they are asked for, one at a time."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from isthmus.errors import CheckpointError, MissingExtraError

__all__ = ["DTYPES", "INDEX_NAME", "SINGLE_NAME", "LazyState", "StoredTensor"]

SINGLE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"

DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
"""The dtypes of the safetensors format that can be read and written, by their names there."""


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies and what it is: its file, its name there, dtype and shape."""

    file: Path
    key: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize

    def read(self, start: int | None = None, stop: int | None = None) -> Tensor:
        """Read the tensor, or its rows ``start`` to ``stop`` along axis 0.

        Raises:
            CheckpointError: the file changed since it was opened, or cannot be read.
        """
        with _opened(self.file) as file:
            if self.key not in file.keys():  # noqa: SIM118 (not a mapping)
                raise CheckpointError(
                    f"{self.file}: no longer holds {self.key!r}. The file changed while it was in use; run again."
                )
            if start is None or not self.shape:
                return file.get_tensor(self.key)
            return file.get_slice(self.key)[start:stop]


class LazyState(Mapping[str, Tensor]):
    """A state whose tensors are read when they are asked for, and not kept.

    ``state[name]`` reads one tensor, :meth:`rows` a part of one; shapes and dtypes are known without reading.
    Several names may lead to one stored tensor (tied weights).

    Args:
        tensors: from name to stored tensor.
        metadata: the strings kept in the (first) file's header.
        index_metadata: the notes kept in the index of several files.
    """

    def __init__(
        self,
        tensors: Mapping[str, StoredTensor],
        metadata: Mapping[str, str] | None = None,
        index_metadata: Mapping[str, Any] | None = None,
    ) -> None:
        self._tensors = dict(tensors)
        self.metadata: Mapping[str, str] = dict(metadata or {})
        self.index_metadata: Mapping[str, Any] = dict(index_metadata or {})

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> LazyState:
        """Open a ``.safetensors`` file, an index (``.json``) of several, or a folder that holds either.

        All headers are read and checked against the files' sizes; no tensor is read. Tensors that lie in a shard
        without being listed in the index belong to the state as well.

        Raises:
            CheckpointError: a file is missing, truncated or in another format, a shard lacks a tensor, or several
                hold one that the index does not list.
            MissingExtraError: safetensors is not installed.
        """
        target = Path(path)
        if target.is_dir():
            return cls.open(_weights_of(target))
        if target.suffix == ".json":
            return _open_index(target)
        tensors, metadata = _header(target)
        return cls(tensors, metadata)

    def __getitem__(self, name: str) -> Tensor:
        """Read one tensor."""
        return self._tensors[name].read()

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def __contains__(self, name: object) -> bool:
        return name in self._tensors

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Read rows ``start`` to ``stop`` (axis 0) of one tensor."""
        return self._tensors[name].read(start, stop)

    def stored(self, name: str) -> StoredTensor:
        """Return where a tensor lies, its dtype and shape."""
        return self._tensors[name]

    def under(self, names: Mapping[str, str]) -> LazyState:
        """Return the tensors under other names, given as a mapping from new name to present one."""
        tensors = {new: self._tensors[old] for new, old in names.items()}
        return LazyState(tensors, self.metadata, self.index_metadata)

    def shapes(self) -> dict[str, Tensor]:
        """Return the state with tensors on the meta device: shapes and dtypes without values."""
        return {n: torch.empty(t.shape, dtype=t.dtype, device="meta") for n, t in self._tensors.items()}

    @property
    def nbytes(self) -> int:
        """Total size of the stored tensors in bytes, each counted once."""
        return sum(t.nbytes for t in set(self._tensors.values()))


def _weights_of(folder: Path) -> Path:
    """Return the file to open in a folder: ``model.safetensors``, or else its index."""
    for name in (SINGLE_NAME, INDEX_NAME):
        if (folder / name).is_file():
            return folder / name
    for name in (SINGLE_NAME, INDEX_NAME):
        if (folder / name).is_symlink():
            raise CheckpointError(
                f"{folder / name}: is a link to {os.readlink(folder / name)}, which is not there. Download or copy "
                "the model folder again."
            )
    others = sorted(p.name for p in folder.glob("*.bin"))
    found = f"It holds {', '.join(others[:3])}; convert them with save_pretrained. " if others else ""
    raise CheckpointError(
        f"{folder}: holds neither {SINGLE_NAME} nor {INDEX_NAME}. {found}Give a folder written by save_pretrained."
    )


def _open_index(path: Path) -> LazyState:
    places, notes = _read_index(path)
    files: dict[str, dict[str, StoredTensor]] = {}
    metadata: dict[str, str] = {}
    for name in dict.fromkeys(places.values()):
        if Path(name).name != name:
            raise CheckpointError(
                f"{path}: lists the shard {name!r}, which is not in the folder; no file outside of it is read. Copy "
                "the checkpoint again, or correct the index."
            )
        if not (path.parent / name).is_file():
            raise CheckpointError(
                f"{path}: lists the shard {name!r}, which is not in the folder. Copy the missing file, whole."
            )
        files[name], found = _header(path.parent / name)
        metadata = metadata or found
    for key, name in places.items():
        if key not in files[name]:
            raise CheckpointError(
                f"{path}: says that {name} holds {key!r}, but it does not. The shards and the index belong to "
                "different checkpoints; copy them again."
            )
    tensors = {key: files[name][key] for key, name in places.items()}
    for name, stored in files.items():
        for key, tensor in stored.items():
            other = tensors.setdefault(key, tensor)
            if other is not tensor and key not in places:
                raise CheckpointError(
                    f"{path}: does not list {key!r}, which lies in {other.file.name} and in {name}. Say in the index "
                    "which of them counts, or copy the checkpoint again."
                )
    return LazyState(tensors, metadata, notes)


def _read_index(path: Path) -> tuple[dict[str, str], dict[str, Any]]:
    """Return the file of every tensor, and the index's notes."""
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
        places = {str(k): str(v) for k, v in index["weight_map"].items()}
        return places, dict(index.get("metadata") or {})
    except OSError as error:
        raise CheckpointError(
            f"{path}: cannot be read: {error.strerror}. Check the file and its rights."
        ) from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{path}: expected an index with a weight_map, found {type(error).__name__}: {error}. Copy it again."
        ) from error


def _header(path: Path) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """Return what one file holds; safetensors checks the header against the file's size."""
    tensors: dict[str, StoredTensor] = {}
    with _opened(path) as file:
        for key in file.offset_keys():
            part = file.get_slice(key)
            name = str(part.get_dtype())
            if name not in DTYPES:
                raise CheckpointError(
                    f"{path}: {key!r} has dtype {name}, which cannot be permuted. Use a checkpoint in one of "
                    f"{', '.join(DTYPES)}."
                )
            tensors[key] = StoredTensor(path, key, DTYPES[name], tuple(part.get_shape()))
        metadata = dict(file.metadata() or {})
    return tensors, metadata


def _opened(path: Path) -> Any:
    try:
        import safetensors
    except ImportError as error:
        raise MissingExtraError(
            'Reading .safetensors files needs safetensors: pip install "isthmus[hf]".'
        ) from error
    try:
        return safetensors.safe_open(path, framework="pt")
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: no such file. Check the path of the checkpoint.") from error
    except (safetensors.SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path}: not a whole safetensors file: {error}. It is truncated, damaged or in another format; "
            "copy it again."
        ) from error
