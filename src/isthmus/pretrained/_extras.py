"""The files of a model folder that are not its weights: what is copied, and what would be out of date."""

from __future__ import annotations

import os
import shutil
from collections.abc import Collection
from pathlib import Path, PurePosixPath

from isthmus.errors import CheckpointError, IsthmusError, OutputError, printable
from isthmus.files import read_json
from isthmus.pretrained._links import require_inside, roots_of

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
    "diffusion_pytorch_model",
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
# Written anew, or of the folder's own history; whatever their case, since some disks take both for one.
_OWN_FILES = ("readme.md", ".gitattributes", "isthmus")
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
        """Copy the files; links are followed, so that a folder of the hub's cache gives ordinary files.

        Raises:
            CheckpointError: a link leads outside by now.
            OutputError: a file of this name is there, since the disk does not tell capital letters from small ones.
        """
        roots = roots_of(self._source)
        for name in self.copied:
            real = require_inside(self._source / name, roots)
            place = target / name
            place.parent.mkdir(parents=True, exist_ok=True)
            if os.path.lexists(place):
                raise OutputError(
                    f"Cannot write {printable(place)}: a file whose name differs at most in capital letters is there. "
                    "Rename one of them in the model folder, or write to a disk that tells them apart."
                )
            shutil.copyfile(real, place)


def extras_of(source: Path, own: Collection[str]) -> Extras:
    """Find all files of a model folder except its weights, its model card and hidden folders.

    Weights in the folders of further modules (sentence-transformers lists them in ``modules.json``) are other
    networks', which read this one's outputs, and are copied.

    Args:
        source: the model folder.
        own: names of the files whose tensors are written anew.

    Raises:
        CheckpointError: a link leads nowhere, or outside of the model's folder (see :mod:`._links`).
    """
    roots = roots_of(source)
    copied: list[str] = []
    left_out: list[str] = []
    modules = _modules(source)
    for path in _files(source, roots):
        name = path.relative_to(source).as_posix()
        if name in own or name.lower() in _OWN_FILES:
            continue
        if not path.exists():
            raise CheckpointError(
                f"{printable(path)}: is a link to {printable(os.readlink(path))}, which is not there. Download or copy "
                "the model folder again, or remove the link."
            )
        of_module = any(PurePosixPath(name).is_relative_to(module) for module in modules)
        (left_out if _is_weights(path.name) and not of_module else copied).append(name)
    return Extras(source, copied, left_out)


def _files(folder: Path, roots: tuple[Path, ...], above: tuple[Path, ...] = ()) -> list[Path]:
    """Return all files below a folder, those of hidden folders left out; links in a circle are not followed."""
    real = require_inside(folder, roots)
    if real in above:
        return []
    found: list[Path] = []
    for path in sorted(folder.iterdir()):
        if path.is_dir():
            found += [] if path.name.startswith(".") else _files(path, roots, (*above, real))
        elif path.is_file():  # no pipe, which copying would wait on for ever
            require_inside(path, roots)
            found.append(path)
        elif path.is_symlink() and not path.exists():
            found.append(path)
    return found


def _modules(source: Path) -> list[str]:
    """Return the folders of the modules that sentence-transformers runs after the network."""
    try:
        listed = read_json(source / _MODULES, what="list of modules")
        return [str(module["path"]) for module in listed if module["path"]]
    except (IsthmusError, KeyError, TypeError):
        return []


def _is_weights(name: str) -> bool:
    stem, suffix = os.path.splitext(name.lower().removesuffix(".index.json"))
    if suffix in _WEIGHT_SUFFIXES:
        return True
    return suffix in _WEIGHT_ARCHIVES and stem.startswith(_WEIGHT_NAMES)
