"""What a unit of work does: train some networks, measure a pair, or measure dimensions."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import asdict
from functools import lru_cache
from typing import Any

import torch
from torch import nn

from isthmus.batches import Batches
from isthmus.checkpoints import load_state, save_state
from isthmus.connectivity import Curve, Line, line
from isthmus.errors import IsthmusWarning
from isthmus.matching import Alignment, Method, Problem, method_named, solve, symmetry_named
from isthmus.moments import keeps_running_statistics
from isthmus.states import check_finite, state_of
from isthmus.study._config import PERMUTATIONS, NetworkConfig, matchings
from isthmus.study._evidence import checked_network
from isthmus.study._own_methods import importing_from, require_own_method
from isthmus.study._plan import NetworkRef, Unit
from isthmus.study._store import Store
from isthmus.symmetry import SymmetrySpec, discover, verify
from isthmus.training import (
    Dataset,
    Described,
    Normalisation,
    TrainResult,
    TrainSettings,
    can_stack,
    derive_seed,
    load_dataset,
    network_for,
    to_batches,
    train,
    train_stacked,
)

__all__ = ["build_network", "load_split", "run_content", "symmetries_of"]

_STATISTICS_BATCH, _LINE_BATCH = 1000, 2000
_EXAMPLES = 4
_DRAW = 0
"""Seed of which examples statistics and lines use: the same in every unit, so that pairs are compared alike."""


def run_content(
    unit: Unit, store: Store, data_dir: str | None, device: str, modules: str | None = None
) -> dict[str, Any]:
    """Do a unit's work; return plain values, the same whenever the content, machine and threads are.

    Args:
        unit: what is to be done.
        store: where networks are kept.
        data_dir: folder of the data set, if it is not to be downloaded.
        device: where tensors live.
        modules: folder of the user's own methods.
    """
    work = {"train": _train, "measure": _measure, "dimension": _dimension}[unit.kind]
    with importing_from(modules if unit.content.get("own_methods") else None):
        return _finite(work(unit, store, data_dir, device, modules))


def load_split(name: str, data_dir: str | None, split: str, normalise: str | None = None) -> Dataset:
    """Load a data set, kept in memory for the units that follow in this process."""
    data = _kept(name, data_dir, split)
    return data if normalise is None else data.normalised(_numbers(name, data_dir, normalise))


@lru_cache(maxsize=2)
def _kept(name: str, data_dir: str | None, split: str) -> Dataset:
    return load_dataset(name, data_dir, split=split)


@lru_cache(maxsize=8)
def _numbers(name: str, data_dir: str | None, normalise: str) -> Normalisation | None:
    """Return the numbers that a setting stands for: of the training set, where it says so."""
    return _kept(name, data_dir, "train").normalised(normalise).normalisation


def _data_of(unit: Unit, data_dir: str | None, split: str) -> Dataset:
    of = unit.content["data"]
    return load_split(of["name"], data_dir, split, of.get("normalise"))


def build_network(network: NetworkConfig, dataset: Described) -> nn.Module:
    """Build the network of a study, without drawing from torch's global generator for good."""
    with torch.random.fork_rng(devices=[]):
        return network_for(
            network.family, dataset, width=network.width, depth=network.depth, **network.settings
        )


# --- Training ----------------------------------------------------------------------------------------------


def _train(unit: Unit, store: Store, data_dir: str | None, device: str, _: str | None) -> dict[str, Any]:
    content = unit.content
    data = _data_of(unit, data_dir, "train")
    model = build_network(NetworkConfig(**content["network"]), data).to(device)
    settings = [TrainSettings(**content["training"], **network) for network in content["networks"]]
    if can_stack(model, settings[0].augment):
        results = train_stacked(model, data, settings)
    else:
        results = [train(model, data, s, strict=False) for s in settings]
    for index, result in enumerate(results):
        save_state(store.network(NetworkRef(unit.address, index)), state_of(result.model))
    return {"networks": [_trained(r) for r in results]}


def _trained(result: TrainResult) -> dict[str, Any]:
    history = [{k: v for k, v in asdict(r).items() if k != "seconds"} for r in result.history]
    return {
        "seed": result.settings.seed,
        "learning_rate": result.settings.learning_rate,
        "status": result.status,
        "history": history,
    }


# --- A pair ------------------------------------------------------------------------------------------------


def _measure(
    unit: Unit, store: Store, data_dir: str | None, device: str, modules: str | None
) -> dict[str, Any]:
    content = unit.content
    methods = _methods(unit, modules)
    sizes, options = content["data"], content["measure"]
    train_data, test_data = (_data_of(unit, data_dir, split) for split in ("train", "test"))
    model_a, model_b = (
        _load(store, content["network"], train_data, content[end], device) for end in ("a", "b")
    )
    statistics = to_batches(
        train_data, _STATISTICS_BATCH, limit=_at_most(sizes["statistics"], train_data), seed=_DRAW
    )
    splits = {
        "train": to_batches(train_data, _LINE_BATCH, limit=_at_most(sizes["train"], train_data), seed=_DRAW),
        "test": to_batches(test_data, _LINE_BATCH, limit=_at_most(sizes["test"], test_data), seed=_DRAW),
    }
    seed = derive_seed(content["a"]["seed"], "pair", str(content["b"]["seed"]))
    by_default = "symmetry" not in options
    symmetries = options.get("symmetry", [PERMUTATIONS])
    problem = Problem(model_a, model_b, batches=statistics, seed=seed, symmetry=symmetry_named(symmetries[0]))
    needs = {method.needs for method in methods.values()}
    problem.verification.require()
    problem.prepare(inputs="inputs" in needs, joint="activations" in needs)
    problems = {symmetry: problem.under(symmetry_named(symmetry)) for symmetry in symmetries}
    for other in problems.values():
        other.verification.require()
    spec = problem.spec
    recomputable = keeps_running_statistics(model_a)
    rows: list[dict[str, Any]] = []
    for method, symmetry in matchings(options):
        found = None
        if method != "none":
            found = solve(problems[symmetry], methods[method])
        lines: dict[bool, Line] = {}
        for refresh in options["refresh"]:
            recompute = refresh == "batchnorm" and recomputable
            if recompute not in lines:
                lines[recompute] = _measured(
                    model_a,
                    model_b,
                    splits,
                    points=options["points"],
                    alignment=found,
                    refresh="batchnorm" if recompute else None,
                    refresh_batches=statistics if recompute else None,
                    generator=torch.Generator().manual_seed(seed),
                )
            about = {"method": method, "refresh": refresh, **_aligned(found)}
            if not by_default:
                about |= {"symmetry": symmetry, "couplings": _described(found)}
            rows += [{**about, "split": split, **_curve(c)} for split, c in lines[recompute].curves.items()]
    return {"rows": rows, "groups": {g.name: g.size for g in spec.groups.values()}}


def _methods(unit: Unit, modules: str | None) -> dict[str, Method]:
    """Return the methods of a unit by their names; the user's own have the code that its address says."""
    own = unit.content.get("own_methods", {})
    return {
        name: require_own_method(name, modules, own[name]) if name in own else method_named(name)
        for name in unit.content["measure"]["methods"]
        if name != "none"
    }


def _measured(*networks_and_data: Any, **options: Any) -> Line:
    """Measure a line without its warnings: a study says itself which states were refreshed, row by row."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", IsthmusWarning)
        return line(*networks_and_data, **options)


def _at_most(count: int | None, data: Dataset) -> int:
    return len(data) if count is None else min(count, len(data))


def _load(
    store: Store, network: Mapping[str, Any], data: Dataset, end: Mapping[str, Any], device: str
) -> nn.Module:
    model = build_network(NetworkConfig(**network), data)
    state = load_state(checked_network(store, NetworkRef(end["unit"], end["index"])))
    check_finite(state, f"The network of seed {end['seed']}" if "seed" in end else "The network")
    model.load_state_dict(state)
    return model.to(device).eval()


def symmetries_of(model: nn.Module, statistics: Batches, seed: int) -> SymmetrySpec:
    """Discover a network's symmetries and verify them, on the first examples."""
    inputs = next(iter(statistics))[0][:_EXAMPLES].to(next(model.parameters()).device)
    spec = discover(model, inputs)
    verify(spec, model, inputs, generator=torch.Generator().manual_seed(seed)).require()
    return spec


def _aligned(found: Alignment | None) -> dict[str, Any]:
    if found is None:
        return {"status": "no relabelling", "sweeps": 0, "moved": {}, "verification_error": None, "notes": []}
    return {
        "status": found.status,
        "sweeps": len(found.sweeps),
        "moved": found.moved,
        "verification_error": found.verification_error,
        "notes": list(found.notes),
    }


def _described(found: Alignment | None) -> dict[str, Any]:
    """Return what each group's coupling does to its units, and how alike its weights are before and after."""
    if found is None:
        return {}
    return {
        name: {**summary.to_dict(), "similarity": list(found.similarities.get(name, ())) or None}
        for name, summary in found.summaries.items()
    }


def _curve(curve: Curve) -> dict[str, Any]:
    values = curve.to_dict()
    return {"loss_at": values.pop("loss"), "accuracy_at": values.pop("accuracy"), **values}


# --- Dimensions --------------------------------------------------------------------------------------------


def _dimension(unit: Unit, store: Store, data_dir: str | None, device: str, _: str | None) -> dict[str, Any]:
    from isthmus.matching import dimension

    content = unit.content
    data = _data_of(unit, data_dir, "train")
    model = _load(store, content["network"], data, content["of"], device)
    count = _at_most(content["data"]["statistics"], data)
    statistics = to_batches(data, _STATISTICS_BATCH, limit=count, seed=_DRAW)
    spec = symmetries_of(model, statistics, _DRAW)
    return {"methods": dimension(model, statistics, spec=spec, ranks=content["ranks"]).to_dict()}


def _finite(value: Any) -> Any:
    """Replace NaN and infinities, which JSON cannot hold, by ``None``."""
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
