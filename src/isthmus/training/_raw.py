"""What the readers of image files give, and how much of it."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["MOST_BYTES", "Raw"]

MOST_BYTES = 1 << 29
"""Of one file of a data set, unzipped: three times the largest published one, the training batch of CIFAR-100."""

Raw = tuple[NDArray[np.uint8], NDArray[np.int64]]
"""Pixels of shape ``(n, channels, height, width)`` and labels of shape ``(n,)``."""
