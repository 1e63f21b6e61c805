"""Tracing: a model and example inputs in, one functional operator graph out.

The graph comes from non-strict ``torch.export`` and is functionalised without decomposing anything, so
``linear``, ``layer_norm`` or scaled-dot-product attention stay single nodes. Tensors of the model are inputs
of the graph under the names of ``state_dict``; nothing is copied, and models on the meta device can be traced.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind
from torch.utils import _pytree as pytree

from isthmus.errors import ModelError
from isthmus.replica import Replica, hidden_tensors, storage_key
from isthmus.symmetry._export import Way, export_ways, shell_of
from isthmus.symmetry._functional import functional
from isthmus.symmetry._memory import aliases_of, overlaps, saved_tensors, view_key
from isthmus.symmetry._outputs import NamedOutputs, named_outputs
from isthmus.symmetry._reading import Read, require_same_answers
from isthmus.symmetry._staying import WithStaying

__all__ = [
    "NodeCallback",
    "Trace",
    "bound_arguments",
    "flat",
    "module_of",
    "operator_of",
    "trace",
]

NodeCallback = Callable[[fx.Node, Callable[[fx.Node], Any], Any], None]
"""Called with a node, a function from argument node to value, and the node's result."""


_OBSERVERS = ("aten._fused_moving_avg_obs_fq_helper_functional", "aten._fused_moving_avg_obs_fq_helper")
"""Operators that keep a state from call to call, of entries that belong to channels as their rules say."""


@dataclass(frozen=True)
class Trace:
    """A model as a functional graph of ATen operators, specialised to the shapes of the example inputs.

    Attributes:
        program: the exported program.
        tensors: from placeholder name to parameter or buffer name, for every tensor of the state.
        constants: from placeholder name to tensor, for what is not part of the state (lifted constants and
            non-persistent buffers).
        held: places (path and attribute) of tensors that the module holds outside its state, by the placeholder of the
            constant that they became, where the graph reads it (it does not where it makes the tensor anew).
        caches: places of what the module computed from weights and keeps, and how it is taken away.
        computed: placeholders of constants that the module computes from weights in a way that could not be traced.
        changing: placeholders of these, and of constants that change from call to call.
        staying: nodes of what a call leaves behind for the next one: final values of buffers that it writes, and
            tensors that it puts on modules; each by a name.
        rewritten: those of them that are parameters which a call computes anew from the state alone (weights rescaled
            in the first call of evaluation): they must move as before, and nothing more.
        inputs: names of the placeholders of user inputs, in order.
        outputs: from output name to the node that computes it; names are paths such as ``logits`` or ``0``, written as
            ``['a']['b']`` where another output has the same words.
        aliases: from each state name to all names that are the same view of the same memory, itself included.
        overlapping: from state names to another tensor of the module that covers a part of its memory.
        reads: the values that Python read from tensors on this way through the code.
        asked: the nodes whose values were read, in order; like outputs, they must be preserved.
        others: traces of the other ways through the code that such values can choose.
    """

    program: ExportedProgram
    tensors: Mapping[str, str]
    constants: Mapping[str, Tensor]
    held: Mapping[str, tuple[str, str]]
    caches: Mapping[tuple[str, str], str]
    computed: frozenset[str]
    changing: frozenset[str]
    staying: Mapping[str, fx.Node]
    rewritten: frozenset[str]
    inputs: tuple[str, ...]
    outputs: NamedOutputs[fx.Node]
    aliases: Mapping[str, tuple[str, ...]]
    overlapping: Mapping[str, str]
    reads: tuple[Read, ...] = ()
    asked: tuple[fx.Node, ...] = ()
    others: tuple[Trace, ...] = ()

    @property
    def graph(self) -> fx.Graph:
        """The functional graph."""
        return self.program.graph

    def first_name(self, name: str) -> str:
        """Return the first of the names of a tensor of the state."""
        return self.aliases.get(name, (name,))[0]

    def select_outputs(self, wanted: Iterable[str | int] | str | int | None) -> dict[str, fx.Node]:
        """Return the outputs that must be preserved.

        Args:
            wanted: names or positions; ``None`` for all. A name also selects everything below it
                (``hidden_states`` selects ``hidden_states.0``, ``hidden_states.1``, …).

        Raises:
            SymmetryError: nothing has that name or position, or several outputs have that name.
        """
        return self.outputs.select(wanted)

    def require_of_state(self) -> Trace:
        """Return this trace, if it computes from any state what the module does.

        Raises:
            ModelError: a constant holds what was computed from the traced module's weights.
        """
        for name in sorted(self.computed):
            place = ".".join(part for part in self.held[name] if part)
            raise ModelError(
                f"The trace keeps {place!r}, which the module computes from its weights in train() or eval() in a way "
                "that cannot be traced, so with other weights it would compute something else. Compute it in forward, "
                "or with PyTorch's functions."
            )
        return self

    def run(
        self,
        state: Mapping[str, Tensor],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any] | None = None,
        *,
        on_node: NodeCallback | None = None,
        gradients: bool = False,
    ) -> Any:
        """Run the graph on a state and inputs of the traced shapes.

        Args:
            state: parameters and buffers by name, any floating dtype that fits the inputs.
            args: positional inputs.
            kwargs: keyword inputs.
            on_node: called after each operator with the node, a function from argument node to value, and
                the result.
            gradients: keep the graph of derivatives by those tensors of the state that require them.

        Returns:
            The model's output, with its original structure (dataclasses and foreign mappings as dicts).

        Raises:
            ModelError: the inputs have another structure than the traced ones, or their values lead another way
                through the code.
        """
        given, spec = pytree.tree_flatten((tuple(args), dict(kwargs or {})))
        expected = self.program.call_spec.in_spec
        if spec != expected:
            raise ModelError(
                f"The inputs have another structure than those traced: expected {expected}, found {spec}."
            )
        with torch.set_grad_enabled(gradients):
            flat = _NodeRunner(self, on_node).run(*self._placeholder_values(state, given))
        specs = self.program.graph_signature.output_specs
        returned = [v for v, s in zip(flat, specs, strict=True) if s.kind == OutputKind.USER_OUTPUT]
        result: Any = pytree.tree_unflatten(returned, self.program.call_spec.out_spec)  # type: ignore[arg-type]
        result = result.output if isinstance(result, WithStaying) else result
        if self.reads:
            result, asked = result
            require_same_answers(self.reads, asked)
        return result

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


class _NodeRunner(fx.Interpreter):
    def __init__(self, trace: Trace, on_node: NodeCallback | None) -> None:
        super().__init__(trace.program.graph_module)
        self._on_node = on_node

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if self._on_node is not None and n.op == "call_function":
            self._on_node(n, self.env.__getitem__, result)
        return result


def operator_of(node: fx.Node) -> str:
    """Return the operator's name without overload, such as ``aten.conv2d``.

    A view as another dtype has a name of its own, ``aten.view_dtype``: it reads the same bytes as other entries.
    """
    target = node.target
    if target is torch.ops.aten.view.dtype:
        return "aten.view_dtype"
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
    if not isinstance(model, nn.Module):
        raise ModelError(f"Expected a torch.nn.Module to trace, found {type(model).__name__}.")
    args = (args,) if isinstance(args, Tensor) else tuple(args)
    kwargs = dict(kwargs or {})
    found = _traced(model, args, kwargs, {})
    ways = (found, *found.others)
    meta = any(t.is_meta for t in (*model.parameters(), *model.buffers()))
    if meta or not any(way.held or way.staying for way in ways):
        return found
    replica = _examined(model, args, kwargs)
    if replica is None:
        return _marked(found, lambda way: {"changing": frozenset(way.held)})
    if replica.caches:
        with contextlib.suppress(ModelError):  # then they stay the constants that they were
            found = _traced(model, args, kwargs, replica.caches)
    computed = replica.computed() if any(way.held for way in (found, *found.others)) else set()
    changing = computed | replica.written()
    return _marked(
        found,
        lambda way: {
            "caches": replica.caches,
            "computed": frozenset(n for n, place in way.held.items() if place in computed),
            "changing": frozenset(n for n, place in way.held.items() if place in changing),
        },
    )


def _traced(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], caches: Mapping[tuple[str, str], str]
) -> Trace:
    """Trace every way through the code of a module without its caches."""
    shell = shell_of(model, caches)
    traces: list[Trace] = []
    for way in export_ways(model, args, kwargs, caches):
        _refuse_randomness(way.program, model)
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            traces.append(_build(shell, functional(way.program), way))
    return replace(traces[0], others=tuple(traces[1:]))


def _marked(found: Trace, marks: Callable[[Trace], dict[str, Any]]) -> Trace:
    """Return a trace and those of its other ways, each with what an examination found."""
    return replace(found, **marks(found), others=tuple(replace(way, **marks(way)) for way in found.others))


def _examined(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Replica | None:
    """Return a private copy that knows what the module computes from weights and keeps, if it runs on the inputs."""
    replica = Replica(model)
    try:
        replica.examine(replica.own_state(), args, kwargs, eras=False)
    except ModelError:
        raise
    except Exception:  # it can be traced on inputs that it cannot run on, such as those of another device
        return None
    return replica


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


def flat(values: Iterable[Any]) -> list[Any]:
    """Return arguments with lists among them spread out."""
    return [v for value in values for v in (value if isinstance(value, (list, tuple)) else [value])]


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


def _build(shell: nn.Module, program: ExportedProgram, way: Way) -> Trace:
    tensors: dict[str, str] = {}
    constants: dict[str, Any] = {}
    inputs: list[str] = []
    state = dict(saved_tensors(shell))
    views = {view_key(tensor): name for name, tensor in reversed(state.items())}
    for spec in program.graph_signature.input_specs:
        name = spec.arg.name
        if spec.kind == InputKind.USER_INPUT:
            inputs.append(name)
        elif spec.target in state:
            tensors[name] = str(spec.target)
        else:
            source = program.constants if spec.target in program.constants else program.state_dict
            constants[name] = source[spec.target]  # type: ignore[index]
    for name, constant in _tensors_of(constants).items():
        key = view_key(constant)
        if key is not None and key in views:  # a tensor of the state, reached through a list or a function
            tensors[name] = views[key]
            del constants[name]
    hidden = {storage_key(h.tensor): (h.module, h.attribute) for h in hidden_tensors(shell)}
    keys = {name: storage_key(constant) for name, constant in _tensors_of(constants).items()}
    read = {node.name for node in program.graph.find_nodes(op="placeholder") if node.users}
    held = {name: hidden[key] for name, key in keys.items() if key in hidden and name in read}
    outputs, asked = _outputs(program, way.reads)
    return Trace(
        program=program,
        tensors=tensors,
        constants=constants,
        held=held,
        caches={},
        computed=frozenset(),
        changing=frozenset(),
        staying=_staying(program, way.left, state),
        rewritten=_rewritten(program),
        inputs=tuple(inputs),
        outputs=outputs,
        aliases=aliases_of(state),
        overlapping=overlaps(state, _tensors_of(constants)),
        reads=way.reads,
        asked=asked,
    )


def _tensors_of(values: Mapping[str, Any]) -> dict[str, Tensor]:
    return {name: value for name, value in values.items() if isinstance(value, Tensor)}


def _staying(program: ExportedProgram, left: tuple[str, ...], saved: Iterable[str]) -> dict[str, fx.Node]:
    """Return the nodes of what a call leaves for the next one.

    What is computed from weights alone and kept outside the state is no memory: every call finds the same.
    """
    by_name = {n.name: n for n in program.graph.nodes}
    written = (OutputKind.BUFFER_MUTATION, OutputKind.PARAMETER_MUTATION)
    specs = [s for s in program.graph_signature.output_specs if s.kind in written]
    read = {str(s.target): by_name[s.arg.name] for s in program.graph_signature.input_specs if s.target}
    found = {str(spec.target): by_name[spec.arg.name] for spec in specs}
    found = {name: node for name, node in found.items() if not _keeps_own_state(node, read.get(name))}
    tree = _output_tree(program)
    if isinstance(tree, WithStaying):
        nodes = zip(left, tree.staying, strict=True)
        found.update({name: node for name, node in nodes if isinstance(node, fx.Node)})
    users = {s.arg.name for s in program.graph_signature.input_specs if s.kind == InputKind.USER_INPUT}
    return {name: node for name, node in found.items() if name in saved or _depends(node, users)}


def _rewritten(program: ExportedProgram) -> frozenset[str]:
    """Return the parameters that a call computes anew from the state alone."""
    signature = program.graph_signature
    by_name = {n.name: n for n in program.graph.nodes}
    users = {s.arg.name for s in signature.input_specs if s.kind == InputKind.USER_INPUT}
    specs = [s for s in signature.output_specs if s.kind == OutputKind.PARAMETER_MUTATION]
    return frozenset(str(s.target) for s in specs if not _depends(by_name[s.arg.name], users))


def _keeps_own_state(written: fx.Node, read: fx.Node | None) -> bool:
    """Tell whether a buffer is the state of one operator, which alone reads and writes it and whose rule labels it."""
    maker = next(iter(written.all_input_nodes), None)
    return (
        maker is not None
        and maker.op == "call_function"
        and operator_of(maker) in _OBSERVERS
        and (read is None or set(read.users) <= {maker})
    )


def _depends(node: fx.Node, names: set[str]) -> bool:
    """Tell whether a node is computed from one of the named placeholders."""
    waiting, seen = [node], {node}
    while waiting:
        current = waiting.pop()
        if current.name in names:
            return True
        fresh = [n for n in current.all_input_nodes if n not in seen]
        seen.update(fresh)
        waiting.extend(fresh)
    return False


def _output_tree(program: ExportedProgram) -> Any:
    """Return the structure of what the program returns, with nodes in place of tensors."""
    by_name = {n.name: n for n in program.graph.nodes}
    flat: list[fx.Node | None] = []
    for spec in program.graph_signature.output_specs:
        if spec.kind == OutputKind.USER_OUTPUT:
            flat.append(by_name.get(getattr(spec.arg, "name", "") or ""))
    return pytree.tree_unflatten(flat, program.call_spec.out_spec)  # type: ignore[arg-type]


def _outputs(
    program: ExportedProgram, reads: tuple[Read, ...]
) -> tuple[NamedOutputs[fx.Node], tuple[fx.Node, ...]]:
    """Return the outputs by name, and the nodes whose values Python read (which the export appends)."""
    tree = _output_tree(program)
    tree = tree.output if isinstance(tree, WithStaying) else tree
    tree, asked = tree if reads else (tree, ())
    return named_outputs(tree, fx.Node), tuple(n for n in asked if isinstance(n, fx.Node))
