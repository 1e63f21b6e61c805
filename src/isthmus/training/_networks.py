"""Network families of the studies by name, sized to a data set."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from isthmus.errors import ModelError
from isthmus.networks import densenet, groupnorm_resnet, mlp, mobilenet, resnet20, vgg16, vgg16_bn
from isthmus.training._dataset import Described
from isthmus.training._memory import check_fits

__all__ = ["FAMILIES", "MOST_LAYERS", "network_for", "operations", "parameters_of"]

_CONVOLUTIONAL = {
    "vgg16": vgg16,
    "vgg16_bn": vgg16_bn,
    "resnet20": resnet20,
    "densenet": densenet,
    "mobilenet": mobilenet,
    "groupnorm_resnet": groupnorm_resnet,
}

FAMILIES: tuple[str, ...] = ("mlp", *_CONVOLUTIONAL)
"""Names that :func:`network_for` knows."""


MOST_LAYERS = 1000
"""Hidden layers of the ``mlp``: more are a mistake, and each costs time to build even where no memory is taken."""


def network_for(
    family: str, dataset: Described, *, width: float | None = None, depth: int = 3, **settings: Any
) -> nn.Module:
    """Build a network that fits the inputs and classes of a data set.

    Args:
        family: one of :data:`FAMILIES`.
        dataset: gives the number of inputs and of classes.
        width: units per hidden layer of the ``mlp`` (512 by default), multiplier of the channels of the
            others (1 by default).
        depth: hidden layers of the ``mlp``; the others have theirs.
        settings: further keyword arguments of the builder in :mod:`isthmus.testing`.

    Raises:
        ModelError: an unknown family or setting, a fraction of a unit, or images that the family cannot take.

    Notes:
        The initial values come from torch's global generator; :func:`~isthmus.study.train` draws them anew
        from the seed of its settings.
    """
    if family not in FAMILIES:
        raise ModelError(f"Unknown network family {family!r}. Choose one of {', '.join(FAMILIES)}.")
    if family == "mlp":
        _check_perceptron(width, depth)
    if torch.empty(0).device.type != "meta":
        with torch.device("meta"):  # shapes alone: what does not fit is told before memory is taken
            shapes = _built(family, dataset, width, depth, settings)
        check_fits(parameters_of(shapes), f"Network family {family!r}{_size(family, width, depth)}")
    model = _built(family, dataset, width, depth, settings)
    if family == "mlp":
        return model
    try:
        with torch.no_grad():
            model.eval()(torch.zeros(1, *dataset.input_shape))
    except (RuntimeError, ValueError) as error:
        raise ModelError(
            f"Network family {family!r} cannot take the inputs of {dataset.name}, shape "
            f"{dataset.input_shape}: {str(error).splitlines()[0].rstrip('.')}. "
            "Convolutional families need RGB images; use 'mlp' otherwise."
        ) from error
    return model.train()


def parameters_of(model: nn.Module) -> int:
    """Return the number of parameters; with a model on the device ``meta`` nothing is held in memory."""
    return sum(p.numel() for p in model.parameters())


def _check_perceptron(width: float | None, depth: int) -> None:
    if width is not None and (not math.isfinite(width) or width != int(width) or width < 1):
        raise ModelError(f"Network family 'mlp': width: expected a number of units, found {width:g}.")
    if not 0 <= depth <= MOST_LAYERS:
        raise ModelError(
            f"Network family 'mlp': depth: expected 0 to {MOST_LAYERS} hidden layers, found {depth}."
        )


def _built(
    family: str, dataset: Described, width: float | None, depth: int, settings: dict[str, Any]
) -> nn.Module:
    classes = len(dataset.classes)
    try:
        if family == "mlp":
            units = 512 if width is None else int(width)
            return mlp(math.prod(dataset.input_shape), units, depth, classes, **settings)
        return _CONVOLUTIONAL[family](classes, 1 if width is None else width, **settings)
    except TypeError as error:
        reason = str(error).splitlines()[0]
        raise ModelError(f"Network family {family!r}: {reason}. Check its settings.") from error
    except (RuntimeError, OverflowError, ValueError) as error:
        if isinstance(error, ModelError):
            raise
        raise ModelError(
            f"Network family {family!r}{_size(family, width, depth)} cannot be built: "
            f"{str(error).splitlines()[0].rstrip('.')}. Choose another width, or check its settings."
        ) from error


def _size(family: str, width: float | None, depth: int) -> str:
    told = "" if width is None else f", width {width:g}"
    return f"{told}, depth {depth}" if family == "mlp" else told


def operations(model: nn.Module, example: Tensor) -> int:
    """Return the floating-point operations of products and convolutions in one forward pass.

    Counted by torch; with model and example on the device ``meta`` nothing is computed.
    """
    training = model.training
    try:
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model.eval()(example)
    finally:
        model.train(training)
    return int(counter.get_total_flops())
