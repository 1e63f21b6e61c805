"""A search in a file, so that it can be taken up where it was left."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from isthmus.checkpoints import load_metadata, load_state, save_state
from isthmus.errors import CheckpointError

__all__ = ["KeptSearch", "StateFile"]

_FORMAT = "isthmus-refinement-1"


@dataclass(frozen=True, eq=False)
class KeptSearch:
    """A search as it was left: its step and seconds, its trace, and the tensors of :class:`Search`."""

    step: int
    seconds: float
    trace: Sequence[tuple[int, float]]
    elements: Mapping[str, Tensor]
    best: Mapping[str, Tensor]
    moments: Mapping[str, Tensor]


@dataclass(frozen=True)
class StateFile:
    """The file of one search.

    Attributes:
        path: ``.safetensors``.
        identity: digest of all that the search depends on.
    """

    path: Path
    identity: str

    def write(
        self,
        step: int,
        seconds: float,
        trace: Sequence[tuple[int, float]],
        elements: Mapping[str, Tensor],
        best: Mapping[str, Tensor],
        moments: Mapping[str, Tensor],
    ) -> None:
        """Write where the search stands, whole or not at all.

        Raises:
            OutputError: the file cannot be written.
            CheckpointError: its name does not end in ``.safetensors``.
        """
        parts = {"elements": elements, "best": best, "moments": moments}
        tensors = {
            f"{part}/{name}": t.detach().clone() for part, held in parts.items() for name, t in held.items()
        }
        details = json.dumps(
            {"step": step, "seconds": seconds, "trace": list(trace), "identity": self.identity}
        )
        save_state(self.path, tensors, {"format": _FORMAT, "refinement": details})

    def read(self) -> KeptSearch | None:
        """Return where the search was left; None where there is no file yet.

        Raises:
            CheckpointError: the file holds something else, or another search.
        """
        if self.path.suffix != ".safetensors":
            raise CheckpointError(
                f"{self.path}: the state of a refinement is written as .safetensors. Give such a name."
            )
        if not self.path.exists():
            return None
        tensors, metadata = load_state(self.path, prefix=""), load_metadata(self.path)
        if metadata.get("format") != _FORMAT:
            raise CheckpointError(
                f"{self.path}: expected the state of a refinement, found format {metadata.get('format', 'none')!r}. "
                "Choose another file."
            )
        details = json.loads(metadata["refinement"])
        if details["identity"] != self.identity:
            raise CheckpointError(
                f"{self.path}: this is the state of another refinement: of other networks, another start, other "
                "data, or other settings. Delete it, or choose another file."
            )
        parts: dict[str, dict[str, Tensor]] = {"elements": {}, "best": {}, "moments": {}}
        for key, tensor in tensors.items():
            part, _, name = key.partition("/")
            parts[part][name] = tensor
        trace = [(int(step), float(value)) for step, value in details["trace"]]
        return KeptSearch(int(details["step"]), float(details["seconds"]), trace, **parts)
