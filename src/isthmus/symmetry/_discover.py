"""Discovery: from a model and example inputs to the permutation symmetries it has.

Discovery *proposes*, :func:`isthmus.verify` *proves*. It cannot invent a symmetry: every operator joins, refines
or pins labels, each of which only removes permutations, and an operator it does not know pins all it touches.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from isthmus.symmetry import _axes, _rules
from isthmus.symmetry._axes import Pin
from isthmus.symmetry._collect import collect
from isthmus.symmetry._nesting import outer_atoms, used_atoms
from isthmus.symmetry._spec import SymmetrySpec
from isthmus.symmetry._stacked import Cuts, SegmentingInterpreter, joined
from isthmus.symmetry._trace import Trace, trace
from isthmus.symmetry._values import Value, constant_value

__all__ = ["Outputs", "discover", "discover_from_trace"]

_MOST_PASSES = 4

Outputs = str | int | Sequence[str | int] | None


def discover(
    model: nn.Module,
    args: Any = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    outputs: Outputs = None,
) -> SymmetrySpec:
    r"""Find which axes of which parameters can be permuted together without changing the function.

    The model is traced by ``torch.export`` and interpreted on axis labels: each operator propagates, splits,
    merges, joins or pins the labels of its operands (an abstract interpretation in the sense of Cousot and
    Cousot 1977). Inputs and outputs are pinned. No weight is read or copied; models on the meta device work.

    Args:
        model: any module in evaluation mode.
        args: example positional inputs (a tensor is one argument); only their shapes matter.
        kwargs: example keyword inputs.
        outputs: names or positions of the outputs that must be preserved, default all. Choose ``"logits"``
            for a model that also returns hidden states, which would pin the residual stream.

    Returns:
        The groups, what is pinned and why. Print it to read it.

    Raises:
        ModelError: the model cannot be traced, is in training mode or random.
        SymmetryError: ``outputs`` names nothing the model returns.

    Example:
        >>> import torch, isthmus
        >>> net = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> spec = isthmus.discover(net, torch.zeros(1, 3))
        >>> print(spec.groups["0"])
        0: 8 units in 0.weight[0], 0.bias[0], 2.weight[1]
    """
    return discover_from_trace(trace(model, args, kwargs), outputs=outputs)


def discover_from_trace(traced: Trace, *, outputs: Outputs = None) -> SymmetrySpec:
    """Find the symmetries of an already traced model (see :func:`discover`)."""
    chosen = traced.select_outputs(outputs)
    labels, interpreter = _interpret(traced, {})
    for _ in range(_MOST_PASSES):
        cuts = interpreter.cuts()
        if len(cuts) == len(interpreter.known_cuts):
            break
        labels, interpreter = _interpret(traced, cuts)
    for name, node in chosen.items():
        value = joined(interpreter.values[node])
        if isinstance(value, Value):
            axes = value.axes if value.points is None else (*value.axes, value.points.axis)
            for axis in axes:
                _axes.pin(axis, Pin(f"the model's output {name!r}"))
    _pin_what_stays(traced, interpreter)
    used = used_atoms(interpreter.steps)
    names = {tensor: traced.aliases.get(tensor, (tensor,)) for tensor in labels}
    for value in labels.values():
        for axis in value.axes:
            for atom in _axes.atoms_of(axis):
                if atom not in used:
                    _axes.pin(atom, Pin("not used by the traced computation"))
    values = [*labels.values(), *interpreter.all_values()]
    nesting = outer_atoms(values, interpreter.steps)
    return collect(labels, names, nesting, None if outputs is None else tuple(chosen))


def _pin_what_stays(traced: Trace, interpreter: SegmentingInterpreter) -> None:
    """Pin what a call leaves for later ones, which may look at it in ways that this trace does not show."""
    for name, node in traced.staying.items():
        value = joined(interpreter.values[node])
        if isinstance(value, Value):
            for axis in (*value.axes, *(() if value.points is None else (value.points.axis,))):
                _axes.pin(axis, Pin(f"kept for later calls in {name!r}"))


def _interpret(traced: Trace, cuts: Cuts) -> tuple[dict[str, Value], SegmentingInterpreter]:
    """Return the labels of every state tensor, and the interpreter with those of every node of the graph.

    Tensors that are one memory have one label, under the first of their names.
    """
    assert _rules.__all__, "importing the package registers the rules"
    labels: dict[str, Value] = {}
    inputs: dict[str, Any] = {}
    for node in traced.graph.find_nodes(op="placeholder"):
        example = node.meta.get("val")
        shape = tuple(int(s) for s in getattr(example, "shape", ()))
        if node.name in traced.tensors:
            name = traced.tensors[node.name]
            first = traced.aliases.get(name, (name,))[0]
            value = labels.setdefault(first, _parameter_value(shape, traced.overlapping.get(name)))
        elif node.name in traced.constants:
            value = _constant_value(node.name, shape, traced)
        else:
            why = Pin(f"the model's input {node.name!r}")
            value = Value(tuple(_axes.immovable(s, why) for s in shape))
        inputs[node.name] = value
    for name in traced.staying:
        for axis in labels[name].axes if name in labels else ():
            _axes.pin(axis, Pin("written by the model for later calls"))
    interpreter = SegmentingInterpreter(cuts)
    interpreter.run(traced.graph, inputs, traced.program.graph_module)
    return labels, interpreter


def _parameter_value(shape: tuple[int, ...], other: str | None) -> Value:
    if other is not None:
        why = Pin(f"shares a part of its memory with {other!r}")
        return Value(tuple(_axes.immovable(s, why) for s in shape))
    return Value(tuple(_axes.fresh(s) if s else _axes.immovable(0, Pin("empty")) for s in shape))


def _constant_value(name: str, shape: tuple[int, ...], traced: Trace) -> Value:
    """Return the labels of a constant; one that changes may have other entries later, equal ones or not."""
    found = constant_value(traced.constants[name], Pin(f"constant {name!r} of the model"))
    if name not in traced.changing:
        return found
    why = Pin(f"{'.'.join(filter(None, traced.held[name]))!r}, which the model keeps outside its state")
    return replace(found, axes=tuple(_axes.immovable(s, why) for s in shape), uniform=False)
