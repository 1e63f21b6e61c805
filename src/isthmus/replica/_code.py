"""Whether two modules are the same code, and what they hold differently if not."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from isthmus.errors import ModelError
from isthmus.replica._contents import contents, differing
from isthmus.replica._copying import private_copy
from isthmus.replica._loading import rebuild
from isthmus.replica._outputs import differ, output_leaves
from isthmus.replica._replica import Replica

__all__ = ["different_code", "differences", "require_same_code"]

_SAME = 1e-3
"""Share of the largest output by which two ways of running one state may differ."""


def differences(one: nn.Module, two: nn.Module) -> list[str]:
    """Name what two networks of one architecture hold differently besides their states: settings and tensors."""
    first, second = (private_copy(m) for m in (one, two))
    for module in (first, second):
        rebuild(module)
    found = list(differing(contents(first), contents(second)).values())
    kinds = zip(first.named_modules(), second.named_modules(), strict=False)
    classes = [
        f"{path or 'the network'} ({type(m).__name__} against {type(n).__name__})"
        for (path, m), (_, n) in kinds
        if type(m) is not type(n)
    ]
    return classes + found


def require_same_code(
    model_a: nn.Module, model_b: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> None:
    """Check that B's tensors compute in A's code what they compute in B's.

    Raises:
        ModelError: they do not; what the two modules hold differently besides their states is named.
    """
    a, b = Replica(model_a), Replica(model_b)
    state = b.own_state()
    a.check(state)
    outputs = []
    for replica in (b, a):
        replica.examine(state, args, kwargs, eras=False)
        outputs.append(output_leaves(replica.run_on(state, args, kwargs)))
    if differ(*outputs, tolerance=_SAME):
        raise ModelError(different_code(model_a, model_b, "outputs differ"))


def different_code(model_a: nn.Module, model_b: nn.Module, how: str, limit: int = 4) -> str:
    """Return the words on a B that computes something else than its tensors do in A's code."""
    found = differences(model_a, model_b)
    more = f" and {len(found) - limit} more" if len(found) > limit else ""
    what = (
        f"What A and B hold differently besides their states: {', '.join(found[:limit])}{more}."
        if found
        else "Their modules hold the same values besides the state, so the code differs."
    )
    return (
        f"Model B computes something else than its tensors do in model A's code: {how}. {what} Both must be built by "
        "the same code with the same settings."
    )
