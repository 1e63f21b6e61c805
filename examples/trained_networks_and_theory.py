# %% [markdown]
# # Trained networks and the theory's loose ends
# The a-priori theorems assume independent neurons, which training breaks; the certificates assume nothing, but may be
# loose. Two measurements: how independent are a trained layer's neurons, and how far is each bound from the truth?
# Set `ISTHMUS_SMOKE=1` for a quick pass into the current folder.

# %%
import json
import math
import os
from pathlib import Path

import numpy as np
import torch

import isthmus
from isthmus.report import draw_theory
from isthmus.study import TrainSettings, initialise, load_dataset, network_for, to_batches, train
from isthmus.theory import certify, certify_weights_only
from isthmus.transport import w2_matching

SMOKE = bool(os.environ.get("ISTHMUS_SMOKE"))
FOLDER = Path("theory-figures" if SMOKE else "docs/images/theory")
FOLDER.mkdir(parents=True, exist_ok=True)
digits, held_out = load_dataset("digits", split="train"), load_dataset("digits", split="test")
train_batches, test_batches = to_batches(digits, 1437), to_batches(held_out, 360)


def show(name, kind, record):
    picture = draw_theory(kind, record)
    (FOLDER / f"{name}.png").write_bytes(picture.png)
    (FOLDER / f"{name}.json").write_text(json.dumps(record, allow_nan=False) + "\n", encoding="utf-8")
    print(f"{name}: {picture.alt}")


def network(width, depth, **settings):
    return network_for("mlp", digits, width=width, depth=depth, **settings)


def trained(model, seed, learning_rate=0.05):
    settings = TrainSettings(learning_rate=learning_rate, batch_size=64, epochs=1 if SMOKE else 30, seed=seed)
    return train(model, digits, settings).model.eval()


# %% [markdown]
# ## How independent are trained neurons?
# Pool the neurons of two trained networks and split them at random into halves. If all were independent draws of one
# law, the two networks would be one of these splits like any other: the distance between them over the mean distance
# of random splits would scatter around 1. Above 1, each network's neurons know which network they belong to. The
# second layer is read in A's basis: B's first layer is relabelled first. As a second yardstick, two resamples with
# replacement of the pooled neurons.


# %%
def rows(layer):
    """One neuron a row: incoming weights and bias."""
    return torch.cat([layer.weight, layer.bias[:, None]], 1).detach().double().numpy()


def compare(a, b, rng, splits):
    """Distances of two layers, of random halves of their pooled neurons, and of resamples with replacement."""
    pool, m = np.concatenate([a, b]), len(a)
    orders = [rng.permutation(2 * m) for _ in range(splits)]
    halves = np.array([w2_matching(pool[o[:m]], pool[o[m:]])[0] for o in orders])
    draws = [rng.integers(0, 2 * m, (2, m)) for _ in range(splits)]
    resampled = float(np.mean([w2_matching(pool[i], pool[j])[0] for i, j in draws]))
    distance = w2_matching(a, b)[0]
    return {
        "networks": distance / float((pool**2).sum(1).mean()),
        "halves": float(halves.mean()) / float((pool**2).sum(1).mean()),
        "ratio": distance / float(halves.mean()),
        "ratio_resampled": distance / resampled,
        "rank": float((halves >= distance).mean()),
        "splits_low": float(halves.min() / halves.mean()),
        "splits_high": float(halves.max() / halves.mean()),
    }


def two_layers(a, b):
    """The rows of both hidden layers, B's first layer placed on A's before the second is read."""
    moved = isthmus.align(a, b, batches=train_batches, method="weights-incoming").apply(b)
    return [(rows(x), rows(y)) for x, y in zip(a.layers[:2], moved.layers[:2], strict=True)]


rng = np.random.default_rng(0)
layers = []
for width in (8,) if SMOKE else (16, 32, 64, 128, 256, 512):
    seeds = range(2 if SMOKE else 3)
    start = [initialise(network(width, 2), seed).eval() for seed in seeds]
    ready = [trained(network(width, 2), seed) for seed in seeds]
    pairs = [(i, j) for i in seeds for j in seeds if i < j]
    for k, name in enumerate(("first layer", "second layer")):
        found = [compare(*two_layers(ready[i], ready[j])[k], rng, 3 if SMOKE else 20) for i, j in pairs]
        fresh = [compare(*two_layers(start[i], start[j])[k], rng, 2) for i, j in pairs]
        mean = {key: float(np.mean([f[key] for f in found])) for key in found[0]}
        ratios = [f["ratio"] for f in found]
        spread = {"ratio_low": min(ratios), "ratio_high": max(ratios)}
        initial = {
            "initial": float(np.mean([f["networks"] for f in fresh])),
            "initial_ratio": float(np.mean([f["ratio"] for f in fresh])),
        }
        layers.append({"layer": name, "width": width, "pairs": len(pairs), **mean, **spread, **initial})
show("10-independence", "independence", {"layers": layers})

# %% [markdown]
# ## How far is each bound from the truth?
# Error and barrier measured on a grid, against the certificate with 1, 16 and 64 segments and the bound from weights
# alone. "Local" uses the example's own loss; √2 × error is the Lipschitz bound for the cross-entropy.

# %%
shapes = (
    [(8, 1, "relu")] if SMOKE else [(128, 1, "relu"), (512, 1, "relu"), (128, 2, "tanh"), (256, 2, "relu")]
)
shapes += [] if SMOKE else [(96, 3, "relu"), (64, 5, "relu")]
networks = []
for width, depth, activation in shapes:
    a, b = (trained(network(width, depth, activation=activation), seed) for seed in (0, 1))
    b = isthmus.align(a, b, batches=train_batches, method="covariance").apply(b)
    counts = (1, 2, 3) if SMOKE else (1, 16, 64)
    coarse, middle, fine = (certify(a, b, test_batches, segments=k) for k in counts)
    alone = certify_weights_only(a, b, test_batches)
    networks.append(
        {
            "network": f"{depth}×{width} {activation}",
            "measured": fine.lmc_error_measured,
            "chain_1": coarse.lmc_error,
            "chain_16": middle.lmc_error,
            "chain_64": fine.lmc_error,
            "weights_only": alone.lmc_error,
            "barrier": fine.barrier_measured,
            "barrier_1": coarse.barrier,
            "barrier_16": middle.barrier,
            "barrier_64": fine.barrier,
            "lipschitz_64": math.sqrt(2) * fine.lmc_error,
            "lipschitz_weights": alone.barrier,
            "accuracy_floor": fine.accuracy_floor,
        }
    )
show("10-bounds", "bounds", {"networks": networks})
