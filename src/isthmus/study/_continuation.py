"""Whether a study may go on in a folder: only where it asks for all that is recorded there, under the same name."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from isthmus.errors import StudyError
from isthmus.study._config import PERMUTATIONS, StudyConfig, matchings
from isthmus.study._plan import StudyPlan
from isthmus.study._store import Store

__all__ = ["check_continuation"]

Key = tuple[str, ...]

_SHOWN = 3
"""Results that a message lists."""


def check_continuation(study: StudyConfig, folder: str | Path) -> None:
    """Check that running a study in a folder loses nothing of what is there.

    A study goes on in its folder, and may have grown meanwhile: more seeds, swept values, methods or symmetries.
    Another study, or one that leaves out networks or methods that are recorded there, would take their place in the
    plan, in ``study.yaml`` and in every table made afterwards.

    Args:
        study: what is to be run.
        folder: where to; it need not exist.

    Raises:
        StudyError: another study lies there, or one with more in it.
        CheckpointError: the plan that lies there is damaged.
    """
    store = Store(Path(folder))
    if not store.has_plan:
        return
    plan = store.plan()
    own = store.folder / "study.yaml"
    way_out = f"Give another folder with --out; the study that lies there goes on with its own file, {own}."
    if plan.study != study.name:
        raise StudyError(f"{folder}: holds the study {plan.study!r}, not {study.name!r}. {way_out}")
    asked = set(_asked(study.with_precision(plan.precision)))
    lost = list(dict.fromkeys(words for key, words in _recorded(store, plan) if key not in asked))
    if lost:
        shown = "; ".join(lost[:_SHOWN]) + (f"; and {len(lost) - _SHOWN} more" if len(lost) > _SHOWN else "")
        raise StudyError(
            f"{folder}: holds results of a study of this name that the file no longer asks for: {shown}. They would be "
            f"missing from its tables. Ask for them too. Or else: {way_out}"
        )


def _recorded(store: Store, plan: StudyPlan) -> Iterator[tuple[Key, str]]:
    """Yield what is done of a plan, whatever version of the code did it, with words for it."""
    for unit in plan.units:
        if store.find(unit).status != "done":
            continue
        content = unit.content
        if unit.kind == "train":
            for network in content["networks"]:
                training = {**content["training"], "learning_rate": network["learning_rate"]}
                yield _network(content["data"], content["network"], training, network["seed"]), unit.label
        elif unit.kind == "dimension":
            yield ("dimensions",), "dimensions"
        else:
            of = _settings(content["data"], content["network"], content["training"])
            pair = f"{content['a']['seed']} {content['b']['seed']}"
            for method, symmetry in matchings(content["measure"]):
                by = "" if symmetry in ("none", PERMUTATIONS) else f", symmetry {symmetry}"
                for refresh in content["measure"]["refresh"]:
                    words = f"{unit.label}, method {method}{by}, refresh {refresh}"
                    yield (method, symmetry, refresh, pair, of), words


def _asked(study: StudyConfig) -> Iterator[Key]:
    if study.measure.dimension:
        yield ("dimensions",)
    for variant in study.variants:
        data, network = variant.data.content(), variant.network.model_dump(mode="json")
        training = variant.training.content()
        for seed in study.all_seeds:
            yield _network(data, network, training, seed)
        of = _settings(data, network, training)
        for a, b in study.all_pairs:
            for method, symmetry in matchings(study.measure.content()):
                for refresh in study.measure.refresh:
                    yield (method, symmetry, refresh, f"{a} {b}", of)


def _network(
    data: Mapping[str, Any], network: Mapping[str, Any], training: Mapping[str, Any], seed: int
) -> Key:
    return ("network", str(seed), _settings(data, network, training))


def _settings(data: Mapping[str, Any], network: Mapping[str, Any], training: Mapping[str, Any]) -> str:
    named = {key: data[key] for key in ("name", "normalise") if key in data}
    return json.dumps([named, network, training], sort_keys=True)
