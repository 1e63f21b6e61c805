"""Reading a state from a file, as trainers leave it: inside other things, under a prefix, in any common format."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from isthmus.checkpoints._formats import damaged, is_torch, safetensors
from isthmus.checkpoints._names import Naming, as_in_network, under_prefix, unwrapped
from isthmus.checkpoints._states import StatesByKey, inside, plain_state, states_in
from isthmus.checkpoints._torch import load_torch, too_large
from isthmus.checkpoints._write import split_versions
from isthmus.errors import CheckpointError, printable
from isthmus.files import identity_of, require_file, require_utf8
from isthmus.states import State, with_tied, with_versions, with_versions_of

__all__ = ["Checkpoint", "load_metadata", "load_state", "read_checkpoint", "split_key"]

_EXPECTED = "a safetensors file (.safetensors)"
_SEPARATOR = "::"
_SHOWN = 6
_Like = nn.Module | Mapping[str, Tensor] | None


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A state that was read from a file, and how it lay there.

    Attributes:
        path: the file.
        state: from name to tensor.
        key: under which the state lay; empty for the file itself.
        prefix: what was removed before the names; empty if nothing was.
        notes: remarks for the reader: which of several states was taken, what was removed, what was left out.
    """

    path: Path
    state: State
    key: str
    prefix: str
    notes: tuple[str, ...]


def load_state(
    path: str | os.PathLike[str], *, key: str | None = None, prefix: str | None = None, like: _Like = None
) -> State:
    """Read a state from a file, on the CPU, without running any code that the file may hold.

    The same as the ``state`` of :func:`read_checkpoint`, which also tells what was done to the names.

    Raises:
        CheckpointError: see :func:`read_checkpoint`.
        MissingExtraError: ``.safetensors`` without the ``io`` extra.
    """
    return read_checkpoint(path, key=key, prefix=prefix, like=like).state


def read_checkpoint(
    path: str | os.PathLike[str], *, key: str | None = None, prefix: str | None = None, like: _Like = None
) -> Checkpoint:
    """Read a state from a file, on the CPU, without running any code, and say how it lay there.

    A file of torch may hold the state under a key (``"state_dict"``, ``"model"``, ``"net"``, ``"ema"``, whatever the
    trainer called it), beside an optimiser's state and settings. One state is taken wherever it lies; of several, the
    only one that fits ``like``.

    Names may carry what a wrapper put before them: ``module.`` (data parallel, averages), ``_orig_mod.`` (compiled).
    That is removed where all names carry it. Other prefixes, such as ``model.``, are removed where ``like`` shows
    that the network lacks them, and on request.

    Args:
        path: a ``.safetensors`` file, or one of torch: ``.pt``, ``.pth``, ``.ckpt``, ``.bin``, ``.th``, ``.tar``. A
            key or a prefix may follow, as in ``last.ckpt::ema``.
        key: where the state lies in the file, parts joined by points; default: wherever there is one.
        prefix: of the names to keep, which is removed; ``""`` leaves all names as they are.
        like: the network, or a state of it: its names and shapes decide what is not said.

    Returns:
        Tensors in the order and dtypes of the file (with ``like``, in the network's order), with the versions of
        ``state_dict()`` where the file has them.

    Raises:
        CheckpointError: the file is missing, no ordinary file, unreadable, truncated or in another format; it holds no
            tensors, other things than tensors, tensors without values or whose units cannot be moved (meta, sparse,
            quantised, nested), or several states; or it cannot be read without executing code.
        MissingExtraError: ``.safetensors`` without the ``io`` extra.
    """
    target, named = split_key(path)
    key, where = named if key is None else key, printable(target)
    network = like.state_dict() if isinstance(like, nn.Module) else like
    torch_file = is_torch(target)
    before = identity_of(require_file(target))
    content: Any = load_torch(target) if torch_file else _load_safetensors(target)[0]
    if not target.exists() or identity_of(target) != before:
        raise CheckpointError(
            f"{where}: was changed or replaced while it was read. Leave the file alone while it is in use, and run "
            "again."
        )
    found, key, prefix = _selected(content, key, prefix, where)
    readable = [_named(target, k, entries, prefix, network, where) for k, entries in found.items()]
    return _only_one(readable, network, where)


def split_key(path: str | os.PathLike[str]) -> tuple[Path, str | None]:
    """Split ``FILE::KEY`` into the file and the key; a file of that very name comes first."""
    text = os.fspath(path)
    if _SEPARATOR in text and not os.path.lexists(text):
        name, _, key = text.rpartition(_SEPARATOR)
        if name and key:
            return Path(name), key
    return Path(text), None


def _selected(
    content: Any, key: str | None, prefix: str | None, where: str
) -> tuple[StatesByKey, str | None, str | None]:
    """Return the states to choose from; a key that is none may be the beginning of names."""
    if not isinstance(content, Mapping):
        raise CheckpointError(
            f"{where}: expected a dictionary from name to tensor, found {type(content).__name__}. "
            "Save model.state_dict()."
        )
    if key is not None:
        below = inside(content, key)
        if isinstance(below, Mapping) and (states := states_in(below)):
            return {f"{key}.{k}" if k else key: v for k, v in states.items()}, key, prefix
        start = key if key.endswith(".") else f"{key}."
        if prefix is None and any(str(n).startswith(start) for v in states_in(content).values() for n in v):
            return states_in(content), None, start
        raise CheckpointError(
            f"{where}: holds no state under {printable(key)!r}, and no name begins with it. It holds "
            f"{_listing(states_in(content)) or _keys(content)}."
        )
    found = states_in(content)
    own = [v for v in content.values() if isinstance(v, Tensor)]
    if found and ("" in found or not any(v.ndim for v in own)):  # numbers beside a state are counters
        return found, key, prefix
    if found:
        first = printable(next(iter(found)))
        raise CheckpointError(
            f"{where}: holds tensors of its own beside {_listing(found)}, so it is unknown which is the network. Name "
            f"one: key={first!r}, or {where}{_SEPARATOR}{first} as the path."
        )
    if not own:
        raise CheckpointError(
            f"{where}: holds no tensors{f'; it holds {_keys(content)}' if content else ''}. Save model.state_dict() of "
            "a module with weights."
        )
    return {"": content}, key, prefix  # something in it is no tensor, which the next step names


def _named(
    path: Path,
    key: str,
    entries: Mapping[Any, Any],
    prefix: str | None,
    network: Mapping[str, Tensor] | None,
    where: str,
) -> Checkpoint:
    """Return one state of the file under the names that are asked for."""
    state = plain_state(entries, where)
    if (error := too_large(path, sum(t.numel() * t.element_size() for t in state.values()))) is not None:
        raise error
    if prefix is not None:
        naming: Naming | None = under_prefix(state, prefix, where)
    else:
        naming = None if network is None else as_in_network(state, network, where)
    naming = unwrapped(state) if naming is None else naming
    tensors = {name: state[old] for name, old in naming.names.items()}
    notes = [f"{where}: {naming.note}"] if naming.note else []
    if network is not None:
        tensors, note = with_tied(tensors, network)
        notes += [f"{where}: {note}"] if note else []
        if tensors.keys() == network.keys():
            tensors = {name: tensors[name] for name in network}
    return Checkpoint(path, with_versions_of(state, tensors, naming.prefix), key, naming.prefix, tuple(notes))


def _only_one(readable: Sequence[Checkpoint], network: Mapping[str, Tensor] | None, where: str) -> Checkpoint:
    """Return the one state of a file, or the one of several that fits the network.

    Raises:
        CheckpointError: it remains unknown which one is meant.
    """
    if len(readable) == 1:
        return readable[0]
    fitting = readable if network is None else [c for c in readable if _fits(c.state, network)]
    if len(fitting) == 1:
        chosen = fitting[0]
        others = ", ".join(repr(printable(c.key)) for c in readable if c is not chosen)
        taken = printable(chosen.key)
        note = f"{where}: took the state under {taken!r}, the only one that fits the network; left {others}"
        return Checkpoint(chosen.path, chosen.state, chosen.key, chosen.prefix, (note, *chosen.notes))
    among = fitting or readable
    what = "states that fit the network" if fitting and network is not None else "states"
    first = printable(among[0].key)
    listed = _listing({c.key: c.state for c in among})
    raise CheckpointError(
        f"{where}: holds {len(among)} {what}: {listed}. Name one: key={first!r}, or {where}{_SEPARATOR}{first} as the "
        "path."
    )


def _fits(state: Mapping[str, Tensor], network: Mapping[str, Tensor]) -> bool:
    return state.keys() == network.keys() and all(v.shape == network[k].shape for k, v in state.items())


def _listing(states: Mapping[str, Mapping[Any, Any]]) -> str:
    shown = [f"{printable(k) or '(the file itself)'!r} ({len(v)} tensors)" for k, v in states.items()]
    return ", ".join(shown[:_SHOWN]) + (f" and {len(shown) - _SHOWN} more" if len(shown) > _SHOWN else "")


def _keys(content: Mapping[Any, Any]) -> str:
    shown = [f"{printable(k, 60)!r} ({type(v).__name__})" for k, v in list(content.items())[:_SHOWN]]
    return ", ".join(shown) + (f" and {len(content) - _SHOWN} more" if len(content) > _SHOWN else "")


def load_metadata(path: str | os.PathLike[str]) -> dict[str, str]:
    """Return the strings that :func:`save_state` kept beside the tensors (empty when there are none).

    Raises:
        CheckpointError: as for :func:`load_state`.
        MissingExtraError: ``.safetensors`` without the ``io`` extra.
    """
    target, _ = split_key(path)
    if not is_torch(target):
        return _load_safetensors(target, tensors=False)[1]
    found = load_torch(target)
    notes = found.get("metadata") if isinstance(found, Mapping) and "state_dict" in found else None
    return {str(k): str(v) for k, v in notes.items()} if isinstance(notes, Mapping) else {}


def _load_safetensors(path: Path, *, tensors: bool = True) -> tuple[State, dict[str, str]]:
    library = safetensors()
    require_file(path)
    require_utf8(path)
    with path.open("rb") as file:
        head = file.read(64)
    try:
        with library.safe_open(path, framework="pt") as file:
            names = file.keys() if tensors else []
            # Copies: what the library returns is a mapping of the file, which changes when the file does.
            state = {name: file.get_tensor(name).clone() for name in names}
            notes = dict(file.metadata() or {})
    except Exception as error:  # the library's own error, or torch's for what it cannot hold
        raise damaged(path, head, _EXPECTED, str(error)) from error
    notes, versions = split_versions(notes, str(path))
    return with_versions(state, versions), notes
