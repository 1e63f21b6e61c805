"""From a model folder's configuration to the network, on the meta device and without remote code."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from isthmus.errors import CheckpointError, MissingExtraError, ModelError

__all__ = ["build", "read_config"]


def read_config(folder: Path) -> dict[str, Any]:
    """Return a folder's ``config.json``.

    Raises:
        CheckpointError: there is none, or it is no JSON object.
    """
    path = folder / "config.json"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{folder}: has no config.json. Give a model folder written by save_pretrained."
        ) from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read as JSON: {error}. Copy it again.") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found {type(found).__name__}. Copy it again.")
    return found


def build(
    folder: Path, *, architecture: str | None = None, trust_remote_code: bool = False
) -> tuple[nn.Module, dict[str, Tensor]]:
    """Build a folder's network in evaluation mode, in float32 on the meta device.

    Buffers that are not stored (rotary frequencies, masks) are computed by the network's constructor; their
    values are returned beside it.

    Args:
        folder: with ``config.json``.
        architecture: name of the class; default: the first of the configuration's ``architectures``.
        trust_remote_code: whether code from the folder may be run.

    Returns:
        The network, and the values of all its buffers by name.

    Raises:
        CheckpointError: no configuration, or one without ``architectures``.
        ModelError: an unknown architecture, one that needs remote code, quantised weights, or a failing build.
        MissingExtraError: transformers is not installed.
    """
    raw = read_config(folder)
    name = architecture or _architecture(folder, raw)
    if raw.get("quantization_config"):
        raise ModelError(
            f"{folder}: holds quantised weights, whose packed units cannot be permuted. Use the checkpoint that it "
            "was quantised from."
        )
    transformers = _transformers()
    native = _native(transformers, name)
    if native is None and not trust_remote_code:
        raise ModelError(_unknown(folder, raw, name))
    try:
        with _parameters_on_meta():
            if native is None:
                model = _remote(transformers, folder, raw, name)
            else:
                config = native.config_class.from_pretrained(str(folder))
                model = native(_quiet(config))
    except (MissingExtraError, ModelError):
        raise
    except Exception as error:  # whatever the configuration makes the library or remote code raise
        raise ModelError(
            f"{folder}: building {name} from config.json failed with {type(error).__name__}: {error}. Does "
            "transformers know this configuration? Try another version of it."
        ) from error
    buffers = {k: b.detach() for k, b in model.named_buffers(remove_duplicate=False)}
    return model.eval().to("meta"), buffers


def _architecture(folder: Path, raw: Mapping[str, Any]) -> str:
    named = raw.get("architectures")
    if not isinstance(named, list) or not named or not isinstance(named[0], str):
        raise CheckpointError(
            f"{folder}: config.json names no architectures, so the network's class is unknown. Add "
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
    found = getattr(transformers, name, None)
    is_network = isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)
    return found if is_network and getattr(found, "config_class", None) is not None else None


def _unknown(folder: Path, raw: Mapping[str, Any], name: str) -> str:
    if "auto_map" in raw:
        return (
            f"{folder}: refused, because {name} is defined by code in the checkpoint itself (auto_map), which would "
            "be run. If you have read and trust that code, pass trust_remote_code=True (--trust-remote-code)."
        )
    return (
        f"{folder}: transformers has no architecture {name!r}. Check config.json, or install a version of "
        "transformers that knows it."
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
            f"{folder}: auto_map of config.json does not say where {name!r} is defined. Correct config.json."
        )
    config = transformers.AutoConfig.from_pretrained(str(folder), trust_remote_code=True)
    return getattr(transformers, autos[0]).from_config(_quiet(config), trust_remote_code=True)


@contextlib.contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Let modules built by this thread have their parameters on the meta device; buffers stay real."""
    here = threading.get_ident()

    def to_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
        if parameter is None or parameter.is_meta or threading.get_ident() != here:
            return None
        return nn.Parameter(torch.empty_like(parameter, device="meta"), parameter.requires_grad)

    handle = register_module_parameter_registration_hook(to_meta)  # type: ignore[arg-type]
    try:
        yield
    finally:
        handle.remove()
