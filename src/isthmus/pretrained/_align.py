"""Weight matching of stored networks: a few tensors of both in memory, never the networks."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from isthmus.matching import Alignment, OnStage, Problem, Schedule, solve
from isthmus.pretrained._open import OpenedModel
from isthmus.pretrained._verify import function_change, verify
from isthmus.states import check_finite, check_same_architecture
from isthmus.symmetry import Couplings, SymmetrySpec, Trace, Verification

__all__ = ["StoredProblem", "align"]


class StoredProblem(Problem):
    """Two model folders of one architecture whose tensors are read when they are needed.

    ``isthmus.matching.solve(StoredProblem(a, b), method)`` matches them by any method that compares weights.

    Args:
        model_a: network A.
        model_b: network B, which moves towards A.
        spec: the symmetries; default: discovered (see :meth:`OpenedModel.discover`).
        outputs: outputs that must be preserved, for the discovery.
        seed: of all randomness.

    Raises:
        CheckpointError: other architectures, or NaN or infinite weights.
        ShapeError: other sizes.
    """

    def __init__(
        self,
        model_a: OpenedModel,
        model_b: OpenedModel,
        *,
        spec: SymmetrySpec | None = None,
        outputs: Any = None,
        seed: int = 0,
    ) -> None:
        self.opened_a, self.opened_b = model_a, model_b
        args, kwargs = model_a.example.args, model_a.example.kwargs
        super().__init__(
            model_a.model, model_b.model, args=args, kwargs=kwargs, spec=spec, outputs=outputs, seed=seed
        )

    def _admitted(
        self, other: nn.Module | Mapping[str, Tensor] | None
    ) -> tuple[Mapping[str, Tensor], Mapping[str, Tensor]]:
        a, b = self.opened_a, self.opened_b
        check_same_architecture(a.state.shapes(), b.state.shapes(), str(a.path), str(b.path))
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
        given = self._given_spec
        return self.opened_a.discover(self.outputs) if given is None else given

    @cached_property
    def verification(self) -> Verification:
        """The result of running A under random relabellings, side by side.

        Raises:
            VerificationError: the spec changes the function of A.
            ModelError: the network cannot be run.
        """
        source = torch.Generator().manual_seed(self.seed)
        found = verify(
            self.spec, self.opened_a, outputs=self.outputs, generator=source, symmetry="permutations"
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
        check: verify the spec before using it, and measure how far the result changes B's outputs.
        seed: of the verification, and of random orders.
        on_stage: told what begins, and how many of how many steps are done.

    Raises:
        CheckpointError: other architectures, or NaN or infinite weights.
        ShapeError: other sizes.
        VerificationError: the spec changes the function of A.
        ModelError: the network cannot be traced or run.

    Source:
        Ainsworth, Hayase and Srinivasa 2023, section 3.2.
    """
    problem = StoredProblem(model_a, model_b, spec=spec, outputs=outputs, seed=seed)
    return solve(problem, "weights", schedule=schedule, check=check, on_stage=on_stage)
