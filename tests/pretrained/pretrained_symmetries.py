"""A random network of real size, folded, moved by a planted element of its whole group, aligned and merged from files.

As a program: ``python tests/pretrained/pretrained_symmetries.py FOLDER [--kind bert] [--layers 12]`` prints one JSON
object: CPU seconds of the process and peak resident memory above the base, stage by stage, and how far the aligned
weights are from those they were planted in. FOLDER needs room for six times the network.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from pretrained_large import MemoryCurve

from isthmus import pretrained
from isthmus.matching import Alignment
from isthmus.pretrained import OpenedModel, open_model
from isthmus.symmetry import SymmetrySpec, drawn_elements

SOURCE = {"gpt2": "GPT2LMHeadModel", "bert": "BertForMaskedLM"}


class CostCurve(MemoryCurve):
    """Notes the CPU seconds of every stage, too."""

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        begin = time.process_time()
        with super().stage(name):
            yield
        self.stages[-1]["cpu_seconds"] = round(time.process_time() - begin, 1)


def write_random(folder: Path, kind: str, layers: int, width: int, vocabulary: int, seed: int) -> None:
    """Write a network with random weights, and with gains and biases that are not one and zero."""
    import transformers

    torch.manual_seed(seed)
    if kind == "gpt2":
        sizes = {"n_layer": layers, "n_embd": width, "n_head": width // 64, "vocab_size": vocabulary}
        config: Any = transformers.GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)
    else:
        sizes = {"num_hidden_layers": layers, "hidden_size": width, "num_attention_heads": width // 64}
        config = transformers.BertConfig(**sizes, vocab_size=vocabulary, intermediate_size=4 * width)
    model = getattr(transformers, SOURCE[kind])(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    model.save_pretrained(folder)


def planted(spec: SymmetrySpec, seed: int) -> Alignment:
    """Return a random element of the whole group, each coupling of its group's own class."""
    drawn = drawn_elements(spec, torch.Generator().manual_seed(seed), 1)[0]
    return Alignment(drawn, spec, "planted")


def distance(one: OpenedModel, two: OpenedModel) -> tuple[float, float]:
    """Return the distance of two networks' weights, and the first one's norm."""
    apart = norm = 0.0
    for key in one.file:
        own, other = one.file[key], two.file[key]
        apart += float(torch.dist(own, other).square())
        norm += float(own.norm().square())
    return apart**0.5, norm**0.5


def measured(root: Path, kind: str, layers: int, width: int, vocabulary: int) -> dict[str, Any]:
    """Fold, plant, align and merge; return what was measured."""
    write_random(root / "source", kind, layers, width, vocabulary, 0)
    curve = CostCurve()
    with curve.stage("fold"):
        folded = pretrained.fold(open_model(root / "source"), root / "a", untie=kind == "gpt2")
    a = open_model(root / "a")
    with curve.stage("discover"):
        ones, zeros = a.constants()
        spec = a.discover(ones=ones, zeros=zeros)
    with curve.stage("plant and write"):
        moved = pretrained.apply(planted(spec, 1), a, root / "b")
    b = open_model(root / "b")
    with curve.stage("align"):
        found = pretrained.align(a, b, symmetry="all")
    with curve.stage("relabel and write"):
        pretrained.apply(found, b, root / "b-aligned")
    with curve.stage("average and write"):
        pretrained.merge([a, b], root / "merged", alignments=[found])
    curve.finish()
    before, norm = distance(a, b)
    after, _ = distance(a, open_model(root / "b-aligned"))
    merged = open_model(root / "merged")
    inputs = a.example.kwargs
    with torch.no_grad():
        one, two = (m.load()(**inputs).logits for m in (open_model(root / "source"), merged))
    return {
        "kind": kind,
        "parameters": sum(t.numel() for t in a.file.shapes().values()),
        "bytes": moved.nbytes,
        "largest": max(a.file.stored(k).nbytes for k in a.file),
        "untied": list(folded.untied),
        "groups": len(spec.groups),
        "classes": {
            str(c): sum(g.acts is c for g in spec.groups.values())
            for c in {g.acts for g in spec.groups.values()}
        },
        "kinds": found.kinds,
        "sweeps": len(found.sweeps),
        "status": str(found.status),
        "verification_error": found.verification_error,
        "distance_before": before / norm,
        "distance_after": after / norm,
        "outputs_of_the_average": float((one - two).abs().max() / one.abs().max()),
        "base": curve.base,
        "stages": curve.stages,
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kind", choices=[*SOURCE], default="gpt2")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--vocabulary", type=int)
    options = parser.parse_args()
    vocabulary = options.vocabulary or {"gpt2": 50257, "bert": 30522}[options.kind]
    found = measured(options.folder, options.kind, options.layers, options.width, vocabulary)
    print(json.dumps(found, indent=1))  # noqa: T201


if __name__ == "__main__":
    main()
