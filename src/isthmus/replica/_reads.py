"""Which tensors a run reads that it did not make itself."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from isthmus.replica._walk import storage_key

__all__ = ["Reads"]


class Reads(TorchFunctionMode):
    """Collects, while active, the memory that PyTorch's functions read and none of them made.

    (A mode below the operators would see the same, but importing what it needs takes two seconds.)

    Attributes:
        found: from memory to a tensor that lies there.
    """

    def __init__(self, inputs: Any) -> None:
        super().__init__()
        self.found: dict[int, Tensor] = {}
        self._made = set(_keys(inputs))

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if getattr(func, "__name__", "") == "__get__":  # shapes, dtypes, and views such as ``.T``
            return result
        read = _keys((args, kwargs))
        for key, tensor in read.items():
            if key not in self._made:
                self.found.setdefault(key, tensor)
        self._made.update(key for key in _keys(result) if key not in read and key not in self.found)
        return result


def _keys(tree: Any) -> dict[int, Tensor]:
    leaves: Iterable[Any] = pytree.tree_leaves(tree)
    keys = ((storage_key(t), t) for t in leaves if isinstance(t, Tensor))
    return {key: tensor for key, tensor in keys if key is not None}
