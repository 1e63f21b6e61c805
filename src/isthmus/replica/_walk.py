"""Walking what a module holds: registered tensors by their names, all others by where they were found."""

from __future__ import annotations

import functools
import logging
import types
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = [
    "ATOMS",
    "MACHINERY",
    "REGISTERS",
    "Hidden",
    "children",
    "hidden_tensors",
    "registered",
    "storage_key",
]

ATOMS = (
    str, bytes, bytearray, int, float, complex, type(None), type, types.ModuleType, types.BuiltinFunctionType,
    torch.dtype, torch.device, torch.Size, torch.Generator, torch.layout, torch.memory_format, fx.Graph,
    # What fake tensors and loggers lead to, such as the records that a handler keeps, is nothing of the module's.
    TorchDispatchMode, logging.Logger, logging.Handler,
)  # fmt: skip
REGISTERS = ("_parameters", "_buffers", "_modules")
MACHINERY = frozenset(vars(nn.Module())) - {"training"}
"""Attributes that every module has and that hold no values of its own."""


@dataclass(frozen=True)
class Hidden:
    """A tensor that a module holds outside its parameters and saved buffers.

    Attributes:
        path: where it was found, such as ``attn.ab``, ``ws[0]`` or ``f.<w>`` (a variable that a function captured).
        module: path of the module it was reached through.
        attribute: the attribute (or buffer) of that module.
        tensor: itself.
    """

    path: str
    module: str
    attribute: str
    tensor: Tensor


def registered(model: nn.Module) -> Iterator[tuple[str, Tensor, tuple[int, str]]]:
    """Yield name, tensor and place (module and leaf) of all parameters and buffers, under every name."""
    for prefix, module in model.named_modules(remove_duplicate=False):
        for leaf, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None:
                yield (f"{prefix}.{leaf}" if prefix else leaf), tensor, (id(module), leaf)


def storage_key(tensor: Tensor) -> int | None:
    """Return what two tensors have in common exactly if they share memory (on the meta device too)."""
    try:
        return int(tensor.untyped_storage()._cdata)
    except (NotImplementedError, RuntimeError):  # sparse and other tensors without one storage
        return None


def hidden_tensors(model: nn.Module) -> list[Hidden]:
    """Return every tensor reached from a module's attributes that is neither a parameter nor a saved buffer.

    Followed are attributes (of tensors too), lists, tuples, sets, dictionaries, objects, bound methods, and what
    functions captured; global variables are not. A tensor reached in several ways is listed once.
    """
    found: list[Hidden] = []
    seen: dict[int, Any] = {id(t): t for t in model.parameters()}
    for module in model.modules():
        for leaf, buffer in module._buffers.items():
            if buffer is not None and leaf not in module._non_persistent_buffers_set:
                seen[id(buffer)] = buffer
        seen[id(module)] = module
    for prefix, module in model.named_modules():
        start = f"{prefix}." if prefix else ""
        own = [
            *(
                (k, vars(t))
                for r in (module._parameters, module._buffers)
                for k, t in r.items()
                if t is not None
            ),
            *((k, b) for k, b in module._buffers.items() if k in module._non_persistent_buffers_set),
            *((k, v) for k, v in vars(module).items() if k not in REGISTERS),
        ]
        for attribute, value in own:
            for path, tensor in _tensors_below(f"{start}{attribute}", value, seen):
                found.append(Hidden(path, prefix, attribute, tensor))
    return found


def _tensors_below(path: str, value: Any, seen: dict[int, Any]) -> Iterator[tuple[str, Tensor]]:
    waiting = deque([(path, value)])
    while waiting:
        path, value = waiting.popleft()
        if isinstance(value, ATOMS) or id(value) in seen:
            continue
        seen[id(value)] = value
        if isinstance(value, Tensor):
            yield path, value
            value = vars(value)
        waiting.extend((f"{path}{step}", child) for step, child in children(value))


def children(value: Any) -> Iterator[tuple[str, Any]]:
    """Yield what an object holds, each with the step that leads there."""
    if isinstance(value, dict):
        yield from ((f"[{k!r}]", v) for k, v in list(value.items()))
    elif isinstance(value, (list, tuple, set, frozenset, deque)):
        yield from ((f"[{k}]", v) for k, v in enumerate(value))
    elif isinstance(value, types.FunctionType):
        yield from captured(value)
    elif isinstance(value, types.MethodType):
        yield from ((".__self__", value.__self__), (".__func__", value.__func__))
    elif isinstance(value, functools.partial):
        yield from ((".func", value.func), (".args", value.args), (".keywords", value.keywords))
    elif isinstance(value, nn.Module):
        for register in REGISTERS:
            yield from ((f".{k}", v) for k, v in vars(value).get(register, {}).items())
        yield from ((f".{k}", v) for k, v in vars(value).items() if k not in MACHINERY)
    else:
        yield from ((f".{k}", v) for k, v in list(getattr(value, "__dict__", {}).items()))
        slots = getattr(type(value), "__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            if hasattr(value, name):
                yield f".{name}", getattr(value, name)


def captured(function: types.FunctionType) -> Iterator[tuple[str, Any]]:
    """Yield the variables that a function captured, and its defaults."""
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        try:
            yield f".<{name}>", cell.cell_contents
        except ValueError:  # an empty cell
            continue
    yield from ((f".<default {k}>", v) for k, v in enumerate(function.__defaults__ or ()))
    yield from ((f".<default {k}>", v) for k, v in (function.__kwdefaults__ or {}).items())
