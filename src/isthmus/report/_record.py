"""The result record: the only thing a report reads. Plain values, as stored in ``result.json``.

A record is written by whoever ran the comparison (the demo, a study) next to ``relabelling.npz``; a report
can be drawn again from the two files at any time, on a machine that never had the networks.
"""

from __future__ import annotations

import datetime
import itertools
import json
import math
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NotRequired, TypedDict, cast

import numpy as np

from isthmus.errors import CheckpointError
from isthmus.report._schema import Fraction, NonNegative, check, fail

__all__ = [
    "Record",
    "RecordedBlock",
    "RecordedCost",
    "RecordedCoupling",
    "RecordedDimension",
    "RecordedGroup",
    "RecordedLine",
    "RecordedMethod",
    "RecordedNetwork",
    "RecordedPin",
    "RecordedScore",
    "RecordedSlot",
    "RecordedSymmetry",
    "RecordedVerification",
    "RecordedVersions",
    "StoredRelabelling",
    "check_arrays",
    "check_record",
    "read_record",
]


class RecordedVersions(TypedDict):
    """What the numbers were computed with; further keys are shown as they are."""

    python: str
    torch: str
    numpy: str
    scipy: str
    machine: str
    commit: NotRequired[str]


class RecordedNetwork(TypedDict):
    """The architecture both networks share."""

    name: str
    parameters: int


class RecordedScore(TypedDict):
    """Loss in the record's unit and accuracy as a fraction (``None`` where accuracy makes no sense)."""

    loss: float
    accuracy: Fraction | None


class RecordedSlot(TypedDict):
    """Where the units of a group sit on one tensor axis; ``index`` is the index map in words."""

    tensor: str
    axis: int
    index: str


class RecordedBlock(TypedDict):
    """The unit of another group (a head) that the units of a group lie in; alike groups of all units are a family."""

    group: str
    unit: int
    family: str


class RecordedGroup(TypedDict):
    """Axes that move together; ``acts`` is the class of what may act, in words."""

    name: str
    size: int
    slots: list[RecordedSlot]
    acts: NotRequired[str]
    block: NotRequired[RecordedBlock]


class RecordedPin(TypedDict):
    """An axis that cannot move, and why."""

    tensor: str
    axis: int
    size: int
    reason: str
    operator: str
    module: str


class RecordedVerification(TypedDict):
    """Largest relative change of the outputs over random relabellings, in float64."""

    max_relative_error: NonNegative
    draws: int
    tolerance: NonNegative


class RecordedSymmetry(TypedDict):
    """The discovered symmetry of the network."""

    groups: list[RecordedGroup]
    pinned: list[RecordedPin]
    fraction_moved: Fraction
    verification: RecordedVerification


class RecordedCost(TypedDict):
    """Matched cost of one group in the method's own units (``None``: the method has none there)."""

    before: float | None
    after: float | None


class RecordedCoupling(TypedDict):
    """What a method does to the units of one group (see :class:`isthmus.couplings.CouplingSummary`).

    ``similarity`` is the cosine of the weights it acts on, before and after; ``text`` says all of it in words.
    """

    kind: str
    units: int
    moved: int | None
    flipped: int | None
    factors: list[NonNegative] | None
    condition: NonNegative | None
    similarity: list[float] | None
    text: str


class RecordedDimension(TypedDict):
    """Approximate dimension of the matched matrix of one group (``None``: a zero matrix has none)."""

    uncentred: float | None
    centred: float | None
    stable_rank: float | None
    entropy_rank: float | None


class RecordedLine(TypedDict):
    """What was measured on one split along the straight line from A (t = 0) to the relabelled B (t = 1).

    Lists have one entry per position. Losses, the chord and the barrier are in the record's unit, accuracies
    are fractions, ``lmc_error`` is in the units of the network's outputs. ``loss_error`` and
    ``barrier_error`` are standard errors, ``None`` where none was computed.
    """

    t: list[Fraction]
    loss: list[float]
    loss_error: list[NonNegative] | None
    accuracy: list[Fraction] | None
    chord: list[float]
    lmc_error: list[NonNegative]
    lmc_error_sup: NonNegative
    barrier: float
    barrier_at: Fraction
    barrier_error: NonNegative | None
    midpoint_loss: float
    midpoint_accuracy: Fraction | None
    ensemble_loss: float | None
    ensemble_accuracy: Fraction | None


class RecordedMethod(TypedDict):
    """One way of relabelling B; ``barrier`` and the midpoint repeat the line on the record's ``split``.

    ``couplings`` is there where more than permutations may act.
    """

    barrier: float
    midpoint_loss: float
    midpoint_accuracy: Fraction | None
    verification_error: NonNegative | None
    seconds: NonNegative
    status: str
    sweeps: list[float]
    moved: dict[str, Fraction]
    matched_cost: dict[str, RecordedCost]
    dimension: dict[str, RecordedDimension]
    notes: NotRequired[list[str]]
    couplings: NotRequired[dict[str, RecordedCoupling]]
    line: dict[str, RecordedLine]


class Record(TypedDict):
    """A whole comparison of two networks; ``methods`` starts with ``none``, the line without relabelling.

    ``unit`` is that of losses and barriers, nats per example where it is missing.
    """

    isthmus_version: str
    created: str
    versions: RecordedVersions
    settings: dict[str, Any]
    network: RecordedNetwork
    split: str
    unit: NotRequired[str]
    endpoints: dict[str, dict[str, RecordedScore]]
    symmetry: RecordedSymmetry
    methods: dict[str, RecordedMethod]


@dataclass(frozen=True)
class StoredRelabelling:
    """The stored arrays.

    Attributes:
        similarity: per group, the correlation of A's unit ``i`` with B's unit ``j`` in the original order,
            shape ``(n, n)``; NaN for a unit that never varies.
        permutation: per method and group, ``permutation[i]`` is the unit of B placed at position ``i``,
            shape ``(n,)``.
        factors: per method and group, what these units are multiplied by, not zero, shape ``(n,)``; one where it is
            missing.
        spectrum: per method and group, the singular values of an invertible map, falling, shape ``(n,)``.
        after: per method and group, the correlation of A's unit ``i`` with unit ``j`` of B relabelled, shape
            ``(n, n)``, where no permutation of ``similarity`` is that: units are mixed, or come from another
            block of B.
    """

    similarity: dict[str, np.ndarray]
    permutation: dict[str, dict[str, np.ndarray]]
    factors: dict[str, dict[str, np.ndarray]] = field(default_factory=dict[str, dict[str, np.ndarray]])
    spectrum: dict[str, dict[str, np.ndarray]] = field(default_factory=dict[str, dict[str, np.ndarray]])
    after: dict[str, dict[str, np.ndarray]] = field(default_factory=dict[str, dict[str, np.ndarray]])


def check_record(record: Mapping[str, Any]) -> Record:
    """Check a record and return a clean copy (a NaN where ``None`` is allowed becomes ``None``).

    Args:
        record: plain values, as described by :class:`Record`; unknown keys are kept.

    Raises:
        CheckpointError: a key is missing, a value has the wrong type or range, lists differ in length, the
            baseline ``none`` or the headline split is missing, or a headline number contradicts its line.
    """
    clean = cast("Record", check(record, Record))
    try:
        datetime.datetime.fromisoformat(clean["created"])
    except ValueError as error:
        raise fail("created", "an ISO 8601 date and time", clean["created"]) from error
    if next(iter(clean["methods"]), None) != "none":
        raise fail("methods", "'none' (no relabelling) as the first method", list(clean["methods"]))
    if set(clean["endpoints"]) != {"a", "b"}:
        raise fail("endpoints", "the keys 'a' and 'b'", sorted(clean["endpoints"]))
    groups = {group["name"] for group in clean["symmetry"]["groups"]}
    for name, method in clean["methods"].items():
        _check_method(method, clean["split"], groups, f"methods.{name}")
    return clean


def _check_method(method: RecordedMethod, split: str, groups: set[str], path: str) -> None:
    for split_name, line in method["line"].items():
        _check_line(line, f"{path}.line.{split_name}")
    if split not in method["line"]:
        raise fail(f"{path}.line", f"the split {split!r}", list(method["line"]))
    for key in ("barrier", "midpoint_loss"):
        if not math.isclose(method[key], method["line"][split][key], rel_tol=1e-6, abs_tol=1e-9):
            raise fail(f"{path}.{key}", f"the {split} line's {method['line'][split][key]}", method[key])
    for group, coupling in method.get("couplings", {}).items():
        for key, count in (("factors", 3), ("similarity", 2)):
            values = coupling[key]
            if values is not None and len(values) != count:
                raise fail(f"{path}.couplings.{group}.{key}", f"{count} numbers", values)
    for key in ("moved", "matched_cost", "dimension", "couplings"):
        if strangers := set(method.get(key, ())) - groups:
            raise fail(f"{path}.{key}", f"only groups of the symmetry {sorted(groups)}", sorted(strangers))


def _check_line(line: RecordedLine, path: str) -> None:
    t = line["t"]
    if len(t) < 2 or t[0] != 0.0 or t[-1] != 1.0 or any(b <= a for a, b in itertools.pairwise(t)):
        raise fail(f"{path}.t", "positions that rise strictly from 0 to 1", t)
    for key in ("loss", "chord", "lmc_error", "loss_error", "accuracy"):
        series = line[key]
        if series is not None and len(series) != len(t):
            raise fail(f"{path}.{key}", f"{len(t)} entries, one per position", f"{len(series)} entries")


def check_arrays(record: Record, arrays: Mapping[str, Any]) -> StoredRelabelling:
    """Sort ``similarity/<group>``, ``permutation/<method>/<group>`` and the like, and check them against the record.

    Args:
        record: a checked record.
        arrays: any mapping of names to arrays, such as an open ``relabelling.npz``; other names are ignored.

    Raises:
        CheckpointError: an unknown group or method, a wrong shape or dtype, an infinite similarity, a permutation
            that misses an index, a factor of zero, or a singular value that is not positive.
    """
    sizes = {group["name"]: group["size"] for group in record["symmetry"]["groups"]}
    found = StoredRelabelling({}, {})
    checks = {
        "permutation": (found.permutation, _check_permutation),
        "factors": (found.factors, partial(_check_numbers, what="numbers that are finite and not zero")),
        "spectrum": (found.spectrum, partial(_check_numbers, what="positive numbers", positive=True)),
        "after": (found.after, _check_similarity),
    }
    for name in arrays:
        kind, _, rest = name.partition("/")
        if kind == "similarity":
            found.similarity[rest] = _check_similarity(
                np.asarray(arrays[name]), _size(rest, sizes, name), name
            )
        elif kind in checks:
            by_method, check_array = checks[kind]
            method, _, group = rest.partition("/")
            if method not in record["methods"]:
                raise fail(f"array {name!r}", f"a method among {list(record['methods'])}", method)
            checked = check_array(np.asarray(arrays[name]), _size(group, sizes, name), name)
            by_method.setdefault(method, {})[group] = checked
    return found


def _size(group: str, sizes: Mapping[str, int], name: str) -> int:
    if group not in sizes:
        raise fail(f"array {name!r}", f"a group among {list(sizes)}", group)
    return sizes[group]


def _check_similarity(values: np.ndarray, size: int, name: str) -> np.ndarray:
    if values.shape != (size, size) or values.dtype.kind != "f" or np.isinf(values).any():
        raise fail(
            f"array {name!r}",
            f"floating-point numbers without infinity of shape ({size}, {size})",
            f"{values.dtype} {values.shape}",
        )
    return values


def _check_permutation(values: np.ndarray, size: int, name: str) -> np.ndarray:
    if values.dtype.kind not in "iu" or not np.array_equal(np.sort(values), np.arange(size)):
        raise fail(f"array {name!r}", f"each of 0..{size - 1} once", f"{values.dtype} {values.shape}")
    return values.astype(np.int64)


def _check_numbers(
    values: np.ndarray, size: int, name: str, *, what: str, positive: bool = False
) -> np.ndarray:
    """Return numbers by unit."""
    good = values.shape == (size,) and values.dtype.kind == "f" and bool(np.isfinite(values).all())
    if not good or bool((values <= 0 if positive else values == 0).any()):
        raise fail(f"array {name!r}", f"{what} of shape ({size},)", f"{values.dtype} {values.shape}")
    return values


def read_record(folder: str | Path) -> tuple[Record, dict[str, np.ndarray]]:
    """Read ``result.json`` and, where there is one, ``relabelling.npz`` from a result folder.

    Args:
        folder: what the comparison wrote.

    Returns:
        The checked record and arrays: ``write_report(*read_record(folder), folder)`` draws a report anew.

    Raises:
        CheckpointError: a file is missing, unreadable, or does not fit the schema.
    """
    folder = Path(folder)
    path = folder / "result.json"
    try:
        record = check_record(json.loads(path.read_text(encoding="utf-8")))
        path = folder / "relabelling.npz"
        if not path.exists():
            return record, {}
        with path.open("rb") as stream:  # ours to close: numpy leaves a broken archive open
            archive = np.load(stream, allow_pickle=False)
            if isinstance(archive, np.ndarray):
                raise ValueError("a single array, not an archive of named ones")
            arrays = {name: archive[name] for name in archive.files}
        check_arrays(record, arrays)
        return record, arrays
    except (OSError, ValueError, RecursionError, EOFError, zipfile.BadZipFile) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(
            f"reading the results in {folder}: {path.name} cannot be read ({error}). "
            "Give the folder that the comparison wrote, with result.json in it."
        ) from error
