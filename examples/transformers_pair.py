# %% [markdown]
# # Two language models, two vision transformers
# Train small transformers from different seeds, in minutes, on text that ships with Python (the sources of its standard
# library) and on handwritten digits; relabel each pair by every method, and measure the line. Two things help to read
# the numbers: a control, in which the right relabelling is known, and the barrier when only some units are relabelled.
# `ISTHMUS_SMOKE=1` makes a quick pass into the current folder; `ISTHMUS_DATA` may name a folder with MNIST, used
# instead of the digits. The record goes to `docs/transformers.json`, from which `docs/make_transformers.py` writes the
# tables of `docs/transformers.md`.

# %%
import copy
import hashlib
import json
import os
import platform
import sysconfig
import time
import warnings
from itertools import combinations
from pathlib import Path

import torch
from scipy.optimize import linear_sum_assignment
from torch import nn
from torch.nn import functional

import isthmus
from isthmus.couplings import random_permutation
from isthmus.study import load_dataset
from isthmus.testing import gpt, vit

SMOKE = bool(os.environ.get("ISTHMUS_SMOKE"))
RECORD = Path("transformers.json" if SMOKE else "docs/transformers.json")
STEPS = {"GPT-2-like": 3, "ViT-like": 3} if SMOKE else {"GPT-2-like": 1000, "ViT-like": 600}
BATCH = {"GPT-2-like": 32, "ViT-like": 128}
RATE = 2e-3
MORE_STEPS, MORE_RATE = 2 if SMOKE else 150, 2e-4
SEEDS = (0, 1) if SMOKE else (0, 1, 2)
WIDTH = 16 if SMOKE else 64
LENGTH = 64
METHODS = {
    "weights": {"method": "weights"},
    "covariance": {"method": "covariance"},
    "covariance, tied": {"method": "covariance", "tie_outgoing": True},
    "activations": {"method": "activations"},
    "correlation": {"method": "correlation"},
}
PARTS = "correlation"  # matches each group of units by itself, so that its parts can be judged one by one
if SMOKE:
    warnings.filterwarnings("ignore", message=".*near chance")  # three steps teach nothing
    METHODS = {PARTS: METHODS[PARTS]}


# %% Data
def library_text() -> torch.Tensor:
    """Return the characters of the standard library's modules, by name of the file, as numbers below 128."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    files = sorted(folder.glob("*.py"))[: 5 if SMOKE else None]
    text = "".join(p.read_text("utf-8", "ignore") for p in files)
    return torch.tensor(list(text.encode("ascii", "ignore")))


def windows(text: torch.Tensor, count: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw windows of text, and the same windows shifted by one."""
    starts = torch.randint(len(text) - LENGTH - 1, (count,), generator=generator)
    block = text[starts[:, None] + torch.arange(LENGTH + 1)]
    return block[:, :-1], block[:, 1:]


text = library_text()
cut = int(0.9 * len(text))
drawn = torch.Generator().manual_seed(0)
language = {"test": [windows(text[cut:], 250, drawn)], "train": [windows(text[:cut], 250, drawn)]}

source, size, patch = ("mnist", 28, 7) if "ISTHMUS_DATA" in os.environ else ("digits", 8, 2)
images = {s: load_dataset(source, os.environ.get("ISTHMUS_DATA"), split=s) for s in ("test", "train")}
vision = {
    s: [(found.inputs.reshape(-1, 1, size, size)[:2000], found.labels[:2000])] for s, found in images.items()
}
pixels, labels = images["train"].inputs.reshape(-1, 1, size, size), images["train"].labels
DATA = {"ViT-like": vision, "GPT-2-like": language}


def batch_of(kind: str, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw training data: windows of text, or images."""
    if kind == "GPT-2-like":
        return windows(text[:cut], BATCH[kind], generator)
    chosen = torch.randint(len(pixels), (BATCH[kind],), generator=generator)
    return pixels[chosen], labels[chosen]


def constant_loss(kind: str) -> float:
    """Return the test loss of always answering with the frequencies of the training targets, in nats."""
    seen, asked = (torch.cat([y.flatten() for _, y in DATA[kind][s]]) for s in ("train", "test"))
    kinds = int(max(seen.max(), asked.max())) + 1
    shares = (torch.bincount(seen, minlength=kinds).double() + 1) / (len(seen) + kinds)
    return float(-shares[asked].log().mean())


# %% Training
def fit(model: nn.Module, kind: str, seed: int, steps: int, rate: float) -> nn.Module:
    """Train with AdamW, a tenth of warm-up and cosine decay, on batches drawn from a seeded generator."""
    generator = torch.Generator().manual_seed(1000 + seed)
    optimiser = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, rate, total_steps=steps + 1, pct_start=0.1)
    model.train()
    for _ in range(steps):
        inputs, targets = batch_of(kind, generator)
        loss = functional.cross_entropy(model(inputs).flatten(0, -2), targets.flatten())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    return model.eval()


def trained(kind: str, seed: int) -> nn.Module:
    """Return a trained network; the seed is that of its weights and of the order of its data."""
    torch.manual_seed(seed)
    fresh = (
        gpt(128, WIDTH, 2, 4, LENGTH)
        if kind == "GPT-2-like"
        else vit(10, WIDTH, 2, 4, image_size=size, patch=patch)
    )
    return fit(fresh, kind, seed, STEPS[kind], RATE)


# %% Measuring
def measured(a, b, data, alignment=None) -> dict:
    """Return the line's numbers on test data: losses in nats per character or image."""
    curve = isthmus.line(a, b, {"test": data["test"]}, alignment=alignment).curve
    return {
        "examples": curve.examples,
        "ends": list(curve.endpoint_losses),
        "barrier": curve.barrier,
        "barrier_error": curve.barrier_error,
        "barrier_at": curve.barrier_at,
        "midpoint": curve.midpoint_loss,
        "end_accuracies": list(curve.endpoint_accuracies),
        "midpoint_accuracy": curve.midpoint_accuracy,
        "loss": curve.loss.tolist(),
    }


def every_method(a, b, data) -> tuple[dict, dict]:
    """Return the lines, and the alignments, of all methods; activations are read on training data."""
    lines, alignments = {"none": measured(a, b, data)}, {}
    for name, options in METHODS.items():
        alignments[name] = isthmus.align(a, b, batches=data["train"], **options)
        lines[name] = measured(a, b, data, alignments[name])
    return lines, alignments


def kind_of(group) -> str:
    """Name what a group numbers, by its size and the tensors it moves."""
    if group.size == 4 * WIDTH:
        return "hidden units"
    norms = any("norm" in slot.tensor for slot in group.slots)
    return "stream" if norms else "attention"


def in_parts(a, b, data, alignment) -> dict:
    """Return the lines when only the groups of one kind, or all but those, are relabelled."""
    kinds = {n: kind_of(g) for n, g in alignment.spec.groups.items()}
    found = {}
    for kind in ("stream", "attention", "hidden units"):
        for name, keep in ((f"only the {kind}", True), (f"all but the {kind}", False)):
            still = [n for n, own in kinds.items() if (own == kind) != keep]
            moved = {n: torch.arange(len(p)) if n in still else p for n, p in alignment.permutations.items()}
            found[name] = measured(a, b, data, isthmus.Alignment(moved, alignment.spec, name))
            found[name]["groups"] = len(moved) - len(still)
    return found


def seen(model, data) -> dict:
    """Return centred activations on test data: the stream at its end, and the last layer's hidden units."""
    found = {}

    def keep(name):
        return lambda _, inputs: found.update({name: inputs[0].flatten(0, -2).double()})

    places = {"stream": model.norm, "hidden units": model.blocks[-1].down}
    hooks = [module.register_forward_pre_hook(keep(name)) for name, module in places.items()]
    with torch.no_grad():
        model(data["test"][0][0])
    for hook in hooks:
        hook.remove()
    return {name: values - values.mean(0) for name, values in found.items()}


def agreement(a, b, data) -> dict:
    """Return how alike activations are, 1 for equal: as they are, and after the best change of each sort.

    The sort is a permutation or any rotation of B's units; the likeness is the inner product over both norms.
    As a yardstick, B's examples are shuffled too, which leaves only what chance and the number of units allow.
    """
    found, generator = {}, torch.Generator().manual_seed(3)
    seen_a, seen_b = seen(a, data), seen(b, data)
    for name, x in seen_a.items():
        y = seen_b[name]
        found[name] = {}
        for title, other in (("", y), (" shuffled", y[torch.randperm(len(y), generator=generator)])):
            cross = x.T @ other / (x.norm() * other.norm())
            rows, columns = linear_sum_assignment(cross.numpy(), maximize=True)
            found[name]["as they are" + title] = float(cross.trace())
            found[name]["permuted" + title] = float(cross[rows, columns].sum())
            found[name]["rotated" + title] = float(torch.linalg.svdvals(cross).sum())
    return found


def control(model, kind: str) -> dict:
    """Relabel a trained network at random, train both copies on, on different batches, and align them."""
    data, generator = DATA[kind], torch.Generator().manual_seed(7)
    spec = isthmus.discover(model, data["train"][0][0][:2])
    planted = {n: random_permutation(g.size, generator) for n, g in spec.groups.items()}
    copies = [copy.deepcopy(model), isthmus.Alignment(planted, spec, "planted").apply(model)]
    a, b = (fit(m, kind, 50 + k, MORE_STEPS, MORE_RATE) for k, m in enumerate(copies))
    lines, alignments = every_method(a, b, data)
    back = spec.invert(planted)
    for name, alignment in alignments.items():
        same = [torch.equal(p, alignment.permutations[n]) for n, p in back.items()]
        lines[name]["groups_recovered"] = [sum(same), len(same)]
    return lines


def by_outputs(a, b, data, given) -> dict:
    """Return the line when heads are paired by what they write to the stream, and all else is matched as before."""
    begin = time.process_time()
    found = isthmus.align(a, b, method="head-outputs", **given)
    seconds = time.process_time() - begin
    return measured(a, b, data, found) | {"seconds": seconds, "function": found.verification_error}


def with_rotations(a, b, data) -> dict:
    """Return the lines of both networks folded, when ever more of what may act on them is matched.

    Folding changes no function: the endpoints are what they were. A head that is tied gets a tensor of its own.
    """
    example = data["train"][0][0][:2]
    folded = [isthmus.fold(model, example, untie=True) for model in (a, b)]
    a, b = (found.network() for found in folded)
    spec = isthmus.discover(a, example, ones=folded[0].folded_gains, zeros=folded[0].folded_biases)
    given = {"batches": data["train"], "spec": spec, "symmetry": "all"}
    found = {}
    begin = time.process_time()
    steps = isthmus.align(a, b, method="correlation", **given)
    seconds = time.process_time() - begin
    stream = {n for n, g in spec.groups.items() if g.size == WIDTH}
    hidden = {n for n, g in spec.groups.items() if g.size == 4 * WIDTH}
    for name, moved in {
        "stream rotated": stream,
        "stream, hidden units": stream | hidden,
        "stream, heads": spec.groups.keys() - hidden,
        "stream, heads, hidden units": spec.groups.keys(),
    }.items():
        still = {n: torch.arange(spec.groups[n].size) for n in spec.groups if n not in moved}
        part = isthmus.Alignment({**steps.couplings, **still}, spec, name)
        found[name] = measured(a, b, data, part)
    found["stream, heads, hidden units"] |= {"seconds": seconds, "function": steps.verification_error}
    found["stream, heads by outputs, hidden units"] = by_outputs(a, b, data, given)
    begin = time.process_time()
    turns = isthmus.align(a, b, method="alternating", **given)
    seconds = time.process_time() - begin
    found["alternating"] = measured(a, b, data, turns)
    found["alternating"] |= {
        "seconds": seconds,
        "function": turns.verification_error,
        "note": turns.notes[-1],
    }
    return found


def pair(kind: str, a, b) -> dict:
    """Return the lines by every method, those of the parts of one, and how alike the activations are."""
    data = DATA[kind]
    lines, alignments = every_method(a, b, data)
    return {
        "lines": lines,
        "rotations": with_rotations(a, b, data),
        "parts": in_parts(a, b, data, alignments[PARTS]),
        "agreement": agreement(a, b, data),
    }


# %% What was run
record = {
    "python": platform.python_version(),
    "torch": torch.__version__,
    "isthmus": isthmus.__version__,
    "text": {
        "characters": len(text),
        "train": cut,
        "sha256": hashlib.sha256(bytes(text.tolist())).hexdigest(),
    },
    "images": {"name": source, "train": len(pixels), "test": len(images["test"].labels)},
    "steps": STEPS,
    "batch": BATCH,
    "rate": RATE,
    "length": LENGTH,
    "width": WIDTH,
    "seeds": list(SEEDS),
    "control": {"steps": MORE_STEPS, "rate": MORE_RATE},
    "parts": PARTS,
    "families": {},
}

# %% The lines, by every method
for kind in DATA:
    begin = time.process_time()
    networks = [trained(kind, seed) for seed in SEEDS]
    seconds = (time.process_time() - begin) / len(SEEDS)
    pairs = {
        f"{SEEDS[i]}-{SEEDS[j]}": pair(kind, networks[i], networks[j])
        for i, j in combinations(range(len(SEEDS)), 2)
    }
    record["families"][kind] = {
        "parameters": sum(p.numel() for p in networks[0].parameters()),
        "constant_loss": constant_loss(kind),
        "training_seconds": seconds,
        "pairs": pairs,
        "control": control(networks[0], kind),
    }
    for name, found in pairs.items():
        print(kind, name, {method: round(line["barrier"], 3) for method, line in found["lines"].items()})
    RECORD.write_text(json.dumps(record, allow_nan=False, indent=1) + "\n", encoding="utf-8")
