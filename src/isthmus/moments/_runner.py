"""Running a network over data and watching its sites."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any

from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from isthmus.batches import Batch, device_of
from isthmus.errors import ModelError
from isthmus.layers import Site, find_sites
from isthmus.moments._rows import Actions
from isthmus.symmetry import SymmetrySpec, Trace, trace

__all__ = ["SiteRunner"]

Watcher = Callable[[Site, Tensor], None]


class SiteRunner:
    """A model as a graph that can be run with any state and watched at its sites.

    Graphs are specialised to input shapes; one is traced for each new combination of shapes (usually two: full
    batches and the last one) and kept.

    Args:
        model: the network, in evaluation mode; not mutated.
        example: a batch that shows the structure of the inputs.

    Attributes:
        sites: by name, in the order of computation.

    Raises:
        ModelError: the model cannot be traced, or its trace would keep what was computed from its weights.
    """

    def __init__(self, model: nn.Module, example: Batch) -> None:
        self._model = model
        self._traces: dict[Any, Trace] = {}
        self._actions: dict[tuple[int, int], tuple[SymmetrySpec, Actions]] = {}
        self._device = device_of(model)
        self.sites: Mapping[str, Site] = {
            s.name: s for s in find_sites(self._traced(example.to(self._device)))
        }

    @cached_property
    def parameters(self) -> frozenset[str]:
        """Names of what is learnt, all names of tied tensors."""
        return frozenset(name for name, _ in self._model.named_parameters(remove_duplicate=False))

    def run(
        self,
        state: Mapping[str, Tensor],
        batch: Batch,
        *,
        inflow: Watcher | None = None,
        outflow: Watcher | None = None,
        gradients: bool = False,
    ) -> Any:
        """Run the network on one batch.

        Args:
            state: its parameters and buffers; floating inputs are cast to the dtype of the first of them.
            batch: the inputs.
            inflow: called at every site with what flows in.
            outflow: called at every site with what comes out (after a folded BatchNorm).
            gradients: keep the graph of derivatives by those tensors of the state that require them.

        Returns:
            The model's output.

        Raises:
            ModelError: for these input shapes the model computes through other sites.
        """
        moved = self._moved(batch, state)
        traced = self._traced(moved)
        by_target = {s.target: s for s in self.sites.values()}

        def watch(node: fx.Node, look_up: Callable[[fx.Node], Any], result: Any) -> None:
            site = self.sites.get(node.name)
            if inflow is not None and site is not None:
                source = next(n for n in node.all_input_nodes if n.name == site.source)
                inflow(site, look_up(source))
            if outflow is not None and node.name in by_target:
                outflow(by_target[node.name], result)

        return traced.run(state, moved.args, moved.kwargs, on_node=watch, gradients=gradients)

    def actions(self, batch: Batch, spec: SymmetrySpec, state: Mapping[str, Tensor]) -> Actions:
        """Return how the groups of a spec move the activations at the sites when a state is run on a batch."""
        traced = self._traced(self._moved(batch, state))
        key = (id(traced), id(spec))
        if key not in self._actions:
            self._actions[key] = spec, Actions(traced, tuple(self.sites.values()), spec)
        return self._actions[key][1]

    def _moved(self, batch: Batch, state: Mapping[str, Tensor]) -> Batch:
        dtype = next((t.dtype for t in state.values() if t.is_floating_point()), None)
        return batch.to(self._device, dtype)

    def _traced(self, batch: Batch) -> Trace:
        flat, structure = pytree.tree_flatten((batch.args, dict(batch.kwargs)))
        key = (str(structure), tuple((tuple(v.shape), v.dtype) if isinstance(v, Tensor) else v for v in flat))
        if key not in self._traces:
            traced = trace(self._model, batch.args, batch.kwargs).require_of_state()
            if self._traces and tuple(s.name for s in find_sites(traced)) != tuple(self.sites):
                raise ModelError(
                    f"{type(self._model).__name__} computes through other layers for inputs of shapes {key[1]} "
                    "than for the first batch, so its statistics cannot be collected over both. "
                    "Give batches of one shape."
                )
            self._traces[key] = traced
        return self._traces[key]
