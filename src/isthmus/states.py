"""States: mappings from tensor name to tensor, read from modules and checked before use."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from isthmus.errors import CheckpointError, ShapeError

__all__ = ["State", "check_finite", "check_same_architecture", "digest_of", "state_of"]

State = dict[str, Tensor]


def state_of(source: nn.Module | Mapping[str, Tensor], name: str = "model") -> State:
    """Return the tensors of a module or of a mapping, detached and sharing memory with the source.

    Raises:
        CheckpointError: an entry is not a tensor.
    """
    items = source.state_dict() if isinstance(source, nn.Module) else source
    state: State = {}
    for key, value in items.items():
        if not isinstance(value, Tensor):
            raise CheckpointError(
                f"{name}: expected a tensor under {key!r}, found {type(value).__name__}. "
                "Pass a state dict of tensors only."
            )
        state[key] = value.detach()
    return state


def check_same_architecture(
    state_a: Mapping[str, Tensor], state_b: Mapping[str, Tensor], name_a: str = "A", name_b: str = "B"
) -> None:
    """Check that two states have the same keys and shapes.

    Raises:
        CheckpointError: a key is missing or extra.
        ShapeError: a tensor's shape differs.
    """
    missing = [k for k in state_a if k not in state_b]
    extra = [k for k in state_b if k not in state_a]
    if missing or extra:
        parts = []
        if missing:
            parts.append(f"{name_b} lacks {_some(missing)}")
        if extra:
            parts.append(f"{name_b} has {_some(extra)}, unknown to {name_a}")
        raise CheckpointError(
            f"{name_a} and {name_b} are different architectures: {'; '.join(parts)}. "
            "Both networks must be built by the same code with the same settings."
        )
    for key, tensor in state_a.items():
        if tensor.shape != state_b[key].shape:
            raise ShapeError(
                f"{key!r}: {name_a} has shape {tuple(tensor.shape)}, {name_b} has {tuple(state_b[key].shape)}. "
                "Networks of different widths cannot be joined by a permutation."
            )


def check_finite(state: Mapping[str, Tensor], name: str = "model") -> None:
    """Check that every floating tensor is finite.

    Raises:
        CheckpointError: naming the first tensor with NaN or infinite entries, and how many it has.
    """
    for key, tensor in state.items():
        if (tensor.is_floating_point() or tensor.is_complex()) and not tensor.is_meta:
            bad = int((~torch.isfinite(tensor)).sum())
            if bad:
                raise CheckpointError(
                    f"{name}: {key!r} has {bad} NaN or infinite of {tensor.numel()} entries. "
                    "The network diverged or the file is damaged; use an earlier checkpoint."
                )


def digest_of(state: Mapping[str, Tensor]) -> str:
    """Return a digest of a state: of names, dtypes, shapes and every byte of the tensors; 64 hexadecimal digits.

    Equal states have equal digests, in any order of names, on any device and in any layout of memory. Tensors without
    data (meta) count with their names, dtypes and shapes.
    """
    found = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach()
        found.update(f"{len(name)} {name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        if not tensor.is_meta and tensor.numel():
            entries = tensor.to_dense() if tensor.layout != torch.strided else tensor
            found.update(
                entries.resolve_conj()
                .resolve_neg()
                .cpu()
                .contiguous()
                .reshape(-1)
                .view(torch.uint8)
                .numpy()
                .data
            )
    return found.hexdigest()


def _some(names: list[str], limit: int = 4) -> str:
    shown = ", ".join(repr(n) for n in names[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"
