"""From a study to units of work, each with a content address: the same content has the same address."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import isthmus
from isthmus.matching import METHODS
from isthmus.study._config import StudyConfig, Variant, matchings
from isthmus.training import Precision

__all__ = ["NetworkFacts", "NetworkRef", "StudyPlan", "Unit", "address_of", "name_of", "plan_study"]

PROTOCOL = 1
"""Raised whenever a change of the code changes what a unit of the same content gives."""

_ANY_NETWORK = 2e5
"""Operations per example that a network costs beyond its products: fitted to the preset ``width`` on one core."""

Digest = Callable[[str, str], str]
"""From name and split of a data set to its digest."""


@dataclass(frozen=True)
class NetworkFacts:
    """What the plan needs to know about a network.

    Attributes:
        stackable: whether several can be trained together.
        operations: of one forward pass of one example.
        refreshable: whether it keeps running statistics.
        parameters: how many it has.
    """

    stackable: bool
    operations: float
    refreshable: bool
    parameters: int = 0

    @property
    def size(self) -> float:
        """Expected work per example, relative to other networks."""
        return (self.operations + _ANY_NETWORK) / 1e6


@dataclass(frozen=True)
class NetworkRef:
    """A trained network: the unit that trains it, and its place in the stack."""

    unit: str
    index: int

    @property
    def file(self) -> str:
        """Name of its checkpoint in the folder ``networks``."""
        return f"{self.unit}-{self.index}.safetensors"


@dataclass(frozen=True)
class Unit:
    """One unit of work.

    Attributes:
        kind: ``"train"`` (some networks), ``"measure"`` (a pair) or ``"dimension"`` (a network).
        address: SHA-256 of the content, hexadecimal.
        content: everything the result depends on, as plain values.
        needs: addresses of the units that must be done before.
        cost: expected work, roughly: passes over the data times millions of operations per example.
        label: for people.
    """

    kind: str
    address: str
    content: dict[str, Any]
    needs: tuple[str, ...]
    cost: float
    label: str

    def to_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Unit:
        """Read what :meth:`to_dict` gave."""
        return cls(**{**values, "needs": tuple(values["needs"])})


@dataclass(frozen=True)
class StudyPlan:
    """All units of a study, in an order in which none precedes what it needs.

    Attributes:
        study: its name.
        units: its units.
        precision: what ``precision: auto`` stands for.
    """

    study: str
    units: tuple[Unit, ...]
    precision: Precision = "float32"

    def to_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return {
            "study": self.study,
            "precision": self.precision,
            "units": [u.to_dict() for u in self.units],
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> StudyPlan:
        """Read what :meth:`to_dict` gave."""
        units = tuple(Unit.from_dict(u) for u in values["units"])
        return cls(values["study"], units, values.get("precision", "float32"))


def address_of(content: Mapping[str, Any]) -> str:
    """Return the SHA-256 of canonical JSON: sorted keys, no spaces."""
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def plan_study(
    study: StudyConfig,
    digest: Digest,
    facts: Callable[[Variant], NetworkFacts],
    precision: Precision,
    own: Mapping[str, str] | None = None,
) -> StudyPlan:
    """Cut a study into units.

    Args:
        study: the study.
        digest: of data sets, by name and split.
        facts: about the network of a variant.
        precision: what ``precision: auto`` stands for.
        own: digests of the code of the user's own methods, by their names.
    """
    study = study.with_precision(precision)
    units: dict[str, Unit] = {}
    for members in _groups(study.variants):
        places = {}
        network = facts(members[0])  # they differ in the learning rate only
        size = study.stack if network.stackable else 1
        wanted = [(v.training.learning_rate, s) for v in members for s in study.all_seeds]
        for chunk in _chunks(wanted, size):
            unit = _train_unit(members[0], network, chunk, digest)
            units[unit.address] = unit
            places |= {key: NetworkRef(unit.address, i) for i, key in enumerate(chunk)}
        for variant in members:
            for unit in _measurements(study, variant, network, places, digest, own):
                units[unit.address] = unit
    return StudyPlan(study.name, tuple(_sorted(units.values())), precision)


def _groups(variants: Iterable[Variant]) -> list[list[Variant]]:
    """Group the variants that differ in the learning rate only."""
    groups: dict[str, list[Variant]] = {}
    for variant in variants:
        values = variant.model_dump(mode="json")
        del values["training"]["learning_rate"]
        groups.setdefault(address_of(values), []).append(variant)
    return list(groups.values())


def _train_unit(
    variant: Variant, facts: NetworkFacts, chunk: Iterable[tuple[float, int]], digest: Digest
) -> Unit:
    training = variant.training.content()
    del training["learning_rate"]
    networks = [{"learning_rate": rate, "seed": seed} for rate, seed in chunk]
    content = {
        "kind": "train",
        "code": _code(),
        "data": {
            "name": variant.data.name,
            "train": digest(variant.data.name, "train"),
            **_normalised(variant),
        },
        "network": variant.network.model_dump(mode="json"),
        "training": training,
        "networks": networks,
    }
    rates = sorted({n["learning_rate"] for n in networks})
    label = (
        f"train {name_of(variant)}, learning rate {', '.join(f'{r:g}' for r in rates)}, "
        f"seeds {', '.join(str(s) for s in sorted({n['seed'] for n in networks}))}"
    )
    cost = len(networks) * max(variant.training.epochs, 0.1) * facts.size
    return Unit("train", address_of(content), content, (), cost, label)


def _measurements(
    study: StudyConfig,
    variant: Variant,
    facts: NetworkFacts,
    places: Mapping[tuple[float, int], NetworkRef],
    digest: Digest,
    own: Mapping[str, str] | None,
) -> Iterator[Unit]:
    rate = variant.training.learning_rate
    measure = study.measure.content()
    dimension = measure.pop("dimension")
    data = variant.data.content()
    digests = {split: digest(variant.data.name, split) for split in ("train", "test")}
    shared = {"code": _code(), "digests": digests, "network": variant.network.model_dump(mode="json")}
    about = f"{name_of(variant)}, learning rate {rate:g}"
    used: set[int] = set()
    for a, b in study.all_pairs:
        ends = {"a": {**asdict(places[rate, a]), "seed": a}, "b": {**asdict(places[rate, b]), "seed": b}}
        content = {"kind": "measure", **shared, "data": data, **ends, "measure": measure}
        content["training"] = variant.training.content()
        if own:  # left out otherwise, as in the addresses of old
            content["own_methods"] = dict(own)
        needs = tuple(dict.fromkeys(end["unit"] for end in ends.values()))
        lines = len(list(matchings(measure))) * (len(measure["refresh"]) if facts.refreshable else 1)
        cost = 2.0 * lines * measure["points"] / 11 * facts.size
        yield Unit(
            "measure", address_of(content), content, needs, cost, f"measure {about}, seeds {a} and {b}"
        )
        used |= {a, b}
    for seed in sorted(used) if dimension else ():
        place = places[rate, seed]
        content = {
            "kind": "dimension",
            **shared,
            "data": {"name": data["name"], "statistics": data["statistics"], **_normalised(variant)},
            "of": asdict(place),
            "methods": list(METHODS.usual),
            "ranks": False,
        }
        yield Unit(
            "dimension",
            address_of(content),
            content,
            (place.unit,),
            facts.size,
            f"dimension of {about}, seed {seed}",
        )


def _sorted(units: Iterable[Unit]) -> list[Unit]:
    """Put every unit as early as what it needs allows, so that results appear while training goes on."""
    listed: list[Unit] = []
    waiting = [u for u in units if u.needs]
    done: set[str] = set()
    for unit in (u for u in units if not u.needs):
        listed.append(unit)
        done.add(unit.address)
        listed += [u for u in waiting if done.issuperset(u.needs)]
        waiting = [u for u in waiting if not done.issuperset(u.needs)]
    return listed


def _chunks(values: list[tuple[float, int]], size: int) -> Iterator[list[tuple[float, int]]]:
    return (values[i : i + size] for i in range(0, len(values), size))


def _normalised(variant: Variant) -> dict[str, Any]:
    """Return how inputs are normalised, if they are: left out otherwise, as in the addresses of old."""
    content = variant.data.content()
    return {key: content[key] for key in ("normalise",) if key in content}


def _code() -> dict[str, Any]:
    return {"isthmus": isthmus.__version__, "protocol": PROTOCOL}


def name_of(variant: Variant) -> str:
    """Return what a variant trains, in words."""
    network = variant.network
    size = "" if network.width is None else f" {network.width:g}"
    deep = f" × {network.depth}" if network.family == "mlp" else ""
    return f"{network.family}{size}{deep} on {variant.data.name}, {variant.training.epochs} epochs"
