"""Networks without branches: the multilayer perceptron and VGG16, with their hand-written symmetries."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from isthmus.errors import ModelError
from isthmus.networks._reference import Ledger, ReferenceGroup, columns, flattened, norm, rows, whole

__all__ = ["ACTIVATIONS", "mlp", "mlp_reference", "scaled", "vgg16", "vgg16_bn", "vgg_reference"]

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "silu": F.silu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "leaky_relu": F.leaky_relu,
    "identity": lambda x: x,
}

# Output channels of the thirteen convolutions, in five stages that each end in a 2 × 2 max pool.
_VGG16 = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))


def scaled(channels: int, width: float) -> int:
    """Return ``channels * width`` rounded to a whole number of channels, at least 1."""
    return max(1, round(channels * width))


class _MLP(nn.Module):
    def __init__(self, sizes: list[int], activation: str, bias: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(n, m, bias=bias) for n, m in itertools.pairwise(sizes))
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        x = torch.flatten(x, 1)
        for layer in self.layers[:-1]:
            x = ACTIVATIONS[self.activation](layer(x))
        return self.layers[-1](x)


def mlp(
    inputs: int, width: int, depth: int, outputs: int, *, activation: str = "relu", bias: bool = True
) -> nn.Module:
    """Build a multilayer perceptron: flatten, ``depth`` hidden layers of ``width`` units, a linear head.

    Args:
        inputs: number of input features (pixels, for images).
        width: units per hidden layer.
        depth: number of hidden layers; 0 gives a linear model.
        outputs: number of outputs.
        activation: one of ``relu``, ``gelu``, ``silu``, ``tanh``, ``sigmoid``, ``leaky_relu``, ``identity``.
        bias: whether the linear layers have biases.

    Returns:
        A module taking ``(n, …)`` with ``inputs`` values per example and returning ``(n, outputs)``. Its
        parameters are ``layers.0.weight``, ``layers.0.bias``, …, initialised as torch does.

    Raises:
        ModelError: an unknown activation, or a size below 1 (depth below 0).

    Example:
        >>> mlp(784, 512, 3, 10)(torch.zeros(2, 1, 28, 28)).shape
        torch.Size([2, 10])
    """
    if activation not in ACTIVATIONS:
        raise ModelError(f"mlp: unknown activation {activation!r}. Choose one of {', '.join(ACTIVATIONS)}.")
    if min(inputs, width, outputs) < 1 or depth < 0:
        raise ModelError(
            f"mlp: expected inputs, width and outputs of at least 1 and depth of at least 0, found "
            f"inputs={inputs}, width={width}, depth={depth}, outputs={outputs}."
        )
    return _MLP([inputs, *[width] * depth, outputs], activation, bias)


def mlp_reference(width: int, depth: int, *, bias: bool = True) -> list[ReferenceGroup]:
    """Return the symmetry of :func:`mlp`: one group per hidden layer."""
    ledger = Ledger()
    for i in range(depth):
        ledger.move(whole(f"hidden{i}", width), rows(f"layers.{i}", bias=bias), columns(f"layers.{i + 1}"))
    return ledger.groups()


class _VGG(nn.Module):
    def __init__(self, classes: int, width: float, image_size: int, batch_norm: bool) -> None:
        super().__init__()
        self.convs, self.norms = nn.ModuleList(), nn.ModuleList()
        self.pools: list[int] = []
        previous = 3
        for stage in _VGG16:
            for channels in (scaled(c, width) for c in stage):
                self.convs.append(nn.Conv2d(previous, channels, 3, padding=1, bias=not batch_norm))
                if batch_norm:
                    self.norms.append(nn.BatchNorm2d(channels))
                previous = channels
            self.pools.append(len(self.convs) - 1)
        self.head = nn.Linear(previous * (image_size // 32) ** 2, classes)

    def forward(self, x: Tensor) -> Tensor:
        for i, conv in enumerate(self.convs):
            x = conv(x)
            if len(self.norms):
                x = self.norms[i](x)
            x = F.relu(x)
            if i in self.pools:
                x = F.max_pool2d(x, 2)
        return self.head(torch.flatten(x, 1))


def _vgg(classes: int, width: float, image_size: int, batch_norm: bool) -> nn.Module:
    if image_size < 32 or image_size % 32:
        raise ModelError(f"vgg16: expected an image size that is a multiple of 32, found {image_size}.")
    return _VGG(classes, width, image_size, batch_norm)


def vgg16(classes: int = 10, width: float = 1.0, *, image_size: int = 32) -> nn.Module:
    """Build VGG16 without norms: thirteen 3 × 3 convolutions with biases, five max pools, a linear head.

    Args:
        classes: number of outputs.
        width: multiplier of all channel counts (1 gives 64 … 512).
        image_size: height and width of the RGB images, a multiple of 32; above 32 the head sees a flatten of
            ``channels × (image_size / 32)²``.

    Raises:
        ModelError: the image size is not a multiple of 32.

    Source:
        Simonyan and Zisserman 2015, configuration D, with the one-layer head usual for CIFAR.
    """
    return _vgg(classes, width, image_size, batch_norm=False)


def vgg16_bn(classes: int = 10, width: float = 1.0, *, image_size: int = 32) -> nn.Module:
    """Build VGG16 with BatchNorm after every convolution (which then has no bias); see :func:`vgg16`."""
    return _vgg(classes, width, image_size, batch_norm=True)


def vgg_reference(width: float, image_size: int = 32, *, batch_norm: bool) -> list[ReferenceGroup]:
    """Return the symmetry of :func:`vgg16` or :func:`vgg16_bn`: one group per convolution.

    The last group reaches the head through the flatten: each channel owns ``(image_size / 32)²`` neighbouring
    columns.
    """
    channels = [scaled(c, width) for stage in _VGG16 for c in stage]
    ledger = Ledger()
    for i, size in enumerate(channels):
        layout = whole(f"conv{i}", size)
        ledger.move(layout, rows(f"convs.{i}", bias=not batch_norm), norm(f"norms.{i}") if batch_norm else ())
        if i + 1 < len(channels):
            ledger.move(layout, columns(f"convs.{i + 1}"))
        else:
            ledger.move(flattened(layout, (image_size // 32) ** 2), columns("head"))
    return ledger.groups()
