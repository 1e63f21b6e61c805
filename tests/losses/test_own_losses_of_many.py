"""Every small network of transformers that the symmetry suite knows: our loss against its own, on two batches."""

from __future__ import annotations

import importlib.util
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from isthmus.errors import IsthmusWarning
from isthmus.evaluation import evaluate

pytest.importorskip("transformers")

_PATH = Path(__file__).parents[1] / "symmetry" / "architectures" / "hugging_face.py"
_TEXT = ("CausalLM", "LMHead", "MaskedLM", "ConditionalGeneration")
_CLASSES = ("ImageClassification", "VideoClassification", "AudioClassification", "SequenceClassification")
_OTHER_INPUTS = ("PerceiverForMaskedLM", "MusicgenForCausalLM")
"""Their labels are of another shape than one text's tokens."""


def suite() -> Any:
    spec = importlib.util.spec_from_file_location("hugging_face_networks", _PATH)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


SUITE = suite()


def batches_of(network: str, inputs: dict[str, Any]) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)
    given = {k: v for k, v in inputs.items() if k != "decoder_input_ids"}
    if any(network.endswith(kind) for kind in _CLASSES):
        return [{**given, "labels": torch.randint(2, (2,), generator=generator)} for _ in range(2)]
    found = []
    for k in range(2):
        tokens = given.get("input_ids")
        labels = torch.randint(3, 30, (2, 6), generator=generator) if tokens is None else tokens.clone()
        labels[0, 3 + k :] = -100
        found.append({**given, "labels": labels})
    return found


def scored(name: str) -> bool:
    network, settings = SUITE.CONFIGS[name][1:3]
    shifts = not network.startswith("T5") or "decoder_start_token_id" in settings
    known = any(kind in network for kind in _TEXT) or any(network.endswith(kind) for kind in _CLASSES)
    return known and shifts and network not in _OTHER_INPUTS


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")  # a layer of MobileBERT of this size
@pytest.mark.parametrize("name", [n for n in SUITE.CONFIGS if scored(n)])
def test_our_loss_is_the_networks_own(name: str) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, _, inputs, _ = SUITE.build(name)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter.ndim > 1 and "embed" in parameter_name:
                parameter.normal_(std=0.5, generator=generator)
    for batch in batches_of(type(model).__name__, inputs):
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore", IsthmusWarning)
            own = float(model(**batch).loss)
            assert evaluate(model, [batch]).loss == pytest.approx(own, rel=1e-6, abs=1e-6)
