"""Layers whose outputs can be given any mean and spread by their own weight and bias, and looking at them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from isthmus.batches import Batch
from isthmus.errors import DataError, ModelError, printable
from isthmus.evaluation import bind
from isthmus.replica import Replica
from isthmus.states import State

__all__ = ["HeldLayer", "held_layers", "output_layer", "seen_layers", "watched"]

_LINEAR: dict[type[nn.Module], int] = {nn.Linear: 0}
_CONVOLUTIONS: dict[type[nn.Module], int] = {nn.Conv1d: 1, nn.Conv2d: 2, nn.Conv3d: 3}
_TRANSPOSED: dict[type[nn.Module], int] = {
    nn.ConvTranspose1d: 1, nn.ConvTranspose2d: 2, nn.ConvTranspose3d: 3,
}  # fmt: skip
_WEIGHTED = {**_LINEAR, **_CONVOLUTIONS, **_TRANSPOSED}
_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_INSTANCE_NORMS: dict[type[nn.Module], int] = {
    nn.InstanceNorm1d: 1, nn.InstanceNorm2d: 2, nn.InstanceNorm3d: 3,
}  # fmt: skip
_NORMS = (*_BATCH_NORMS, nn.GroupNorm, nn.LayerNorm, *_INSTANCE_NORMS)
_TABLES = (nn.Embedding, nn.EmbeddingBag)
_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
_MOST_NAMED = 3


@dataclass(frozen=True)
class HeldLayer:
    """A module whose output is, in every channel, an affine function with a weight and a bias of that channel alone.

    Scaling the channel's weight by ``r`` and turning its bias ``b`` into ``r b + s`` scales the output by ``r`` and
    shifts it by ``s``, exactly. Without a bias it can be scaled only.

    Attributes:
        path: name of the module.
        weight: name of its weight in the state.
        bias: name of its bias; None where it has none.
        weight_axis: axis of the weight that lists the channels.
        axis: axis of the output that does.
        statistics: names of running statistics before the weight.
        batch_norm: whether it is a batch normalisation.
        source: of a normalisation, the name and the channels' axis of the weight whose layer it directly reads; None
            where that is not known, and for other layers.
    """

    path: str
    weight: str
    bias: str | None
    weight_axis: int
    axis: int
    statistics: tuple[str, ...] = ()
    batch_norm: bool = False
    source: tuple[str, int] | None = None

    @property
    def tensors(self) -> tuple[str, ...]:
        """Names of its tensors in the state."""
        return (self.weight, *(() if self.bias is None else (self.bias,)), *self.statistics)

    def scaled(self, state: Mapping[str, Tensor], factor: Tensor, shift: Tensor) -> State:
        """Return weight and bias after the output was scaled and shifted, in the state's dtypes.

        Args:
            state: holds the tensors.
            factor: of each channel, float64, shape ``(channels,)``.
            shift: of each channel, likewise; zero where there is no bias.
        """
        weight = state[self.weight]
        spread = [1] * weight.ndim
        spread[self.weight_axis] = -1
        found = {self.weight: (weight.double() * factor.to(weight.device).reshape(spread)).to(weight.dtype)}
        if self.bias is not None:
            bias = state[self.bias]
            moved = bias.double() * factor.to(bias.device) + shift.to(bias.device)
            found[self.bias] = moved.to(bias.dtype)
        return found


@contextmanager
def watched(
    model: nn.Module, layers: Sequence[HeldLayer], see: Callable[[HeldLayer, Tensor], Tensor | None]
) -> Iterator[None]:
    """Call ``see`` with every output of the layers while the context lasts; what it returns replaces the output."""
    modules = dict(model.named_modules())

    def seen(layer: HeldLayer) -> Callable[[nn.Module, Any, Tensor], Tensor | None]:
        return lambda _module, _args, output: see(layer, output)

    hooks = [modules[layer.path].register_forward_hook(seen(layer)) for layer in layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@dataclass
class _ModuleCall:
    """The inputs and outputs of one call of a module, kept so that tensors can be told apart by identity."""

    path: str
    module: nn.Module
    source: Any
    output: Any


def held_layers(
    replica: Replica,
    state: Mapping[str, Tensor],
    batch: Batch,
    chosen: Sequence[str] | None = None,
    *,
    shifted: bool = True,
) -> tuple[HeldLayer, ...]:
    """Return the layers whose outputs are held, in the order in which they are run.

    These are the linear layers and convolutions but the one whose output the network returns, each replaced by the
    normalisation that reads its output directly, and every other batch normalisation.

    Args:
        replica: the network.
        state: a state of it.
        batch: some examples that show which layers run, and in which order.
        chosen: names of modules to hold instead.
        shifted: whether outputs are shifted too, which needs a bias.

    Raises:
        ModelError: naming what cannot be held, and why.
        DataError: a name that is no module, or no layer to hold.
    """
    calls, output = _calls(replica, state, batch)
    modules = dict(replica.module.named_modules())
    if chosen is None:
        wanted = _default(calls, output)
        doubts = _uncovered(modules, calls, state)
    else:
        unknown = [path for path in chosen if path not in modules]
        if unknown:
            raise DataError(
                f"Repairing: the network has no module {unknown[0]!r}; layers= takes module names."
            )
        called = [call.path for call in calls]
        wanted = sorted(dict.fromkeys(chosen), key=lambda p: called.index(p) if p in called else len(called))
        doubts = []
    shared = _shared(replica.module)
    found: list[HeldLayer] = []
    for path in wanted:
        reason = _reason(modules[path], path, calls, state, shared, shifted)
        if reason is None:
            found.append(_layer(modules[path], path, state, _source(path, modules, calls, state, shared)))
        else:
            doubts.append(f"{printable(path) or 'the network itself'!r} {reason}")
    if doubts:
        more = f"; and {len(doubts) - _MOST_NAMED} more" if len(doubts) > _MOST_NAMED else ""
        raise ModelError(
            f"Repairing: the mean and spread of some outputs cannot be set: {'; '.join(doubts[:_MOST_NAMED])}{more}. "
            "Name the modules that shall be held, without these, in layers=[...]."
        )
    if not found:
        raise DataError("Repairing: no layer to hold was found; name modules in layers=[...].")
    return tuple(found)


def seen_layers(replica: Replica, state: Mapping[str, Tensor], batch: Batch) -> tuple[HeldLayer, ...]:
    """Return the layers whose outputs can be looked at channel by channel, in the order in which they are run.

    These are those of :func:`held_layers`, and the one whose output the network returns, whether or not their
    statistics could be set; layers that are run several times are left out.

    Args:
        replica: the network.
        state: a state of it.
        batch: some examples.
    """
    calls, _ = _calls(replica, state, batch)
    modules = dict(replica.module.named_modules())
    paths = [call.path for call in calls]
    names = [p for p in _default(calls, ()) if paths.count(p) == 1 and _names(p, ("weight",))[0] in state]
    plain = [
        p for p in names if not isinstance(modules[p], nn.LayerNorm) or len(modules[p].normalized_shape) == 1
    ]
    return tuple(_layer(modules[path], path, state, None) for path in plain)


def output_layer(
    replica: Replica, state: Mapping[str, Tensor], batch: Batch, read: Callable[[Any], Tensor]
) -> HeldLayer:
    """Return the layer whose output is the network's.

    Args:
        replica: the network.
        state: a state of it.
        batch: some examples.
        read: from all that the network returns to the output that is meant.

    Raises:
        ModelError: naming the layer that cannot be scaled, or saying that the output is no layer's.
    """
    whole: list[Any] = []
    calls, _ = _calls(replica, state, batch, whole)
    output = read(whole[0])
    last = next((c for c in reversed(calls) if c.output is output), None)
    if last is None:
        raise ModelError(
            "Scaling the outputs: what the network returns is no linear layer's or convolution's own output, so no "
            "weight and bias can take the factor. Return logits, as the last layer gives them."
        )
    module = dict(replica.module.named_modules())[last.path]
    reason = _reason(module, last.path, calls, state, _shared(replica.module), False)
    if reason is not None:
        raise ModelError(
            f"Scaling the outputs: the last layer {printable(last.path) or 'the network itself'!r} {reason}."
        )
    return _layer(module, last.path, state, None)


def _calls(
    replica: Replica, state: Mapping[str, Tensor], batch: Batch, whole: list[Any] | None = None
) -> tuple[list[_ModuleCall], list[Any]]:
    """Run the network once; return the calls of its layers in order, and the tensors that it returned.

    All that it returned is added to ``whole``.
    """
    run = bind(replica, state, read=lambda found: found)
    run.prepare(batch)
    calls: list[_ModuleCall] = []

    def note(path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], found: Any) -> None:
            calls.append(_ModuleCall(path, module, args[0] if args else None, found))

        return hook

    kinds = (*_WEIGHTED, *_NORMS)
    named = [(path, module) for path, module in replica.module.named_modules() if isinstance(module, kinds)]
    hooks = [module.register_forward_hook(note(path)) for path, module in named]
    try:
        output = run(batch)
    finally:
        for hook in hooks:
            hook.remove()
    if whole is not None:
        whole.append(output)
    return calls, [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)]


def _default(calls: Sequence[_ModuleCall], output: Sequence[Any]) -> list[str]:
    """Return the modules that hold hidden channels, once each, in the order of their calls."""
    behind = {id(call.source): call for call in reversed(calls) if isinstance(call.module, _NORMS)}
    wanted: list[str] = []
    for call in calls:
        if isinstance(call.module, _NORMS):
            if isinstance(call.module, _BATCH_NORMS):
                wanted.append(call.path)
        elif id(call.output) in behind:
            wanted.append(behind[id(call.output)].path)
        elif not any(call.output is leaf for leaf in output):
            wanted.append(call.path)
    return list(dict.fromkeys(wanted))


def _uncovered(
    modules: Mapping[str, nn.Module], calls: Sequence[_ModuleCall], state: Mapping[str, Tensor]
) -> list[str]:
    """Return complaints about weights that are applied where no layer's output is seen."""
    called = {call.path for call in calls}
    doubts: list[str] = []
    for name, tensor in state.items():
        path, _, leaf = name.rpartition(".")
        owner = modules.get(path)
        if tensor.ndim < 2 or not tensor.is_floating_point() or path in called or isinstance(owner, _TABLES):
            continue
        if owner is not None and leaf in owner._buffers:
            continue
        kind = "a module" if owner is None else f"a {type(owner).__name__}"
        doubts.append(
            f"{printable(name)!r} of {kind} is applied where its outputs cannot be seen, or not at all"
        )
    return doubts


def _shared(model: nn.Module) -> set[str]:
    """Return the names of parameters that begin at the memory where another begins: tied ones, and views of them."""
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(parameter.data_ptr(), []).append(name)
    return {name for names in owners.values() if len(names) > 1 for name in names}


def _reason(
    module: nn.Module,
    path: str,
    calls: Sequence[_ModuleCall],
    state: Mapping[str, Tensor],
    shared: set[str],
    shifted: bool,
) -> str | None:
    """Return why a module cannot be held, or None if it can.

    Only modules that compute what PyTorch's own class does are let through: for them the output is known to be affine
    in the weight and bias of its channel.
    """
    kind = next((k for k in (*_WEIGHTED, *_NORMS) if isinstance(module, k)), None)
    if kind is None:
        return f"is a {type(module).__name__}, neither a linear layer, a convolution nor a normalisation"
    count = sum(call.path == path for call in calls)
    if count != 1:
        return f"is run {count} times, and can hold the outputs of one run" if count else "is not run"
    if type(module).forward is not kind.forward or module._forward_pre_hooks or module._forward_hooks:
        return f"has a forward or hooks of its own beside those of {kind.__name__}"
    names = _names(path, ("weight", "bias"))
    if module._parameters.get("weight") is None or names[0] not in state:
        return "has no weight of its own (none, or one that is computed from others)"
    if getattr(module, "bias", None) is None:
        if shifted:
            return "has no bias, so that its mean cannot be set"
        names = names[:1]
    elif module._parameters.get("bias") is None or names[1] not in state:
        return "has a bias that is computed from others"
    if not all(state[name].is_floating_point() for name in names):
        return "has a weight or bias that is no real floating number"
    if shared.intersection(names):
        return "shares its weight or bias with another layer"
    if kind in _TRANSPOSED and module.groups != 1:
        return "is a grouped transposed convolution"
    if isinstance(module, nn.LayerNorm) and len(module.normalized_shape) != 1:
        return "normalises several axes at once"
    return None


def _source(
    path: str,
    modules: Mapping[str, nn.Module],
    calls: Sequence[_ModuleCall],
    state: Mapping[str, Tensor],
    shared: set[str],
) -> tuple[str, int] | None:
    """Return the weight, and the axis of its channels, of the layer that a normalisation directly reads, if any."""
    if not isinstance(modules[path], _NORMS):
        return None
    read = next(call.source for call in calls if call.path == path)
    maker = next((c for c in calls if c.output is read and isinstance(c.module, tuple(_WEIGHTED))), None)
    if maker is None or _reason(maker.module, maker.path, calls, state, shared, False) is not None:
        return None
    layer = _layer(maker.module, maker.path, state, None)
    return layer.weight, layer.weight_axis


def _layer(
    module: nn.Module, path: str, state: Mapping[str, Tensor], source: tuple[str, int] | None
) -> HeldLayer:
    weight, own = _names(path, ("weight", "bias"))
    bias = own if own in state else None
    statistics = tuple(name for name in _names(path, _STATISTICS) if name in state)
    if isinstance(module, (*_BATCH_NORMS, nn.GroupNorm)):
        return HeldLayer(path, weight, bias, 0, 1, statistics, isinstance(module, _BATCH_NORMS), source)
    behind = {**_WEIGHTED, **_INSTANCE_NORMS, nn.LayerNorm: 0}  # axes behind that of the channels
    axis = -1 - next(n for kind, n in behind.items() if isinstance(module, kind))
    turned = int(isinstance(module, tuple(_TRANSPOSED)))
    return HeldLayer(path, weight, bias, turned, axis, statistics, source=source)


def _names(path: str, leaves: Sequence[str]) -> list[str]:
    return [f"{path}.{leaf}" if path else leaf for leaf in leaves]
