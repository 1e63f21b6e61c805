"""Alignments: the relabelling of one network that brings it close to another, as a value that can be stored."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from isthmus.checkpoints import load_metadata, load_state, save_state
from isthmus.coupling import moved_fraction
from isthmus.errors import CheckpointError
from isthmus.states import state_of
from isthmus.symmetry import SymmetrySpec, apply
from isthmus.symmetry._apply import check_permutations

__all__ = ["Alignment"]

_FORMAT = "isthmus-alignment-1"
_Network = TypeVar("_Network", nn.Module, Mapping[str, Tensor])


@dataclass(frozen=True, eq=False)
class Alignment:
    """Where each unit of network B goes: one permutation per group.

    Attributes:
        permutations: from group name to index tensor, int64, shape ``(group.size,)``; entry ``i`` is the unit
            of B placed at position ``i`` of A.
        spec: the symmetries these permutations act through.
        method: how they were found.
        sweeps: value of the objective after each sweep over the groups (maximised; its unit depends on the
            method), or the matched gain of a single pass.
        status: ``"converged"``, ``"single pass"`` or ``"sweep limit reached"``.
        costs: per group, the matched cost (mean squared distance per unit in the method's metric) before and
            after, where the method has one.
        notes: what a reader should know, such as units that never vary.
        settings: the options the alignment was made with.
        seed: seed of the generator.
        verification_error: largest relative change of B's outputs under this relabelling, measured in
            float64; ``None`` when it was not measured.
    """

    permutations: dict[str, Tensor]
    spec: SymmetrySpec
    method: str
    sweeps: tuple[float, ...] = ()
    status: str = "single pass"
    costs: Mapping[str, tuple[float, float]] = field(default_factory=dict[str, tuple[float, float]])
    notes: tuple[str, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict[str, Any])
    seed: int = 0
    verification_error: float | None = None

    def apply(self, network: _Network) -> _Network:
        """Return B relabelled: a new module for a module, a new state for a state; the input stays untouched.

        Raises:
            SymmetryError: the network is not of the architecture the alignment was made for.
        """
        if isinstance(network, nn.Module):
            moved = copy.deepcopy(network)
            moved.load_state_dict(apply(self.spec, self.permutations, state_of(network)))
            return moved
        return cast(_Network, apply(self.spec, self.permutations, state_of(network)))

    def inverse(self) -> Alignment:
        """Return the alignment that undoes this one."""
        inverted = self.spec.invert(self.permutations)
        return replace(self, permutations=inverted, method=f"inverse of {self.method}")

    @property
    def moved(self) -> dict[str, float]:
        """Share of each group's units that change place, between 0 and 1."""
        return {name: moved_fraction(p) for name, p in self.permutations.items()}

    def save(self, path: str | Path) -> None:
        """Write the permutations as safetensors, with everything else as JSON in the file's metadata.

        Raises:
            OutputError: the file cannot be written; nothing half-written is left.
        """
        details = {
            "spec": self.spec.to_json(),
            "method": self.method,
            "sweeps": list(self.sweeps),
            "status": self.status,
            "costs": {k: list(v) for k, v in self.costs.items()},
            "notes": list(self.notes),
            "settings": dict(self.settings),
            "seed": self.seed,
            "verification_error": self.verification_error,
        }
        save_state(path, self.permutations, {"format": _FORMAT, "alignment": json.dumps(details)})

    @classmethod
    def load(cls, path: str | Path) -> Alignment:
        """Read an alignment written by :meth:`save`.

        Raises:
            CheckpointError: the file is missing, damaged or holds something else.
        """
        permutations, metadata = load_state(path, prefix=""), load_metadata(path)
        if metadata.get("format") != _FORMAT:
            raise CheckpointError(
                f"{path}: expected an alignment written by Isthmus, found format "
                f"{metadata.get('format', 'none')!r}."
            )
        try:
            details = json.loads(metadata["alignment"])
            spec = SymmetrySpec.from_json(details["spec"])
            return cls(
                permutations=check_permutations(spec, permutations),
                spec=spec,
                method=details["method"],
                sweeps=tuple(details["sweeps"]),
                status=details["status"],
                costs={k: (float(v[0]), float(v[1])) for k, v in details["costs"].items()},
                notes=tuple(details["notes"]),
                settings=details["settings"],
                seed=int(details["seed"]),
                verification_error=details["verification_error"],
            )
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"{path}: the alignment in it is damaged: {type(error).__name__}: {error}. Save it again."
            ) from error

    def __str__(self) -> str:
        """Return a short summary: how it was found, and which share of the entries stays and why."""
        units = sum(len(p) for p in self.permutations.values())
        moved = sum(int((p != torch.arange(len(p))).sum()) for p in self.permutations.values())
        error = (
            ""
            if self.verification_error is None
            else f", outputs of B changed by {self.verification_error:.1e}"
        )
        return (
            f"Alignment by {self.method}: {len(self.permutations)} groups, {moved} of {units} units moved, "
            f"{self.status}{error}. {self.spec.pinned_summary()}"
        )
