"""Checkpoints on disk: states written whole or not at all, read without running any code, as trainers leave them."""

from isthmus.checkpoints._formats import READABLE, WRITABLE, check_format
from isthmus.checkpoints._read import Checkpoint, load_metadata, load_state, read_checkpoint
from isthmus.checkpoints._write import save_state
from isthmus.files import atomic_folder, atomic_path

__all__ = [
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
