"""States: mappings from tensor name to tensor, read from modules and checked before use."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Mapping
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn

from isthmus.errors import CheckpointError, ShapeError, printable

__all__ = [
    "State",
    "check_finite",
    "check_same_architecture",
    "computed_digest",
    "digest_of",
    "equal_entries",
    "equal_states",
    "state_of",
    "versions_of",
    "widest_dtype",
    "with_tied",
    "with_versions",
    "with_versions_of",
]

State = dict[str, Tensor]

_VERSIONS = "_metadata"
"""The attribute in which ``state_dict()`` keeps the version of every module, and ``load_state_dict`` looks for it."""


def state_of(source: nn.Module | Mapping[str, Tensor], name: str = "model") -> State:
    """Return the tensors of a module or of a mapping, detached and sharing memory with the source.

    The versions of modules that ``state_dict()`` keeps beside its tensors stay with them.

    Raises:
        CheckpointError: an entry is not a tensor.
    """
    items = source.state_dict() if isinstance(source, nn.Module) else source
    state: State = {}
    for key, value in items.items():
        if not isinstance(value, Tensor):
            raise CheckpointError(
                f"{printable(name)}: expected a tensor under {printable(key)!r}, found {type(value).__name__}. "
                "Pass a state dict of tensors only."
            )
        state[key] = value.detach()
    return with_versions_of(items, state)


def versions_of(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return the versions of modules that ``state_dict()`` keeps beside its tensors; empty where there are none.

    From the name of a module to its notes, such as ``{"layer.0": {"version": 2}}``.
    """
    found = getattr(state, _VERSIONS, None)
    if not isinstance(found, Mapping):  # a file may hold anything under this name
        return {}
    return {
        name: notes for name, notes in found.items() if isinstance(name, str) and isinstance(notes, Mapping)
    }


def with_versions(tensors: Mapping[str, Tensor], versions: Mapping[str, Any]) -> State:
    """Return a state that carries the versions of modules, so that ``load_state_dict`` reads it as they say."""
    if not versions:
        return tensors if isinstance(tensors, dict) else dict(tensors)
    state: OrderedDict[str, Tensor] = OrderedDict(tensors)
    setattr(state, _VERSIONS, OrderedDict(versions))
    return state


def with_versions_of(source: Mapping[Any, Any], tensors: Mapping[str, Tensor], prefix: str = "") -> State:
    """Return a state made from another, with the versions of that one's modules.

    Args:
        source: the state that the tensors come from.
        tensors: the new tensors.
        prefix: what was removed from the names, such as ``"module."``; it is removed from the modules' names too.
    """
    versions = versions_of(source)
    if prefix:
        whole = prefix.removesuffix(".")
        versions = {
            "" if name == whole else name.removeprefix(prefix): notes
            for name, notes in versions.items()
            if name == whole or name.startswith(prefix)
        }
    return with_versions(tensors, versions)


def with_tied(state: Mapping[str, Tensor], network: Mapping[str, Tensor]) -> tuple[State, str]:
    """Add what a state holds under another name of the same memory in the network, and say so.

    Files of safetensors hold tied weights once, under whichever name their writer chose.

    Returns:
        The state, and a note, empty where nothing was added.
    """
    held = {memory: n for n in state if n in network and (memory := _memory(network[n]))}
    tied = {n: held[m] for n, tensor in network.items() if n not in state and (m := _memory(tensor)) in held}
    if not tied:
        return dict(state), ""
    name, twin = next(iter(tied.items()))
    more = f", and {len(tied) - 1} more likewise" if len(tied) > 1 else ""
    note = (
        f"{printable(name)!r} is not in the file and was taken from {printable(twin)!r}, with which the network shares "
        f"it{more}"
    )
    return {**state, **{n: state[t] for n, t in tied.items()}}, note


def _memory(tensor: Tensor) -> tuple[Any, ...]:
    """Return what two tensors have in common exactly if they are one view of one memory; empty where none is held."""
    if tensor.is_meta or tensor.layout != torch.strided or tensor.data_ptr() == 0:
        return ()
    return (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())


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
                f"{printable(key)!r}: {name_a} has shape {tuple(tensor.shape)}, {name_b} has "
                f"{tuple(state_b[key].shape)}. Networks of different widths cannot be joined by a permutation."
            )


def check_finite(state: Mapping[str, Tensor], name: str = "model") -> None:
    """Check that every floating tensor is finite.

    Raises:
        CheckpointError: naming the first tensor with NaN or infinite entries, and how many it has.
    """
    for key, tensor in state.items():
        if (tensor.is_floating_point() or tensor.is_complex()) and not tensor.is_meta:
            entries = _comparable(tensor)
            bad = 0 if _all_finite(entries) else int((~torch.isfinite(entries)).sum())
            if bad:
                raise CheckpointError(
                    f"{printable(name)}: {printable(key)!r} has {bad} NaN or infinite of {tensor.numel()} entries. "
                    "The network diverged or the file is damaged; use an earlier checkpoint."
                )


def _all_finite(entries: Tensor) -> bool:
    """Return whether all entries are finite, in one pass where torch has one: the extremes of a NaN are NaN."""
    if not entries.numel() or entries.is_complex() or entries.layout != torch.strided:
        return not entries.numel()
    return all(bool(torch.isfinite(extreme)) for extreme in torch.aminmax(entries))


def digest_of(state: Mapping[str, Tensor]) -> str:
    """Return a digest of a state: of names, dtypes, shapes and every byte of the tensors; 64 hexadecimal digits.

    Equal states have equal digests, in any order of names, on any device and in any layout of memory. Tensors without
    data (meta) count with their names, dtypes and shapes. A state that cannot change may know its own, as ``digest``.
    """
    known = getattr(state, "digest", None)
    return known if isinstance(known, str) else computed_digest(state)


def computed_digest(state: Mapping[str, Tensor]) -> str:
    """Return the digest of a state from its entries (see :func:`digest_of`)."""
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


def widest_dtype(state: Mapping[str, Tensor]) -> torch.dtype:
    """Return the floating dtype that holds every floating tensor of a state without loss; float32 without any.

    Mixed widths are common (norms in float32 beside weights in bfloat16), and a network runs in one. Eight bits are too
    few to run in, and count as float32.
    """
    found = {t.dtype for t in state.values() if t.is_floating_point()}
    widths = [torch.float32 if dtype.itemsize == 1 else dtype for dtype in found]
    return reduce(torch.promote_types, widths) if widths else torch.float32


def equal_entries(a: Tensor, b: Tensor) -> bool:
    """Return whether two tensors have the same shape and entries, in any dtype (torch compares no 8-bit floats)."""
    return torch.equal(_comparable(a), _comparable(b))


def equal_states(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    """Return whether two states of one architecture have the same entries everywhere."""
    return all(equal_entries(tensor, b[name].to(tensor.device)) for name, tensor in a.items())


def _comparable(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.is_floating_point() and tensor.dtype.itemsize == 1 else tensor


def _some(names: list[str], limit: int = 4) -> str:
    shown = ", ".join(repr(printable(n)) for n in names[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"
