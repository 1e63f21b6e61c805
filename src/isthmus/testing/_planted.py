"""Planted truth: a network, a permuted and noisy copy, and the permutations that undo it."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from isthmus.couplings import random_permutation
from isthmus.errors import SymmetryError
from isthmus.states import State, state_of
from isthmus.symmetry import SymmetrySpec, apply

__all__ = ["PlantedPair", "perturb", "planted_pair", "randomise_state"]


ModuleT = TypeVar("ModuleT", bound=nn.Module)


class PlantedPair(NamedTuple):
    """Two states and the answer: ``permutations`` applied to ``state_b`` give ``state_a`` up to the noise."""

    state_a: State
    state_b: State
    permutations: dict[str, Tensor]


def planted_pair(
    model: nn.Module | Mapping[str, Tensor],
    spec: SymmetrySpec,
    noise: float = 0.0,
    generator: torch.Generator | None = None,
) -> PlantedPair:
    """Plant a known alignment: B is a randomly permuted copy of A with noise on every floating tensor.

    Args:
        model: network A, or its state.
        spec: symmetry of the network.
        noise: standard deviation of the noise relative to the root mean square of each tensor (running
            variances are multiplied by ``exp`` of it, so that they stay positive).
        generator: source of permutations and noise, on the CPU.

    Returns:
        ``(state_a, state_b, permutations)``. B moves towards A: ``permutations[g][i]`` is the unit of B that
        belongs at position ``i`` of A, so ``apply(spec, permutations, state_b)`` recovers A without noise.

    Raises:
        SymmetryError: the noise is negative or not finite.
    """
    if not 0 <= noise < float("inf"):
        raise SymmetryError(
            f"planted_pair: expected a finite noise level of at least 0, found {noise}. "
            "It is relative: 0.1 adds a tenth of each tensor's root mean square."
        )
    state_a = {name: tensor.clone() for name, tensor in state_of(model).items()}
    permutations = {name: random_permutation(g.size, generator) for name, g in spec.groups.items()}
    state_b = apply(spec, spec.invert(permutations), state_a)
    return PlantedPair(state_a, perturb(state_b, noise, generator), permutations)


def perturb(state: Mapping[str, Tensor], noise: float, generator: torch.Generator | None = None) -> State:
    """Return a copy of a state with noise on its floating tensors, relative as in :func:`planted_pair`."""
    noisy: State = {}
    for name, tensor in state.items():
        if not tensor.is_floating_point() or noise == 0:
            noisy[name] = tensor.clone()
            continue
        draw = torch.randn(tensor.shape, generator=generator, dtype=torch.float64).to(tensor.device)
        values = tensor.double()
        if name.endswith("running_var"):
            values = values * torch.exp(noise * draw)
        else:
            values = values + noise * values.square().mean().sqrt() * draw
        noisy[name] = values.to(tensor.dtype)
    return noisy


def randomise_state(model: ModuleT, generator: torch.Generator | None = None) -> ModuleT:
    """Return a copy of a model in which no tensor keeps an initial value that is the same for all units.

    Freshly built networks hide mistakes: gains of one, biases and running means of zero and running variances
    of one are unchanged by any permutation. In the copy

    * running variances are uniform on [0.5, 1.5], running means normal with standard deviation 0.5;
    * parameters with all entries equal become ``value + 0.3 · normal`` (vectors), so gains stay near one, or
      normal with the variance of ``1 / fan-in`` (matrices and kernels);
    * everything else, the randomly initialised weights in particular, stays as it is.

    Args:
        model: any module; it is not changed.
        generator: source of the values, on the CPU.
    """
    fresh = copy.deepcopy(model)
    with torch.no_grad():
        for name, buffer in fresh.named_buffers():
            if name.endswith("running_var"):
                buffer.copy_(torch.rand(buffer.shape, generator=generator) + 0.5)
            elif name.endswith("running_mean"):
                buffer.copy_(0.5 * torch.randn(buffer.shape, generator=generator))
        for parameter in fresh.parameters():
            if parameter.numel() > 1 and bool((parameter == parameter.flatten()[0]).all()):
                draw = torch.randn(parameter.shape, generator=generator)
                if parameter.ndim > 1:
                    parameter.copy_(draw / parameter[0].numel() ** 0.5)
                else:
                    parameter.add_(0.3 * draw.to(parameter))
    return fresh
