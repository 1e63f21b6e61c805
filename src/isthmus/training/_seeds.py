"""Seeds for independent purposes, derived from one seed by a digest: stable over versions and processes."""

from __future__ import annotations

import hashlib

import torch

__all__ = ["derive_seed", "seeded_generator"]


def derive_seed(seed: int, *purpose: str) -> int:
    """Return a seed in ``[0, 2**63)`` for a purpose, such as ``"order"``; other purposes give other seeds."""
    text = "\x00".join((str(int(seed)), *purpose))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def seeded_generator(seed: int, *purpose: str) -> torch.Generator:
    """Return a CPU generator for a purpose (see :func:`derive_seed`)."""
    return torch.Generator().manual_seed(derive_seed(seed, *purpose))
