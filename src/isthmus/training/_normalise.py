"""Shifting and scaling inputs per channel, as the networks that read them were trained."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from isthmus.errors import DataError

__all__ = ["NAMED", "Normalisation", "Normalise", "normalisation_of", "read_normalise"]


@dataclass(frozen=True)
class Normalisation:
    """Inputs in [0, 1] become ``(inputs - mean) / std``.

    Attributes:
        mean: per channel, or one for all.
        std: per channel, or one for all; above 0.

    Raises:
        DataError: other numbers of means than of deviations, or values that are no such numbers.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __post_init__(self) -> None:
        """Check the numbers."""
        numbers = [*self.mean, *self.std]
        if not self.mean or len(self.mean) != len(self.std) or not all(math.isfinite(v) for v in numbers):
            raise DataError(
                f"normalise: expected as many finite means as standard deviations, found {self.mean} and {self.std}."
            )
        if min(self.std) <= 0:
            raise DataError(f"normalise: expected standard deviations above 0, found {self.std}.")

    def __str__(self) -> str:
        """Return the text that :func:`read_normalise` reads."""
        return "/".join(",".join(f"{v!r}" for v in values) for values in (self.mean, self.std))

    def check(self, channels: int, what: str) -> None:
        """Check that there is one value, or one per channel.

        Raises:
            DataError: there are not.
        """
        if len(self.mean) not in (1, channels):
            wanted = "1 mean" if channels == 1 else f"1 mean or {channels}, one per channel"
            raise DataError(
                f"{what}: normalise: expected {wanted}, found {len(self.mean)}. Give as many, or train, which takes "
                "them from the training set."
            )

    def apply(self, inputs: Tensor) -> Tensor:
        """Return inputs of shape ``(n, channels, …)``, floating point, shifted and scaled in place."""
        shape = (1, len(self.mean), *(1,) * (inputs.ndim - 2))
        mean, std = (torch.tensor(v, dtype=torch.float64).reshape(shape) for v in (self.mean, self.std))
        return inputs.sub_(mean.to(inputs)).div_(std.to(inputs))


NAMED: dict[str, Normalisation] = {
    "imagenet": Normalisation((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "symmetric": Normalisation((0.5,), (0.5,)),
}
"""Constants by name: torchvision's for ImageNet, and inputs in [-1, 1]."""

Normalise = str | Normalisation | tuple[float | Sequence[float], float | Sequence[float]]
"""What a user may give: ``"none"``, ``"train"``, a name, ``"MEAN/STD"``, or the numbers."""


def read_normalise(given: Normalise | None) -> Normalisation | str | None:
    """Return what inputs are to be normalised by.

    Args:
        given: ``None`` or ``"none"``; ``"train"`` for mean and standard deviation of the training set, per channel;
            ``"imagenet"`` or ``"symmetric"`` (to [-1, 1]); a text ``"MEAN/STD"`` such as ``"0.1307/0.3081"`` or
            ``"0.49,0.48,0.45/0.25,0.24,0.26"``; or a mean and a standard deviation, each a number or one per channel.

    Returns:
        ``None``, the numbers, or ``"train"``.

    Raises:
        DataError: it is none of these.
    """
    if given is None or given in ("none", "train") or isinstance(given, Normalisation):
        return None if given == "none" else given
    if isinstance(given, str) and given in NAMED:
        return NAMED[given]
    parts: Any = [part.split(",") for part in given.split("/")] if isinstance(given, str) else given
    try:
        mean, std = (_numbers(part) for part in parts)
    except (TypeError, ValueError) as error:
        raise DataError(
            f"normalise: expected none, train, {', '.join(NAMED)}, or MEAN/STD such as 0.1307/0.3081 "
            f"(several channels: 0.49,0.48,0.45/0.25,0.24,0.26), found {given!r}."
        ) from error
    return Normalisation(mean, std)


def _numbers(part: Any) -> tuple[float, ...]:
    return (float(part),) if isinstance(part, (int, float)) else tuple(float(v) for v in part)


def normalisation_of(values: Tensor, scale: float, what: str) -> Normalisation:
    """Return mean and standard deviation (of a population) per channel of what is stored, divided by ``scale``.

    Args:
        values: shape ``(n, channels, …)``; whole numbers are summed exactly.
        scale: see :class:`isthmus.study.Dataset`.
        what: how errors call the data.

    Raises:
        DataError: a channel that never varies.
    """
    axes = [axis for axis in range(values.ndim) if axis != 1]
    count = values.numel() // values.shape[1]
    kind = torch.int64 if values.dtype == torch.uint8 else torch.float64
    sums = torch.zeros(2, values.shape[1], dtype=kind)
    for chunk in values.cpu().split(1000):
        wide = chunk.to(kind)
        sums += torch.stack([wide.sum(axes), wide.square().sum(axes)])
    mean = sums[0].double() / count
    deviation = (sums[1].double() / count - mean.square()).clamp(min=0).sqrt()
    if not bool((deviation > 0).all()):
        raise DataError(
            f"{what}: normalise: channel {int(deviation.argmin())} never varies, so it has no standard deviation to "
            "divide by. Give MEAN/STD."
        )
    return Normalisation(tuple((mean / scale).tolist()), tuple((deviation / scale).tolist()))
