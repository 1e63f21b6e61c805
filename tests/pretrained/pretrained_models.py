"""Tiny networks of the four families, with nothing left at its initial symmetry, saved as model folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteMoeConfig,
    GraniteMoeForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    ViTConfig,
    ViTForImageClassification,
)

KINDS = ("llama", "gpt2", "bert", "vit")
EXPERTS = "moe"
"""A mixture of experts whose weights are stored as one tensor for all of them, beside heads and their dimensions."""


def tiny(kind: str, seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any) -> PreTrainedModel:
    """Build a network with random weights, gains and biases."""
    small = {"hidden_size": 12, "intermediate_size": 10, "num_hidden_layers": 1, "num_attention_heads": 3}
    torch.manual_seed(seed)
    if kind == "llama":
        sizes = {**small, "num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 4}
        model = LlamaForCausalLM(LlamaConfig(vocab_size=23, max_position_embeddings=32, **sizes | changes))
    elif kind == EXPERTS:
        sizes = {**small, "num_attention_heads": 6, "num_key_value_heads": 3, "num_local_experts": 4}
        own = {"pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0, "max_position_embeddings": 32}
        model = GraniteMoeForCausalLM(GraniteMoeConfig(vocab_size=23, **own | sizes | changes))
    elif kind == "gpt2":
        sizes = {"n_embd": 12, "n_layer": 1, "n_head": 3, "n_inner": 10}
        own = {"vocab_size": 23, "n_positions": 16, "bos_token_id": 0, "eos_token_id": 0}
        model = GPT2LMHeadModel(GPT2Config(**own | sizes | changes))
    elif kind == "bert":
        own = {"vocab_size": 23, "max_position_embeddings": 16, "num_labels": 3}
        model = BertForSequenceClassification(BertConfig(**own | small | changes))
    else:
        own = {"image_size": 8, "patch_size": 4, "num_labels": 3}
        model = ViTForImageClassification(ViTConfig(**own | small | changes))
    return randomised(model, seed).to(dtype).eval()


def randomised(model: Any, seed: int) -> Any:
    """Change every parameter at random, so that no gain is one and no bias zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(5).add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


def save(model: nn.Module, folder: Path, shard: str = "5GB") -> Path:
    """Save a network as transformers does, with a tokenizer's file and one of another kind beside it."""
    model.save_pretrained(folder, max_shard_size=shard)  # type: ignore[operator]
    (folder / "tokenizer.json").write_text('{"version": "1.0"}', encoding="utf-8")
    (folder / "notes").mkdir()
    (folder / "notes" / "data.txt").write_text("kept", encoding="utf-8")
    return folder


def logits(model: Any, kwargs: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(**kwargs).logits
