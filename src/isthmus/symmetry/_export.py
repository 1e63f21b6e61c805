"""From a module to functional graphs: plain export first, then one graph for each way through the code.

``torch.export`` is enough for most models. One that looks at values (an assertion, a choice of branch, a packed
sequence) is run once on the example inputs, and traced with the values it read. Every answer that is true or false is
then turned round in another run: where that only raises, it was a check; where the run comes to an end, that way is
traced too, so that nothing is claimed that holds on one way only.
"""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols
from torch.utils import _pytree as pytree

from isthmus.errors import ModelError
from isthmus.replica import empty, hollow_copy, private_copy
from isthmus.symmetry._outputs import returning_opened
from isthmus.symmetry._quiet import quiet_failure
from isthmus.symmetry._reading import CodeLine, Read, Recorder, Replayer, TooManyReadsError, line_of_error
from isthmus.symmetry._staying import WhatStays

__all__ = ["Way", "export_ways", "shell_of"]

_MOST_WAYS = 8
_WRAPPERS: dict[type[nn.Module], str] = {
    nn.DataParallel: "module",
    nn.parallel.DistributedDataParallel: "module",
}


@dataclass(frozen=True)
class Way:
    """A graph of one way through the code.

    Attributes:
        program: the graph, in which the module makes anew what it keeps in evaluation; if ``train()`` or ``eval()``
            cannot be traced, what they made is a constant.
        left: names of what a call leaves on the module; these tensors are the last outputs.
        reads: the values that Python read, none for a plain export.
    """

    program: ExportedProgram
    left: tuple[str, ...] = ()
    reads: tuple[Read, ...] = ()


Caches = Mapping[tuple[str, str], str]


class _Unwrapped(nn.Module):
    """Holds what a parallel wrapper held, under the same name, and calls it on one device."""

    def __init__(self, name: str, inner: nn.Module) -> None:
        super().__init__()
        self.add_module(name, inner)
        self.train(inner.training)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the module that was wrapped."""
        return next(self.children())(*args, **kwargs)


def shell_of(model: nn.Module, caches: Caches) -> nn.Module:
    """Return a copy of the module tree that shares all its tensors, without caches.

    What a forward pass stores on modules stays out of the caller's model. Wrappers that spread a batch over devices
    are replaced by what they hold, under the same names.
    """
    shell = hollow_copy(model)
    empty(shell, caches)
    return _unwrapped(shell)


def _unwrapped(model: nn.Module) -> nn.Module:
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            setattr(module, name, _single(child))
    return _single(model)


def _single(module: nn.Module) -> nn.Module:
    held = next((name for kind, name in _WRAPPERS.items() if isinstance(module, kind)), None)
    return module if held is None else _Unwrapped(held, getattr(module, held))


def export_ways(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], caches: Caches) -> list[Way]:
    """Return one graph for each way through the code that the values of tensors choose; the first is the example's.

    Args:
        model: not changed.
        args: positional inputs.
        kwargs: keyword inputs.
        caches: what is taken away from the module first (see :func:`isthmus.replica.empty`).

    Raises:
        ModelError: the model cannot be traced; the message names the line of its code.
    """
    try:
        way = _exported(shell_of(model, caches), args, kwargs)
        unknown = _unknown_shape(way.program)
        if unknown is None:
            return [way]
        error: Exception = ModelError(unknown)
    except Exception as plain:  # torch.export raises many unrelated types
        error = plain
    meta = any(t.is_meta for t in (*model.parameters(), *model.buffers()))
    reads = None if meta else _recorded(model, args, kwargs, {})
    if isinstance(reads, TooManyReadsError):
        raise _endless(model, line_of_error(reads)[0])
    if isinstance(reads, list) and reads:
        return _followed(model, args, kwargs, reads, caches)
    raise _untraceable(model, args, kwargs, error, meta=meta) from error


def _exported(shell: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Way:
    with warnings.catch_warnings(), torch.no_grad(), returning_opened(shell):
        warnings.simplefilter("ignore")
        watch = WhatStays(shell)
        try:
            with quiet_failure(), watch:
                return Way(torch.export.export(shell, args, kwargs, strict=False), watch.names)
        except Exception:  # tried without, so that the error is about the module itself
            with quiet_failure():
                return Way(torch.export.export(shell, args, kwargs, strict=False))


def _recorded(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], forced: Mapping[int, Any]
) -> list[Read] | Exception:
    """Run a copy of the model on copies of the inputs; return what it read, or what it raised."""
    args, kwargs = pytree.tree_map(lambda v: v.clone() if isinstance(v, Tensor) else v, (args, kwargs))
    recorder = Recorder(forced)
    private = _unwrapped(private_copy(model))
    try:
        with warnings.catch_warnings(), torch.no_grad(), recorder:
            warnings.simplefilter("ignore")
            private(*args, **kwargs)
    except Exception as error:  # whatever the model raises
        return error
    return recorder.reads


def _followed(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], first: list[Read], caches: Caches
) -> list[Way]:
    """Trace the way of the example, and every other one that does not end in an exception."""
    ways: list[Way] = []
    waiting: list[tuple[dict[int, Any], list[Read]]] = [({}, first)]
    while waiting:
        forced, reads = waiting.pop()
        if len(ways) == _MOST_WAYS:
            raise ModelError(
                f"{type(model).__name__} decides by the values of tensors at {reads[max(forced)].line} and elsewhere: "
                f"more than {_MOST_WAYS} ways lead through its code, too many to look at each. Decide by shapes or "
                "settings, or compute both and choose with torch.where."
            )
        ways.append(_replayed(model, args, kwargs, reads, caches))
        settled = _settled(ways[-1])
        for number in range(max(forced, default=-1) + 1, len(reads)):
            if reads[number].decides and number not in settled:
                turned = {**forced, number: not reads[number].value}
                found = _recorded(model, args, kwargs, turned)
                if isinstance(found, TooManyReadsError):
                    raise _endless(model, reads[number].line)
                if isinstance(found, list):
                    waiting.append((turned, found))
    return ways


def _settled(way: Way) -> set[int]:
    """Return the reads whose answer is a setting: it depends on flags and constants, not on inputs or weights."""
    program, total = way.program, sum(read.count for read in way.reads)
    outputs: Any = program.graph.output_node().args[0]
    end = len(outputs) - len(way.left)
    asked = list(outputs)[end - total : end]
    variable = {
        spec.arg.name
        for spec in program.graph_signature.input_specs
        if spec.kind in (InputKind.USER_INPUT, InputKind.PARAMETER)
    }
    variable |= {
        node.name
        for node in program.graph.find_nodes(op="placeholder")
        if getattr(node.meta.get("val"), "is_floating_point", bool)() and _is_buffer(program, node.name)
    }
    settled: set[int] = set()
    for number, read in enumerate(way.reads):
        nodes, asked = asked[: read.count], asked[read.count :]
        if not any(a.name in variable for n in nodes if isinstance(n, fx.Node) for a in _ancestors(n)):
            settled.add(number)
    return settled


def _is_buffer(program: ExportedProgram, name: str) -> bool:
    return any(s.arg.name == name and s.kind == InputKind.BUFFER for s in program.graph_signature.input_specs)


def _ancestors(node: fx.Node) -> set[fx.Node]:
    found, waiting = {node}, [node]
    while waiting:
        new = [n for n in waiting.pop().all_input_nodes if n not in found]
        found.update(new)
        waiting += new
    return found


def _endless(model: nn.Module, line: CodeLine) -> ModelError:
    return ModelError(
        f"{type(model).__name__} repeats a step for as long as the values of tensors say so, or reads a long list of "
        f"them, at {line}: the number of steps cannot be followed. Use a fixed number of steps, and operators of "
        "PyTorch for lists."
    )


def _replayed(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], reads: Sequence[Read], caches: Caches
) -> Way:
    private = shell_of(model, caches)
    forward = private.forward
    replayer: list[Replayer] = []

    @functools.wraps(forward)
    def reading(*given: Any, **named: Any) -> tuple[Any, list[Tensor]]:
        replayer.append(Replayer(reads))
        with replayer[-1]:
            return forward(*given, **named), replayer[-1].asked

    reading.__signature__ = inspect.signature(forward)  # type: ignore[attr-defined]
    private.forward = reading
    try:
        way = _exported(private, args, kwargs)
    except Exception as error:  # torch.export raises many unrelated types
        raise _untraceable(model, args, kwargs, error) from error
    finally:
        del private.forward
    unknown = _unknown_shape(way.program)
    if unknown is not None:
        raise ModelError(f"Cannot trace {type(model).__name__}: {unknown}")
    return replace(way, reads=tuple(reads))


def _unknown_shape(program: ExportedProgram) -> str | None:
    """Return what to say of the first operator whose result has a shape that depends on values."""
    for node in program.graph.nodes:
        if node.op == "call_function" and any(_depends(v) for v in pytree.tree_leaves(node.meta.get("val"))):
            name = str(node.target).removeprefix("torch.ops.")
            return (
                f"{_module(node)} calls {name} at {_line_of_node(node)}: the shape of the result, or a number used as "
                "one, depends on the values of tensors, so one graph cannot stand for all inputs. Keep the shape: "
                "multiply by a mask, use torch.where, or masked_fill before a sum."
            )
    return None


def _depends(value: Any) -> bool:
    if isinstance(value, Tensor):
        return any(isinstance(n, torch.SymInt) and bool(free_unbacked_symbols(n)) for n in value.shape)
    return isinstance(value, torch.SymInt) and bool(free_unbacked_symbols(value))


def _module(node: fx.Node) -> str:
    stack = node.meta.get("nn_module_stack")
    path, kind = next(reversed(stack.values())) if stack else ("", "")
    name = kind.__name__ if isinstance(kind, type) else str(kind).rpartition(".")[2]
    return f"{str(path).split('@')[0]!r} ({name})" if path else name or "the model"


def _line_of_node(node: fx.Node) -> str:
    """Return the last line of the user's code in the stack that the tracer kept."""
    lines = [line.strip() for line in str(node.meta.get("stack_trace") or "").splitlines()]
    heads = [k for k, line in enumerate(lines) if line.startswith("File ") and "/torch/" not in line]
    if not heads:
        return "an unknown line"
    file, number = (
        lines[heads[-1]].split('"')[1].rpartition("/")[2],
        lines[heads[-1]].split("line ")[1].split(",")[0],
    )
    return f"{file}:{number}: {lines[heads[-1] + 1] if heads[-1] + 1 < len(lines) else ''}"


def _untraceable(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    error: Exception,
    *,
    meta: bool = False,
) -> ModelError:
    """Return an error that names the line of the model's code and the way out."""
    head = f"Cannot trace {type(model).__name__} with {_describe(args, kwargs)}"
    if isinstance(error, ModelError):
        return ModelError(f"{head}: {error}")
    line, owner = line_of_error(error)
    where = f" at {line}" if line.number else ""
    inside = _path_of(owner, model)
    if inside:
        where += f", in {inside}"
    if meta and _reads_values(error):
        return ModelError(
            f"{head}: the model decides by the values of tensors{where}, and its weights are on the meta device. Load "
            "the weights first."
        )
    ran = _recorded(model, args, kwargs, {}) if not meta else []
    if isinstance(ran, Exception):
        line, owner = line_of_error(ran)
        where = f" at {line}" if line.number else ""
        inside = _path_of(owner, model)
        return ModelError(
            f"{head}: the model itself fails on these inputs{where}{', in ' + inside if inside else ''}: "
            f"{type(ran).__name__}: {_first_line(ran)} Check that model(*args, **kwargs) runs, and give example inputs "
            "of the right shapes."
        )
    return ModelError(
        f"{head}: the code{where} cannot be followed ({_first_line(error)}). The model runs, so rewrite this line with "
        "operators of PyTorch, without leaving for NumPy or Python numbers, and without control flow that depends on "
        "the values of tensors."
    )


def _reads_values(error: Exception) -> bool:
    return "DataDependent" in type(error).__name__


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].strip().rstrip(".") + "." if lines else type(error).__name__ + "."


def _path_of(owner: nn.Module | None, model: nn.Module) -> str:
    """Return path and class of a module, which may be a copy of one of the model."""
    if owner is None:
        return ""
    kind = type(owner).__name__
    paths: Iterator[str] = (n for n, m in model.named_modules() if n and type(m) is type(owner))
    several = list(paths)
    return f"module {several[0]!r} ({kind})" if len(several) == 1 else f"a module of class {kind}"


def _describe(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str:
    def one(value: Any) -> str:
        return str(tuple(value.shape)) if isinstance(value, Tensor) else type(value).__name__

    given = [*(one(a) for a in args), *(f"{k}={one(v)}" for k, v in kwargs.items())]
    return f"inputs {', '.join(given)}" if given else "no example inputs"
