"""From a model folder's configuration to the network, on the meta device and without remote code."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from isthmus.errors import CheckpointError, MissingExtraError, ModelError, printable
from isthmus.files import read_json
from isthmus.pretrained._bounds import parameters_on_meta, require_countable
from isthmus.pretrained._lazy import LazyState
from isthmus.pretrained._links import require_inside, roots_of

__all__ = ["Described", "build", "describe", "read_config"]

_LARGEST_CONFIG = 4 * 2**20
"""Bytes of a configuration that are read: those with the names of 20,000 classes have one million."""


@dataclass(frozen=True)
class Described:
    """What a folder's configuration says of its network.

    Attributes:
        folder: where it lies.
        config: the configuration.
        name: of the network's class.
        native: the class in transformers; None for one that the folder's own code defines, which the caller trusts.
    """

    folder: Path
    config: Mapping[str, Any]
    name: str
    native: Any


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


def describe(folder: Path, *, architecture: str | None = None, trust_remote_code: bool = False) -> Described:
    """Read what a folder's configuration says of its network, and check that it can be built.

    Args:
        folder: with ``config.json``.
        architecture: name of the class; default: the first of the configuration's ``architectures``.
        trust_remote_code: whether code from the folder may be run.

    Raises:
        CheckpointError: no configuration, or one without ``architectures``.
        ModelError: an unknown architecture, one that needs remote code, quantised weights, or a count of parts that no
            network has.
        MissingExtraError: transformers is not installed.
    """
    raw = read_config(folder)
    name = architecture or _architecture(folder, raw)
    if raw.get("quantization_config"):
        raise ModelError(
            f"{printable(folder)}: holds quantised weights, whose packed units cannot be permuted. Use the checkpoint "
            "that it was quantised from."
        )
    require_countable(folder, raw)
    transformers = _transformers()
    native = _native(transformers, name)
    if native is None and not trust_remote_code:
        raise ModelError(_unknown(folder, raw, name))
    return Described(folder, raw, name, native)


def build(described: Described, file: LazyState) -> tuple[nn.Module, dict[str, Tensor]]:
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
        MissingExtraError: transformers is not installed.
    """
    folder, name, native = described.folder, described.name, described.native
    transformers = _transformers()
    try:
        with parameters_on_meta(folder, file):
            if native is None:
                model = _remote(transformers, folder, described.config, name)
            else:
                config = native.config_class.from_pretrained(str(folder))
                model = native(_quiet(config))
    except (MissingExtraError, ModelError):
        raise
    except Exception as error:  # whatever the configuration makes the library or remote code raise
        raise ModelError(
            f"{printable(folder)}: building {printable(name)} from config.json failed with {type(error).__name__}: "
            f"{printable(error)}. Does transformers know this configuration? Try another version of it."
        ) from error
    buffers = {k: b.detach() for k, b in model.named_buffers(remove_duplicate=False)}
    return model.eval().to("meta"), buffers


def _architecture(folder: Path, raw: Mapping[str, Any]) -> str:
    named = raw.get("architectures")
    if not isinstance(named, list) or not named or not isinstance(named[0], str):
        raise CheckpointError(
            f"{printable(folder)}: config.json names no architectures, so the network's class is unknown. Add "
            '"architectures": ["…"] to it, such as "LlamaForCausalLM", or pass architecture=....'
        )
    return named[0]


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise MissingExtraError(
            'Reading model folders needs transformers: pip install "isthmus[hf]".'
        ) from error
    return transformers


def _native(transformers: Any, name: str) -> Any:
    """Return the network class that transformers itself has under a name."""
    found = getattr(transformers, name, None) if name.isidentifier() else None
    is_network = isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)
    return found if is_network and getattr(found, "config_class", None) is not None else None


def _unknown(folder: Path, raw: Mapping[str, Any], name: str) -> str:
    if "auto_map" in raw:
        return (
            f"{printable(folder)}: refused, because {printable(name)} is defined by code in the checkpoint itself "
            "(auto_map), which would be run. If you have read and trust that code, pass trust_remote_code=True "
            "(--trust-remote-code)."
        )
    return (
        f"{printable(folder)}: transformers has no architecture {printable(name)!r}. Check config.json, or install a "
        "version of transformers that knows it."
    )


def _quiet(config: Any) -> Any:
    """Switch off what only some callers ask for: caches, hidden states, attentions, other kernels.

    A kernel named in ``config.json`` may be code on the hub, which transformers would fetch and run.
    """
    for key in getattr(config, "sub_configs", None) or ():
        if (part := getattr(config, key, None)) is not None:
            _quiet(part)
    for switch in ("use_cache", "output_hidden_states", "output_attentions"):
        if getattr(config, switch, False):
            setattr(config, switch, False)
    for kernel in ("_attn_implementation_internal", "_experts_implementation_internal"):
        if getattr(config, kernel, None) is not None:
            setattr(config, kernel, None)
    if getattr(config, "return_dict", True) is False:
        config.return_dict = True
    return config


def _remote(transformers: Any, folder: Path, raw: Mapping[str, Any], name: str) -> nn.Module:
    """Build a class from the checkpoint's own code, which the caller trusts."""
    places = raw.get("auto_map") or {}
    autos = [k for k, place in places.items() if str(place).rpartition(".")[2] == name]
    if not autos:
        raise ModelError(
            f"{printable(folder)}: auto_map of config.json does not say where {printable(name)!r} is defined. Correct "
            "config.json."
        )
    config = transformers.AutoConfig.from_pretrained(str(folder), trust_remote_code=True)
    return getattr(transformers, autos[0]).from_config(_quiet(config), trust_remote_code=True)
