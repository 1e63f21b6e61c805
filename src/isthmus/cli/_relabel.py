"""How B is relabelled before it is used: as an alignment file says, by a method, or not at all."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from isthmus.batches import Batches
from isthmus.cli import _folders as folders
from isthmus.cli import _options as options
from isthmus.cli._pair import NetworkPair, align_pair, training_part
from isthmus.errors import DataError
from isthmus.matching import Alignment, method_under
from isthmus.pretrained import OpenedModel

__all__ = ["Relabel"]

Tell = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Relabel:
    """What the options ``--alignment``, ``--method``, ``--symmetry``, ``--shape``, ``--outputs`` and ``--seed`` say.

    Attributes:
        file: an alignment file.
        method: a method, or ``"none"``.
        shapes: shapes of example inputs.
        outputs: outputs to preserve.
        seed: of everything random.
        symmetry: by what the method matches, as text; None for permutations.

    Raises:
        DataError: both a file and a method, a symmetry without a method, or an unknown one.
    """

    file: Path | None
    method: str | None
    shapes: Sequence[str] | None
    outputs: Sequence[str | int] | None
    seed: int
    symmetry: str | None = None

    def __post_init__(self) -> None:
        """Check that one way was chosen at most."""
        if self.file is not None and self.method is not None:
            raise DataError("Give --alignment, a file, or --method, which aligns now; not both.")
        if self.symmetry is not None and self.method in (None, "none"):
            raise DataError(
                f"--symmetry {self.symmetry} says by what --method matches: give --method as well"
                + (
                    "."
                    if self.file is None
                    else ", or --alignment alone, whose file says what acts on the units."
                )
            )
        _ = self.matched_by

    @property
    def name(self) -> str | None:
        """The file or the method with what it matches by; None where B stays as it is."""
        if self.file is not None:
            return str(self.file)
        return (
            None
            if self.method in (None, "none")
            else method_under(self.method, self.matched_by or "permutations")
        )

    @property
    def matched_by(self) -> str | tuple[str, ...] | None:
        """What may act on units, as :func:`isthmus.align` takes it; None leaves it to the method.

        Raises:
            DataError: an unknown class.
        """
        return options.symmetry_of(self.symmetry)

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
            symmetry=self.matched_by,
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
            symmetry=self.matched_by,
            seed=self.seed,
            tell=tell,
        )
