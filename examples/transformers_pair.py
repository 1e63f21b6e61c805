# %% [markdown]
# # Two language models, two vision transformers
# Train pairs of small transformers from different seeds, in minutes, on text that ships with Python (the sources of
# its standard library) and on handwritten digits; relabel, and measure the line. Prints a Markdown table.
# `ISTHMUS_SMOKE=1` makes a quick pass; `ISTHMUS_DATA` may name a folder with MNIST, used instead of the digits.

# %%
import os
import sysconfig
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional

import isthmus
from isthmus.study import load_dataset
from isthmus.testing import gpt, vit

SMOKE = bool(os.environ.get("ISTHMUS_SMOKE"))
STEPS = 3 if SMOKE else 1500
METHODS = ("weights", "covariance", "activations", "correlation")


# %% Data
def library_text() -> torch.Tensor:
    """Return the characters of the standard library's sources as numbers below 128."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    text = "".join(
        p.read_text("utf-8", "ignore") for p in sorted(folder.glob("*.py"))[: 5 if SMOKE else None]
    )
    return torch.tensor([c for c in text.encode("ascii", "ignore") if c < 128])


def windows(
    text: torch.Tensor, count: int, length: int, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw windows of text and the same windows shifted by one."""
    starts = torch.randint(len(text) - length - 1, (count,), generator=generator)
    block = text[starts[:, None] + torch.arange(length + 1)]
    return block[:, :-1], block[:, 1:]


def fit(model: nn.Module, draw, seed: int, rate: float) -> nn.Module:
    """Train with AdamW, warm-up and cosine decay, on batches drawn from a seeded generator."""
    generator = torch.Generator().manual_seed(1000 + seed)
    optimiser = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, rate, total_steps=STEPS + 1, pct_start=0.1)
    for _ in range(STEPS):
        inputs, targets = draw(generator)
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(inputs)
        loss = functional.cross_entropy(logits.float().flatten(0, -2), targets.flatten())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    return model.eval()


# %% Training
text = library_text()
cut = int(0.9 * len(text))
held_out = torch.Generator().manual_seed(0)
language_test = [windows(text[cut:], 250, 64, held_out) for _ in range(1 if SMOKE else 4)]
language_fit = [windows(text[:cut], 250, 64, held_out) for _ in range(1 if SMOKE else 4)]
width = 32 if SMOKE else 128

name, size, patch = ("mnist", 28, 7) if "ISTHMUS_DATA" in os.environ else ("digits", 8, 2)
images, test_images = (load_dataset(name, os.environ.get("ISTHMUS_DATA"), split=s) for s in ("train", "test"))
pixels, labels = images.inputs.reshape(-1, 1, size, size), images.labels
test = (test_images.inputs.reshape(-1, 1, size, size), test_images.labels)


def image_batch(generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw 128 images."""
    chosen = torch.randint(len(pixels), (128,), generator=generator)
    return pixels[chosen], labels[chosen]


pairs = {}
for kind in ("GPT-2-like", "ViT-like"):
    models = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        if kind == "GPT-2-like":
            model = gpt(128, width, 2, 4, 64)
            models.append(fit(model, lambda g: windows(text[:cut], 64, 64, g), seed, 2e-3))
        else:
            model = vit(10, width // 2, 2, 4, image_size=size, patch=patch)
            models.append(fit(model, image_batch, seed, 2e-3))
    data = language_test if kind == "GPT-2-like" else [test]
    statistics = language_fit if kind == "GPT-2-like" else [(pixels[:2000], labels[:2000])]
    pairs[kind] = (*models, data, statistics)

# %% The line, by every method
print("| networks | endpoints' loss | " + " | ".join(("none", *METHODS)) + " |")
print("| --- | --- |" + " --- |" * (1 + len(METHODS)))
for kind, (a, b, data, statistics) in pairs.items():
    plain = isthmus.line(a, b, data, bootstrap=0)
    cells = [f"{plain.barrier:.3f}"]
    for method in METHODS:
        alignment = isthmus.align(a, b, batches=statistics, method=method)
        cells.append(f"{isthmus.line(a, b, data, alignment=alignment, bootstrap=0).barrier:.3f}")
    ends = ", ".join(f"{x:.3f}" for x in plain.loss[[0, -1]].tolist())
    print(f"| {kind} | {ends} | " + " | ".join(cells) + " |")
