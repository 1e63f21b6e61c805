"""The suite: every network, what a careful reader would name in some of them, and one run of one entry."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import hugging_face
import torch
from plain_networks import PLAIN
from torch import nn

from isthmus.symmetry import SymmetrySpec, Verification, discover, verify
from isthmus.testing import randomise_state

NAMES: tuple[str, ...] = (*PLAIN, *hugging_face.CONFIGS)

FAST = (
    "lstm",
    "transformer_encoder",
    "chosen_experts",
    "resnext",
    "wavenet_normalised",
    "gpt2",
    "llama",
    "mixtral",
    "bloom",
)
"""Run by default; the others are marked slow."""

Kinds = dict[str, tuple[int, int]]
"""From a kind of group to its size and how many groups of it there are."""


def _attention(
    layers: int, heads: int, each: int, qk: int | None = None, *, heads_move: bool = True
) -> Kinds:
    """Heads of every layer, and inside every head its query–key and its value–output dimensions."""
    kinds: Kinds = {"value dimensions in a head": (each, layers * heads)}
    if heads_move:
        kinds["heads"] = (heads, layers)
    if qk != 0:
        kinds["query–key dimensions in a head"] = (each if qk is None else qk, layers * heads)
    return kinds


def _transformer(width: int, inner: int, attention: Kinds, **more: tuple[int, int]) -> Kinds:
    return {"stream": (width, 1), "hidden units": (inner, 2), **attention, **more}


_GROUPED: Kinds = {
    "key–value heads": (2, 2),
    "query heads of a key–value head": (2, 4),
    "value dimensions in a head": (8, 4),
}
_PLAIN_ATTENTION = _attention(2, 4, 4)
_ENCODER_DECODER: Kinds = {"stream": (16, 1), "hidden units": (24, 4), **_attention(6, 4, 4)}

EXPECTED: dict[str, Kinds] = {
    "gpt2": _transformer(16, 64, _PLAIN_ATTENTION),
    "gpt_neo": _transformer(16, 24, _PLAIN_ATTENTION),
    "opt": _transformer(16, 24, _PLAIN_ATTENTION),
    "gpt_neox": _transformer(32, 24, _attention(2, 4, 8, qk=4)),
    "gptj": _transformer(32, 128, _attention(2, 4, 8, qk=4)),
    "codegen": _transformer(32, 128, _attention(2, 4, 8, qk=4)),
    "phi": _transformer(32, 24, _attention(2, 4, 8, qk=4)),
    "bloom": _transformer(16, 64, _attention(2, 4, 4, heads_move=False)),
    "mpt": _transformer(16, 64, _attention(2, 4, 4, heads_move=False)),
    "falcon_alibi": _transformer(32, 128, _attention(2, 4, 8, heads_move=False)),
    "falcon": _transformer(32, 24, {"query heads": (4, 2), "value dimensions": (8, 2)}),
    "gpt_bigcode": _transformer(
        16, 64, {"query heads": (4, 2), "query–key dimensions": (4, 2), "value dimensions": (4, 2)}
    ),
    **{
        name: _transformer(32, 24, _GROUPED)
        for name in ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3", "phi3", "starcoder2",
                     "cohere", "cohere2", "granite", "olmo", "olmo2")
    },
    **{
        name: {"stream": (32, 1), "experts": (4, 2), "hidden units of an expert": (inner, 8), **_GROUPED}
        for name, inner in (("mixtral", 24), ("qwen3_moe", 12), ("gpt_oss", 24), ("granitemoe", 24))
    },
    # its row of padding is zero, where all experts are equally good: their order counts
    "olmoe": {"stream": (32, 1), "hidden units of an expert": (24, 8), **_GROUPED},
    "mixtral_grouped": {"stream": (32, 1), "hidden units of an expert": (24, 8), **_GROUPED},
    "biogpt": _transformer(16, 24, _PLAIN_ATTENTION),
    "openai_gpt": _transformer(16, 64, _PLAIN_ATTENTION),
    "xlm": _transformer(16, 64, _PLAIN_ATTENTION),
    "rembert": _transformer(16, 24, _PLAIN_ATTENTION, embedding=(8, 1), output=(12, 1)),
    **{
        name: {"stream": (16, 1), "channels": (32, 2), "states": (5, 2), "step rank": (3, 2)}
        for name in ("mamba", "falcon_mamba")
    },
    **{name: _transformer(16, 24, _PLAIN_ATTENTION) for name in ("bert", "roberta", "distilbert", "vit", "deit", "ast",
                                                              "data2vec_text", "vit_msn", "vivit")},
    "bert_classifier": _transformer(16, 24, _PLAIN_ATTENTION, pooler=(16, 1)),
    "electra": _transformer(16, 24, _PLAIN_ATTENTION, embedding=(8, 1)),
    "albert": {"stream": (16, 1), "embedding": (8, 1), "hidden units": (24, 1), **_attention(1, 4, 4)},
    "modernbert": _transformer(16, 24, _attention(2, 4, 4, qk=0)),
    "mt5": {
        "stream": (16, 1),
        "hidden units": (24, 4),
        "dimensions in a head": (4, 48),
        "heads with a shared bias, in the encoder and in the decoder": (4, 2),
        "heads of cross-attention": (4, 2),
    },
    "t5": {
        "stream": (16, 1),
        "hidden units": (24, 4),
        "dimensions in a head": (4, 48),
        "heads with a shared bias, in the encoder and in the decoder": (4, 2),
        "heads of cross-attention": (4, 2),
    },
    **dict.fromkeys(("bart", "pegasus", "marian", "blenderbot", "mbart"), _ENCODER_DECODER),
    "whisper": {**_ENCODER_DECODER, "stream": (16, 2), "convolution": (16, 1)},
    "clip": {"streams": (16, 2), "projection": (12, 1), "hidden units": (24, 4), **_attention(4, 4, 4)},
    "convnext": {"first stage": (8, 1), "second stage": (16, 1), "hidden 1": (32, 1), "hidden 2": (64, 2)},
    **{name: {"hidden units": (5, 2)} for name in ("lstm", "gru", "rnn", "lstm_final_state")},
    "lstm_bidirectional": {"hidden units": (5, 4)},
    "lstm_projected": {"cells": (5, 2), "states": (4, 2)},
    "swiglu": {"hidden units": (7, 1)},
    "swiglu_fused": {"hidden units": (7, 1)},
    "multihead_attention": {"streams": (12, 3), **_attention(2, 3, 4)},
    "transformer_encoder": _transformer(12, 16, _attention(2, 3, 4)),
    "transformer": {"streams of source and target": (12, 2), "hidden units": (16, 3), **_attention(5, 3, 4)},
    "fused_attention_block": {"stream": (12, 1), "hidden units": (16, 1), **_attention(1, 3, 4)},
    "linear_attention": _attention(1, 3, 4),
    "windowed_attention": {"streams": (12, 2), **_attention(1, 3, 4)},
    "deep_sets": {"inside": (8, 1), "pooled": (7, 1), "after": (5, 1)},
    "graph_convolution": {"first": (8, 1), "second": (7, 1)},
    "graph_attention": {"heads": (3, 1), "dimensions in a head": (4, 3)},
    "mlp_mixer": {"channels": (8, 1), "token mixing": (7, 2), "channel mixing": (10, 2)},
    "squeeze_excite_resnet": {"stream": (8, 1), "squeezed": (4, 2)},
    "resnext": {"stream": (8, 1), "groups": (4, 1), "channels in a group, before and after": (3, 8)},
    "inception": {"stem": (6, 1), "one": (4, 1), "reduced": (3, 1), "three": (5, 1), "pooled": (2, 1)},
    "conv_mixer": {"stem and layers": (8, 3)},
    **{
        name: {"stream": (7, 1), "gates": (8, 2), "skips": (9, 1)}
        for name in ("wavenet", "wavenet_one_layer", "wavenet_normalised")
    },
    **{
        name: _attention(1, 3, 4)
        for name in ("einsum_attention", "einsum_attention_heads_first", "einsum_attention_fused")
    },
    "layers_in_one_tensor": {"stream": (7, 1), "hidden units": (4, 2)},
    "shufflenet_v2": {
        "stem": (8, 1),
        "head": (10, 1),
        "inner channels of the long branches, and the last result": (6, 4),
        "channels of the first unit that the second works on": (3, 2),
        "channels of the first unit that later units tell apart": (2, 2),
        "channels of the second unit, in the halves of the third": (3, 2),
    },
    "highway": {"stream": (8, 1)},
    "film": {"channels": (7, 1)},
    **{
        name: {"experts": (3, 1), "hidden units of an expert": (4, 3)}
        for name in ("dense_experts", "chosen_experts", "masked_experts")
    },
    "state_space": {"channels": (7, 1), "states of a channel": (3, 7)},
    "siamese": {"hidden": (8, 1), "embedding": (5, 1)},
    "group_norm_network": {"groups": (4, 1), "channels in a group": (2, 4), "one group": (6, 1)},
    "unrolled_solver": {"state": (8, 1)},
    "matrix_factorisation": {"factors": (5, 1)},
    "hypernetwork": {"code": (5, 1), "written units": (7, 1)},
}  # fmt: skip


@dataclass(frozen=True)
class Entry:
    """What one run found."""

    name: str
    kind: str
    parameters: int
    spec: SymmetrySpec
    verification: Verification
    seconds: float

    @property
    def sizes(self) -> Counter[int]:
        """How many groups of each size."""
        return Counter(g.size for g in self.spec.groups.values())


def expected_sizes(kinds: Mapping[str, tuple[int, int]]) -> Counter[int]:
    """Add the kinds up: how many groups of each size."""
    total: Counter[int] = Counter()
    for size, number in kinds.values():
        total[size] += number
    return total


def build(name: str) -> tuple[nn.Module, Any, dict[str, Any], Any]:
    """Return the network (norms randomised), its inputs and the outputs that count."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if name in PLAIN:
            model, args = PLAIN[name]()
            kwargs, outputs = {}, None
        else:
            model, args, kwargs, outputs = hugging_face.build(name)
    return randomise_state(model, torch.Generator().manual_seed(0)).eval(), args, kwargs, outputs


def run(name: str) -> Entry:
    """Discover the symmetry of one network and verify it."""
    model, args, kwargs, outputs = build(name)
    start = time.process_time()
    spec = discover(model, args, kwargs, outputs=outputs)
    seconds = time.process_time() - start
    found = verify(spec, model, args, kwargs, generator=torch.Generator().manual_seed(1))
    kind = "plain" if name in PLAIN else hugging_face.CONFIGS[name][1]
    return Entry(name, kind, sum(p.numel() for p in model.parameters()), spec, found, seconds)
