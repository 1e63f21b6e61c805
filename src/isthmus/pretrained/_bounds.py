"""Bounds on what a configuration may ask for: the network that it describes must be of the size of the stored one.

A configuration of a few bytes can describe a network of a thousand million layers, whose construction would not end, or
a mask that fills the memory. The stored tensors say how large the network is, so that much is allowed, with room for
what is tied, shared or computed.
"""

from __future__ import annotations

import contextlib
import math
import re
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from isthmus.errors import IsthmusError, ModelError, printable
from isthmus.pretrained._lazy import LazyState

__all__ = ["parameters_on_meta", "require_countable"]

_MOST_PARTS = 10**6
"""Layers, blocks, heads, labels, experts, … that a configuration may name: lists of them are made before any "
"network."""
_PARTS = re.compile(r"layer|depth|block|stage|expert|group|label|head|beam|stack", re.IGNORECASE)
_TIMES, _MORE_TENSORS, _MORE_ENTRIES = 8, 1_000, 10**8
"""Tensors and entries for each stored one, and beside them: experts are fused, layers shared, embeddings tied, tables
computed."""
_WORTH_A_LOOK = 10_000
"""Entries of the inputs of an operation from which on the size of its result is worked out before it is run."""


def require_countable(folder: Path, config: Mapping[str, Any]) -> None:
    """Check that no count of parts in a configuration is beyond any network.

    Raises:
        ModelError: one is, named.
    """
    for name, value in _numbers(config, ""):
        if abs(value) > _MOST_PARTS and _PARTS.search(name):
            raise ModelError(
                f"{printable(folder)}: config.json asks for {printable(name)} = {value:,}, more than the "
                f"{_MOST_PARTS:,} that any network has. It is damaged, or made to fill the memory; copy it again."
            )


def _numbers(value: Any, name: str) -> Iterator[tuple[str, int]]:
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _numbers(item, f"{name}.{key}" if name else str(key))
    elif isinstance(value, list):
        for item in value:
            yield from _numbers(item, name)
    elif isinstance(value, int):
        yield name, value


class _Counter:
    """Counts what a network registers, and ends its construction when it is beyond the stored one."""

    def __init__(self, folder: Path, file: LazyState) -> None:
        self._folder, self._file = folder, file
        stored = sum(math.prod(file.stored(key).shape) for key in file)
        self.most_tensors = _TIMES * len(file) + _MORE_TENSORS
        self.most_entries = _TIMES * stored + _MORE_ENTRIES
        self._stored = stored
        self._tensors = self._entries = self._modules = 0

    def parameter(self, parameter: Tensor) -> None:
        self._tensors += 1
        self._entries += parameter.numel()
        if self._tensors > self.most_tensors:
            self.refuse(f"more than {self.most_tensors:,} tensors")
        if self._entries > self.most_entries:
            self.refuse(f"{self._entries:,} parameters or more")

    def module(self) -> None:
        self._modules += 1
        if self._modules > _TIMES * self.most_tensors:
            self.refuse(f"more than {_TIMES * self.most_tensors:,} modules")

    def refuse(self, what: str) -> None:
        raise ModelError(
            f"{printable(self._folder)}: config.json describes a network of {what}, but the files hold "
            f"{len(self._file):,} tensors with {self._stored:,} entries. Weights and configuration do not match; copy "
            "them again."
        )


class _SizesFirst(TorchDispatchMode):
    """Works out the size of large results before they are made."""

    def __init__(self, counter: _Counter) -> None:
        super().__init__()
        self._counter = counter

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        makes = not given and "device" in kwargs
        large = sum(t.numel() for t in given) >= _WORTH_A_LOOK and not all(t.is_meta for t in given)
        if makes or large:
            self._look(func, args, kwargs)
        return func(*args, **kwargs)

    def _look(self, func: Any, args: Any, kwargs: Any) -> None:
        try:
            on_meta = pytree.tree_map(lambda x: x.to("meta") if isinstance(x, Tensor) else x, (args, kwargs))
            named = {k: torch.device("meta") if k == "device" else v for k, v in on_meta[1].items()}
            found = pytree.tree_leaves(func(*on_meta[0], **named))
        except IsthmusError:
            raise
        except Exception:  # an operation without a rule for sizes: those that make something have one
            return
        for tensor in found:
            if (
                isinstance(tensor, Tensor)
                and tensor.untyped_storage().nbytes() > 8 * self._counter.most_entries
            ):
                self._counter.refuse(f"{tensor.numel():,} numbers in one tensor")


@contextlib.contextmanager
def parameters_on_meta(folder: Path, file: LazyState) -> Iterator[None]:
    """Let modules built by this thread have their parameters on the meta device; buffers stay real.

    Raises:
        ModelError: (inside) the network is far larger than what is stored.
    """
    here, counter = threading.get_ident(), _Counter(folder, file)

    def to_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
        if parameter is None or threading.get_ident() != here:
            return None
        counter.parameter(parameter)
        if parameter.is_meta:
            return None
        return nn.Parameter(torch.empty_like(parameter, device="meta"), parameter.requires_grad)

    def count(module: nn.Module, name: str, part: nn.Module | None) -> None:
        if threading.get_ident() == here:
            counter.module()

    handles = [
        register_module_parameter_registration_hook(to_meta),  # type: ignore[arg-type]
        register_module_module_registration_hook(count),
    ]
    try:
        with _SizesFirst(counter):
            yield
    finally:
        for handle in handles:
            handle.remove()
