"""Writing a network with batch normalisation so that every layer is affine in its tensors."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import torch
from torch import Tensor, fx

from isthmus.errors import ModelError
from isthmus.layers import BATCH_NORMS, BatchNorm, Site, find_sites
from isthmus.symmetry import Trace, bound_arguments, module_of, operator_of

__all__ = ["fold_normalisation"]

_HOLDERS = ("aten.linear", "aten.conv1d", "aten.conv2d", "aten.conv3d")
"""Layers that take the scale into their weights; which ones do decides what path is certified."""


def fold_normalisation(trace: Trace, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a state of the same function whose batch normalisations are ``scale · x + shift``, exactly.

    Where a layer feeds one normalisation alone, the scale is multiplied into the layer's weight and the
    normalisation keeps only the shift; elsewhere the normalisation keeps both. Running means become zero and
    running variances ``1 - eps``, so that interpolating two such states interpolates scales and shifts.

    Args:
        trace: the network.
        state: its tensors, float64.

    Raises:
        ModelError: a normalisation without gain and shift, which cannot hold them, or with shared tensors.
    """
    folded = dict(state)
    sites = {site.name: site for site in find_sites(trace)}
    uses = Counter(
        trace.tensors[n.name] for n in trace.graph.nodes if n.name in trace.tensors for _ in n.users
    )
    for node in trace.graph.nodes:
        if node.op != "call_function" or operator_of(node) not in BATCH_NORMS:
            continue
        norm, holder = _own_norm(node, trace, uses), _holder(node, sites, uses)
        bias = None if holder is None or holder.bias is None else state[holder.bias]
        scale, shift = norm.affine(state, bias)
        if holder is not None:
            folded[holder.weight], _ = norm.fold(state, state[holder.weight], bias)
            scale = torch.ones_like(scale)
            if bias is not None:
                folded[str(holder.bias)] = torch.zeros_like(bias)
        folded[str(norm.weight)], folded[str(norm.bias)] = scale, shift
        folded[norm.running_mean] = torch.zeros_like(scale)
        folded[norm.running_var] = torch.full_like(scale, 1 - norm.eps)
    return folded


def _own_norm(node: fx.Node, trace: Trace, uses: Counter[str]) -> BatchNorm:
    """Read a normalisation whose four tensors nothing else uses."""
    given = bound_arguments(node)
    for key in ("weight", "bias", "running_mean", "running_var"):
        name = trace.tensors.get(getattr(given.get(key), "name", ""), "")
        if uses[name] != 1:
            raise ModelError(
                f"certify: the batch normalisation in {module_of(node)!r} has no {key} of its own. Only "
                "affine normalisation with running statistics, used once, can be folded."
            )
    found = BatchNorm.from_node(node, trace.tensors)
    assert found is not None, "its running statistics are tensors of the state"
    return found


def _holder(node: fx.Node, sites: Mapping[str, Site], uses: Counter[str]) -> Site | None:
    """Return the layer that feeds a normalisation alone and can take its scale."""
    source = bound_arguments(node)["input"]
    site = sites.get(source.name)
    if site is None or site.norm is None or site.out_axis != 0 or operator_of(source) not in _HOLDERS:
        return None
    return site if all(uses[n] == 1 for n in (site.weight, site.bias) if n is not None) else None
