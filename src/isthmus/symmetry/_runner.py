"""Running a network in float64 on relabelled copies of its (perturbed) state: the engine of verification."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from isthmus.errors import ModelError
from isthmus.evaluation import require_evaluation
from isthmus.symmetry._apply import apply
from isthmus.symmetry._outputs import named_outputs
from isthmus.symmetry._spec import SymmetrySpec
from isthmus.symmetry._trace import without_caches
from isthmus.symmetry._trials import TRIALS, RankingSeen, nudged

__all__ = ["Runner"]

_FAILURES = (RuntimeError, TypeError, ValueError, IndexError, OverflowError)
_LOW = (torch.float16, torch.bfloat16, torch.float32)
_LOW_COMPLEX = (torch.complex32, torch.complex64)
_HIGH = (torch.float64, torch.complex128)
_FELT = 1e-6
"""Change of an output, relative to its largest entry, that rounding does not explain at large or tiny values."""


class _Double(TorchDispatchMode):
    """Computes in float64 where a model asks for less (``.float()``, ``softmax(dtype=float32)``, factories)."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if kwargs.get("dtype") in (*_LOW, *_LOW_COMPLEX):
            kwargs["dtype"] = torch.float64 if kwargs["dtype"] in _LOW else torch.complex128
        tensors = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        if not tensors:
            return pytree.tree_map(_widened, _made(func, args, kwargs))
        if not func._schema.is_mutable and any(t.dtype in _HIGH for t in tensors):
            args, kwargs = pytree.tree_map(_widened, (args, kwargs))
        return func(*args, **kwargs)


def _made(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Make a tensor from numbers, in float64 where a number (the least of float64, say) does not fit float32."""
    try:
        return func(*args, **kwargs)
    except RuntimeError as error:
        if "overflow" not in str(error):
            raise
        return func(*args, **{**kwargs, "dtype": torch.float64})


def _widened(value: Any) -> Any:
    if not isinstance(value, Tensor) or value.dtype not in (*_LOW, *_LOW_COMPLEX):
        return value
    return value.to(torch.float64 if value.dtype in _LOW else torch.complex128)


class Runner:
    """A model with a state in float64, run under relabellings of that state.

    Args:
        model: in evaluation mode; not mutated.
        args: positional inputs.
        kwargs: keyword inputs.
        outputs: which outputs count.
        generator: with one, every floating entry of the state is changed at random, and so are inputs whose
            entries are all equal.

    Raises:
        ModelError: the model is in training mode, on the meta device, fails, is random or returns nothing finite.
    """

    def __init__(
        self,
        model: nn.Module,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        outputs: Any,
        generator: torch.Generator | None,
    ) -> None:
        require_evaluation(model)
        self._model, self._wanted = model, outputs
        self._places, self._ties = _places(model)
        self._state = _double_state(model, generator)
        self._inputs = (args, dict(kwargs))
        self.dtype = torch.float64
        self._reference = self._first_run(generator)
        if not self._reference:
            raise ModelError(
                f"{type(model).__name__} returns no tensor, so there is nothing to compare. Return tensors, or tuples, "
                "lists, mappings or dataclasses of them."
            )
        with RankingSeen() as ranking:
            again = self._run(self._state)
        differing = [k for k, v in self._reference.items() if _relative_error(v, again[k]) > 0]
        if differing:
            raise ModelError(
                f"Two identical runs of {type(model).__name__} return different {differing[0]!r}: the model is "
                "random or keeps a state. Call model.eval(), or pass the noise as an input."
            )
        empty = [k for k, v in self._reference.items() if v.numel() and not bool(torch.isfinite(v).any())]
        if empty:
            raise ModelError(
                f"{type(model).__name__} returns no finite value in {empty[0]!r} on the example inputs, so nothing "
                "can be verified. Check the inputs (masks in particular) and the weights."
            )
        self._trials = self._tying() if ranking.seen and generator is not None else []

    def errors(self, spec: SymmetrySpec, permutations: Mapping[str, Tensor]) -> dict[str, float]:
        """Return the largest relative change of each output under a relabelling.

        A relabelling that tears tied tensors apart changes every output by infinity. A network that ranks numbers is
        also run where they are equal; there only changes count that are far above rounding.
        """
        found = self._errors(spec, permutations, self._state, self._inputs, self._reference)
        for state, inputs, reference in self._trials:
            for name, error in self._errors(spec, permutations, state, inputs, reference).items():
                found[name] = max(found[name], error if not error <= _FELT else 0.0)
        return found

    def _errors(
        self,
        spec: SymmetrySpec,
        permutations: Mapping[str, Tensor],
        original: Mapping[str, Tensor],
        inputs: Any,
        reference: Mapping[str, Tensor],
    ) -> dict[str, float]:
        state = apply(spec, permutations, original)
        for name, twin in self._ties.items():
            if state[name] is not state[twin] and not torch.equal(state[name], state[twin]):
                return dict.fromkeys(reference, float("inf"))
        moved = self._run(state, inputs)
        return {name: _relative_error(value, moved[name]) for name, value in reference.items()}

    def _tying(self) -> list[tuple[dict[str, Tensor], Any, dict[str, Tensor]]]:
        """Return states, inputs and outputs of the trials that make ties and do not depend on rounding."""
        learned = {n: p for n, p in self._model.named_parameters(remove_duplicate=False) if p.ndim == 1}
        shifts = {n for n, p in learned.items() if p.is_floating_point() and not n.endswith(_GAINS)}
        found: list[tuple[dict[str, Tensor], Any, dict[str, Tensor]]] = []
        for trial in TRIALS:
            with contextlib.suppress(*_FAILURES):  # a network may refuse such inputs
                state, inputs = trial.state(self._state, shifts), trial.inputs(self._inputs)
                reference, close = self._run(state, inputs), self._run(nudged(state), inputs)
                if all(_relative_error(v, close[k]) <= _FELT for k, v in reference.items()):
                    found.append((state, inputs, reference))
        return found

    def _first_run(self, generator: torch.Generator | None) -> dict[str, Tensor]:
        """Run on noisy inputs if that gives finite outputs, else on the given ones; find a dtype that works."""
        if generator is not None:
            given = self._inputs
            self._inputs = pytree.tree_map(lambda v: _noisy(v, generator), given)
            with contextlib.suppress(*_FAILURES):
                found = self._run(self._state)
                if all(bool(torch.isfinite(v).all()) for v in found.values()):
                    return found
            self._inputs = given
        try:
            return self._run(self._state)
        except _FAILURES as error:
            first = error
        self.dtype = next((p.dtype for p in self._model.parameters() if p.is_floating_point()), torch.float32)
        if self.dtype != torch.float64:  # some operators exist in lower precision only
            self._state = {
                k: v.to(self.dtype) if v.is_floating_point() else v for k, v in self._state.items()
            }
            with contextlib.suppress(*_FAILURES):
                return self._run(self._state)
        raise ModelError(_FAILED.format(type(self._model).__name__, first)) from first

    def _run(self, state: Mapping[str, Tensor], inputs: Any = None) -> dict[str, Tensor]:
        args, kwargs = pytree.tree_map(self._prepare, self._inputs if inputs is None else inputs)
        placed = {name: state[name] for name in self._places}
        mode = _Double() if self.dtype == torch.float64 else contextlib.nullcontext()
        with torch.no_grad(), mode:
            output = functional_call(without_caches(self._model), placed, args, kwargs, tie_weights=False)
        return named_outputs(output, Tensor).select(self._wanted)

    def _prepare(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return value.to(self.dtype, copy=True) if value.is_floating_point() else value.clone()


_GAINS = ("weight", "gamma", "gain", "scale")
_FAILED = "Running {} on the example inputs failed: {}. Check that model(*args, **kwargs) runs."


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor, tuple[int, str]]]:
    """Yield name, tensor and place (module and attribute) of all parameters and buffers, under every name."""
    for prefix, module in model.named_modules(remove_duplicate=False):
        for leaf, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None:
                yield (f"{prefix}.{leaf}" if prefix else leaf), tensor, (id(module), leaf)


def _places(model: nn.Module) -> tuple[list[str], dict[str, str]]:
    """Return one name for each place in the module, and for each further name of a tensor its first one.

    A module reached by two names keeps one: ``functional_call`` would restore it wrongly.
    """
    names: dict[tuple[int, str], str] = {}
    first: dict[int, str] = {}
    ties: dict[str, str] = {}
    for name, tensor, place in _tensors(model):
        names.setdefault(place, name)
        if first.setdefault(id(tensor), name) != name:
            ties[name] = first[id(tensor)]
    return list(names.values()), ties


def _double_state(model: nn.Module, generator: torch.Generator | None) -> dict[str, Tensor]:
    """Return a copy of all tensors in float64; with a generator, every floating entry of the state is changed.

    Tied tensors stay tied, and buffers that are not saved are constants of the model. The change is a positive
    factor plus a positive shift, so that running variances stay positive.
    """
    saved = model.state_dict().keys()
    state: dict[str, Tensor] = {}
    done: dict[int, Tensor] = {}
    for name, tensor, _ in _tensors(model):
        if tensor.is_meta:
            raise ModelError(
                f"Cannot run {type(model).__name__}: {name!r} is on the meta device and has no values. "
                "Load the weights first; discovery alone works without them."
            )
        if id(tensor) not in done:
            floating = tensor.is_floating_point()
            values = tensor.detach().to(torch.float64 if floating else tensor.dtype, copy=True)
            if generator is not None and name in saved:
                values = _perturbed(values, name, generator)
            done[id(tensor)] = values
        state[name] = done[id(tensor)]
    return state


def _perturbed(values: Tensor, name: str, generator: torch.Generator) -> Tensor:
    """Change every entry at random, and enlarge weights so small that a deep network would not feel them.

    Matrices and kernels get at least the scale ``1 / √fan-in``, gains at least 1; other vectors get a shift of at
    least 0.02 per entry.
    """
    if not values.is_floating_point() or values.numel() == 0 or not bool(torch.isfinite(values).all()):
        return values
    size = float(values.square().mean().sqrt())
    gain = values.ndim == 1 and name.endswith(_GAINS)
    least = (values.shape[0] / values.numel()) ** 0.5 if values.ndim > 1 else 1.0 if gain else 0.2
    scale = max(size, least)
    enlarged = values * (scale / size) if (values.ndim > 1 or gain) and size > 0 else values
    noise = torch.rand(values.shape, generator=generator, dtype=torch.float64).to(values.device)
    shift = torch.rand(values.shape, generator=generator, dtype=torch.float64).to(values.device)
    return enlarged * (0.75 + 0.5 * noise) + 0.1 * scale * shift


def _noisy(value: Any, generator: torch.Generator) -> Any:
    """Return an input; if it is floating and the same everywhere (zeros, ones), with noise on every entry."""
    if not isinstance(value, Tensor) or not value.is_floating_point() or value.numel() < 2:
        return value
    if not bool((value == value.reshape(-1)[0]).all()):
        return value
    return value + 0.5 * torch.rand(value.shape, generator=generator, dtype=torch.float64).to(value.device)


def _relative_error(reference: Tensor, moved: Tensor) -> float:
    """Return the largest change over the largest finite entry; integers: the share of entries that differ."""
    if reference.shape != moved.shape:
        return float("inf")
    if reference.numel() == 0:
        return 0.0
    if reference.is_complex():
        reference, moved = torch.view_as_real(reference), torch.view_as_real(moved)
    if not reference.is_floating_point():
        return float((reference != moved).double().mean())
    same = (reference == moved) | (reference.isnan() & moved.isnan())
    difference = torch.where(same, torch.zeros_like(reference), (reference - moved).abs())
    finite = reference[torch.isfinite(reference)]
    scale = float(finite.abs().max()) if finite.numel() else 0.0
    largest = float(difference.nan_to_num(nan=float("inf")).max())
    return largest / scale if scale > 0 else largest
