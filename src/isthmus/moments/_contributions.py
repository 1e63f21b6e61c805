r"""What units do to the outputs: slopes of the outputs by every unit, and contributions, unit times slope.

The outputs :math:`f` of an example are projected on a random vector :math:`v` of independent standard normal entries,
the same for both networks. One pass backwards gives :math:`s_u = \partial (v^\top f) / \partial h_u` for every unit
:math:`u` that is seen anywhere, and averages of products of two slopes are averages of
:math:`\sum_c \partial f_c/\partial h_u\, \partial f_c/\partial h_{u'}` over all outputs :math:`c`. The Jacobian is
never formed. Unlike gradients of the loss, they do not vanish where training ends. The contribution :math:`h_u s_u` of
a unit is what the outputs lose, to first order, if the unit falls silent.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from isthmus.batches import Batch
from isthmus.errors import DataError, ModelError
from isthmus.layers import Site
from isthmus.losses import outputs_to_score
from isthmus.moments._accumulators import Moment
from isthmus.moments._blocks import Stream
from isthmus.moments._collect import CrossRequest
from isthmus.moments._rows import Frame, Tap
from isthmus.moments._runner import SiteRunner

__all__ = ["OutputMomentRequest", "OutputProjections", "SlopeRequest"]

ReadOutputs = Callable[[Any], Sequence[Tensor]]


class OutputProjections:
    """Random projections of a network's outputs, the same for both networks on every batch.

    Args:
        generator: draws them; on the CPU.
        count: how many for each batch. One is enough where there are thousands of examples.
        read: from all that a network returns to the floating tensors that count; default: the one that is scored.

    Raises:
        DataError: less than one projection.
    """

    def __init__(self, generator: torch.Generator, count: int = 1, read: ReadOutputs | None = None) -> None:
        if count < 1:
            raise DataError(f"Projecting outputs: expected at least one projection, found {count}.")
        self._generator, self._count = generator, count
        self._read: ReadOutputs = (lambda output: [outputs_to_score(output)]) if read is None else read
        self._drawn: list[list[Tensor]] | None = None

    def start(self) -> None:
        """Forget the projections of the last batch."""
        self._drawn = None

    def slopes(self, output: Any, by: Sequence[Tensor]) -> list[list[Tensor]]:
        """Return, by projection, its derivatives by tensors that the output was computed from; zero where by none.

        Raises:
            ModelError: no derivative leads from the outputs to the network's tensors.
        """
        read = list(self._read(output))
        if not any(tensor.requires_grad for tensor in read):
            raise ModelError(
                "Slopes of the outputs: the outputs do not depend differentiably on the network's tensors (they are "
                "rounded, ranked or computed without gradients). Use a method that compares weights or activations."
            )
        if self._drawn is None:
            self._drawn = [[self._draw(tensor) for tensor in read] for _ in range(self._count)]
        moving = [k for k, tensor in enumerate(by) if tensor.requires_grad]
        found: list[list[Tensor]] = []
        for vectors in self._drawn:
            whole = torch.stack([(t * v.to(t)).sum().double() for t, v in zip(read, vectors, strict=True)])
            gradients = torch.autograd.grad(
                whole.sum(), [by[k] for k in moving], retain_graph=True, allow_unused=True
            )
            slopes = [torch.zeros_like(tensor) for tensor in by]
            for k, gradient in zip(moving, gradients, strict=True):
                slopes[k] = slopes[k] if gradient is None else gradient
            found.append(slopes)
        return found

    def _draw(self, like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=self._generator, dtype=torch.float32)


class SlopeRequest(CrossRequest):
    """Joint moments of slopes, or of contributions, of the units of both networks at taps.

    Args:
        taps: what is looked at, by any key.
        projections: of the outputs.
        of: ``"slopes"`` or ``"contributions"``.
        frame: how B's rows are brought into A's order (see :func:`cross_moments`).
    """

    def __init__(
        self,
        taps: Mapping[Any, Sequence[Tap]],
        projections: OutputProjections,
        of: Literal["slopes", "contributions"] = "contributions",
        frame: Frame | None = None,
    ) -> None:
        super().__init__(taps, frame)
        self._projections, self._of = projections, of
        self._watched: dict[tuple[str, bool], tuple[Site, Tensor]] = {}
        self._places = {(tap.site, tap.inflow) for listed in taps.values() for tap in listed}

    def start(self, runner: SiteRunner, state_a: Mapping[str, Tensor], batch: Batch) -> None:
        """Begin a batch."""
        super().start(runner, state_a, batch)
        self._projections.start()

    def see(self, site: Site, activation: Tensor, *, inflow: bool, of_b: bool) -> None:
        """Keep a value that is to be differentiated by."""
        if (site.name, inflow) in self._places:
            self._watched[site.name, inflow] = (site, activation)

    def finish(self, output: Any, *, of_b: bool) -> None:
        """Add the rows of a network that has been run."""
        places, values = list(self._watched), [value for _, value in self._watched.values()]
        parts: dict[Tap, list[Tensor]] = {}
        for slopes in self._projections.slopes(output, values):
            for place, value, slope in zip(places, values, slopes, strict=True):
                site = self._watched[place][0]
                wide = slope.to(torch.promote_types(slope.dtype, torch.float32))
                seen = wide * value.detach() if self._of == "contributions" else wide
                super().see(site, seen, inflow=place[1], of_b=of_b)
            for tap, rows in self._seen[of_b].items():
                parts.setdefault(tap, []).append(rows)
        self._seen[of_b].update({tap: torch.cat(rows) for tap, rows in parts.items()})
        self._watched = {}


class OutputMomentRequest:
    r"""Second moments of the slopes by what comes out of sites of A: :math:`\mathbb E[J^\top J]` over outputs and rows.

    Args:
        sites: names of the sites.
        projections: of the outputs.
    """

    reads_b = False

    def __init__(self, sites: Sequence[str], projections: OutputProjections) -> None:
        self._wanted, self._projections = set(sites), projections
        self._watched: dict[str, tuple[Site, Tensor]] = {}
        self._found: dict[str, Stream] = {}

    def start(self, runner: SiteRunner, state_a: Mapping[str, Tensor], batch: Batch) -> None:
        """Begin a batch."""
        self._projections.start()

    def see(self, site: Site, activation: Tensor, *, inflow: bool, of_b: bool) -> None:
        """Keep what comes out of a site."""
        if not inflow and not of_b and site.name in self._wanted:
            self._watched[site.name] = (site, activation)

    def finish(self, output: Any, *, of_b: bool) -> None:
        """Add the rows of A once it has been run."""
        values = [value for _, value in self._watched.values()]
        for slopes in self._projections.slopes(output, values) if values else ():
            for (site, _), slope in zip(self._watched.values(), slopes, strict=True):
                axis = site.channel_axis(slope)
                rows = slope.movedim(axis, -1).reshape(-1, slope.shape[axis])
                self._found.setdefault(site.name, Stream(rows.shape[1])).update(rows)
        self._watched = {}

    def end(self) -> None:
        """Do nothing."""

    def result(self) -> dict[str, Moment]:
        """Return moments by site."""
        return {name: stream.result() for name, stream in self._found.items()}
