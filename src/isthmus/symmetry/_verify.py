"""Verification: run the network before and after random relabellings and compare what it returns.

The policy stands here once: which relabellings are tried, how large a change passes, and how the guilty groups are
found. How a network is run, in memory or from its files, is its runner's business (:class:`Runs`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from isthmus.couplings import Coupling, Permutation, invert_permutation, random_permutation
from isthmus.errors import ModelError, SymmetryError, VerificationError
from isthmus.symmetry._apply import Couplings
from isthmus.symmetry._elements import random_element
from isthmus.symmetry._outputs import Outputs
from isthmus.symmetry._runner import Edit, Runner
from isthmus.symmetry._slots import AxisGroup
from isthmus.symmetry._spec import SymmetrySpec

__all__ = [
    "EditChange",
    "Runs",
    "Verification",
    "drawn_elements",
    "drawn_relabellings",
    "edit_change",
    "function_change",
    "verification_of",
    "verified",
    "verify",
]

_TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-3}


@dataclass(frozen=True)
class Verification:
    """What was measured when a spec was tested on its network.

    Attributes:
        max_relative_error: largest ``max|f(θ) − f(πθ)| / max|f(θ)|`` over outputs and draws, no unit.
        tolerance: largest error that passes.
        draws: number of random relabellings, each of all groups together.
        elements: number of random elements of larger classes that were tried as well.
        guilty: groups that alone change the function (empty when the spec passes).
        errors: largest error of each output, by name.
        dtype: the precision of the runs.
        seed: of the generator that drew the relabellings.
    """

    max_relative_error: float
    tolerance: float
    draws: int
    guilty: tuple[str, ...]
    errors: Mapping[str, float]
    dtype: torch.dtype
    seed: int
    elements: int = 0

    @property
    def passed(self) -> bool:
        """Whether the function stayed the same within the tolerance."""
        return self.max_relative_error <= self.tolerance

    def require(self) -> Verification:
        """Return the verification itself if it passed.

        Raises:
            VerificationError: it failed; the message names the guilty groups.
        """
        if not self.passed:
            guilty = ", ".join(self.guilty) if self.guilty else "no single group, only several together"
            raise VerificationError(
                f"The symmetry spec changes the function of the network: relative error "
                f"{self.max_relative_error:.3g}, at most {self.tolerance:.0e} allowed. Guilty: {guilty}. "
                "Correct these groups or remove them with spec.restrict([...])."
            )
        return self

    def __str__(self) -> str:
        """Return one line with the verdict."""
        verdict = "preserved" if self.passed else f"CHANGED by {', '.join(self.guilty) or 'groups together'}"
        more = f" and {self.elements} larger elements" if self.elements else ""
        return (
            f"function {verdict}: largest relative error {self.max_relative_error:.2e} over {self.draws} random "
            f"relabellings{more} in {str(self.dtype).removeprefix('torch.')} (tolerance {self.tolerance:.0e})"
        )


class Runs(Protocol):
    """A network that can be run under relabellings."""

    @property
    def dtype(self) -> torch.dtype:
        """The precision of the runs."""
        ...

    def errors(self, spec: SymmetrySpec, relabellings: Sequence[Couplings]) -> Iterable[Mapping[str, float]]:
        """Return, for each relabelling, the largest relative change of each output."""
        ...


def verify(
    spec: SymmetrySpec,
    model: nn.Module,
    args: Any = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    outputs: Outputs = None,
    generator: torch.Generator | None = None,
    draws: int = 2,
    tolerance: float | None = None,
    symmetry: Literal["permutations", "all"] = "all",
) -> Verification:
    """Relabel a network at random and measure how far its outputs move.

    The weights are perturbed first (every entry of every floating tensor by its own random amount), so that
    nothing passes because norms still have unit gain, zero shift or equal running statistics; inputs that are
    the same everywhere get noise too. Everything is computed in float64, also where the model casts to float32.
    All groups move together; if that fails, each moves alone, and those that fail are named. Then the units of groups
    that more than permutations act on are moved by random elements of their classes: signs, log-normal factors,
    uniformly random rotations, well conditioned matrices.

    Args:
        spec: what is tested.
        model: the network, in evaluation mode; not mutated.
        args: example positional inputs.
        kwargs: example keyword inputs.
        outputs: which outputs must be preserved; default: those of the spec.
        generator: source of randomness; default: seed 0.
        draws: number of random relabellings.
        tolerance: default 1e-10 in float64; 1e-3 for a model that only runs in float32.
        symmetry: ``"permutations"`` tries these alone.

    Returns:
        The measured errors. :meth:`Verification.require` turns a failure into an exception.

    Raises:
        ModelError: the model is in training mode, has no weights (meta device), fails on the inputs, returns
            nothing finite, or two identical runs differ.
        SymmetryError: the spec does not fit the model, or none was given first.
    """
    _check_order(spec, model)
    args = (args,) if isinstance(args, Tensor) else tuple(args)
    source = generator if generator is not None else torch.Generator().manual_seed(0)
    drawn = drawn_relabellings(spec, source, draws)
    wanted, kept = spec.outputs if outputs is None else outputs, (*spec.ones, *spec.zeros)
    runner = Runner(model, args, dict(kwargs or {}), wanted, source, kept)
    return verified(spec, runner, drawn, source, tolerance=tolerance, symmetry=symmetry)


def verified(
    spec: SymmetrySpec,
    runs: Runs,
    drawn: Sequence[Couplings],
    generator: torch.Generator,
    *,
    tolerance: float | None = None,
    symmetry: Literal["permutations", "all"] = "all",
) -> Verification:
    """Return what permutations, and then elements of larger classes, do to a network, however it is run.

    Args:
        spec: what is tested.
        runs: runs the network.
        drawn: permutations of all groups together (see :func:`drawn_relabellings`); as many elements are drawn.
        generator: source of randomness; advanced as by permutations alone.
        tolerance: largest error that passes; default: by the precision of the runs.
        symmetry: ``"permutations"`` tries these alone.
    """
    whole = spec.with_planes()
    if symmetry == "permutations" or not whole.larger:
        return verification_of(spec, runs, drawn, generator, tolerance)
    others = torch.Generator().manual_seed(generator.initial_seed())
    elements = drawn_elements(spec, others, len(drawn))
    measured = list(
        runs.errors(whole, [*drawn, *elements])
    )  # one run over the network's files for all of them
    found = _judged(spec, runs, drawn, measured[: len(drawn)], generator, tolerance)
    if not found.passed:
        return found
    return _joined(found, _judged(whole, runs, elements, measured[len(drawn) :], others, tolerance))


def _joined(permuted: Verification, moved: Verification) -> Verification:
    """Return what was measured under permutations and under larger elements as one."""
    errors = {
        name: max(error, moved.errors.get(name, 0.0))
        for name, error in {**moved.errors, **permuted.errors}.items()
    }
    largest = max(permuted.max_relative_error, moved.max_relative_error)
    return replace(
        permuted, max_relative_error=largest, guilty=moved.guilty, errors=errors, elements=moved.draws
    )


def drawn_relabellings(
    spec: SymmetrySpec, generator: torch.Generator, draws: int = 2
) -> list[dict[str, Tensor]]:
    """Return random relabellings of all groups together: the same for one generator, however the network is run.

    Args:
        spec: the groups.
        generator: source of randomness; advanced.
        draws: how many; at least one is drawn.
    """
    return [
        {
            name: _moving(group.size, generator, draw)
            for name, group in spec.groups.items()
            if not group.planes
        }
        for draw in range(max(draws, 1))
    ]


def drawn_elements(
    spec: SymmetrySpec, generator: torch.Generator, draws: int = 2
) -> list[dict[str, Coupling]]:
    """Return random elements of the whole group of all groups together, each of the class that its group allows.

    Args:
        spec: the groups, with their classes.
        generator: source of randomness; advanced.
        draws: how many; at least one is drawn.
    """
    return [
        {
            name: random_element(group.acts, _moving(group.size, generator, draw), generator, group.planes)
            for name, group in spec.with_planes().groups.items()
        }
        for draw in range(max(draws, 1))
    ]


def verification_of(
    spec: SymmetrySpec,
    runs: Runs,
    drawn: Sequence[Couplings],
    generator: torch.Generator,
    tolerance: float | None = None,
) -> Verification:
    """Return what relabellings do to a network: on failure each group is moved alone, and those that fail are named.

    Args:
        spec: what is tested.
        runs: runs the network.
        drawn: relabellings of all groups together (see :func:`drawn_relabellings`).
        generator: source of randomness for the groups alone; advanced.
        tolerance: largest error that passes; default: by the precision of the runs.
    """
    return _judged(spec, runs, drawn, list(runs.errors(spec, drawn)), generator, tolerance)


def _judged(
    spec: SymmetrySpec,
    runs: Runs,
    drawn: Sequence[Couplings],
    measured: Sequence[Mapping[str, float]],
    generator: torch.Generator,
    tolerance: float | None,
) -> Verification:
    """Return what was measured as a verification, with the guilty groups where it fails."""
    allowed = _TOLERANCES.get(runs.dtype, 1e-1) if tolerance is None else tolerance
    worst: dict[str, float] = {}
    for errors in measured:
        worst = {name: max(worst.get(name, 0.0), error) for name, error in errors.items()}
    largest = max(worst.values(), default=0.0)
    guilty: set[str] = set()
    larger = any(not isinstance(c, Tensor | Permutation) for at in drawn for c in at.values())
    for draw in range(0 if largest <= allowed else 2):
        left = [name for name in spec.groups if name not in guilty]
        alone = [{name: _moved(spec.groups[name], generator, draw, larger=larger)} for name in left]
        found = zip(left, runs.errors(spec, alone), strict=True)
        guilty |= {name for name, errors in found if not max(errors.values(), default=0.0) <= allowed}
    named = tuple(name for name in spec.groups if name in guilty)
    return Verification(largest, allowed, len(drawn), named, worst, runs.dtype, generator.initial_seed())


def _moved(group: AxisGroup, generator: torch.Generator, draw: int, *, larger: bool) -> Tensor | Coupling:
    """Draw what moves one group alone."""
    if group.planes and not larger:
        return torch.arange(group.size)  # its units do not change places
    permutation = _moving(group.size, generator, draw)
    return random_element(group.acts, permutation, generator, group.planes) if larger else permutation


def _check_order(spec: Any, model: Any) -> None:
    order = "The order is verify(spec, model, inputs), where spec = discover(model, inputs)."
    if not isinstance(spec, SymmetrySpec):
        raise SymmetryError(f"verify: expected a SymmetrySpec first, found {type(spec).__name__}. {order}")
    if not isinstance(model, nn.Module):
        raise ModelError(
            f"verify: expected a torch.nn.Module after the spec, found {type(model).__name__}. {order}"
        )


def function_change(
    spec: SymmetrySpec,
    permutations: Couplings,
    model: nn.Module,
    args: Any = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    outputs: Outputs = None,
) -> float:
    """Return how far given relabellings move the outputs of a network with its own weights.

    Args:
        spec: the symmetries.
        permutations: from group name to index tensor or coupling.
        model: the network, in evaluation mode; not mutated.
        args: positional inputs.
        kwargs: keyword inputs.
        outputs: which outputs count; default: those of the spec.

    Returns:
        Largest ``max|f(θ) − f(πθ)| / max|f(θ)|`` over the outputs, run in float64, no unit.

    Raises:
        ModelError: the model fails on the inputs, or two identical runs differ.
    """
    args = (args,) if isinstance(args, Tensor) else tuple(args)
    wanted = spec.outputs if outputs is None else outputs
    runner = Runner(model, args, dict(kwargs or {}), wanted, None)
    (errors,) = runner.errors(spec, [permutations])
    return max(errors.values(), default=0.0)


@dataclass(frozen=True)
class EditChange:
    """How far an edit of a network's state moved its outputs.

    Attributes:
        largest: largest ``max|f(θ) − f(θ')| / max|f(θ)|`` over the outputs, no unit.
        tolerance: largest change that rounding explains.
        dtype: the precision of the runs.
    """

    largest: float
    tolerance: float
    dtype: torch.dtype

    @classmethod
    def of(cls, errors: Mapping[str, float], dtype: torch.dtype) -> EditChange:
        """Return the largest of the changes of several outputs, with the tolerance of a precision."""
        return cls(max(errors.values(), default=0.0), _TOLERANCES.get(dtype, 1e-1), dtype)

    @property
    def passed(self) -> bool:
        """Whether the function stayed the same within the tolerance."""
        return self.largest <= self.tolerance


def edit_change(
    edit: Edit,
    model: nn.Module,
    args: Any = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    outputs: Outputs = None,
    generator: torch.Generator | None = None,
) -> EditChange:
    """Return how far an edit of the state moves the outputs of a network.

    Args:
        edit: from a state to a state of the same names and shapes; what is tied must stay tied.
        model: the network, in evaluation mode; not mutated.
        args: positional inputs.
        kwargs: keyword inputs.
        outputs: which outputs count; default: all.
        generator: with one, every weight is changed at random first, as in :func:`verify`.

    Raises:
        ModelError: the model fails on the inputs, or two identical runs differ.
    """
    args = (args,) if isinstance(args, Tensor) else tuple(args)
    runner = Runner(model, args, dict(kwargs or {}), outputs, generator)
    return EditChange.of(runner.errors_of(edit), runner.dtype)


def _moving(size: int, generator: torch.Generator, draw: int) -> Tensor:
    """Draw a permutation: in even draws a single cycle, which moves every unit; else any but the identity.

    Few units may be alive on the example inputs, so all should move; but with three units cycles are rotations.
    """
    drawn = random_permutation(size, generator)
    if draw % 2 == 0:
        return drawn.roll(1)[invert_permutation(drawn)]
    return drawn.roll(1) if torch.equal(drawn, torch.arange(size)) else drawn
