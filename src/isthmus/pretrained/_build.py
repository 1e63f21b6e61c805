"""From a model folder's configuration to the network, on the meta device and without remote code."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from isthmus.errors import CheckpointError, MissingExtraError, ModelError, printable
from isthmus.files import read_json
from isthmus.pretrained._bounds import parameters_on_meta, require_countable
from isthmus.pretrained._lazy import LazyState
from isthmus.pretrained._libraries import library_of
from isthmus.pretrained._library import FolderFacts
from isthmus.pretrained._links import require_inside, roots_of

__all__ = ["build", "describe", "read_config"]

_LARGEST_CONFIG = 4 * 2**20
"""Bytes of a configuration that are read: those with the names of 20,000 classes have one million."""


def read_config(folder: Path) -> dict[str, Any]:
    """Return a folder's ``config.json``.

    Raises:
        CheckpointError: there is none, or it is no JSON object, too large, nested too deep, or a link to elsewhere.
    """
    path = folder / "config.json"
    if not os.path.lexists(path):
        raise CheckpointError(
            f"{printable(folder)}: has no config.json. Give a model folder written by save_pretrained."
        )
    require_inside(path, roots_of(folder))
    # Python writes infinite limits as Infinity, and so do some configurations.
    found = read_json(path, largest=_LARGEST_CONFIG, allow_infinite=True, what="configuration")
    if not isinstance(found, dict):
        raise CheckpointError(
            f"{printable(path)}: expected a JSON object, found {type(found).__name__}. Copy it again."
        )
    return found


def describe(
    folder: Path, *, architecture: str | None = None, trust_remote_code: bool = False
) -> FolderFacts:
    """Read what a folder's configuration says of its network, and check that it can be built.

    Args:
        folder: with ``config.json``.
        architecture: name of the class; default: as the configuration names it.
        trust_remote_code: whether code from the folder may be run.

    Raises:
        CheckpointError: no configuration, or one that names no class.
        ModelError: an unknown architecture, one that needs remote code, quantised weights, or a count of parts that no
            network has.
        MissingExtraError: the library that wrote the folder is not installed.
    """
    raw = read_config(folder)
    library = library_of(raw)
    name = architecture or library.architecture(folder, raw)
    if raw.get("quantization_config"):
        raise ModelError(
            f"{printable(folder)}: holds quantised weights, whose packed units cannot be permuted. Use the checkpoint "
            "that it was quantised from."
        )
    require_countable(folder, raw)
    native = library.native(folder, name)
    if native is None and (refusal := library.unknown(folder, raw, name, trust_remote_code)):
        raise ModelError(refusal)
    return FolderFacts(folder, raw, name, native, library)


def build(described: FolderFacts, file: LazyState) -> tuple[nn.Module, dict[str, Tensor]]:
    """Build a folder's network in evaluation mode, in float32 on the meta device.

    Buffers that are not stored (rotary frequencies, masks) are computed by the network's constructor; their
    values are returned beside it.

    Args:
        described: by :func:`describe`.
        file: the stored tensors, which bound what may be built.

    Returns:
        The network, and the values of all its buffers by name.

    Raises:
        ModelError: a failing build, or a network far larger than what is stored.
        MissingExtraError: the library that wrote the folder is not installed.
    """
    folder, name, library = described.folder, described.name, described.library
    try:
        with torch.random.fork_rng(devices=[]), parameters_on_meta(folder, file):  # initial values are drawn
            model = library.construct(described)
    except (MissingExtraError, ModelError):
        raise
    except Exception as error:  # whatever the configuration makes the library or remote code raise
        raise ModelError(
            f"{printable(folder)}: building {printable(name)} from config.json failed with {type(error).__name__}: "
            f"{printable(error)}. Does {library.name} know this configuration? Try another version of it."
        ) from error
    buffers = {k: b.detach() for k, b in model.named_buffers(remove_duplicate=False)}
    return model.eval().to("meta"), buffers
