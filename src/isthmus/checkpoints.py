"""Checkpoints on disk: states written whole or not at all, read without running any code.

Two formats, told apart by the file's suffix: ``.safetensors`` (needs the ``io`` extra) and ``.pt``/``.pth``
(torch, weights only). A file is first written beside its target and then renamed, so that a full disk, a
crash or Ctrl-C leaves either the old file or the new one, never half of it.
"""

from __future__ import annotations

import errno
import json
import os
import pickle
import re
import secrets
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from isthmus.errors import CheckpointError, IsthmusError, MissingExtraError, OutputError
from isthmus.states import State, state_of

__all__ = ["atomic_folder", "atomic_path", "check_format", "load_metadata", "load_state", "save_state"]

_SAFETENSORS = (".safetensors",)
_TORCH = (".pt", ".pth")
# Where common training scripts put the state inside a larger dictionary.
_WRAPPERS = ("state_dict", "model_state_dict", "model")
# First bytes of a torch file: a zip archive or, before torch 1.6, a pickled magic number.
_TORCH_HEADS = (b"PK", b"\x80\x02\x8a\x0a")
_PICKLE_HEAD = b"\x80"
# What a full or read-only disk answers.
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


def save_state(
    path: str | os.PathLike[str], state: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write a state to a file, whole or not at all.

    Args:
        path: target, ending in ``.safetensors``, ``.pt`` or ``.pth``; its folder must exist.
        state: from name to tensor. Tensors are copied to the CPU; tied tensors are written once per name.
        metadata: strings kept beside the tensors (see :func:`load_metadata`).

    Raises:
        CheckpointError: an unknown suffix, an entry that is not a tensor, or metadata that are not strings.
        OutputError: the folder is missing, read-only or full.
        MissingExtraError: ``.safetensors`` without the ``io`` extra.
    """
    target = Path(path)
    suffix = _suffix(target)
    tensors = {k: v.cpu().contiguous() for k, v in state_of(state, str(target)).items()}
    notes = dict(metadata or {})
    if any(not isinstance(x, str) for item in notes.items() for x in item):
        raise CheckpointError(f"{target}: metadata must map strings to strings, found {notes!r}.")
    with atomic_path(target) as temporary:
        if suffix in _TORCH:
            torch.save({"state_dict": tensors, "metadata": notes} if notes else tensors, temporary)
        else:
            _save_safetensors(temporary, tensors, notes)


def _save_safetensors(path: Path, tensors: State, notes: dict[str, str]) -> None:
    safetensors = _safetensors()
    from safetensors.torch import save_file

    # Two names may share memory (tied weights), which the format does not allow.
    seen: set[int] = set()
    for name, tensor in tensors.items():
        pointer = tensor.untyped_storage().data_ptr()
        tensors[name] = tensor.clone() if pointer in seen else tensor
        seen.add(pointer)
    mode = path.stat().st_mode
    try:
        save_file(tensors, path, metadata=notes or None)
    except safetensors.SafetensorError as error:
        raise OSError(str(error)) from error
    path.chmod(mode)
    _sort_metadata(path)


def _sort_metadata(path: Path) -> None:
    """Put the metadata of a safetensors file in the order of their keys, which the writer draws by chance.

    Then equal states with equal metadata are equal files. Only keys change places, so the header keeps its length.
    """
    with path.open("rb+") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        notes = header.get("__metadata__")
        if notes is None or len(notes) < 2:
            return
        header["__metadata__"] = dict(sorted(notes.items()))
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
        if len(text) <= length:
            file.seek(8)
            file.write(text.ljust(length))


def load_state(path: str | os.PathLike[str]) -> State:
    """Read a state from a file, on the CPU, without running any code that the file may hold.

    Args:
        path: a ``.safetensors``, ``.pt`` or ``.pth`` file. In the torch formats a state found under
            ``"state_dict"``, ``"model_state_dict"`` or ``"model"`` is unwrapped.

    Returns:
        From name to tensor, in the order and dtypes of the file.

    Raises:
        CheckpointError: the file is missing, unreadable, truncated or in another format, holds no tensors or
            other things than tensors, or cannot be read without executing code.
        MissingExtraError: ``.safetensors`` without the ``io`` extra.
    """
    target = Path(path)
    found = _load_torch(target) if _suffix(target) in _TORCH else _load_safetensors(target)[0]
    while isinstance(found, Mapping):
        inner = next((found[k] for k in _WRAPPERS if isinstance(found.get(k), Mapping)), None)
        if inner is None:
            break
        found = inner
    if not isinstance(found, Mapping):
        raise CheckpointError(
            f"{target}: expected a dictionary from name to tensor, found {type(found).__name__}. "
            "Save model.state_dict()."
        )
    if not found:
        raise CheckpointError(
            f"{target}: holds no tensors. Save model.state_dict() of a module with weights."
        )
    return state_of({str(k): v for k, v in found.items()}, str(target))


def load_metadata(path: str | os.PathLike[str]) -> dict[str, str]:
    """Return the strings that :func:`save_state` kept beside the tensors (empty when there are none).

    Raises:
        CheckpointError: as for :func:`load_state`.
        MissingExtraError: ``.safetensors`` without the ``io`` extra.
    """
    target = Path(path)
    if _suffix(target) not in _TORCH:
        return _load_safetensors(target)[1]
    found = _load_torch(target)
    notes = found.get("metadata") if isinstance(found, Mapping) and "state_dict" in found else None
    return {str(k): str(v) for k, v in notes.items()} if isinstance(notes, Mapping) else {}


@contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a fresh file beside ``path`` to write to, and put it in place of ``path`` if all went well.

    On any exception, Ctrl-C included, the fresh file is removed and ``path`` is as it was before.

    Raises:
        OutputError: the folder is missing, read-only or full (any ``OSError`` while writing).

    Example:
        >>> with atomic_path("result.json") as temporary:  # doctest: +SKIP
        ...     temporary.write_text("{}")
    """
    target = Path(path)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    try:
        temporary.open("xb").close()
        yield temporary
        with temporary.open("rb+") as written:
            os.fsync(written.fileno())
        temporary.replace(target)
    except OSError as error:
        raise OutputError(
            f"Cannot write {target}: {error.strerror or error}. Check that the folder {target.parent} "
            "exists, is writable and has room; nothing was changed."
        ) from error
    finally:
        _remove(temporary)


@contextmanager
def atomic_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a fresh folder to write files to, and move them all into the folder ``path`` if all went well.

    The fresh folder lies inside ``path``, which is made if need be, so that a folder that cannot be written is
    found before any work is done. On any exception, Ctrl-C included, ``path`` is as it was before. Files of the same
    names are replaced, once every new file is there.

    Raises:
        OutputError: the folder cannot be made or written, or is full.

    Example:
        >>> with atomic_folder("results") as temporary:  # doctest: +SKIP
        ...     (temporary / "a.json").write_text("{}")
    """
    target = Path(path)
    made = [folder for folder in (target, *target.parents) if not folder.exists()]
    staging = target / f".isthmus-{os.getpid()}-{secrets.token_hex(4)}.tmp"
    try:
        with _writing(target):
            target.mkdir(parents=True, exist_ok=True)
            staging.mkdir()
        try:
            yield staging
        except OSError as error:
            if isinstance(error, IsthmusError) or error.errno not in _NO_ROOM:
                raise
            raise _unwritable(target, error) from error
        with _writing(target):
            for file in sorted(f for f in staging.rglob("*") if f.is_file()):
                place = target / file.relative_to(staging)
                place.parent.mkdir(parents=True, exist_ok=True)
                file.replace(place)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        for folder in made:
            _remove_if_empty(folder)


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise _unwritable(folder, error) from error


def _unwritable(folder: Path, error: OSError) -> OutputError:
    return OutputError(
        f"Cannot write to the output folder {folder}: {error.strerror or error}. "
        "Make room, allow writing, or choose another folder; nothing was changed."
    )


def _remove_if_empty(folder: Path) -> None:
    try:
        folder.rmdir()
    except OSError:  # results are in it, or it was never made
        return


def _remove(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError:  # the folder itself is gone or was never there: nothing to remove
        return


def check_format(path: str | os.PathLike[str]) -> None:
    """Check that the suffix of a path names a format that can be read and written.

    Raises:
        CheckpointError: it does not.
    """
    _suffix(Path(path))


def _suffix(path: Path) -> str:
    suffix = path.suffix.lower()
    if suffix not in (*_SAFETENSORS, *_TORCH):
        raise CheckpointError(
            f"{path}: unknown checkpoint format {suffix or '(no suffix)'!r}. "
            f"Use one of {', '.join((*_SAFETENSORS, *_TORCH))}."
        )
    return suffix


def _head(path: Path) -> bytes:
    """Return the first bytes of an existing, readable, non-empty file."""
    if not path.exists():
        raise CheckpointError(f"{path}: no such file. Check the path of the checkpoint.")
    try:
        with path.open("rb") as file:
            head = file.read(16)
    except OSError as error:
        raise CheckpointError(
            f"{path}: cannot be read: {error.strerror}. Give a readable checkpoint file."
        ) from error
    if not head:
        raise CheckpointError(f"{path}: is empty. The file was not written to the end; make it again.")
    return head


def _looks_like(head: bytes) -> str:
    if head.startswith(_TORCH_HEADS):
        return "a torch file (.pt)"
    if head[8:9] == b"{":
        return "a safetensors file (.safetensors)"
    if head.startswith(_PICKLE_HEAD):
        return "a Python pickle"
    return "neither a torch nor a safetensors file"


def _load_torch(path: Path) -> Any:
    head = _head(path)
    try:
        with warnings.catch_warnings():  # of a pickle that is refused anyway
            warnings.filterwarnings("ignore", "Detected pickle protocol")
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file makes the reader fail in any way at all
        message = str(error)
        needs = re.search(r"GLOBAL ([\w.]+)", message)
        plain = head.startswith(_PICKLE_HEAD) and not head.startswith(_TORCH_HEADS)
        if (isinstance(error, pickle.UnpicklingError) and needs) or plain:
            what = f"it asks to run {needs[1]}" if needs else "it is a plain pickle"
            raise CheckpointError(
                f"{path}: refused, because reading it needs code execution: {what}. "
                "Save only tensors: torch.save(model.state_dict(), file), or use .safetensors."
            ) from error
        if "TorchScript" in message:
            raise CheckpointError(
                f"{path}: refused, because it is a TorchScript archive, which holds code. "
                "Save the state_dict of the scripted module instead."
            ) from error
        raise _damaged(path, head, "a torch file (.pt)", message) from error


def _load_safetensors(path: Path) -> tuple[State, dict[str, str]]:
    head = _head(path)
    safetensors = _safetensors()
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
            return state, dict(file.metadata() or {})
    except safetensors.SafetensorError as error:
        raise _damaged(path, head, "a safetensors file (.safetensors)", str(error)) from error


def _damaged(path: Path, head: bytes, expected: str, message: str) -> CheckpointError:
    looks = _looks_like(head)
    if looks != expected:
        return CheckpointError(
            f"{path}: expected {expected}, but it looks like {looks}. Give the file its right suffix."
        )
    # Only the reader's first sentence: what follows is its own advice.
    first = message.split("\n")[0].split(". ")[0].rstrip(".") if message else "the file ends too early"
    return CheckpointError(
        f"{path}: {expected} that is truncated or damaged ({first}). Copy or make it again."
    )


def _safetensors() -> Any:
    try:
        import safetensors
        import safetensors.torch
    except ImportError as error:
        raise MissingExtraError(
            'Reading and writing .safetensors files needs safetensors: pip install "isthmus[io]", or use .pt.'
        ) from error
    return safetensors
