"""Writing model folders tensor by tensor: relabelled networks and averages."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from isthmus.batches import Batches
from isthmus.errors import CheckpointError, IsthmusWarning, printable
from isthmus.evaluation import combine_states
from isthmus.files import refuse_overwriting
from isthmus.losses import Loss
from isthmus.matching import Alignment
from isthmus.merging import Similarity, averaging, merged, normalised, require_alignments, require_several
from isthmus.moments import keeps_running_statistics
from isthmus.pretrained._card import Contribution, merge_card, relabelled_card
from isthmus.pretrained._doubts import doubts_of_average
from isthmus.pretrained._extras import extras_of
from isthmus.pretrained._folder import free_target, output_folder
from isthmus.pretrained._gather import STILL, Carrying, Move, blocks, moves_by_key
from isthmus.pretrained._open import OpenedModel
from isthmus.pretrained._shards import (
    DEFAULT_SHARD_SIZE,
    PlannedTensor,
    parse_size,
    plan_shards,
    write_shards,
)
from isthmus.pretrained._verify import rounding_change
from isthmus.states import State, check_same_architecture

__all__ = ["OnBytes", "Written", "apply", "merge", "write_like"]

OnBytes = Callable[[str, int, int], None]
"""Called with the name of the tensor, the bytes written so far, and all bytes to write."""

_ALIGNMENTS = "isthmus"
_MOST_ROUNDING = 0.1
"""Relative change of an output beyond which the rounding of a relabelled network is warned of."""
_BLOCK_ENTRIES = 2**23
"""Entries read at a time from each model."""
_PIECE = 2**14
"""Entries averaged at a time, in float64: few enough to stay in the processor's cache, and 6 times faster than 2²³."""


@dataclass(frozen=True)
class Written:
    """A model folder that was written.

    Attributes:
        path: the folder.
        shards: names of the weight files.
        tensors: number of tensors.
        nbytes: size of the tensors in bytes.
        left_out: files of the (first) source that belong to its old weights and were not copied.
        unknown: names in the files of tensors that the architecture of ``config.json`` does not use. They are
            those of the (first) source, in its order, so a network that does use them is not relabelled.
        repair: what was done to an average by running its network, in words; empty for nothing.
        change: largest relative change of an output by rounding what couplings compute to dtypes of 16 bits; ``None``
            where that does not arise.
    """

    path: Path
    shards: tuple[str, ...]
    tensors: int
    nbytes: int
    left_out: tuple[str, ...]
    unknown: tuple[str, ...] = ()
    repair: str = ""
    change: float | None = None


def apply(
    alignment: Alignment,
    model: OpenedModel,
    out: str | os.PathLike[str],
    *,
    max_shard_size: int | str = DEFAULT_SHARD_SIZE,
    on_progress: OnBytes | None = None,
) -> Written:
    """Write a model with its units relabelled, as a folder that ``from_pretrained`` loads.

    Tensors are read, moved and written one after the other; names, dtypes and metadata stay, tied tensors stay
    tied, and all other files of the folder are copied. The alignment is kept in the folder ``isthmus``.

    Permutations move bits. What other couplings make of a tensor is computed in float64 (float32 where it has more than
    2²⁷ entries) and rounded once, to the dtype it is stored in. Where that has 16 bits, the network is run once more to
    say what the rounding does.

    Args:
        alignment: made for this network (B moves towards A).
        model: the network to relabel; its folder stays as it is.
        out: the folder to write: new, or empty.
        max_shard_size: bytes of tensors per file, as a number or as text such as ``"5GB"``.
        on_progress: called for every tensor.

    Raises:
        OutputError: the folder is there already, lies inside an input or cannot be written; nothing half-written is
            left.
        SymmetryError: the alignment is of another network, or of one whose norms are folded.
        ShapeError: the alignment is of a network of other sizes.
        CheckpointError: entries are not finite after carrying, or too large for their dtype.
        DataError: ``max_shard_size`` is no size.

    Warns:
        IsthmusWarning: rounding to 16 bits moves an output by more than a tenth.
    """
    limit = parse_size(max_shard_size)
    free_target(out)
    refuse_overwriting(out, [model.path], folder=True)
    alignment.check_network(model.state)
    moves = moves_by_key(alignment.spec, alignment.couplings, model)
    change = _rounding(alignment, model, moves)

    def moved(tensor: PlannedTensor) -> Iterator[Tensor]:
        return blocks(model.file, tensor.key, moves.get(tensor.key, STILL))

    source = Contribution(model.title, alignment=alignment, library=model.library.name)
    written = write_like(
        model, moved, Path(out), limit, [alignment], lambda *left: relabelled_card(source, *left), on_progress
    )
    if change is not None and change > _MOST_ROUNDING:
        warnings.warn(
            f"{printable(out)}: rounding what was relabelled to 16 bits moves its outputs by {change:.0%}. Save the "
            "network in float32 before it is folded and aligned, or align with a smaller class of symmetries.",
            IsthmusWarning,
            stacklevel=2,
        )
    return replace(written, change=change)


def _rounding(alignment: Alignment, model: OpenedModel, moves: Mapping[str, Move]) -> float | None:
    """Return how far rounding to 16 bits moves the outputs, ``None`` where nothing that is computed is so short."""
    short = [
        k
        for k, move in moves.items()
        if isinstance(move, Carrying) and model.file.stored(k).dtype.itemsize < 4
    ]
    return rounding_change(alignment.spec, alignment.couplings, model) if short else None


def merge(
    models: Sequence[OpenedModel],
    out: str | os.PathLike[str],
    weights: Sequence[float] | None = None,
    *,
    alignments: Sequence[Alignment | None] | None = None,
    batches: Batches | None = None,
    repair: str | None = None,
    loss: Loss | None = None,
    max_shard_size: int | str = DEFAULT_SHARD_SIZE,
    on_progress: OnBytes | None = None,
) -> Written:
    """Write the weighted average of models, as a folder that ``from_pretrained`` loads.

    The arithmetic is that of :func:`isthmus.merging.merge`, block by block: averages in float64, results in the
    first model's dtypes. With a ``repair``, or with data for a network with BatchNorm, the networks are held in memory,
    and the average is repaired, or its running statistics recomputed, before it is written. Configuration, tokenizer
    and other files, and tensors that the network does not know, are the first model's. The alignments are kept in the
    folder ``isthmus``.

    Args:
        models: two or more of one architecture; their folders stay as they are.
        out: the folder to write: new, or empty.
        weights: one for each model, divided by their sum; None gives all the same.
        alignments: one for each model after the first; None leaves one as it is.
        batches: training data, for a repair and for running statistics.
        repair: a name of :data:`isthmus.paths.REPAIRS`, or another that :func:`isthmus.merging.merge` knows.
        loss: for the repair, as there.
        max_shard_size: bytes of tensors per file, as a number or as text such as ``"5GB"``.
        on_progress: called for every tensor.

    Raises:
        OutputError: the folder is there already, lies inside an input or cannot be written; nothing half-written is
            left.
        CheckpointError: other architectures, or NaN or infinite entries.
        ShapeError: other sizes, or lists of other lengths.
        SymmetryError: an alignment is of another network.
        DataError: fewer than two models, unusable weights, ``max_shard_size`` is no size, or a repair lacks data.
        ModelError: the repair does not know how to write into this network.

    Warns:
        IsthmusWarning: networks without a common start were averaged without relabelling, running statistics were
            averaged, or an alignment is of another state of the network.
    """
    require_several(len(models), "models")
    limit = parse_size(max_shard_size)
    used = [None, *(alignments if alignments is not None else [None] * (len(models) - 1))]
    require_alignments(len(used) - 1, len(models), "model")
    free_target(out)
    refuse_overwriting(out, [model.path for model in models], folder=True)
    for model, alignment in zip(models, used, strict=True):
        if alignment is not None:
            alignment.check_network(model.state)
            alignment.check_frame(models[0].state)
    first = models[0]
    for model in models[1:]:
        if type(model.model).__name__ != type(first.model).__name__:
            raise CheckpointError(
                f"{printable(first.path)} is a {type(first.model).__name__} and {printable(model.path)} a "
                f"{type(model.model).__name__}: they are different architectures, even if their tensors have the same "
                "names. Correct the class that config.json names, or pass architecture=... to open_model."
            )
        check_same_architecture(first.state.shapes(), model.state.shapes(), str(first.path), str(model.path))
        first.check_ties(model)
    shares = normalised(weights, len(models))
    similarities = [Similarity() for _ in models[1:]]
    moves = [
        {} if alignment is None else moves_by_key(alignment.spec, alignment.couplings, model)
        for model, alignment in zip(models, used, strict=True)
    ]

    anew, said = _worked_over(models, used, shares, batches, repair, loss)

    def averaged(tensor: PlannedTensor) -> Iterator[Tensor]:
        names = first.names[tensor.key]
        if not names:
            return blocks(first.file, tensor.key, STILL)
        if anew is not None:
            return iter([anew[names[0]].to(tensor.dtype).contiguous()])
        return _averaged(models, moves, names[0], shares, similarities)

    sources = [
        Contribution(m.title, w, a, m.library.name) for m, w, a in zip(models, shares, used, strict=True)
    ]
    written = write_like(
        first,
        averaged,
        Path(out),
        limit,
        [a for a in used if a is not None],
        lambda left, unknown: merge_card(sources, left, unknown, said),
        on_progress,
    )
    if anew is not None:
        return replace(written, repair=said)
    for note in doubts_of_average(first.names, similarities, shares, used[1:]):
        warnings.warn(note, IsthmusWarning, stacklevel=2)
    return written


def _worked_over(
    models: Sequence[OpenedModel],
    alignments: Sequence[Alignment | None],
    shares: Sequence[float],
    batches: Batches | None,
    repair: str | None,
    loss: Loss | None,
) -> tuple[State | None, str]:
    """Return the average after its network was run, made in memory, and what was done; None where nothing is."""
    anew = repair is None and batches is not None and keeps_running_statistics(models[0].model)
    if not anew and repair in (None, "none"):
        return None, ""
    example = models[0].example
    found = merged(
        [model.load() for model in models],
        shares,
        alignments=alignments[1:],
        batches=batches,
        args=example.args,
        kwargs=example.kwargs,
        refresh="batchnorm" if anew else "auto",
        repair=repair,
        loss=loss,
    )
    if found.repair is not None:
        return found.state, found.repair.words
    return found.state, "Running statistics of BatchNorm were recomputed on data."


def _averaged(
    models: Sequence[OpenedModel],
    moves: Sequence[Mapping[str, Move]],
    name: str,
    shares: Sequence[float],
    similarities: Sequence[Similarity],
) -> Iterator[Tensor]:
    keys = [model.state.stored(name).key for model in models]
    parts = [
        # As many rows of each, whatever the dtype, so that the blocks meet.
        blocks(
            model.file,
            key,
            moved.get(key, STILL),
            _BLOCK_ENTRIES * model.file.stored(key).dtype.itemsize,
            wide=True,
        )
        for model, moved, key in zip(models, moves, keys, strict=True)
    ]
    average_of = averaging(shares)
    stored = models[0].state.stored(name)
    row = torch.Size(stored.shape[1:]).numel() if len(stored.shape) > 1 else 0

    def mean(pieces: list[Tensor]) -> Tensor:
        for similarity, piece in zip(similarities, pieces[1:], strict=True) if row else ():
            similarity.add(pieces[0], piece, row)
        return average_of(pieces)

    for same_rows in zip(*parts, strict=True):
        average = torch.empty_like(same_rows[0], memory_format=torch.contiguous_format)
        pieces = [average.reshape(-1).split(_PIECE)] + [rows.reshape(-1).split(_PIECE) for rows in same_rows]
        for target, *own in zip(*pieces, strict=True):
            target.copy_(combine_states([{name: piece} for piece in own], mean)[name])
        yield average


def write_like(
    base: OpenedModel,
    values: Callable[[PlannedTensor], Iterator[Tensor]],
    out: Path,
    limit: int,
    alignments: Sequence[Alignment],
    card: Callable[[Sequence[str], Sequence[str]], str],
    on_progress: OnBytes | None,
    finish: Callable[[Path], None] | None = None,
) -> Written:
    """Write a folder like ``base`` with other values; its configuration comes last, so half is never whole.

    What ``finish`` does to the folder is done before it gets its name; an exception leaves nothing behind.
    """
    planned = [
        PlannedTensor(key, base.file.stored(key).dtype, base.file.stored(key).shape) for key in base.file
    ]
    base.library.require_writable(base.names, len(plan_shards(planned, limit)))
    total = sum(t.nbytes for t in planned)
    done = 0

    def told(tensor: PlannedTensor) -> Iterator[Tensor]:
        nonlocal done
        if on_progress is not None:
            on_progress(tensor.key, done, total)
        done += tensor.nbytes
        return values(tensor)

    own = {base.library.weights.index, *(base.file.stored(key).file.name for key in base.file)}
    unknown = tuple(key for key in base.file if not base.names[key])
    extras = extras_of(base.path, own)
    with output_folder(out, total + extras.nbytes) as folder:
        shards = write_shards(
            folder,
            planned,
            told,
            limit=limit,
            metadata=base.file.metadata,
            index_metadata=base.file.index_metadata,
            files=base.library.weights,
        )
        if alignments:
            (folder / _ALIGNMENTS).mkdir()
        for k, alignment in enumerate(alignments, start=1):
            name = "alignment" if len(alignments) == 1 else f"alignment-{k}"
            alignment.save(folder / _ALIGNMENTS / f"{name}.safetensors")
        (folder / "README.md").write_text(card(extras.left_out, unknown), encoding="utf-8")
        extras.copy(folder)
        if finish is not None:
            finish(folder)
    return Written(out, tuple(shards), len(planned), total, extras.left_out, unknown)
