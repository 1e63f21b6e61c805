"""Merging networks: everything here returns a new state and leaves its inputs as they were."""

from isthmus.merging._average import (
    Similarity,
    averaging,
    merge,
    normalised,
    require_alignments,
    require_several,
    strangers_note,
)

__all__ = [
    "Similarity",
    "averaging",
    "merge",
    "normalised",
    "require_alignments",
    "require_several",
    "strangers_note",
]
