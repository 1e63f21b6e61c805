"""What a network needs in memory, and what there is: told before anything is built or trained."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from isthmus.errors import ModelError

__all__ = ["check_fits", "memory_of"]

_BYTES = 4
"""Of a float32."""

_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))
"""Where Linux tells a container what it may use."""


def memory_of(device: torch.device | str = "cpu") -> int | None:
    """Return the bytes of memory of a device, or ``None`` where the system does not tell.

    Of the CPU: the machine's, or what a container may use of it.
    """
    wanted = torch.device(device)
    if wanted.type == "cuda":
        return int(torch.cuda.get_device_properties(wanted).total_memory)
    if wanted.type != "cpu" or not hasattr(os, "sysconf") or "SC_PHYS_PAGES" not in os.sysconf_names:
        return None
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min([there, *_container_limits()])


def _container_limits() -> list[int]:
    found: list[int] = []
    for path in _LIMITS:
        try:
            found.append(int(path.read_text(encoding="ascii")))
        except (OSError, ValueError):  # no such file, or "max"
            continue
    return found


def check_fits(parameters: int, what: str, *, copies: int = 1, device: torch.device | str = "cpu") -> None:
    """Check that so many float32 parameters fit into memory.

    Args:
        parameters: of one network.
        what: how the message calls what holds them, such as ``"Training mlp 512"``.
        copies: tensors of that size that are held at a time, such as weights, gradients and moments.
        device: where they are held.

    Raises:
        ModelError: they do not fit.
    """
    there = memory_of(device)
    needed = _BYTES * copies * parameters
    if there is not None and needed > there:
        times = f"{copies} × " if copies > 1 else ""
        raise ModelError(
            f"{what} takes {times}{parameters:,} float32 numbers, {needed / 2**30:,.1f} GiB, and the device {device} "
            f"has {there / 2**30:,.1f} GiB. Choose a smaller width or depth, or train fewer networks at a time."
        )
