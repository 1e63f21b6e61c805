"""A random checkpoint of billions of parameters, relabelled and merged in a process of its own, with its memory.

As a program: ``python tests/pretrained/pretrained_large.py FOLDER [--layers 28] [--figure memory.png]`` prints one
JSON object. FOLDER needs room for five times the checkpoint.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from isthmus import pretrained
from isthmus.couplings import random_permutation
from isthmus.matching import Alignment
from isthmus.pretrained._shards import PlannedTensor, write_shards

PAGE = os.sysconf("SC_PAGE_SIZE")
BLOCK = 2**24


def resident() -> int:
    """Return the bytes of this process in memory, pages of mapped files included."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE


class MemoryCurve:
    """Samples the resident memory of this process, and notes the stages it went through."""

    def __init__(self, interval: float = 0.05) -> None:
        self.base = resident()
        self.start = time.perf_counter()
        self.times: list[float] = []
        self.sizes: list[int] = []
        self.stages: list[dict[str, Any]] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, args=(interval,), daemon=True)
        self._thread.start()

    def _sample(self, interval: float) -> None:
        while not self._stop.wait(interval):
            self.times.append(time.perf_counter() - self.start)
            self.sizes.append(resident())

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        first, begin = len(self.sizes), time.perf_counter()
        yield
        seconds = time.perf_counter() - begin
        peak = max(self.sizes[first:], default=resident()) - self.base
        self.stages.append({"name": name, "seconds": seconds, "peak": peak, "begin": begin - self.start})

    def finish(self) -> None:
        self._stop.set()
        self._thread.join()


def configuration(layers: int, width: int, vocabulary: int) -> Any:
    """Return a Llama of the 3.2 family's 3-billion shape (28 layers, width 3072), in bfloat16."""
    from transformers import LlamaConfig

    return LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=width * 8 // 3,
        num_hidden_layers=layers,
        num_attention_heads=width // 128,
        num_key_value_heads=width // 384,
        head_dim=128,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
        dtype="bfloat16",
    )


def write_random(folder: Path, config: Any, seed: int, shard: int) -> None:
    """Write a checkpoint with random weights, block by block."""
    from transformers import LlamaForCausalLM

    folder.mkdir()
    config.save_pretrained(folder)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    planned = [PlannedTensor(n, torch.bfloat16, tuple(p.shape)) for n, p in model.named_parameters()]
    generator = torch.Generator().manual_seed(seed)

    def blocks(tensor: PlannedTensor) -> Iterator[Tensor]:
        rows = max(1, BLOCK // max(torch.Size(tensor.shape[1:]).numel(), 1))
        for start in range(0, tensor.shape[0], rows):
            shape = (min(rows, tensor.shape[0] - start), *tensor.shape[1:])
            yield (0.02 * torch.randn(shape, generator=generator)).to(torch.bfloat16)

    write_shards(folder, planned, blocks, limit=shard, metadata={"format": "pt"})


def relabel_and_merge(root: Path, config: Any, shard: int, copy: bool) -> dict[str, Any]:
    """Make two random checkpoints, relabel one by a random relabelling, and merge; return what was measured."""
    write_random(root / "a", config, 0, shard)
    write_random(root / "b", config, 1, shard)
    os.sync()
    seconds_copy = None
    if copy:
        begin = time.perf_counter()
        subprocess.run(["cp", "-r", str(root / "a"), str(root / "copy")], check=True)
        os.sync()
        seconds_copy = time.perf_counter() - begin
        shutil.rmtree(root / "copy")
    curve = MemoryCurve()
    with curve.stage("open"):
        a, b = pretrained.open_model(root / "a"), pretrained.open_model(root / "b")
    with curve.stage("discover"):
        spec = b.discover()
    generator = torch.Generator().manual_seed(2)
    drawn = {name: random_permutation(group.size, generator) for name, group in spec.groups.items()}
    alignment = Alignment(drawn, spec, "random")
    with curve.stage("relabel"):
        relabelled = pretrained.apply(alignment, b, root / "relabelled", max_shard_size=shard)
    with curve.stage("merge"):
        pretrained.merge([a, b], root / "merged", alignments=[alignment], max_shard_size=shard)
    with curve.stage("verify"):
        change = pretrained.function_change(spec, drawn, b)
    curve.finish()
    return {
        "parameters": sum(t.numel() for t in b.file.shapes().values()),
        "bytes": relabelled.nbytes,
        "largest": max(b.file.stored(k).nbytes for k in b.file),
        "shards": len(relabelled.shards),
        "groups": len(spec.groups),
        "moved": spec.fraction_moved,
        "change": change,
        "seconds_copy": seconds_copy,
        "base": curve.base,
        "stages": curve.stages,
        "times": curve.times,
        "sizes": curve.sizes,
    }


def draw(found: dict[str, Any], path: Path) -> None:
    """Draw the memory curve."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 3.6), layout="constrained")
    axes.plot(
        found["times"], [(s - found["base"]) / 2**30 for s in found["sizes"]], color="#1f6f8b", linewidth=1
    )
    axes.axhline(4, color="#b03a2e", linewidth=1, linestyle="--")
    axes.text(0, 4.05, "4 GiB", color="#b03a2e", va="bottom")
    axes.axhline(found["bytes"] / 2**30, color="#777777", linewidth=1, linestyle=":")
    axes.text(0, found["bytes"] / 2**30 + 0.05, "one checkpoint", color="#777777", va="bottom")
    for stage in found["stages"]:
        if stage["seconds"] > 0.05 * found["times"][-1]:
            axes.axvline(stage["begin"], color="#cccccc", linewidth=1)
            axes.text(
                stage["begin"], 4.6, f" {stage['name']}\n {stage['seconds']:.0f} s", va="bottom", fontsize=9
            )
    axes.set(xlabel="seconds", ylabel="GiB above the interpreter's base", ylim=(0, 7))
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--width", type=int, default=3072)
    parser.add_argument("--vocabulary", type=int, default=128256)
    parser.add_argument("--shard", type=int, default=5 * 10**9)
    parser.add_argument("--copy", action="store_true", help="also measure how long cp takes")
    parser.add_argument("--figure", type=Path)
    options = parser.parse_args()
    config = configuration(options.layers, options.width, options.vocabulary)
    found = relabel_and_merge(options.folder, config, options.shard, options.copy)
    if options.figure is not None:
        draw(found, options.figure)
    print(json.dumps({k: v for k, v in found.items() if k not in ("times", "sizes")}, indent=1))  # noqa: T201


if __name__ == "__main__":
    main()
