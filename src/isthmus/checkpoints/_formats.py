"""The two formats of checkpoints, told apart by the file's suffix, and what a file looks like by its first bytes."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from isthmus.errors import CheckpointError, MissingExtraError, printable

__all__ = [
    "READABLE",
    "WRITABLE",
    "check_format",
    "damaged",
    "is_torch",
    "looks_like",
    "safetensors",
    "suffix_of",
]

_SAFETENSORS = (".safetensors",)
_TORCH = (".pt", ".pth")
# Other names that trainers give to files of torch.save: Lightning, Hugging Face, older examples of torch.
_ALSO_TORCH = (".ckpt", ".bin", ".th", ".tar")
WRITABLE = (*_SAFETENSORS, *_TORCH)
"""Suffixes of the checkpoints that can be written."""
READABLE = (*WRITABLE, *_ALSO_TORCH)
"""Suffixes of the checkpoints that can be read; other names of torch files are read, not written."""

# First bytes of a torch file: a zip archive or, before torch 1.6, a pickled magic number.
TORCH_HEADS = (b"PK", b"\x80\x02\x8a\x0a")
PICKLE_HEAD = b"\x80"
_OTHER_HEADS = {
    b"GGUF": "a GGUF file, which holds packed weights",
    b"\x89HDF": "an HDF5 file (Keras)",
    b"\x93NUMPY": "a NumPy array",
    b"\x1f\x8b": "a gzip archive",
    b"<": "a page or an XML file, as a failed download leaves it",
    b"version https://git-lfs": "a pointer of Git LFS: the file itself was not downloaded",
}


def check_format(path: str | os.PathLike[str]) -> None:
    """Check that the suffix of a path names a format that can be read and written.

    Raises:
        CheckpointError: it does not.
    """
    suffix_of(Path(path), WRITABLE)


def suffix_of(path: Path, known: tuple[str, ...] = READABLE) -> str:
    """Return the suffix of a checkpoint, in lower case.

    Raises:
        CheckpointError: it is not among those known.
    """
    suffix = path.suffix.lower()
    if suffix not in known:
        raise CheckpointError(
            f"{printable(path)}: unknown checkpoint format {printable(suffix) or '(no suffix)'!r}. "
            f"Use one of {', '.join(known)}."
        )
    return suffix


def is_torch(path: Path) -> bool:
    """Return whether a path names a file of torch; the other format is safetensors.

    Raises:
        CheckpointError: it names neither.
    """
    return suffix_of(path) not in _SAFETENSORS


def looks_like(head: bytes) -> str:
    """Say what a file is by its first bytes."""
    if head.startswith(TORCH_HEADS):
        return "a torch file (.pt)"
    if head[8:9] == b"{":
        return "a safetensors file (.safetensors)"
    if head.startswith(PICKLE_HEAD):
        return "a Python pickle"
    return next(
        (what for start, what in _OTHER_HEADS.items() if head.startswith(start)),
        "neither a torch nor a safetensors file",
    )


def damaged(path: Path, head: bytes, expected: str, message: str) -> CheckpointError:
    """Return the error of a file that its reader refused, with the reader's reason in one sentence."""
    looks = looks_like(head)
    if looks != expected:
        return CheckpointError(
            f"{printable(path)}: expected {expected}, but it looks like {looks}. Give the file its right suffix."
        )
    # Only the reader's first sentence: what follows is its own advice.
    first = message.split("\n")[0].split(". ")[0].rstrip(".") if message else "the file ends too early"
    first = printable(first, 200).replace("(", "[").replace(")", "]")
    return CheckpointError(
        f"{printable(path)}: {expected} that is truncated or damaged ({first}). Copy or make it again."
    )


def safetensors() -> Any:
    """Return the library of that name.

    Raises:
        MissingExtraError: it is not installed.
    """
    try:
        import safetensors
        import safetensors.torch
    except ImportError as error:
        raise MissingExtraError(
            'Reading and writing .safetensors files needs safetensors: pip install "isthmus[io]", or use .pt.'
        ) from error
    return safetensors
