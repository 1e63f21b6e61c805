"""What lies under a path that was given as a checkpoint, and what to do where it is none."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from isthmus.checkpoints import READABLE, looks_like, split_key
from isthmus.errors import CheckpointError, IsthmusError, printable
from isthmus.files import read_json, require_file
from isthmus.pretrained._lazy import DIFFUSERS_WEIGHTS, TRANSFORMERS_WEIGHTS
from isthmus.pretrained._libraries import library_of

__all__ = ["FoundInput", "check_inputs", "inspect_input"]

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/\w[\w.-]{0,95}", re.ASCII)
_SHOWN = 4


@dataclass(frozen=True)
class FoundInput:
    """What lies under a path.

    Attributes:
        path: as it was given.
        kind: ``"model folder"`` brings its network; ``"weights"`` (a file, or a folder of shards) needs one;
            ``"wrong"`` is neither.
        what: in words, such as ``"a folder with an adapter (adapter_config.json)"``.
        advice: what to do where it is wrong; empty otherwise.
    """

    path: Path
    kind: Literal["model folder", "weights", "wrong"]
    what: str
    advice: str = ""

    def __str__(self) -> str:
        """Return one line."""
        return f"{printable(self.path)}: {self.what}." + (f" {self.advice}" if self.advice else "")


def check_inputs(paths: Sequence[str | os.PathLike[str]], *, network: bool = False) -> bool:
    """Check all inputs of a command at once, before any of them is read.

    Args:
        paths: of checkpoints.
        network: whether the network that they belong to is given beside them.

    Returns:
        Whether all of them are model folders, which bring their network with them.

    Raises:
        CheckpointError: one or several are no checkpoints, or need a network that is not given; all are named, with
            what was found.
    """
    found = list(dict.fromkeys(inspect_input(path) for path in paths))
    wrong = [item for item in found if item.kind == "wrong"]
    if wrong:
        lines = "\n".join(str(item) for item in wrong)
        raise CheckpointError(
            lines if len(wrong) == 1 else f"{len(wrong)} inputs are no checkpoints:\n{lines}"
        )
    folders = all(item.kind == "model folder" for item in found)
    if not (network or folders):
        lines = "\n".join(str(item) for item in found)
        raise CheckpointError(
            "Give --model TARGET, the network of these checkpoints (or a model folder of it); only model folders "
            f"bring their own.\n{lines}"
        )
    return folders


def inspect_input(path: str | os.PathLike[str]) -> FoundInput:
    """Say what lies under a path; nothing but names, a configuration and a few first bytes is read.

    Args:
        path: of a file or folder, perhaps with ``::KEY`` (see :func:`isthmus.checkpoints.read_checkpoint`).
    """
    target, _ = split_key(path)
    try:
        if target.is_dir():
            return _folder(target)
        if os.path.lexists(target):
            return _file(target)
        return _missing(target)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        return FoundInput(
            target, "wrong", f"cannot be read: {printable(reason)}", "Check the path and its rights."
        )


def _missing(path: Path) -> FoundInput:
    text = os.fspath(path)
    if _HUB_NAME.fullmatch(text) and not path.parent.is_dir():
        found = "no such file or folder; it looks like the name of a model on the hub, from which nothing is downloaded"
        cached = _in_cache(text)
        if cached is not None:
            return FoundInput(path, "wrong", found, f"It is in the hub's cache: give {printable(cached)}.")
        name = path.name
        return FoundInput(
            path, "wrong", found, f"Run `hf download {text} --local-dir {name}` and give the folder {name}."
        )
    parent = path.parent
    if not parent.is_dir():
        return FoundInput(
            path, "wrong", f"no such file, nor the folder {printable(parent)}", "Check the path."
        )
    near = difflib.get_close_matches(path.name, [p.name for p in parent.iterdir()], _SHOWN)
    advice = (
        f"Did you mean {' or '.join(printable(parent / n) for n in near)}?" if near else "Check the path."
    )
    return FoundInput(path, "wrong", "no such file or folder", advice)


def _in_cache(name: str) -> Path | None:
    """Return the newest snapshot of a model in the hub's cache, if there is one."""
    home = os.environ.get("HF_HOME") or os.path.join("~", ".cache", "huggingface")
    cache = Path(os.environ.get("HF_HUB_CACHE") or os.path.join(home, "hub")).expanduser()
    snapshots = (cache / f"models--{name.replace('/', '--')}" / "snapshots").glob("*/config.json")
    newest = max(snapshots, key=lambda p: p.lstat().st_mtime, default=None)
    return None if newest is None else newest.parent


def _folder(folder: Path) -> FoundInput:
    names = sorted(p.name for p in folder.iterdir())
    present = set(names)
    weights = TRANSFORMERS_WEIGHTS.among(present) + DIFFUSERS_WEIGHTS.among(present)
    if "adapter_config.json" in present and not ("config.json" in present and weights):
        base = _entries(folder / "adapter_config.json").get("base_model_name_or_path")
        return FoundInput(
            folder,
            "wrong",
            f"a folder with an adapter (adapter_config.json){f' for {printable(base)!r}' if base else ''}, not a "
            "network",
            "Give two adapters to merge them with each other (isthmus merge); for anything else, join it to its "
            "network first: PeftModel.from_pretrained(network, folder).merge_and_unload()"
            ".save_pretrained(new_folder), with peft.",
        )
    if "model_index.json" in present:
        parts = sorted(p.parent.name for p in folder.glob("*/config.json"))
        return FoundInput(
            folder,
            "wrong",
            f"a pipeline of several networks (model_index.json): {_some(parts)}",
            f"Give the folder of one of them: {_some_paths([folder / part for part in parts])}.",
        )
    if "config.json" in present:
        return _described_folder(folder, names)
    if weights:
        return FoundInput(folder, "weights", f"a folder with weights ({weights[0]}) and no config.json")
    return FoundInput(folder, "wrong", *_nothing_in(folder, names))


def _described_folder(folder: Path, names: Sequence[str]) -> FoundInput:
    library = library_of(_entries(folder / "config.json"))
    own, present = library.weights, set(names)
    if own.among(present):
        return FoundInput(folder, "model folder", "a model folder (config.json)")
    if found := TRANSFORMERS_WEIGHTS.among(present) + DIFFUSERS_WEIGHTS.among(present):
        return FoundInput(
            folder,
            "weights",
            f"a folder with weights ({found[0]}), whose config.json is one of {library.name}",
        )
    others = [
        n for n in names if n.endswith((".bin", ".h5", ".msgpack", ".gguf", ".onnx", ".ckpt", ".pt", ".pth"))
    ]
    loose = [n for n in names if n.endswith(".safetensors")]
    return FoundInput(
        folder,
        "wrong",
        f"a folder with config.json, but neither {own.single} nor {own.index}"
        + (f"; it holds {_some(others + loose)}" if others or loose else ""),
        "Load it with from_pretrained and write it with save_pretrained, which makes safetensors.",
    )


def _nothing_in(folder: Path, names: Sequence[str]) -> tuple[str, str]:
    """Return what a folder is that is no checkpoint, and what to do."""
    if not names:
        return "an empty folder", "Was the model downloaded or saved somewhere else?"
    inside = sorted(
        {p.parent for p in folder.glob("*/config.json")}
        | {p.parent for p in folder.glob("snapshots/*/config.json")}
    )
    if inside:
        return "a folder of model folders", f"Give one of them: {_some_paths(inside)}."
    files = [n for n in names if n.lower().endswith(READABLE)]
    if files:
        return "a folder with checkpoints and no config.json", f"Give one of the files: {_some(files)}."
    return (
        f"a folder that holds {_some(names)}, and no weights",
        "Give a checkpoint, or a folder with config.json.",
    )


def _file(path: Path) -> FoundInput:
    try:
        require_file(path)
    except CheckpointError as error:
        words = str(error).removeprefix(f"{printable(path)}: ")
        what, _, advice = words.partition(". ")
        return FoundInput(path, "wrong", what, advice)
    name = path.name.lower()
    if name == "config.json" or (name.endswith(".json") and not name.endswith(".index.json")):
        return FoundInput(
            path, "wrong", "a configuration or other JSON, no weights", "Give its folder, or the weights."
        )
    if name.startswith("adapter_model"):
        return FoundInput(
            path,
            "wrong",
            "the weights of an adapter, not of a network",
            "Join it to its network first, with peft.",
        )
    if name.endswith((*READABLE, ".index.json")):
        return FoundInput(path, "weights", "a checkpoint, which names no network")
    with path.open("rb") as file:
        looks = looks_like(file.read(64))
    hint = "Give it its right suffix" if "file (." in looks else "Convert it first"
    return FoundInput(
        path,
        "wrong",
        f"{looks}, with the suffix {printable(path.suffix) or '(none)'!r}",
        f"{hint}: {', '.join(READABLE)}.",
    )


def _entries(path: Path) -> Mapping[str, Any]:
    """Return the entries of a JSON file; none where it cannot be read, which whoever needs them will say."""
    try:
        found = read_json(path, allow_infinite=True)
    except IsthmusError:
        return {}
    return found if isinstance(found, dict) else {}


def _some_paths(paths: Sequence[Path]) -> str:
    """Show paths to be given in turn: whole, unlike names, or they would be of no use."""
    return _some([os.fspath(path) for path in paths], 4096)


def _some(names: Sequence[str], longest: int = 80) -> str:
    shown = ", ".join(printable(n, longest) for n in names[:_SHOWN])
    return shown + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
