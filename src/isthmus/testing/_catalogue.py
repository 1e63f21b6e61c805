"""The reference networks by name: builder, hand-written symmetry and example inputs, small unless asked."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from isthmus.errors import ModelError
from isthmus.networks import (
    ReferenceGroup,
    densenet,
    densenet_reference,
    groupnorm_reference,
    groupnorm_resnet,
    mlp,
    mlp_reference,
    mobilenet,
    mobilenet_reference,
    resnet20,
    resnet20_reference,
    shufflenet,
    shufflenet_reference,
    unet,
    unet_reference,
    vgg16,
    vgg16_bn,
    vgg_reference,
)

__all__ = ["REFERENCE_NETWORKS", "reference_inputs", "reference_network", "reference_spec"]

Settings = dict[str, Any]


@dataclass(frozen=True)
class _Family:
    build: Callable[..., nn.Module]
    groups: Callable[[Settings], list[ReferenceGroup]]
    small: Settings
    shape: Callable[[Settings], tuple[int, ...]] = lambda s: (3, 8, 8)


def _vgg_family(build: Callable[..., nn.Module], batch_norm: bool, image_size: int) -> _Family:
    return _Family(
        build,
        lambda s: vgg_reference(s["width"], s["image_size"], batch_norm=batch_norm),
        {"classes": 10, "width": 1 / 16, "image_size": image_size},
        lambda s: (3, s["image_size"], s["image_size"]),
    )


def _resnet_groups(settings: Settings) -> list[ReferenceGroup]:
    return resnet20_reference(settings["width"], shortcut=settings["shortcut"])


_FAMILIES: dict[str, _Family] = {
    "mlp": _Family(
        mlp,
        lambda s: mlp_reference(s["width"], s["depth"], bias=s.get("bias", True)),
        {"inputs": 12, "width": 7, "depth": 3, "outputs": 5},
        lambda s: (s["inputs"],),
    ),
    "vgg16": _vgg_family(vgg16, batch_norm=False, image_size=64),
    "vgg16_bn": _vgg_family(vgg16_bn, batch_norm=True, image_size=32),
    "resnet20": _Family(resnet20, _resnet_groups, {"classes": 10, "width": 1 / 4, "shortcut": "projection"}),
    "resnet20_zero_pad": _Family(
        resnet20, _resnet_groups, {"classes": 10, "width": 1 / 4, "shortcut": "zero_pad"}
    ),
    "densenet": _Family(
        densenet,
        lambda s: densenet_reference(s["width"], layers=s["layers"]),
        {"classes": 10, "width": 1 / 4, "layers": (2, 3)},
    ),
    "unet": _Family(
        unet,
        lambda s: unet_reference(s["width"], levels=s["levels"]),
        {"classes": 5, "width": 1 / 4, "levels": 3},
        lambda s: (3, 2 ** s["levels"], 2 ** s["levels"]),
    ),
    "mobilenet": _Family(
        mobilenet, lambda s: mobilenet_reference(s["width"]), {"classes": 10, "width": 1 / 4}
    ),
    "groupnorm_resnet": _Family(
        groupnorm_resnet,
        lambda s: groupnorm_reference(s["width"], groups=s["groups"]),
        {"classes": 10, "width": 3 / 4, "groups": 4},
    ),
    "shufflenet": _Family(
        shufflenet,
        lambda s: shufflenet_reference(s["width"], s["repeats"]),
        {"classes": 10, "width": 8 / 58, "repeats": (2, 3, 1)},
        lambda s: (3, 32, 32),
    ),
}

REFERENCE_NETWORKS: tuple[str, ...] = tuple(_FAMILIES)
"""Names of the networks that carry a hand-written symmetry."""


def reference_network(name: str, *, seed: int = 0, **settings: Any) -> nn.Module:
    """Build a reference network, small unless its settings say otherwise, in evaluation mode.

    Args:
        name: one of :data:`REFERENCE_NETWORKS`.
        seed: of the initial values; torch's global generator is left as it was.
        settings: keyword arguments of the builder (``width=1`` gives the real network).

    Raises:
        ModelError: an unknown name or setting.

    Example:
        >>> reference_network("resnet20", width=1).fc
        Linear(in_features=64, out_features=10, bias=True)
    """
    family, full = _lookup(name, settings)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return family.build(**full).eval()


def reference_spec(name: str, **settings: Any) -> list[ReferenceGroup]:
    """Return the hand-written symmetry of ``reference_network(name, **settings)``.

    Raises:
        ModelError: an unknown name or setting.
    """
    family, full = _lookup(name, settings)
    return family.groups(full)


def reference_inputs(
    name: str, batch_size: int = 2, *, generator: torch.Generator | None = None, **settings: Any
) -> tuple[Tensor, ...]:
    """Return example inputs: one float32 tensor with entries in [0, 1], shape ``(batch_size, …)``.

    Args:
        name: one of :data:`REFERENCE_NETWORKS`.
        batch_size: number of examples.
        generator: draws the entries; without one they are fixed, evenly spread values.
        settings: the settings the network was built with.

    Raises:
        ModelError: an unknown name or setting.
    """
    family, full = _lookup(name, settings)
    shape = (batch_size, *family.shape(full))
    if generator is not None:
        return (torch.rand(shape, generator=generator),)
    golden = (math.sqrt(5) - 1) / 2
    return ((torch.arange(math.prod(shape), dtype=torch.float64) * golden % 1).float().reshape(shape),)


def _lookup(name: str, settings: Settings) -> tuple[_Family, Settings]:
    family = _FAMILIES.get(name)
    if family is None:
        raise ModelError(f"Unknown reference network {name!r}. Choose one of {', '.join(_FAMILIES)}.")
    optional = {"bias", "activation"} if name == "mlp" else set()
    unknown = sorted(set(settings) - set(family.small) - optional)
    if unknown:
        raise ModelError(
            f"Reference network {name!r} has no setting {unknown[0]!r}. "
            f"Choose among {', '.join([*family.small, *sorted(optional)])}."
        )
    return family, {**family.small, **settings}
