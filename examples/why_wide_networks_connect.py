# %% [markdown]
# # Why wide networks connect, in eight figures
# Two networks trained from different seeds sit in different valleys, or so it seems. Number the units of one anew and
# the wall between them sinks; the wider the networks, the lower it gets. This lesson shows why: a layer is a cloud of
# neurons, relabelling is optimal transport between two clouds, and large clouds of one law lie close together.
# Run it as a script, or cell by cell; it writes the figures into `docs/images/theory`. Set `ISTHMUS_SMOKE=1` for a
# quick pass into the current folder.

# %%
import json
import os
from pathlib import Path

import torch

import isthmus
from isthmus.report import draw_theory
from isthmus.study import TrainSettings, load_dataset, network_for, to_batches, train
from isthmus.theory import (
    MeanFieldSettings,
    approximate_dimension,
    certify,
    dropout_record,
    mean_field_record,
    rate_record,
    width_record,
)

SMOKE = bool(os.environ.get("ISTHMUS_SMOKE"))
FOLDER = Path("theory-figures" if SMOKE else "docs/images/theory")
FOLDER.mkdir(parents=True, exist_ok=True)
digits, held_out = load_dataset("digits", split="train"), load_dataset("digits", split="test")
train_batches, test_batches = to_batches(digits, 1437), to_batches(held_out, 360)


def show(name, kind, record):
    """Draw a record, keep picture and numbers, and say in a sentence what is seen."""
    picture = draw_theory(kind, record)
    (FOLDER / f"{name}.png").write_bytes(picture.png)
    (FOLDER / f"{name}.json").write_text(json.dumps(record, allow_nan=False) + "\n", encoding="utf-8")
    print(f"{name}: {picture.alt}")


def trained(width, seed, depth=1, learning_rate=0.05):
    settings = TrainSettings(learning_rate=learning_rate, batch_size=64, epochs=1 if SMOKE else 30, seed=seed)
    return train(network_for("mlp", digits, width=width, depth=depth), digits, settings).model.eval()


# %% [markdown]
# ## 1. The wall sinks
# Loss on the straight line between two networks of one hidden layer, as trained and with the units of B relabelled
# by optimal transport of their activations.

# %%
lines = []
for width in (8,) if SMOKE else (8, 32, 128, 512):
    a, b = trained(width, 0), trained(width, 1)
    alignment = isthmus.align(a, b, batches=train_batches, method="activations")
    plain = isthmus.line(a, b, test_batches, points=3 if SMOKE else 21)
    moved = isthmus.line(a, b, test_batches, points=3 if SMOKE else 21, alignment=alignment)
    curves = [next(iter(found.curves.values())).to_dict() for found in (plain, moved)]
    lines.append(
        {"width": width, "ts": curves[0]["ts"], "plain": curves[0]["loss"], "aligned": curves[1]["loss"]}
    )
show("1-lines", "lines", {"lines": lines})

# %% [markdown]
# ## 2. Two clouds of one law
# Draw two samples of m neurons from one law and match them. The mean squared distance falls like m to the power −2/d:
# fast in few dimensions, hopelessly slow in many. Proven bounds enclose it.

# %%
sizes = [8, 16] if SMOKE else [16, 32, 64, 128, 256, 512, 1024]
replicates = 2 if SMOKE else [80, 60, 40, 24, 14, 8, 4]
laws = [("gaussian", 5), ("gaussian", 16)] if SMOKE else [("gaussian", 5), ("gaussian", 16), ("uniform", 5)]
show("2-rates", "rates", {"records": [rate_record(law, d, sizes, replicates) for law, d in laws]})

# %% [markdown]
# ## 3. Low dimension rescues wide networks
# Neurons that differ in three directions only, with a little noise in sixty-one others, approach each other as if
# they lived in three dimensions, until the distance reaches the noise.

# %%
noises = (0.0, 0.1) if SMOKE else (0.0, 0.03, 0.1, 0.3)
regimes = [rate_record("low-dim", 64, sizes, replicates, signal=3, noise=noise) for noise in noises]
show("3-two-regimes", "two_regimes", {"records": regimes})

# %% [markdown]
# ## 4. What the theorems ask for
# Invert the bounds and they tell how wide is wide enough, before any training. The answer is honest and absurd:
# widths exponential in the number of inputs, and towers of exponentials with depth.

# %%
show("4-widths", "width", width_record(5, 4, 0.1))

# %% [markdown]
# ## 5. What can be proven of two given networks
# Forget randomness: propagate the error through these two networks on these digits. Cut the line into segments and the
# proven envelope closes in on the measured curve.

# %%
a, b = trained(8 if SMOKE else 256, 0, depth=2), trained(8 if SMOKE else 256, 1, depth=2)
b = isthmus.align(a, b, batches=train_batches, method="activations").apply(b)
certificates = [
    certify(a, b, test_batches, segments=k).to_dict() for k in ((1, 2) if SMOKE else (1, 4, 16, 64))
]
show("5-certificate", "certificate", {"certificates": certificates})

# %% [markdown]
# ## 6. Training keeps neurons nearly independent
# In the mean-field scaling the neurons of a trained network behave like independent draws of one law, if the step of
# gradient descent is small. So matched networks approach each other as clouds do, and their error falls with the width.

# %%
show(
    "6-mean-field",
    "meanfield",
    mean_field_record(
        MeanFieldSettings(horizon=1.0 if SMOKE else 10.0, step=0.2 if SMOKE else 0.02),
        [8, 16] if SMOKE else [32, 64, 128, 256, 512, 1024],
        2 if SMOKE else 8,
        steps=[0.2] if SMOKE else [0.2, 0.05, 0.01],
        errors=[0.5] if SMOKE else [0.04, 0.02, 0.01],
        reference_width=32 if SMOKE else 4096,
    ),
)

# %% [markdown]
# ## 7. A network that survives dropout connects
# Dropping half of the neurons is moving to a sub-cloud, so the same distance bounds both. Measured, dropout costs
# m to the power −1/2 and the line less, because errors on the line cancel.

# %%
show(
    "7-dropout",
    "dropout",
    dropout_record(8, [16, 32] if SMOKE else [32, 64, 128, 256, 512, 1024], 2 if SMOKE else 10),
)

# %% [markdown]
# ## 8. Fewer dimensions, lower barrier
# At one width, change only the learning rate. Networks whose neurons or activations fill fewer dimensions connect
# better, provided the mean is set aside first: uncentred, the activations mostly measure their mean.

# %%
WIDTH = 16 if SMOKE else 128


def dimensions(model):
    """Return the approximate dimension of weights, pre-activations and activations, uncentred and centred."""
    inputs = train_batches[0][0]
    layer = model.layers[0]
    with torch.no_grad():
        before = layer(inputs.flatten(1))
        clouds = {"naive": layer.weight, "covariance": before, "activations": torch.relu(before)}
        return {
            key + suffix: approximate_dimension(cloud, center=suffix == "_centred")
            for key, cloud in clouds.items()
            for suffix in ("", "_centred")
        }


networks = []
for rate in (0.01, 0.05) if SMOKE else (0.001, 0.003, 0.01, 0.03, 0.1):
    a, b = trained(WIDTH, 0, learning_rate=rate), trained(WIDTH, 1, learning_rate=rate)
    b = isthmus.align(a, b, batches=train_batches, method="activations").apply(b)
    found = certify(a, b, test_batches, segments=2 if SMOKE else 16)
    with torch.no_grad():
        scale = float(a(test_batches[0][0]).norm(dim=1).mean())
    mean = {key: (value + dimensions(b)[key]) / 2 for key, value in dimensions(a).items()}
    error, barrier = found.lmc_error_measured / scale, found.barrier_measured
    networks.append({"learning_rate": rate, "error": error, "barrier": barrier, **mean})
show("8-dimension", "approximate_dimension", {"width": WIDTH, "networks": networks})
