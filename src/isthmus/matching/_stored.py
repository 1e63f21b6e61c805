"""Couplings as named tensors, for files: what each kind is made of, and how it is made again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from isthmus.couplings import Coupling, Linear, Monomial, Nested, Permutation, Plan, Rotation
from isthmus.errors import CheckpointError

__all__ = ["from_stored", "keys_of", "stored"]

_PARTS: Mapping[type, tuple[str, tuple[str, ...]]] = {
    Permutation: ("permutation", ("index",)),
    Monomial: ("monomial", ("index", "factors")),
    Rotation: ("rotation", ("values",)),
    Linear: ("linear", ("values", "undone")),
    Plan: ("plan", ("mass",)),
}
_CLASSES: Mapping[str, tuple[Any, tuple[str, ...]]] = {
    kind: (made, parts) for made, (kind, parts) in _PARTS.items()
}


def stored(name: str, coupling: Coupling) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return what to write of one coupling: its kind with the keys of its tensors, and these tensors.

    A permutation's index has the name itself for its key, as it always had.

    Raises:
        CheckpointError: a class of coupling that files do not know.
    """
    if isinstance(coupling, Nested):
        parts = [stored(f"{name} / outer", coupling.outer)]
        parts += [stored(f"{name} / {k}", inner) for k, inner in enumerate(coupling.inner)]
        kinds, tensors = (
            [kind for kind, _ in parts],
            {key: t for _, found in parts for key, t in found.items()},
        )
        return {"kind": "nested", "outer": kinds[0], "inner": kinds[1:]}, tensors
    if type(coupling) not in _PARTS:
        raise CheckpointError(
            f"Storing an alignment: group {name!r} moves by {coupling!r}, of a class that files do not know. Express "
            f"it as one of {', '.join(made.__name__ for made in (*_PARTS, Nested))}."
        )
    kind, parts = _PARTS[type(coupling)]
    keys = {part: name if part == "index" else f"{name} / {part}" for part in parts}
    tensors = {keys[part]: getattr(coupling, part).detach().cpu().contiguous() for part in parts}
    return {"kind": kind, "tensors": keys}, tensors


def keys_of(kind: Mapping[str, Any]) -> list[str]:
    """Return the keys of the tensors of a coupling as it was written."""
    if kind["kind"] == "nested":
        return [key for part in (kind["outer"], *kind["inner"]) for key in keys_of(part)]
    return list(kind["tensors"].values())


def from_stored(kind: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Coupling:
    """Return a coupling as it was written.

    Raises:
        CheckpointError: a kind that this version does not know.
        KeyError: a tensor or an entry is missing.
        ShapeError: the tensors are none of that kind.
    """
    name = kind["kind"]
    if name == "nested":
        outer = from_stored(kind["outer"], tensors)
        if not isinstance(outer, Permutation):
            raise CheckpointError(
                f"The outer coupling of a nested one is stored as {kind['outer']['kind']!r}."
            )
        return Nested(outer, [from_stored(part, tensors) for part in kind["inner"]])
    if name not in _CLASSES:
        raise CheckpointError(
            f"A coupling is stored as {name!r}; this version knows {', '.join(map(repr, (*_CLASSES, 'nested')))}. Read "
            "the file with the version that wrote it, or a later one."
        )
    made, parts = _CLASSES[name]
    return made(**{part: tensors[kind["tensors"][part]] for part in parts})
