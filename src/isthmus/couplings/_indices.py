"""Permutations as index tensors: ``permutation[i]`` is the unit of B that is placed at position ``i`` of A."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from isthmus.errors import ShapeError

__all__ = [
    "compose_permutations",
    "identity_permutation",
    "invert_permutation",
    "invert_permutations",
    "moved_fraction",
    "random_permutation",
    "validate_permutation",
]


def identity_permutation(size: int) -> Tensor:
    """Return the permutation that moves nothing, int64, shape ``(size,)``."""
    return torch.arange(size)


def random_permutation(size: int, generator: torch.Generator | None = None) -> Tensor:
    """Return a uniformly random permutation, int64, shape ``(size,)``, drawn from ``generator``."""
    return torch.randperm(size, generator=generator)


def validate_permutation(permutation: Tensor, size: int, name: str = "permutation") -> Tensor:
    """Check that a tensor lists each of ``0 .. size - 1`` once, and return it as int64 on the CPU.

    Args:
        permutation: index tensor (or anything ``torch.as_tensor`` takes), shape ``(size,)``.
        size: number of units.
        name: how the error message calls it.

    Raises:
        ShapeError: wrong shape, not integers, or an index missing or repeated.
    """
    try:
        index = torch.as_tensor(permutation)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise ShapeError(
            f"{name}: expected integers, found {type(permutation).__name__} ({error}). Pass an int64 index tensor."
        ) from error
    if index.dtype in (torch.bool,) or index.is_floating_point() or index.is_complex():
        raise ShapeError(f"{name}: expected integers, found {index.dtype}. Pass an int64 index tensor.")
    index = index.detach().to(device="cpu", dtype=torch.int64)
    if index.shape != (size,):
        raise ShapeError(
            f"{name}: expected shape ({size},), found {tuple(index.shape)}. Each unit needs exactly one entry."
        )
    if not torch.equal(index.sort().values, torch.arange(size)):
        counts = torch.bincount(index.clamp(0, max(size - 1, 0)), minlength=size)
        missing = torch.nonzero(counts == 0).flatten()[:5].tolist()
        raise ShapeError(
            f"{name}: expected each of 0..{size - 1} exactly once; "
            f"{'missing ' + str(missing) if missing else 'indices out of range'}."
        )
    return index


def invert_permutation(permutation: Tensor) -> Tensor:
    """Return ``q`` with ``q[permutation[i]] = i``, so that ``x[permutation][q] == x``; shape ``(n,)``.

    Raises:
        ShapeError: an index is missing, repeated or out of range: nothing undoes that.
    """
    validate_permutation(permutation, permutation.numel())
    inverse = torch.empty_like(permutation)
    inverse[permutation.long()] = torch.arange(
        len(permutation), dtype=permutation.dtype, device=permutation.device
    )
    return inverse


def compose_permutations(first: Tensor, second: Tensor) -> Tensor:
    """Return the permutation equal to moving by ``first`` and then by ``second``: ``x[first][second]``.

    Raises:
        ShapeError: one of them is no permutation, or they move different numbers of units.
    """
    validate_permutation(first, first.numel(), "first permutation")
    validate_permutation(second, first.numel(), "second permutation")
    return first[second.long()]


def invert_permutations(permutations: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Invert every permutation of a mapping from group name to index tensor."""
    return {name: invert_permutation(p) for name, p in permutations.items()}


def moved_fraction(permutation: Tensor) -> float:
    """Return the share of units that do not stay where they are, between 0 and 1 (0 for no units)."""
    size = len(permutation)
    if size == 0:
        return 0.0
    return float((permutation != torch.arange(size, device=permutation.device)).double().mean())
