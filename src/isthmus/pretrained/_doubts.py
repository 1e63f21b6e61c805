"""Why the average of stored networks may be no good network."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from isthmus.merging import Similarity, strangers_note

__all__ = ["doubts_of_average"]

_RUNNING = ("running_mean", "running_var")
"""How the names of batch normalisation's statistics end."""


def doubts_of_average(
    names: Iterable[str], similarities: Sequence[Similarity], shares: Sequence[float], moved: Sequence[object]
) -> list[str]:
    """Return what to know of an average that was made without running the network; nothing for a single one.

    Args:
        names: of the tensors.
        similarities: of each network after the first to the first.
        shares: of every network.
        moved: relabellings of the networks after the first, None for none.
    """
    if sum(share > 0 for share in shares) < 2:
        return []
    found: list[str] = []
    if any(name.endswith(_RUNNING) for name in names):
        found.append(
            "the running statistics of batch normalisation are averages of the networks' own, which is wrong for the "
            "merged weights: the result may be near chance. Recompute them on training data, with the network: "
            "isthmus.merge(..., batches=...), or --model and --data."
        )
    strangers = strangers_note(similarities, shares, moved)
    return found if strangers is None else [*found, strangers]
