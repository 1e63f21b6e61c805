"""Running many points of a line on a batch: values that they share are computed once.

Three savings, each exact to rounding, on a network given as steps (:mod:`isthmus.connectivity._graph`):

* a linear layer or convolution on the data themselves has, at ``t``, the mix of its outputs at the two ends;
* batch normalisation in evaluation is folded into the layer before it, once for each point;
* rectifications and sums write into their input where nothing else reads it, and a batch of images is cut into
  pieces whose activations stay in the processor's cache.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from isthmus.batches import Batch, device_of, main_output
from isthmus.connectivity._graph import (
    SHORT_SUM,
    Add,
    AffineStep,
    Other,
    Program,
    Relu,
    input_leaves,
    trace_steps,
)
from isthmus.errors import ModelError
from isthmus.replica import Replica

__all__ = ["Engine", "ReadyTensors", "autocast"]

PIECE_BYTES = 2**21
"""Largest activation of a piece of a batch on the CPU, about the size of a core's cache."""


@dataclass(frozen=True)
class ReadyTensors:
    """Tensors ready to run: ``(weight, bias)`` by slot of the site, and all that other steps read, by name."""

    sites: Mapping[int, tuple[Tensor, Tensor | None]]
    tensors: Mapping[str, Tensor]


def autocast(device: torch.device, low: bool) -> AbstractContextManager[Any]:
    """Return the context in which products are in bfloat16, or one that does nothing."""
    return torch.autocast(device.type, torch.bfloat16) if low else nullcontext()


class Engine:
    """A network as steps, sorted by what they need.

    Args:
        model: in evaluation mode, or a private copy of it; the module itself is not changed.
        example: a batch that shows the form of the inputs.
        straight: names of the tensors that are, at every ``t``, the mix of the ends' (:class:`isthmus.paths.Path`);
            None for all.

    Attributes:
        names: tensors of the state that points between the ends need.
        piece: most examples to run at once, once :meth:`measure` was called.

    Raises:
        ModelError: the network cannot be traced.
    """

    def __init__(
        self, model: nn.Module | Replica, example: Batch, *, straight: Container[str] | None = None
    ) -> None:
        replica = Replica.of(model)
        program = trace_steps(replica, example)
        _, self._form = input_leaves(example)
        self._program, self._low, self._device = program, False, device_of(replica.module)
        self._shared = [s for s in program.steps if s.slot in program.fixed]
        sites = [s for s in program.steps if isinstance(s, AffineStep)]
        on_line = [s for s in sites if straight is None or all(name in straight for name in s.names)]
        self._mixed = [s for s in on_line if _mixes(s, program)]
        self._cast = _only_mixed(program, self._mixed)
        early = program.fixed | {s.slot for s in self._mixed}
        self._moving = [s for s in program.steps if s.slot not in early]
        self._sites = sites
        self._others = {n for s in program.steps if not isinstance(s, AffineStep) for n in s.names}
        self._dead, self._into = _lifetimes(program, self._moving)
        self.names = tuple(dict.fromkeys(n for s in self._moving for n in s.names))
        self.piece: int | None = None

    def fits(self, batch: Batch) -> bool:
        """Tell whether a batch has the form of the example."""
        return input_leaves(batch)[1] == self._form

    def ready(self, state: Mapping[str, Tensor], *, end: bool = False) -> ReadyTensors:
        """Return the tensors of a state ready to run; only an ``end`` of a line needs the layers on the data."""
        wanted = self._sites if end else [s for s in self._moving if isinstance(s, AffineStep)]
        return ReadyTensors(
            {site.slot: self._folded(site, state) for site in wanted},
            {name: state[name] for name in self._others},
        )

    def run(self, batch: Batch, ready: ReadyTensors) -> Tensor:
        """Return the outputs at one point, prepared as an ``end``."""
        return next(self.outputs(batch, (ready, ready), ()))

    def outputs(
        self,
        batch: Batch,
        ends: tuple[ReadyTensors, ReadyTensors],
        ts: Sequence[float],
        ready_at: Callable[[float], ReadyTensors] | None = None,
        *,
        with_start: bool = True,
        with_end: bool = False,
    ) -> Iterator[Tensor]:
        """Yield the outputs at the start and the end of a line, if wanted, then those at every ``t``.

        Args:
            batch: on the right device, in the network's dtype.
            ends: A and the path's end.
            ts: positions between them.
            ready_at: gives the tensors ready to run at ``t``.
            with_start: whether A's outputs come first.
            with_end: whether those of the path's end come next.
        """
        start, end = ends
        with autocast(self._device, self._low):
            values = self._begun(batch)
            for step in self._shared:
                values[step.slot] = _run(step, values, start, None)
            for slot in self._cast if self._low else ():
                values[slot] = values[slot].bfloat16()
            first = {s.slot: _run(s, values, start, None) for s in self._mixed}
            last = {s.slot: _run(s, values, end, None) for s in self._mixed if ts or with_end}
        for wanted, reached, ready in ((with_start, first, start), (with_end, last, end)):
            if wanted:
                with autocast(self._device, self._low):
                    own = {slot: value.clone() for slot, value in reached.items()} if ts else reached
                    outputs = self._finish(values, own, ready)
                yield outputs
        for t in ts:
            assert ready_at is not None
            with autocast(self._device, self._low):
                own = {slot: torch.lerp(value, last[slot], t) for slot, value in first.items()}
                outputs = self._finish(values, own, ready_at(t))
            yield outputs

    def measure(self, batch: Batch, ready: ReadyTensors) -> None:
        """Set :attr:`piece` from the largest activation of one run, the data themselves apart."""
        if self._device.type != "cpu" or len(batch.args) != 1 or batch.kwargs:
            return
        largest = 1

        def watch(value: Any) -> None:
            nonlocal largest
            if isinstance(value, Tensor):
                largest = max(largest, value.numel() * value.element_size())

        with autocast(self._device, self._low):
            values = self._begun(batch)
            for step in self._program.steps:
                values[step.slot] = _run(step, values, ready, None)
                if step.slot not in self._program.fixed:
                    watch(values[step.slot])
        self.piece = max(1, PIECE_BYTES * batch.size // largest)

    def lowered(self) -> Engine:
        """Return this engine with products in bfloat16."""
        other = copy.copy(self)
        other._low = True
        return other

    def _begun(self, batch: Batch) -> list[Any]:
        return [*input_leaves(batch)[0], *[None] * (self._program.slots - self._program.inputs)]

    def _finish(self, values: Sequence[Any], mixed: Mapping[int, Tensor], ready: ReadyTensors) -> Tensor:
        values = list(values)
        for slot, value in mixed.items():
            values[slot] = value
        for k, step in enumerate(self._moving):
            values[step.slot] = _run(step, values, ready, self._into[k])
            for slot in self._dead[k]:
                values[slot] = None
        found = main_output(self._program.output(values))
        if not found.is_floating_point():
            raise ModelError(f"Expected floating outputs to be scored, found {found.dtype}.")
        return found

    def _folded(self, site: AffineStep, state: Mapping[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        weight, bias = state[site.weight], None if site.bias is None else state[site.bias]
        if site.norm is not None:
            wide = torch.promote_types(weight.dtype, torch.float32)
            folded, shift = site.norm.fold(state, weight, bias, dtype=wide)
            weight, bias = folded.to(weight.dtype), shift.to(weight.dtype)
        if self._low:
            weight, bias = weight.bfloat16(), None if bias is None else bias.bfloat16()
        if weight.ndim == 4 and self._device.type == "cpu":
            weight = weight.contiguous(memory_format=torch.channels_last)
        return weight, bias


def _mixes(site: AffineStep, program: Program) -> bool:
    return site.source in program.fixed and site.norm is None and site.length >= SHORT_SUM


def _only_mixed(program: Program, mixed: Sequence[AffineStep]) -> set[int]:
    """Return the shared slots that are read by mixed sites alone, which can be lowered once for all."""
    read = {slot for step in program.steps if step not in mixed for slot in step.reads}
    return {site.source for site in mixed} - read - program.kept


def _run(step: Any, values: list[Any], ready: ReadyTensors, into: int | None) -> Any:
    """Run a step; ``into`` is the slot whose value may be overwritten."""
    if isinstance(step, AffineStep):
        return step.call(values[step.source], *ready.sites[step.slot])
    if isinstance(step, Relu):
        value = values[step.reads[0]]
        return torch.relu(value) if into is None else torch.relu_(value)
    if isinstance(step, Add):
        left, right = (values[slot] for slot in step.reads)
        if into is None or not isinstance(left, Tensor) or not isinstance(right, Tensor):
            return left + right
        if left.shape != right.shape or left.dtype != right.dtype:
            return left + right
        return left.add_(right) if into == step.reads[0] else right.add_(left)
    assert isinstance(step, Other)
    return step.call(values, ready.tensors)


def _lifetimes(program: Program, moving: Sequence[Any]) -> tuple[list[list[int]], list[int | None]]:
    """Return, for each moving step, the slots dead after it and the slot that it may overwrite."""
    users = [0] * program.slots
    last: dict[int, int] = {}
    for slot in (*program.kept, *(s for step in program.steps for s in set(step.reads))):
        users[slot] += 1
    for k, step in enumerate(moving):
        last.update(dict.fromkeys(step.reads, k))
    dead: list[list[int]] = [[] for _ in moving]
    for slot, k in last.items():
        if slot not in program.kept and slot not in program.fixed:
            dead[k].append(slot)
    own = {step.slot for step in program.steps if step.fresh and step.slot not in program.fixed}
    into = [
        next((s for s in step.reads if s in own and users[s] == 1), None)
        if isinstance(step, (Relu, Add))
        else None
        for step in moving
    ]
    return dead, into
