"""Writing a state to a file, whole or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from isthmus.checkpoints._formats import WRITABLE, safetensors, suffix_of
from isthmus.errors import CheckpointError, printable
from isthmus.files import atomic_path, refuse_overwriting
from isthmus.states import State, state_of, versions_of, with_versions_of

__all__ = ["VERSIONS_KEY", "save_state"]

VERSIONS_KEY = "isthmus.state_dict_versions"
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


def _save_safetensors(path: Path, tensors: State, notes: dict[str, str]) -> None:
    library = safetensors()
    from safetensors.torch import save_file

    versions = versions_of(tensors)
    if versions:
        notes = {**notes, VERSIONS_KEY: json.dumps(versions, sort_keys=True)}
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
