"""Which stored tensor is which tensor of the network: names in the files and names in the module."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import nn

from isthmus.errors import CheckpointError
from isthmus.pretrained._lazy import LazyState
from isthmus.pretrained._library import Library

__all__ = ["shared_names", "stored_names"]

# Names that old checkpoints use for what torch calls weight and bias.
_OLD_ENDINGS = {".gamma": ".weight", ".beta": ".bias"}


def stored_names(folder: Path, model: nn.Module, file: LazyState, library: Library) -> dict[str, str]:
    """Return, for each name in the network, the name in the files.

    As the library does on loading: its own renamings are followed where it has any, the prefix of the base
    network may be there in one and not in the other, and a tied tensor may be stored under one name only.

    Raises:
        CheckpointError: a parameter is not stored, has another shape, or is tied in the network but stored
            twice with different values.
    """
    expected = model.state_dict(keep_vars=True)
    names: dict[str, str] = {}
    for key, found in _renamed(library, model, file, expected).items():
        if found in expected:
            names.setdefault(found, key)
    for tied in shared_names(model):
        present = [n for n in tied if n in names]
        _check_equal(folder, file, list(dict.fromkeys(names[n] for n in present)))
        names.update({n: names[present[0]] for n in tied if n not in names and present})
    missing = [n for n, t in expected.items() if n not in names and isinstance(t, nn.Parameter)]
    if missing:
        raise CheckpointError(
            f"{folder}: the weights lack {_some(missing)} of {type(model).__name__}. They belong to another "
            f"architecture, or are stored in a form that {library.name} converts on loading (experts one by one, "
            "say), which cannot be permuted in place. Name the right class in config.json."
        )
    for name, key in names.items():
        if file.stored(key).shape != tuple(expected[name].shape):
            raise CheckpointError(
                f"{folder}: {key!r} has shape {file.stored(key).shape} in the file, but {type(model).__name__} "
                f"of config.json expects {tuple(expected[name].shape)}. Weights and configuration do not match."
            )
    return {name: names[name] for name in expected if name in names}


def shared_names(model: nn.Module) -> list[tuple[str, ...]]:
    """Return the names of every tensor of a network's state, several where it is tied, however it is stored."""
    found: dict[int, list[str]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        found.setdefault(id(tensor), []).append(name)
    return [tuple(names) for names in found.values()]


def _renamed(
    library: Library, model: nn.Module, keys: Iterable[str], expected: Mapping[str, object]
) -> dict[str, str]:
    """Return the name in the network that each stored name stands for, or the stored name itself."""
    found = {key: key for key in keys}
    found.update(library.renamed(model, found, expected))
    prefix = str(getattr(model, "base_model_prefix", "") or "")
    return {
        key: next((n for n in (name, *_candidates(key, prefix)) if n in expected), key)
        for key, name in found.items()
    }


def _candidates(key: str, prefix: str) -> list[str]:
    """Return the names in the network that a stored name may stand for, the likeliest first."""
    endings = [key] + [key.removesuffix(o) + n for o, n in _OLD_ENDINGS.items() if key.endswith(o)]
    if not prefix:
        return endings
    bare = [k.removeprefix(f"{prefix}.") for k in endings if k.startswith(f"{prefix}.")]
    return endings + [f"{prefix}.{k}" for k in endings] + bare


def _check_equal(folder: Path, file: LazyState, keys: list[str]) -> None:
    """Check that what the network ties is equal where it is stored twice."""
    for key in keys[1:]:
        if not torch.equal(file[keys[0]], file[key]):
            raise CheckpointError(
                f"{folder}: {keys[0]!r} and {key!r} are one tensor in the network, but differ in the file. Set "
                '"tie_word_embeddings": false in config.json if they are meant to differ.'
            )


def _some(names: list[str], limit: int = 3) -> str:
    shown = ", ".join(repr(n) for n in names[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"
