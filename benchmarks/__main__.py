"""``python -m benchmarks`` runs a short set of all benchmarks; ``python -m benchmarks NAME [options]`` runs one.

``python -m benchmarks NAME --help`` explains one, ``--list`` names all. The short set is for seeing that they work and
whether something has become much slower: sizes are small, data are the digits of scikit-learn, or random. Results go
to ``build/benchmarks``; the records behind the figures in the documentation lie in ``benchmarks/results`` and are made
by the commands in each benchmark's own text.
"""

from __future__ import annotations

import runpy
import shlex
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).parent
RESULTS = HERE.parent / "build" / "benchmarks"
PARTS = ("assignment_page", "matching_page", "matching_plain", "measuring", "peers", "peers_worker")
NAMES = sorted(p.stem for p in HERE.glob("[a-z]*.py") if p.stem not in PARTS)

SHORT = {
    "core": "--networks mlp resnet20 --repeats 1 --examples 32 --out {out}",
    "assignment": "--sizes 512 1024 --descents 512 --repeats 3 --largest-trained 512 --epochs 2 --out {out}",
    "matching": "--problems resnet20-1 --data --starts 'single pass' --repeats 1 --no-memory --timeout 60 --out {out}",
    "line": "--networks resnet20 --points 11 --repeats 2 --resnet-examples 100 --resnet-batch 50 --out {out}",
    "training": "--rounds 1 --out {out}",
    "certificate": "--cost 64",
}
"""What the short set runs, and with which options."""


def run_short() -> int:
    """Run the short set, one process each; return 0, or 1 if some failed."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    failed = []
    for name, options in SHORT.items():
        out = RESULTS / f"{name}.json"
        out.unlink(missing_ok=True)
        command = [part.format(out=out) for part in shlex.split(options)]
        print(f"== {name}: {' '.join(command)}", flush=True)
        start = time.monotonic()
        done = subprocess.run(
            [sys.executable, "-m", f"benchmarks.{name}", *command], cwd=HERE.parent, check=False
        )
        print(f"== {name}: {time.monotonic() - start:.0f} s", flush=True)
        if done.returncode != 0:
            failed.append(name)
    print(f"Results are in {RESULTS}." + (f" Failed: {', '.join(failed)}." if failed else ""))
    return 1 if failed else 0


def main() -> None:
    """Run the short set or the named benchmark."""
    if len(sys.argv) < 2:
        raise SystemExit(run_short())
    if sys.argv[1] not in NAMES:
        print("usage: python -m benchmarks [NAME [options]]\nbenchmarks:", *NAMES, sep="\n  ")
        raise SystemExit(0 if sys.argv[1] == "--list" else 2)
    name = sys.argv.pop(1)
    runpy.run_module(f"benchmarks.{name}", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
