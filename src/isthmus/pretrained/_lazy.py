"""Lazy states: tensors that stay in their safetensors files until they are asked for, one at a time."""

from __future__ import annotations

import math
import os
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from isthmus.checkpoints import as_in_network, unwrapped
from isthmus.errors import CheckpointError, MissingExtraError, printable
from isthmus.files import Identity, identity_of, parse_json, read_json, require_file, require_utf8
from isthmus.pretrained._links import require_inside, roots_of
from isthmus.states import computed_digest

__all__ = ["DIFFUSERS_WEIGHTS", "DTYPES", "TRANSFORMERS_WEIGHTS", "LazyState", "StoredTensor", "WeightNames"]


@dataclass(frozen=True)
class WeightNames:
    """How a library names the files of weights in its model folders.

    Attributes:
        stem: what the names of all of them begin with.
    """

    stem: str

    @property
    def single(self) -> str:
        """Name of the file that holds everything."""
        return f"{self.stem}.safetensors"

    @property
    def index(self) -> str:
        """Name of the index of several shards."""
        return f"{self.stem}.safetensors.index.json"

    def shards(self, count: int) -> list[str]:
        """Return the names of so many files."""
        if count == 1:
            return [self.single]
        return [f"{self.stem}-{k:05}-of-{count:05}.safetensors" for k in range(1, count + 1)]

    def among(self, names: Collection[str]) -> tuple[str, ...]:
        """Return which of the two names that can be opened are among these."""
        return tuple(name for name in (self.single, self.index) if name in names)


TRANSFORMERS_WEIGHTS = WeightNames("model")
DIFFUSERS_WEIGHTS = WeightNames("diffusion_pytorch_model")

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
    """Where a tensor lies and what it is: its file, its name there, dtype and shape.

    The file is known by more than its name: one that was replaced or changed since it was opened is not read, so that
    a result never holds tensors of two versions.
    """

    file: Path
    key: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    identity: Identity
    offset: int
    """Where its first byte lies in the file."""

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize

    def read(self, start: int | None = None, stop: int | None = None) -> Tensor:
        """Read the tensor, or its rows ``start`` to ``stop`` along axis 0.

        Raises:
            CheckpointError: the file changed since it was opened, or cannot be read.
        """
        first, last, _ = slice(start, stop).indices(self.shape[0]) if self.shape else (0, 1, 1)
        rows = max(last - first, 0)
        found = torch.empty((rows, *self.shape[1:])[: len(self.shape)], dtype=self.dtype)
        self._require_unchanged()
        try:
            with self.file.open("rb") as file:
                file.seek(self.offset + first * (found.nbytes // max(rows, 1)))
                # Not through a mapping of the file, whose pages would count as this process's memory.
                memory: Any = found.reshape(-1).view(torch.uint8).numpy()
                count = file.readinto(memory)
        except OSError:
            count = -1
        self._require_unchanged()  # if reading failed, this may be why
        if count != found.nbytes:
            raise CheckpointError(
                f"{printable(self.file)}: {printable(self.key)!r} cannot be read whole. Check the disk, and copy the "
                "file again."
            )
        return found

    def _require_unchanged(self) -> None:
        try:
            unchanged = identity_of(self.file) == self.identity
        except OSError:
            unchanged = False
        if not unchanged:
            raise CheckpointError(
                f"{printable(self.file)}: was changed or replaced since it was opened, so tensors of two versions "
                "would be mixed. Leave the files alone while they are in use, and run again."
            )


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
    def open(cls, path: str | os.PathLike[str], names: WeightNames | None = None) -> LazyState:
        """Open a ``.safetensors`` file, an index (``.json``) of several, or a folder that holds either.

        All headers are read and checked against the files' sizes; no tensor is read. Tensors that lie in a shard
        without being listed in the index belong to the state as well. Nothing outside of the folder is read, also
        through links, except for a snapshot in the hub's cache, whose files lie beside it.

        Args:
            path: of the file or folder.
            names: what the files in a folder are called; default: as transformers or diffusers names them, whichever
                are there.

        Raises:
            CheckpointError: a file is missing, truncated, outside of the folder or in another format, a shard lacks a
                tensor, or several hold one that the index does not list.
            MissingExtraError: safetensors is not installed.
        """
        target = Path(path)
        if os.path.isdir(target):
            return cls.open(_weights_of(target, names))
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

    def like(self, network: Mapping[str, Tensor], where: str = "the checkpoint") -> tuple[LazyState, str]:
        """Return the tensors under the names of a network, and what was done to them; empty if nothing was.

        Args:
            network: a state of it; only names and shapes are looked at.
            where: how a message calls this checkpoint.

        Raises:
            CheckpointError: it holds the network's tensors more than once (see
                :func:`isthmus.checkpoints.read_checkpoint`).
        """
        shapes = self.shapes()
        naming = as_in_network(shapes, network, where) or unwrapped(shapes)
        return self.under(naming.names), naming.note

    def shapes(self) -> dict[str, Tensor]:
        """Return the state with tensors on the meta device: shapes and dtypes without values."""
        return {n: torch.empty(t.shape, dtype=t.dtype, device="meta") for n, t in self._tensors.items()}

    @cached_property
    def digest(self) -> str:
        """The digest of the state, computed once: a file that changes is not read any more."""
        return computed_digest(self)

    @property
    def nbytes(self) -> int:
        """Total size of the stored tensors in bytes, each counted once."""
        return sum(t.nbytes for t in set(self._tensors.values()))


def _weights_of(folder: Path, names: WeightNames | None) -> Path:
    """Return the file to open in a folder: the one that holds everything, or else the index."""
    known = (names,) if names is not None else (TRANSFORMERS_WEIGHTS, DIFFUSERS_WEIGHTS)
    there = [own for own in known if any(os.path.lexists(folder / n) for n in (own.single, own.index))]
    if len(there) > 1:
        raise CheckpointError(
            f"{printable(folder)}: holds weights of two networks, {there[0].stem} and {there[1].stem}. Give the file "
            "of one of them."
        )
    for own in there:
        for name in (own.single, own.index):
            if os.path.isfile(folder / name):
                require_inside(folder / name, roots_of(folder))
                return folder / name
        for name in (own.single, own.index):
            if (folder / name).is_symlink():
                raise CheckpointError(
                    f"{printable(folder / name)}: is a link to {printable(os.readlink(folder / name))}, which is not "
                    "there. Download or copy the model folder again."
                )
    raise CheckpointError(
        f"{printable(folder)}: holds neither {known[0].single} nor {known[0].index}. {_other_weights(folder, known[0])}"
        "Give a folder written by save_pretrained."
    )


def _other_weights(folder: Path, names: WeightNames) -> str:
    """Say which weights of other forms a folder holds; empty if none."""
    variants = sorted(p.name for p in folder.glob(f"{names.stem}.*.safetensors"))
    if variants:
        return (
            f"It holds {printable(variants[0])}, a variant; load it with from_pretrained(..., variant=...) and write "
            "it with save_pretrained. "
        )
    others = sorted(p.name for p in folder.glob("*.bin"))
    if not others:
        return ""
    return f"It holds {', '.join(printable(o) for o in others[:3])}; convert them with save_pretrained. "


def _open_index(path: Path) -> LazyState:
    places, notes = _read_index(path)
    files: dict[str, dict[str, StoredTensor]] = {}
    metadata: dict[str, str] = {}
    roots = roots_of(path.parent)
    for name in dict.fromkeys(places.values()):
        lists = f"{printable(path)}: lists the shard {printable(name)!r}, which is not in the folder"
        if Path(name).name != name:
            raise CheckpointError(
                f"{lists}; no file outside of it is read. Copy the checkpoint again, or correct the index."
            )
        if not os.path.isfile(path.parent / name):
            raise CheckpointError(f"{lists}. Copy the missing file, whole.")
        require_inside(path.parent / name, roots)
        files[name], found = _header(path.parent / name)
        metadata = metadata or found
    for key, name in places.items():
        if key not in files[name]:
            raise CheckpointError(
                f"{printable(path)}: says that {printable(name)} holds {printable(key)!r}, but it does not. The shards "
                "and the index belong to different checkpoints; copy them again."
            )
    tensors = {key: files[name][key] for key, name in places.items()}
    for name, stored in files.items():
        for key, tensor in stored.items():
            other = tensors.setdefault(key, tensor)
            if other is not tensor and key not in places:
                raise CheckpointError(
                    f"{printable(path)}: does not list {printable(key)!r}, which lies in {printable(other.file.name)} "
                    f"and in {printable(name)}. Say in the index which of them counts, or copy the checkpoint again."
                )
    return LazyState(tensors, metadata, notes)


def _read_index(path: Path) -> tuple[dict[str, str], dict[str, Any]]:
    """Return the file of every tensor, and the index's notes."""
    index = read_json(path, what="index")
    places = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(places, dict) or not all(isinstance(v, str) for v in places.values()):
        found = type(index).__name__ if not isinstance(index, dict) else type(places).__name__
        raise CheckpointError(
            f"{printable(path)}: expected an index with a weight_map from tensor to file, found {found}. Copy it again."
        )
    notes = index.get("metadata")
    return places, notes if isinstance(notes, dict) else {}


def _header(path: Path) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """Return what one file holds; safetensors checks the header against the file's size."""
    require_file(path)
    identity = identity_of(path)
    tensors: dict[str, StoredTensor] = {}
    with _opened(path) as file:
        places = _places_in(path)
        for key in file.offset_keys():
            part = file.get_slice(key)
            name = str(part.get_dtype())
            if name not in DTYPES:
                raise CheckpointError(
                    f"{printable(path)}: {printable(key)!r} has dtype {printable(name)}, which cannot be permuted. Use "
                    f"a checkpoint in one of {', '.join(DTYPES)}."
                )
            tensors[key] = StoredTensor(
                path, key, DTYPES[name], tuple(part.get_shape()), identity, places[key]
            )
        metadata = dict(file.metadata() or {})
    return tensors, metadata


def _places_in(path: Path) -> dict[str, int]:
    """Return where the tensors of a file begin, in bytes; its header was checked by safetensors.

    Raises:
        CheckpointError: the header names a tensor twice, of which safetensors would take the last without a word.
    """
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")  # at most 10⁸, or safetensors had refused it
        header = parse_json(file.read(length).decode("utf-8"), str(path))
    return {
        key: 8 + length + entry["data_offsets"][0] for key, entry in header.items() if key != "__metadata__"
    }


def _opened(path: Path) -> Any:
    try:
        import safetensors
    except ImportError as error:
        raise MissingExtraError(
            'Reading .safetensors files needs safetensors: pip install "isthmus[hf]".'
        ) from error
    require_utf8(path)
    try:
        return safetensors.safe_open(path, framework="pt")
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{printable(path)}: no such file. Check the path of the checkpoint."
        ) from error
    except (safetensors.SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{printable(path)}: not a whole safetensors file: {printable(error)}. It is truncated, damaged or in "
            "another format; copy it again."
        ) from error
