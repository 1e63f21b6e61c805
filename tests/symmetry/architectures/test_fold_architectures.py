"""Folding across the suite of architectures: whatever is folded, no network changes."""

from __future__ import annotations

import pytest
import torch

import isthmus

pytest.importorskip("transformers", reason="the suite builds networks from transformers configurations")

from suite import FAST, NAMES, build

KINDS = {
    *FAST,
    "gpt2",
    "llama",
    "gemma2",
    "bert",
    "t5",
    "vit",
    "swin",
    "convnext",
    "mixtral_grouped",
    "bloom",
}
CASES = [
    pytest.param(name, marks=[pytest.mark.slow, *([] if name in KINDS else [pytest.mark.huge])])
    for name in NAMES
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", CASES)
def test_no_network_changes(name: str) -> None:
    model, args, kwargs, outputs = build(name)
    folded = isthmus.fold(model, args, kwargs, outputs=outputs, untie=True)
    assert folded.proof.passed
    assert folded.error <= (1e-10 if folded.proof.dtype == torch.float64 else 1e-5)
    assert folded.change <= 1e-5
