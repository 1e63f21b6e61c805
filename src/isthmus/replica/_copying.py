"""Copies of a module that share nothing with it, or nothing but its tensors."""

from __future__ import annotations

import copy
import functools
import types
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from isthmus.replica._identity import refuse_identities
from isthmus.replica._walk import hidden_tensors, registered, storage_key

__all__ = ["hollow_copy", "private_copy"]

ModuleT = TypeVar("ModuleT", bound=nn.Module)
Cast = Callable[[Tensor], torch.dtype]
_CONTAINERS: tuple[Any, ...] = (list, tuple, dict, set, frozenset)


def private_copy(model: ModuleT, cast: Cast | None = None) -> ModuleT:
    """Return a copy of a module that shares no tensor with it.

    Tensors that share memory in the module do so in the copy, whatever holds them: parameters made of the tensors of
    others, views, lists, variables captured by functions. (``copy.deepcopy`` copies each parameter by itself, keeps
    functions as they are, and refuses tensors with a history.) An attribute that cannot be copied, such as a
    lock, is shared.

    Args:
        model: any module; not changed.
        cast: gives the dtype of the copy of a floating tensor; by default its own.

    Raises:
        ModelError: the module holds the identity of one of its parts, which the copy will not have.
    """
    tensors = _all_tensors(model)
    refuse_identities(model, tensors)
    copies = _tensor_copies(tensors, cast)
    return _copied(model, copies, [t for t in tensors if vars(t) and id(t) in copies])


def hollow_copy(model: ModuleT) -> ModuleT:
    """Return a copy of the module tree that shares all tensors, so that nothing a forward pass stores stays."""
    refuse_identities(model, ())
    return _copied(model, {id(t): t for t in _all_tensors(model)})


def _all_tensors(model: nn.Module) -> list[Tensor]:
    """Return every tensor a module holds, once each, registered ones first."""
    found = {id(t): t for _, t, _ in registered(model)}
    found.update({id(h.tensor): h.tensor for h in hidden_tensors(model)})
    return list(found.values())


def _tensor_copies(tensors: Iterable[Tensor], cast: Cast | None) -> dict[int, Any]:
    """Return copies by the identity of the original; those that share memory are views of one copy of it."""
    groups: dict[int, list[Tensor]] = {}
    memo: dict[int, Any] = {}
    for tensor in tensors:
        key = storage_key(tensor)
        if key is None or is_traceable_wrapper_subclass(tensor) or tensor.layout != torch.strided:
            continue  # its own __deepcopy__ knows best
        groups.setdefault(key, []).append(tensor)
    for group in groups.values():
        single = len(group) == 1 or group[0].is_meta or len({t.dtype for t in group}) > 1
        if single and len(group) > 1 and not group[0].is_meta:
            _copy_bytes(group, memo)
            continue
        dtype = _target(group[0], cast)
        base = None if single else _span(group).to(dtype, copy=True)
        for tensor in group:
            if base is None:
                own = tensor.detach().to(_target(tensor, cast), copy=True)
            else:
                start = min(t.storage_offset() for t in group)
                own = base.as_strided(tensor.size(), tensor.stride(), tensor.storage_offset() - start)
            memo[id(tensor)] = _of_class(own, tensor)
    return memo


def _target(tensor: Tensor, cast: Cast | None) -> torch.dtype:
    return cast(tensor) if cast is not None and tensor.is_floating_point() else tensor.dtype


def _span(group: list[Tensor]) -> Tensor:
    """Return the stretch of memory that tensors of one dtype cover, as a vector."""
    start = min(t.storage_offset() for t in group)
    end = max(
        t.storage_offset() + sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True)) + 1
        for t in group
        if t.numel()
    )
    return group[0].detach().as_strided((end - start,), (1,), start)


def _copy_bytes(group: list[Tensor], memo: dict[int, Any]) -> None:
    """Copy memory that is read in several dtypes; their dtypes stay."""
    storage = group[0].untyped_storage().clone()
    for tensor in group:
        own = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
        own.set_(storage, tensor.storage_offset(), tensor.size(), tensor.stride())
        memo[id(tensor)] = _of_class(own, tensor)


def _of_class(own: Tensor, original: Tensor) -> Tensor:
    """Give a copy the class of the original."""
    if type(original) is nn.Parameter:
        return nn.Parameter(own, requires_grad=original.requires_grad)
    if type(original) is not Tensor:
        own = own.as_subclass(type(original))
    return own.requires_grad_(original.requires_grad and own.is_floating_point() and original.is_leaf)


def _copied(model: ModuleT, tensors: dict[int, Any], dressed: Iterable[Tensor] = ()) -> ModuleT:
    """Return a copy of a module given those of its tensors; some of these have attributes to be copied."""
    memo = dict(tensors)
    try:
        copied = copy.deepcopy(model, memo)
    except Exception:  # whatever an attribute's own copying raises
        memo = dict(tensors)
        copied = _copied_by_parts(model, memo)
    for tensor in dressed:
        for name, value in vars(tensor).items():
            setattr(memo[id(tensor)], name, _rebind(_copied_or_shared(value, memo), memo, set()))
    _rebind(copied, memo, set())
    return copied


def _copied_by_parts(model: ModuleT, memo: dict[int, Any]) -> ModuleT:
    """Copy module by module; attributes that cannot be copied are shared."""
    modules = list(model.modules())
    for module in modules:
        memo[id(module)] = type(module).__new__(type(module))
    for module in modules:
        memo[id(module)].__dict__.update({k: _copied_or_shared(v, memo) for k, v in vars(module).items()})
    return memo[id(model)]


def _copied_or_shared(value: Any, memo: dict[int, Any]) -> Any:
    attempt = dict(memo)
    try:
        found = copy.deepcopy(value, attempt)
    except Exception:  # whatever its own copying raises
        return value
    memo.update(attempt)
    return found


def _rebind(value: Any, memo: dict[int, Any], done: set[int]) -> Any:
    """Return a copied value in which functions capture the copies; containers and modules are changed in place."""
    if isinstance(value, types.FunctionType):
        return _rebound(value, memo)
    if isinstance(value, functools.partial):
        args = tuple(_rebind(a, memo, done) for a in value.args)
        return functools.partial(_rebind(value.func, memo, done), *args, **value.keywords)
    if isinstance(value, types.MethodType) or id(value) in done:
        return value
    done.add(id(value))
    if isinstance(value, nn.Module):
        _rebind(vars(value), memo, done)
    elif isinstance(value, dict):
        for key, item in list(value.items()):
            new = _rebind(item, memo, done)
            if new is not item:
                value[key] = new
    elif isinstance(value, list):
        value[:] = [_rebind(item, memo, done) for item in value]
    elif type(value) is tuple:
        return tuple(_rebind(item, memo, done) for item in value)
    return value


def _rebound(function: types.FunctionType, memo: dict[int, Any]) -> types.FunctionType:
    """Return a function that captures the copies of what it captured, or itself if it captured none."""
    if id(function) in memo:
        return memo[id(function)]
    memo[id(function)] = function
    cells = tuple(_new_cell(cell, memo) for cell in function.__closure__ or ())
    defaults = tuple(_of_copy(v, memo) for v in function.__defaults__ or ())
    keywords = {k: _of_copy(v, memo) for k, v in (function.__kwdefaults__ or {}).items()}
    same = all(new is old for new, old in zip(cells, function.__closure__ or (), strict=True))
    same &= all(new is old for new, old in zip(defaults, function.__defaults__ or (), strict=True))
    if same and all(v is (function.__kwdefaults__ or {})[k] for k, v in keywords.items()):
        return function
    new = types.FunctionType(
        function.__code__, function.__globals__, function.__name__, defaults or None, cells or None
    )
    new.__kwdefaults__ = keywords or None
    new.__dict__.update(vars(function))
    memo[id(function)] = new
    return new


def _new_cell(cell: types.CellType, memo: dict[int, Any]) -> types.CellType:
    try:
        contents = cell.cell_contents
    except ValueError:  # empty
        return cell
    new = _of_copy(contents, memo)
    return cell if new is contents else types.CellType(new)


def _of_copy(value: Any, memo: dict[int, Any]) -> Any:
    """Return what stands for a captured value: tensors, modules, functions and containers of them are looked into."""
    if isinstance(value, (Tensor, nn.Module)):
        return memo.get(id(value), value)
    if isinstance(value, types.FunctionType):
        return _rebound(value, memo)
    if isinstance(value, types.MethodType) and id(value.__self__) in memo:
        return types.MethodType(value.__func__, memo[id(value.__self__)])
    if type(value) not in _CONTAINERS:
        return value
    if id(value) in memo:
        return memo[id(value)]
    container: Any = value
    items = [*container, *container.values()] if isinstance(value, dict) else [*container]
    new = [_of_copy(item, memo) for item in items]
    if all(a is b for a, b in zip(new, items, strict=True)):
        return value
    make: Any = type(value)
    half = len(container)
    made = make(zip(new[:half], new[half:], strict=True)) if isinstance(value, dict) else make(new)
    memo[id(value)] = made
    return made
