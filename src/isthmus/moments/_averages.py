"""Buffers that an average of networks averages too, though networks compute them: which they are, and notes on them."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence

from torch import Tensor, nn

from isthmus.errors import printable
from isthmus.replica import storage_key
from isthmus.states import equal_entries

__all__ = ["averaged_buffers", "averaged_statistics", "buffers_note", "some_layers", "statistics_note"]


def averaged_statistics(
    model_or_names: nn.Module | Collection[str], averaged: Collection[str] | None = None
) -> list[str]:
    """Return the layers whose running statistics are an average of several networks'.

    Args:
        model_or_names: the architecture; or the names of a state, where those that end in ``running_mean`` tell.
        averaged: names of all tensors that are, None for all there are. Layers of other kinds than BatchNorm
            (InstanceNorm with running statistics, frozen or home-made batch normalisation) are among them even where
            statistics are recomputed.
    """
    if isinstance(model_or_names, nn.Module):
        named = model_or_names.named_modules()
        layers = [path for path, module in named if getattr(module, "running_mean", None) is not None]
    else:
        layers = [name.rpartition(".")[0] for name in model_or_names if name.endswith("running_mean")]
    if averaged is None:
        return layers
    return [layer for layer in layers if (f"{layer}.running_mean" if layer else "running_mean") in averaged]


def averaged_buffers(model: nn.Module | None, states: Sequence[Mapping[str, Tensor]]) -> list[str]:
    """Return the buffers, statistics of normalisation apart, that an average of several networks averages too.

    A layer may compute them from its weights (the singular vectors of spectral normalisation) or from data, and then
    their average is not what it would compute.

    Args:
        model: the architecture. Without it, only the vectors of spectral normalisation are known, by their names.
        states: of the networks, relabelled alike.
    """
    first, *others = states
    if model is None:
        names = [n for n in first if _is_singular_vector(n, first)]
    else:
        held = {storage_key(p) for p in model.parameters()}
        layers = {path for path, m in model.named_modules() if getattr(m, "running_mean", None) is not None}
        names = [
            name
            for name, buffer in model.named_buffers()
            if (buffer.is_floating_point() or buffer.is_complex())
            and name in first
            and name.rpartition(".")[0] not in layers
            and storage_key(buffer) not in held
        ]
    return [n for n in names if any(not equal_entries(first[n], o[n].to(first[n].device)) for o in others)]


def _is_singular_vector(name: str, state: Mapping[str, Tensor]) -> bool:
    old = name[-2:] in ("_u", "_v") and f"{name[:-2]}_orig" in state
    return old or re.search(r"\bparametrizations\..+\.\d+\._[uv]$", name) is not None


def some_layers(layers: Sequence[str], limit: int = 3) -> str:
    """Return the names of the first layers, and how many more there are, for a message."""
    more = f" and {len(layers) - limit} more" if len(layers) > limit else ""
    return ", ".join(printable(name) or "the network itself" for name in layers[:limit]) + more


def statistics_note(layers: Sequence[str], how: str, *, merged: bool) -> str | None:
    """Return a note on running statistics that are averages of several networks', or None for no layers.

    Args:
        layers: whose statistics they are.
        how: to recompute them; ends the sentence.
        merged: whether the average is a merged network, else it lies inside a line.
    """
    if not layers:
        return None
    said, effect = _said("running statistics", layers, merged)
    return f"{said}, which is wrong for averaged weights: {effect}. Recompute them: {how}"


def buffers_note(names: Sequence[str], *, merged: bool) -> str | None:
    """Return a note on other buffers that are averages of several networks', or None for no names.

    Args:
        names: of the buffers.
        merged: whether the average is a merged network, else it lies inside a line.
    """
    if not names:
        return None
    said, effect = _said("buffers", names, merged)
    return (
        f"{said}. Where the network computes them from its weights or its data (spectral normalisation, a norm of its "
        f"own), that is wrong for averaged weights: {effect}. In Python, refresh= takes a function of a state that "
        "recomputes them."
    )


def _said(what: str, names: Sequence[str], merged: bool) -> tuple[str, str]:
    """Return what is averaged, and what comes of it."""
    if merged:
        subject, whose, effect = f"The merged {what}", "the networks'", "the result may be near chance"
    else:
        subject, whose = f"{what.capitalize()} inside the line", "the two ends'"
        effect = "the losses and the barrier say little"
    return f"{subject} ({some_layers(names)}) are the average of {whose}", effect
