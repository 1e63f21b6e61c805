"""Folding a network: norms into the layers around them, proven by running it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from isthmus.errors import ModelError, VerificationError
from isthmus.folding._batch_norms import BatchFold
from isthmus.folding._edits import Edits
from isthmus.folding._gains import NormFold
from isthmus.folding._means import MeanFold
from isthmus.folding._plan import PARTS, FoldPlan, edited, plan_folds
from isthmus.folding._prepare import untied, with_biases
from isthmus.folding._uses import Refusal
from isthmus.replica import private_copy, with_state
from isthmus.states import (
    State,
    check_finite,
    check_same_architecture,
    state_of,
    widest_dtype,
    with_tied,
    with_versions_of,
)
from isthmus.symmetry import EditChange, Outputs, edit_change, trace

__all__ = ["Folded", "fold", "prepared"]

_MOST_PASSES = 4


@dataclass(frozen=True, eq=False)
class Folded:
    """A folded state, what was folded, and what stayed.

    Attributes:
        state: the new tensors by name, in the dtypes and on the devices of the source. Those that did not change are
            the source's.
        folds: what was folded; printed, one line each.
        refusals: what stays as it was, and why.
        untied: names of tensors that were tied to others and are now their own.
        added_biases: names of biases that were added to layers without.
        folded_gains: names of gains that are now exactly one (exactly zero where code multiplies by ``1 + weight``).
        folded_biases: names of norms' biases that are now exactly zero.
        centred: names of tensors whose mean over the channels of a stream is now zero.
        proof: how far the same folds move the outputs of a copy whose weights were all changed at random, in float64.
        change: likewise from the network's own weights to the state as it is returned, rounded to its dtypes, no unit;
            NaN if nothing was run.
        original: tensors of the norms as they were, for :meth:`unfold`.
        plan: the folds that the network allows, for other states of it.
    """

    state: State
    folds: tuple[BatchFold | NormFold | MeanFold, ...]
    refusals: tuple[Refusal, ...]
    untied: tuple[str, ...]
    added_biases: tuple[str, ...]
    folded_gains: tuple[str, ...]
    folded_biases: tuple[str, ...]
    centred: tuple[str, ...]
    proof: EditChange
    change: float
    original: Mapping[str, Tensor]
    plan: FoldPlan
    _model: nn.Module = field(repr=False)

    def network(self, state: Mapping[str, Tensor] | None = None) -> nn.Module:
        """Return a copy of the network that holds the folded state, or another state of it.

        It is what the state loads into: with its own head, where that was untied, and with added biases.
        """
        return with_state(self._model, self.state if state is None else state)

    def unfold(self, state: Mapping[str, Tensor] | None = None) -> State:
        """Return a state with gains, biases and BatchNorms put back as they were in this network.

        The function stays the same for any state of the folded network in the same labels, also one that was trained
        or merged since: what its norms hold by now is kept, in front of what is put back. Means that were taken out
        of a stream, untied heads and added biases stay: no LayerNorm sees a difference.

        Args:
            state: default: the folded state.

        Raises:
            SymmetryError: a gain had zeros, so that what its readers had there is gone.
        """
        source = self.state if state is None else state
        norms = [f for f in self.folds if isinstance(f, NormFold)]
        batch = [f for f in self.folds if isinstance(f, BatchFold)]
        steps = [
            *(step for f in norms for step in f.inverse_gain_steps(self.original)),
            *(step for f in norms for step in f.inverse_bias_steps(self.original)),
            *(step for f in batch for step in f.inverse_steps(self.original)),
        ]
        return edited(source, Edits(steps), self.plan.aliases)

    @property
    def error(self) -> float:
        """Largest change of an output, relative to its largest entry, in the proof; NaN if nothing was run."""
        return self.proof.largest

    def __str__(self) -> str:
        """Return what was folded and what was not, one line each."""
        lines = [str(f) for f in self.folds]
        lines += [
            f"untied: {name} has a tensor of its own, so code must not tie it again" for name in self.untied
        ]
        lines += [f"added: {name}" for name in self.added_biases]
        lines += [str(r) for r in self.refusals]
        if self.error == self.error:
            lines.append(
                f"function preserved: largest relative error {self.error:.2e} with changed weights in float64 "
                f"(tolerance {self.proof.tolerance:.0e}), {self.change:.2e} with its own, as they are stored"
            )
        return "\n".join(lines)


def fold(
    model: nn.Module,
    args: Any = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    state: Mapping[str, Tensor] | None = None,
    outputs: Outputs = None,
    parts: Collection[str] = PARTS,
    untie: bool = False,
    add_biases: bool = False,
    check: bool = True,
    generator: torch.Generator | None = None,
) -> Folded:
    r"""Fold norms into the layers around them, which changes no function and makes more symmetries usable.

    - *gains* of LayerNorm, RMSNorm (native, or written out as in model code), GroupNorm and InstanceNorm go into the
      layers that read the norm, :math:`W' = W \operatorname{diag}(\gamma)`, and are 1 from then on;
    - *biases* of these norms go into the biases of the same layers, :math:`b' = b + W \beta`, and are 0;
    - *means*: where all that reads a stream is a LayerNorm, which subtracts the mean over the channels, the mean goes
      out of what writes the stream (embeddings, positions, output projections and their biases);
    - *BatchNorms* go into the layer before them, with the statistics of evaluation.

    A fold is made only where every reader (or writer) is on a list of operators that are known to be linear, reached
    through operators that move entries; all else stays, and is named with the reason. The result is proven by running
    the network before and after.

    Args:
        model: the network, in evaluation mode; not changed.
        args: example positional inputs (a tensor is one argument).
        kwargs: example keyword inputs.
        state: the tensors to fold; default: the network's own.
        outputs: which outputs must be preserved; default: all.
        parts: what is folded, some of ``"batch-norms"``, ``"biases"``, ``"gains"`` and ``"means"``.
        untie: give a head of its own, where it shares the embedding's tensor, if a fold needs that.
        add_biases: give layers of PyTorch without a bias one, if a fold needs that.
        check: run the network before and after, with its own weights and with changed ones.
        generator: source of the change; default: seed 0.

    Returns:
        The new state, what was folded and what stayed. Print it to read it.

    Raises:
        ModelError: the model cannot be traced, is in training mode, random, or fails on the inputs.
        SymmetryError: ``outputs`` names nothing the model returns.
        DataError: an unknown part.
        CheckpointError: the state is not one of the network, or holds NaN or infinite values.
        VerificationError: a fold changes the function.

    Example:
        >>> import torch, isthmus
        >>> net = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.LayerNorm(8), torch.nn.Linear(8, 2)).eval()
        >>> torch.nn.init.normal_(net[1].weight), torch.nn.init.normal_(net[1].bias)  # doctest: +ELLIPSIS
        (...)
        >>> folded = isthmus.fold(net, torch.zeros(1, 3))
        >>> folded.folded_gains, folded.folded_biases, folded.centred
        (('1.weight',), ('1.bias',), ('0.weight', '0.bias'))
        >>> x = torch.randn(5, 3)
        >>> bool((folded.network()(x) - net(x)).abs().max() < 1e-5)
        True

    Source:
        Ashkboos et al. 2024, "LayerNorm transformers can be converted to RMSNorm" (gains and means of LayerNorm). Ours
        reads the graph, so it needs no list of architectures, and folds biases, other norms and BatchNorm as well.
    """
    args = (args,) if isinstance(args, Tensor) else tuple(args)
    kwargs = dict(kwargs or {})
    if not isinstance(model, nn.Module):
        raise ModelError(
            f"fold: expected a torch.nn.Module first, found {type(model).__name__}. Give the network whose state "
            "it is, and the tensors as state=.... With a trace alone: isthmus.folding.plan_folds(trace).apply(state)."
        )
    holding = model if state is None else _holding(model, state)
    own, plan, apart, added = prepared(
        holding, args, kwargs, outputs=outputs, parts=parts, untie=untie, add_biases=add_biases
    )
    whole = state_of(own)
    check_finite(whole, type(model).__name__)
    source = (
        whole if state is None else with_versions_of(state, {n: state.get(n, t) for n, t in whole.items()})
    )
    plan = plan.fitting(source)
    folded = plan.apply(source)
    nothing = EditChange(float("nan"), float("nan"), torch.float64)
    return Folded(
        state=folded,
        folds=plan.folds,
        refusals=plan.refusals,
        untied=apart,
        added_biases=added,
        folded_gains=plan.gains_at_one(folded),
        folded_biases=plan.biases_at_zero(folded),
        centred=plan.centred,
        proof=_proven(plan, own, args, kwargs, outputs, generator) if check else nothing,
        change=edit_change(lambda _: folded, own, args, kwargs, outputs=outputs).largest
        if check
        else nothing.largest,
        original={name: plan.named(source)[name].clone() for f in plan.folds for name in f.own},
        plan=plan,
        _model=own,
    )


def _holding(model: nn.Module, state: Mapping[str, Tensor]) -> nn.Module:
    """Return a copy of a network that holds a state, in the widest of its dtypes."""
    own = state_of(model)
    given, _ = with_tied(state_of(state, "the state"), own)
    check_same_architecture(own, given, "the model", "the state")
    check_finite(given, "the state")
    dtype = widest_dtype(given)
    return with_state(private_copy(model, lambda _: dtype), given)


def prepared(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    *,
    outputs: Outputs = None,
    parts: Collection[str] = PARTS,
    untie: bool = False,
    add_biases: bool = False,
) -> tuple[nn.Module, FoldPlan, tuple[str, ...], tuple[str, ...]]:
    """Return a network that allows as many folds as may be, and its plan.

    Args:
        model: the network; not changed. It is returned as it is where nothing has to be added.
        args: example positional inputs.
        kwargs: example keyword inputs.
        outputs: which outputs must be preserved.
        parts: what is folded.
        untie: whether tied tensors may be taken apart.
        add_biases: whether layers may get a bias.

    Returns:
        The network, the plan, names of tensors that were tied to others, and of biases that were added.
    """
    apart, added = list[str](), list[str]()
    plan = plan_folds(trace(model, args, kwargs), outputs=outputs, parts=parts)
    for _ in range(_MOST_PASSES):
        names = [name for name in plan.tied if untie and name not in apart]
        wanted = [name for name in plan.lacking if add_biases]
        model, done = untied(model, names) if names else (model, ())
        model, more = with_biases(model, wanted) if wanted else (model, ())
        if not done and not more:
            break
        apart += done
        added += more
        plan = plan_folds(trace(model, args, kwargs), outputs=outputs, parts=parts)
    return model, plan, tuple(apart), tuple(added)


def _proven(
    plan: FoldPlan,
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    outputs: Outputs,
    generator: torch.Generator | None,
) -> EditChange:
    """Return how far the folds change the outputs of a network with other weights.

    Raises:
        VerificationError: by more than rounding; the folds that do so alone are named.
    """

    def measured(part: FoldPlan) -> EditChange:
        source = torch.Generator().manual_seed(0)
        if generator is not None:
            source.set_state(start)
        return edit_change(part.apply, model, args, kwargs, outputs=outputs, generator=source)

    start = torch.Generator().get_state() if generator is None else generator.get_state()
    found = measured(plan)
    if not found.passed:
        guilty = [str(f) for f in plan.folds if not measured(plan.only(f)).passed]
        raise VerificationError(
            f"Folding changes the function of {type(model).__name__}: relative error {found.largest:.3g}, at most "
            f"{found.tolerance:.0e} allowed. Guilty: {'; '.join(guilty) or 'no single fold, only several together'}. "
            "Leave that out with parts=..., and report it: it is a fault of Isthmus."
        )
    return found
