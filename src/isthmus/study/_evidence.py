"""Which units of a study are proven to be done: their records, the networks' bytes, and that both belong together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from isthmus.errors import CheckpointError
from isthmus.study._plan import NetworkRef, StudyPlan, Unit
from isthmus.study._records import UnitRecord
from isthmus.study._store import Store

__all__ = ["Evidence", "checked_network", "digests_of", "refs_of", "unproven_note", "weigh"]


@dataclass(frozen=True)
class Evidence:
    """What is recorded of a study, weighed.

    Attributes:
        done: addresses of the units that need not be run.
        faults: why a unit that seemed to be done is run again, by address.
    """

    done: frozenset[str]
    faults: Mapping[str, str]


def weigh(store: Store, plan: StudyPlan) -> Evidence:
    """Read every record and every network of a study, and return what they prove.

    A unit is done if its record is sealed and of this unit, the networks that it trained are there, and the networks
    that it measured are those that are there. Records of an earlier version, without a digest, prove nothing.
    """
    found = {unit.address: store.find(unit) for unit in plan.units}
    networks: dict[str, str] = {}
    done: set[str] = set()
    faults: dict[str, str] = {}
    for unit in plan.units:  # what is trained stands before what needs it
        of = found[unit.address]
        if of.status != "done" and not of.damaged:
            continue
        fault = of.fault or _fault_of_networks(unit, of, store, networks)
        if fault is None:
            done.add(unit.address)
        else:
            faults[unit.address] = fault
    return Evidence(frozenset(done), faults)


def _fault_of_networks(unit: Unit, found: UnitRecord, store: Store, networks: dict[str, str]) -> str | None:
    """Compare the networks that a record names with those there are; keep what training made."""
    assert found.record is not None
    named = found.record.get("networks")
    refs = refs_of(unit)
    if not isinstance(named, dict) or set(named) != {ref.file for ref in refs}:
        return "it does not say which networks it is about"
    for ref in refs:
        if unit.kind == "train":
            there = store.digest(ref)
            if there is None:
                return f"its network {ref.file} is lost"
            if there != named[ref.file]:
                return f"its network {ref.file} was changed or damaged"
            networks[ref.file] = there
        elif networks.get(ref.file, named[ref.file]) != named[ref.file]:
            return f"the network {ref.file} that it measured is no longer the one there is"
    return None


def refs_of(unit: Unit) -> tuple[NetworkRef, ...]:
    """Return the networks that a unit trains or reads."""
    content = unit.content
    if unit.kind == "train":
        return tuple(NetworkRef(unit.address, i) for i in range(len(content["networks"])))
    ends = (content["a"], content["b"]) if unit.kind == "measure" else (content["of"],)
    return tuple(dict.fromkeys(NetworkRef(end["unit"], end["index"]) for end in ends))


def digests_of(unit: Unit, store: Store) -> dict[str, str]:
    """Return the digests of the networks that a unit has just trained, or was given to read, by file.

    Raises:
        CheckpointError: one is not there, or nothing says what it should be.
    """
    if unit.kind != "train":
        return {ref.file: _expected(store, ref) for ref in refs_of(unit)}
    found = {ref.file: store.digest(ref) for ref in refs_of(unit)}
    lost = [file for file, digest in found.items() if digest is None]
    if lost:
        raise CheckpointError(
            f"{store.folder / 'networks'}: {', '.join(lost)} of {unit.label} cannot be read back. "
            "Check the disk and run the study again."
        )
    return {file: str(digest) for file, digest in found.items()}


def checked_network(store: Store, ref: NetworkRef) -> Path:
    """Return where a network lies, after comparing its bytes with those that its unit made.

    Raises:
        CheckpointError: it is lost or another one, or nothing says what it should be.
    """
    expected, there, path = _expected(store, ref), store.digest(ref), store.network(ref)
    if there != expected:
        raise CheckpointError(
            f"{path}: expected the network that its unit trained, SHA-256 {expected[:16]}…, found "
            f"{'no file' if there is None else f'{there[:16]}…'}. Run the study again to train it anew."
        )
    return path


def _expected(store: Store, ref: NetworkRef) -> str:
    record = store.record(ref.unit)
    networks = None if record is None else record.get("networks")
    digest = networks.get(ref.file) if isinstance(networks, dict) else None
    if not isinstance(digest, str):
        raise CheckpointError(
            f"{store.folder / 'units' / ref.unit}.json: expected the record of the unit that trained {ref.file}, "
            "with its digest, found none. Run the study again to train it anew."
        )
    return digest


def unproven_note(count: int) -> str:
    """Say that records of an earlier version prove nothing."""
    return (
        f"{count} records carry no digest, because an earlier version made them: nothing shows that they were not "
        "changed. Running the study makes them anew."
    )
