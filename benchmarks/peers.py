"""Other packages, installed from the package index into an environment of their own and run in a process there.

The environment lies in ``build/peers``. Its packages come before ours, and ours (torch above all) are visible behind
them, so that nothing large is installed twice and nothing of theirs reaches our own environment. Where a package cannot
be installed or imported, ``Peers.skipped`` says why, and the benchmark goes on without it.
"""

from __future__ import annotations

import json
import subprocess
import sys
import sysconfig
import tempfile
import venv
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

_ROOT = Path(__file__).parent.parent
FOLDER = _ROOT / "build" / "peers"
PACKAGES = ("scipy", "lapx", "POT", "rebasin")


def install(folder: Path = FOLDER, packages: tuple[str, ...] = PACKAGES) -> dict[str, str]:
    """Make the environment where it is missing; return the packages that are not there, each with the reason."""
    python = folder / "bin" / "python"
    if not python.exists():
        venv.create(folder, with_pip=True)
        inside = Path(sysconfig.get_path("purelib", vars={"base": str(folder)}))
        (inside / "behind.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
    skipped = {}
    for name in packages:
        if list(folder.glob(f"lib/*/site-packages/{name.lower()}-*.dist-info")):
            continue
        pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        # SciPy is ours already; --ignore-installed puts it into their environment nonetheless.
        options = ["--ignore-installed", "--no-deps"] if name in ("scipy", "POT") else []
        done = subprocess.run([*pip, *options, name], capture_output=True, text=True, check=False)
        if done.returncode != 0:
            last = done.stderr.strip().splitlines() or [f"pip ended with {done.returncode}"]
            skipped[name] = f"not installed: {last[-1]}"
    return skipped


class Peers:
    """A process in the peers' environment that answers one call after the other.

    Attributes:
        versions: of the packages found there.
        skipped: why a package is missing.
    """

    def __init__(self, folder: Path = FOLDER) -> None:
        """Make the environment where needed, and start the process."""
        self.skipped = install(folder)
        command = [str(folder / "bin" / "python"), "-m", "benchmarks.peers_worker"]
        self._process = subprocess.Popen(
            command, cwd=_ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self._scratch = tempfile.TemporaryDirectory()
        found = self.call("versions")
        self.versions: dict[str, str] = found["versions"]
        self.skipped |= {k: v for k, v in found["missing"].items() if k not in self.skipped}

    def call(self, task: str, **arguments: Any) -> dict[str, Any]:
        """Run a function of ``peers_worker`` there.

        Raises:
            RuntimeError: it failed; the text is the peer's own error.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps({"task": task, **arguments}) + "\n")
        self._process.stdin.flush()
        answer = json.loads(self._process.stdout.readline() or '{"error": "the process ended"}')
        if "error" in answer:
            raise RuntimeError(f"{task}: {answer['error']}")
        return answer

    def share(self, matrix: np.ndarray) -> str:
        """Store a matrix where the process can map it; return the path."""
        path = Path(self._scratch.name) / "matrix.npy"
        path.unlink(missing_ok=True)
        np.save(path, matrix)
        return str(path)

    def __enter__(self) -> Peers:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()
        self._scratch.cleanup()


if __name__ == "__main__":
    with Peers() as peers:
        json.dump({"versions": peers.versions, "skipped": peers.skipped}, sys.stdout, indent=1)
