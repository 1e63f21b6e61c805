"""A network as a list of steps that can be run with any state, faster than its own code.

The list comes from :mod:`torch.fx`, which takes milliseconds where ``torch.export`` takes a third of a second (see
``docs/decisions/0008-line-evaluation.md``). A trace may be wrong where the code branches on values, so whoever
uses one compares it with the module first.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.func import functional_call
from torch.fx.node import map_arg
from torch.utils import _pytree as pytree

from isthmus.batches import Batch
from isthmus.errors import ModelError
from isthmus.layers import BatchNorm
from isthmus.replica import Replica, hollow_copy

__all__ = ["Add", "Other", "Program", "Relu", "AffineStep", "ProgramStep", "input_leaves", "trace_steps"]

SHORT_SUM = 64
"""A site on the data itself that sums fewer products than this is recomputed at every point: mixing the outputs
of the two ends would touch more memory than it saves products."""

_CONVOLUTIONS = {nn.Conv1d: F.conv1d, nn.Conv2d: F.conv2d, nn.Conv3d: F.conv3d}
_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_RELUS = (F.relu, torch.relu, "relu")
_ADDITIONS = (operator.add, operator.iadd, torch.add, "add", "add_")
_IN_PLACE = (operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.setitem)


@dataclass(frozen=True)
class AffineStep:
    """A weight applied to an activation: ``call(input, weight, bias)``.

    Attributes:
        slot: where the value goes.
        source: slot of the input.
        weight: name of the weight; its axis 0 lists the outputs.
        bias: name of the bias, if any.
        call: the operation.
        length: products summed in one output.
        norm: batch normalisation folded into the weight and the bias, if any.
    """

    slot: int
    source: int
    weight: str
    bias: str | None
    call: Callable[[Tensor, Tensor, Tensor | None], Tensor]
    length: int
    norm: BatchNorm | None = None
    in_place: ClassVar[bool] = False
    fresh: ClassVar[bool] = True

    @property
    def reads(self) -> tuple[int, ...]:
        """Slots that are read."""
        return (self.source,)

    @property
    def names(self) -> tuple[str, ...]:
        """Tensors of the state that are read."""
        own = (self.weight,) if self.bias is None else (self.weight, self.bias)
        return own if self.norm is None else own + self.norm.names


@dataclass(frozen=True)
class Relu:
    """Rectification of the value in the one slot that it reads."""

    slot: int
    reads: tuple[int, ...]
    names: ClassVar[tuple[str, ...]] = ()
    in_place: ClassVar[bool] = False
    fresh: ClassVar[bool] = True


@dataclass(frozen=True)
class Add:
    """Sum of the values in the two slots that it reads."""

    slot: int
    reads: tuple[int, ...]
    names: ClassVar[tuple[str, ...]] = ()
    in_place: ClassVar[bool] = False
    fresh: ClassVar[bool] = True


@dataclass(frozen=True)
class Other:
    """Any other step, run as the network's code does: ``call(values, tensors)``.

    Attributes:
        slot: where the value goes.
        reads: slots that are read.
        names: tensors of the state that are read.
        call: the operation on all values so far and the tensors by name.
        in_place: whether it may write into what it reads.
        fresh: whether its value is known to share no memory with another.
    """

    slot: int
    reads: tuple[int, ...]
    names: tuple[str, ...]
    call: Callable[[list[Any], Mapping[str, Tensor]], Any]
    in_place: bool = False
    fresh: bool = False


ProgramStep = AffineStep | Relu | Add | Other


@dataclass(frozen=True)
class Program:
    """Steps in order.

    Attributes:
        steps: all of them; slots ``0 .. inputs - 1`` hold the tensors of the batch.
        inputs: number of tensors in the batch.
        slots: number of slots.
        output: from the values to the network's output.
        kept: slots that the output reads.
        fixed: slots whose values depend on the data only, not on the state.
    """

    steps: tuple[ProgramStep, ...]
    inputs: int
    slots: int
    output: Callable[[list[Any]], Any]
    kept: frozenset[int]
    fixed: frozenset[int]


def input_leaves(batch: Batch) -> tuple[list[Tensor], str]:
    """Return the tensors of a batch's inputs, and a key that says all else about them but the shapes."""
    leaves, structure = pytree.tree_flatten((batch.args, dict(batch.kwargs)))
    plain = [None if isinstance(v, Tensor) else repr(v) for v in leaves]
    return [v for v in leaves if isinstance(v, Tensor)], f"{structure} {plain}"


def trace_steps(network: nn.Module | Replica, batch: Batch) -> Program:
    """Trace a module in evaluation mode, or a private copy of it, on the inputs of a batch.

    Its tensors are NaN meanwhile, so that a constant made from weights while tracing is seen.

    Raises:
        ModelError: the module has hooks, :mod:`torch.fx` cannot follow its code, or the trace would hold values
            computed from weights.
    """
    replica = Replica.of(network)
    replica.poison()
    model = hollow_copy(replica.module)  # tracing may leave its placeholders on the module
    for path, module in model.named_modules():
        if module._forward_hooks or module._forward_pre_hooks:
            raise ModelError(f"{path or type(model).__name__} has forward hooks, which a trace would skip.")
    tracer = _Tracer(model, batch)
    try:
        graph = tracer.trace(model)
    except Exception as error:  # torch.fx raises many unrelated types
        first = (str(error).strip().splitlines() or ["no message"])[0]
        raise ModelError(f"Cannot trace {type(model).__name__}: {type(error).__name__}: {first}") from error
    _refuse_frozen(tracer, graph)
    return _ProgramBuilder(model, tracer, graph).program()


def _refuse_frozen(tracer: _Tracer, graph: fx.Graph) -> None:
    """Refuse constants that were computed from the NaN which stood for the weights."""
    numbers: list[Any] = []
    for node in graph.nodes:
        pytree.tree_map(numbers.append, (node.args, node.kwargs))
    frozen = any(isinstance(n, float) and math.isnan(n) for n in numbers)
    frozen |= any(t.is_floating_point() and bool(t.isnan().any()) for t in tracer.constants.values())
    if frozen:
        raise ModelError("The network computes something from its weights that a trace would keep.")


class _Tracer(fx.Tracer):
    """A tracer for one form of inputs that follows parameters and keeps constants out of the module."""

    def __init__(self, model: nn.Module, batch: Batch) -> None:
        super().__init__()
        self.constants: dict[str, Tensor] = {}
        self._batch = batch
        named = (
            *model.named_parameters(remove_duplicate=False),
            *model.named_buffers(remove_duplicate=False),
        )
        persistent = model.state_dict(keep_vars=True)
        self._names = {id(tensor): name for name, tensor in reversed(named) if name in persistent}

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> Any:
        leaves, structure = pytree.tree_flatten((self._batch.args, dict(self._batch.kwargs)))
        proxies = [
            self.create_proxy("placeholder", f"input_{k}", (), {}) if isinstance(value, Tensor) else value
            for k, value in enumerate(leaves)
        ]

        def call(root: nn.Module, *values: Any) -> Any:
            args, kwargs = pytree.tree_unflatten(list(values), structure)
            return root_fn(root, *args, **kwargs)

        return call, [self.root, *proxies]

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        name = self._names.get(id(attr_val)) if isinstance(attr_val, Tensor) else None
        if name is None:
            return attr_val
        if name not in parameter_proxy_cache:
            parameter_proxy_cache[name] = self.create_proxy("get_attr", name, (), {})
        return parameter_proxy_cache[name]

    def create_arg(self, a: Any) -> Any:
        if not isinstance(a, Tensor):
            return super().create_arg(a)
        name = self._names.get(id(a))
        if name is None:
            name = f"constant {len(self.constants)}"
            self.constants[name] = a.detach()
        return self.create_node("get_attr", name, (), {})


class _ProgramBuilder:
    """Turns a graph into steps."""

    def __init__(self, model: nn.Module, tracer: _Tracer, graph: fx.Graph) -> None:
        self._modules = dict(model.named_modules())
        self._state = model.state_dict()
        self._constants = tracer.constants
        self._nodes = [n for n in graph.nodes if n.op != "output"]
        self._slots = {node: k for k, node in enumerate(self._nodes)}
        self._result = next(n for n in graph.nodes if n.op == "output").args[0]
        self._fixed: set[int] = set()
        self._made: dict[int, ProgramStep] = {}

    def program(self) -> Program:
        """Return the steps."""
        inputs = sum(node.op == "placeholder" for node in self._nodes)
        self._fixed.update(range(inputs))
        for node in self._nodes[inputs:]:
            step = self._folded(node) or self._elementwise(node) or self._site(node) or self._other(node)
            if step.in_place and self._fixed.intersection(step.reads):
                raise ModelError(f"Operation {node.name!r} overwrites a value that all points share.")
            if not step.names and self._fixed.issuperset(step.reads):
                self._fixed.add(step.slot)
            self._made[step.slot] = step
        kept: list[int] = []
        map_arg(self._result, lambda n: kept.append(self._slots[n]))
        result, slots = self._result, self._slots
        return Program(
            steps=tuple(self._made.values()),
            inputs=inputs,
            slots=len(self._nodes),
            output=lambda values: map_arg(result, lambda n: values[slots[n]]),
            kept=frozenset(kept),
            fixed=frozenset(self._fixed),
        )

    def _module(self, node: fx.Node) -> nn.Module | None:
        return self._modules[str(node.target)] if node.op == "call_module" else None

    def _before(self, node: fx.Node, alone: bool) -> ProgramStep | None:
        """Return the step whose value comes first; with ``alone``, only if nothing else reads it."""
        source = node.args[0] if node.args else None
        if not isinstance(source, fx.Node) or (alone and len(source.users) > 1):
            return None
        return self._made.get(self._slots[source])

    def _sources(self, node: fx.Node) -> list[int]:
        """Return the slots of the arguments, or none if some argument is no value."""
        slots = [self._slots[a] for a in node.args if isinstance(a, fx.Node)]
        return slots if len(slots) == len(node.args) and set(node.kwargs) <= {"inplace"} else []

    def _folded(self, node: fx.Node) -> AffineStep | None:
        """Fold a batch normalisation into the site before it, unless that one is mixed from the ends."""
        module, site = self._module(node), self._before(node, alone=True)
        if type(module) not in _BATCH_NORMS or module.training or len(node.args) != 1:  # type: ignore[union-attr]
            return None
        if not isinstance(site, AffineStep) or site.norm is not None:
            return None
        if site.source in self._fixed and site.length >= SHORT_SUM:
            return None
        names = [f"{node.target}.{leaf}" for leaf in ("weight", "bias", "running_mean", "running_var")]
        weight, bias, mean, var = (name if name in self._state else None for name in names)
        if mean is None or var is None:
            return None
        norm = BatchNorm(weight, bias, mean, var, module.eps)  # type: ignore[union-attr,arg-type]
        del self._made[site.slot]
        return replace(site, slot=self._slots[node], norm=norm)

    def _elementwise(self, node: fx.Node) -> Relu | Add | None:
        """Return a rectification or a sum; none if it writes into a value that may be seen elsewhere."""
        module, sources = self._module(node), tuple(self._sources(node))
        if len(sources) == 1 and (type(module) is nn.ReLU or self._calls(node, _RELUS)):
            kind, writes = Relu, getattr(module, "inplace", False) or node.kwargs.get("inplace")
        elif len(sources) == 2 and self._calls(node, _ADDITIONS):
            kind, writes = Add, node.target in (operator.iadd, "add_")
        else:
            return None
        before = self._before(node, alone=True)
        return None if writes and (before is None or not before.fresh) else kind(self._slots[node], sources)

    def _calls(self, node: fx.Node, targets: tuple[Any, ...]) -> bool:
        return node.op in ("call_function", "call_method") and node.target in targets

    def _site(self, node: fx.Node) -> AffineStep | None:
        module = self._module(node)
        names: list[Any]
        if module is None:
            if not self._calls(node, (F.linear,)) or len(self._sources(node)) not in (2, 3):
                return None
            names = [a.target if a.op == "get_attr" else "" for a in node.args[1:]]  # type: ignore[union-attr]
            names += [None] * (2 - len(names))
            call: Callable[..., Tensor] = F.linear
        elif len(self._sources(node)) == 1 and (type(module) is nn.Linear or type(module) in _CONVOLUTIONS):
            names = [f"{node.target}.weight", None if module.bias is None else f"{node.target}.bias"]
            call = F.linear if type(module) is nn.Linear else _convolution(module)
        else:
            return None
        if any(name is not None and name not in self._state for name in names) or names[0] is None:
            return None
        length = self._state[names[0]][0].numel()
        return AffineStep(self._slots[node], self._slots[node.args[0]], names[0], names[1], call, length)

    def _other(self, node: fx.Node) -> Other:
        slot, module = self._slots[node], self._module(node)
        if node.op == "get_attr":
            name = str(node.target)
            if name in self._constants:
                value = self._constants[name]
                return Other(slot, (), (), lambda values, tensors: value)
            return Other(slot, (), (name,), lambda values, tensors: tensors[name])
        slots, local = self._slots, {}
        if module is not None:
            local = {leaf: f"{node.target}.{leaf}" for leaf in module.state_dict()}
            function = _module_call(module, local)
        elif node.op == "call_method":
            # a view of another memory layout can fail where the network's own would not
            method = "reshape" if node.target == "view" else str(node.target)
            function = _without_state(lambda value, *args, **kwargs: getattr(value, method)(*args, **kwargs))
        else:
            function = _without_state(node.target)  # type: ignore[arg-type]

        def call(values: list[Any], tensors: Mapping[str, Tensor]) -> Any:
            args = map_arg(node.args, lambda n: values[slots[n]])
            return function(tensors, args, map_arg(node.kwargs, lambda n: values[slots[n]]))

        reads = tuple(slots[n] for n in node.all_input_nodes)
        fresh = type(module) in _BATCH_NORMS
        return Other(slot, reads, tuple(local.values()), call, _writes(node, module), fresh)


def _convolution(module: Any) -> Callable[..., Tensor]:
    if module.padding_mode != "zeros":
        return module._conv_forward
    function = _CONVOLUTIONS[type(module)]
    options = (module.stride, module.padding, module.dilation, module.groups)
    return lambda value, weight, bias: function(value, weight, bias, *options)


def _module_call(module: nn.Module, local: Mapping[str, str]) -> Callable[[Any, Any, Any], Any]:
    """Return the call of a module with the tensors of a state; ``local`` gives their full names."""
    if not local:
        return lambda tensors, args, kwargs: module(*args, **kwargs)
    return lambda tensors, args, kwargs: functional_call(
        module, {leaf: tensors[name] for leaf, name in local.items()}, args, kwargs
    )


def _without_state(function: Callable[..., Any]) -> Callable[[Any, Any, Any], Any]:
    return lambda tensors, args, kwargs: function(*args, **kwargs)


def _writes(node: fx.Node, module: nn.Module | None) -> bool:
    """Tell whether a step may write into its inputs, by PyTorch's naming."""
    name = node.target if node.op == "call_method" else getattr(node.target, "__name__", "")
    marked = module is None and str(name).endswith("_") and not str(name).endswith("__")
    asked = node.kwargs.get("inplace") or node.kwargs.get("out") is not None
    return bool(marked or asked or node.target in _IN_PLACE or getattr(module, "inplace", False))
