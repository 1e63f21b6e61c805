"""Paths between two networks: a state for every position, which lines measure and merges return."""

from isthmus.paths._held import HeldLayer, seen_layers, watched
from isthmus.paths._path import Path, Straight, interpolate, mixed, require_path
from isthmus.paths._refreshed import Recompute, Refreshed, recompute_of, refreshed
from isthmus.paths._repaired import Repaired
from isthmus.paths._repairs import REPAIRS, Repair, check_repair, needs_data, repair_of

__all__ = [
    "REPAIRS",
    "HeldLayer",
    "Path",
    "Recompute",
    "Refreshed",
    "Repair",
    "Repaired",
    "Straight",
    "check_repair",
    "interpolate",
    "mixed",
    "needs_data",
    "recompute_of",
    "refreshed",
    "repair_of",
    "require_path",
    "seen_layers",
    "watched",
]
