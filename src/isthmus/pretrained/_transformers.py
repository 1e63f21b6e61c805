"""Model folders of transformers: its classes, their construction, and the names it gives to old tensors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from isthmus.batches import Batch
from isthmus.errors import CheckpointError, MissingExtraError, ModelError, printable
from isthmus.pretrained._examples import example_for
from isthmus.pretrained._lazy import TRANSFORMERS_WEIGHTS
from isthmus.pretrained._library import FolderFacts

__all__ = ["Transformers"]


class Transformers:
    """See :class:`isthmus.pretrained._library.Library`."""

    name = "transformers"
    weights = TRANSFORMERS_WEIGHTS

    def architecture(self, folder: Path, config: Mapping[str, Any]) -> str:
        """Return the first of the configuration's ``architectures``.

        Raises:
            CheckpointError: it has none.
        """
        named = config.get("architectures")
        if not isinstance(named, list) or not named or not isinstance(named[0], str):
            raise CheckpointError(
                f"{printable(folder)}: config.json names no architectures, so the network's class is unknown. Add "
                '"architectures": ["…"] to it, such as "LlamaForCausalLM", or pass architecture=....'
            )
        return named[0]

    def native(self, folder: Path, name: str) -> Any:
        """Return the network class that transformers itself has under a name; None if there is none.

        Raises:
            MissingExtraError: transformers is not installed.
        """
        transformers = _transformers()
        found = getattr(transformers, name, None) if name.isidentifier() else None
        is_network = isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)
        return found if is_network and getattr(found, "config_class", None) is not None else None

    def unknown(self, folder: Path, config: Mapping[str, Any], name: str, trusted: bool) -> str:
        """Say why a class that transformers does not have is refused; empty if its code is trusted."""
        if trusted:
            return ""
        if "auto_map" in config:
            return (
                f"{printable(folder)}: refused, because {printable(name)} is defined by code in the checkpoint itself "
                "(auto_map), which would be run. If you have read and trust that code, pass trust_remote_code=True "
                "(--trust-remote-code)."
            )
        return (
            f"{printable(folder)}: transformers has no architecture {printable(name)!r}. Check config.json, or install "
            "a version of transformers that knows it."
        )

    def construct(self, described: FolderFacts) -> nn.Module:
        """Build the network that a configuration describes."""
        if described.native is None:
            return _remote(described.folder, described.config, described.name)
        config = described.native.config_class.from_pretrained(str(described.folder))
        return described.native(_quiet(config))

    def renamed(
        self, model: nn.Module, keys: Iterable[str], expected: Mapping[str, object]
    ) -> dict[str, str]:
        """Return the names that transformers gives; nothing in versions without such a table (before 5.0)."""
        try:
            from transformers.conversion_mapping import get_model_conversion_mapping
            from transformers.core_model_loading import WeightConverter, rename_source_key
        except ImportError:
            return {}
        transforms = get_model_conversion_mapping(model)  # type: ignore[arg-type]
        renamings = [t for t in transforms if not isinstance(t, WeightConverter)]
        prefix = str(getattr(model, "base_model_prefix", "") or "") or None
        return {
            key: rename_source_key(key, renamings, [], prefix, dict(expected))[0]  # type: ignore[arg-type]
            for key in sorted(keys)
        }

    def require_writable(self, names: Mapping[str, tuple[str, ...]], shards: int) -> None:
        """Do nothing: transformers follows its renamings in every file."""

    def example(self, model: nn.Module) -> Batch:
        """Make example inputs (see :func:`isthmus.pretrained._examples.example_for`)."""
        return example_for(model)


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise MissingExtraError(
            'Reading model folders needs transformers: pip install "isthmus[hf]".'
        ) from error
    return transformers


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


def _remote(folder: Path, raw: Mapping[str, Any], name: str) -> nn.Module:
    """Build a class from the checkpoint's own code, which the caller trusts."""
    transformers = _transformers()
    places = raw.get("auto_map") or {}
    autos = [k for k, place in places.items() if str(place).rpartition(".")[2] == name]
    if not autos:
        raise ModelError(
            f"{printable(folder)}: auto_map of config.json does not say where {printable(name)!r} is defined. Correct "
            "config.json."
        )
    config = transformers.AutoConfig.from_pretrained(str(folder), trust_remote_code=True)
    return getattr(transformers, autos[0]).from_config(_quiet(config), trust_remote_code=True)
