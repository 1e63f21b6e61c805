"""How B is relabelled before it is used: as an alignment file says, by a method, or not at all."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from isthmus.batches import Batches
from isthmus.cli import _folders as folders
from isthmus.cli._pair import NetworkPair, align_pair, training_part
from isthmus.errors import DataError
from isthmus.matching import Alignment, Symmetry
from isthmus.pretrained import OpenedModel

__all__ = ["Relabel"]

Tell = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Relabel:
    """What the options ``--alignment``, ``--method``, ``--shape``, ``--outputs`` and ``--seed`` say.

    Attributes:
        file: an alignment file.
        method: a method, or ``"none"``.
        shapes: shapes of example inputs.
        outputs: outputs to preserve.
        seed: of everything random.
        symmetry: what may act on units when a method aligns now.

    Raises:
        DataError: both a file and a method.
    """

    file: Path | None
    method: str | None
    shapes: Sequence[str] | None
    outputs: Sequence[str | int] | None
    seed: int
    symmetry: Symmetry = "permutations"

    def __post_init__(self) -> None:
        """Check that one way was chosen at most."""
        if self.file is not None and self.method is not None:
            raise DataError("Give --alignment, a file, or --method, which aligns now; not both.")
        if self.symmetry != "permutations" and (self.file is not None or self.name is None):
            raise DataError(
                "--symmetry says what a method may do when it aligns now, and none does. Give --method as well, or "
                "leave --symmetry out: an alignment file says by itself what moves units."
            )

    @property
    def name(self) -> str | None:
        """The file or the method; None where B stays as it is."""
        if self.file is not None:
            return str(self.file)
        return None if self.method == "none" else self.method

    def of(
        self, pair: NetworkPair, data: Mapping[str, Batches], tell: Tell | None = None
    ) -> Alignment | None:
        """Return the relabelling of B of a pair in memory."""
        if self.file is not None:
            return Alignment.load(self.file)
        if self.name is None:
            return None
        return align_pair(
            pair,
            data,
            method=self.method,
            batches=training_part(data),
            shapes=self.shapes,
            outputs=self.outputs,
            symmetry=self.symmetry,
            seed=self.seed,
            tell=tell,
        )

    def of_folders(
        self, pair: tuple[OpenedModel, OpenedModel], batches: Batches | None, tell: Tell | None = None
    ) -> Alignment | None:
        """Return the relabelling of B of two model folders."""
        if self.file is not None:
            return Alignment.load(self.file)
        if self.name is None:
            return None
        return folders.align_folders(
            *pair,
            method=self.method,
            batches=batches,
            outputs=self.outputs,
            symmetry=self.symmetry,
            seed=self.seed,
            tell=tell,
        )
