"""Networks that concatenate or filter per channel (dense, U-shaped, depthwise-separable), with symmetries."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from isthmus.errors import ModelError
from isthmus.networks._plain import scaled
from isthmus.networks._reference import (
    Layout,
    Ledger,
    ReferenceGroup,
    columns,
    concatenated,
    norm,
    rows,
    whole,
)

__all__ = [
    "densenet",
    "densenet_reference",
    "mobilenet",
    "mobilenet_reference",
    "unet",
    "unet_reference",
]


class _DenseLayer(nn.Module):
    def __init__(self, inputs: int, growth: int) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, 4 * growth, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(4 * growth)
        self.conv2 = nn.Conv2d(4 * growth, growth, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        new = self.conv1(F.relu(self.norm1(x)))
        new = self.conv2(F.relu(self.norm2(new)))
        return torch.cat([x, new], 1)


class _Transition(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(inputs)
        self.conv = nn.Conv2d(inputs, outputs, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.avg_pool2d(self.conv(F.relu(self.norm(x))), 2)


class _DenseNet(nn.Module):
    def __init__(self, classes: int, growth: int, layers: tuple[int, ...]) -> None:
        super().__init__()
        size = 2 * growth
        self.stem = nn.Conv2d(3, size, 3, padding=1, bias=False)
        self.stages, self.transitions = nn.ModuleList(), nn.ModuleList()
        for s, count in enumerate(layers):
            self.stages.append(nn.Sequential(*(_DenseLayer(size + i * growth, growth) for i in range(count))))
            size += count * growth
            if s + 1 < len(layers):
                self.transitions.append(_Transition(size, size // 2))
                size //= 2
        self.norm = nn.BatchNorm2d(size)
        self.head = nn.Linear(size, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for s, stage in enumerate(self.stages):
            x = stage(x)
            if s < len(self.transitions):
                x = self.transitions[s](x)
        x = F.relu(self.norm(x))
        return self.head(torch.flatten(F.adaptive_avg_pool2d(x, (1, 1)), 1))


def densenet(classes: int = 10, width: float = 1, *, layers: tuple[int, ...] = (4, 4, 4)) -> nn.Module:
    """Build a DenseNet with bottlenecks and halving transitions, 12 new channels per layer at width 1.

    Args:
        classes: number of outputs.
        width: multiplier of the growth rate of 12 channels.
        layers: dense layers per stage; ``(16, 16, 16)`` is the published network of depth 100.

    Raises:
        ModelError: no stage, or a stage without layers.

    Source:
        Huang et al. 2017, DenseNet-BC for CIFAR (section 3 and table 2).
    """
    if not layers or min(layers) < 1:
        raise ModelError(f"densenet: expected at least one layer in each stage, found layers={layers}.")
    return _DenseNet(classes, scaled(12, width), tuple(layers))


def densenet_reference(width: float = 1, *, layers: tuple[int, ...] = (4, 4, 4)) -> list[ReferenceGroup]:
    """Return the symmetry of :func:`densenet`.

    A stage's stream is ``[input | layer 0 | layer 1 | …]``. Each part is one group, written by one
    convolution, and read at its offset by the norms and first convolutions of all later layers of the stage
    and by the transition (or the head). The transition ends the old groups. Each layer also has a bottleneck.
    """
    growth = scaled(12, width)
    ledger = Ledger()
    size = 2 * growth
    stream: Layout = whole("stem", size)
    ledger.move(stream, rows("stem", bias=False))
    for s, count in enumerate(layers):
        for i in range(count):
            layer = f"stages.{s}.{i}"
            bottleneck, new = whole(f"{layer}.bottleneck", 4 * growth), whole(f"{layer}.new", growth)
            ledger.move(stream, norm(f"{layer}.norm1"), columns(f"{layer}.conv1"))
            ledger.move(
                bottleneck,
                rows(f"{layer}.conv1", bias=False),
                norm(f"{layer}.norm2"),
                columns(f"{layer}.conv2"),
            )
            ledger.move(new, rows(f"{layer}.conv2", bias=False))
            stream = concatenated((stream, size), (new, growth))
            size += growth
        if s + 1 < len(layers):
            transition = f"transitions.{s}"
            ledger.move(stream, norm(f"{transition}.norm"), columns(f"{transition}.conv"))
            size //= 2
            stream = whole(transition, size)
            ledger.move(stream, rows(f"{transition}.conv", bias=False))
    ledger.move(stream, norm("norm"), columns("head"))
    return ledger.groups()


class _DoubleConv(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(x)))


class _UNet(nn.Module):
    def __init__(self, classes: int, channels: list[int]) -> None:
        super().__init__()
        self.encoder = nn.ModuleList(
            _DoubleConv(n, m) for n, m in zip([3, *channels[:-1]], channels, strict=True)
        )
        steps = list(zip(channels[1:], channels[:-1], strict=True))
        self.up = nn.ModuleList(nn.ConvTranspose2d(deep, shallow, 2, stride=2) for deep, shallow in steps)
        self.decoder = nn.ModuleList(_DoubleConv(2 * shallow, shallow) for _, shallow in steps)
        self.head = nn.Conv2d(channels[0], classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        skips: list[Tensor] = []
        for level, encode in enumerate(self.encoder):
            x = encode(x if level == 0 else F.max_pool2d(x, 2))
            skips.append(x)
        for level in reversed(range(len(self.up))):
            x = self.decoder[level](torch.cat([skips[level], self.up[level](x)], 1))
        return self.head(x)


def unet(classes: int = 10, width: float = 1, *, levels: int = 3) -> nn.Module:
    """Build a U-Net: double convolutions with BatchNorm, max pools, transposed convolutions, skips by cat.

    Args:
        classes: channels of the output map, which has the height and width of the input.
        width: multiplier of the channel counts 16, 32, 64, ….
        levels: resolutions; height and width must be multiples of ``2 ** (levels - 1)``.

    Raises:
        ModelError: fewer than two levels.

    Source:
        Ronneberger et al. 2015, with padding and BatchNorm.
    """
    if levels < 2:
        raise ModelError(f"unet: expected at least two levels, found {levels}.")
    return _UNet(classes, _unet_channels(width, levels))


def _unet_channels(width: float, levels: int) -> list[int]:
    return [scaled(16 * 2**level, width) for level in range(levels)]


def unet_reference(width: float = 1, *, levels: int = 3) -> list[ReferenceGroup]:
    """Return the symmetry of :func:`unet`.

    The output of an encoder level is read by the next level and, in the first part of the concatenation, by
    the decoder of its own level; the up-sampled channels fill the second part. A transposed convolution has
    its inputs on axis 0 and its outputs on axis 1.
    """
    channels = _unet_channels(width, levels)
    ledger = Ledger()
    for level, size in enumerate(channels):
        skip = _double_conv(ledger, f"encoder.{level}", size)
        if level + 1 < levels:
            up = whole(f"up.{level}", size)
            ledger.move(up, rows(f"up.{level}", axis=1))
            ledger.move(skip, columns(f"encoder.{level + 1}.conv1"))
            ledger.move(concatenated((skip, size), (up, size)), columns(f"decoder.{level}.conv1"))
        else:
            ledger.move(skip, columns(f"up.{level - 1}", axis=0))
    for level, size in enumerate(channels[:-1]):
        out = _double_conv(ledger, f"decoder.{level}", size)
        ledger.move(out, columns("head") if level == 0 else columns(f"up.{level - 1}", axis=0))
    return ledger.groups()


def _double_conv(ledger: Ledger, module: str, size: int) -> Layout:
    inner, out = whole(f"{module}.inner", size), whole(f"{module}.out", size)
    ledger.move(inner, rows(f"{module}.conv1", bias=False), norm(f"{module}.bn1"), columns(f"{module}.conv2"))
    ledger.move(out, rows(f"{module}.conv2", bias=False), norm(f"{module}.bn2"))
    return out


class _InvertedResidual(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        wide = 2 * inputs
        self.expand = nn.Conv2d(inputs, wide, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(wide)
        self.depthwise = nn.Conv2d(wide, wide, 3, stride, 1, groups=wide, bias=False)
        self.bn2 = nn.BatchNorm2d(wide)
        self.project = nn.Conv2d(wide, outputs, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu6(self.bn1(self.expand(x)))
        out = F.relu6(self.bn2(self.depthwise(out)))
        out = self.bn3(self.project(out))
        return x + out if self.residual else out


# Output channels and stride of each inverted residual block.
_MOBILE = ((16, 1), (24, 2), (24, 1), (32, 2), (32, 1))


class _MobileNet(nn.Module):
    def __init__(self, classes: int, width: float) -> None:
        super().__init__()
        size = scaled(16, width)
        self.stem = nn.Conv2d(3, size, 3, 1, 1, bias=False)
        self.stem_bn = nn.BatchNorm2d(size)
        self.blocks = nn.ModuleList()
        for channels, stride in _MOBILE:
            self.blocks.append(_InvertedResidual(size, scaled(channels, width), stride))
            size = scaled(channels, width)
        self.head = nn.Linear(size, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu6(self.stem_bn(self.stem(x)))
        for block in self.blocks:
            x = block(x)
        return self.head(F.adaptive_avg_pool2d(x, 1).squeeze(-1).squeeze(-1))


def mobilenet(classes: int = 10, width: float = 1) -> nn.Module:
    """Build a depthwise-separable network: a stem and five inverted residuals, 16 to 32 channels at width 1.

    Args:
        classes: number of outputs.
        width: multiplier of the channel counts.

    Source:
        Sandler et al. 2018 (inverted residuals with linear bottlenecks), shortened.
    """
    return _MobileNet(classes, width)


def mobilenet_reference(width: float = 1) -> list[ReferenceGroup]:
    """Return the symmetry of :func:`mobilenet`.

    A depthwise filter belongs to its channel: axis 0 of the weight ``(C, 1, 3, 3)`` moves with the channels
    before and after it, norms included, as one group. Blocks with a residual keep the stream's group.
    """
    ledger = Ledger()
    size = scaled(16, width)
    stream: Layout = whole("stem", size)
    ledger.move(stream, rows("stem", bias=False), norm("stem_bn"))
    for i, (channels, stride) in enumerate(_MOBILE):
        block, outputs = f"blocks.{i}", scaled(channels, width)
        ledger.move(stream, columns(f"{block}.expand"))
        ledger.move(
            whole(f"{block}.wide", 2 * size),
            rows(f"{block}.expand", bias=False),
            norm(f"{block}.bn1"),
            rows(f"{block}.depthwise", bias=False),
            norm(f"{block}.bn2"),
            columns(f"{block}.project"),
        )
        if stride > 1 or outputs != size:
            stream = whole(f"stream{i}", outputs)
        ledger.move(stream, rows(f"{block}.project", bias=False), norm(f"{block}.bn3"))
        size = outputs
    ledger.move(stream, columns("head"))
    return ledger.groups()
