"""Merging LoRA adapters (folders of peft) from their files alone: no network, no peft."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from isthmus.errors import CheckpointError, DataError, IsthmusWarning, printable
from isthmus.files import read_json, refuse_overwriting
from isthmus.merging import averaging, normalised, require_several
from isthmus.pretrained._card import adapters_card
from isthmus.pretrained._extras import extras_of
from isthmus.pretrained._folder import free_target, output_folder
from isthmus.pretrained._lazy import LazyState
from isthmus.pretrained._low_rank import WAYS, AdapterWay, LowRank, averaged_products, mean_of
from isthmus.pretrained._shards import PlannedTensor, write_file
from isthmus.states import check_finite, check_same_architecture

__all__ = ["MergedAdapter", "are_adapters", "merge_adapters"]

_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PAIRS = {"lora_A": "lora_B", "lora_embedding_A": "lora_embedding_B"}
"""By the part of a name that the inner factor (rank × inputs) has, that of the outer one (outputs × rank)."""

_MUST_AGREE = (
    "r",
    "lora_alpha",
    "use_rslora",
    "rank_pattern",
    "alpha_pattern",
    "target_modules",
    "fan_in_fan_out",
    "bias",
    "lora_bias",
    "modules_to_save",
    "layers_to_transform",
    "layers_pattern",
    "layer_replication",
    "init_lora_weights",
)
"""Entries of a configuration that say what the tensors mean."""
_REFUSED = {
    "use_dora": "DoRA (use_dora), whose magnitudes divide by norms of the network's own weights",
    "target_parameters": "adapters of stacked parameters (target_parameters), whose factors lie in one tensor",
    "trainable_token_indices": "trained tokens (trainable_token_indices), which are no low-rank products",
}
"""Entries of a configuration that may not be set, and what they stand for."""


@dataclass(frozen=True)
class MergedAdapter:
    """An adapter that was written.

    Attributes:
        path: the folder.
        way: how the factors were averaged.
        tensors: number of tensors.
        errors: by way, the distance of the average to the mean of the products, relative to its norm, all pairs
            together; no unit.
        by_module: the same for every pair of factors.
    """

    path: Path
    way: AdapterWay
    tensors: int
    errors: Mapping[AdapterWay, float]
    by_module: Mapping[str, Mapping[AdapterWay, float]]

    def __str__(self) -> str:
        """Return how far every way is from the mean of the products."""
        listed = ", ".join(f"{name} {error:.3g}" for name, error in self.errors.items())
        return (
            f"{len(self.by_module)} pairs of factors averaged ({self.way}). Distance to the mean of the products, "
            f"relative to its norm: {listed}"
        )


def are_adapters(paths: Sequence[str | os.PathLike[str]]) -> bool:
    """Return whether all paths are folders with an adapter, and no network."""
    return all((Path(p) / _CONFIG).is_file() and not (Path(p) / "config.json").exists() for p in paths)


def merge_adapters(
    paths: Sequence[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    weights: Sequence[float] | None = None,
    *,
    way: AdapterWay = "svd",
) -> MergedAdapter:
    r"""Write the weighted average of LoRA adapters as a folder that peft loads; neither peft nor a network is needed.

    An adapter adds :math:`s B A` to a weight, and its factors may be mixed by any invertible matrix,
    :math:`B A = (B M)(M^{-1} A)`, so those of two trainings cannot be averaged one by one. All tensors keep the first
    adapter's names, shapes and dtypes; biases and modules that were trained whole are averaged.

    Args:
        paths: two or more folders with ``adapter_config.json`` and ``adapter_model.safetensors``, of one rank, alpha
            and choice of layers, for one network.
        out: the folder to write: new, or empty.
        weights: one for each, divided by their sum; None gives all the same.
        way: ``"svd"`` cuts the mean of the products to the rank: no adapter of this rank is nearer to it.
            ``"aligned"`` balances the factors of each product, rotates them towards the first one's, and averages.
            ``"as they are"`` averages what is stored: right for adapters of one run.

    Raises:
        CheckpointError: no such adapters, other tensors or settings, another method than LoRA, or NaN or infinite
            entries.
        ShapeError: other sizes, or as many weights as there are no folders.
        DataError: fewer than two folders, an unknown way, or unusable weights.
        OutputError: the folder is there already or cannot be written; nothing half-written is left.

    Warns:
        IsthmusWarning: the adapters name different networks.

    Source:
        Hu et al. 2022 (LoRA); Eckart and Young 1936.
    """
    require_several(len(paths), "adapters")
    if way not in WAYS:
        raise DataError(f"Averaging adapters by {way!r}: expected one of {', '.join(map(repr, WAYS))}.")
    shares, folders = normalised(weights, len(paths)), [Path(p) for p in paths]
    free_target(out)
    refuse_overwriting(out, folders, folder=True)
    configs = [_config(folder) for folder in folders]
    _require_alike(folders, configs)
    states = [_state(folder) for folder in folders]
    for folder, state in zip(folders, states, strict=True):
        check_same_architecture(states[0].shapes(), state.shapes(), str(folders[0]), str(folder))
        check_finite(state, str(folder))
    outer_of = _pairs(folders[0], states[0])
    planned = [PlannedTensor(k, states[0].stored(k).dtype, states[0].stored(k).shape) for k in states[0]]
    found = _Averages(states, shares, way, outer_of)
    extras = extras_of(folders[0], {_WEIGHTS})
    with output_folder(out, sum(t.nbytes for t in planned) + extras.nbytes) as folder:
        write_file(folder / _WEIGHTS, planned, found.blocks, states[0].metadata)
        merged = MergedAdapter(Path(out), way, len(planned), found.errors(), found.by_module)
        shown = list(zip((_titled(f) for f in folders), shares, strict=True))
        base = configs[0].get("base_model_name_or_path")
        (folder / "README.md").write_text(
            adapters_card(shown, base if isinstance(base, str) else "", WAYS[way], merged.errors[way]),
            encoding="utf-8",
        )
        extras.copy(folder)
    named = {str(c.get("base_model_name_or_path")) for c in configs}
    if len(named) > 1:
        warnings.warn(
            f"The adapters name different networks: {', '.join(printable(n) for n in sorted(named))}. Their average is "
            "right only if these are copies of one network.",
            IsthmusWarning,
            stacklevel=2,
        )
    return merged


def _titled(folder: Path) -> str:
    return folder.resolve().name


def _config(folder: Path) -> dict[str, Any]:
    """Return the configuration of a LoRA adapter.

    Raises:
        CheckpointError: there is none, or one of another method or a variant that is no plain product.
    """
    if not (folder / _CONFIG).is_file():
        raise CheckpointError(f"{printable(folder)}: holds no {_CONFIG}. Give a folder written by peft.")
    config = read_json(folder / _CONFIG, allow_infinite=True)
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        kind = config.get("peft_type") if isinstance(config, dict) else type(config).__name__
        raise CheckpointError(
            f"{printable(folder)}: expected an adapter of peft_type LORA, found {printable(kind)!r}. Only "
            "products of two factors are averaged; join others to their network first."
        )
    for key, what in _REFUSED.items():
        if config.get(key):
            raise CheckpointError(
                f"{printable(folder)}: {what}, cannot be averaged from its files. Join it to its network with "
                "merge_and_unload(), and merge the networks."
            )
    return config


def _require_alike(folders: Sequence[Path], configs: Sequence[Mapping[str, Any]]) -> None:
    """Check that the tensors of all adapters mean the same.

    Raises:
        CheckpointError: they do not.
    """
    for key in _MUST_AGREE:
        first = _plain(configs[0].get(key))
        for folder, config in zip(folders[1:], configs[1:], strict=True):
            other = _plain(config.get(key))
            if other != first:
                raise CheckpointError(
                    f"{printable(folders[0])} has {key} = {printable(first)} and {printable(folder)} "
                    f"{printable(other)}: expected adapters of one rank, scale and choice of layers. Join them to "
                    "their network with merge_and_unload(), and merge the networks."
                )


def _plain(value: Any) -> Any:
    """Return a setting such that what means the same is equal: nothing, or a list in any order."""
    if isinstance(value, list):
        value = sorted(map(str, value))
    return value or None


def _state(folder: Path) -> LazyState:
    if not (folder / _WEIGHTS).is_file():
        raise CheckpointError(
            f"{printable(folder)}: holds no {_WEIGHTS}. Save the adapter with save_pretrained, which writes it."
        )
    return LazyState.open(folder / _WEIGHTS)


def _pairs(folder: Path, state: LazyState) -> dict[str, str]:
    """Return the name of the outer factor by that of the inner one.

    Raises:
        CheckpointError: a factor without the other, of other ranks, or tensors of LoRA that are not known.
    """
    found: dict[str, str] = {}
    for key in state:
        part = next((p for p in key.split(".") if p in _PAIRS), None)
        if part is not None:
            found[key] = key.replace(part, _PAIRS[part])
    outers = set(found.values())
    for key in state:
        parts = key.split(".")
        bias = parts[-1] == "bias" and "lora_B" in parts
        if "lora_" in key and not bias and key not in found and key not in outers:
            what = "is a magnitude of DoRA" if "magnitude" in key else "is not known"
            raise CheckpointError(
                f"{printable(folder)}: {printable(key)!r} {what}: expected pairs of {' and '.join(_PAIRS)} with their "
                "outer factors. Join the adapter to its network with merge_and_unload(), and merge the networks."
            )
    for inner, outer in found.items():
        shape, other = state.stored(inner).shape, state.stored(outer).shape if outer in state else ()
        if len(shape) < 2 or len(other) < 2 or shape[0] != other[1] or any(n != 1 for n in other[2:]):
            raise CheckpointError(
                f"{printable(folder)}: {printable(inner)!r} of shape {shape} has no outer factor of its rank: expected "
                f"{printable(outer)!r} of shape (outputs, {shape[0] if shape else 'rank'}), found {other or 'none'}."
            )
    return found


class _Averages:
    """Averages of the tensors of adapters, computed when they are written."""

    def __init__(
        self,
        states: Sequence[LazyState],
        shares: Sequence[float],
        way: AdapterWay,
        outer_of: Mapping[str, str],
    ) -> None:
        self._states, self._shares, self._outer_of = states, shares, outer_of
        self._way: AdapterWay = way
        self._inner_of = {outer: inner for inner, outer in outer_of.items()}
        self._waiting: dict[str, Tensor] = {}
        self._sizes: dict[str, float] = {}
        self.by_module: dict[str, Mapping[AdapterWay, float]] = {}

    def blocks(self, tensor: PlannedTensor) -> Iterator[Tensor]:
        """Yield one tensor of the average."""
        key = tensor.key
        if key in self._outer_of or key in self._inner_of:
            if key not in self._waiting:
                self._average(self._inner_of.get(key, key))
            values = self._waiting.pop(key).reshape(tensor.shape)
        else:
            values = averaging(self._shares)([state[key].double() for state in self._states])
        rounded = values.to(tensor.dtype)
        if not bool(torch.isfinite(rounded).all()):
            raise CheckpointError(
                f"The average of {printable(key)!r} is too large for {str(tensor.dtype).removeprefix('torch.')}. Save "
                "the first adapter in float32."
            )
        yield rounded

    def _average(self, inner: str) -> None:
        """Average one pair of factors; both wait until they are written."""
        outer = self._outer_of[inner]
        products = [
            LowRank(state[outer].double().flatten(1), state[inner].double().flatten(1))
            for state in self._states
        ]
        found, self.by_module[inner] = averaged_products(products, self._shares, self._way)
        self._sizes[inner] = mean_of(products, self._shares).norm()
        self._waiting |= {inner: found.inner, outer: found.outer}

    def errors(self) -> dict[AdapterWay, float]:
        """Return the distances to the mean of the products by way, all pairs together."""
        total = sum(size**2 for size in self._sizes.values()) ** 0.5
        return {
            way: sum((self.by_module[m][way] * size) ** 2 for m, size in self._sizes.items()) ** 0.5 / total
            if total
            else 0.0
            for way in WAYS
        }
