"""Whether a device can be used, told once and before any work."""

from __future__ import annotations

import torch

from isthmus.errors import StudyError

__all__ = ["check_device"]


def check_device(device: str, *, here: bool = True) -> None:
    """Check a device's name, and that the device is there.

    Args:
        device: such as ``"cpu"`` or ``"cuda"``.
        here: whether work runs on this machine; otherwise the name alone is checked.

    Raises:
        StudyError: no device of torch, or one that this machine has not.
    """
    try:
        wanted = torch.device(device)
    except RuntimeError as error:
        raise StudyError(
            f"device: expected 'cpu' or 'cuda', found {device!r}. Leave it out to use the CPU."
        ) from error
    if wanted.type not in ("cpu", "cuda", "mps", "xpu"):
        raise StudyError(f"device: expected one that computes, such as 'cpu' or 'cuda', found {device!r}.")
    if not here or wanted.type == "cpu":
        return
    there = getattr(torch.backends if wanted.type == "mps" else torch, wanted.type)
    count = (
        there.device_count() if there.is_available() and wanted.type != "mps" else int(there.is_available())
    )
    if (wanted.index or 0) >= count:
        raise StudyError(
            f"device {device!r}: torch {torch.__version__} finds {count or 'no'} {wanted.type} device"
            f"{'' if count == 1 else 's'} on this machine. Use --device cpu, or install a torch that fits the device."
        )
