"""Checkpoints on disk: states written whole or not at all, read without running any code, as trainers leave them."""

from isthmus.checkpoints._formats import READABLE, WRITABLE, check_format, looks_like
from isthmus.checkpoints._names import as_in_network, unwrapped
from isthmus.checkpoints._read import Checkpoint, load_metadata, load_state, read_checkpoint, split_key
from isthmus.checkpoints._write import save_state, split_versions, version_notes
from isthmus.files import atomic_folder, atomic_path

__all__ = [
    "split_versions",
    "version_notes",
    "split_key",
    "as_in_network",
    "unwrapped",
    "looks_like",
    "READABLE",
    "WRITABLE",
    "Checkpoint",
    "atomic_folder",
    "atomic_path",
    "check_format",
    "load_metadata",
    "load_state",
    "read_checkpoint",
    "save_state",
]
