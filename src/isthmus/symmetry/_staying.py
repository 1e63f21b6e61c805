"""What a call leaves on a module for the next one, seen while the module is exported."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor, nn

from isthmus.replica import Hidden, hidden_tensors, rebuild

__all__ = ["WhatStays", "WithStaying"]


class WithStaying(NamedTuple):
    """The output of a module, and the tensors that the call left on it."""

    output: Any
    staying: list[Tensor]


class WhatStays:
    """While active, a call makes anew what the module keeps in evaluation, and returns what it leaves behind too.

    What ``train()`` and ``eval()`` replace does not stay: the next state finds it made anew.

    Attributes:
        names: of what the last call left behind, in the order in which it is returned.
    """

    def __init__(self, shell: nn.Module) -> None:
        self._shell = shell
        self._before: list[tuple[nn.Module, dict[str, Any], dict[str, Any]]] = []
        self._known: list[Hidden] = []
        self._hooks: list[Any] = []
        self.names: tuple[str, ...] = ()

    def __enter__(self) -> WhatStays:
        first = self._shell.register_forward_pre_hook(self._first, prepend=True, with_kwargs=True)
        self._hooks = [first, self._shell.register_forward_hook(self._last, with_kwargs=True)]
        return self

    def __exit__(self, *error: object) -> None:
        for hook in self._hooks:
            hook.remove()
        self._put_back()

    def _first(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        self._before = [(m, dict(vars(m)), dict(m._buffers)) for m in module.modules()]
        self._known = hidden_tensors(module)
        rebuild(module)
        self._known += hidden_tensors(module)

    def _last(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        reached = hidden_tensors(module)
        rebuild(module)
        lasting = {id(h.tensor) for h in hidden_tensors(module)} - {id(h.tensor) for h in self._known}
        staying = {h.path: h.tensor for h in reached if id(h.tensor) in lasting}
        self._put_back()
        self.names = tuple(staying)
        return WithStaying(output, list(staying.values())) if staying else None

    def _put_back(self) -> None:
        """Give attributes and unsaved buffers back what they held; the exporter looks after saved buffers."""
        for module, attributes, buffers in self._before:
            for key in [k for k in vars(module) if k not in attributes]:
                del vars(module)[key]
            vars(module).update(attributes)
            for key in [k for k in module._buffers if k not in buffers]:
                del module._buffers[key]
            unsaved = {k: b for k, b in buffers.items() if k in module._non_persistent_buffers_set}
            module._buffers.update({**buffers, **module._buffers, **unsaved})
        self._before = []
