"""Opening a model folder: the network on the meta device, example inputs, and its weights as a lazy state."""

from __future__ import annotations

import copy
import math
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from isthmus.batches import Batch, as_batch
from isthmus.errors import CheckpointError, printable
from isthmus.pretrained._build import build, describe, read_config
from isthmus.pretrained._inputs import inspect_input
from isthmus.pretrained._lazy import LazyState, StoredTensor
from isthmus.pretrained._libraries import TRANSFORMERS
from isthmus.pretrained._library import Library
from isthmus.pretrained._names import shared_names, stored_names
from isthmus.symmetry import SymmetrySpec, Trace, discover_from_trace, trace

__all__ = ["OpenedModel", "is_model_folder", "open_model"]

_NAMES = frozenset({"_name_or_path", "transformers_version", "_diffusers_version", "id2label", "label2id"})
"""Keys of a configuration that no code reads while it computes."""

# What the hub allows as a name; anything else in a configuration is a path, or no name at all.
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[\w][\w.-]{0,95}", re.ASCII)


@dataclass(frozen=True, eq=False)
class OpenedModel:
    """A model folder whose weights stay on the disk.

    Attributes:
        path: the folder.
        model: the network in evaluation mode, on the meta device.
        example: example inputs, on the CPU.
        state: the stored tensors under the names of ``model.state_dict()``; tied names share one.
        file: the same tensors under their names in the files, and any others that lie there.
        buffers: values of the buffers, by name.
        library: which one wrote the folder.
    """

    path: Path
    model: nn.Module
    example: Batch
    state: LazyState
    file: LazyState
    buffers: Mapping[str, Tensor]
    library: Library = TRANSFORMERS

    @cached_property
    def traced(self) -> Trace:
        """The network's graph; made once."""
        example = self.example.to("meta")
        return trace(self.model, example.args, example.kwargs)

    def discover(
        self, outputs: Any = None, *, ones: Iterable[str] = (), zeros: Iterable[str] = ()
    ) -> SymmetrySpec:
        """Find the network's symmetries (see :func:`isthmus.discover`).

        Args:
            outputs: what must be preserved; default: ``logits`` for networks that return them (an encoder's
                hidden states beside them may then be relabelled), otherwise every output.
            ones: parameters that hold nothing but ones, such as :meth:`constants` finds them.
            zeros: parameters that hold nothing but zeros.
        """
        wanted = "logits" if outputs is None and "logits" in self.traced.outputs else outputs
        return discover_from_trace(self.traced, outputs=wanted, ones=ones, zeros=zeros)

    def constants(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Return the names of the learned vectors that hold nothing but ones, and of those that hold nothing but zeros.

        Folded norms have such gains and biases, and allow rotations for it (see :func:`isthmus.pretrained.fold`).
        Vectors alone are read.
        """
        learned = {name for name, _ in self.model.named_parameters(remove_duplicate=False)}
        traced = {name for way in (self.traced, *self.traced.others) for name in way.tensors.values()}
        found: dict[int, list[str]] = {1: [], 0: []}
        for name in self.state:
            shape = self.state.stored(name).shape
            if name in learned and name in traced and math.prod(shape) == max(shape, default=0) > 0:
                vector = self.state[name]
                for value, names in found.items():
                    if bool((vector == value).all()):
                        names.append(name)
        return tuple(found[1]), tuple(found[0])

    def check_ties(self, other: OpenedModel) -> None:
        """Check that another network ties the same names together.

        Raises:
            CheckpointError: names that are one tensor here are two there, or the other way round.
        """
        ours, theirs = (
            {names for names in shared_names(opened.model) if len(names) > 1} for opened in (self, other)
        )
        if ours == theirs:
            return
        held = next(iter(sorted(ours ^ theirs)))
        tied, apart = (self, other) if held in ours else (other, self)
        raise CheckpointError(
            f"{printable(tied.path)} has one tensor for {' and '.join(held)}, and {printable(apart.path)} one for "
            "each: no network between them is of both kinds. Untie both (isthmus fold --untie), or take folders that "
            "tie alike."
        )

    def in_graph_of(self, other: OpenedModel) -> OpenedModel:
        """Return this network, run through another one's graph on its example inputs if their code is the same."""
        if type(self.model) is not type(other.model) or _settings(self) != _settings(other):
            return self
        found = replace(self, example=other.example)
        found.__dict__["traced"] = other.traced  # where the cached property looks first
        return found

    @cached_property
    def names(self) -> Mapping[str, tuple[str, ...]]:
        """The names in the network of every stored tensor, none for tensors it does not know."""
        found: dict[StoredTensor, tuple[str, ...]] = {}
        for name in self.state:
            stored = self.state.stored(name)
            found[stored] = (*found.get(stored, ()), name)
        return {key: found.get(self.file.stored(key), ()) for key in self.file}

    @property
    def config(self) -> dict[str, Any]:
        """The folder's ``config.json``."""
        return read_config(self.path)

    @property
    def title(self) -> str:
        """How a model card calls it: its identifier on the hub if it has one, else the folder's name."""
        name = self.config.get("_name_or_path")
        if isinstance(name, str) and _HUB_NAME.fullmatch(name):
            return name
        return _name_in_cache(self.path.absolute()) or self.path.resolve().name

    def load(self) -> nn.Module:
        """Return the network with its weights in memory, in the stored dtypes."""
        filled = copy.deepcopy(self.model)
        tensors = {name: self.state[name] for name in self.state}
        for module_name, module in filled.named_modules():
            for leaf in [k for k, v in module._buffers.items() if v is not None and v.is_meta]:
                full = f"{module_name}.{leaf}" if module_name else leaf
                if full not in tensors:
                    module._buffers[leaf] = self.buffers[full].clone()
        filled.load_state_dict(tensors, strict=False, assign=True)
        if hasattr(filled, "tie_weights"):
            filled.tie_weights()  # type: ignore[operator]
        return filled.eval()


def _settings(opened: OpenedModel) -> dict[str, Any]:
    """Return what a configuration says about the code, which names do not."""
    return {key: value for key, value in opened.config.items() if key not in _NAMES}


def _name_in_cache(folder: Path) -> str | None:
    """Return the hub's identifier of a snapshot in its cache: ``models--org--name/snapshots/<revision>``."""
    repository = folder.parent.parent.name
    if folder.parent.name != "snapshots" or not repository.startswith("models--"):
        return None
    return repository.removeprefix("models--").replace("--", "/", 1)


def is_model_folder(path: str | os.PathLike[str]) -> bool:
    """Whether a path is a folder with a ``config.json``."""
    return os.path.isfile(Path(path) / "config.json")


def _no_model_folder(folder: Path) -> CheckpointError:
    """Return the error of a path that leads to no model folder: what is there, and what to do."""
    found = inspect_input(folder)
    advice = found.advice or "Give a model folder written by save_pretrained."
    what = "has no config.json" if os.path.isdir(folder) else "no such folder"
    return CheckpointError(
        f"{printable(folder)}: {what}: it is {found.what}. {advice}".replace("it is no such", "no such")
    )


def open_model(
    path: str | os.PathLike[str],
    *,
    trust_remote_code: bool = False,
    example: Any = None,
    architecture: str | None = None,
) -> OpenedModel:
    """Open a model folder of transformers or diffusers without reading its weights.

    Networks of diffusers that encode and decode return their latents beside the reconstruction, as ``latents``: other
    networks rely on their order, so it stays.

    Args:
        path: folder with ``config.json`` and ``model.safetensors``, or shards with their index; those of diffusers
            begin with ``diffusion_pytorch_model``.
        trust_remote_code: whether code that lies in the folder may be run.
        example: example inputs (see :func:`isthmus.batches.as_batch`); default: made for the network's task.
        architecture: the class in the library; default: named in ``config.json``.

    Raises:
        CheckpointError: a missing or damaged file, or weights that are not those of the architecture.
        ModelError: an architecture that is unknown, needs remote code, or is quantised.
        DataError: a network whose example inputs must be given.
        MissingExtraError: transformers, diffusers or safetensors is not installed, whichever is needed.
    """
    folder = Path(path)
    if not os.path.isdir(folder) or not os.path.lexists(folder / "config.json"):
        raise _no_model_folder(folder)
    described = describe(folder, architecture=architecture, trust_remote_code=trust_remote_code)
    file = LazyState.open(folder, described.library.weights)
    model, buffers = build(described, file)
    names = stored_names(folder, model, file, described.library)
    return OpenedModel(
        path=folder,
        model=model,
        example=described.library.example(model) if example is None else as_batch(example),
        state=file.under(names),
        file=file,
        buffers=buffers,
        library=described.library,
    )
