"""A study as a value: what is trained, what is matched, what is measured; read from YAML, lists are swept."""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Iterator, Mapping
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from isthmus.errors import DataError, MissingExtraError, StudyError
from isthmus.matching import METHODS, symmetry_named, symmetry_text
from isthmus.study._yaml import KeyPath, line_of, read_text, read_yaml
from isthmus.symmetry import Acts
from isthmus.training import (
    DATASETS,
    FAMILIES,
    MOST_LAYERS,
    Augmentation,
    Initialisation,
    Optimiser,
    Precision,
    PrecisionSetting,
    RateSchedule,
    read_normalise,
)

try:
    from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator
except ImportError as error:  # pragma: no cover
    raise MissingExtraError('Study files need pydantic: pip install "isthmus[study]".') from error

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

__all__ = [
    "PERMUTATIONS",
    "DataConfig",
    "MeasureConfig",
    "NetworkConfig",
    "StudyConfig",
    "TrainingConfig",
    "Variant",
    "matchings",
    "preset_names",
    "preset_text",
    "read_study",
]

PERMUTATIONS = "permutations"
"""What methods match by unless a study says otherwise."""

_SWEPT = ("data", "network", "training")
"""Sections in which a list means: one variant per entry."""

_OWN_METHOD = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")
_MOST_UNITS = 10_000
"""Units of a study unless it says otherwise: the longest preset has a few hundred."""

_MOST_FAULTS = 20
"""Faults that are listed; a wrong value in a long sweep would fill the screen otherwise."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _no_number_from_a_truth_value(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuse ``epochs: yes``, which pydantic reads as 1."""
        if isinstance(value, bool) and cls.model_fields[str(info.field_name)].annotation is not bool:
            raise ValueError("a number or text")
        return value


class DataConfig(_Strict):
    """Which data set, and how many of its examples are used for what.

    Attributes:
        name: one of :data:`isthmus.study.DATASETS`.
        statistics: training examples on which activations are compared.
        train: training examples on which lines are measured; ``None`` for all.
        test: test examples on which lines are measured; ``None`` for all.
        normalise: what inputs are shifted and scaled by (see :func:`isthmus.study.read_normalise`); ``None`` leaves
            them in [0, 1].
    """

    # A field that is added later goes into `content`, or every address of every study would change.

    name: str
    statistics: int = Field(default=20_000, ge=2)
    train: int | None = Field(default=10_000, ge=1)
    test: int | None = Field(default=None, ge=1)
    normalise: str | None = None

    @field_validator("name")
    @classmethod
    def _known(cls, value: str) -> str:
        return _one_of(value, DATASETS)

    @field_validator("normalise")
    @classmethod
    def _readable(cls, value: str | None) -> str | None:
        try:
            return None if read_normalise(value) is None else value
        except DataError as error:
            raise ValueError(str(error).partition("expected ")[2].partition(", found")[0]) from error

    def content(self) -> dict[str, Any]:
        """Return what enters the address of a unit: all fields, but for later ones at their default."""
        values = self.model_dump(mode="json")
        if self.normalise is None:
            del values["normalise"]
        return values


class NetworkConfig(_Strict):
    """Which architecture (see :func:`isthmus.study.network_for`)."""

    family: str = "mlp"
    width: float | None = Field(default=None, gt=0)
    depth: int = Field(default=3, ge=0, le=MOST_LAYERS)
    settings: dict[str, Any] = Field(default_factory=dict)

    @field_validator("family")
    @classmethod
    def _known(cls, value: str) -> str:
        return _one_of(value, FAMILIES)

    @field_validator("settings")
    @classmethod
    def _plain(cls, value: dict[str, Any]) -> dict[str, Any]:
        try:
            json.dumps(value, allow_nan=False)
        except (TypeError, ValueError, RecursionError) as error:
            raise ValueError("texts, finite numbers, true, false and null") from error
        return value


class TrainingConfig(_Strict):
    """How networks are trained: the fields of :class:`isthmus.study.TrainSettings` but its seed.

    ``precision`` may be ``"auto"``: what is faster where the study is begun.
    """

    # A field that is added later goes into `content`, or every address of every study would change.

    optimiser: Optimiser = "sgd"
    learning_rate: float = Field(default=0.1, gt=0)
    momentum: float = Field(default=0.9, ge=0, lt=1)
    batch_size: int = Field(default=500, ge=1)
    epochs: int = Field(default=50, ge=0)
    warmup_steps: int = Field(default=10, ge=0)
    warmup_from: float = Field(default=1e-6, ge=0)
    schedule: RateSchedule = "cosine"
    weight_decay: float = Field(default=0.0, ge=0)
    precision: PrecisionSetting = "float32"
    initialisation: Initialisation = "lecun_normal"
    augment: Augmentation = "none"

    def content(self) -> dict[str, Any]:
        """Return what enters the address of a unit: all fields, but for later ones at their default."""
        values = self.model_dump(mode="json")
        if self.augment == "none":
            del values["augment"]
        return values


class MeasureConfig(_Strict):
    """What is measured on every pair.

    Attributes:
        methods: ``"none"`` and methods of :func:`isthmus.matching.align`, your own as ``"module:METHOD"``.
        symmetry: by what each of them matches, one after the other: ``"permutations"``, ``"all"`` that the network
            allows, or classes such as ``"signed,positive"``.
        points: positions on each line.
        refresh: ``"none"``, ``"batchnorm"`` or both: what happens to states inside the line.
        dimension: whether approximate dimensions are measured.
    """

    # A field that is added later goes into `content`, or every address of every study would change.

    methods: tuple[str, ...] = ("none", *METHODS.usual)
    symmetry: tuple[str, ...] = (PERMUTATIONS,)
    points: int = Field(default=11, ge=2)
    refresh: tuple[Literal["none", "batchnorm"], ...] = ("none",)
    dimension: bool = True

    @field_validator("methods")
    @classmethod
    def _known(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for name in value:
            if name not in ("none", *METHODS) and not _OWN_METHOD.fullmatch(name):
                raise ValueError(f"one of {', '.join(('none', *METHODS))}, or your own as module:METHOD")
        return value

    @field_validator("symmetry", mode="before")
    @classmethod
    def _listed(cls, value: Any) -> Any:
        """Take one entry for a list of one, and a list of classes as an entry for their names with commas."""
        if isinstance(value, str):
            return [value]
        if not isinstance(value, list | tuple):
            return value
        return [
            ",".join(entry) if isinstance(entry, list) and all(isinstance(c, str) for c in entry) else entry
            for entry in value
        ]

    @field_validator("symmetry")
    @classmethod
    def _classes(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        try:
            named = tuple(symmetry_text(symmetry_named(text)) for text in value)
        except DataError as error:
            names = ", ".join(Acts)
            raise ValueError(
                f"{PERMUTATIONS}, all, or classes among {names}, with commas between them"
            ) from error
        if not named or len(set(named)) < len(named):
            raise ValueError("at least one entry, each once")
        return named

    def content(self) -> dict[str, Any]:
        """Return what enters the address of a unit: all fields, but for later ones at their default."""
        values = self.model_dump(mode="json")
        if self.symmetry == (PERMUTATIONS,):
            del values["symmetry"]
        return values


def matchings(measure: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield, in order, every method with what it matches by, ``"none"`` by nothing.

    Args:
        measure: the content of :class:`MeasureConfig`, of any version.
    """
    for method in measure["methods"]:
        for symmetry in measure.get("symmetry", (PERMUTATIONS,)) if method != "none" else ("none",):
            yield method, symmetry


class Variant(_Strict):
    """One point of the sweep: everything fixed but the seeds."""

    data: DataConfig
    network: NetworkConfig = NetworkConfig()
    training: TrainingConfig = TrainingConfig()


class _Study(_Strict):
    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    description: str = ""
    seeds: int | tuple[int, ...] = 2
    pairs: Literal["disjoint", "all"] = "disjoint"
    stack: int = Field(default=4, ge=1)
    max_units: int = Field(default=_MOST_UNITS, ge=1)
    measure: MeasureConfig = MeasureConfig()


class StudyConfig(_Study):
    """A study.

    Attributes:
        name: letters, digits, dots, dashes.
        description: for readers.
        seeds: of the networks of every variant: a list, or a number ``n`` for 0 … n−1.
        pairs: ``"disjoint"`` pairs the seeds two by two, so that pairs are independent; ``"all"`` takes every
            pair.
        stack: most networks that are trained together, where the architecture allows it.
        max_units: units of work that the study may have; more is an error, so that a sweep by mistake is told at once.
        measure: what is measured.
        variants: the points of the sweep.
        text: the YAML it was read from.
        folder: in which that file lies, where methods of one's own are looked for first; ``None`` without a file.
    """

    variants: tuple[Variant, ...]
    text: str = ""
    folder: str | None = None

    @property
    def all_seeds(self) -> tuple[int, ...]:
        """The seeds, listed."""
        return tuple(range(self.seeds)) if isinstance(self.seeds, int) else self.seeds

    @property
    def all_pairs(self) -> tuple[tuple[int, int], ...]:
        """The pairs of seeds ``(a, b)``."""
        seeds = self.all_seeds
        if self.pairs == "all":
            return tuple(itertools.combinations(seeds, 2))
        return tuple(zip(seeds[::2], seeds[1::2], strict=True))

    def with_precision(self, precision: Precision) -> StudyConfig:
        """Return the study with ``precision: auto`` replaced by a value."""

        def fixed(variant: Variant) -> Variant:
            if variant.training.precision != "auto":
                return variant
            training = variant.training.model_copy(update={"precision": precision})
            return variant.model_copy(update={"training": training})

        return self.model_copy(update={"variants": tuple(fixed(v) for v in self.variants)})


def preset_names() -> tuple[str, ...]:
    """Return the names of the studies that ship with the package."""
    folder = resources.files("isthmus.study").joinpath("presets")
    return tuple(sorted(f.name.removesuffix(".yaml") for f in folder.iterdir() if f.name.endswith(".yaml")))


def preset_text(name: str) -> str:
    """Return the YAML of a study that ships with the package.

    Raises:
        StudyError: there is none of that name.
    """
    if name not in preset_names():
        raise StudyError(f"No preset {name!r}. Choose one of {', '.join(preset_names())}.")
    return resources.files("isthmus.study").joinpath("presets", f"{name}.yaml").read_text("utf-8")


def read_study(source: str | Path) -> StudyConfig:
    """Read a study from a YAML file, or a preset by its name.

    Lists under ``data``, ``network`` and ``training`` are swept: every combination is a variant.

    Args:
        source: path of a file, or one of :func:`preset_names`.

    Raises:
        StudyError: no such file or preset, no valid YAML, or values that are unknown or out of range; every
            fault is listed with its line, its field and what is allowed.
    """
    path = Path(source)
    if path.is_file():
        return parse_study(read_text(path), str(path)).model_copy(
            update={"folder": str(path.resolve().parent)}
        )
    if str(source) in preset_names():
        return parse_study(preset_text(str(source)), f"preset {source}")
    raise StudyError(
        f"{source}: no such study file, nor a preset. Give a YAML file, or one of {', '.join(preset_names())}."
    )


def parse_study(text: str, source: str = "study") -> StudyConfig:
    """Read a study from YAML text (see :func:`read_study`); ``source`` names it in messages."""
    values, lines = read_yaml(text, source)
    if not isinstance(values, dict):
        raise StudyError(
            f"{source}, line 1: expected fields such as name, data, network, training, measure; found "
            f"{type(values).__name__}."
        )
    faults: dict[str, None] = {}
    outer = {k: v for k, v in values.items() if k not in _SWEPT}
    inner = {k: values[k] for k in _SWEPT if k in values}
    try:
        study: _Study | None = _Study.model_validate(outer)
    except ValidationError as error:
        study = None
        faults.update(dict.fromkeys(_faults(error, {}, lines, source, (*_Study.model_fields, *_SWEPT))))
    else:
        faults.update(dict.fromkeys(_seed_faults(study, lines, source)))
        if not faults:  # counted from lengths: nothing of a sweep too large is made
            faults.update(dict.fromkeys(_size_faults(study, inner, lines, source)))
    variants: list[Variant] = []
    for point, chosen in _points(inner) if not faults or _variants(inner) <= _MOST_UNITS else ():
        try:
            variants.append(Variant.model_validate(point))
        except ValidationError as error:
            faults.update(dict.fromkeys(_faults(error, chosen, lines, source, _SWEPT)))
    if faults or study is None:
        raise StudyError(_listed(faults))
    fields = {name: getattr(study, name) for name in _Study.model_fields}
    return StudyConfig(**fields, variants=tuple(variants), text=text)


def _listed(faults: Mapping[str, None]) -> str:
    shown = list(faults)[:_MOST_FAULTS]
    more = len(faults) - len(shown)
    return "\n".join([*shown, f"… and {more} more."] if more else shown)


def _variants(values: Any) -> int:
    """Return how many combinations :func:`_points` would yield."""
    if isinstance(values, dict):
        return math.prod(map(_variants, values.values()))
    return len(values) if isinstance(values, list) and values else 1


def _size_faults(
    study: _Study, inner: Mapping[str, Any], lines: Mapping[KeyPath, int], source: str
) -> Iterator[str]:
    """Tell when a study has more units than it may have: at least, as if every network could be stacked."""
    variants, seeds = _variants(inner), _count(study.seeds)
    pairs = math.comb(seeds, 2) if study.pairs == "all" else seeds // 2
    units = math.ceil(variants * seeds / study.stack)
    units += variants * (pairs + (seeds if study.measure.dimension else 0))
    if units > study.max_units:
        yield (
            f"{source}, line {line_of(('max_units',), lines)}: {variants:,} variants of {seeds:,} seeds and {pairs:,} "
            f"pairs make at least {units:,} units of work, more than max_units: {study.max_units:,}. "
            "Sweep fewer values, take fewer seeds, or raise max_units."
        )


def _count(seeds: int | tuple[int, ...]) -> int:
    return seeds if isinstance(seeds, int) else len(seeds)


def _points(values: Any, path: KeyPath = ()) -> Iterator[tuple[Any, dict[KeyPath, KeyPath]]]:
    """Yield every combination of list entries, and where each chosen entry stands in the file."""
    if isinstance(values, dict):
        branches = [list(_points(v, (*path, k))) for k, v in values.items()]
        for combination in itertools.product(*branches):
            places: dict[KeyPath, KeyPath] = {}
            for _, chosen in combination:
                places |= chosen
            yield dict(zip(values, (value for value, _ in combination), strict=True)), places
    elif isinstance(values, list) and values:
        for i, value in enumerate(values):
            yield value, {path: (*path, i)}
    else:
        yield values, {}


def _faults(
    error: ValidationError,
    chosen: Mapping[KeyPath, KeyPath],
    lines: Mapping[KeyPath, int],
    source: str,
    top: tuple[str, ...],
) -> Iterator[str]:
    for fault in error.errors(include_url=False):
        path = tuple(fault["loc"])
        line = line_of(chosen.get(path, path), lines)
        yield f"{source}, line {line}: {'.'.join(map(str, path))}: {_explain(fault, path, top)}"


def _explain(fault: ErrorDetails, path: KeyPath, top: tuple[str, ...]) -> str:
    found = fault["input"]
    if fault["type"] == "extra_forbidden":
        section = {
            "data": DataConfig,
            "network": NetworkConfig,
            "training": TrainingConfig,
            "measure": MeasureConfig,
        }.get(str(path[0]))
        known = top if len(path) == 1 or section is None else tuple(section.model_fields)
        return f"unknown field. Known are {', '.join(known)}."
    if fault["type"] == "missing":
        return "is missing."
    text = fault["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
    shown = repr(found)
    return f"expected {text}, found {shown if len(shown) <= 80 else shown[:80] + '…'}."


def _seed_faults(study: _Study, lines: Mapping[KeyPath, int], source: str) -> Iterator[str]:
    count, line = _count(study.seeds), line_of(("seeds",), lines)
    different = count if isinstance(study.seeds, int) else len(set(study.seeds))
    if count < 2 or different < count:
        found = study.seeds if isinstance(study.seeds, int) else f"{count}, {different} of them different"
        yield f"{source}, line {line}: seeds: expected at least two different seeds, found {found}."
    elif study.pairs == "disjoint" and count % 2:
        yield (
            f"{source}, line {line}: seeds: disjoint pairs need an even number of seeds, found {count}. "
            "Add one, or set pairs: all."
        )


def _one_of(value: str, allowed: tuple[str, ...]) -> str:
    if value not in allowed:
        raise ValueError(f"one of {', '.join(allowed)}")
    return value
