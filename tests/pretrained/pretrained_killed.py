"""Kills a merge of model folders at many points of its way, each in a process of its own, and looks at what is left.

As a program: ``python tests/pretrained/pretrained_killed.py A B FOLDER POINTS SEED`` prints one JSON list. A point is
an operation on a file or folder below FOLDER, just before it happens, or the beginning of a tensor.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from isthmus import pretrained
from isthmus.couplings import random_permutation
from isthmus.errors import OutputError
from isthmus.matching import Alignment

Contents = dict[str, bytes | int]
ENDS = 8
"""Points at the end that are always tried: the last files, the rename, and what comes after it."""


def contents(folder: Path) -> Contents:
    """Return the bytes of all files; of the alignment the size, as safetensors shuffles a header's metadata."""
    return {
        str(p.relative_to(folder)): p.stat().st_size if p.name == "alignment.safetensors" else p.read_bytes()
        for p in sorted(folder.rglob("*"))
        if p.is_file()
    }


class Trap:
    """Counts the points that a run passes, and kills the process at one of them."""

    def __init__(self, below: Path) -> None:
        self._below = str(below)
        self.passed: list[str] = []
        self.fatal: int | None = None
        self.armed = False
        sys.addaudithook(self._audit)

    def point(self, name: str) -> None:
        if self.armed:
            if len(self.passed) == self.fatal:
                os.kill(os.getpid(), signal.SIGKILL)
            self.passed.append(name)

    def _audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.armed and event.partition(".")[0] in ("open", "os", "shutil") and arguments:
            path = arguments[0]
            if isinstance(path, str | os.PathLike) and os.fspath(path).startswith(self._below):
                self.point(f"{event} {os.path.basename(path)}")


def in_a_child(action: Callable[[], object]) -> int:
    """Run something in a fork of this process and return the signal that ended it; 0 for none."""
    child = os.fork()
    if child == 0:
        try:
            action()
        except OutputError:
            os._exit(3)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    return os.WTERMSIG(status) if os.WIFSIGNALED(status) else -os.WEXITSTATUS(status)


def state_of(root: Path, expected: Contents) -> str:
    """Say what a killed run left: nothing, a hidden folder, the whole target, or what must not be."""
    left = list(root.iterdir())
    if not left:
        return "nothing"
    if len(left) > 1:
        return f"wrong: {sorted(p.name for p in left)}"
    found, name = contents(left[0]), left[0].name
    if name == "out":
        return "whole" if found == expected else "wrong: a target that is not whole"
    if not (name.startswith(".out.") and name.endswith(".partial")):
        return f"wrong: {name}"
    if "config.json" in found and set(found) != set(expected):
        return f"wrong: a configuration without {sorted(set(expected) - set(found))}"
    return "hidden"


def main() -> None:
    folders, root = [Path(p) for p in sys.argv[1:3]], Path(sys.argv[3]).resolve()
    a, b = (pretrained.open_model(folder) for folder in folders)
    spec, generator = b.discover(), torch.Generator().manual_seed(0)
    drawn = {name: random_permutation(group.size, generator) for name, group in spec.groups.items()}
    alignment = Alignment(drawn, spec, "random")
    trap = Trap(root)

    def merge() -> None:
        trap.passed.clear()
        pretrained.merge(
            [a, b],
            root / "out",
            alignments=[alignment],
            max_shard_size=1000,
            on_progress=lambda name, *_: trap.point(f"tensor {name}"),
        )

    merge()  # imports what is needed
    (root / "out").rename(root.parent / "first")
    trap.armed = True
    merge()
    trap.armed = False
    names, expected = list(trap.passed), contents(root / "out")
    assert contents(root.parent / "first") == expected
    (root / "out").rename(root.parent / "expected")
    before = [contents(folder) for folder in folders]
    drawer = random.Random(int(sys.argv[5]))
    points = drawer.sample(range(len(names) - ENDS), int(sys.argv[4]))
    tried: list[dict[str, object]] = []
    for point in (*sorted(points), *range(len(names) - ENDS, len(names))):
        trap.armed, trap.fatal = True, point
        ended = in_a_child(merge)
        trap.armed = False
        found = state_of(root, expected)
        again = in_a_child(merge)
        tried.append(
            {
                "point": names[point],
                "ended": ended,
                "left": found,
                "again": again,
                "then": state_of(root, expected),
                "inputs": [contents(folder) for folder in folders] == before,
            }
        )
        if (root / "out").exists():
            (root / "out").rename(root.parent / f"out-{point}")
    print(json.dumps(tried, indent=1))  # noqa: T201


if __name__ == "__main__":
    main()
