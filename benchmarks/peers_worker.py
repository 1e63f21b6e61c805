"""The process in the peers' environment: reads one request a line, answers one line. Knows nothing of Isthmus."""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import json
import os
import sys
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np

from benchmarks.measuring import cpu_seconds, peak_memory

MODULES = {"numpy": "numpy", "scipy": "scipy.optimize", "lapx": "lap", "POT": "ot", "rebasin": "rebasin"}


def versions() -> dict[str, Any]:
    """Return the versions of the packages that can be imported, and why others cannot."""
    found, missing = {}, {}
    for name, module in MODULES.items():
        try:
            importlib.import_module(module)
            found[name] = importlib.metadata.version(name)
        except Exception as failure:  # a peer may fail to import in any way; the record says how
            missing[name] = f"not imported: {type(failure).__name__}: {failure}"
    return {"versions": found, "missing": missing}


def _scipy(costs: np.ndarray) -> np.ndarray:
    from scipy.optimize import linear_sum_assignment

    return linear_sum_assignment(costs)[1]


def _lapjvh(costs: np.ndarray) -> np.ndarray:
    import lap

    return lap.lapjvh(costs)[-1]


def _pot(costs: np.ndarray) -> np.ndarray:
    import ot

    weights = np.full(len(costs), 1.0 / len(costs))
    return ot.emd(weights, weights, costs.astype(np.float64), numItermax=10**9).argmax(1)


SOLVERS = {"scipy": _scipy, "lapjvh": _lapjvh, "pot": _pot}


@functools.lru_cache(maxsize=1)
def _read(path: str, changed: float) -> np.ndarray:
    return np.load(path)


def assignment(solver: str, matrix: str, *, memory: bool = False) -> dict[str, Any]:
    """Solve the stored problem; return process CPU seconds and the value, or with ``memory`` the extra bytes."""
    costs = _read(matrix, os.stat(matrix).st_mtime_ns)
    if memory:
        return {"bytes": peak_memory(functools.partial(SOLVERS[solver], costs))}
    seconds, columns = cpu_seconds(functools.partial(SOLVERS[solver], costs))
    assert len(set(columns.tolist())) == len(costs)
    return {
        "seconds": seconds,
        "value": float(costs[np.arange(len(costs)), columns].astype(np.float64).sum()),
    }


TASKS = {"versions": versions, "assignment": assignment}


def main() -> None:
    """Answer until the input ends; what peers print goes to the error stream."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for row in sys.stdin:
        request = json.loads(row)
        try:
            answer = TASKS[request.pop("task")](**request)
        except Exception as failure:  # a peer that breaks is skipped with its reason, the others go on
            answer = {"error": f"{type(failure).__name__}: {failure}"}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
