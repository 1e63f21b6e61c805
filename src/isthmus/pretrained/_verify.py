"""Verification without the network in memory: original and relabelled run side by side through the graph.

The traced graph is run operator by operator. A weight is read from its file when an operator needs it, used for
the original and for every relabelling, and dropped, so the memory is that of a few tensors, and the whole
checkpoint is read once however many relabellings are tested.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from isthmus.errors import ModelError
from isthmus.pretrained._gather import LARGE, STILL, moves, moves_by_key
from isthmus.pretrained._open import OpenedModel
from isthmus.symmetry import (
    Couplings,
    DoublePrecision,
    EditChange,
    SymmetrySpec,
    Trace,
    Verification,
    drawn_relabellings,
    noisy_input,
    operator_of,
    output_change,
    perturbation,
    verified,
)

__all__ = ["edit_change", "function_change", "rounding_change", "verify"]


def verify(
    spec: SymmetrySpec,
    model: OpenedModel,
    *,
    draws: int = 2,
    seed: int = 0,
    outputs: Any = None,
    generator: torch.Generator | None = None,
    symmetry: Literal["permutations", "all"] = "all",
) -> Verification:
    """Relabel a stored network at random and measure how far its outputs move, reading one tensor at a time.

    It tries what :func:`isthmus.verify` tries given the same generator, with the same tolerances. The network that
    runs is the whole one, with its own weights, each entry changed at random. It runs in float64, or in float32 if
    some tensor has more than 2²⁷ entries. Networks that rank numbers are not run where these are equal.

    Args:
        spec: what is tested.
        model: the opened model folder.
        draws: number of random relabellings.
        seed: of all randomness.
        outputs: outputs that must be preserved; default: those of the spec.
        generator: source of randomness instead.
        symmetry: ``"permutations"`` tries these alone, else random elements of larger classes are tried too.

    Raises:
        ModelError: the graph cannot be run, or returns nothing finite.
        SymmetryError: the spec is of another network, or moves tied tensors differently.
    """
    source = torch.Generator().manual_seed(seed) if generator is None else generator
    drawn = drawn_relabellings(spec, source, draws)
    wanted, kept = spec.outputs if outputs is None else outputs, (*spec.ones, *spec.zeros)
    runs = _StoredRuns(model, wanted, source.initial_seed(), kept)
    return verified(spec, runs, drawn, source, symmetry=symmetry)


def function_change(
    spec: SymmetrySpec, permutations: Couplings, model: OpenedModel, *, outputs: Any = None
) -> float:
    """Return how far given relabellings move the outputs of a stored network with its own weights.

    Returns:
        Largest ``max|f(θ) − f(πθ)| / max|f(θ)|`` over the outputs, no unit; in the precision of :func:`verify`.

    Raises:
        ModelError: the graph cannot be run, or returns nothing finite.
        SymmetryError: the spec is of another network.
    """
    runs = _StoredRuns(model, spec.outputs if outputs is None else outputs, None)
    return max(runs.errors(spec, [permutations])[0].values(), default=0.0)


def rounding_change(
    spec: SymmetrySpec, couplings: Couplings, model: OpenedModel, *, outputs: Any = None
) -> float:
    """Return how far couplings move the outputs of a stored network once tensors are rounded as they are stored.

    Raises:
        ModelError: the graph cannot be run, or returns nothing finite.
        SymmetryError: the spec is of another network.
    """
    runs = _StoredRuns(model, spec.outputs if outputs is None else outputs, None)
    return runs.rounded_error(spec, couplings)


class Change(Protocol):
    """What is done to a tensor of the state before it is used."""

    def apply(self, values: Tensor, /) -> Tensor:
        """Return the tensor that is used instead."""
        ...


def edit_change(
    edit: Callable[[str, Callable[[str], Tensor]], Tensor],
    names: Collection[str],
    model: OpenedModel,
    *,
    outputs: Any = None,
    seed: int | None = 0,
) -> EditChange:
    """Return how far edits of the state move the outputs of a stored network, reading one tensor at a time.

    Args:
        edit: returns an edited tensor, given its name and a function from name to the tensor before.
        names: of the tensors that are edited.
        model: the opened model folder.
        outputs: outputs that must be preserved; default: all.
        seed: every weight is changed at random first; ``None`` for the network's own weights.

    Raises:
        ModelError: the graph cannot be run, or returns nothing finite.
    """
    runs = _StoredRuns(model, outputs, seed)
    changes = {name: _Edited(lambda n=name: edit(n, runs.read).to(runs.dtype)) for name in names}
    return EditChange.of(runs.errors_of([changes])[0], runs.dtype)


class _Edited:
    """An edited tensor, which is computed from the state, whatever it was."""

    def __init__(self, value: Callable[[], Tensor]) -> None:
        self._value = value

    def apply(self, values: Tensor, /) -> Tensor:
        return self._value()


class _Rounded:
    """A moved tensor as it is stored: rounded to the dtype of its file."""

    def __init__(self, move: Change, dtype: torch.dtype) -> None:
        self._move, self._dtype = move, dtype

    def apply(self, values: Tensor, /) -> Tensor:
        return self._move.apply(values).to(self._dtype).to(values.dtype)


class _StoredRuns:
    """Runs a stored network under relabellings, all side by side.

    Args:
        model: the opened model folder.
        outputs: which outputs count.
        seed: of the changes of its weights and of inputs that are the same everywhere; None changes nothing.
        kept: tensors that are left as they are all the same.
    """

    def __init__(
        self, model: OpenedModel, outputs: Any, seed: int | None, kept: Collection[str] = ()
    ) -> None:
        self._model, self._outputs, self._seed, self._kept = model, outputs, seed, frozenset(kept)
        entries = max((t.numel() for t in model.state.shapes().values()), default=0)
        self.dtype = torch.float32 if entries > LARGE else torch.float64

    def errors(self, spec: SymmetrySpec, relabellings: Sequence[Couplings]) -> list[dict[str, float]]:
        """Return, for each relabelling, the largest relative change of each output."""
        return self.errors_of(self._changes(spec, at) for at in relabellings)

    def rounded_error(self, spec: SymmetrySpec, at: Couplings) -> float:
        """Return the largest relative change of any output where moved tensors are rounded as they are stored."""
        return max(self.errors_of([self._changes(spec, at, rounded=True)])[0].values(), default=0.0)

    def _changes(self, spec: SymmetrySpec, at: Couplings, rounded: bool = False) -> Mapping[str, Change]:
        """Return what is done to every tensor that couplings move."""
        moves_by_key(spec, at, self._model)  # checks shapes, ties and constants
        found = moves(spec, at)
        if not rounded:
            return dict(found)
        stored = self._model.state.stored
        return {name: _Rounded(move, stored(name).dtype) for name, move in found.items()}

    def read(self, name: str) -> Tensor:
        """Return a tensor as the runs see it."""
        return self._read(name)

    def errors_of(self, changes: Iterable[Mapping[str, Change]]) -> list[dict[str, float]]:
        """Return, for each way of changing tensors, the largest relative change of each output."""
        variants: list[Mapping[str, Change]] = [{}, *changes]
        given = (tuple(self._model.example.args), dict(self._model.example.kwargs))
        if self._seed is not None:
            source = _generator_for("inputs", self._seed)
            noisy = pytree.tree_map(lambda value: noisy_input(value, source), given)
            if any(x is not y for x, y in zip(*map(pytree.tree_leaves, (noisy, given)), strict=True)):
                with contextlib.suppress(ModelError):
                    return self._compared(variants, noisy)
        return self._compared(variants, given)

    def _compared(self, variants: Sequence[Mapping[str, Change]], inputs: Any) -> list[dict[str, float]]:
        traced = self._model.traced
        wanted = traced.select_outputs(self._outputs)
        reference, *runs = _SideBySide(traced, self._read, self._model.buffers, variants, self.dtype).run(
            inputs, wanted
        )
        for name, value in reference.items():
            if value.numel() and not bool(torch.isfinite(value).any()):
                raise ModelError(
                    f"{self._model.path}: the network returns no finite value in {name!r} on the example inputs, so "
                    "nothing can be verified. Give other inputs with example=...."
                )
        return [{n: output_change(v, run[n]) for n, v in reference.items()} for run in runs]

    def _read(self, name: str) -> Tensor:
        """Return a tensor in the precision of the runs, changed at random if that is wanted."""
        stored = name in self._model.state
        source = self._model.state[name] if stored else self._model.buffers[name]
        if not source.is_floating_point():
            return source
        if self._seed is None or name in self._kept:
            return source.to(self.dtype, copy=True)
        key = self._model.state.stored(name).key if stored else name
        wide = (
            torch.promote_types(source.dtype, torch.float32) if source.dtype.itemsize > 1 else torch.float32
        )
        return _changed(source.to(wide, copy=True), name, _generator_for(key, self._seed)).to(self.dtype)


def _generator_for(key: str, seed: int) -> torch.Generator:
    """Return a source of randomness that is the same for one key and seed: tied tensors are changed alike."""
    digest = hashlib.blake2b(f"{seed}:{key}".encode(), digest_size=7).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big"))


def _changed(values: Tensor, name: str, generator: torch.Generator) -> Tensor:
    """Change every entry by its own positive factor and shift, in place, as :func:`isthmus.verify` does."""
    flat = values.reshape(-1).split(2**22)
    squares = sum(float(torch.linalg.vector_norm(part)) ** 2 for part in flat)
    if values.numel() == 0 or not math.isfinite(squares):
        return values
    factor, largest = perturbation(values.shape, (squares / values.numel()) ** 0.5, name)
    for part in flat:
        noise = torch.empty_like(part)
        part *= noise.uniform_(0.75 * factor, 1.25 * factor, generator=generator)
        part += noise.uniform_(0.0, largest, generator=generator)
    return values


class _Stored:
    """A tensor of the state, read when an operator needs it."""

    def __init__(self, name: str) -> None:
        self.name = name


class _SideBySide:
    """Runs a graph on several relabellings of one state at once.

    Args:
        traced: the graph.
        read: returns a tensor of the state by name.
        buffers: values of the buffers that are not part of the state.
        variants: per run, what is done to tensors of the state before they are used.
        dtype: of all floating values.
    """

    def __init__(
        self,
        traced: Trace,
        read: Callable[[str], Tensor],
        buffers: Mapping[str, Tensor],
        variants: Sequence[Mapping[str, Change]],
        dtype: torch.dtype,
    ) -> None:
        self._traced, self._read, self._buffers = traced, read, buffers
        self._variants, self._dtype = variants, dtype
        self._values: dict[fx.Node, Any] = {}

    def run(self, given: Any, wanted: Mapping[str, fx.Node]) -> list[dict[str, Tensor]]:
        """Return the wanted outputs of every run on the given positional and keyword inputs, by name."""
        self._values = dict(self._placeholders(given))
        kept = set(wanted.values())
        last = _last_uses(self._traced.graph)
        with torch.no_grad():
            for node in self._traced.graph.nodes:
                if node.op == "get_attr":
                    found = self._traced.program.graph_module
                    for part in str(node.target).split("."):
                        found = getattr(found, part)
                    self._values[node] = [found] * len(self._variants)
                elif node.op == "call_function":
                    self._values[node] = self._called(node)
                for done in last.get(node, ()):
                    if done not in kept:
                        self._values.pop(done, None)
        return [{n: self._values[node][k] for n, node in wanted.items()} for k in range(len(self._variants))]

    def _placeholders(self, given: Any) -> Mapping[fx.Node, Any]:
        traced = self._traced
        targets = {s.arg.name: s.target for s in traced.program.graph_signature.input_specs}
        inputs = dict(zip(traced.inputs, pytree.tree_leaves(given), strict=True))
        found: dict[fx.Node, Any] = {}
        for node in traced.graph.find_nodes(op="placeholder"):
            if node.name in traced.tensors:
                found[node] = _Stored(traced.tensors[node.name])
                continue
            if node.name in traced.constants:
                value = self._buffers.get(str(targets.get(node.name)), traced.constants[node.name])
            else:
                value = inputs[node.name]
            found[node] = [self._prepared(value, node)] * len(self._variants)
        return found

    def _prepared(self, value: Any, node: fx.Node) -> Any:
        if not isinstance(value, Tensor):
            return value
        if value.is_meta:
            raise ModelError(
                f"The network computes the constant {node.name!r} while it is traced, so its value is unknown "
                "without weights. Verify the network in memory: isthmus.verify(spec, opened.load(), ...)."
            )
        return value.to(self._dtype) if value.is_floating_point() else value

    def _called(self, node: fx.Node) -> list[Any]:
        """Run one operator for every variant; where all arguments are those of the first run, share its result."""
        if operator_of(node) == "aten._assert_tensor_metadata":
            return [None] * len(self._variants)
        stored = {
            n: self._read(v.name) for n in node.all_input_nodes if isinstance(v := self._values[n], _Stored)
        }
        results: list[Any] = []
        for k, changes in enumerate(self._variants):

            def value(n: fx.Node, k: int = k, changes: Mapping[str, Change] = changes) -> Any:
                if n in stored:
                    return changes.get(self._values[n].name, STILL).apply(stored[n])
                return self._values[n][k]

            if k and self._unchanged(node, k, changes):
                results.append(results[0])
                continue
            args, kwargs = fx.map_arg((node.args, node.kwargs), value)
            args, kwargs = pytree.tree_map(_on_cpu, (args, kwargs))
            results.append(self._apply(node, args, kwargs))
        return results

    def _unchanged(self, node: fx.Node, k: int, moves: Mapping[str, Change]) -> bool:
        for n in node.all_input_nodes:
            value = self._values[n]
            if value.name in moves if isinstance(value, _Stored) else value[k] is not value[0]:
                return False
        return True

    def _apply(self, node: fx.Node, args: Any, kwargs: Any) -> Any:
        try:
            with DoublePrecision() if self._dtype == torch.float64 else contextlib.nullcontext():
                if operator_of(node) == "aten.histc" and not args[0].is_floating_point():
                    # Experts are counted as integers off the CPU, which counts floating numbers only.
                    return node.target(args[0].double(), *args[1:], **kwargs).to(args[0].dtype)  # type: ignore[operator]
                return node.target(*args, **kwargs)  # type: ignore[operator]
        except (RuntimeError, TypeError, ValueError, IndexError) as error:
            raise ModelError(
                f"Verifying the network failed in {operator_of(node)}: {error}. Verify it in memory instead: "
                "isthmus.verify(spec, opened.load(), ...)."
            ) from error


def _on_cpu(value: Any) -> Any:
    return torch.device("cpu") if isinstance(value, torch.device) else value


def _last_uses(graph: fx.Graph) -> dict[fx.Node, list[fx.Node]]:
    """Return, for each node, the nodes that are not needed after it."""
    seen: set[fx.Node] = set()
    last: dict[fx.Node, list[fx.Node]] = {}
    for node in reversed(list(graph.nodes)):
        for used in (node, *node.all_input_nodes):
            if used not in seen:
                seen.add(used)
                last.setdefault(node, []).append(used)
    return last
