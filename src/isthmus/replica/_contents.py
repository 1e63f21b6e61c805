"""What modules hold besides registered tensors, as values that can be compared, put back and taken away."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from isthmus.replica._walk import MACHINERY, children

__all__ = ["AttributePlace", "contents", "differing", "put_back", "same_values", "take_away"]

AttributePlace = tuple[str, str]
"""A module's path and one of its attributes, or a buffer that is not saved."""
Leaves = dict[str, Any]
_HOOKS = tuple(
    name for name in MACHINERY if name.endswith(("_hooks", "_hooks_with_kwargs", "_hooks_always_called"))
)
_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)


def contents(model: nn.Module) -> dict[AttributePlace, Leaves]:
    """Return, for every attribute of every module, its numbers, texts and tensors (cloned) by their path."""
    registered = {id(t) for t in model.parameters()} | {id(m) for m in model.modules()}
    registered |= {id(t) for _, t in _saved_buffers(model)}
    found: dict[AttributePlace, Leaves] = {}
    for prefix, module in model.named_modules():
        for attribute, value in _own(module):
            found[prefix, attribute] = _leaves(value, registered)
    return found


def _saved_buffers(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for prefix, module in model.named_modules():
        for leaf, buffer in module._buffers.items():
            if buffer is not None and leaf not in module._non_persistent_buffers_set:
                yield f"{prefix}.{leaf}", buffer


def _own(module: nn.Module) -> Iterator[tuple[str, Any]]:
    yield from ((k, b) for k, b in module._buffers.items() if k in module._non_persistent_buffers_set)
    yield from ((k, v) for k, v in vars(module).items() if k not in MACHINERY and k != "training")


def _leaves(value: Any, skip: set[int]) -> Leaves:
    found: Leaves = {}
    seen: dict[int, Any] = {}
    waiting = deque([("", value)])
    while waiting:
        path, item = waiting.popleft()
        if isinstance(item, _PLAIN):
            found[path] = item
        elif id(item) in seen or id(item) in skip or isinstance(item, type):
            continue
        elif isinstance(item, Tensor):
            found[path] = item.detach().clone()
        elif hasattr(item, "tolist") and not callable(item):  # an array
            found[path] = repr(item.tolist())
        else:
            seen[id(item)] = item
            waiting.extend((path + step, child) for step, child in children(item))
    return found


def differing(
    one: Mapping[AttributePlace, Leaves], two: Mapping[AttributePlace, Leaves]
) -> dict[AttributePlace, str]:
    """Return the places whose values differ, each with words on the first difference."""
    found: dict[AttributePlace, str] = {}
    for place in dict.fromkeys((*one, *two)):
        first, second = one.get(place, {}), two.get(place, {})
        for step in dict.fromkeys((*first, *second)):
            if not same_values(first.get(step), second.get(step)):
                found[place] = _words(place, step, first.get(step), second.get(step))
                break
    return found


def same_values(one: Any, two: Any) -> bool:
    """Tell whether two leaves are equal; NaN equals NaN."""
    if isinstance(one, Tensor) and isinstance(two, Tensor):
        if one.shape != two.shape or one.dtype != two.dtype or one.device != two.device:
            return False
        return one.is_meta or torch.allclose(one, two, rtol=0.0, atol=0.0, equal_nan=True)
    return type(one) is type(two) and bool(one == two or (one != one and two != two))


def _words(place: AttributePlace, step: str, one: Any, two: Any) -> str:
    name = ".".join(p for p in place if p) + step
    if isinstance(one, Tensor) and isinstance(two, Tensor) and one.shape == two.shape:
        return f"the tensor {name!r}"
    shown = ["a tensor" if isinstance(v, Tensor) else repr(v) for v in (one, two)]
    return f"{name!r} ({shown[0]} against {shown[1]})"


def take_away(module: nn.Module, attribute: str, way: str) -> Callable[[], None] | None:
    """Empty an attribute (``"clear"``) or remove it (``"delete"``); return what undoes that, if it could be done."""
    holder = module._buffers if attribute in module._buffers else vars(module)
    if attribute not in holder:
        return None
    value = holder[attribute]
    if way == "delete":
        del holder[attribute]
    elif value is None or isinstance(value, Tensor):
        holder[attribute] = None
    elif type(value) in (dict, list, set, tuple):
        holder[attribute] = type(value)()
    else:
        return None

    def undo() -> None:
        module._buffers.pop(attribute, None)
        vars(module).pop(attribute, None)
        holder[attribute] = value

    return undo


def put_back(model: nn.Module, pristine: nn.Module, places: Mapping[AttributePlace, str]) -> None:
    """Give attributes the values they have in a copy of the module; its registered tensors stand for the model's.

    Hooks that the copy does not have are removed: a module that notes that it has put them on would do so again.
    """
    memo: dict[int, Any] = {}
    for one, two in zip(model.modules(), pristine.modules(), strict=True):
        memo[id(two)] = one
        for register in _HOOKS:
            own, kept = vars(one).get(register, {}), vars(two).get(register, {})
            for key in [k for k in own if k not in kept]:
                del own[key]
        for own, other in ((one._parameters, two._parameters), (one._buffers, two._buffers)):
            memo.update({id(t): own[k] for k, t in other.items() if t is not None and own.get(k) is not None})
    modules, originals = dict(model.named_modules()), dict(pristine.named_modules())
    for path, attribute in places:
        module, original = modules[path], originals[path]
        buffer = attribute in original._buffers
        source, target = (m._buffers if buffer else vars(m) for m in (original, module))
        if attribute not in source:
            target.pop(attribute, None)
            module._buffers.pop(attribute, None)
        elif isinstance(source[attribute], Tensor) and buffer:
            target[attribute] = source[attribute].clone()  # type: ignore[union-attr]
        else:
            target[attribute] = copy.deepcopy(source[attribute], memo)
