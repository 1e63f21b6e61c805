"""Tracing: a model and example inputs in, one functional operator graph out.

The graph comes from non-strict ``torch.export`` and is functionalised without decomposing anything, so
``linear``, ``layer_norm`` or scaled-dot-product attention stay single nodes. Tensors of the model are inputs
of the graph under the names of ``state_dict``; nothing is copied, and models on the meta device can be traced.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind
from torch.utils import _pytree as pytree

from isthmus.errors import ModelError
from isthmus.symmetry._outputs import NamedOutputs, named_outputs, returning_opened

__all__ = [
    "NodeCallback",
    "Trace",
    "bound_arguments",
    "module_of",
    "operator_of",
    "trace",
    "without_caches",
]

NodeCallback = Callable[[fx.Node, Callable[[fx.Node], Any], Any], None]
"""Called with a node, a function from argument node to value, and the node's result."""


@dataclass(frozen=True)
class Trace:
    """A model as a functional graph of ATen operators, specialised to the shapes of the example inputs.

    Attributes:
        program: the exported program.
        tensors: from placeholder name to parameter or buffer name, for every tensor of the state.
        constants: from placeholder name to tensor, for what is not part of the state (lifted constants and
            non-persistent buffers).
        inputs: names of the placeholders of user inputs, in order.
        outputs: from output name to the node that computes it; names are paths such as ``logits`` or ``0``, written as
            ``['a']['b']`` where another output has the same words.
        aliases: from each state name to all names that share its storage (tied parameters), itself included.
    """

    program: ExportedProgram
    tensors: Mapping[str, str]
    constants: Mapping[str, Tensor]
    inputs: tuple[str, ...]
    outputs: NamedOutputs[fx.Node]
    aliases: Mapping[str, tuple[str, ...]]

    @property
    def graph(self) -> fx.Graph:
        """The functional graph."""
        return self.program.graph

    def select_outputs(self, wanted: Iterable[str | int] | str | int | None) -> dict[str, fx.Node]:
        """Return the outputs that must be preserved.

        Args:
            wanted: names or positions; ``None`` for all. A name also selects everything below it
                (``hidden_states`` selects ``hidden_states.0``, ``hidden_states.1``, …).

        Raises:
            SymmetryError: nothing has that name or position, or several outputs have that name.
        """
        return self.outputs.select(wanted)

    def run(
        self,
        state: Mapping[str, Tensor],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any] | None = None,
        *,
        on_node: NodeCallback | None = None,
    ) -> Any:
        """Run the graph on a state and inputs of the traced shapes.

        Args:
            state: parameters and buffers by name, any floating dtype that fits the inputs.
            args: positional inputs.
            kwargs: keyword inputs.
            on_node: called after each operator with the node, a function from argument node to value, and
                the result.

        Returns:
            The model's output, with its original structure (dataclasses and foreign mappings as dicts).

        Raises:
            ModelError: the inputs have another structure than the traced ones.
        """
        given, spec = pytree.tree_flatten((tuple(args), dict(kwargs or {})))
        expected = self.program.call_spec.in_spec
        if spec != expected:
            raise ModelError(
                f"The inputs have another structure than those traced: expected {expected}, found {spec}."
            )
        with torch.no_grad():
            flat = _Runner(self, on_node).run(*self._placeholder_values(state, given))
        return pytree.tree_unflatten(list(flat), self.program.call_spec.out_spec)  # type: ignore[arg-type]

    def _placeholder_values(self, state: Mapping[str, Tensor], given: list[Any]) -> list[Any]:
        users = dict(zip(self.inputs, given, strict=True))
        values: list[Any] = []
        for node in self.graph.find_nodes(op="placeholder"):
            if node.name in self.tensors:
                values.append(state[self.tensors[node.name]])
            elif node.name in self.constants:
                values.append(self.constants[node.name])
            else:
                values.append(users[node.name])
        return values


class _Runner(fx.Interpreter):
    def __init__(self, trace: Trace, on_node: NodeCallback | None) -> None:
        super().__init__(trace.program.graph_module)
        self._on_node = on_node

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if self._on_node is not None and n.op == "call_function":
            self._on_node(n, self.env.__getitem__, result)
        return result


def operator_of(node: fx.Node) -> str:
    """Return the operator's name without overload, such as ``aten.conv2d``."""
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        return f"{target.namespace}.{target._schema.name.split('::')[-1]}"
    return getattr(target, "__name__", str(target))


def module_of(node: fx.Node) -> str:
    """Return the path of the module whose forward called the operator, empty for the model itself."""
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return ""
    path = next(reversed(stack.values()))[0]
    return str(path).split("@")[0]


def trace(model: nn.Module, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Trace:
    """Trace a model in evaluation mode.

    Args:
        model: any module; not mutated.
        args: example positional inputs (a single tensor is taken as one argument).
        kwargs: example keyword inputs.

    Raises:
        ModelError: the model cannot be exported, was given no inputs, or is random: in training mode with
            dropout or batch statistics, or random in evaluation too.
    """
    args = (args,) if isinstance(args, Tensor) else tuple(args)
    program = _export(model, args, dict(kwargs or {}))
    return _build(model, program)


def _export(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> ExportedProgram:
    if not isinstance(model, nn.Module):
        raise ModelError(f"Expected a torch.nn.Module to trace, found {type(model).__name__}.")
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            shell = without_caches(model)
            with returning_opened(shell):
                program = torch.export.export(shell, args, kwargs, strict=False)
            _refuse_randomness(program, model)
            return program.run_decompositions({})
    except ModelError:
        raise
    except Exception as error:  # torch.export raises many unrelated types
        inputs = "no example inputs" if not args and not kwargs else f"inputs {_describe(args, kwargs)}"
        first = str(error).strip().splitlines()[0] if str(error).strip() else "no message"
        raise ModelError(
            f"Cannot trace {type(model).__name__} with {inputs}: torch.export failed with "
            f"{type(error).__name__}: {first} "
            "Check that model(*args, **kwargs) runs, give example inputs of the right shapes, and avoid "
            "control flow that depends on the values of tensors."
        ) from error


def without_caches(model: nn.Module) -> nn.Module:
    """Return a copy of the module tree that shares all parameters and buffers.

    What a forward pass stores on modules (cached biases, masks) stays out of the model and of later runs. A
    module that cannot be copied is returned as it is.
    """
    tensors = (*model.parameters(), *model.buffers())
    try:
        return copy.deepcopy(model, {id(t): t for t in tensors})
    except (TypeError, RuntimeError, AttributeError, NotImplementedError):
        return model


def _describe(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str:
    def one(value: Any) -> str:
        return str(tuple(value.shape)) if isinstance(value, Tensor) else type(value).__name__

    return ", ".join([*(one(a) for a in args), *(f"{k}={one(v)}" for k, v in kwargs.items())])


def _refuse_randomness(program: ExportedProgram, model: nn.Module) -> None:
    for node in program.graph.nodes:
        if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
            continue
        name, where = operator_of(node), module_of(node) or type(model).__name__
        bound = bound_arguments(node)
        training = bound.get("train") is True or bound.get("training") is True
        if name.endswith("batch_norm") and bound.get("running_mean") is None:
            training = False  # statistics of the operand itself, such as a standardised weight
        if training or (float(bound.get("dropout_p") or 0.0) > 0.0):
            raise ModelError(
                f"{where} runs {name} in training mode, so its output depends on chance or on the batch. "
                "Call model.eval() first."
            )
        seeded = torch.Tag.nondeterministic_seeded in node.target.tags
        if seeded and not {"train", "training", "dropout_p", "p"} & bound.keys():
            raise ModelError(
                f"{where} calls {name}, which is random in evaluation mode: two runs give different outputs, "
                "so no symmetry can be verified. Pass the noise as an input, or remove it."
            )


def bound_arguments(node: fx.Node) -> dict[str, Any]:
    """Return the arguments of an operator node by the names of its schema, defaults filled in."""
    schema = node.target._schema  # type: ignore[union-attr]
    bound: dict[str, Any] = {}
    for k, argument in enumerate(schema.arguments):
        if k < len(node.args):
            bound[argument.name] = node.args[k]
        elif argument.name in node.kwargs:
            bound[argument.name] = node.kwargs[argument.name]
        elif argument.has_default_value():
            bound[argument.name] = argument.default_value
    return bound


def _build(model: nn.Module, program: ExportedProgram) -> Trace:
    tensors: dict[str, str] = {}
    constants: dict[str, Tensor] = {}
    inputs: list[str] = []
    state_names = set(model.state_dict().keys())
    for spec in program.graph_signature.input_specs:
        name = spec.arg.name
        if spec.kind == InputKind.USER_INPUT:
            inputs.append(name)
        elif spec.target in state_names:
            tensors[name] = str(spec.target)
        elif spec.target in program.constants:
            constants[name] = program.constants[spec.target]  # type: ignore[assignment]
        else:
            constants[name] = program.state_dict[spec.target]  # type: ignore[index]
    return Trace(program, tensors, constants, tuple(inputs), _outputs(program), _aliases(model))


def _outputs(program: ExportedProgram) -> NamedOutputs[fx.Node]:
    by_name = {n.name: n for n in program.graph.nodes}
    flat: list[fx.Node | None] = []
    for spec in program.graph_signature.output_specs:
        if spec.kind == OutputKind.USER_OUTPUT:
            flat.append(by_name.get(getattr(spec.arg, "name", "") or ""))
    tree = pytree.tree_unflatten(flat, program.call_spec.out_spec)  # type: ignore[arg-type]
    return named_outputs(tree, fx.Node)


def _aliases(model: nn.Module) -> dict[str, tuple[str, ...]]:
    by_identity: dict[int, list[str]] = {}
    persistent = set(model.state_dict().keys())
    named = (
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    )
    for name, tensor in named:
        if name in persistent:
            by_identity.setdefault(id(tensor), []).append(name)
    return {name: tuple(names) for names in by_identity.values() for name in names}
