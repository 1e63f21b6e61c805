"""The files of a model folder that are not its weights: what is copied, and what would be out of date."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Collection
from pathlib import Path, PurePosixPath

from isthmus.errors import CheckpointError

__all__ = ["Extras", "extras_of"]

# Weights, or an optimiser's state, in any format: copied unchanged they would belong to another network.
_WEIGHT_SUFFIXES = (
    ".safetensors",
    ".h5",
    ".msgpack",
    ".onnx",
    ".onnx_data",
    ".gguf",
    ".ckpt",
    ".ot",
    ".tflite",
    ".mlmodel",
)
_WEIGHT_NAMES = (
    "pytorch_model",
    "model",
    "consolidated",
    "adapter_model",
    "tf_model",
    "flax_model",
    "openvino_model",
    "open_clip_pytorch_model",
    "ggml",
    "optimizer",
)
_WEIGHT_ARCHIVES = (".bin", ".pt", ".pth", ".data")
_OWN_FILES = ("README.md", ".gitattributes")
_LAST = "config.json"
_MODULES = "modules.json"


class Extras:
    """The files to copy from a model folder.

    Attributes:
        copied: their paths in the folder, ``config.json`` last: without it nothing takes a folder for a model.
        left_out: paths of the files that hold weights in another form, which would be out of date.
    """

    def __init__(self, source: Path, copied: Collection[str], left_out: Collection[str]) -> None:
        self._source = source
        self.copied = tuple(sorted(copied, key=lambda name: (name == _LAST, name)))
        self.left_out = tuple(sorted(left_out))

    @property
    def nbytes(self) -> int:
        """Size of the copied files in bytes."""
        return sum((self._source / name).stat().st_size for name in self.copied)

    def copy(self, target: Path) -> None:
        """Copy the files; links are followed, so that a folder of the hub's cache gives ordinary files."""
        for name in self.copied:
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(self._source / name, target / name)


def extras_of(source: Path, own: Collection[str]) -> Extras:
    """Find all files of a model folder except its weights, its model card and hidden folders.

    Weights in the folders of further modules (sentence-transformers lists them in ``modules.json``) are other
    networks', which read this one's outputs, and are copied.

    Args:
        source: the model folder.
        own: names of the files whose tensors are written anew.

    Raises:
        CheckpointError: a link leads nowhere, or to a folder outside the model's.
    """
    copied: list[str] = []
    left_out: list[str] = []
    modules = _modules(source)
    for path in _files(source):
        name = path.relative_to(source).as_posix()
        if name in own or name in _OWN_FILES:
            continue
        if not path.exists():
            raise CheckpointError(
                f"{path}: is a link to {os.readlink(path)}, which is not there. Download or copy the model folder "
                "again, or remove the link."
            )
        of_module = any(PurePosixPath(name).is_relative_to(module) for module in modules)
        (left_out if _is_weights(path.name) and not of_module else copied).append(name)
    return Extras(source, copied, left_out)


def _files(folder: Path, above: tuple[Path, ...] = ()) -> list[Path]:
    """Return all files below a folder, those of hidden folders left out; links in a circle are not followed."""
    real = folder.resolve()
    if above and not real.is_relative_to(above[0]):
        raise CheckpointError(
            f"{folder}: is a link to the folder {real}, outside the model folder, which is not copied. Put the "
            "folder itself there, or remove the link."
        )
    if real in above:
        return []
    found: list[Path] = []
    for path in sorted(folder.iterdir()):
        if path.is_dir():
            found += [] if path.name.startswith(".") else _files(path, (*above, real))
        elif path.is_file() or not path.exists():  # no pipe, which copying would wait on for ever
            found.append(path)
    return found


def _modules(source: Path) -> list[str]:
    """Return the folders of the modules that sentence-transformers runs after the network."""
    try:
        listed = json.loads((source / _MODULES).read_text(encoding="utf-8"))
        return [str(module["path"]) for module in listed if module["path"]]
    except (OSError, ValueError, KeyError, TypeError):
        return []


def _is_weights(name: str) -> bool:
    stem, suffix = os.path.splitext(name.lower().removesuffix(".index.json"))
    if suffix in _WEIGHT_SUFFIXES:
        return True
    return suffix in _WEIGHT_ARCHIVES and stem.startswith(_WEIGHT_NAMES)
