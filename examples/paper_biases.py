# %% [markdown]
# # Do biases explain where we differ from the authors' figure?
# The authors' covariance weight matching ignores biases; ours takes the bias as one more input of constant 1. Both are
# run here on the pairs of a finished `paper-mnist` study, layer by layer with SciPy's assignment, independently of the
# library's matching, and the midpoint test loss of the real networks is measured.
#
#     python examples/paper_biases.py runs/paper-mnist [DATA_DIR]
#
# Set `ISTHMUS_SMOKE=1` for a small study of its own in the current folder.

# %%
import json
import os
import sys
from pathlib import Path

import torch
from scipy.optimize import linear_sum_assignment

from isthmus.checkpoints import load_state
from isthmus.files import atomic_path
from isthmus.study import InProcess, load_dataset, read_rows, read_study, run_study, to_batches

SMALL = """
name: small
data: {name: digits, statistics: 200}
network: {family: mlp, width: 16, depth: 2}
training: {learning_rate: [0.1, 0.3], epochs: 3, batch_size: 64, initialisation: lecun_normal}
seeds: 2
measure: {methods: [covariance], points: 3, dimension: false}
"""
SMOKE = bool(os.environ.get("ISTHMUS_SMOKE"))
RUN = Path("small-run" if SMOKE else sys.argv[1])
DATA_DIR = sys.argv[2] if len(sys.argv) > 2 else None
RECORD = Path("biases.json" if SMOKE else "results/paper-mnist/biases.json")
if SMOKE:
    Path("small.yaml").write_text(SMALL, encoding="utf-8")
    with InProcess(1) as executor:
        run_study(read_study("small.yaml"), RUN, executor=executor)

units = json.loads((RUN / "plan.json").read_text(encoding="utf-8"))["units"]
measured = [u["content"] for u in units if u["kind"] == "measure"]
rates = {u["address"]: u["content"]["networks"] for u in units if u["kind"] == "train"}
library = {
    (r["learning_rate"], r["seed_a"], r["seed_b"]): r["midpoint_loss"]
    for r in read_rows(RUN)
    if r["method"] == "covariance" and r["split"] == "test"
}
data = measured[0]["data"]
train_data, test_data = (load_dataset(data["name"], DATA_DIR, split=s) for s in ("train", "test"))
count = data["statistics"]
images = next(iter(to_batches(train_data, count, limit=count, seed=0)))[0].flatten(1)
held_out, labels = next(iter(to_batches(test_data, len(test_data))))


# %%
def layers(end):
    """Weights and biases of a trained network, first layer first."""
    state = load_state(RUN / "networks" / f"{end['unit']}-{end['index']}.safetensors")
    names = sorted((n for n in state if n.endswith(".weight")), key=lambda n: int(n.split(".")[-2]))
    return [(state[n], state[n.removesuffix("weight") + "bias"]) for n in names]


def matched(a, b, biases):
    """B's layers, each hidden layer in the order that fits A's best in the metric of A's inputs."""
    inputs, found, order = images, [], torch.arange(images.shape[1])
    for (own, own_bias), (other, other_bias) in zip(a[:-1], b[:-1], strict=True):
        other = other[:, order]
        rows, columns, seen = own, other, inputs
        if biases:
            rows, columns = (torch.cat([w, c[:, None]], 1) for w, c in ((own, own_bias), (other, other_bias)))
            seen = torch.cat([inputs, torch.ones(len(inputs), 1)], 1)
        seen = seen.double()
        gain = rows.double() @ (seen.T @ seen / len(seen)) @ columns.double().T
        order = torch.from_numpy(linear_sum_assignment(gain.numpy(), maximize=True)[1])
        found.append((other[order], other_bias[order]))
        inputs = torch.relu(inputs @ own.T + own_bias)
    return [*found, (b[-1][0][:, order], b[-1][1])]


def midpoint_loss(a, b):
    """Test loss half-way between two networks."""
    hidden = held_out.flatten(1)
    for depth, ((w, c), (v, d)) in enumerate(zip(a, b, strict=True)):
        hidden = hidden @ ((w + v) / 2).T + (c + d) / 2
        hidden = torch.relu(hidden) if depth < len(a) - 1 else hidden
    return float(torch.nn.functional.cross_entropy(hidden, labels))


# %%
rows = []
for content in measured:
    a, b = layers(content["a"]), layers(content["b"])
    rate = rates[content["a"]["unit"]][content["a"]["index"]]["learning_rate"]
    seeds = content["a"]["seed"], content["b"]["seed"]
    rows.append(
        {
            "learning_rate": rate,
            "seed_a": seeds[0],
            "seed_b": seeds[1],
            "library": library[rate, *seeds],
            "with_bias": midpoint_loss(a, matched(a, b, True)),
            "without_bias": midpoint_loss(a, matched(a, b, False)),
        }
    )
    print(", ".join(f"{k} {v:.4g}" for k, v in rows[-1].items()), flush=True)
with atomic_path(RECORD) as temporary:
    temporary.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
