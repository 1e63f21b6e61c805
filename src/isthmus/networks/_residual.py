"""Residual networks: ResNet-20 with both classical shortcuts, and a GroupNorm net, with their symmetries."""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from isthmus.errors import ModelError
from isthmus.networks._plain import scaled
from isthmus.networks._reference import (
    Layout,
    Ledger,
    ReferenceGroup,
    blocks,
    columns,
    concatenated,
    norm,
    rows,
    whole,
)

__all__ = [
    "Shortcut",
    "groupnorm_reference",
    "groupnorm_resnet",
    "resnet20",
    "resnet20_reference",
]

Shortcut = Literal["projection", "zero_pad"]


class _ZeroPadShortcut(nn.Module):
    """Option A: every second pixel, zero channels on both sides; no parameters."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.left, self.right = _flanks(inputs, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.left, self.right))


def _flanks(inputs: int, outputs: int) -> tuple[int, int]:
    left = (outputs - inputs) // 2
    return left, outputs - inputs - left


class _ResNetBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int, shortcut: Shortcut) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1:
            self.shortcut = (
                _ZeroPadShortcut(inputs, outputs)
                if shortcut == "zero_pad"
                else nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
            )

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return F.relu(out + self.shortcut(x))


class _ResNet20(nn.Module):
    def __init__(self, classes: int, channels: list[int], shortcut: Shortcut) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, channels[0], 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels[0])
        stages, previous = [], channels[0]
        for s, size in enumerate(channels):
            stage = []
            for b in range(3):
                stage.append(_ResNetBlock(previous, size, 2 if s > 0 and b == 0 else 1, shortcut))
                previous = size
            stages.append(nn.Sequential(*stage))
        self.stages = nn.Sequential(*stages)
        self.fc = nn.Linear(previous, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stages(F.relu(self.bn1(self.conv1(x))))
        return self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))


def resnet20(classes: int = 10, width: float = 1, *, shortcut: Shortcut = "projection") -> nn.Module:
    """Build the CIFAR ResNet-20 with BatchNorm: stages of three blocks, 16, 32 and 64 channels at width 1.

    Args:
        classes: number of outputs.
        width: multiplier of all channel counts.
        shortcut: where the stream widens, ``"projection"`` (option B: 1 × 1 convolution and BatchNorm) or
            ``"zero_pad"`` (option A: strided slice between zero channels, no parameters).

    Raises:
        ModelError: an unknown shortcut.

    Source:
        He et al. 2016, section 4.2 (options A and B in section 3.3).
    """
    if shortcut not in ("projection", "zero_pad"):
        raise ModelError(f"resnet20: unknown shortcut {shortcut!r}. Choose 'projection' or 'zero_pad'.")
    return _ResNet20(classes, [scaled(c, width) for c in (16, 32, 64)], shortcut)


def resnet20_reference(width: float = 1, *, shortcut: Shortcut = "projection") -> list[ReferenceGroup]:
    """Return the symmetry of :func:`resnet20`.

    Every block has an inner group. With the projection each stage has one more, its stream, which the blocks
    read and write. With zero padding the stream of a stage is ``[zeros | previous stream | zeros]``: the
    middle stays tied to the stages before, and each flank is a group of its own. (The two flanks of a stage
    could also exchange units, being both zero on arrival, but no affine index map spans them.)
    """
    channels = [scaled(c, width) for c in (16, 32, 64)]
    ledger = Ledger()
    stream: Layout = whole("stream0", channels[0])
    ledger.move(stream, rows("conv1", bias=False), norm("bn1"))
    for s, size in enumerate(channels):
        for b in range(3):
            block = f"stages.{s}.{b}"
            ledger.move(stream, columns(f"{block}.conv1"))
            if s > 0 and b == 0 and shortcut == "projection":
                ledger.move(stream, columns(f"{block}.shortcut.0"))
                stream = whole(f"stream{s}", size)
                ledger.move(stream, rows(f"{block}.shortcut.0", bias=False), norm(f"{block}.shortcut.1"))
            elif s > 0 and b == 0:
                left, right = _flanks(channels[s - 1], size)
                stream = concatenated(
                    (whole(f"left{s}", left), left),
                    (stream, channels[s - 1]),
                    (whole(f"right{s}", right), right),
                )
            ledger.move(stream, rows(f"{block}.conv2", bias=False), norm(f"{block}.bn2"))
            ledger.move(
                whole(block, size),
                rows(f"{block}.conv1", bias=False),
                norm(f"{block}.bn1"),
                columns(f"{block}.conv2"),
            )
    ledger.move(stream, columns("fc"))
    return ledger.groups()


class _GroupNormBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int, groups: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1)
        self.norm1 = nn.GroupNorm(groups, outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1)
        self.norm2 = nn.GroupNorm(groups, outputs)
        self.project = None if stride == 1 and inputs == outputs else nn.Conv2d(inputs, outputs, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.norm1(self.conv1(x)))
        out = self.norm2(self.conv2(out))
        return F.relu(out + (x if self.project is None else self.project(x)))


class _GroupNormResNet(nn.Module):
    def __init__(self, classes: int, channels: list[int], groups: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, channels[0], 3, 1, 1)
        self.norm = nn.GroupNorm(groups, channels[0])
        inputs, strides = [channels[0], *channels], [1, *[2] * len(channels)]
        self.blocks = nn.ModuleList(
            _GroupNormBlock(inputs[i], size, groups, strides[i]) for i, size in enumerate(channels)
        )
        self.head = nn.Linear(channels[-1], classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stem(x)))
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean((2, 3)))


def groupnorm_resnet(classes: int = 10, width: float = 1, *, groups: int = 4) -> nn.Module:
    """Build a residual network with GroupNorm: a stem and two blocks, 16 and 32 channels at width 1.

    Args:
        classes: number of outputs.
        width: multiplier of the channel counts.
        groups: normalisation groups of every layer; must divide the channel counts.

    Raises:
        ModelError: the groups do not divide the channels.

    Source:
        Wu and He 2018 (group normalisation) in the block of He et al. 2016.
    """
    channels = [scaled(c, width) for c in (16, 32)]
    if groups < 1 or any(c % groups for c in channels):
        raise ModelError(f"groupnorm_resnet: {groups} groups do not divide channels {channels} evenly.")
    return _GroupNormResNet(classes, channels, groups)


def groupnorm_reference(width: float = 1, *, groups: int = 4) -> list[ReferenceGroup]:
    """Return the symmetry of :func:`groupnorm_resnet`.

    A GroupNorm axis of ``C`` channels is ``groups × C/groups``. What preserves the function and can be said
    with index maps is to permute the blocks, and to permute the members identically in all blocks: two groups
    on each channel axis, carried along by everything that is joined to it.
    """
    channels = [scaled(c, width) for c in (16, 32)]
    ledger = Ledger()
    stream = blocks("stream", groups, channels[0] // groups)
    ledger.move(stream, rows("stem"), norm("norm", statistics=False))
    for i, size in enumerate(channels):
        block, inner = f"blocks.{i}", blocks(f"inner{i}", groups, size // groups)
        ledger.move(stream, columns(f"{block}.conv1"))
        if i > 0:
            ledger.move(stream, columns(f"{block}.project"))
            stream = blocks(f"stream{i}", groups, size // groups)
            ledger.move(stream, rows(f"{block}.project"))
        ledger.move(stream, rows(f"{block}.conv2"), norm(f"{block}.norm2", statistics=False))
        ledger.move(
            inner, rows(f"{block}.conv1"), norm(f"{block}.norm1", statistics=False), columns(f"{block}.conv2")
        )
    ledger.move(stream, columns("head"))
    return ledger.groups()
