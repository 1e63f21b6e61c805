"""Paths between two networks: a state for every position, which lines measure and merges return."""

from isthmus.paths._path import Path, Straight, interpolate, mixed, require_path
from isthmus.paths._refreshed import Recompute, Refreshed, recompute_of, refreshed
from isthmus.paths._repaired import Repaired

__all__ = [
    "Path",
    "Recompute",
    "Refreshed",
    "Repaired",
    "Straight",
    "interpolate",
    "mixed",
    "recompute_of",
    "refreshed",
    "require_path",
]
