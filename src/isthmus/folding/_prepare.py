"""Copies of a network in which tied tensors are apart, or layers without a bias have one of zeros."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from isthmus.replica import private_copy

__all__ = ["untied", "with_biases"]

_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def untied(model: nn.Module, names: Iterable[str]) -> tuple[nn.Module, tuple[str, ...]]:
    """Return a copy of a network in which some names lead to a tensor of their own, and which could be taken apart.

    A name that leads to the same attribute of the same module as another one stays tied to it.

    Args:
        model: any module; not changed.
        names: of parameters or buffers that have other names too.
    """
    made, done = private_copy(model), list[str]()
    for name in names:
        owner, leaf = _place(made, name)
        own = owner._parameters.get(leaf, owner._buffers.get(leaf))
        others = (n for n, t in made.state_dict(keep_vars=True).items() if t is own and n != name)
        if own is not None and any(_place(made, other) != (owner, leaf) for other in others):
            _hold(owner, leaf, own.detach().clone())
            done.append(name)
    if done:
        _tell_configuration(made, model)
    return made, tuple(done)


def _place(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, leaf = name.rpartition(".")
    return model.get_submodule(path), leaf


def _hold(owner: nn.Module, leaf: str, value: Tensor) -> None:
    """Put a tensor in place of a parameter or buffer, as one that learns if that did."""
    own = owner._parameters.get(leaf)
    if own is not None:
        owner._parameters[leaf] = nn.Parameter(value, requires_grad=own.requires_grad)
    else:
        owner._buffers[leaf] = value


def _tell_configuration(made: nn.Module, model: nn.Module) -> None:
    """Say in the copy's own configuration that its head is not tied, or its library would tie it on saving."""
    config, original = getattr(made, "config", None), getattr(model, "config", None)
    if config is not None and config is not original and getattr(config, "tie_word_embeddings", False):
        config.tie_word_embeddings = False


def with_biases(model: nn.Module, weights: Iterable[str]) -> tuple[nn.Module, tuple[str, ...]]:
    """Return a copy of a network in which the layers of some weights have a bias, of zeros; and the names of these.

    Only layers of PyTorch whose class holds an optional bias get one.

    Args:
        model: any module; not changed.
        weights: names of weights.
    """
    made, added = private_copy(model), list[str]()
    for name in weights:
        owner, leaf = _place(made, name)
        if leaf == "weight" and isinstance(owner, _LAYERS) and owner._parameters.get("bias", owner) is None:
            weight = owner.weight
            zeros = torch.zeros(weight.shape[0], dtype=weight.dtype, device=weight.device)
            owner.bias = nn.Parameter(zeros, requires_grad=weight.requires_grad)
            added.append(f"{name.removesuffix(leaf)}bias")
    return made, tuple(added)
