"""Two checkpoints and the network they belong to, read and checked."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from isthmus.batches import Batch, Batches, first_batch
from isthmus.checkpoints import load_state
from isthmus.cli import _console as console
from isthmus.cli._folders import are_folders, open_pair
from isthmus.cli._target import Target, load_target
from isthmus.errors import DataError
from isthmus.matching import Alignment, align
from isthmus.pretrained import LazyState, is_model_folder, open_model
from isthmus.states import check_finite, check_same_architecture, state_of, widest_dtype
from isthmus.study import resolve_data
from isthmus.symmetry import Outputs

__all__ = [
    "NetworkPair",
    "align_pair",
    "data_for",
    "example_for",
    "example_of_shapes",
    "load_pair",
    "training_part",
]


@dataclass(frozen=True, eq=False)
class NetworkPair:
    """Networks A and B, in evaluation mode, and the target they were built by."""

    a: nn.Module
    b: nn.Module
    target: Target


def load_pair(
    path_a: Path, path_b: Path, target: str | None, *, trust_remote_code: bool = False
) -> NetworkPair:
    """Build the network twice and load a checkpoint into each; model folders bring their network with them.

    The target, too, may be a model folder, whose network takes checkpoints of other forms; and a checkpoint of a
    network built in code may be a folder of shards.

    Raises:
        DataError: no target, where one is needed.
        CheckpointError: a file cannot be read, does not fit the network, or holds NaN or infinite values.
        ModelError: the target cannot be built.
    """
    if are_folders(path_a, path_b, target):
        a, b = open_pair(path_a, path_b, trust_remote_code)
        network = a.load()
        return NetworkPair(network, b.load(), Target(network, a.example))
    assert target is not None, "are_folders refuses"
    found = _folder_target(target, trust_remote_code) if is_model_folder(target) else load_target(target)
    return NetworkPair(_loaded(found.model, path_a), _loaded(found.model, path_b), found)


def _folder_target(folder: str, trust_remote_code: bool) -> Target:
    opened = open_model(folder, trust_remote_code=trust_remote_code)
    return Target(opened.load(), opened.example)


def _loaded(model: nn.Module, path: Path) -> nn.Module:
    if os.path.isdir(path):
        state = state_of(LazyState.open(path).like(state_of(model), str(path))[0], str(path))
    else:
        state = load_state(path, like=model)
    check_same_architecture(state_of(model), state, "the TARGET", str(path))
    check_finite(state, str(path))
    filled = copy.deepcopy(model)
    filled.to(widest_dtype(state)).load_state_dict(state)
    return filled.eval()


def align_pair(
    pair: NetworkPair,
    data: Mapping[str, Batches],
    *,
    method: str | None,
    batches: Batches | None,
    shapes: Sequence[str] | None,
    outputs: Outputs = None,
    seed: int = 0,
) -> Alignment:
    """Align network B to network A; ``batches`` are for the methods that run the networks.

    Raises:
        DataError: there are no example inputs (see :func:`example_for`).
        IsthmusError: whatever aligning raises.
    """
    example = example_for(pair.target, data, shapes)
    return align(
        pair.a,
        pair.b,
        batches=batches,
        method=method,
        args=example.args,
        kwargs=example.kwargs,
        outputs=outputs,
        seed=seed,
    )


def data_for(
    name: str | None, data_dir: Path | None, *, batch_size: int | None, limit: int | None, bar: Any
) -> dict[str, Batches]:
    """Return the named data, or nothing where no name was given; a bar moves as they are used."""
    if name is None:
        return {}
    found = resolve_data(
        name, data_dir, batch_size=batch_size, limit=limit, on_progress=console.downloads(bar)
    )
    return console.tracked(found, bar)


def training_part(data: Mapping[str, Batches]) -> Batches | None:
    """Return the data that networks are aligned and refreshed on: those named ``train``, else the first; or None."""
    return data.get("train", next(iter(data.values()), None))


def example_for(target: Target, data: Mapping[str, Batches], shapes: Sequence[str] | None = None) -> Batch:
    """Return example inputs: random ones of the shapes given, the target's own, or the beginning of the data.

    Raises:
        DataError: there are none, or a shape that cannot be read.
    """
    if shapes:
        return example_of_shapes(shapes)
    if target.example is not None:
        return target.example
    for batches in data.values():
        return first_batch(batches).head(4)
    raise DataError(
        "No example inputs: let the TARGET return (module, example inputs), or give --data or --shape."
    )


def example_of_shapes(shapes: Sequence[str]) -> Batch:
    """Return random inputs of the shapes given, such as ``1,3,32,32``, one each.

    Raises:
        DataError: a shape that cannot be read.
    """
    try:
        sizes = [tuple(int(n) for n in text.split(",")) for text in shapes]
    except ValueError:
        sizes = []
    if not sizes or any(n < 1 for size in sizes for n in size):
        raise DataError(f"--shape {' '.join(shapes)}: expected numbers of at least 1 such as 1,3,32,32.")
    generator = torch.Generator().manual_seed(0)
    return Batch(tuple(torch.randn(s, generator=generator) for s in sizes))
