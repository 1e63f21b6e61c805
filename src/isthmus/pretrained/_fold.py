"""Folding of stored networks: norms into the layers around them, tensor by tensor, and a folder that still loads."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from isthmus.errors import ModelError, OutputError, VerificationError, printable
from isthmus.files import refuse_overwriting
from isthmus.folding import PARTS, Edits, FoldPlan, Refusal, plan_folds
from isthmus.pretrained._build import build, describe
from isthmus.pretrained._card import Contribution, folded_card
from isthmus.pretrained._folder import free_target
from isthmus.pretrained._gather import STILL, blocks
from isthmus.pretrained._lazy import LazyState, StoredTensor
from isthmus.pretrained._open import OpenedModel, open_model
from isthmus.pretrained._shards import DEFAULT_SHARD_SIZE, PlannedTensor, parse_size
from isthmus.pretrained._verify import edit_change
from isthmus.pretrained._write import OnBytes, Written, write_like
from isthmus.states import check_finite
from isthmus.symmetry import EditChange

__all__ = ["FoldedModel", "fold"]

_TIE = "tie_word_embeddings"


@dataclass(frozen=True, eq=False)
class FoldedModel:
    """A model folder that was written with its norms folded.

    Attributes:
        written: the folder.
        plan: what was folded, and what stayed.
        untied: names of tensors that were tied to others and are now their own.
        folded_gains: names of gains that are now exactly one (zero where code multiplies by ``1 + weight``).
        folded_biases: names of norms' biases that are now exactly zero.
        centred: names of tensors whose mean over the channels of a stream is now zero.
        proof: how far the same folds move the outputs of the network with all weights changed at random.
        change: likewise from its own weights to those that were written, rounded to their dtypes.
    """

    written: Written
    plan: FoldPlan
    untied: tuple[str, ...]
    folded_gains: tuple[str, ...]
    folded_biases: tuple[str, ...]
    centred: tuple[str, ...]
    proof: EditChange
    change: float

    def __str__(self) -> str:
        """Return what was folded and what was not, one line each."""
        lines = [str(f) for f in self.plan.folds]
        lines += [f"untied: {name} has a tensor of its own" for name in self.untied]
        lines += [str(r) for r in self.plan.refusals]
        lines.append(
            f"function preserved: largest relative error {self.proof.largest:.2e} with changed weights in "
            f"{str(self.proof.dtype).removeprefix('torch.')} (tolerance {self.proof.tolerance:.0e}), {self.change:.2e} "
            "with its own, as they are stored"
        )
        return "\n".join(lines)


def fold(
    model: OpenedModel,
    out: str | os.PathLike[str],
    *,
    outputs: Any = None,
    parts: Collection[str] = PARTS,
    untie: bool = False,
    max_shard_size: int | str = DEFAULT_SHARD_SIZE,
    on_progress: OnBytes | None = None,
) -> FoldedModel:
    """Write a model with its norms folded, as a folder that ``from_pretrained`` loads (see :func:`isthmus.fold`).

    Tensors are read, edited and written one after the other; names, dtypes and metadata stay, and all other files of
    the folder are copied. A head that is untied sets ``"tie_word_embeddings": false`` in ``config.json``. Biases are
    never added, since no configuration asks a class to hold them.

    Args:
        model: the network; its folder stays as it is.
        out: the folder to write: new, or empty.
        outputs: which outputs must be preserved; default: ``logits`` for networks that return them, else all.
        parts: what is folded, some of :data:`isthmus.folding.PARTS`.
        untie: whether a head may get a tensor of its own, if a fold needs that.
        max_shard_size: bytes of tensors per file, as a number or as text such as ``"5GB"``.
        on_progress: called for every tensor.

    Raises:
        OutputError: the folder is there already, lies inside an input or cannot be written; nothing half-written is
            left.
        ModelError: the network cannot be traced or run, or its class ties the head whatever its configuration says.
        CheckpointError: NaN or infinite weights.
        VerificationError: a fold changes the function.
        DataError: ``max_shard_size`` is no size, or an unknown part.
    """
    limit = parse_size(max_shard_size)
    free_target(out)
    refuse_overwriting(out, [model.path], folder=True)
    check_finite(model.state, str(model.path))
    wanted = "logits" if outputs is None and "logits" in model.traced.outputs else outputs
    plan = plan_folds(model.traced, outputs=wanted, parts=parts)
    own, apart = model, tuple[str, ...]()
    if untie and plan.tied:
        own, apart = _untied(model)
        plan = plan_folds(own.traced, outputs=wanted, parts=parts)
    plan = plan.fitting(own.state)
    plan = replace(plan, refusals=tuple(_said(r, own.model) for r in plan.refusals))
    edits = plan.edits(own.state.shapes())
    proof = _change(plan, edits, own, wanted, seed=0)
    if not proof.passed:
        raise VerificationError(
            f"{printable(model.path)}: folding changes the function: relative error {proof.largest:.3g}, at most "
            f"{proof.tolerance:.0e} allowed. Leave parts out with parts=..., and report it: it is a fault of Isthmus."
        )
    change = _change(plan, edits, own, wanted, seed=None)
    written = _written(own, plan, edits, Path(out), limit, bool(apart), on_progress)
    folded = _Values(plan, edits, own.state)
    return FoldedModel(
        written=written,
        plan=plan,
        untied=apart,
        folded_gains=plan.gains_at_one(folded),
        folded_biases=plan.biases_at_zero(folded),
        centred=plan.centred,
        proof=proof,
        change=change.largest,
    )


def _said(refusal: Refusal, model: nn.Module) -> Refusal:
    """Add to what lacks a bias that the network's class has no place for one."""
    if not refusal.lacking:
        return refusal
    return replace(refusal, why=f"{refusal.why}, and {type(model).__name__} has no place for one")


class _Values(Mapping[str, Tensor]):
    """The folded tensors, each computed when it is asked for, in its stored dtype."""

    def __init__(self, plan: FoldPlan, edits: Edits, state: Mapping[str, Tensor]) -> None:
        self._plan, self._edits, self._state = plan, edits, plan.named(state)

    def __getitem__(self, name: str) -> Tensor:
        first = self._plan.aliases.get(name, (name,))[0]
        if first not in self._edits.targets:
            return self._state[name]
        return self._edits.value(self._state, first).to(self._state[first].dtype)

    def __iter__(self) -> Iterator[str]:
        return iter(self._state)

    def __len__(self) -> int:
        return len(self._state)


class _ReadState(Mapping[str, Tensor]):
    """A state whose tensors a function reads."""

    def __init__(self, names: Collection[str], read: Callable[[str], Tensor]) -> None:
        self._names, self._read = names, read

    def __getitem__(self, name: str) -> Tensor:
        return self._read(name)

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _change(
    plan: FoldPlan, edits: Edits, model: OpenedModel, outputs: Any, *, seed: int | None
) -> EditChange:
    """Return how far the edits move the outputs: rounded as they are stored, or of changed weights and not rounded."""
    names = set(model.state)
    first = {
        other: name for name in edits.targets for other in plan.aliases.get(name, (name,)) if other in names
    }

    def edit(name: str, read: Callable[[str], Tensor]) -> Tensor:
        value = edits.value(plan.named(_ReadState(names, read)), first[name])
        return value if seed is not None else value.to(model.state.stored(name).dtype)

    return edit_change(edit, tuple(first), model, outputs=outputs, seed=seed)


def _untied(model: OpenedModel) -> tuple[OpenedModel, tuple[str, ...]]:
    """Return a network whose configuration ties nothing, with a stored tensor for each of its own.

    Raises:
        ModelError: its class ties them whatever the configuration says.
    """
    with tempfile.TemporaryDirectory(prefix="isthmus-") as place:
        for path in model.path.glob("*.py"):
            shutil.copyfile(path, Path(place) / path.name)
        _write_config(Path(place), model.config)
        trusted = not type(model.model).__module__.startswith(f"{model.library.name}.")
        name = type(model.model).__name__
        described = describe(Path(place), architecture=name, trust_remote_code=trusted)
        made, buffers = build(described, model.file)
    own = made.state_dict(keep_vars=True)
    tensors, apart, taken = dict[str, StoredTensor](), list[str](), dict[StoredTensor, int]()
    for name, tensor in own.items():
        if name not in model.state:
            continue
        stored = model.state.stored(name)
        if taken.setdefault(stored, id(tensor)) != id(tensor):
            stored = replace(stored, key=name)  # the same bytes, written under a name of their own
            taken.setdefault(stored, id(tensor))
            apart.append(name)
        tensors[name] = stored
    if not apart:
        raise ModelError(
            f"{printable(model.path)}: {type(model.model).__name__} ties its head whatever config.json says, so no "
            "folder with a head of its own would load. Fold without untie."
        )
    more = {stored.key: stored for stored in tensors.values() if stored.key not in model.file}
    whole = {**{key: model.file.stored(key) for key in model.file}, **more}
    file = LazyState(whole, model.file.metadata, model.file.index_metadata)
    state = LazyState(tensors, model.file.metadata, model.file.index_metadata)
    return replace(model, model=made, file=file, state=state, buffers=buffers), tuple(apart)


def _write_config(folder: Path, config: Mapping[str, Any]) -> None:
    """Write a configuration that ties no head."""

    def apart(part: Mapping[str, Any]) -> dict[str, Any]:
        return {k: False if k == _TIE else apart(v) if isinstance(v, dict) else v for k, v in part.items()}

    text = json.dumps({**apart(config), _TIE: False}, indent=2, ensure_ascii=False)
    (folder / "config.json").write_text(text + "\n", encoding="utf-8")


def _written(
    model: OpenedModel,
    plan: FoldPlan,
    edits: Edits,
    out: Path,
    limit: int,
    apart: bool,
    on_progress: OnBytes | None,
) -> Written:
    """Write the folder, and open it as it is before it gets its name."""
    values = _Values(plan, edits, model.state)

    def rows(tensor: PlannedTensor) -> Iterator[Tensor]:
        names = model.names[tensor.key]
        if names and plan.aliases.get(names[0], (names[0],))[0] in edits.targets:
            yield values[names[0]]
        else:
            yield from blocks(model.file, tensor.key, STILL)

    def finish(folder: Path) -> None:
        if apart:
            _write_config(folder, model.config)
        _require_same_names(folder, model)

    lines = [str(f) for f in plan.folds]
    source = Contribution(model.title, library=model.library.name)
    return write_like(
        model, rows, out, limit, [], lambda *left: folded_card(source, lines, *left), on_progress, finish
    )


def _require_same_names(folder: Path, model: OpenedModel) -> None:
    """Check that a folder opens, and finds every tensor where it was written.

    Raises:
        OutputError: it does not.
    """
    trusted = not type(model.model).__module__.startswith(f"{model.library.name}.")
    opened = open_model(
        folder, trust_remote_code=trusted, example=model.example, architecture=type(model.model).__name__
    )
    wrong = [
        n
        for n in model.state
        if n not in opened.state or opened.state.stored(n).key != model.state.stored(n).key
    ]
    if wrong:
        raise OutputError(
            f"Cannot write {printable(folder)}: {model.library.name} would not find {printable(wrong[0])!r} in the "
            "folder again. Fold without untie; nothing was changed."
        )
