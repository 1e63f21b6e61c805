"""Why the average of stored networks may be no good network."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from isthmus.merging import Similarity, strangers_note
from isthmus.moments import averaged_statistics, statistics_note

__all__ = ["doubts_of_average"]

_HOW = "run the network on training data: isthmus.merge(..., batches=...), or --model and --data."


def doubts_of_average(
    names: Iterable[str], similarities: Sequence[Similarity], shares: Sequence[float], moved: Sequence[object]
) -> list[str]:
    """Return notes on an average that was made without running the network; none for a single one.

    Args:
        names: of the tensors.
        similarities: of each network after the first to the first.
        shares: of every network.
        moved: relabellings of the networks after the first, None for none.
    """
    if sum(share > 0 for share in shares) < 2:
        return []
    statistics = statistics_note(averaged_statistics(list(names)), _HOW, merged=True)
    strangers = strangers_note(similarities, shares, moved)
    return [note for note in (statistics, strangers) if note is not None]
