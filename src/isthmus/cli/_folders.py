"""Model folders as checkpoints: their weights stay on the disk wherever that is enough."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from isthmus import pretrained
from isthmus.batches import Batches, first_batch
from isthmus.cli import _console as console
from isthmus.errors import DataError
from isthmus.matching import Alignment, Symmetry
from isthmus.matching import align as align_networks
from isthmus.pretrained import OpenedModel, Written, check_inputs, free_target, open_model, parse_size
from isthmus.symmetry import Outputs

__all__ = [
    "align_folders",
    "are_folders",
    "check_output",
    "merge_folders",
    "open_pair",
    "relabel_folder",
    "unused",
]

_EXAMPLES = 4


def are_folders(a: Path, b: Path, target: str | None) -> bool:
    """Whether A and B are model folders, which need no TARGET.

    Raises:
        CheckpointError: a path leads to no checkpoint, or there is no TARGET and not both are such folders; what was
            found under each is said.
    """
    return check_inputs([a, b], network=target is not None) and target is None


def open_pair(
    a: Path, b: Path, trust_remote_code: bool, batches: Batches | None = None
) -> tuple[OpenedModel, OpenedModel]:
    """Open two model folders; a network for whose task no example inputs are known is traced on the data's first."""
    first, second = (_opened(path, trust_remote_code, batches) for path in (a, b))
    return first, second


def _opened(path: Path, trust_remote_code: bool, batches: Batches | None) -> OpenedModel:
    try:
        return open_model(path, trust_remote_code=trust_remote_code)
    except DataError as error:
        if batches is None:
            raise DataError(
                f"{path}: {error} On the command line, give --data (or, for symmetry, --shape)."
            ) from error
        example = first_batch(batches).head(_EXAMPLES)
        return open_model(path, trust_remote_code=trust_remote_code, example=example)


def check_output(out: Path | None, max_shard_size: str) -> None:
    """Check what will be written, before any long work.

    Raises:
        OutputError: the folder is there already, or cannot be replaced.
        DataError: ``max_shard_size`` is no size.
    """
    parse_size(max_shard_size)
    if out is not None:
        free_target(out)


def align_folders(
    a: OpenedModel,
    b: OpenedModel,
    *,
    method: str | None,
    batches: Batches | None,
    outputs: Outputs = None,
    symmetry: Symmetry | None = None,
    seed: int = 0,
    tell: Callable[[str, int, int], None] | None = None,
) -> Alignment:
    """Align two model folders: tensor by tensor by weights, in memory by the methods that run the networks."""
    if method == "weights" or (method is None and batches is None):
        return pretrained.align(
            a, b, outputs=outputs, symmetry=symmetry or "permutations", seed=seed, on_stage=tell
        )
    return align_networks(
        a.load(),
        b.load(),
        batches=batches,
        method=method,
        spec=pretrained.discover_pair(a, b, outputs)
        if symmetry not in (None, "permutations")
        else a.discover(outputs),
        outputs=outputs,
        symmetry=symmetry,
        on_stage=tell,
        args=a.example.args,
        kwargs=a.example.kwargs,
        seed=seed,
    )


def relabel_folder(
    alignment: Alignment, model: OpenedModel, out: Path, max_shard_size: str, bar: Any
) -> Written:
    """Write a model folder relabelled, with progress."""
    tell = console.stages(bar)
    return pretrained.apply(
        alignment,
        model,
        out,
        max_shard_size=max_shard_size,
        on_progress=lambda *at: tell("relabelling", *at[1:]),
    )


def merge_folders(
    pair: tuple[OpenedModel, OpenedModel],
    out: Path,
    *,
    weight: float,
    alignment: Alignment | None,
    batches: Batches | None,
    repair: str | None,
    loss: str | None,
    max_shard_size: str,
    bar: Any,
) -> Written:
    """Write the average of two model folders, with progress; with data or a repair its network is run."""
    tell = console.stages(bar)
    return pretrained.merge(
        pair,
        out,
        [1 - weight, weight],
        alignments=[alignment],
        batches=batches,
        repair=repair,
        loss=loss,
        max_shard_size=max_shard_size,
        on_progress=lambda *at: tell("merging", *at[1:]),
    )


def unused(written: Written | None) -> str:
    """Say which tensors stayed as they were because the architecture does not use them; empty if none did."""
    if written is None or not written.unknown:
        return ""
    return (
        f"\n{len(written.unknown)} tensors are not used by the architecture in config.json and were copied as they "
        f"are (see README.md in {written.path}): {', '.join(written.unknown[:3])}"
        + (", …" if len(written.unknown) > 3 else "")
    )
