"""Discovery: from a model and example inputs to the permutation symmetries it has.

Discovery *proposes*, :func:`isthmus.verify` *proves*. It cannot invent a symmetry: every operator joins, refines
or pins labels, each of which only removes permutations, and an operator it does not know pins all it touches.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from isthmus.errors import SymmetryError
from isthmus.symmetry import _axes, _rules
from isthmus.symmetry._axes import Pin
from isthmus.symmetry._classes import with_acts
from isthmus.symmetry._collect import Label, collect
from isthmus.symmetry._cut_parameters import Segments, cut_parameters, in_segments, unread_parameters
from isthmus.symmetry._nesting import outer_atoms, used_atoms
from isthmus.symmetry._outputs import Outputs
from isthmus.symmetry._planes import with_planes
from isthmus.symmetry._roles import with_roles
from isthmus.symmetry._spec import SymmetrySpec
from isthmus.symmetry._stacked import Cuts, SegmentingInterpreter, joined
from isthmus.symmetry._ties import Ties
from isthmus.symmetry._trace import Trace, trace
from isthmus.symmetry._values import Value, constant_value, values_in

__all__ = ["activation_name", "discover", "discover_from_trace"]

_MOST_PASSES = 4


def discover(
    model: nn.Module,
    args: Any = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    outputs: Outputs = None,
    ones: Iterable[str] = (),
    zeros: Iterable[str] = (),
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
        ones: parameters that hold nothing but ones and stay so: gains of norms after folding
            (:func:`isthmus.fold`), which then allow rotations. No weight is looked at, so this is taken on trust, and
            seen by :func:`isthmus.verify`.
        zeros: parameters that hold nothing but zeros and stay so: biases of norms after folding.

    Returns:
        The groups, what may act on their units, what is pinned and why. Print it to read it.

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
    return discover_from_trace(trace(model, args, kwargs), outputs=outputs, ones=ones, zeros=zeros)


def discover_from_trace(
    traced: Trace,
    *,
    outputs: Outputs = None,
    watched: Sequence[str] = (),
    ones: Iterable[str] = (),
    zeros: Iterable[str] = (),
) -> SymmetrySpec:
    """Find the symmetries of an already traced model (see :func:`discover`).

    Args:
        traced: the model.
        outputs: what must be preserved.
        watched: nodes of the graph whose values are listed too, as if they were tensors of the state, under
            :func:`activation_name`: how the groups move activations of the traced shapes.
        ones: parameters known to hold nothing but ones (see :func:`discover`).
        zeros: parameters known to hold nothing but zeros.

    Raises:
        SymmetryError: ``outputs``, ``ones`` or ``zeros`` name nothing that there is.
    """
    known = {name for way in (traced, *traced.others) for name in way.tensors.values()}
    ones, zeros = frozenset(ones), frozenset(zeros)
    for name in (*ones, *zeros):
        if name not in known:
            raise SymmetryError(
                f"the network has no tensor {name!r} that could be known to be ones or zeros."
            )
    chosen = traced.select_outputs(outputs)
    labels, interpreter = _segmented(traced)
    for way in (traced, *traced.others):
        for name, node in way.select_outputs(outputs).items():
            _pin_value(interpreter.values[node], Pin(f"the model's output {name!r}"))
        for node in way.asked:
            _pin_value(interpreter.values[node], Pin("its values are read by Python"))
        for name, node in way.staying.items():
            if name in way.rewritten:
                _move_alike(interpreter.values[node], labels[way.first_name(name)])
            else:  # later calls may look at it in ways that this trace does not show
                _pin_value(interpreter.values[node], Pin(f"kept for later calls in {name!r}"))
    used = used_atoms(interpreter.steps)
    names = {tensor: traced.aliases.get(tensor, (tensor,)) for tensor in labels}
    for value in values_in(list(labels.values())):
        for axis in value.axes:
            for atom in _axes.atoms_of(axis):
                if atom not in used:
                    _axes.pin(atom, Pin("not used by the traced computation"))
    for node in traced.graph.nodes:
        value = joined(interpreter.values[node]) if node.name in watched else None
        if isinstance(value, Value):
            labels[activation_name(node.name)] = value
            names[activation_name(node.name)] = (activation_name(node.name),)
    # the watched values are joined first: what nests is read off the final labels
    nesting = outer_atoms([*values_in(list(labels.values())), *interpreter.all_values()], interpreter.steps)
    found = collect(labels, names, nesting, None if outputs is None else tuple(chosen))
    found = with_planes(found, traced, interpreter.values, outputs)
    found = with_roles(replace(found, experiments=tuple(interpreter.experiments)), traced)
    outer = {o for outers in nesting.values() for o in outers}
    return with_acts(found, traced, interpreter.values, outer, ones=ones, zeros=zeros)


def _pin_value(given: Any, why: Pin) -> None:
    value = joined(given)
    if isinstance(value, Value):
        for axis in value.axes if value.points is None else (*value.axes, value.points.axis):
            _axes.pin(axis, why)


def _move_alike(written: Any, own: Label) -> None:
    """Demand that what a call makes of a parameter moves as the parameter does."""
    one, two = joined(written), joined(own)
    for made, axis in zip(one.axes, two.axes, strict=True):
        _axes.unify(made, axis)


def activation_name(node: str) -> str:
    """Return the name under which the value of a graph's node is listed; no parameter's path begins so."""
    return f"@{node}"


def _ties(traced: Trace) -> Ties:
    """Return a prover for the graph: parameters are in general position, buffers and inputs may hold anything."""
    learned = {traced.first_name(n) for n in traced.program.graph_signature.inputs_to_parameters.values()}
    named = {place: traced.first_name(name) for place, name in traced.tensors.items()}
    parameters = {place: name for place, name in named.items() if name in learned}
    others = (n.name for n in traced.graph.find_nodes(op="placeholder") if n.name not in parameters)
    return Ties(parameters, others)


def _segmented(traced: Trace) -> tuple[dict[str, Label], SegmentingInterpreter]:
    """Interpret until no further axis is found to be cut; what is cut is kept in segments from then on."""
    cuts: Cuts = {}
    segments: Segments = {}
    whole: set[str] = set()
    labels, interpreter = _interpret(traced, cuts, segments)
    for _ in range(_MOST_PASSES):
        found = {**cut_parameters(traced, labels), **segments}
        whole |= unread_parameters(traced, interpreter.values)
        found = {name: cut for name, cut in found.items() if name not in whole}
        new = interpreter.cuts()
        if len(new) == len(cuts) and found == segments:
            return labels, interpreter
        cuts, segments = new, found
        labels, interpreter = _interpret(traced, cuts, segments)
    while unread := unread_parameters(traced, interpreter.values):
        segments = {name: cut for name, cut in segments.items() if name not in unread}
        labels, interpreter = _interpret(traced, cuts, segments)
    return labels, interpreter


def _interpret(
    traced: Trace, cuts: Cuts, segments: Segments
) -> tuple[dict[str, Label], SegmentingInterpreter]:
    """Return the labels of every state tensor, and the interpreter with those of every node of every graph.

    All ways through the code share the labels of the state, so what any of them demands holds for all. Tensors that
    are one memory have one label, under the first of their names.
    """
    assert _rules.__all__, "importing the package registers the rules"
    labels: dict[str, Label] = {}
    interpreter = SegmentingInterpreter(cuts, _ties(traced))
    for way in (traced, *traced.others):
        interpreter.prove_with(_ties(way))
        inputs: dict[str, Any] = {}
        for node in way.graph.find_nodes(op="placeholder"):
            shape = tuple(int(s) for s in getattr(node.meta.get("val"), "shape", ()))
            if node.name in way.tensors:
                name = way.tensors[node.name]
                first = way.first_name(name)
                made = (
                    in_segments(shape, *segments[first])
                    if first in segments
                    else _parameter_value(shape, way.overlapping.get(name))
                )
                value = labels.setdefault(first, made)
            elif node.name in way.constants:
                value = _constant_value(node.name, shape, way)
                constant = way.constants[node.name]
                if isinstance(constant, Tensor) and not constant.is_meta and node.name not in way.changing:
                    interpreter.known[node] = constant.detach().cpu()
            else:
                why = Pin(f"the model's input {node.name!r}")
                value = Value(tuple(_axes.immovable(s, why) for s in shape))
            inputs[node.name] = value
        for name in (n for n in way.staying if n not in way.rewritten):
            written = joined(labels.get(way.first_name(name)))
            for axis in () if written is None else written.axes:
                _axes.pin(axis, Pin("written by the model for later calls"))
        interpreter.run(way.graph, inputs, way.program.graph_module)
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
