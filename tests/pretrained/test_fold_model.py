"""Folding of model folders: what is written loads, computes the same, and refuses by name what it cannot hold."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from pretrained_models import randomised, tiny

import isthmus
from isthmus import pretrained
from isthmus.errors import CheckpointError, DataError, ModelError, OutputError, VerificationError
from isthmus.folding import NormFold
from isthmus.pretrained import FoldedModel, LazyState, open_model

transformers = pytest.importorskip("transformers")
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

IDS = torch.arange(10).reshape(2, 5)
PIXELS = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def folded(
    folder: Path, model: Any, inputs: Any, *, rounding: float = 1e-11, **options: Any
) -> tuple[FoldedModel, Any]:
    """Save a network in float64, fold its folder, load the result, and compare the two."""
    model = model.double()
    model.save_pretrained(folder / "source")
    before = {p.name: p.read_bytes() for p in (folder / "source").iterdir()}
    found = pretrained.fold(open_model(folder / "source"), folder / "folded", **options)
    assert before == {p.name: p.read_bytes() for p in (folder / "source").iterdir()}
    assert found.proof.largest <= 1e-10
    assert found.change <= 1e-10
    again = type(model).from_pretrained(folder / "folded", dtype=torch.float64).eval()
    with torch.no_grad():
        one, two = model(**inputs)[0], again(**inputs)[0]
    assert float((one - two).abs().max() / one.abs().max()) < rounding
    return found, again


def why(found: FoldedModel) -> dict[tuple[str, str], str]:
    return {(r.name, r.what): r.why for r in found.plan.refusals}


@pytest.mark.slow
def test_gpt2_with_its_head_untied_and_written_in_shards(tmp_path: Path) -> None:
    found, again = folded(tmp_path, tiny("gpt2"), {"input_ids": IDS}, untie=True, max_shard_size="4KB")
    assert found.untied == ("lm_head.weight",)
    assert len(found.folded_gains) == 3
    assert len(found.folded_biases) == 2
    assert "transformer.wte.weight" in found.centred
    assert len(found.written.shards) > 1
    assert json.loads((tmp_path / "folded" / "config.json").read_text())["tie_word_embeddings"] is False
    assert not torch.equal(again.lm_head.weight, again.transformer.wte.weight)
    assert why(found)["transformer.ln_f", "bias"].endswith("and GPT2LMHeadModel has no place for one")
    assert "untied: lm_head.weight has a tensor of its own" in str(found)
    assert "relative error" in str(found)
    card = (tmp_path / "folded" / "README.md").read_text()
    assert (
        "- transformer.ln\\_f" in card
        or "transformer.ln_f: gain of the LayerNorm into lm_head.weight" in card
    )
    state = LazyState.open(tmp_path / "folded")
    assert all(bool((state[name] == 1).all()) for name in found.folded_gains)
    memory = isthmus.fold(tiny("gpt2").double(), (), {"input_ids": IDS}, untie=True)
    assert all(torch.equal(memory.state[name], state[name]) for name in state)  # one arithmetic


def test_a_tied_head_stays_tied_unless_that_is_asked(tmp_path: Path) -> None:
    found, again = folded(tmp_path, tiny("gpt2"), {"input_ids": IDS})
    assert not found.untied
    assert again.lm_head.weight is again.transformer.wte.weight
    assert "untie=True gives lm_head.weight a tensor of its own" in why(found)["transformer.ln_f", "gain"]
    source, target = (LazyState.open(tmp_path / name) for name in ("source", "folded"))
    assert list(source) == list(target)
    assert (tmp_path / "source" / "config.json").read_text() == (
        tmp_path / "folded" / "config.json"
    ).read_text()


@pytest.mark.slow
@pytest.mark.parametrize("tied", [False, True])
def test_llama(tmp_path: Path, tied: bool) -> None:
    model = tiny("llama", tie_word_embeddings=tied)
    found, _ = folded(tmp_path, model, {"input_ids": IDS}, untie=tied)
    assert len(found.folded_gains) == 3
    assert not found.plan.refusals
    assert found.untied == (("lm_head.weight",) if tied else ())


@pytest.mark.slow
def test_bert_and_vit(tmp_path: Path) -> None:
    found, _ = folded(tmp_path / "bert", tiny("bert"), {"input_ids": IDS})
    stays = why(found)["bert.encoder.layer.0.attention.output.LayerNorm", "gain"]
    assert "the residual stream goes on after the norm" in stays
    assert len(found.centred) == 3
    found, _ = folded(tmp_path / "vit", tiny("vit"), {"pixel_values": PIXELS})
    assert not found.plan.refusals
    assert "vit.embeddings.cls_token" in found.centred


@pytest.mark.slow
def test_a_masked_language_model_unties_weight_and_bias(tmp_path: Path) -> None:
    config = transformers.BertConfig(
        vocab_size=23, hidden_size=12, intermediate_size=10, num_hidden_layers=1, num_attention_heads=3
    )
    model = randomised(transformers.BertForMaskedLM(config), 0).eval()
    found, _ = folded(tmp_path, model, {"input_ids": IDS}, untie=True)
    assert found.untied == ("cls.predictions.decoder.weight", "cls.predictions.decoder.bias")
    assert "cls.predictions.transform.LayerNorm.bias" in found.folded_biases


@pytest.mark.slow
def test_gains_that_are_added_to_one(tmp_path: Path) -> None:
    sizes = {"hidden_size": 12, "intermediate_size": 10, "num_hidden_layers": 1, "num_attention_heads": 3}
    config = transformers.GemmaConfig(vocab_size=23, num_key_value_heads=3, head_dim=4, **sizes)
    model = randomised(transformers.GemmaForCausalLM(config), 0).eval()
    # it casts gains and inner values to float32, which the proof does not
    found, again = folded(tmp_path, model, {"input_ids": IDS}, untie=True, rounding=1e-6)
    assert found.folded_gains[-1] == "model.norm.weight"
    assert bool((again.model.norm.weight == 0).all())


@pytest.mark.slow
def test_low_precision_stays(tmp_path: Path) -> None:
    tiny("llama", dtype=torch.bfloat16).save_pretrained(tmp_path / "source")
    found = pretrained.fold(open_model(tmp_path / "source"), tmp_path / "folded")
    assert found.proof.largest <= 1e-10
    assert 0 < found.change < 0.1
    state = LazyState.open(tmp_path / "folded")
    assert {state.stored(name).dtype for name in state} == {torch.bfloat16}


@pytest.mark.slow
def test_a_class_that_always_ties_is_refused_by_name(tmp_path: Path) -> None:
    config = transformers.T5Config(
        vocab_size=23, d_model=12, d_kv=4, d_ff=10, num_layers=1, num_heads=3, decoder_start_token_id=0
    )
    randomised(transformers.T5ForConditionalGeneration(config), 0).save_pretrained(tmp_path / "t5")
    with pytest.raises(
        ModelError, match=r"T5ForConditionalGeneration ties its head whatever config\.json says"
    ):
        pretrained.fold(open_model(tmp_path / "t5"), tmp_path / "folded", untie=True)
    assert not (tmp_path / "folded").exists()
    found = pretrained.fold(open_model(tmp_path / "t5"), tmp_path / "folded")
    assert len(found.folded_gains) > 2


def test_bad_use_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny("llama").save_pretrained(tmp_path / "source")
    opened, out = open_model(tmp_path / "source"), tmp_path / "out"
    with pytest.raises(OutputError, match="it is there already"):
        pretrained.fold(opened, tmp_path / "source")
    with pytest.raises(DataError, match="Shard size"):
        pretrained.fold(opened, out, max_shard_size="many")
    with pytest.raises(DataError, match="expected some of batch-norms"):
        pretrained.fold(opened, out, parts=("everything",))
    with monkeypatch.context() as patched:
        patched.setattr("isthmus.pretrained._fold.open_model", lambda *a, **k: open_model(tmp_path / "other"))
        tiny("gpt2").save_pretrained(tmp_path / "other")
        with pytest.raises(OutputError, match="transformers would not find"):
            pretrained.fold(opened, out)
    whole = NormFold.gain_steps
    monkeypatch.setattr(NormFold, "gain_steps", lambda self: list(whole(self))[1:])
    with pytest.raises(VerificationError, match="folding changes the function: relative error"):
        pretrained.fold(opened, out)
    monkeypatch.undo()
    broken = tiny("llama")
    with torch.no_grad():
        broken.lm_head.weight[0, 0] = float("nan")
    broken.save_pretrained(tmp_path / "broken")
    with pytest.raises(CheckpointError, match="NaN"):
        pretrained.fold(open_model(tmp_path / "broken"), out)
    assert not out.exists()
    assert not list(tmp_path.glob(".out*"))


@pytest.mark.parametrize("turned", [False, True])
def test_folders_of_which_one_ties_its_head_are_not_joined(tmp_path: Path, turned: bool) -> None:
    """The head that one of them has of its own would be lost."""
    tiny("gpt2").save_pretrained(tmp_path / "tied")
    tiny("gpt2", 1).save_pretrained(tmp_path / "b")
    pretrained.fold(open_model(tmp_path / "b"), tmp_path / "apart", untie=True)
    pair = [open_model(tmp_path / name) for name in ("tied", "apart")][:: -1 if turned else 1]
    said = "tied has one tensor for .*lm_head.weight.*, and .*apart one for each: no network"
    with pytest.raises(CheckpointError, match=said):
        pretrained.merge(pair, tmp_path / "out")
    with pytest.raises(CheckpointError, match=said):
        pretrained.align(*pair)
    assert not (tmp_path / "out").exists()
