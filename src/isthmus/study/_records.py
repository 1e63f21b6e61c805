"""Records that say what they are: sealed with a digest when written, checked against their unit when read.

A record is used for one unit only, whose address is the digest of everything its result depends on. So what lies under
a unit's name must be of that unit, carry the digest of itself, and hold a result of the form that such a unit gives.
The digests of the networks that were written or read stand in it too: a measurement is of these bytes and no others.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from isthmus.study._config import PERMUTATIONS, matchings
from isthmus.study._plan import Unit, address_of

__all__ = ["DIGEST", "MEASURED", "UnitRecord", "examine", "seal", "sealed", "symmetry_of"]

DIGEST = "digest"

MEASURED = (
    "examples",
    "midpoint_loss",
    "midpoint_loss_error",
    "midpoint_accuracy",
    "barrier",
    "barrier_error",
    "barrier_at",
    "spacing",
    "lmc_error_sup",
    "ensemble_loss",
    "ensemble_accuracy",
    "status",
    "sweeps",
    "verification_error",
    "loss_at",
    "accuracy_at",
)
"""What the row of a measured line holds besides method, refresh, split and its endpoints."""

_SPLITS = ("train", "test")
_TAKEN = ("threads", "device", "versions", "source")


@dataclass(frozen=True)
class UnitRecord:
    """What lies under a unit's name.

    Attributes:
        record: the record, if it may be read; ``None`` if there is none, or none of this unit.
        fault: why what lies there is not used, or is not proven; ``None`` if nothing is wrong with it.
        proven: whether the record carries the digest of itself. One of an earlier version does not: it may be
            read, but is made again when the study is run.
    """

    record: dict[str, Any] | None
    fault: str | None = None
    proven: bool = False

    @property
    def status(self) -> str | None:
        """``"done"`` or ``"failed"``, or ``None`` without a record."""
        return None if self.record is None else str(self.record["status"])

    @property
    def damaged(self) -> bool:
        """Return whether something lies there that must not be used."""
        return self.record is None and self.fault is not None


def seal(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return plain values with the digest of themselves."""
    return {**values, DIGEST: address_of(values)}


def sealed(values: Mapping[str, Any]) -> bool:
    """Return whether values carry the digest of themselves."""
    return values.get(DIGEST) == _address({k: v for k, v in values.items() if k != DIGEST})


def _address(values: Any) -> str | None:
    try:
        return address_of(values)
    except (ValueError, TypeError, RecursionError):  # NaN, or nested deeper than any record
        return None


def examine(record: Any, unit: Unit) -> UnitRecord:
    """Return whether what lies under a unit's name is its record.

    Args:
        record: what was read, or ``None`` for nothing.
        unit: of which it should be.
    """
    if record is None:
        return UnitRecord(None)
    if not isinstance(record, dict):
        return UnitRecord(None, f"expected a record, found {type(record).__name__}")
    of = record.get("address")
    if of != unit.address or record.get("kind") != unit.kind or _address(record.get("content")) != of:
        whose = "of no unit" if of is None else "of another unit, or changed"
        return UnitRecord(None, f"it is {whose}")
    if record.get("status") == "failed":
        # Nothing is made of it but a message, and the unit is tried again.
        words = record.get("traceback")
        text = words if isinstance(words, str) and words.strip() else "no reason is recorded"
        return UnitRecord({**record, "traceback": text}, proven=True)
    if record.get("status") != "done" or any(key not in record for key in _TAKEN):
        return UnitRecord(None, "it is incomplete")
    if DIGEST in record and not sealed(record):
        return UnitRecord(None, "its digest does not fit: it was changed or damaged")
    if not _fits(record, unit):
        return UnitRecord(None, "it holds no result of such a unit")
    if DIGEST not in record:
        return UnitRecord(record, "it carries no digest: it was made by an earlier version")
    return UnitRecord(record, proven=True)


def _fits(record: Mapping[str, Any], unit: Unit) -> bool:
    try:
        return {"train": _trained, "measure": _measured, "dimension": _dimensions}[unit.kind](record, unit)
    except (KeyError, TypeError, AttributeError):  # something else than its values are made of
        return False


def _trained(record: Mapping[str, Any], unit: Unit) -> bool:
    networks = record["result"]["networks"]
    asked = [(n["seed"], n["learning_rate"]) for n in unit.content["networks"]]
    numbers = all(isinstance(e["loss"], (float, type(None))) for n in networks for e in n["history"])
    return numbers and [(n["seed"], n["learning_rate"]) for n in networks] == asked


def _measured(record: Mapping[str, Any], unit: Unit) -> bool:
    measure, rows = unit.content["measure"], record["result"]["rows"]
    asked = {(*m, r, s) for m in matchings(measure) for r in measure["refresh"] for s in _SPLITS}
    needed = {*MEASURED, "endpoint_losses", "endpoint_accuracies"}
    whole = all(needed <= row.keys() and len(row["endpoint_losses"]) == 2 for row in rows)
    return (
        whole and {(row["method"], symmetry_of(row), row["refresh"], row["split"]) for row in rows} == asked
    )


def symmetry_of(row: Mapping[str, Any]) -> str:
    """Return what a row's method matched by; records say it where that was more than permutations."""
    return row.get("symmetry", "none" if row["method"] == "none" else PERMUTATIONS)


def _dimensions(record: Mapping[str, Any], unit: Unit) -> bool:
    methods = record["result"]["methods"]
    layers = [values for found in methods.values() for values in found.values()]
    return set(methods) == set(unit.content["methods"]) and all(
        {"uncentred", "centred"} <= values.keys() for values in layers
    )
