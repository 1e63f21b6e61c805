"""Reading what flows into a layer as rows that its weight multiplies: positions of a convolution are samples."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

__all__ = ["Convolution", "input_rows", "per_axis"]

_BLOCK_BYTES = 2**28


@dataclass(frozen=True)
class Convolution:
    """How a convolution cuts patches, one entry per spatial dimension.

    Attributes:
        kernel: kernel lengths.
        stride: steps.
        padding: zeros added before and after, per dimension.
        dilation: distance between kernel positions.
        groups: number of channel groups.
        turned: whether it is a transposed convolution.
    """

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    dilation: tuple[int, ...]
    groups: int
    turned: bool

    @property
    def dimensions(self) -> int:
        """Number of spatial dimensions."""
        return len(self.kernel)

    @classmethod
    def from_arguments(cls, given: Mapping[str, Any], kernel: tuple[int, ...], turned: bool) -> Convolution:
        """Read the bound arguments of an ATen convolution."""
        rank = len(kernel)
        dilation = per_axis(given.get("dilation", 1), rank)
        padding = given.get("padding", 0)
        if isinstance(padding, str):
            total = [d * (k - 1) if padding == "same" else 0 for d, k in zip(dilation, kernel, strict=True)]
            sides = tuple((t // 2, t - t // 2) for t in total)
        else:
            sides = tuple((p, p) for p in per_axis(padding, rank))
        stride = per_axis(given.get("stride", 1), rank)
        return cls(kernel, stride, sides, dilation, int(given.get("groups", 1)), turned)


def per_axis(value: Any, rank: int) -> tuple[int, ...]:
    """Return a setting of an operator, one number or several, with one entry for each axis of space."""
    values = [value] if isinstance(value, int) else list(value)
    return tuple(int(v) for v in (values * rank if len(values) == 1 else values))


def input_rows(activation: Tensor, convolution: Convolution | None) -> Iterator[Tensor]:
    r"""Yield the inflowing activation as blocks of rows that the flattened weight multiplies.

    Linear layers: rows are all but the last axis. Convolutions: one row per output position (and per channel
    group), with ``channels / groups × kernel`` entries in the weight's order. Transposed convolutions: one row
    per input position with its channels (each kernel position then multiplies the same rows).

    Args:
        activation: what flows in, shape ``(…, features)`` or ``(n, channels, *space)`` (``n`` may lack).
        convolution: ``None`` for linear layers.

    Yields:
        Matrices ``(rows, features)`` of at most about 256 MiB each in float64.
    """
    if convolution is None:
        yield activation.reshape(-1, activation.shape[-1])
        return
    images = activation.unsqueeze(0) if activation.ndim == convolution.dimensions + 1 else activation
    if convolution.turned:
        split = images.unflatten(1, (convolution.groups, -1))
        yield split.movedim(2, -1).reshape(-1, split.shape[2])
        return
    positions = images[0, 0].numel() * images.shape[1] * torch.tensor(convolution.kernel).prod().item()
    step = max(1, int(_BLOCK_BYTES // max(8 * positions, 1)))
    for block in images.split(step):
        yield _patches(block, convolution)


def _patches(images: Tensor, convolution: Convolution) -> Tensor:
    """Return the patches of images, shape ``(n · positions · groups, channels / groups · kernel)``."""
    sides = [side for pair in reversed(convolution.padding) for side in pair]
    windows = functional.pad(images, sides) if any(sides) else images
    steps = zip(convolution.kernel, convolution.stride, convolution.dilation, strict=True)
    for axis, (kernel, stride, dilation) in enumerate(steps):
        windows = windows.unfold(2 + axis, dilation * (kernel - 1) + 1, stride)[..., ::dilation]
    grouped = windows.unflatten(1, (convolution.groups, -1))
    rank = convolution.dimensions
    # (n, groups, channels, positions…, kernel…) -> (n, positions…, groups, channels, kernel…)
    order = [0, *range(3, 3 + rank), 1, 2, *range(3 + rank, 3 + 2 * rank)]
    features = grouped.shape[2] * grouped.shape[3 + rank :].numel()
    return grouped.permute(order).reshape(-1, features)
