"""The functional graph of an exported program, with composite operators kept whole.

``ExportedProgram.run_decompositions({})`` gives it, but first tells PyTorch of some five hundred composite operators,
most of which do not occur, that none of them is to be decomposed: 0.13 of the 0.15 CPU seconds that a small
perceptron takes. Here only those that occur are named, where that is known to give the same graph.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator

import torch
from torch import fx
from torch.export import ExportedProgram

__all__ = ["composites", "functional"]

_COMPOSITE = "CompositeImplicitAutograd"

# Composite operators that are always decomposed, since their result may share memory with their argument. All that they
# call are moves, copies and native_batch_norm, with kernels of their own (view, permute, slice, clone, …), so that no
# composite operator that would stay can come out of them. Whatever is not listed goes the long way.
_MOVES = frozenset(
    f"aten.{name}"
    for name in (
        "batch_norm",
        "chunk",
        "contiguous",
        "dropout",
        "expand_as",
        "feature_dropout",
        "flatten",
        "movedim",
        "narrow",
        "reshape",
        "to",
        "unflatten",
        "view_as",
    )
)


def functional(program: ExportedProgram) -> ExportedProgram:
    """Return what ``program.run_decompositions({})`` returns: a graph without writes, nothing decomposed."""
    kept = composites(program.graph_module)
    if kept is None:
        return program.run_decompositions({})
    try:  # the second half of run_decompositions, which is private
        from torch._export.utils import _special_op_to_preserve_cia as keep
        from torch.export import exported_program as exported

        return exported._disable_prexisiting_fake_mode(exported._decompose_exported_program)(
            program,
            cia_to_decomp=dict.fromkeys(kept, keep),
            python_decomp_table={},
            joint_loss_index=None,
            decompose_custom_triton_ops=False,
        )
    except (ImportError, AttributeError, TypeError):  # another version of PyTorch
        return program.run_decompositions({})


def composites(module: fx.GraphModule) -> list[torch._ops.OpOverload] | None:
    """Return the composite operators of a graph that stay whole; ``None`` where other ones might come up."""
    try:
        from torch._export.utils import _is_preservable_cia_op as stays
    except ImportError:  # of another version
        return None
    kept: dict[torch._ops.OpOverload, None] = {}
    for node in _calls(module):
        target = node.target
        if not isinstance(target, torch._ops.OpOverload):
            return None
        if stays(target):
            kept[target] = None
        elif _is_composite(target) and str(target.overloadpacket) not in _MOVES:
            return None
    return list(kept)


def _calls(module: fx.GraphModule) -> Iterator[fx.Node]:
    for part in module.modules():
        for node in part.graph.nodes if isinstance(part, fx.GraphModule) else ():
            wrapped = isinstance(node.target, torch._ops.HigherOrderOperator)
            if node.op == "call_function" and node.target is not operator.getitem and not wrapped:
                yield node


def _is_composite(target: torch._ops.OpOverload) -> bool:
    in_python = getattr(torch._C.DispatchKey, _COMPOSITE) in target.py_kernels
    return in_python or torch._C._dispatch_has_kernel_for_dispatch_key(target.name(), _COMPOSITE)
