"""Recomputing the running statistics of batch normalisation for weights that were not trained with them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from isthmus.batches import Batches, iterate
from isthmus.errors import DataError
from isthmus.evaluation import bind
from isthmus.replica import Replica
from isthmus.states import State, with_versions_of

__all__ = [
    "Refresh",
    "chosen_refresh",
    "keeps_running_statistics",
    "refresh_batchnorm",
    "statistics_names",
]

Refresh = str | Callable[..., Mapping[str, Tensor]] | None
"""The work on a mixed state before it is run: ``"batchnorm"``, a function of the state (told ``t`` and ``ends`` if
it has parameters of these names), nothing (``None`` or ``"none"``), or ``"auto"``: ``"batchnorm"`` where there are data
and layers whose statistics can be recomputed."""

_AnyBatchNorm = nn.modules.batchnorm._BatchNorm
_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


@dataclass
class _RunningLayer:
    """A BatchNorm layer: its names in the model, and sums over its calls, float64, ``(channels,)``."""

    paths: list[str]
    calls: int = 0
    values: int = 0
    means: Tensor | float = 0.0
    variances: Tensor | float = 0.0

    def before(self, layer: nn.Module, inputs: tuple[Any, ...]) -> None:
        """Refuse a call whose variance does not exist."""
        if inputs[0].numel() // inputs[0].shape[1] < 2:
            raise DataError(
                f"Recomputing the statistics of {self.paths[0]!r}: a batch gives it a single value per "
                "channel, which has no variance. Use larger batches, drop a last batch of one example, or leave "
                "the statistics as they are with refresh=None."
            )

    def after(self, layer: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Add the statistics of the call, which momentum 1 has left in the running ones."""
        count = inputs[0].numel() // inputs[0].shape[1]
        self.calls += 1
        self.values += count
        self.means = self.means + count * layer.get_buffer("running_mean").double()
        self.variances = self.variances + count * layer.get_buffer("running_var").double()

    def write(self, state: State) -> None:
        """Put the averages into ``state``, unless the layer was never called."""
        if not self.calls:
            return
        fresh = {
            "running_mean": torch.as_tensor(self.means / self.values),
            "running_var": torch.as_tensor(self.variances / self.values),
            "num_batches_tracked": torch.tensor(self.calls),
        }
        for path in self.paths:
            for leaf, value in fresh.items():
                name = _join(path, leaf)
                if name in state:
                    old = state[name]
                    state[name] = value.to(device=old.device, dtype=old.dtype, copy=True)


def refresh_batchnorm(model: nn.Module | Replica, state: Mapping[str, Tensor], batches: Batches) -> State:
    r"""Recompute running means and variances of every BatchNorm layer for the weights in ``state``.

    An average of two trained networks has other activations than either, so the averaged running statistics
    are wrong for it and its loss says little (Jordan et al. 2022, REPAIR, arXiv:2211.08403). The network is
    run once over ``batches`` with its BatchNorm layers normalising by the statistics of the batch, and
    everything else in evaluation. With :math:`\mu_k, s_k^2` a layer's mean and unbiased variance in its
    call :math:`k`, over :math:`c_k` values per channel, the new statistics are the cumulative averages
    :math:`\sum_k c_k\mu_k / \sum_k c_k` and :math:`\sum_k c_k s_k^2 / \sum_k c_k`, summed in float64.

    Use shuffled batches of training data: class-sorted or tiny batches have other statistics than the data.

    Args:
        model: the architecture, or a private copy of it; the module itself is neither run nor changed.
        state: the weights to run, by name; not changed.
        batches: see :mod:`isthmus.batches`; targets are not used.

    Returns:
        A new state: ``running_mean`` and ``running_var`` are fresh tensors in their dtype and
        ``num_batches_tracked`` is the number of calls; every other tensor is the one of ``state``. Without a
        BatchNorm layer that keeps running statistics, nothing is run and the state comes back as it was.
        Layers that no batch reaches keep their statistics.

    Raises:
        DataError: no batches, or one with a single value per channel at some layer.
        CheckpointError, ShapeError: the state is not one of the model.
    """
    replica = Replica.of(model)
    layers = _tracking_layers(replica.module)
    if not layers:
        return dict(state)
    scratch = set(statistics_names(replica.module))
    run = bind(replica, {n: torch.zeros_like(t) if n in scratch else t for n, t in state.items()})
    with ExitStack() as undoing:
        for count, batch in enumerate(iterate(batches)):
            if count == 0:
                run.prepare(batch)
                layers = _tracking_layers(replica.module)
                undoing.enter_context(_batch_statistics(replica.module, layers))
            run(batch)
    refreshed = dict(state)
    for entry in layers.values():
        entry.write(refreshed)
    return with_versions_of(state, refreshed)


def chosen_refresh(refresh: Refresh, model: nn.Module | None, batches: Batches | None) -> Refresh:
    """Return what ``"auto"`` stands for with this model and data, and None for ``"none"``."""
    if refresh == "auto":
        possible = model is not None and batches is not None and keeps_running_statistics(model)
        return "batchnorm" if possible else None
    return None if refresh == "none" else refresh


def keeps_running_statistics(model: nn.Module) -> bool:
    """Tell whether :func:`refresh_batchnorm` would change anything."""
    return bool(_tracking_layers(model))


def statistics_names(model: nn.Module) -> list[str]:
    """Return the names of the tensors that :func:`refresh_batchnorm` may change."""
    paths = [path for layer in _tracking_layers(model).values() for path in layer.paths]
    return [_join(path, leaf) for path in paths for leaf in _STATISTICS]


def _tracking_layers(model: nn.Module) -> dict[_AnyBatchNorm, _RunningLayer]:
    found: dict[_AnyBatchNorm, _RunningLayer] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, _AnyBatchNorm) and module.running_mean is not None:
            found.setdefault(module, _RunningLayer([])).paths.append(path)
    return found


@contextmanager
def _batch_statistics(model: nn.Module, layers: Mapping[_AnyBatchNorm, _RunningLayer]) -> Iterator[None]:
    """Let the layers, and nothing else, normalise by batch statistics and report them; undone at the end."""
    modes = [(module, module.training) for module in model.modules()]
    momenta = [(layer, layer.momentum) for layer in layers]
    hooks = []
    try:
        for module, _ in modes:
            module.training = module in layers
        for layer, entry in layers.items():
            layer.momentum = 1.0
            hooks.append(layer.register_forward_pre_hook(entry.before))
            hooks.append(layer.register_forward_hook(entry.after))
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for module, mode in modes:
            module.training = mode
        for layer, momentum in momenta:
            layer.momentum = momentum


def _join(path: str, leaf: str) -> str:
    return f"{path}.{leaf}" if path else leaf
