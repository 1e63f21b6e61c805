r"""Where the loss rises: networks whose first layers lie at the point, and whose others are still an end's.

With :math:`\theta_t` the point and :math:`\theta_A, \theta_B` the ends, let :math:`\theta_A^{(k)}` have the tensors of
:math:`\theta_t` in the first :math:`k` stages and those of :math:`\theta_A` in all others, and likewise for B. The rise
up to stage :math:`k` is

.. math:: (1-t)\,[L(\theta_A^{(k)})-L(\theta_A)] + t\,[L(\theta_B^{(k)})-L(\theta_B)] ,

0 before the first stage and the whole rise of the point above its chord after the last, so that the differences of
neighbours add up to it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from torch import Tensor, nn

from isthmus.batches import Batch
from isthmus.evaluation import bind
from isthmus.replica import Replica
from isthmus.states import State

__all__ = ["Stage", "stage_names", "stages_of"]


@dataclass(frozen=True)
class Stage:
    """Some layers in a row.

    Attributes:
        name: of the first module among them.
        layers: names of the modules with weights.
        rise: rise of the loss above the chord where all layers up to here lie at the point, in the unit of the loss.
        added: what these layers add to it.
    """

    name: str
    layers: tuple[str, ...]
    rise: float
    added: float


def stage_names(
    replica: Replica, state: Mapping[str, Tensor], batch: Batch, most: int
) -> list[dict[str, list[str]]]:
    """Return the tensors of each stage by module, stages in the order in which they are run.

    A stage begins with a module that has a weight of two axes or more, and takes what follows without one, such as
    norms, with it. Neighbours are joined where there would be more than ``most``. Modules that are never called by
    themselves come with the one that holds them.

    Args:
        replica: the network.
        state: a state of it.
        batch: some examples.
        most: number of stages.
    """
    owned: dict[str, list[str]] = {}
    for name in state:
        owned.setdefault(name.rpartition(".")[0], []).append(name)
    order = [path for path in _called(replica, state, batch) if path in owned]
    late = [path for path in owned if path not in order]  # parametrised weights, and layers that are not run
    for path in late:
        holder = next((p for p in _holders(path) if p in order), None)
        order.insert(order.index(holder) + 1 if holder is not None else len(order), path)
    steps: list[dict[str, list[str]]] = []
    weighted = False
    for path in order:
        heavy = any(state[name].ndim > 1 and state[name].is_floating_point() for name in owned[path])
        if not steps or (heavy and weighted):
            steps.append({})
            weighted = False
        steps[-1][path] = owned[path]
        weighted = weighted or heavy
    return _joined(_together(steps, _twins(replica.source)), most)


def stages_of(
    steps: Sequence[Mapping[str, Sequence[str]]],
    ends: tuple[State, State],
    point: State,
    t: float,
    loss: Callable[[State], float],
    on_step: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[Stage, ...]:
    """Measure the rise up to every stage.

    Args:
        steps: see :func:`stage_names`.
        ends: states of A and B.
        point: the state between them.
        t: its position.
        loss: of a state.
        on_step: called with what was done of how much.
    """
    current = [dict(end) for end in ends]
    base = [loss(end) for end in ends]
    found: list[Stage] = []
    before = 0.0
    for done, step in enumerate(steps):
        on_step(done, len(steps))
        for state in current:
            state.update({name: point[name] for names in step.values() for name in names})
        if done == len(steps) - 1:  # both are the point
            first = second = loss(dict(point))
        else:
            first, second = (loss(state) for state in current)
        rise = (1 - t) * (first - base[0]) + t * (second - base[1])
        heavy = [p for p, names in step.items() if any(point[n].ndim > 1 for n in names)] or list(step)
        found.append(Stage(heavy[0], tuple(heavy), rise, rise - before))
        before = rise
    return tuple(found)


def _twins(model: nn.Module) -> dict[str, str]:
    """Return, of names that share a tensor, the first for each."""
    firsts: dict[int, str] = {}
    return {
        name: firsts.setdefault(id(tensor), name)
        for name, tensor in (
            *model.named_parameters(remove_duplicate=False),
            *model.named_buffers(remove_duplicate=False),
        )
    }


def _together(steps: list[dict[str, list[str]]], twins: Mapping[str, str]) -> list[dict[str, list[str]]]:
    """Let all names of one tensor move in the first stage that has one of them."""
    moved: dict[str, int] = {}
    found: list[dict[str, list[str]]] = [{} for _ in steps]
    for k, step in enumerate(steps):
        for path, names in step.items():
            for name in names:
                at = moved.setdefault(twins.get(name, name), k)
                found[at].setdefault(path, []).append(name)
    return [step for step in found if step]


def _called(replica: Replica, state: Mapping[str, Tensor], batch: Batch) -> list[str]:
    """Return the modules in the order in which they are first called, each before its parts."""
    run = bind(replica, state, read=lambda output: output)
    run.prepare(batch)
    order: dict[str, None] = {}
    hooks = [
        module.register_forward_pre_hook(_noting(order, path))
        for path, module in replica.module.named_modules()
    ]
    try:
        run(batch)
    finally:
        for hook in hooks:
            hook.remove()
    return list(order)


def _noting(order: dict[str, None], path: str) -> Callable[[nn.Module, object], None]:
    def note(module: nn.Module, args: object) -> None:
        order.setdefault(path)

    return note


def _holders(path: str) -> list[str]:
    """Return the modules that hold a module, the nearest first, the network itself last."""
    parts = path.split(".")
    return [".".join(parts[:k]) for k in range(len(parts) - 1, -1, -1)]


def _joined(steps: list[dict[str, list[str]]], most: int) -> list[dict[str, list[str]]]:
    if len(steps) <= most:
        return steps
    bounds = [round(k * len(steps) / most) for k in range(most + 1)]
    joined: list[dict[str, list[str]]] = []
    for start, stop in pairwise(bounds):
        joined.append({path: names for step in steps[start:stop] for path, names in step.items()})
    return joined
