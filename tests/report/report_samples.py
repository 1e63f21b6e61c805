"""A realistic result record, made without any network: what the report is tested on."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

METHODS = ("none", "weights-incoming", "weights", "covariance", "activations", "correlation")
_BARRIERS = dict(zip(METHODS, (1.131, 0.083, 0.044, 0.031, 0.030, 0.027), strict=True))
_QUALITY = dict(zip(METHODS, (0.0, 0.45, 0.6, 0.68, 0.72, 0.74), strict=True))  # correlation with the partner


def make_record(sizes: tuple[int, ...] = (512, 512, 512), seed: int = 0) -> dict[str, Any]:
    """Build a record with one group per size, shaped like a width-512 run on handwritten digits."""
    rng = np.random.default_rng(seed)
    groups = [_group(i, size) for i, size in enumerate(sizes)]
    names = [g["name"] for g in groups]
    return {
        "isthmus_version": "0.1.0",
        "created": "2026-11-23T14:32:12+00:00",
        "versions": {
            "python": "3.11.9",
            "torch": "2.13.0",
            "numpy": "2.4.6",
            "scipy": "1.17.1",
            "machine": "x86_64, 2 cores",
            "commit": "0123456789abcdef0123456789abcdef01234567",
        },
        "settings": {
            "data": "digits",
            "width": sizes[0] if sizes else 0,
            "depth": len(sizes),
            "epochs": 30,
            "seed": seed,
            "optimiser": {"name": "sgd", "learning_rate": 0.05, "momentum": 0.9},
            "note": "synthetic record for tests",
        },
        "network": {"name": "MLP 64-512-512-512-10", "parameters": 563_722},
        "split": "test",
        "endpoints": {
            "a": {"train": {"loss": 0.0021, "accuracy": 1.0}, "test": {"loss": 0.0612, "accuracy": 0.9811}},
            "b": {"train": {"loss": 0.0019, "accuracy": 1.0}, "test": {"loss": 0.0655, "accuracy": 0.9778}},
        },
        "symmetry": {
            "groups": groups,
            "pinned": _pins(len(sizes)),
            "fraction_moved": 0.9987,
            "verification": {"max_relative_error": 3.1e-16, "draws": 3, "tolerance": 1e-10},
        },
        "methods": {name: _method(name, names, rng) for name in METHODS},
    }


def make_arrays(record: dict[str, Any], seed: int = 0, dead: int = 3) -> dict[str, np.ndarray]:
    """Build similarities with a planted partner per unit, and permutations that find most of them."""
    rng = np.random.default_rng(seed)
    arrays: dict[str, np.ndarray] = {}
    for group in record["symmetry"]["groups"]:
        size = group["size"]
        planted = rng.permutation(size)
        similarity = np.clip(rng.normal(0.05, 0.16, (size, size)), -1, 0.9)
        similarity[np.arange(size), planted] = np.clip(rng.beta(6, 2, size), 0, 1)
        if size > 10 * dead:
            similarity[:dead] = np.nan
        arrays[f"similarity/{group['name']}"] = similarity.astype(np.float32)
        for method in record["methods"]:
            found = np.arange(size) if method == "none" else planted.copy()
            wrong = rng.permutation(size)[: int(size * (1 - _QUALITY[method]) / 2)]
            if method != "none":
                found[wrong] = found[np.roll(wrong, 1)]
            arrays[f"permutation/{method}/{group['name']}"] = found.astype(np.int64)
    return arrays


def _group(index: int, size: int) -> dict[str, Any]:
    inner = f"offset 0, stride 1, {size} units"
    slots = [(f"layers.{index}.weight", 0), (f"layers.{index}.bias", 0), (f"layers.{index + 1}.weight", 1)]
    return {
        "name": f"layers.{index}",
        "size": size,
        "slots": [{"tensor": tensor, "axis": axis, "index": inner} for tensor, axis in slots],
    }


def _pins(depth: int) -> list[dict[str, Any]]:
    ends = ((f"layers.{depth}.weight", 0, 10, "output"), (f"layers.{depth}.bias", 0, 10, "output"))
    pins = [("layers.0.weight", 1, 64, "input"), *ends]
    return [
        {
            "tensor": tensor,
            "axis": axis,
            "size": size,
            "reason": f"reaches an {kind} of the model, whose order has a meaning",
            "operator": "aten.linear.default",
            "module": tensor.rpartition(".")[0],
        }
        for tensor, axis, size, kind in pins
    ]


def _method(name: str, groups: list[str], rng: np.random.Generator) -> dict[str, Any]:
    lines = {split: _line(name, split, rng) for split in ("train", "test")}
    left = 1 - 0.8 * _QUALITY[name]
    moved = 0.0 if name == "none" else 0.998
    return {
        "barrier": lines["test"]["barrier"],
        "midpoint_loss": lines["test"]["midpoint_loss"],
        "midpoint_accuracy": lines["test"]["midpoint_accuracy"],
        "verification_error": 0.0 if name == "none" else 2.2e-16,
        "seconds": {"none": 0.0, "weights": 1.18}.get(name, 0.31),
        "status": "baseline" if name == "none" else "converged",
        "sweeps": _sweeps(name),
        "moved": dict.fromkeys(groups, moved),
        "matched_cost": {
            g: {"before": 2.0 + 0.1 * i, "after": (2.0 + 0.1 * i) * left * (0.8 + 0.1 * i)}
            for i, g in enumerate(groups)
            if name != "none"
        },
        "dimension": {g: _dimension(name, i) for i, g in enumerate(groups) if name != "none"},
        "line": lines,
    }


def _sweeps(name: str) -> list[float]:
    if name == "none":
        return []
    if name in ("weights-incoming", "covariance"):
        return [812.0]
    final, start, sweeps = {
        "weights": (1500.0, 0.3, 9),
        "activations": (310.0, 0.2, 5),
        "correlation": (380.0, 0.1, 4),
    }[name]
    return [final * (1 - start * 0.45**k) for k in range(sweeps)] + [final]


def _dimension(name: str, index: int) -> dict[str, float | None]:
    wide = {"weights-incoming": 230.0, "weights": 260.0}.get(name, 4.0 + index)
    centred = {"weights-incoming": 228.0, "weights": 255.0}.get(name, 10.4 + 2 * index)
    return {"uncentred": wide, "centred": centred, "stable_rank": wide / 2, "entropy_rank": 2 * wide}


def _line(name: str, split: str, rng: np.random.Generator) -> dict[str, Any]:
    t = [i / 10 for i in range(11)]
    low, high = (0.0612, 0.0655) if split == "test" else (0.0021, 0.0019)
    chord = [(1 - x) * low + x * high for x in t]
    height = _BARRIERS[name] * (1.0 if split == "test" else 1.06)
    shape = [math.sin(math.pi * x) ** 2 * (1 + 0.06 * (x - 0.5)) for x in t]
    loss = [c + height * s for c, s in zip(chord, shape, strict=True)]
    excess = [a - b for a, b in zip(loss, chord, strict=True)]
    top = max(range(11), key=excess.__getitem__)
    accuracy = [max(0.1, 0.9811 - 0.5 * (x - c)) for x, c in zip(loss, chord, strict=True)]
    gap = [3 * math.sqrt(height) * s for s in shape]
    return {
        "t": t,
        "loss": loss,
        "loss_error": [0.004 + 0.02 * e for e in excess],
        "accuracy": accuracy,
        "chord": chord,
        "lmc_error": gap,
        "lmc_error_sup": max(gap),
        "barrier": max(excess[top], 0.0),
        "barrier_at": t[top],
        "barrier_error": 0.002 + 0.02 * excess[top] + float(rng.uniform(0, 1e-4)),
        "midpoint_loss": loss[5],
        "midpoint_accuracy": accuracy[5],
        "ensemble_loss": 0.058,
        "ensemble_accuracy": 0.9822,
    }
