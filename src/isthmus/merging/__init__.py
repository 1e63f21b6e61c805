"""Merging networks: everything here returns a new state and leaves its inputs as they were."""

from isthmus.merging._average import (
    Merged,
    Similarity,
    averaging,
    merge,
    merged,
    normalised,
    require_alignments,
    require_several,
    strangers_note,
)

__all__ = [
    "Merged",
    "Similarity",
    "averaging",
    "merge",
    "merged",
    "normalised",
    "require_alignments",
    "require_several",
    "strangers_note",
]
