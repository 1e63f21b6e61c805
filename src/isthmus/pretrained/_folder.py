"""Output folders: whole or not there at all, with everything of a model that is not a weight copied over."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
from collections.abc import Collection, Iterator
from pathlib import Path

from isthmus.errors import OutputError

__all__ = ["copy_extras", "output_folder"]

_LOCK = ".lock"
# Weights in any format: copied unchanged they would belong to another network than the one written.
_WEIGHT_SUFFIXES = (".safetensors", ".h5", ".msgpack", ".onnx", ".gguf", ".ckpt", ".ot", ".tflite")
_WEIGHT_NAMES = ("pytorch_model", "model", "consolidated", "adapter_model", "tf_model", "flax_model")
_WEIGHT_ARCHIVES = (".bin", ".pt", ".pth")
_OWN_FILES = ("README.md", ".gitattributes")


@contextlib.contextmanager
def output_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a hidden folder beside ``path`` to write to, and give it the name ``path`` if all went well.

    On any exception the hidden folder is removed. A process that is killed outright leaves it behind, named
    ``.<name>.<random>.partial``; the next run to the same ``path`` removes it and starts clean.

    Raises:
        OutputError: ``path`` is there already and is not an empty folder, or cannot be written.
    """
    target = Path(path).absolute()
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise OutputError(
            f"Cannot write {path}: it is there already. Remove it, or choose another folder; nothing was changed."
        )
    partial = target.with_name(f".{target.name}.{secrets.token_hex(4)}.partial")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(target)
        partial.mkdir()
        with _locked(partial):
            yield partial
        (partial / _LOCK).unlink()
        partial.replace(target)
        _flush(target.parent)
    except OutputError:
        raise
    except OSError as error:
        raise OutputError(
            f"Cannot write {path}: {error.strerror or error}. Check that the folder {target.parent} is writable "
            "and has room; nothing was changed."
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold a lock that the system releases when the process ends, however it ends."""
    with (folder / _LOCK).open("xb") as file:
        _try_lock(file.fileno())
        yield


def _try_lock(descriptor: int) -> bool:
    """Lock a file if nobody holds it; where the system has no such locks, return False."""
    try:
        import fcntl
    except ImportError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _remove_abandoned(target: Path) -> None:
    """Remove partial folders of this target whose writers are gone."""
    for folder in target.parent.glob(f".{_escaped(target.name)}.*.partial"):
        lock = folder / _LOCK
        if lock.is_file():
            with lock.open("rb") as file:
                abandoned = _try_lock(file.fileno())
            if abandoned:
                shutil.rmtree(folder, ignore_errors=True)


def _escaped(name: str) -> str:
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)


def _flush(folder: Path) -> None:
    """Make a rename last (where folders can be opened)."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def copy_extras(source: Path, target: Path, own: Collection[str]) -> list[str]:
    """Copy all files of a model folder except its weights, its model card and hidden folders.

    Links are followed, so that a folder of the hub's cache gives ordinary files.

    Args:
        source: the model folder.
        target: where to copy to.
        own: names of the files whose tensors are written anew.

    Returns:
        Names of files left out because they hold weights in another form, which would be out of date.
    """
    left_out: list[str] = []
    for path in sorted(source.rglob("*")):
        relative = path.relative_to(source)
        hidden = any(part.startswith(".") for part in relative.parts[:-1])
        if not path.is_file() or hidden or str(relative) in _OWN_FILES:
            continue
        if str(relative) in own:
            continue
        if _is_weights(path.name):
            left_out.append(relative.as_posix())
            continue
        (target / relative).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target / relative)
    return left_out


def _is_weights(name: str) -> bool:
    stem, suffix = os.path.splitext(name.lower().removesuffix(".index.json"))
    if suffix in _WEIGHT_SUFFIXES:
        return True
    return suffix in _WEIGHT_ARCHIVES and stem.startswith(_WEIGHT_NAMES)
