"""Problems: two networks of one architecture and, if need be, data, with all that methods ask about them.

Everything is found when it is first asked for, and then kept: the trace (one export), the symmetries, their
verification, the sites, and the statistics. What several methods need is collected in one pass over the data.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor, nn

from isthmus.batches import Batch, Batches, device_of, first_batch, reusable
from isthmus.errors import DataError
from isthmus.evaluation import require_evaluation
from isthmus.layers import find_sites, tensors_met
from isthmus.losses import completed_batches
from isthmus.matching._classes import Symmetry, classes_of, spec_for
from isthmus.matching._grids import Cluster
from isthmus.matching._layers import Layers
from isthmus.matching._seen import Seen, seen_units
from isthmus.matching._terms import LayeredPair
from isthmus.moments import (
    CrossMoment,
    CrossRequest,
    Frame,
    InputRequest,
    InputStatistics,
    Moment,
    OutputMomentRequest,
    OutputProjections,
    Request,
    SiteRunner,
    SlopeRequest,
    Tap,
    UnitRequest,
    collected,
)
from isthmus.replica import require_same_code, with_state
from isthmus.states import check_finite, check_same_architecture, state_of
from isthmus.symmetry import (
    Acts,
    Couplings,
    Outputs,
    SymmetrySpec,
    Trace,
    Verification,
    discover_from_trace,
    function_change,
    named_outputs,
    trace,
    verify,
)

__all__ = ["Problem", "example_of", "no_data"]

SlopesOf = Literal["slopes", "contributions"]
PROJECTIONS = 1
"""Random projections of the outputs on each batch."""
_EXAMPLES = 4
"""Examples of the first batch that discovery and verification run on."""


class Problem:
    """Two networks of one architecture, and data: the input gate, and what is known about the pair.

    Args:
        model_a: network A, in evaluation mode; not mutated.
        model_b: network B, or its state; not mutated. Default: A itself, for what is asked of one network.
        batches: data (see :mod:`isthmus.batches`).
        args: example positional inputs for discovery and verification; default: the start of the first batch.
        kwargs: example keyword inputs.
        spec: the symmetries; default: discovered.
        outputs: outputs that must be preserved (see :func:`isthmus.discover`).
        seed: of all randomness.
        symmetry: what may act on units: ``"permutations"``, ``"all"`` that the groups allow, or the largest classes
            that are wanted, by their names in :class:`isthmus.symmetry.Acts`. Default: what each method says, which
            is permutations but where its name asks for more.

    Attributes:
        model_a: network A.
        model_b: network B or its state.
        state_a: tensors of A.
        state_b: tensors of B.
        data: the batches, reusable; None without data.
        example: example inputs.
        outputs: outputs that must be preserved.
        seed: as given.
        symmetry: as given, permutations by default.

    Raises:
        DataError: neither data nor example inputs, or an unknown class of symmetries.
        ModelError: a model is in training mode.
        CheckpointError: different architectures, NaN or infinite weights.
    """

    def __init__(
        self,
        model_a: nn.Module,
        model_b: nn.Module | Mapping[str, Tensor] | None = None,
        *,
        batches: Batches | None = None,
        args: Any = None,
        kwargs: Mapping[str, Any] | None = None,
        spec: SymmetrySpec | None = None,
        outputs: Outputs = None,
        seed: int = 0,
        symmetry: Symmetry | None = None,
    ) -> None:
        self.model_a = model_a
        self.model_b = model_a if model_b is None else model_b
        self.state_a, self.state_b = self._admitted(None if model_b is None else self.model_b)
        self.data = None if batches is None else reusable(completed_batches(model_a, batches))
        self.example = example_of(args, kwargs, self.data, model_a)
        self.outputs, self.seed = outputs, seed
        self._open = symmetry is None
        wanted = "permutations" if symmetry is None else symmetry
        self.symmetry = wanted if isinstance(wanted, str) else tuple(wanted)
        classes_of(SymmetrySpec({}), self.symmetry)  # unknown names are refused before anything is traced
        self._given_spec = spec
        self._drawn: torch.Tensor | None = None
        self._kept: dict[str, Any] = {}

    def _admitted(
        self, other: nn.Module | Mapping[str, Tensor] | None
    ) -> tuple[Mapping[str, Tensor], Mapping[str, Tensor]]:
        """Return the states of A and of the other network, or A's twice, once they have passed the gate."""
        names = ("The network",) if other is None else ("A", "B")
        require_evaluation(self.model_a, names[0] if other is None else "Network A")
        if isinstance(other, nn.Module):
            require_evaluation(other, "Network B")
        own = state_of(self.model_a, names[0])
        states = (own, own if other is None else state_of(other, "B"))
        if other is not None:
            check_same_architecture(*states)
        for name, state in zip(names, states, strict=False):
            check_finite(state, name)
        return states

    @cached_property
    def traced(self) -> Trace:
        """The architecture as a graph.

        Raises:
            ModelError: it cannot be traced.
        """
        return trace(self.model_a, self.example.args, self.example.kwargs)

    @cached_property
    def spec(self) -> SymmetrySpec:
        """The symmetries: those given, else those discovered."""
        given = self._given_spec
        found = discover_from_trace(self.traced, outputs=self.outputs) if given is None else given
        return spec_for(found, self.symmetry)

    @cached_property
    def classes(self) -> Mapping[str, Acts]:
        """The class of couplings that each group is matched by."""
        return classes_of(self.spec, self.symmetry)

    def under(self, symmetry: Symmetry) -> Problem:
        """Return this problem matched by other classes; what was traced and collected is shared, not found again.

        Raises:
            DataError: an unknown class.
        """
        return self._view(symmetry if isinstance(symmetry, str) else tuple(symmetry))

    def _view(self, symmetry: str | tuple[str, ...]) -> Problem:
        """Return this problem under a wish with all that was found out; planes change groups, and much with them."""
        spec = spec_for(self.spec, symmetry)
        found = copy.copy(self)
        found.symmetry, found._open = symmetry, False
        found.__dict__ |= {
            "spec": spec,
            "classes": classes_of(spec, symmetry),
        }  # the copy has what was cached
        stale = (
            {"verification"} if self.permutes and not found.permutes else set[str]()
        )  # larger ones are untried
        if spec.groups.keys() != self.spec.groups.keys():
            found._kept = {}
            stale |= {"layers", "pair", "seen", "verification"}
        for name in stale:
            found.__dict__.pop(name, None)
        return found

    def wanting(self, symmetry: Symmetry | None) -> Problem:
        """Return the same problem with another wish for what may act on units, if it was not given one itself.

        The two share all that has been found out about the pair, or will be.

        Args:
            symmetry: as for the constructor; ``None`` leaves the problem as it is.
        """
        if not self._open or symmetry is None or symmetry == self.symmetry:
            return self
        views: dict[Any, Problem] = self._kept.setdefault("problems", {})
        key = symmetry if isinstance(symmetry, str) else tuple(symmetry)
        if key not in views:
            _ = self.spec, self.pair  # found once, for both
            found = self._view(key)
            found._drawn = None
            views[key] = found
        return views[key]

    @property
    def permutes(self) -> bool:
        """Whether all groups are permuted, and no more."""
        return all(acts is Acts.PERMUTATION for acts in self.classes.values())

    @cached_property
    def verification(self) -> Verification:
        """The result of running A under random relabellings; B's code is compared with A's too.

        Raises:
            VerificationError: the spec changes the function of A.
            ModelError: A is random, or B computes something else than its tensors do in A's code.
        """
        source = torch.Generator().manual_seed(self.seed)
        args, kwargs = self.example.args, self.example.kwargs
        found = verify(
            self.spec,
            self.model_a,
            args,
            kwargs,
            outputs=self.outputs,
            generator=source,
            symmetry="permutations" if self.permutes else "all",
        ).require()
        if isinstance(self.model_b, nn.Module) and self.model_b is not self.model_a:
            require_same_code(self.model_a, self.model_b, args, kwargs)
        self._drawn = source.get_state()
        return found

    def generator(self) -> torch.Generator:
        """Return a source of randomness for one method: the same for every method, whatever ran before it."""
        found = torch.Generator().manual_seed(self.seed)
        return found if self._drawn is None else found.set_state(self._drawn)

    @cached_property
    def layers(self) -> Layers:
        """The sites of the architecture, and which groups act on them."""
        parameters = tuple(name for name, _ in self.model_a.named_parameters())
        return Layers(self.spec, find_sites(self.traced), parameters, tensors_met(self.traced))

    @cached_property
    def pair(self) -> LayeredPair:
        """The layers and both states, as objectives compare them."""
        return LayeredPair(self.layers, self.state_a, self.state_b)

    @cached_property
    def runner(self) -> SiteRunner:
        """The architecture, ready to be run on the data and watched at its sites.

        Raises:
            DataError: there are no data.
        """
        return SiteRunner(self.model_a, first_batch(self.batches))

    @cached_property
    def seen(self) -> Seen:
        """The views of the units on the data: the places where their activations are seen."""
        sites = tuple(self.runner.sites.values())
        return seen_units(self.layers, sites, self.traced, self.state_a, self.example)

    @property
    def batches(self) -> Batches:
        """The data.

        Raises:
            DataError: there are none.
        """
        if self.data is None:
            raise no_data("this method")
        return self.data

    # --- Statistics --------------------------------------------------------------------------------------------

    def prepare(
        self,
        *,
        inputs: bool = False,
        joint: bool = False,
        units: bool = False,
        of_slopes: Collection[SlopesOf] = (),
        **more: Request,
    ) -> dict[str, Any]:
        """Collect, in one pass over the data, what methods will ask for, unless it is there already.

        Args:
            inputs: second moments of what flows into A's layers.
            joint: joint moments of the units of both networks, where they can be seen.
            units: moments of the units of A.
            of_slopes: which joint moments of the slopes of the outputs by the units of both networks, or of what these
                contribute to them.
            more: further requests, served in the same pass and not kept.

        Returns:
            The results of the further requests by name.
        """
        wanted: dict[str, Request] = {}
        source = self.generator()
        if inputs and "inputs" not in self._kept:
            wanted["inputs"] = InputRequest(self.runner.sites, source)
        if joint and "joint" not in self._kept:
            wanted["joint"] = CrossRequest(self._seen_taps(), self.seen.frame)
        for of in of_slopes:
            if of not in self._kept:
                wanted[of] = SlopeRequest(self._seen_taps(), self._projections(), of, self.seen.frame)
        if units and "units" not in self._kept:
            wanted["units"] = UnitRequest(self.layers.taps())
        requests = [*wanted.values(), *more.values()]
        found = collected(self.runner, self.batches, requests, self.state_a, self.state_b) if requests else []
        self._kept.update(zip(wanted, found, strict=False))
        if "inputs" in wanted:
            self._kept["after inputs"] = source.get_state()
        return dict(zip(more, found[len(wanted) :], strict=True))

    def _seen_taps(self) -> dict[Cluster, list[Tap]]:
        return {c: [v.tap for v in listed] for c, listed in self.seen.views.items() if listed}

    def _projections(self) -> OutputProjections:
        """Return projections of the outputs that must be preserved, or of the one that is scored."""
        source = torch.Generator().manual_seed(self.seed)
        return OutputProjections(source, PROJECTIONS, None if self.outputs is None else self._preserved)

    def _preserved(self, output: Any) -> list[Tensor]:
        chosen = named_outputs(output, Tensor).select(self.outputs)
        return [tensor for tensor in chosen.values() if tensor.is_floating_point()]

    def input_statistics(self, generator: torch.Generator) -> Mapping[str, InputStatistics]:
        """Return second moments of what flows into the layers of A, by site.

        Args:
            generator: a fresh one of :meth:`generator`; advanced by what was drawn to sample wide rows.
        """
        self.prepare(inputs=True)
        generator.set_state(self._kept["after inputs"])
        return self._kept["inputs"]

    def unit_moments(self) -> Mapping[str, list[Moment]]:
        """Return moments of A's units by group, one for each place where they are seen."""
        self.prepare(units=True)
        return self._kept["units"]

    def joint_moments(self) -> Mapping[Cluster, list[CrossMoment]]:
        """Return joint moments of the units of both networks by cluster, one for each view.

        Rows that are units themselves are replaced by their mean: B lists them in another order.
        """
        self.prepare(joint=True)
        return self._kept["joint"]

    def joint_slopes(self, of: SlopesOf = "contributions") -> Mapping[Cluster, list[CrossMoment]]:
        """Return joint moments of slopes or contributions by cluster, one for each view (see :mod:`isthmus.moments`).

        Raises:
            ModelError: the outputs do not depend differentiably on the network's tensors.
        """
        self.prepare(of_slopes=[of])
        return self._kept[of]

    def slopes_of(
        self, taps: Mapping[Cluster, list[Tap]], frame: Frame | None, of: SlopesOf = "contributions"
    ) -> dict[Cluster, list[CrossMoment]]:
        """Return joint moments of slopes or contributions at taps under a relabelling of rows, not kept."""
        request = SlopeRequest(taps, self._projections(), of, frame)
        return collected(self.runner, self.batches, [request], self.state_a, self.state_b)[0]

    def output_moments(self) -> Mapping[str, Moment]:
        """Return second moments of the slopes of the outputs by what comes out of A's layers, by site."""
        if "outputs" not in self._kept:
            request = OutputMomentRequest(list(self.runner.sites), self._projections())
            self._kept["outputs"] = self.prepare(found=request)["found"]
        return self._kept["outputs"]

    def moments_of(
        self, taps: Mapping[Cluster, list[Tap]], frame: Frame | None
    ) -> dict[Cluster, list[CrossMoment]]:
        """Return joint moments at taps under a relabelling of rows: one pass over the data, not kept."""
        return collected(self.runner, self.batches, [CrossRequest(taps, frame)], self.state_a, self.state_b)[
            0
        ]

    # --- Proof -------------------------------------------------------------------------------------------------

    def function_change(self, at: Couplings) -> float:
        """Return how far relabelling B moves its outputs, in float64, no unit."""
        other = with_state(self.model_a, self.state_b)
        args, kwargs = self.example.args, self.example.kwargs
        return function_change(self.spec, at, other, args, kwargs, outputs=self.outputs)


def no_data(who: str) -> DataError:
    """Return the error of a method that needs data where there are none."""
    return DataError(
        f"{who} compares activations: pass batches=..., or use method='weights' (on the command line --data, or "
        "--method weights)."
    )


def example_of(args: Any, kwargs: Mapping[str, Any] | None, data: Batches | None, model: nn.Module) -> Batch:
    """Return example inputs: those given, else the start of the first batch.

    Raises:
        DataError: neither inputs nor data.
    """
    if args is not None or kwargs is not None:
        positional = () if args is None else ((args,) if isinstance(args, Tensor) else tuple(args))
        return Batch(positional, dict(kwargs or {}))
    if data is None:
        raise DataError(
            "align needs example inputs to trace the network: pass batches=... or args=(example input,)."
        )
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), None)
    return first_batch(data).head(_EXAMPLES).to(device_of(model), dtype)
