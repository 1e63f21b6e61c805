"""What is known of a library that writes model folders."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import nn

from isthmus.batches import Batch
from isthmus.pretrained._lazy import WeightNames

__all__ = ["FolderFacts", "Library"]


@dataclass(frozen=True)
class FolderFacts:
    """What a folder's configuration says of its network.

    Attributes:
        folder: where it lies.
        config: the configuration.
        name: of the network's class.
        native: the class in the library; None for one that the folder's own code defines, which the caller trusts.
        library: which one wrote the folder.
    """

    folder: Path
    config: Mapping[str, Any]
    name: str
    native: Any
    library: Library


class Library(Protocol):
    """A library whose model folders can be opened; its package is imported when it is asked for something."""

    @property
    def name(self) -> str:
        """As it is called in messages and by the hub."""
        ...

    @property
    def weights(self) -> WeightNames:
        """What it calls the files of weights."""
        ...

    def architecture(self, folder: Path, config: Mapping[str, Any]) -> str:
        """Return the name of the network's class that a configuration gives.

        Raises:
            CheckpointError: it gives none.
        """
        ...

    def native(self, folder: Path, name: str) -> Any:
        """Return the network class that the library itself has under a name; None if there is none.

        Raises:
            MissingExtraError: the library is not installed.
        """
        ...

    def unknown(self, folder: Path, config: Mapping[str, Any], name: str, trusted: bool) -> str:
        """Say why a class that the library does not have is refused; empty if its code is trusted and can be run."""
        ...

    def construct(self, described: FolderFacts) -> nn.Module:
        """Build the network that a configuration describes."""
        ...

    def renamed(
        self, model: nn.Module, keys: Iterable[str], expected: Mapping[str, object]
    ) -> dict[str, str]:
        """Return the names in the network that the library gives to stored names on loading."""
        ...

    def require_writable(self, names: Mapping[str, tuple[str, ...]], shards: int) -> None:
        """Check that it will load tensors under their stored names from so many files.

        Args:
            names: the names in the network of every stored one.
            shards: number of files.

        Raises:
            OutputError: it would not.
        """
        ...

    def example(self, model: nn.Module) -> Batch:
        """Make example inputs for a network.

        Raises:
            DataError: none are known for it.
        """
        ...
