# %% [markdown]
# # Two networks, one line
# Train two small networks on handwritten digits, relabel the second, and walk the straight line between them.
# Run it as a script, or cell by cell. Set `ISTHMUS_SMOKE=1` for a quick pass.

# %%
import os

import isthmus
from isthmus.study import TrainSettings, load_dataset, network_for, to_batches, train

SMOKE = bool(os.environ.get("ISTHMUS_SMOKE"))
epochs, width = (3, 32) if SMOKE else (40, 256)

# %% Two networks that share nothing but the task
digits, held_out = load_dataset("digits", split="train"), load_dataset("digits", split="test")
a, b = (
    train(
        network_for("mlp", digits, width=width, depth=2),
        digits,
        TrainSettings(learning_rate=0.1, batch_size=64, epochs=epochs, seed=seed),
    ).model.eval()
    for seed in (0, 1)
)

# %% Which units may change places, and the proof
spec = isthmus.discover(a, to_batches(digits)[0][0][:1])
print(spec)
print(isthmus.verify(spec, a, to_batches(digits)[0][0][:8]))

# %% The line, with and without relabelling
data = {"test": to_batches(held_out)}
print("no relabelling:", f"{isthmus.line(a, b, data).barrier:.4f} nats")
for method in isthmus.METHODS:
    alignment = isthmus.align(a, b, batches=to_batches(digits), method=method)
    print(f"{method}:", f"{isthmus.line(a, b, data, alignment=alignment).barrier:.4f} nats")

# %% Merge, and keep the result
alignment = isthmus.align(a, b, batches=to_batches(digits), method="correlation")
merged = isthmus.merge([a, alignment.apply(b)])
print(f"merged network: {sum(t.numel() for t in merged.values()):,} numbers")
