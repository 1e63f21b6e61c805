"""Two checkpoints and the network they belong to, read and checked."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from isthmus.batches import Batch, Batches, first_batch
from isthmus.checkpoints import read_checkpoint
from isthmus.cli import _console as console
from isthmus.cli._folders import are_folders, open_pair
from isthmus.cli._target import Target, load_target
from isthmus.errors import DataError
from isthmus.matching import Alignment, Symmetry, align
from isthmus.pretrained import LazyState, inspect_input, is_model_folder, open_model
from isthmus.replica import private_copy, with_state
from isthmus.states import (
    State,
    check_finite,
    check_same_architecture,
    state_of,
    widest_dtype,
    with_tied,
    with_versions_of,
)
from isthmus.study import resolve_data
from isthmus.symmetry import Outputs, SymmetrySpec, discover

__all__ = [
    "LoadedNetwork",
    "NetworkPair",
    "align_pair",
    "are_files",
    "data_for",
    "example_for",
    "example_of_shapes",
    "load_network",
    "load_pair",
    "training_part",
]


@dataclass(frozen=True, eq=False)
class NetworkPair:
    """Networks A and B, in evaluation mode, and the target they were built by.

    Attributes:
        a: network A, in the widest floating dtype of its file.
        b: network B likewise.
        target: what they were built by.
        notes: what was done to read the files, such as a prefix that was removed from all names.
        dtypes: of the tensors in the files of A and B; empty where they are those of the networks.
    """

    a: nn.Module
    b: nn.Module
    target: Target
    notes: tuple[str, ...] = ()
    dtypes: tuple[Mapping[str, torch.dtype], Mapping[str, torch.dtype]] = field(
        default_factory=lambda: ({}, {})
    )

    def as_stored(self, state: Mapping[str, Tensor], which: int = 0) -> Mapping[str, Tensor]:
        """Return a state in the dtypes of the file of A (0) or B (1)."""
        dtypes = self.dtypes[which]
        return with_versions_of(state, {name: t.to(dtypes.get(name, t.dtype)) for name, t in state.items()})


@dataclass(frozen=True, eq=False)
class LoadedNetwork:
    """A network in evaluation mode with the tensors of a file, in the widest floating dtype of these.

    Attributes:
        model: the network.
        target: what it was built by.
        notes: what was done to read the file.
        dtypes: of the tensors in the file.
    """

    model: nn.Module
    target: Target
    notes: tuple[str, ...]
    dtypes: Mapping[str, torch.dtype]

    def as_stored(self, state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Return a state in the dtypes of the file."""
        return with_versions_of(state, {n: t.to(self.dtypes.get(n, t.dtype)) for n, t in state.items()})


def load_network(path: Path, target: str, *, trust_remote_code: bool = False) -> LoadedNetwork:
    """Build a network and load one checkpoint into it; the target may be a model folder.

    Raises:
        CheckpointError: the file cannot be read, does not fit the network, or holds NaN or infinite values.
        ModelError: the target cannot be built.
    """
    found = _folder_target(target, trust_remote_code) if is_model_folder(target) else load_target(target)
    state, notes = _read(found.model, path)
    dtypes = {name: t.dtype for name, t in state.items()}
    return LoadedNetwork(_filled(found.model, state), found, notes, dtypes)


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
    networks, notes, dtypes = [], list[str](), []
    for path in (path_a, path_b):
        state, told = _read(found.model, path)
        networks.append(_filled(found.model, state))
        dtypes.append({name: t.dtype for name, t in state.items()})
        notes += told
    return NetworkPair(networks[0], networks[1], found, tuple(notes), (dtypes[0], dtypes[1]))


def _folder_target(folder: str, trust_remote_code: bool) -> Target:
    opened = open_model(folder, trust_remote_code=trust_remote_code)
    return Target(opened.load(), opened.example)


def _read(model: nn.Module, path: Path) -> tuple[State, tuple[str, ...]]:
    """Return the state in a file or a folder of shards, under the network's names, and what was done to read it."""
    own = state_of(model)
    if os.path.isdir(path):
        lazy, told = LazyState.open(path).like(own, str(path))
        state, shared = with_tied(state_of(lazy, str(path)), own)
        notes = [told] if told else []
        notes += [f"{path}: {shared}"] if shared else []
    else:
        found = read_checkpoint(path, like=model)
        state, notes = found.state, list(found.notes)
    check_same_architecture(own, state, "the TARGET", str(path))
    check_finite(state, str(path))
    return state, tuple(notes)


def _filled(model: nn.Module, state: State) -> nn.Module:
    """Return the network with a state, in the widest dtype of its tensors."""
    dtype = widest_dtype(state)
    return with_state(private_copy(model, lambda _: dtype), state).eval()


def align_pair(
    pair: NetworkPair,
    data: Mapping[str, Batches],
    *,
    method: str | None,
    batches: Batches | None,
    shapes: Sequence[str] | None,
    outputs: Outputs = None,
    symmetry: Symmetry = "permutations",
    seed: int = 0,
    tell: Callable[[str, int, int], None] | None = None,
) -> Alignment:
    """Align network B to network A; ``batches`` are for the methods that run the networks.

    Raises:
        DataError: there are no example inputs (see :func:`example_for`).
        IsthmusError: whatever aligning raises.
    """
    example = example_for(pair.target, data, shapes)
    spec, note = None, ""
    if symmetry != "permutations":
        spec, note = _with_constants(pair, example, outputs)
    found = align(
        pair.a,
        pair.b,
        batches=batches,
        method=method,
        args=example.args,
        kwargs=example.kwargs,
        spec=spec,
        outputs=outputs,
        symmetry=symmetry,
        seed=seed,
        on_stage=tell,
    )
    return replace(found, notes=(*found.notes, note)) if note else found


def _with_constants(pair: NetworkPair, example: Batch, outputs: Outputs) -> tuple[SymmetrySpec | None, str]:
    """Return the symmetries of networks whose gains are one and biases zero, as folding leaves them, and a note.

    What is one or zero in both networks stays so on the line between them, so classes may count on it. Nothing is
    returned where there is no such tensor.
    """
    states = [state_of(network) for network in (pair.a, pair.b)]
    names = [name for name, tensor in pair.a.named_parameters() if tensor.ndim == 1]
    ones, zeros = (
        [name for name in names if all(bool((state[name] == value).all()) for state in states)]
        for value in (1, 0)
    )
    if not (ones or zeros):
        return None, ""
    spec = discover(pair.a, example.args, example.kwargs, outputs=outputs, ones=ones, zeros=zeros)
    plain = discover(pair.a, example.args, example.kwargs, outputs=outputs)
    if {n: g.acts for n, g in spec.groups.items()} == {n: g.acts for n, g in plain.groups.items()}:
        return plain, ""
    return spec, (
        f"{len(ones)} gains and biases are one in both networks and {len(zeros)} are zero, as folding leaves them; the "
        "classes of this alignment hold for networks of which that is true."
    )


def data_for(
    name: str | None,
    data_dir: Path | None,
    *,
    batch_size: int | None,
    limit: int | None,
    normalise: str | None = None,
    bar: Any,
) -> dict[str, Batches]:
    """Return the named data, or nothing where no name was given; a bar moves as they are used."""
    if name is None:
        return {}
    found = resolve_data(
        name,
        data_dir,
        batch_size=batch_size,
        limit=limit,
        normalise=normalise,
        on_progress=console.downloads(bar),
    )
    return console.tracked(found, bar)


def are_files(*paths: Path) -> bool:
    """Tell whether all paths lead to checkpoints in single files, whose tensors need no network to be averaged."""
    return all(inspect_input(path).kind == "weights" and not os.path.isdir(path) for path in paths)


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
        "No example inputs: let the TARGET return (module, example inputs), or give --shape (or --data where the "
        "command takes it)."
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
