"""Model folders of diffusers: a network of its own classes, with the names of files that diffusers gives."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from isthmus.batches import Batch
from isthmus.errors import CheckpointError, MissingExtraError, ModelError, OutputError, printable
from isthmus.pretrained._diffusers_examples import example_for
from isthmus.pretrained._latents import with_latents
from isthmus.pretrained._lazy import DIFFUSERS_WEIGHTS
from isthmus.pretrained._library import FolderFacts

__all__ = ["Diffusers"]


class Diffusers:
    """See :class:`isthmus.pretrained._library.Library`."""

    name = "diffusers"
    weights = DIFFUSERS_WEIGHTS

    def architecture(self, folder: Path, config: Mapping[str, Any]) -> str:
        """Return the configuration's ``_class_name``.

        Raises:
            CheckpointError: it is no name of a class.
        """
        named = config.get("_class_name")
        if not isinstance(named, str):
            raise CheckpointError(
                f"{printable(folder)}: _class_name of config.json is {printable(named)}, expected the name of one of "
                'diffusers\' networks, such as "UNet2DModel". Correct config.json, or pass architecture=....'
            )
        return named

    def native(self, folder: Path, name: str) -> Any:
        """Return the network class that diffusers itself has under a name; None if there is none.

        Raises:
            MissingExtraError: diffusers is not installed.
            ModelError: its class needs a package that is not installed.
        """
        diffusers = _diffusers()
        try:
            found = getattr(diffusers, name, None) if name.isidentifier() else None
        except Exception as error:  # its classes are imported when they are asked for, with what they need
            raise ModelError(
                f"{printable(folder)}: importing diffusers' {name} failed with {type(error).__name__}: "
                f"{printable(error)}. Install what it needs."
            ) from error
        if isinstance(found, type) and issubclass(found, diffusers.ModelMixin):
            return found if issubclass(found, diffusers.ConfigMixin) else None
        return None

    def unknown(self, folder: Path, config: Mapping[str, Any], name: str, trusted: bool) -> str:
        """Say why a class that diffusers does not have is refused: no code from a folder is run."""
        return (
            f"{printable(folder)}: diffusers has no network {printable(name)!r}. Check _class_name in config.json, or "
            "install a version of diffusers that knows it; code that lies in such a folder is not run."
        )

    def construct(self, described: FolderFacts) -> nn.Module:
        """Build the network that a configuration describes, as ``from_pretrained`` does."""
        return with_latents(described.native.from_config(dict(described.config)))

    def renamed(
        self, model: nn.Module, keys: Iterable[str], expected: Mapping[str, object]
    ) -> dict[str, str]:
        """Return the names that diffusers gives to the attention of old autoencoders."""
        moved = {key: key for key in keys}
        if type(model)._fix_state_dict_keys_on_load is _diffusers().ModelMixin._fix_state_dict_keys_on_load:  # type: ignore[attr-defined]
            model._fix_state_dict_keys_on_load(moved)  # type: ignore[operator]
        return {old: new for new, old in moved.items()}

    def require_writable(self, names: Mapping[str, tuple[str, ...]], shards: int) -> None:
        """Check that old names are not spread over several files, where diffusers does not know them.

        Raises:
            OutputError: they would be.
        """
        old = next((key for key, own in names.items() if own and key not in own), None)
        if shards > 1 and old is not None:
            raise OutputError(
                f"Cannot write {shards} files: diffusers reads the old name {printable(old)!r} only where all tensors "
                "lie in one. Choose a larger shard size (max_shard_size, --max-shard-size), or load the folder and "
                "write it with save_pretrained first, which gives new names."
            )

    def example(self, model: nn.Module) -> Batch:
        """Make example inputs (see :func:`isthmus.pretrained._diffusers_examples.example_for`)."""
        return example_for(model)


def _diffusers() -> Any:
    try:
        import diffusers
    except ImportError as error:
        raise MissingExtraError(
            'Reading model folders of diffusers needs diffusers: pip install "isthmus[diffusers]".'
        ) from error
    return diffusers
