r"""Several multilayer perceptrons trained at once: a leading axis numbers the networks.

Every network follows the protocol of :func:`isthmus.study.train` with its own seed, learning rate and order of
the data. The gradients are written out, so that bfloat16 products meet float32 weights without a graph: for a
layer :math:`z = W h + b` with :math:`\delta = \partial L / \partial z`,

.. math:: \partial L/\partial W = \delta^\top h,\quad \partial L/\partial b = \sum \delta,\quad
   \partial L/\partial h = \delta W.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from isthmus.batches import device_of
from isthmus.errors import ModelError, StudyError
from isthmus.training._augment import Augmentation
from isthmus.training._dataset import Dataset
from isthmus.training._initialise import initialise
from isthmus.training._negligible import drop_negligible_moments, without_negligible
from isthmus.training._seeds import seeded_generator
from isthmus.training._training import EpochRecord, TrainResult, TrainSettings

__all__ = ["can_stack", "train_stacked"]

_OWN = ("seed", "learning_rate")
"""Settings in which the networks of one stack may differ."""


def can_stack(model: nn.Module, augment: Augmentation = "none") -> bool:
    """Return whether a model is a plain ReLU perceptron with biases, as :func:`isthmus.testing.mlp` builds.

    Args:
        model: the model.
        augment: of its training; only ``"none"`` can be stacked.
    """
    if augment != "none":
        return False
    linears = [m for m in model.modules() if isinstance(m, nn.Linear)]
    names = [name for name, _ in model.named_parameters()]
    expected = [f"layers.{i}.{part}" for i in range(len(linears)) for part in ("weight", "bias")]
    return bool(linears) and names == expected and getattr(model, "activation", None) == "relu"


def train_stacked(
    model: nn.Module,
    dataset: Dataset,
    settings: Sequence[TrainSettings],
    *,
    lockstep: int | None = None,
    on_epoch: Callable[[Sequence[EpochRecord]], Any] | None = None,
) -> list[TrainResult]:
    """Train copies of a perceptron together, one per entry of ``settings``.

    In float32 each network ends where :func:`isthmus.study.train` ends, up to rounding: same initial values,
    same order of the data, same schedule. A network whose loss stops being finite goes on as it is, without
    touching the others, and has the status ``"diverged"`` in its result.

    Args:
        model: a ReLU perceptron (:func:`isthmus.testing.mlp`); it is not changed.
        dataset: examples to train on.
        settings: how each network is trained; they may differ in ``seed`` and ``learning_rate`` only.
        lockstep: networks per batched product. By default all on a GPU, which small products leave idle, and one
            on a CPU, where the products of one network fill the caches already; the networks take turns then.
        on_epoch: called after each epoch with one record per network.

    Returns:
        One result per entry, in order. ``seconds`` is the wall time of the whole stack.

    Raises:
        StudyError: no settings, settings that differ in more than seed and learning rate, or augmentation.
        ModelError: the model is no ReLU perceptron, or has another number of inputs or fewer outputs than
            there are classes.

    Notes:
        ``benchmarks/training.py`` compares it with the plain loop and with its matrix products alone.
    """
    shared = _shared(settings)
    _check(model, dataset)
    device = device_of(model)
    size = lockstep or (1 if device.type == "cpu" else len(settings))
    data = dataset.to(device)
    table = data.inputs.flatten(1).bfloat16() if shared.precision == "bfloat16" else None
    stacks = [
        _Stack(model, _Feed(data, table, settings[i : i + size]), settings[i : i + size], device)
        for i in range(0, len(settings), size)
    ]
    histories: list[list[EpochRecord]] = [[] for _ in settings]
    start = time.perf_counter()
    for epoch in range(shared.epochs):
        records = _epoch(stacks, epoch, start)
        for history, record in zip(histories, records, strict=True):
            history.append(record)
        if on_epoch is not None:
            on_epoch(records)
    seconds = time.perf_counter() - start
    networks = [stack.network(k, model) for stack in stacks for k in range(len(stack.settings))]
    return [
        TrainResult(
            network,
            tuple(history),
            "finished" if all(math.isfinite(r.loss) for r in history) else "diverged",
            seconds,
            own,
        )
        for network, history, own in zip(networks, histories, settings, strict=True)
    ]


class _Stack:
    """Networks whose products are batched, their data, and their optimisers.

    Attributes:
        weights: per layer, float32, shape ``(K, outputs, inputs)``.
        biases: per layer, float32, shape ``(K, 1, outputs)``.
        parameters: per network, views of its weights and then of its biases.
        optimisers: per network.
        scratch: memory of a step.
    """

    def __init__(
        self, model: nn.Module, feed: _Feed, settings: Sequence[TrainSettings], device: torch.device
    ) -> None:
        fresh = [initialise(model, s.seed, s.initialisation).state_dict() for s in settings]
        layers = range(len(fresh[0]) // 2)
        self.settings, self.feed, self.scratch = settings, feed, _Scratch(device)
        self.weights = [torch.stack([f[f"layers.{i}.weight"] for f in fresh]).to(device) for i in layers]
        self.biases = [
            torch.stack([f[f"layers.{i}.bias"] for f in fresh])[:, None].to(device) for i in layers
        ]
        tensors = (*self.weights, *self.biases)
        self.parameters = [[t[k] for t in tensors] for k in range(len(settings))]
        self.optimisers = [_fused(own, s) for own, s in zip(self.parameters, settings, strict=True)]

    def step(self, index: Tensor, step: int, steps: int) -> tuple[Tensor, Tensor, list[float]]:
        """Move every network by one step; return losses, numbers of right answers, and learning rates."""
        rates = [s.learning_rate_at(step, steps) for s in self.settings]
        loss, hits, gradients = _gradients(self, *self.feed.batch(index), self.settings[0].precision)
        for k, (optimiser, rate) in enumerate(zip(self.optimisers, rates, strict=True)):
            optimiser.param_groups[0]["lr"] = rate
            for parameter, gradient in zip(self.parameters[k], gradients, strict=True):
                parameter.grad = gradient[k]
            optimiser.step()
            drop_negligible_moments(optimiser, step)
        return loss, hits, rates

    def network(self, index: int, model: nn.Module) -> nn.Module:
        """Return one network as a module of its own."""
        fresh = initialise(model, 0, "keep")
        state = {f"layers.{i}.weight": w[index] for i, w in enumerate(self.weights)}
        state |= {f"layers.{i}.bias": b[index, 0] for i, b in enumerate(self.biases)}
        fresh.load_state_dict(state)
        return fresh.eval()


class _Feed:
    """The batches of every network, each in the order of its own seed."""

    def __init__(self, data: Dataset, table: Tensor | None, settings: Sequence[TrainSettings]) -> None:
        self.data, self.table = data, table
        self.scratch = _Scratch(data.values.device)
        self.seeds = [s.seed for s in settings]
        self.orders = {seed: seeded_generator(seed, "order") for seed in self.seeds}
        self.batches = -(-len(data) // settings[0].batch_size)

    def epoch(self) -> list[Tensor]:
        """Return the examples of each step of the next epoch, int64, shape ``(K, batch)``."""
        count, device = len(self.data), self.data.values.device
        drawn = {seed: torch.randperm(count, generator=order) for seed, order in self.orders.items()}
        together = torch.stack([drawn[seed] for seed in self.seeds]).to(device)
        return list(together.tensor_split(self.batches, dim=1))

    def batch(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Return inputs ``(K, batch, features)`` and labels ``(K, batch)``."""
        flat = index.flatten()
        if self.table is not None:
            shape = (len(flat), self.table.shape[1])
            inputs = self.scratch.take(("inputs", 0), shape, self.table.dtype)
            torch.index_select(self.table, 0, flat, out=inputs)
            labels = self.data.labels.index_select(0, flat)
        else:
            inputs, labels = self.data.batch(flat)
        return inputs.reshape(*index.shape, -1), labels.reshape(index.shape)


def _epoch(stacks: Sequence[_Stack], epoch: int, start: float) -> list[EpochRecord]:
    """Run one pass over the data; the stacks take turns, batch by batch."""
    batches, count = stacks[0].feed.batches, len(stacks[0].feed.data)
    steps = stacks[0].settings[0].epochs * batches
    orders = [stack.feed.epoch() for stack in stacks]
    sums: list[Tensor] = [torch.zeros(2, len(s.settings), dtype=torch.float64) for s in stacks]
    sums = [total.to(stack.weights[0].device) for total, stack in zip(sums, stacks, strict=True)]
    rates: list[list[float]] = [[] for _ in stacks]
    for batch in range(batches):
        for k, stack in enumerate(stacks):
            index = orders[k][batch]
            loss, hits, rates[k] = stack.step(index, epoch * batches + batch, steps)
            sums[k][0] += loss.double() * index.shape[1]
            sums[k][1] += hits
    seconds = time.perf_counter() - start
    return [
        EpochRecord(epoch + 1, loss / count, round(hits) / count, rate, seconds)
        for total, own in zip(sums, rates, strict=True)
        for loss, hits, rate in zip(*total.tolist(), own, strict=True)
    ]


def _gradients(
    stack: _Stack, inputs: Tensor, labels: Tensor, precision: str
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Return losses ``(K,)``, numbers of right answers ``(K,)``, and gradients of weights, then of biases.

    The gradients, float32, lie in the stack's scratch memory until the next call.
    """
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    scratch, batch = stack.scratch, labels.shape[1]
    weights = [scratch.cast(("weight", k), w, dtype) for k, w in enumerate(stack.weights)]
    flows = [inputs]
    for k, (weight, bias) in enumerate(zip(weights, stack.biases, strict=True)):
        found = scratch.take(("flow", k), (len(inputs), batch, weight.shape[1]), dtype)
        torch.baddbmm(bias.to(dtype), flows[-1], weight.transpose(1, 2), out=found)
        flows.append(found if k == len(weights) - 1 else found.relu_())
    logits = flows.pop().float()
    logs = logits.log_softmax(-1)
    loss = -logs.gather(-1, labels[..., None]).squeeze(-1).mean(-1)
    hits = (logits.argmax(-1) == labels).sum(-1)
    error = logs.exp_()
    error.scatter_add_(-1, labels[..., None], torch.full_like(labels[..., None], -1, dtype=error.dtype))
    flowing = without_negligible(error.div_(batch)).to(dtype)
    ones = flowing.new_ones(len(inputs), 1, batch)
    gradients: list[Tensor] = [flowing] * (2 * len(weights))
    for k in reversed(range(len(weights))):
        for place, left in ((k, flowing.transpose(1, 2)), (k + len(weights), ones)):
            right = flows[k] if place == k else flowing
            out = scratch.take(("product", place), (len(inputs), left.shape[1], right.shape[2]), dtype)
            gradients[place] = scratch.cast(
                ("gradient", place), torch.bmm(left, right, out=out), torch.float32
            )
        if k:
            backward = scratch.take(("error", k), flows[k].shape, dtype)
            torch.bmm(flowing, weights[k], out=backward)
            flowing = torch.ops.aten.threshold_backward.grad_input(backward, flows[k], 0, grad_input=backward)
    return loss, hits, gradients


class _Scratch:
    """Memory used again at every step: fresh blocks of this size cost more than the work done in them."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.held: dict[tuple[str, int], Tensor] = {}

    def take(self, key: tuple[str, int], shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Return a tensor with any values, the same one for the same key and shape."""
        held = self.held.get(key)
        if held is None or held.shape != torch.Size(shape):
            held = self.held[key] = torch.empty(*shape, dtype=dtype, device=self.device)
        return held

    def cast(self, key: tuple[str, int], values: Tensor, dtype: torch.dtype) -> Tensor:
        """Return values in another dtype."""
        return values if values.dtype == dtype else self.take(key, values.shape, dtype).copy_(values)


def _fused(parameters: list[Tensor], settings: TrainSettings) -> torch.optim.Optimizer:
    """Build the optimiser of the plain loop, in torch's variant that passes over memory once."""
    rate, decay = settings.learning_rate, settings.weight_decay
    if settings.optimiser == "adam":
        return torch.optim.AdamW(parameters, rate, weight_decay=decay, fused=True)
    return torch.optim.SGD(parameters, rate, settings.momentum, weight_decay=decay, fused=True)


def _shared(settings: Sequence[TrainSettings]) -> TrainSettings:
    if not settings:
        raise StudyError("train_stacked: expected settings of at least one network, found none.")
    common = [replace(s, seed=0, learning_rate=1.0) for s in settings]
    if any(c != common[0] for c in common):
        raise StudyError(
            f"train_stacked: the networks of a stack may differ in {' and '.join(_OWN)} only. "
            "Train the others in a stack of their own."
        )
    if common[0].augment != "none":
        raise StudyError(
            f"train_stacked: augment {common[0].augment!r} is for images; a perceptron takes augment 'none' only."
        )
    return common[0]


def _check(model: nn.Module, dataset: Dataset) -> None:
    if not can_stack(model):
        raise ModelError(
            "train_stacked: expected a ReLU perceptron with biases as isthmus.testing.mlp builds, found "
            f"{type(model).__name__}. Train other networks with isthmus.study.train."
        )
    linears = [m for m in model.modules() if isinstance(m, nn.Linear)]
    features, classes = math.prod(dataset.input_shape), len(dataset.classes)
    if linears[0].in_features != features or linears[-1].out_features < classes:
        raise ModelError(
            f"train_stacked: the model takes {linears[0].in_features} inputs and gives "
            f"{linears[-1].out_features} outputs, but {dataset.name} has {features} inputs and {classes} "
            "classes. Build it for this data set."
        )
