"""Weight matching of stored networks: a few tensors of both in memory, never the networks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from isthmus.folding import plan_folds
from isthmus.matching import Alignment, OnStage, Problem, Schedule, Symmetry, solve
from isthmus.pretrained._open import OpenedModel
from isthmus.pretrained._verify import function_change, verify
from isthmus.states import check_finite, check_same_architecture
from isthmus.symmetry import Couplings, SymmetrySpec, Trace, Verification

__all__ = ["StoredProblem", "align", "discover_pair", "fold_first"]


class StoredProblem(Problem):
    """Two model folders of one architecture whose tensors are read when they are needed.

    ``isthmus.matching.solve(StoredProblem(a, b), method)`` matches them by any method that compares weights.

    Args:
        model_a: network A.
        model_b: network B, which moves towards A.
        spec: the symmetries; default: discovered (see :meth:`OpenedModel.discover`).
        outputs: outputs that must be preserved, for the discovery.
        seed: of all randomness.
        symmetry: what may act on units (see :func:`isthmus.align`).

    Raises:
        CheckpointError: other architectures, or NaN or infinite weights.
        ShapeError: other sizes.
        DataError: an unknown class of symmetries.
    """

    def __init__(
        self,
        model_a: OpenedModel,
        model_b: OpenedModel,
        *,
        spec: SymmetrySpec | None = None,
        outputs: Any = None,
        seed: int = 0,
        symmetry: Symmetry = "permutations",
    ) -> None:
        self.opened_a, self.opened_b = model_a, model_b
        super().__init__(
            model_a.model,
            model_b.model,
            args=model_a.example.args,
            kwargs=model_a.example.kwargs,
            spec=spec,
            outputs=outputs,
            seed=seed,
            symmetry=symmetry,
        )

    def _admitted(
        self, other: nn.Module | Mapping[str, Tensor] | None
    ) -> tuple[Mapping[str, Tensor], Mapping[str, Tensor]]:
        a, b = self.opened_a, self.opened_b
        check_same_architecture(a.state.shapes(), b.state.shapes(), str(a.path), str(b.path))
        a.check_ties(b)
        for opened in (a, b):
            check_finite(opened.state, str(opened.path))
        return a.state, b.state

    @cached_property
    def traced(self) -> Trace:
        """The architecture as a graph, on the meta device."""
        return self.opened_a.traced

    @cached_property
    def spec(self) -> SymmetrySpec:
        """The symmetries: those given, else those discovered."""
        if self._given_spec is not None:
            return self._given_spec
        if self.symmetry == "permutations":
            return self.opened_a.discover(self.outputs)
        return discover_pair(self.opened_a, self.opened_b, self.outputs)

    @cached_property
    def verification(self) -> Verification:
        """The result of running A under random relabellings, side by side.

        Raises:
            VerificationError: the spec changes the function of A.
            ModelError: the network cannot be run.
        """
        source = torch.Generator().manual_seed(self.seed)
        found = verify(
            self.spec,
            self.opened_a,
            outputs=self.outputs,
            generator=source,
            symmetry="permutations" if self.permutes else "all",
        ).require()
        self._drawn = source.get_state()
        return found

    def function_change(self, at: Couplings) -> float:
        """Return how far relabelling B moves its outputs, no unit."""
        other = self.opened_b.in_graph_of(self.opened_a)
        return function_change(self.spec, at, other, outputs=self.outputs)


def align(
    model_a: OpenedModel,
    model_b: OpenedModel,
    *,
    spec: SymmetrySpec | None = None,
    outputs: Any = None,
    schedule: Schedule | None = None,
    symmetry: Symmetry = "permutations",
    check: bool = True,
    seed: int = 0,
    on_stage: OnStage | None = None,
) -> Alignment:
    """Find the relabelling of B that brings its weights close to A's, reading tensors as they are needed.

    It is ``method="weights"`` of :func:`isthmus.align`. Methods that compare activations run the networks: use
    ``isthmus.align(a.load(), b.load(), ...)``.

    Args:
        model_a: network A.
        model_b: network B, which moves towards A.
        spec: the symmetries; default: discovered (see :meth:`OpenedModel.discover`).
        outputs: outputs that must be preserved, for the discovery.
        schedule: order of matching; default: a single pass, then coordinate descent until nothing improves.
        symmetry: what may act on units (see :func:`isthmus.align`). Larger classes than permutations look whether
            gains and biases of norms are ones and zeros in both networks, as :func:`isthmus.pretrained.fold` leaves
            them; streams then allow rotations.
        check: verify the spec before using it, and measure how far the result changes B's outputs.
        seed: of the verification, and of random orders.
        on_stage: told what begins, and how many of how many steps are done.

    Raises:
        CheckpointError: other architectures, or NaN or infinite weights.
        ShapeError: other sizes.
        VerificationError: the spec changes the function of A.
        ModelError: the network cannot be traced or run.
        DataError: an unknown class of symmetries.

    Source:
        Ainsworth, Hayase and Srinivasa 2023, section 3.2, for permutations; for larger classes see
        :class:`isthmus.matching.Procrustes` and its siblings.
    """
    problem = StoredProblem(model_a, model_b, spec=spec, outputs=outputs, seed=seed, symmetry=symmetry)
    found = solve(problem, "weights", schedule=schedule, check=check, on_stage=on_stage)
    if symmetry == "permutations":
        return found
    advice = () if spec is not None else fold_first(model_a, model_b, outputs)
    return replace(found, notes=(*found.notes, *advice)) if advice else found


def discover_pair(model_a: OpenedModel, model_b: OpenedModel, outputs: Any = None) -> SymmetrySpec:
    """Find the symmetries of two networks whose gains and biases of norms may be folded in both.

    What holds nothing but ones, or nothing but zeros, in one network alone is not taken to be so: the alignment, and
    the average, are of both.
    """
    both = [
        [name for name in of_a if name in set(of_b)]
        for of_a, of_b in zip(model_a.constants(), model_b.constants(), strict=True)
    ]
    return model_a.discover(outputs, ones=both[0], zeros=both[1])


def fold_first(model_a: OpenedModel, model_b: OpenedModel, outputs: Any = None) -> tuple[str, ...]:
    """Return the advice to fold networks before they are aligned by more than permutations, if that would help."""
    wanted = "logits" if outputs is None and "logits" in model_a.traced.outputs else outputs
    plan = plan_folds(model_a.traced, outputs=wanted, parts=("gains",))
    done = set(plan.gains_at_one(model_a.state)) & set(plan.gains_at_one(model_b.state))
    own = [f.name for f in plan.norms if f.gain is not None and f.gain.name not in done]
    own += [refusal.name for refusal in plan.refusals if refusal.apart]
    if not own:
        return ()
    untie = " --untie" if plan.tied else ""
    return (
        f"{len(own)} norms have gains of their own ({own[0]} among them), which let a stream be permuted and no more. "
        f"Fold both folders first (isthmus fold FOLDER --out FOLDER-folded{untie}) and align those: then their streams "
        "can be rotated.",
    )
