"""What a careful reader says may act on the units of each kind of group, from the code and the mathematics alone.

Kinds are those of the reader's list of groups; a kind that is not named here is permuted, and nothing more: streams that
several norms with gains read, heads and experts, whose own units hold all factors, and units under GELU and the like.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from suite import EXPECTED

from isthmus.symmetry import Acts, SymmetrySpec

Classes = Mapping[str, Acts]

SIGNED, POSITIVE, MONOMIAL = Acts.SIGNED, Acts.POSITIVE, Acts.MONOMIAL
MEAN_FIXING, ORTHOGONAL, GENERAL = Acts.MEAN_FIXING, Acts.ORTHOGONAL, Acts.GENERAL

_HEADS: Classes = dict.fromkeys(("value dimensions in a head", "value dimensions", "query–key dimensions in a head", "query–key dimensions", "dimensions in a head"), GENERAL)  # fmt: skip
"""Queries and keys meet in inner products, values are averaged and read by a linear layer."""
_RELU: Classes = {**_HEADS, "hidden units": POSITIVE}
_GATED: Classes = {**_HEADS, "hidden units": MONOMIAL, "hidden units of an expert": MONOMIAL}
"""What is multiplied by the gate takes any factor; the gate takes none."""

READ: dict[str, Classes] = {
    **dict.fromkeys(
        (
            "gpt2", "gpt_neo", "gpt_neox", "gptj", "codegen", "phi", "bloom", "mpt", "falcon_alibi", "falcon",
            "gpt_bigcode", "starcoder2", "biogpt", "openai_gpt", "xlm", "bert", "roberta", "distilbert", "vit", "deit",
            "ast", "data2vec_text", "vit_msn", "vivit", "electra", "albert", "bart", "pegasus", "marian", "blenderbot",
            "mbart", "whisper",
        ),
        _HEADS,
    ),
    **dict.fromkeys(
        (
            "cohere", "cohere2", "modernbert",
        ),
        _GATED,
    ),
    **dict.fromkeys(("opt", "transformer_encoder", "transformer"), _RELU),
    "olmo": {**_GATED, "stream": MEAN_FIXING},  # its norms have neither gain nor bias
    # signs pass RMS norms, whatever their gains
    **{
        key: {**_GATED, "stream": SIGNED}
        for key in (
            "llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3", "phi3", "granite", "olmo2", "mixtral",
            "qwen3_moe", "granitemoe", "olmoe", "mt5",
        )
    },
    "t5": {**_RELU, "stream": SIGNED},
    "gpt_oss": {**_HEADS, "stream": SIGNED},
    # factors sit on the gain and the bias of the norm whose result one layer alone reads
    "rembert": {**_HEADS, "embedding": MONOMIAL, "output": MONOMIAL},
    "bert_classifier": {**_HEADS, "pooler": SIGNED},
    "clip": {**_HEADS, "projection": ORTHOGONAL},
    "convnext": {},
    "mamba": {"stream": SIGNED, "states": MONOMIAL, "step rank": GENERAL},
    "falcon_mamba": {"stream": SIGNED, "states": SIGNED, "step rank": ORTHOGONAL},
    **{n: {"hidden units": SIGNED} for n in ("lstm", "gru", "rnn", "lstm_final_state", "lstm_bidirectional")},
    "lstm_projected": {"cells": SIGNED, "states": GENERAL},
    "swiglu": {"hidden units": MONOMIAL},
    "swiglu_fused": {"hidden units": MONOMIAL},
    "multihead_attention": {**_HEADS, "streams": GENERAL},
    "fused_attention_block": _HEADS,
    "linear_attention": {"value dimensions in a head": GENERAL},
    "windowed_attention": {**_HEADS, "streams": GENERAL},
    "deep_sets": {"inside": POSITIVE, "pooled": GENERAL, "after": POSITIVE},
    "graph_convolution": {"first": POSITIVE, "second": POSITIVE},
    "graph_attention": {"dimensions in a head": GENERAL},
    "mlp_mixer": {},
    "squeeze_excite_resnet": {"stream": POSITIVE, "squeezed": POSITIVE},
    "resnext": {"stream": POSITIVE, "channels in a group, before and after": POSITIVE},
    "inception": dict.fromkeys(("stem", "one", "reduced", "three", "pooled"), POSITIVE),
    "conv_mixer": {"stem and layers": MONOMIAL},
    **{
        name: {"stream": GENERAL, "gates": SIGNED, "skips": POSITIVE} for name in ("wavenet", "wavenet_one_layer")
    },
    # rows of normalised weights are scaled by their lengths, columns change their signs at most
    "wavenet_normalised": {"stream": SIGNED, "gates": SIGNED},
    **dict.fromkeys(("einsum_attention", "einsum_attention_heads_first", "einsum_attention_fused"), _HEADS),
    "layers_in_one_tensor": {"stream": GENERAL, "hidden units": SIGNED},
    "highway": {"stream": POSITIVE},
    "film": {"channels": POSITIVE},
    **{
        name: {"hidden units of an expert": POSITIVE}
        for name in ("dense_experts", "chosen_experts", "masked_experts")
    },
    "state_space": {"states of a channel": MONOMIAL},
    "siamese": {"hidden": POSITIVE, "embedding": ORTHOGONAL},
    "group_norm_network": {},
    "unrolled_solver": {"state": SIGNED},
    "matrix_factorisation": {"factors": GENERAL},
    "hypernetwork": {"code": POSITIVE, "written units": POSITIVE},
}  # fmt: skip

INCOMPLETE: dict[str, str] = {
    "mamba": "states are read by what is computed from the tokens, not by a tensor of the network",
    "falcon_mamba": "states are read by what is computed from the tokens, not by a tensor of the network",
    "lstm_projected": "cells with projections are not graded",
    "graph_attention": "a product that a sum follows is not seen to be an inner product",
    "matrix_factorisation": "a product that a sum follows is not seen to be an inner product",
    "state_space": "a product that a sum follows is not seen to be an inner product",
    **dict.fromkeys(
        ("chosen_experts", "mixtral", "qwen3_moe", "granitemoe", "olmoe"),
        "experts that the data choose are not seen to be tensors of the network",
    ),
    "resnext": "convolutions in groups are not graded",
    "falcon": "value dimensions that all heads share are not graded",
    "gpt_bigcode": "value dimensions that all heads share are not graded",
    "siamese": "cosines are not graded",
}
"""Networks in which less is found than a reader sees, and why."""


def read_classes(name: str) -> Counter[tuple[int, Acts]]:
    """Return how many groups of each size and class a reader sees in a network."""
    total: Counter[tuple[int, Acts]] = Counter()
    for kind, (size, number) in EXPECTED[name].items():
        total[size, READ[name].get(kind, Acts.PERMUTATION)] += number
    return total


def found_classes(spec: SymmetrySpec) -> Counter[tuple[int, Acts]]:
    """Return how many groups of each size and class a spec has."""
    return Counter((group.size, group.acts) for group in spec.groups.values())
