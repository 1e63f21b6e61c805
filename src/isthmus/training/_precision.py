"""The precision of the products of training, and which one is faster where."""

from __future__ import annotations

from typing import Literal

import torch

__all__ = ["Precision", "PrecisionSetting", "faster_precision"]

Precision = Literal["float32", "bfloat16"]
PrecisionSetting = Literal["auto", "float32", "bfloat16"]


def faster_precision(device: torch.device | str) -> Precision:
    """Return the precision in which matrix products are faster on a device.

    Args:
        device: a CPU or a GPU.

    Returns:
        ``"bfloat16"`` for a GPU that multiplies it natively and for a CPU with a matrix unit for it (AMX);
        ``"float32"`` otherwise: AVX512's own bfloat16 instructions were slower (``docs/studies.md``).
    """
    if torch.device(device).type == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    return "bfloat16" if torch.cpu.get_capabilities().get("amx_bf16", False) else "float32"
