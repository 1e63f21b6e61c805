"""Alignments: the relabelling of one network that brings it close to another, as a value that can be stored."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar, cast

from torch import Tensor, nn

from isthmus.checkpoints import load_metadata, load_state, save_state
from isthmus.couplings import (
    Coupling,
    CouplingSummary,
    Monomial,
    Permutation,
    moved_fraction,
    summary_of,
)
from isthmus.errors import CheckpointError, IsthmusWarning, SymmetryError
from isthmus.matching._schedules import Status
from isthmus.matching._stored import from_stored, keys_of, stored
from isthmus.replica import with_state
from isthmus.states import digest_of, state_of
from isthmus.symmetry import Relabelling, SymmetrySpec, apply, as_couplings, check_permutations

__all__ = ["Alignment"]

_FORMAT = "isthmus-alignment-1"
_ANY_COUPLING = "isthmus-alignment-2"
"""Where couplings are more than permutations, which versions that know the first format alone would misread."""
_STILL = 1e-12
"""Share of the largest entry of a unit's row that others may have in it while it counts as itself."""
_Network = TypeVar("_Network", nn.Module, Mapping[str, Tensor])


@dataclass(frozen=True, eq=False)
class Alignment:
    """Where each unit of network B goes: one coupling per group, mostly a permutation.

    Attributes:
        couplings: from group name to :class:`isthmus.couplings.Coupling`. An index tensor is taken as its permutation:
            int64, shape ``(group.size,)``; entry ``i`` is the unit of B placed at position ``i`` of A.
        spec: the symmetries these couplings act through.
        method: how they were found.
        sweeps: value of the objective after each sweep over the groups (maximised; its unit depends on the
            method), or the matched gain of a single pass.
        status: why the search stopped (:class:`Status`: ``"converged"``, ``"single pass"``, ``"sweep limit reached"``).
        costs: per group, the matched cost (mean squared distance per unit in the method's metric) before and
            after, where the method has one.
        similarities: per group that moves by more than a permutation, the cosine of A's and B's weights on which it
            acts, before and after it moves.
        notes: remarks for the reader, such as on units that never vary.
        settings: the options the alignment was made with.
        seed: seed of the generator.
        verification_error: largest relative change of B's outputs under this relabelling, measured in
            float64; ``None`` when it was not measured.
        digest_a: of the state of A it was found for (see :func:`isthmus.states.digest_of`); empty when unknown.
        digest_b: the same for B.

    Raises:
        SymmetryError: a coupling names an unknown group.
        ShapeError: an entry is not a permutation of the group's units, or a coupling of others.
    """

    couplings: Mapping[str, Coupling]
    spec: SymmetrySpec
    method: str
    sweeps: tuple[float, ...] = ()
    status: Status = Status.SINGLE_PASS
    costs: Mapping[str, tuple[float, float]] = field(default_factory=dict[str, tuple[float, float]])
    notes: tuple[str, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict[str, Any])
    seed: int = 0
    verification_error: float | None = None
    digest_a: str = ""
    digest_b: str = ""
    similarities: Mapping[str, tuple[float, float]] = field(default_factory=dict[str, tuple[float, float]])

    def __post_init__(self) -> None:
        """Check the couplings against the groups, and keep permutations as int64 on the CPU."""
        object.__setattr__(self, "couplings", as_couplings(self.spec, self.couplings))
        object.__setattr__(self, "status", Status(self.status))

    @property
    def permutations(self) -> dict[str, Tensor]:
        """Index tensors by group, int64.

        Raises:
            SymmetryError: a group moves by something else than a permutation; see ``couplings``.
        """
        return check_permutations(self.spec, self.couplings)

    @property
    def relabelling(self) -> Relabelling:
        """The couplings alone, as a value that composes and inverts."""
        return Relabelling(self.spec, self.couplings)

    def apply(self, network: _Network, *, check: bool = True) -> _Network:
        """Return B relabelled: a new module for a module, a new state for a state; the input stays untouched.

        What a module keeps besides its state, such as biases laid out in evaluation, is made anew in the new one.

        Args:
            network: B. A state that is neither A nor B, such as a later checkpoint or an average of B's weights, is
                relabelled like B, with a warning.
            check: look whether the network is the one that the alignment was found for.

        Raises:
            SymmetryError: the network is not of the architecture the alignment was made for, it is A, or it lacks the
                ones and zeros that folding left and that the couplings count on.

        Warns:
            IsthmusWarning: the network is neither A nor B.
        """
        state = state_of(network)
        if check:
            self._check_constants(state)
        relabelled = apply(self.spec, self.couplings, state)
        if check:
            self.check_network(state)
        if not isinstance(network, nn.Module):
            return cast(_Network, relabelled)
        caches = {(path, name): way for path, name, way in self.settings.get("caches", ())}
        return with_state(network, relabelled, caches)

    def check_network(self, state: Mapping[str, Tensor]) -> None:
        """Check that a state is of the network that the alignment was found for.

        Raises:
            SymmetryError: it is A's, so the alignment would be used the wrong way round.

        Warns:
            IsthmusWarning: it is neither A's nor B's.
        """
        if not (self.digest_a or self.digest_b):
            return
        found = digest_of(state)
        if found == self.digest_a != self.digest_b:
            raise SymmetryError(
                "This alignment moves network B towards A, and it is applied to A: the wrong way round. Apply it to B, "
                "or alignment.inverse() to A; apply(..., check=False) does as it is told."
            )
        if self.digest_b not in ("", found):
            warnings.warn(
                "This alignment is applied to another network than the one it was found for. That is meant for later "
                "checkpoints, averages and casts of that network, whose units are the same; align any other network "
                "anew. apply(..., check=False) says that it is meant.",
                IsthmusWarning,
                stacklevel=3,
            )

    def _check_constants(self, state: Mapping[str, Tensor]) -> None:
        """Refuse a network whose gains are no longer one, or biases zero, where what acts counts on that."""
        if not (self.spec.ones or self.spec.zeros) or not self.larger:
            return
        for names, value, what in ((self.spec.ones, 1, "ones"), (self.spec.zeros, 0, "zeros")):
            for name in names:
                if name in state and not bool((state[name] == value).all()):
                    raise SymmetryError(
                        f"This alignment was found for networks in which {name!r} holds nothing but {what}, as folding "
                        "leaves it, and in this one it does not. Fold it the same way first; apply(..., check=False) "
                        "does as it is told."
                    )

    def check_frame(self, state: Mapping[str, Tensor]) -> None:
        """Check that a state is of the network towards which B was relabelled.

        Warns:
            IsthmusWarning: it is another one's than A's.
        """
        if self.digest_a and digest_of(state) != self.digest_a:
            warnings.warn(
                "This alignment brings B close to another network than the one it is used with here. That is meant for "
                "later checkpoints, averages and casts of that network; align to any other network anew.",
                IsthmusWarning,
                stacklevel=3,
            )

    def inverse(self) -> Alignment:
        """Return the alignment that undoes this one, and that moves A towards B.

        It is for A and for the relabelled B; :meth:`apply` refuses B itself.
        """
        return replace(
            self,
            couplings=self.relabelling.inverse().couplings,
            method=f"inverse of {self.method}",
            similarities={},
            digest_a=self.digest_b if self.digest_a != self.digest_b else "",
            digest_b="",
        )

    def then(self, after: Alignment) -> Alignment:
        """Return the alignment of moving by this one and then by another, which begins where this one ends.

        Costs, sweeps and the measured change are those of neither, and are left out.

        Raises:
            SymmetryError: the other one acts through groups of other names or sizes.
        """
        return Alignment(
            self.relabelling.then(after.relabelling).couplings,
            self.spec,
            f"{self.method}, then {after.method}",
            notes=tuple(dict.fromkeys((*self.notes, *after.notes))),
            settings=self.settings,
            seed=self.seed,
            digest_a=after.digest_a,
            digest_b=self.digest_b,
        )

    @property
    def moved(self) -> dict[str, float]:
        """Share of each group's units that change place or are mixed with others, between 0 and 1."""
        return {name: _moved(coupling) for name, coupling in self.couplings.items()}

    @property
    def kinds(self) -> dict[str, int]:
        """How many groups move by each kind of coupling, such as ``{"Permutation": 3, "Rotation": 1}``."""
        return dict(Counter(type(c).__name__ for c in self.couplings.values()))

    @property
    def symmetry(self) -> str | tuple[str, ...]:
        """What was allowed to act on units when it was found: ``"permutations"``, ``"all"``, or classes by name."""
        found = self.settings.get("symmetry", "permutations")
        return found if isinstance(found, str) else tuple(map(str, found))

    @property
    def larger(self) -> tuple[str, ...]:
        """Names of the groups that move by more than a permutation."""
        return tuple(name for name, summary in self.summaries.items() if summary.kind != "permutation")

    @property
    def summaries(self) -> dict[str, CouplingSummary]:
        """What each group's coupling does to its units: kind, units moved and flipped, factors, condition number."""
        return {name: summary_of(coupling) for name, coupling in self.couplings.items()}

    def describe(self, group: str) -> str:
        """Return what a group does in a few words, with how alike its weights are before and after where that is known.

        Such as ``64 units: signs and permutation, 31 flipped, 60 moved``, or ``rotation, 64 dimensions; similarity
        0.12 → 0.91``.

        Raises:
            SymmetryError: there is no such group.
        """
        if group not in self.couplings:
            raise SymmetryError(f"no group named {group!r}; the alignment has {list(self.couplings)}.")
        words = str(summary_of(self.couplings[group]))
        if group not in self.similarities:
            return words
        before, after = self.similarities[group]
        return f"{words}; similarity {before:.2f} → {after:.2f}"

    def save(self, path: str | Path) -> None:
        """Write the couplings as safetensors, with everything else as JSON in the file's metadata.

        Equal alignments make equal files, byte for byte.

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
            "groups": list(self.couplings),
            "digest_a": self.digest_a,
            "digest_b": self.digest_b,
        }
        if self.similarities:
            details["similarities"] = {k: list(v) for k, v in self.similarities.items()}
        parts = {name: stored(name, coupling) for name, coupling in self.couplings.items()}
        tensors = {key: t for _, found in parts.values() for key, t in found.items()}
        plain = all(isinstance(c, Permutation) for c in self.couplings.values())
        if not plain:
            details["couplings"] = {name: kind for name, (kind, _) in parts.items()}
        details = json.loads(json.dumps(details))  # as it will be read
        details["digest"] = _digest(details, tensors)
        text = json.dumps(details, sort_keys=True)
        save_state(path, tensors, {"format": _FORMAT if plain else _ANY_COUPLING, "alignment": text})

    @classmethod
    def load(cls, path: str | Path) -> Alignment:
        """Read an alignment written by :meth:`save`.

        Files of earlier versions have no digests, and are read all the same.

        Raises:
            CheckpointError: the file is missing, damaged, changed since it was written, or holds something else.
        """
        tensors, metadata = load_state(path, prefix=""), load_metadata(path)
        if metadata.get("format") not in (_FORMAT, _ANY_COUPLING):
            raise CheckpointError(
                f"{path}: expected an alignment written by Isthmus, found format "
                f"{metadata.get('format', 'none')!r}."
            )
        try:
            details = json.loads(metadata["alignment"])
            kinds = details.get("couplings", {})
            _check_complete(path, details, kinds, tensors)
            spec = SymmetrySpec.from_json(details["spec"])
            order = [*details.get("groups", tensors)]
            found = {n: from_stored(kinds[n], tensors) if n in kinds else tensors[n] for n in order}
            return cls(
                couplings=as_couplings(spec, found),
                spec=spec,
                method=details["method"],
                sweeps=tuple(details["sweeps"]),
                status=Status(details["status"]),
                costs={k: (float(v[0]), float(v[1])) for k, v in details["costs"].items()},
                notes=tuple(details["notes"]),
                settings=details["settings"],
                seed=int(details["seed"]),
                verification_error=details["verification_error"],
                digest_a=str(details.get("digest_a", "")),
                digest_b=str(details.get("digest_b", "")),
                similarities={
                    k: (float(v[0]), float(v[1])) for k, v in details.get("similarities", {}).items()
                },
            )
        except CheckpointError:
            raise
        except (KeyError, TypeError, ValueError, AttributeError, IndexError, RecursionError) as error:
            raise CheckpointError(
                f"{path}: the alignment in it is damaged: {type(error).__name__}: {error}. Save it again."
            ) from error

    def __repr__(self) -> str:
        """Return one line: how it was found, and how much it moves."""
        moved, units = self._moved_units()
        return (
            f"Alignment(method={self.method!r}, groups={len(self.couplings)}, moved={moved} of {units} units)"
        )

    def _moved_units(self) -> tuple[int, int]:
        """Return how many units change place, and how many there are."""
        sizes = {name: c.shape[0] for name, c in self.couplings.items()}
        return sum(round(share * sizes[name]) for name, share in self.moved.items()), sum(sizes.values())

    def __str__(self) -> str:
        """Return a short summary: how it was found, and which share of the entries stays and why."""
        moved, units = self._moved_units()
        plural = "" if len(self.couplings) == 1 else "s"
        found = self.summaries.values()
        kinds = Counter(summary.kind for summary in found if summary.kind != "permutation")
        how = f" ({', '.join(f'{n} by {kind}' for kind, n in kinds.items())})" if kinds else ""
        flipped = sum(summary.flipped or 0 for summary in found)
        signs = f", {flipped} flipped" if flipped else ""
        error = (
            ""
            if self.verification_error is None
            else f", outputs of B changed by {self.verification_error:.1e}"
        )
        return (
            f"Alignment by {self.method}: {len(self.couplings)} group{plural}{how}, {moved} of {units} units moved"
            f"{signs}, {self.status}{error}. {self.spec.pinned_summary()}"
        )


def _moved(coupling: Coupling) -> float:
    """Return the share of units that another one, or a mixture, stands for."""
    if isinstance(coupling, Permutation | Monomial):
        return moved_fraction(coupling.index)
    matrix = coupling.matrix().detach()
    if not len(matrix):
        return 0.0
    same = (matrix - matrix.diagonal().diag()).abs().amax(1) <= _STILL * matrix.abs().amax(1)
    return 1 - float(same.double().mean())


def _digest(details: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """Return the digest of an alignment file's contents."""
    text = json.dumps({k: v for k, v in details.items() if k != "digest"}, sort_keys=True)
    return hashlib.sha256(f"{text} {digest_of(tensors)}".encode()).hexdigest()


def _check_complete(
    path: str | Path, details: Any, kinds: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> None:
    """Refuse a file whose groups or contents are not those that were written; earlier versions did not note them."""
    if "groups" in details:
        keys = {name: keys_of(kinds[name]) if name in kinds else [name] for name in details["groups"]}
        expected = {key for listed in keys.values() for key in listed}
        if expected != set(tensors):
            differing = sorted(expected ^ set(tensors))
            kind = "coupling" if kinds else "permutation"
            raise CheckpointError(
                f"{path}: the alignment in it is damaged: expected one {kind} for each of its "
                f"{len(details['groups'])} groups, but {differing[0]!r} is missing or not one of them. Save it again."
            )
    if "digest" in details and details["digest"] != _digest(details, tensors):
        raise CheckpointError(
            f"{path}: the alignment in it was changed after it was written: its digest is another. Save it again."
        )
