"""Teach discovery an operator of one's own: without the rule, the units that flow through it are pinned."""

import torch

from isthmus.symmetry import Operation, Value, rule


@torch.library.custom_op("own::squash", mutates_args=())
def squash(x: torch.Tensor) -> torch.Tensor:
    """Return x / (1 + |x|)."""
    return x / (1 + x.abs())


squash.register_fake(torch.empty_like)


@rule("own.squash", kind="local")  # every entry depends on the entry at the same place only
def _squash(op: Operation, x: Value) -> Value:
    return x
