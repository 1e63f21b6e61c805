"""Running a network in float64 on relabelled copies of its (perturbed) state: the engine of verification."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from isthmus.errors import CheckpointError, ModelError
from isthmus.evaluation import require_evaluation
from isthmus.replica import Replica, other_inputs, registered
from isthmus.symmetry._apply import Couplings, apply
from isthmus.symmetry._memory import saved_tensors
from isthmus.symmetry._outputs import named_outputs
from isthmus.symmetry._spec import SymmetrySpec
from isthmus.symmetry._trials import TRIALS, RankingSeen, nudged

__all__ = ["DoublePrecision", "Edit", "Runner", "noisy_input", "output_change", "perturbation"]

Edit = Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]
"""A change of a state, which is given and returned whole."""

_FAILURES = (RuntimeError, TypeError, ValueError, IndexError, OverflowError)
_LOW = (torch.float16, torch.bfloat16, torch.float32)
_LOW_COMPLEX = (torch.complex32, torch.complex64)
_HIGH = (torch.float64, torch.complex128)
_FELT = 1e-6
"""Change of an output, relative to its largest entry, that rounding does not explain at large or tiny values."""


class DoublePrecision(TorchDispatchMode):
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
        found = func(*args, **kwargs)
        whole = all(not (t.is_floating_point() or t.is_complex()) for t in tensors)
        return pytree.tree_map(_widened, found) if whole and _makes_new(func) else found


def _makes_new(func: Any) -> bool:
    """Whether results share no memory with arguments: fractions of whole numbers, say, which torch makes float32."""
    return not func._schema.is_mutable and all(r.alias_info is None for r in func._schema.returns)


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
    """A private copy of a model in float64, run under relabellings of its state.

    A network that leaves something behind is called four times in a row, on two different inputs, each time a state
    is put in; all outputs count.

    Args:
        model: in evaluation mode; not mutated.
        args: positional inputs.
        kwargs: keyword inputs.
        outputs: which outputs count.
        generator: with one, every floating entry of the state is changed at random, and so are inputs whose
            entries are all equal.
        kept: tensors that are left as they are all the same: gains and biases that folding has made ones and zeros.

    Raises:
        ModelError: the model is in training mode, on the meta device, fails, is random, reads tensors that are not
            its own, or returns nothing finite.
    """

    def __init__(
        self,
        model: nn.Module,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        outputs: Any,
        generator: torch.Generator | None,
        kept: Collection[str] = (),
    ) -> None:
        require_evaluation(model)
        _refuse_meta(model)
        self._model, self._wanted = model, outputs
        self._inputs = (args, dict(kwargs))
        self._calls = 1
        self.dtype = torch.float64
        self._replica = Replica(model, lambda t: torch.float64)
        self._state = _changed_state(self._replica, generator, kept)
        self._reference = self._first_run(generator)
        if not self._reference:
            raise ModelError(
                f"{type(model).__name__} returns no tensor, so there is nothing to compare. Return tensors, or tuples, "
                "lists, mappings or dataclasses of them."
            )
        with RankingSeen() as ranking:
            again = self._run(self._state, fresh=self._replica.writes)
        differing = [k for k, v in self._reference.items() if output_change(v, again[k]) > 0]
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

    def errors(self, spec: SymmetrySpec, relabellings: Sequence[Couplings]) -> Iterator[dict[str, float]]:
        """Yield, for each relabelling, the largest relative change of each output.

        A relabelling that tears tied tensors apart changes every output by infinity. A network that ranks numbers is
        also run where they are equal; there only changes count that are far above rounding.
        """
        for permutations in relabellings:
            yield self.errors_of(lambda state, moves=permutations: apply(spec, moves, state))

    def errors_of(self, edit: Edit) -> dict[str, float]:
        """Return the largest relative change of each output by an edit of the state (see :meth:`errors`)."""
        found = self._errors(edit, self._state, self._inputs, self._reference)
        for state, inputs, reference in self._trials:
            for name, error in self._errors(edit, state, inputs, reference).items():
                found[name] = max(found[name], error if not error <= _FELT else 0.0)
        return found

    def _errors(
        self, edit: Edit, original: Mapping[str, Tensor], inputs: Any, reference: Mapping[str, Tensor]
    ) -> dict[str, float]:
        state = {name: tensor.to(original[name].dtype) for name, tensor in edit(original).items()}
        try:
            self._replica.check(state)
        except CheckpointError:
            return dict.fromkeys(reference, float("inf"))
        moved = self._run(state, inputs)
        return {name: output_change(value, moved[name]) for name, value in reference.items()}

    def _tying(self) -> list[tuple[dict[str, Tensor], Any, dict[str, Tensor]]]:
        """Return states, inputs and outputs of the trials that make ties and do not depend on rounding."""
        learned = {n: p for n, p in self._model.named_parameters(remove_duplicate=False) if p.ndim == 1}
        shifts = {n for n, p in learned.items() if p.is_floating_point() and not n.endswith(_GAINS)}
        found: list[tuple[dict[str, Tensor], Any, dict[str, Tensor]]] = []
        for trial in TRIALS:
            with contextlib.suppress(Exception):  # a network may refuse such inputs, in whatever way
                state, inputs = trial.state(self._state, shifts), trial.inputs(self._inputs)
                reference, close = self._run(state, inputs), self._run(nudged(state), inputs)
                if all(output_change(v, close[k]) <= _FELT for k, v in reference.items()):
                    found.append((state, inputs, reference))
        return found

    def _first_run(self, generator: torch.Generator | None) -> dict[str, Tensor]:
        """Run on noisy inputs if that gives finite outputs, else on the given ones; find a dtype that works."""
        if generator is not None:
            given = self._inputs
            self._inputs = pytree.tree_map(lambda v: noisy_input(v, generator), given)
            with contextlib.suppress(*_FAILURES):
                found = self._examined_run()
                if all(bool(torch.isfinite(v).all()) for v in found.values()):
                    return found
            self._inputs, self._calls = given, 1
        try:
            return self._examined_run()
        except _FAILURES as error:
            if isinstance(error, ModelError):
                raise
            first = error
        self.dtype = next((p.dtype for p in self._model.parameters() if p.is_floating_point()), torch.float32)
        if self.dtype != torch.float64:  # some operators exist in lower precision only
            self._state = {
                k: v.to(self.dtype) if v.is_floating_point() else v for k, v in self._state.items()
            }
            self._replica, self._calls = Replica(self._model), 1
            with contextlib.suppress(*_FAILURES):
                return self._examined_run()
        raise ModelError(_FAILED.format(type(self._model).__name__, first)) from first

    def _examined_run(self) -> dict[str, Tensor]:
        args, kwargs = pytree.tree_map(self._prepare, self._inputs)
        with self._precision():
            self._replica.examine(self._state, args, kwargs, eras=False)
        self._calls = 4 if self._replica.writes else 1
        return self._run(self._state)

    def _run(
        self, state: Mapping[str, Tensor], inputs: Any = None, *, fresh: bool = True
    ) -> dict[str, Tensor]:
        """Run one call or several in a row; if not ``fresh``, after those before."""
        if fresh:
            self._replica.fill(state)
        found: dict[str, Tensor] = {}
        for call in range(self._calls):
            args, kwargs = pytree.tree_map(self._prepare, self._inputs if inputs is None else inputs)
            if call % 2:
                args, kwargs = other_inputs((args, kwargs))
            with self._precision():
                output = named_outputs(self._replica.run(*args, **kwargs), Tensor).select(self._wanted)
            found.update(
                {name if not call else f"{name} of call {call + 1}": v for name, v in output.items()}
            )
        return found

    def _precision(self) -> contextlib.AbstractContextManager[Any]:
        return DoublePrecision() if self.dtype == torch.float64 else contextlib.nullcontext()

    def _prepare(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return value.to(self.dtype, copy=True) if value.is_floating_point() else value.clone()


_GAINS = ("weight", "gamma", "gain", "scale")
_FAILED = "Running {} on the example inputs failed: {}. Check that model(*args, **kwargs) runs."


def _refuse_meta(model: nn.Module) -> None:
    name = next((name for name, tensor, _ in registered(model) if tensor.is_meta), None)
    if name is not None:
        raise ModelError(
            f"Cannot run {type(model).__name__}: {name!r} is on the meta device and has no values. "
            "Load the weights first; discovery alone works without them."
        )


def _changed_state(
    replica: Replica, generator: torch.Generator | None, kept: Collection[str]
) -> dict[str, Tensor]:
    """Return a copy of a private copy's state; with a generator, every floating entry is changed.

    Names of one tensor keep one, and tensors that share memory agree. The change is a positive factor plus a positive
    shift, so that running variances stay positive.
    """
    own = dict(saved_tensors(replica.module))
    if generator is not None:
        changed = {id(own[name]) for name in kept if name in own}
        with torch.no_grad():
            for name, tensor in own.items():
                if id(tensor) not in changed:
                    changed.add(id(tensor))
                    tensor.copy_(_perturbed(tensor.detach().clone(), name, generator))
    copies = {id(tensor): tensor.detach().clone() for tensor in own.values()}
    return {name: copies[id(tensor)] for name, tensor in own.items()}


def _perturbed(values: Tensor, name: str, generator: torch.Generator) -> Tensor:
    """Change every entry at random, and enlarge weights so small that a deep network would not feel them."""
    if not values.is_floating_point() or values.numel() == 0 or not bool(torch.isfinite(values).all()):
        return values
    factor, largest = perturbation(values.shape, float(values.square().mean().sqrt()), name)
    noise = torch.rand(values.shape, generator=generator, dtype=torch.float64).to(values.device)
    shift = torch.rand(values.shape, generator=generator, dtype=torch.float64).to(values.device)
    return values * factor * (0.75 + 0.5 * noise) + largest * shift


def perturbation(shape: Sequence[int], size: float, name: str) -> tuple[float, float]:
    """Return by what a tensor is multiplied so that a deep network feels it, and the largest shift of its entries.

    Matrices and kernels get at least the scale ``1 / √fan-in``, gains at least 1; other vectors get a shift of at
    least 0.02 per entry.

    Args:
        shape: of the tensor, not empty.
        size: root mean square of its entries.
        name: of the parameter; the last part says whether it is a gain.
    """
    gain = len(shape) == 1 and name.endswith(_GAINS)
    least = (shape[0] / math.prod(shape)) ** 0.5 if len(shape) > 1 else 1.0 if gain else 0.2
    scale = max(size, least)
    return scale / size if (len(shape) > 1 or gain) and size > 0 else 1.0, 0.1 * scale


def noisy_input(value: Any, generator: torch.Generator) -> Any:
    """Return an input; if it is floating and the same everywhere (zeros, ones), with noise on every entry."""
    if not isinstance(value, Tensor) or not value.is_floating_point() or value.numel() < 2:
        return value
    if not bool((value == value.reshape(-1)[0]).all()):
        return value
    return value + 0.5 * torch.rand(value.shape, generator=generator, dtype=torch.float64).to(value.device)


def output_change(reference: Tensor, moved: Tensor) -> float:
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
