"""The ``merge`` command's work on two checkpoints: align, average, write."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from isthmus.batches import Batches
from isthmus.checkpoints import save_state
from isthmus.cli import _console as console
from isthmus.cli._pair import NetworkPair, align_pair
from isthmus.errors import DataError
from isthmus.merging import merge as average

__all__ = ["merge_checkpoints"]


def merge_checkpoints(
    pair: NetworkPair,
    out: Path,
    data: Mapping[str, Batches],
    *,
    method: str | None,
    weight: float,
    batches: Batches | None,
    refresh: str | None,
    shapes: Sequence[str] | None,
    seed: int,
) -> int:
    """Average two networks, B relabelled by ``method`` if one is given, and write the result to a file.

    Returns:
        The number of tensors written.

    Raises:
        DataError: statistics are to be recomputed without data, or there are no example inputs to align with.
        IsthmusError: whatever aligning, averaging and writing raise.
    """
    if refresh is not None and batches is None:
        raise DataError("--refresh recomputes statistics on data: give --data as well.")
    with console.staged_files(out) as staged, console.progress() as bar:
        tell = console.stages(bar)
        alignments = None
        if method is not None:
            tell(f"aligning by {method}", 0, 2)
            alignments = [align_pair(pair, data, method=method, batches=batches, shapes=shapes, seed=seed)]
        tell("merging", 1, 2)
        state = average(
            [pair.a, pair.b],
            [1 - weight, weight],
            alignments=alignments,
            batches=batches,
            refresh=refresh,
            model=pair.a,
        )
        save_state(staged[0], state)
    return len(state)
