"""TARGETs: ``package.module:factory``, optionally with literal arguments, as in ``net:build(10, width=64)``."""

from __future__ import annotations

import ast
import importlib
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from isthmus.batches import Batch, as_batch
from isthmus.errors import IsthmusError, ModelError
from isthmus.pretrained import inspect_input

__all__ = ["Target", "load_target"]


@dataclass(frozen=True, eq=False)
class Target:
    """A network in evaluation mode, and example inputs if the factory gave them."""

    model: nn.Module
    example: Batch | None


def load_target(text: str) -> Target:
    """Import and call a factory.

    Args:
        text: ``package.module:factory`` or ``package.module:factory(1, width=2)``; arguments are Python
            literals. The current folder is searched first. The factory returns a module, or a pair of a module
            and example inputs (a tensor, a tuple of positional inputs, or a mapping of keyword inputs).

    Raises:
        ModelError: it cannot be imported or called, or returns something else.
    """
    path, function, args, kwargs = _parse(text)
    found = _import(path, text)
    try:
        for part in function.split("."):
            found = getattr(found, part)
    except AttributeError as error:
        raise ModelError(f"TARGET {text!r}: {error}. Expected package.module:factory.") from error
    if not callable(found):
        raise ModelError(
            f"TARGET {text!r}: expected a function or class that builds the network, found {type(found).__name__}."
        )
    try:
        made = found if isinstance(found, nn.Module) else found(*args, **kwargs)
    except IsthmusError:
        raise
    except (Exception, SystemExit) as error:  # anything user code raises
        raise ModelError(
            f"TARGET {text!r}: calling it failed with {type(error).__name__}: {error}"
        ) from error
    return _read(made, text)


def _parse(text: str) -> tuple[str, str, list[Any], dict[str, Any]]:
    path, colon, rest = text.partition(":")
    if not (colon and path and rest):
        wanted = "expected package.module:factory, or a model folder with config.json."
        raise ModelError(f"TARGET {text!r}: {wanted} Found {inspect_input(text)}")
    if path.endswith(".py"):
        stem = path.replace(os.sep, "/").rpartition("/")[2].removesuffix(".py")
        raise ModelError(
            f"TARGET {text!r}: expected package.module:factory, found a file's name. Write {stem}:{rest}, from the "
            f"folder in which {stem}.py lies."
        )
    if "(" not in rest:
        return path, rest, [], {}
    try:
        call = ast.parse(rest.strip(), mode="eval").body
        if not isinstance(call, ast.Call):
            raise ValueError("not a call")
        args = [ast.literal_eval(a) for a in call.args]
        kwargs = {str(k.arg): ast.literal_eval(k.value) for k in call.keywords}
        return path, ast.unparse(call.func), args, kwargs
    except (SyntaxError, ValueError) as error:
        raise ModelError(
            f"TARGET {text!r}: expected factory(literals), such as package.module:factory(10, width=64)."
        ) from error


def _import(path: str, text: str) -> Any:
    here = os.getcwd()
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        return importlib.import_module(path)
    except ModuleNotFoundError as error:
        if error.name is None or not (path == error.name or path.startswith(f"{error.name}.")):
            raise _failed_import(path, text, error) from error
        raise ModelError(
            f"TARGET {text!r}: {error}. Expected package.module:factory; modules are looked up in the current "
            "folder and among installed packages."
        ) from error
    except (Exception, SystemExit) as error:  # anything user code raises
        raise _failed_import(path, text, error) from error


def _failed_import(path: str, text: str, error: BaseException) -> ModelError:
    return ModelError(f"TARGET {text!r}: importing {path} failed with {type(error).__name__}: {error}")


def _read(made: Any, text: str) -> Target:
    model, inputs = made if isinstance(made, (tuple, list)) and len(made) == 2 else (made, None)
    if not isinstance(model, nn.Module):
        raise ModelError(
            f"TARGET {text!r}: expected a torch.nn.Module, or a pair of module and example inputs, "
            f"found {type(made).__name__}."
        )
    model.eval()
    if inputs is None:
        return Target(model, None)
    if isinstance(inputs, (tuple, list)) and all(isinstance(x, Tensor) for x in inputs):
        return Target(model, Batch(tuple(inputs)))
    if isinstance(inputs, Mapping):
        return Target(model, Batch((), dict(inputs)))
    return Target(model, as_batch(inputs))
