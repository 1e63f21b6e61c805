"""Initial values drawn from a seed."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Literal, TypeVar, cast, get_args

import torch
from torch import nn

from isthmus.errors import ModelError, StudyError
from isthmus.training._seeds import derive_seed, seeded_generator

__all__ = ["Initialisation", "initialise"]

Initialisation = Literal["lecun_normal", "he_normal", "torch", "keep"]

ModuleT = TypeVar("ModuleT", bound=nn.Module)

# Standard deviation of a standard normal cut off at ±2.
_TRUNCATED_STD = 0.87962566103423978

_GAINS = {"lecun_normal": 1.0, "he_normal": math.sqrt(2)}
_WEIGHTED = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def initialise(model: ModuleT, seed: int, how: Initialisation = "lecun_normal") -> ModuleT:
    r"""Return a copy of a model with initial values drawn from a seed.

    Args:
        model: any module; it is not changed.
        seed: the same seed gives the same values.
        how: ``"lecun_normal"`` draws the weights of linear and convolution layers from a normal cut off at
            two standard deviations, of variance :math:`1/\text{fan-in}` after the cut, sets their biases to
            zero, and resets other layers as they do themselves; ``"he_normal"`` does the same with twice that
            variance, which keeps the signal of deep rectifier networks without norms alive; ``"torch"`` calls
            every layer's own ``reset_parameters``; ``"keep"`` leaves the values as they are.

    Raises:
        StudyError: an unknown ``how``.
        ModelError: a layer with parameters of its own but no ``reset_parameters``.

    Source:
        LeCun et al. 1998, *Efficient BackProp*, section 4.6; He et al. 2015, *Delving Deep into Rectifiers*,
        equation 10; the cut is the default of Flax.
    """
    if how not in get_args(Initialisation):
        raise StudyError(
            f"initialisation: expected one of {', '.join(get_args(Initialisation))}, found {how!r}."
        )
    fresh = copy.deepcopy(model)
    if how == "keep":
        return fresh
    generator = seeded_generator(seed, "initial weights")
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(derive_seed(seed, "initial values of layers"))
        for name, module in fresh.named_modules():
            if how in _GAINS and isinstance(module, (*_WEIGHTED, *_TRANSPOSED)):
                _scaled_normal(module, _GAINS[how], generator)
            elif hasattr(module, "reset_parameters"):
                cast("Callable[[], None]", module.reset_parameters)()
            elif any(True for _ in module.parameters(recurse=False)):
                raise ModelError(
                    f"initialise: {name or 'the model'} ({type(module).__name__}) has parameters of its own "
                    "but no reset_parameters. Add one, or use initialisation='keep'."
                )
    return fresh


def _scaled_normal(module: nn.Module, gain: float, generator: torch.Generator) -> None:
    weight, bias = module.get_parameter("weight"), module.bias
    # A transposed convolution keeps its inputs on axis 0, and sees each output through its own group only.
    if isinstance(module, _TRANSPOSED):
        fan_in = weight.shape[0] // module.groups * weight[0, 0].numel()
    else:
        fan_in = weight[0].numel()
    std = gain / math.sqrt(max(fan_in, 1)) / _TRUNCATED_STD
    values = torch.empty(weight.shape, dtype=torch.float32)
    nn.init.trunc_normal_(values, 0.0, std, -2 * std, 2 * std, generator=generator)
    weight.copy_(values)
    if isinstance(bias, nn.Parameter):
        bias.zero_()
