"""Random crops and mirror images, drawn from a seed."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from isthmus.errors import ModelError

__all__ = ["PADDING", "Augmentation", "augmented"]

Augmentation = Literal["none", "crop-flip"]

PADDING = 4
"""Pixels of zeros put around an image before it is cropped, the usual number for images of 32 × 32."""


def augmented(inputs: Tensor, how: Augmentation, generator: torch.Generator) -> Tensor:
    """Return images cropped at random places of their padded selves, half of them mirrored.

    Args:
        inputs: images, shape ``(n, channels, height, width)``.
        how: ``"crop-flip"``, or ``"none"``, which returns the inputs and draws nothing.
        generator: on the CPU, so that a seed gives the same crops on every device.

    Returns:
        Images of the same shape, dtype and device, laid out with channels last.

    Raises:
        ModelError: the inputs are no images.

    Source:
        The augmentation of He et al. 2016 (arXiv:1512.03385, section 4.2) for CIFAR-10.
    """
    if how == "none":
        return inputs
    if inputs.ndim != 4:
        raise ModelError(
            f"augment: {how!r} crops and mirrors images of shape (n, channels, height, width), found "
            f"{tuple(inputs.shape)}. Use augment: none for these data."
        )
    count, _, height, width = inputs.shape
    drawn = torch.randint(0, 2 * PADDING + 1, (2, count), generator=generator)
    mirrored = torch.randint(0, 2, (count,), generator=generator).bool()
    rows = drawn[0][:, None] + torch.arange(height)
    columns = drawn[1][:, None] + torch.arange(width)
    columns = torch.where(mirrored[:, None], columns.flip(1), columns)
    padded = functional.pad(inputs, (PADDING,) * 4).permute(0, 2, 3, 1)
    place = torch.arange(count)[:, None, None], rows[:, :, None], columns[:, None, :]
    return padded[tuple(p.to(inputs.device) for p in place)].permute(0, 3, 1, 2)
