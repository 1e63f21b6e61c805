"""Time, memory, growth and machine, for all benchmarks. Imports nothing of Isthmus; the peers' process uses it too."""

from __future__ import annotations

import ctypes
import multiprocessing
import platform
import resource
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import torch


def cpu_seconds(call: Callable[[], Any]) -> tuple[float, Any]:
    """Return the CPU time of a call, and its result."""
    start = time.process_time()
    result = call()
    return time.process_time() - start, result


def peak_memory(call: Callable[[], Any]) -> int:
    """Return the bytes a call needs beyond what the process holds, measured in a forked process."""

    def child(pipe: Any) -> None:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        call()
        pipe.send(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)

    # Give freed memory back, or the child would use it again unseen.
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
    context = multiprocessing.get_context("fork")
    receive, send = context.Pipe(duplex=False)
    process = context.Process(target=child, args=(send,))
    process.start()
    send.close()
    kilobytes = receive.recv()
    process.join()
    return 1024 * int(kilobytes)


def exponent(widths: Sequence[float], values: Sequence[float]) -> float:
    """Return the slope of a line through the points on log axes."""
    return float(np.polyfit(np.log(widths), np.log(values), 1)[0])


def product_rate(dtype: torch.dtype, size: int = 2048) -> float:
    """Return operations per CPU second of a square matrix product, the best of several."""
    import torch

    x = torch.randn(size, size).to(dtype)
    seconds = [cpu_seconds(lambda: x @ x)[0] for _ in range(7)]
    return 2 * size**3 / min(seconds)


def machine() -> dict[str, Any]:
    """Return what the numbers depend on."""
    import torch

    text = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    model = next((row.split(":")[1].strip() for row in text.splitlines() if row.startswith("model name")), "")
    git = [["git", "rev-parse", "HEAD"], ["git", "status", "--porcelain", "--untracked-files=no"]]
    commit, dirty = (
        subprocess.run(c, capture_output=True, text=True, check=False).stdout.strip() for c in git
    )
    return {
        "processor": model or platform.processor(),
        "amx": "amx_bf16" in text,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "commit": commit,
        "dirty": bool(dirty),
        "date": time.strftime("%Y-%m-%d"),
    }
