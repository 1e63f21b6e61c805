"""The average of checkpoint files, tensor by tensor, without the network that they belong to."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from isthmus.checkpoints import (
    check_format,
    read_checkpoint,
    save_state,
    split_key,
    split_versions,
    version_notes,
)
from isthmus.errors import DataError, IsthmusWarning, printable
from isthmus.evaluation import combine_states
from isthmus.files import atomic_path, refuse_overwriting
from isthmus.merging import Similarity, averaging, normalised, require_several
from isthmus.pretrained._doubts import doubts_of_average
from isthmus.pretrained._lazy import DTYPES, LazyState
from isthmus.pretrained._shards import PlannedTensor, write_file
from isthmus.states import State, check_same_architecture, versions_of, with_versions

__all__ = ["MergedFile", "merge_files"]

_BLOCK_ENTRIES = 2**23
"""Entries read at a time from each file."""


@dataclass(frozen=True)
class MergedFile:
    """A checkpoint that was written.

    Attributes:
        path: the file.
        tensors: number of tensors.
        nbytes: size of the tensors in bytes.
        notes: remarks for the reader: what was done to names, and what the average may lack.
    """

    path: Path
    tensors: int
    nbytes: int
    notes: tuple[str, ...] = ()


def merge_files(
    paths: Sequence[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    weights: Sequence[float] | None = None,
    *,
    on_progress: Callable[[str, int, int], None] | None = None,
) -> MergedFile:
    """Write the weighted average of checkpoints, as they are, without building a network.

    The arithmetic is that of :func:`isthmus.merging.merge`: averages in float64, results in the first file's dtypes;
    integer and boolean buffers are the first file's. Safetensors files, and folders of them, are read block by block; a
    file of torch is read whole, and held whole where ``out`` is one. Names may differ by a prefix (see
    :func:`isthmus.checkpoints.read_checkpoint`); the result has the first file's.

    Nothing is relabelled: that is right for networks that share their labels (a common start, or one run's
    checkpoints). Others need their network, for :func:`isthmus.merging.merge` with ``align``.

    Args:
        paths: two or more checkpoints of one architecture: files, folders of shards, or ``FILE::KEY``.
        out: the file to write, ``.safetensors``, ``.pt`` or ``.pth``; none of the inputs.
        weights: one for each, divided by their sum; None gives all the same.
        on_progress: called for every tensor with its name, the bytes written so far, and all bytes to write.

    Raises:
        CheckpointError: a file cannot be read, has other tensors, or holds NaN or infinite entries.
        ShapeError: other sizes, or as many weights as there are no files.
        DataError: fewer than two files, or unusable weights.
        OutputError: ``out`` cannot be written, or is an input; nothing half-written is left.
    """
    require_several(len(paths), "checkpoints")
    shares, target = normalised(weights, len(paths)), Path(out)
    check_format(target)
    refuse_overwriting(target, [split_key(path)[0] for path in paths])
    first = _opened(paths[0], None)
    sources = [first, *(_opened(path, first) for path in paths[1:])]
    for source in sources[1:]:
        check_same_architecture(first.shapes, source.shapes, first.title, source.title)
    planned = [PlannedTensor(n, t.dtype, tuple(t.shape)) for n, t in first.shapes.items()]
    total = sum(t.nbytes for t in planned)
    similarities = [Similarity() for _ in sources[1:]]
    mean = _compared(averaging(shares), similarities)
    done = 0

    def told(tensor: PlannedTensor) -> Iterator[Tensor]:
        nonlocal done
        if on_progress is not None:
            on_progress(tensor.key, done, total)
        done += tensor.nbytes
        return _averaged(sources, tensor, mean)

    if target.suffix.lower() == ".safetensors":
        for tensor in planned:
            _require_written(tensor)
        with atomic_path(target) as temporary:
            write_file(temporary, planned, told, {**first.metadata, **version_notes(first.versions)})
    else:
        save_state(
            target,
            with_versions(_merged_whole(sources, planned, told, mean), first.versions),
            first.metadata,
        )
    doubts = doubts_of_average(first.shapes, similarities, shares, [None] * len(similarities))
    for note in doubts:
        warnings.warn(note, IsthmusWarning, stacklevel=2)
    notes = [note for source in sources for note in source.notes]
    return MergedFile(target, len(planned), total, (*notes, *doubts))


Mean = Callable[[list[Tensor]], Tensor]


def _compared(mean: Mean, similarities: Sequence[Similarity]) -> Mean:
    """Return a mean that looks, on the way, how much the networks have in common."""

    def looked(tensors: list[Tensor]) -> Tensor:
        if tensors[0].ndim > 1 and not tensors[0].is_complex():
            for similarity, other in zip(similarities, tensors[1:], strict=True):
                similarity.add(tensors[0].flatten(), other.flatten(), tensors[0].shape[1:].numel())
        return mean(tensors)

    return looked


@dataclass(frozen=True, eq=False)
class _NamedCheckpoint:
    """A checkpoint under the names of the first one.

    Attributes:
        title: how a message calls it.
        state: its tensors, in memory or on the disk, by their own names.
        names: from the first one's name to its own.
        shapes: tensors on the meta device by the first one's names.
        metadata: strings of the file.
        versions: of the modules.
        notes: on its names.
    """

    title: str
    state: Mapping[str, Tensor]
    names: Mapping[str, str]
    shapes: State
    metadata: Mapping[str, str]
    versions: Mapping[str, Any]
    notes: tuple[str, ...]

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        own = self.names[name]
        if isinstance(self.state, LazyState):
            return self.state.rows(own, start, stop)
        return self.state[own][start:stop] if self.state[own].ndim else self.state[own]


def _opened(path: str | os.PathLike[str], first: _NamedCheckpoint | None) -> _NamedCheckpoint:
    target, key = split_key(path)
    wanted = None if first is None else first.shapes
    if key is None and (os.path.isdir(target) or target.suffix.lower() in (".safetensors", ".json")):
        lazy, where, note = LazyState.open(target), printable(target), ""
        metadata, versions = split_versions(lazy.metadata, str(target))
        if wanted is not None:
            lazy, note = lazy.like(wanted, where)
        names = {n: n for n in lazy}
        return _NamedCheckpoint(
            where, lazy, names, lazy.shapes(), metadata, versions, (f"{where}: {note}",) if note else ()
        )
    found = read_checkpoint(path, like=wanted)
    shapes = {n: torch.empty(t.shape, dtype=t.dtype, device="meta") for n, t in found.state.items()}
    own, title = {n: n for n in found.state}, printable(os.fspath(path))
    return _NamedCheckpoint(title, found.state, own, shapes, {}, versions_of(found.state), found.notes)


def _averaged(sources: Sequence[_NamedCheckpoint], tensor: PlannedTensor, mean: Mean) -> Iterator[Tensor]:
    """Yield the average of one tensor in blocks of rows."""
    length = tensor.shape[0] if tensor.shape else 1
    entries = max(1, tensor.nbytes // tensor.dtype.itemsize)
    step = max(1, _BLOCK_ENTRIES * length // entries)
    for start in range(0, length, step):
        rows = [{tensor.key: source.rows(tensor.key, start, min(start + step, length))} for source in sources]
        yield combine_states(rows, mean, names=[source.title for source in sources])[tensor.key]


def _merged_whole(
    sources: Sequence[_NamedCheckpoint],
    planned: Sequence[PlannedTensor],
    told: Callable[[PlannedTensor], Iterator[Tensor]],
    mean: Mean,
) -> State:
    """Return the average in memory; tied tensors of files of torch stay tied."""
    first = sources[0]
    if not any(isinstance(source.state, LazyState) for source in sources):
        states = [{n: source.state[source.names[n]] for n in first.shapes} for source in sources]
        return combine_states(states, mean, names=[source.title for source in sources])
    merged: State = {}
    for tensor in planned:
        blocks = list(told(tensor))
        empty = torch.empty(tensor.shape, dtype=tensor.dtype)
        merged[tensor.key] = torch.cat(blocks) if len(blocks) > 1 else next(iter(blocks), empty)
    return merged


def _require_written(tensor: PlannedTensor) -> None:
    """Check that safetensors has a tensor's dtype.

    Raises:
        DataError: it has not.
    """
    if tensor.dtype not in DTYPES.values():
        raise DataError(
            f"{printable(tensor.key)!r} has dtype {tensor.dtype}, which safetensors files do not hold. Write a .pt "
            "file."
        )
