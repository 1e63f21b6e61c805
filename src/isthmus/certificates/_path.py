r"""The networks along the path that a certificate speaks of: folded, in float64, with bounds on their norms."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from isthmus.batches import Batch, device_of
from isthmus.certificates._fold import fold_normalisation
from isthmus.certificates._layers import Magnitude, is_layer, layer_magnitudes, layer_norms
from isthmus.certificates._propagate import Ends
from isthmus.errors import CheckpointError, ModelError
from isthmus.evaluation import bind, combine_states, relative_difference
from isthmus.replica import in_double
from isthmus.symmetry import Trace, trace

__all__ = ["NetworksBetween"]

_KNOTS = 17
"""Points of the path at which spectral norms are computed; between them convexity bounds them."""

_SAME = 1e-6
"""Relative difference up to which the code of B computes what the code of A computes with B's tensors."""


@dataclass(frozen=True)
class _KnotNorms:
    """Norms of the layers at every knot, and how large their rounding can be."""

    norms: list[dict[str, float]]
    magnitudes: dict[str, Magnitude]


class NetworksBetween:
    """All networks between A and B, made one at a time."""

    def __init__(
        self,
        model_a: nn.Module,
        model_b: nn.Module | None,
        state_a: Mapping[str, Tensor],
        state_b: Mapping[str, Tensor],
        *,
        knots: int = _KNOTS,
    ) -> None:
        """Keep double precision copies; ``model_b`` is only run once, to see that it is the same function."""
        self.model = in_double(model_a)
        self.folded = False
        self._other = model_b
        self._ends = (_double(state_a), _double(state_b))
        self._knots = np.linspace(0.0, 1.0, min(max(knots, 2), _KNOTS))
        self._traces: dict[tuple[Any, ...], Trace] = {}
        self._folded_ends: tuple[dict[str, Tensor], ...] = ()
        self._layers: dict[tuple[Any, ...], _KnotNorms] = {}

    def batch(self, batch: Batch) -> Batch:
        """Return a batch on the network's device in double precision."""
        return batch.to(device_of(self.model), torch.float64)

    def traced(self, batch: Batch) -> Trace:
        """Return the graph for the shapes of a batch."""
        flat, _ = pytree.tree_flatten((batch.args, dict(batch.kwargs)))
        key = tuple((tuple(t.shape), t.dtype) if isinstance(t, Tensor) else t for t in flat)
        if key not in self._traces:
            self._traces[key] = trace(self.model, batch.args, batch.kwargs).require_of_state()
            self._prepare(self._traces[key], batch)
        return self._traces[key]

    def _prepare(self, traced: Trace, batch: Batch) -> None:
        """Fold the states once, and bound the norms once for every shape of images."""
        if not self._folded_ends:
            self._check_ends(traced)
            self._check_other(batch)
            a, b = (fold_normalisation(traced, s) for s in self._ends)
            self._folded_ends = (a, b)
            self.folded = any(not torch.equal(a[k], self._ends[0][k]) for k in a)
        if _signature(traced) not in self._layers:
            self._layers[_signature(traced)] = _KnotNorms(
                [layer_norms(traced, self.state(t)) for t in self._knots.tolist()],
                layer_magnitudes(traced, *self._folded_ends),
            )

    def _check_ends(self, traced: Trace) -> None:
        """See that the line between the two states ends in both, and that a name stands for one tensor.

        Raises:
            CheckpointError: integers that differ, between which there is no line, or tied tensors that differ.
        """
        a, b = self._ends
        used = (traced.tensors[n.name] for n in traced.graph.nodes if n.name in traced.tensors and n.users)
        for name in used:
            if not a[name].is_floating_point() and not torch.equal(a[name], b[name]):
                raise CheckpointError(
                    f"certify: {name!r} holds {a[name].dtype}, the network reads it, and A and B differ in "
                    f"{int((a[name] != b[name]).sum())} of {a[name].numel()} entries. There is no line between them: "
                    "certify networks with the same values there."
                )
            for twin in traced.aliases.get(name, ()):
                for state, owner in ((a, "A"), (b, "B")):
                    if twin in state and not torch.equal(state[twin], state[name]):
                        raise CheckpointError(
                            f"certify: {name!r} and {twin!r} are one tensor in the model, but differ in {owner}. "
                            "Give both the same values, or untie them in the model."
                        )

    def _check_other(self, batch: Batch) -> None:
        """See that B, if it came as a module, computes what A's code computes with B's tensors.

        Raises:
            ModelError: it does not; then the line between the two states does not end in B.
        """
        if self._other is None:
            return
        other = in_double(self._other).eval()
        self._other = None
        own = bind(other)(batch.to(device_of(other)))
        difference = relative_difference(bind(self.model, self._ends[1])(batch), own)
        if difference > _SAME:
            raise ModelError(
                f"certify: B's own code and A's code with B's tensors differ by {difference:.2g} of the largest "
                "output, so the path would not end in B. Build both networks with the same settings "
                "(activations, eps of the normalisations, tensors outside the state)."
            )

    def norms(self, t: float, traced: Trace) -> dict[str, float]:
        """Bound the norm of every layer at a position.

        A norm is a convex function of the weights, hence of ``t``: chords between a few exact values lie above
        it. They are convex too, so their larger end over a segment bounds them there.
        """
        exact = self._layers[_signature(traced)].norms
        return {name: float(np.interp(t, self._knots, [norms[name] for norms in exact])) for name in exact[0]}

    def state(self, t: float) -> dict[str, Tensor]:
        """Return the state at a position; made anew, since keeping all of them takes memory and saves nothing."""
        return combine_states(self._folded_ends, lambda pair: _mix(pair, t), check=False)

    def end(self, t: float, traced: Trace, batch: Batch) -> tuple[Ends, Tensor]:
        """Return the values of all nodes at a position, and the output."""
        flat, _ = pytree.tree_flatten((batch.args, dict(batch.kwargs)))
        values: dict[str, Any] = dict(zip(traced.inputs, flat, strict=True))

        def keep(node: fx.Node, _: Any, result: Any) -> None:
            values[node.name] = result

        state, magnitudes = self.state(t), self._layers[_signature(traced)].magnitudes
        traced.run(state, batch.args, batch.kwargs, on_node=keep)
        output = values[self.output(traced).name]
        if not bool(torch.isfinite(output).all()):
            raise ModelError(
                f"certify: outputs at t = {t:g} are NaN or infinite on "
                f"{int((~torch.isfinite(output)).flatten(1).any(1).sum())} of {len(output)} examples. Look for NaN "
                "in the inputs or for a network that overflows."
            )
        return Ends(state, values, self.norms(t, traced), magnitudes), output

    def output(self, traced: Trace) -> fx.Node:
        """Return the node of the output that is scored."""
        names = list(traced.outputs)
        return traced.outputs["logits" if "logits" in names else names[0]]


def _signature(traced: Trace) -> tuple[Any, ...]:
    """Return what the norms of a graph depend on besides the weights: the sizes of the layers' inputs and outputs."""
    return tuple(
        (node.name, *(tuple(n.meta["val"].shape[1:]) for n in (node.all_input_nodes[0], node) if _plain(n)))
        for node in traced.graph.nodes
        if is_layer(node)
    )


def _plain(node: fx.Node) -> bool:
    return isinstance(node.meta["val"], Tensor)


def _mix(pair: Sequence[Tensor], t: float) -> Tensor:
    return pair[0] if t == 0 else pair[1] if t == 1 else (1 - t) * pair[0] + t * pair[1]


def _double(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {k: v.double() if v.is_floating_point() else v for k, v in state.items()}
