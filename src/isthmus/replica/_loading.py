"""Copies of a module that hold given states, with what they keep in evaluation made anew."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import TypeVar

import torch
from torch import Tensor, nn

from isthmus.replica._contents import AttributePlace, take_away
from isthmus.replica._copying import private_copy
from isthmus.replica._states import refuse_torn, saved, sharing
from isthmus.replica._walk import hidden_tensors

__all__ = ["empty", "in_double", "rebuild", "with_state"]

ModuleT = TypeVar("ModuleT", bound=nn.Module)


def rebuild(model: nn.Module) -> None:
    """Send a module through ``train()`` and ``eval()`` and give every part its mode back.

    Modules that keep something in evaluation (a bias laid out, merged weights) drop it in ``train()`` and make it in
    ``eval()``. A module whose ``train`` refuses, as exported programs do, keeps nothing of this kind.

    Args:
        model: changed in place.
    """
    modes = [(m, m.training) for m in model.modules()]
    with torch.no_grad():
        for method in (model.train, model.eval):
            with contextlib.suppress(NotImplementedError):
                method()
    for module, mode in modes:
        if module.training != mode:
            module.training = mode


def empty(model: nn.Module, caches: Mapping[AttributePlace, str]) -> None:
    """Take caches, as an examination found them, away from a module of that architecture, in place."""
    modules = dict(model.named_modules())
    held = {(h.module, h.attribute) for h in hidden_tensors(model)}
    for (path, attribute), way in caches.items():
        if (path, attribute) in held:
            take_away(modules[path], attribute, way)


def with_state(
    model: ModuleT, state: Mapping[str, Tensor], caches: Mapping[AttributePlace, str] | None = None
) -> ModuleT:
    """Return a private copy of a module that holds a state, with what it keeps in evaluation made anew.

    Args:
        model: any module; not changed.
        state: its tensors by name; cast to the module's dtypes.
        caches: what an examination found to be computed from weights, and not made anew by ``train()`` and ``eval()``.

    Raises:
        CheckpointError: tensors that share memory in the module differ in the state.
        RuntimeError: other keys or shapes.
    """
    filled = private_copy(model)
    filled.load_state_dict(dict(state))
    own = dict(saved(filled))
    refuse_torn(own, state, sharing(own))
    empty(filled, caches or {})
    rebuild(filled)
    return filled


def in_double(model: ModuleT) -> ModuleT:
    """Return a private copy of a module in double precision, with what it keeps in evaluation made anew."""
    copied = private_copy(model, lambda t: torch.float64)
    rebuild(copied)
    return copied
