"""``refine``: from an alignment to one whose path loses less, by learning what the group leaves free."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from isthmus.batches import Batches, device_of, first_batch
from isthmus.couplings import Coupling, Monomial, Permutation
from isthmus.errors import DataError, IsthmusWarning, VerificationError
from isthmus.losses import Loss
from isthmus.matching import Alignment, OnStage, Problem, Status, Symmetry
from isthmus.refinement._elements import Elements
from isthmus.refinement._path_loss import PathLoss
from isthmus.refinement._search import Learnt, Search
from isthmus.refinement._settings import RefineSettings
from isthmus.refinement._stream import TrainingStream
from isthmus.states import digest_of
from isthmus.symmetry import Acts, Outputs, Relabelling, SymmetrySpec, output_reader

__all__ = ["NOTHING", "refine", "refined"]

MOST_CHANGE = 1e-8
"""Largest relative change of B's outputs in float64: rounding of factors and maps of the largest size allowed."""
NOTHING = (
    "nothing was refined: no factors, rotations or maps may act on the units of any group. Folding (isthmus.fold) "
    "makes more of a network's symmetries usable; see the column 'acts' of isthmus symmetry."
)


def refine(
    model_a: nn.Module,
    model_b: nn.Module | Mapping[str, Tensor],
    alignment: Alignment | None,
    batches: Batches,
    *,
    loss: Loss | None = None,
    steps: int | None = None,
    seconds: float | None = None,
    rate: float = 0.2,
    spread: float | None = None,
    every: int = 50,
    batch_size: int | None = None,
    held_out: Batches | None = None,
    symmetry: Symmetry = "all",
    outputs: Outputs = None,
    spec: SymmetrySpec | None = None,
    check: bool = True,
    seed: int = 0,
    state_file: str | Path | None = None,
    on_stage: OnStage | None = None,
) -> Alignment:
    r"""Return an alignment whose path has a smaller loss, never a larger barrier on held-out data than it began with.

    The relabelling that an alignment found is followed by an element :math:`g` of the continuous part of the group
    (positive factors, rotations, invertible maps, see :class:`isthmus.symmetry.Acts`), which minimises the mean loss on
    the path,

    .. math:: \min_g \; \mathbb E_{t, x}\, \ell\bigl((1-t)\,\theta_A + t\, g\, \theta_B;\, x\bigr) .

    B's function is the same for every :math:`g`. One batch, one position :math:`t`, one run forward and one backward
    per step, with Adam. Only B is moved: the group acts linearly, so a path between :math:`h\theta_A` and
    :math:`g\theta_B` is :math:`h` applied to the one between :math:`\theta_A` and :math:`h^{-1}g\,\theta_B`, whose
    function is the same. Layers of BatchNorm normalise by the batch meanwhile: measure such a path with recomputed
    statistics, as :func:`isthmus.line` does.

    Args:
        model_a: network A, in evaluation mode; not mutated.
        model_b: network B, or its state; not mutated.
        alignment: where to begin, an alignment of B to A; None begins with B as it is.
        batches: training data with targets (see :mod:`isthmus.batches`), shuffled, not sorted by class.
        loss: see :data:`isthmus.losses.Loss`; its default is that of :func:`isthmus.line`.
        steps: of the optimiser; default 500 without ``seconds``.
        seconds: by the clock; what is reached then depends on the machine.
        rate: at which the optimiser begins (:class:`RefineSettings`): tuned first. Too small a rate does little in so
            many steps; too large a one shows as a held-out barrier that rises, and the start is returned.
        spread: width of the interval around :math:`t = 1/2` from which positions are taken, from 0 (the middle alone,
            where the loss is highest and networks are merged) to 1 (the whole path);
            default: 0 where factors alone are learnt, else 1.
        every: steps between looks at held-out data.
        batch_size: examples of a batch; by default batches are taken as they come, and those of more than 512 examples
            cut, where the loss allows it.
        held_out: training data by which the best element is chosen; by default a fifth of the batches, at most 2,000
            examples. Give some where the data do not fit into memory and shuffle themselves.
        symmetry: what may be learnt, as for :func:`isthmus.align`.
        outputs: name or position of the one output that is scored, as for :func:`isthmus.line`.
        spec: the symmetries, where there is no alignment; default: discovered.
        check: verify the symmetries before, and measure how far B's outputs changed afterwards.
        seed: of everything random.
        state_file: a ``.safetensors`` file in which the search is kept from look to look; one that is there is taken
            up again.
        on_stage: told what begins, and how much of it is done.

    Returns:
        The alignment: its ``sweeps`` are minus the held-out barriers, largest excess of the loss at three positions
        over the chord, before and at every look; its settings say ``"refinement"`` and its notes how far the factors
        spread. Where the group has no continuous part, the start with a note.

    Raises:
        DataError: no targets, too few examples, or a number out of range.
        SymmetryError: the alignment is of another network, or moves A.
        ModelError: the code cannot be run on given tensors, or its loss is NaN.
        CheckpointError: the state file is another one's.
        VerificationError: B's function changed.

    Source:
        Theus et al. 2025 learn permutations and rotations of transformers on the path. Ours learns what is continuous
        of every discovered group, factors included, and leaves the order as it was found.
    """
    settings = RefineSettings(steps, seconds, rate, spread, every, seed)
    if alignment is not None and spec is not None:
        raise DataError("Refining on the path: give an alignment, which has a spec, or spec=; not both.")
    used = spec if alignment is None else alignment.spec
    problem = Problem(
        model_a,
        model_b,
        batches=batches,
        spec=used,
        outputs=None if used is not None else outputs,
        seed=seed,
        symmetry=symmetry,
    )
    if alignment is not None:
        alignment.check_network(problem.state_b)
    start = {} if alignment is None else alignment.couplings
    options = {"batch_size": batch_size, "held_out": held_out, "outputs": outputs, "state_file": state_file}
    if check:
        problem.verification.require()
    found = refined(problem, start, settings, loss, on_stage, **options)
    return _as_alignment(problem, alignment, start, found, settings, check)


def refined(
    problem: Problem,
    start: Mapping[str, Coupling],
    settings: RefineSettings,
    loss: Loss | None = None,
    tell: OnStage | None = None,
    *,
    batch_size: int | None = None,
    held_out: Batches | None = None,
    outputs: Outputs = None,
    state_file: str | Path | None = None,
    classes: Mapping[str, Acts] | None = None,
) -> Learnt:
    """Return what the search finds for a problem: couplings of all groups, those of the start included.

    Args:
        problem: networks and data; its ``symmetry`` says what may be learnt.
        start: couplings by group.
        settings: budget and rate.
        loss: as for :func:`refine`, and so are the other options.
        tell: told how far it is.
        batch_size: examples of a batch.
        held_out: data to choose by.
        outputs: the output that is scored.
        state_file: where to keep the search.
        classes: what may be learnt, by group, instead of the problem's classes.

    Raises:
        IsthmusError: as :func:`refine`.
    """
    spec = problem.spec
    begun = Relabelling(
        spec, {**{n: Permutation.identity(g.size) for n, g in spec.groups.items() if not g.planes}, **start}
    )
    state_b = begun.apply(problem.state_b)
    sizes = {name: group.size for name, group in spec.groups.items()}
    classes = problem.classes if classes is None else classes
    elements = Elements.of(classes, sizes, device_of(problem.model_a))
    if not elements:
        return Learnt(begun.couplings, (), 0.0, 0, (NOTHING,))
    moving = list(elements.couplings(torch.float64))
    example = first_batch(problem.batches)
    path = PathLoss(
        problem.model_a,
        problem.state_a,
        state_b,
        spec,
        moving,
        example,
        loss,
        output_reader(outputs, "Refining on the path"),
    )
    stream = TrainingStream(
        problem.batches, settings.seed, batch_size=batch_size, cut=path.scorer.by_example, held_out=held_out
    )
    file = None if state_file is None else Path(state_file)
    identity = "" if file is None else _identity(problem, state_b, settings, path, stream, moving)
    found = Search(path, elements, stream, settings, file, tell).run(identity)
    whole = begun.then(Relabelling(spec, found.couplings))
    return replace(
        found, couplings={name: whole.couplings[name] for name in spec.groups if name in whole.couplings}
    )


def _identity(
    problem: Problem,
    state_b: Any,
    settings: RefineSettings,
    path: PathLoss,
    stream: TrainingStream,
    moving: Sequence[str],
) -> str:
    """Return a digest of all that a search depends on."""
    first = stream.batch(0)
    tensors = {
        f"{k}": v
        for k, v in enumerate((*first.args, *first.kwargs.values(), first.targets))
        if isinstance(v, Tensor)
    }
    facts = [asdict(settings), path.scorer.name, list(moving), str(problem.symmetry)]
    digests = [digest_of(problem.state_a), digest_of(state_b), digest_of(tensors)]
    return hashlib.sha256(json.dumps([facts, digests]).encode()).hexdigest()


def _as_alignment(
    problem: Problem,
    alignment: Alignment | None,
    start: Mapping[str, Coupling],
    found: Learnt,
    settings: RefineSettings,
    check: bool,
) -> Alignment:
    """Return what was found as an alignment, verified."""
    change = problem.function_change(found.couplings) if check else None
    if change is not None and change > max(MOST_CHANGE, problem.verification.tolerance):
        raise VerificationError(
            f"Refining changed the function of B: its outputs differ by {change:.2g} of the largest one. Was the spec "
            "discovered on this architecture, with this version, and were the tensors that it takes as ones and zeros "
            "such in B too?"
        )
    began = "none" if alignment is None else alignment.method
    if not found.trace:
        warnings.warn(NOTHING, IsthmusWarning, stacklevel=3)
    kept = {k: v for k, v in asdict(settings).items() if v is not None}
    notes = () if alignment is None else alignment.notes
    return Alignment(
        found.couplings,
        problem.spec,
        f"{began}, refined" if found.trace else began,
        sweeps=tuple(-value for _, value in found.trace),
        status=Status.BUDGET if found.trace else Status.SINGLE_PASS,
        notes=tuple(dict.fromkeys((*notes, *found.notes, *spread(found.couplings)))),
        settings={
            **(
                {"caches": [[*place, way] for place, way in problem.traced.caches.items()]}
                if alignment is None
                else alignment.settings
            ),
            "refinement": {**kept, "taken": found.steps, "looks": [list(look) for look in found.trace]},
        },
        seed=settings.seed,
        verification_error=change,
        digest_a=digest_of(problem.state_a),
        digest_b=digest_of(problem.state_b),
    )


def spread(couplings: Mapping[str, Coupling]) -> tuple[str, ...]:
    """Return a remark on how far factors spread, where there are any but one and minus one."""
    sizes = [c.factors.detach().abs() for c in couplings.values() if isinstance(c, Monomial)]
    every = torch.cat(sizes) if sizes else torch.ones(0)
    if not len(every) or bool((every == 1).all()):
        return ()
    low, middle, high = torch.quantile(
        every.double(), torch.tensor([0.05, 0.5, 0.95], dtype=torch.float64)
    ).tolist()
    return (f"factors of {len(every)} units: 5 % below {low:.3g}, median {middle:.3g}, 5 % above {high:.3g}",)
