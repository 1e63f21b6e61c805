"""Writing a state to a file, whole or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from isthmus.checkpoints._formats import WRITABLE, safetensors, suffix_of
from isthmus.errors import CheckpointError, printable
from isthmus.files import atomic_path, parse_json, refuse_overwriting
from isthmus.states import State, state_of, versions_of, with_versions_of

__all__ = ["save_state", "split_versions", "version_notes"]

_VERSIONS_KEY = "isthmus.state_dict_versions"
"""Where the versions of a state's modules lie among the strings of a safetensors file."""


def save_state(
    path: str | os.PathLike[str],
    state: Mapping[str, Tensor],
    metadata: Mapping[str, str] | None = None,
    *,
    inputs: Iterable[str | os.PathLike[str]] = (),
) -> None:
    """Write a state to a file, whole or not at all.

    The versions that ``state_dict()`` keeps for every module are written as well, since some modules (MNASNet, batch
    normalisation of old files) read a state without them in another way.

    Args:
        path: target, ending in ``.safetensors``, ``.pt`` or ``.pth``; its folder must exist.
        state: from name to tensor. Tensors are copied to the CPU; tied tensors are written once per name.
        metadata: strings kept beside the tensors (see :func:`load_metadata`).
        inputs: files and folders that the state was made from, which are never overwritten.

    Raises:
        CheckpointError: an unknown suffix, an entry that is not a tensor, or metadata that are not strings.
        OutputError: the folder is missing, read-only or full, or the target is one of the inputs.
        MissingExtraError: ``.safetensors`` without the ``io`` extra.
    """
    target = Path(path)
    suffix = suffix_of(target, WRITABLE)
    refuse_overwriting(target, inputs)
    given = state_of(state, str(target))
    tensors = with_versions_of(given, {k: v.cpu().contiguous() for k, v in given.items()})
    notes = dict(metadata or {})
    if any(not isinstance(x, str) for item in notes.items() for x in item):
        raise CheckpointError(
            f"{printable(target)}: metadata must map strings to strings, found {printable(notes)}."
        )
    with atomic_path(target) as temporary:
        if suffix == ".safetensors":
            _save_safetensors(temporary, tensors, notes)
        else:
            torch.save({"state_dict": tensors, "metadata": notes} if notes else tensors, temporary)


def version_notes(versions: Mapping[str, Any]) -> dict[str, str]:
    """Return the versions of a state's modules as strings of a safetensors file; nothing where there are none.

    Notes of other kinds than text and numbers, which no version is, are left out.
    """
    versions = {
        name: {str(k): v for k, v in notes.items() if v is None or isinstance(v, str | int | float)}
        for name, notes in versions.items()
    }
    return {_VERSIONS_KEY: json.dumps(versions, sort_keys=True)} if versions else {}


def split_versions(notes: Mapping[str, str], name: str) -> tuple[dict[str, str], dict[str, Any]]:
    """Return the strings of a safetensors file without the versions of modules, and these versions.

    Raises:
        CheckpointError: they are no JSON.
    """
    rest = dict(notes)
    text = rest.pop(_VERSIONS_KEY, None)
    found = None if text is None else parse_json(text, name)
    return rest, found if isinstance(found, dict) else {}


def _save_safetensors(path: Path, tensors: State, notes: dict[str, str]) -> None:
    library = safetensors()
    from safetensors.torch import save_file

    notes = {**notes, **version_notes(versions_of(tensors))}
    # Two names may share memory (tied weights), which the format does not allow.
    seen: set[int] = set()
    for name, tensor in tensors.items():
        pointer = tensor.untyped_storage().data_ptr()
        tensors[name] = tensor.clone() if pointer in seen else tensor
        seen.add(pointer)
    mode = path.stat().st_mode
    try:
        save_file(tensors, path, metadata=notes or None)
    except library.SafetensorError as error:
        raise OSError(str(error)) from error
    path.chmod(mode)
    _sort_metadata(path)


def _sort_metadata(path: Path) -> None:
    """Put the metadata of a safetensors file in the order of their keys, which the writer draws by chance.

    Then equal states with equal metadata are equal files. Only keys change places, so the header keeps its length.
    """
    with path.open("rb+") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        notes = header.get("__metadata__")
        if notes is None or len(notes) < 2:
            return
        header["__metadata__"] = dict(sorted(notes.items()))
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
        if len(text) <= length:
            file.seek(8)
            file.write(text.ljust(length))
