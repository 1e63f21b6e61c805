"""Model folders as checkpoints: their weights stay on the disk wherever that is enough."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from isthmus import pretrained
from isthmus.batches import Batches
from isthmus.cli import _console as console
from isthmus.errors import DataError
from isthmus.matching import Alignment
from isthmus.matching import align as align_networks
from isthmus.pretrained import OpenedModel, is_model_folder, open_model

__all__ = ["align_folders", "are_folders", "merge_folders", "open_pair", "relabel_folder"]


def are_folders(a: Path, b: Path, target: str | None) -> bool:
    """Whether A and B are model folders, which need no TARGET.

    Raises:
        DataError: neither is there a TARGET, nor are both such folders.
    """
    if target is not None:
        return False
    if is_model_folder(a) and is_model_folder(b):
        return True
    raise DataError(
        "Give --model TARGET, the network of the checkpoints; only two model folders (with config.json) need none."
    )


def open_pair(a: Path, b: Path, trust_remote_code: bool) -> tuple[OpenedModel, OpenedModel]:
    """Open two model folders."""
    first, second = (open_model(path, trust_remote_code=trust_remote_code) for path in (a, b))
    return first, second


def align_folders(
    a: OpenedModel, b: OpenedModel, *, method: str, batches: Batches | None, seed: int
) -> Alignment:
    """Align two model folders: tensor by tensor by weights, in memory by the methods that run the networks."""
    if method == "weights":
        return pretrained.align(a, b, seed=seed)
    return align_networks(
        a.load(),
        b.load(),
        batches=batches,
        method=method,
        spec=a.discover(),
        args=a.example.args,
        kwargs=a.example.kwargs,
        seed=seed,
    )


def relabel_folder(
    alignment: Alignment, model: OpenedModel, out: Path, max_shard_size: str, bar: Any
) -> None:
    """Write a model folder relabelled, with progress."""
    tell = console.stages(bar)
    pretrained.apply(
        alignment,
        model,
        out,
        max_shard_size=max_shard_size,
        on_progress=lambda *at: tell("relabelling", *at[1:]),
    )


def merge_folders(
    a: OpenedModel,
    b: OpenedModel,
    out: Path,
    *,
    weight: float,
    alignment: Alignment | None,
    max_shard_size: str,
    bar: Any,
) -> int:
    """Write the average of two model folders, with progress; return the number of tensors."""
    tell = console.stages(bar)
    written = pretrained.merge(
        [a, b],
        out,
        [1 - weight, weight],
        alignments=[alignment],
        max_shard_size=max_shard_size,
        on_progress=lambda *at: tell("merging", *at[1:]),
    )
    return written.tensors
