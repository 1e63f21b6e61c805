"""Opening model folders: the network, its names, its example inputs; and what is refused."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from pretrained_models import KINDS, logits, randomised, save, tiny
from safetensors.torch import load_file, save_file

from isthmus.errors import CheckpointError, DataError, MissingExtraError, ModelError
from isthmus.pretrained import is_model_folder, open_model


def edit_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    config.update(changes)
    config = {k: v for k, v in config.items() if v is not None}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")


@pytest.mark.parametrize("kind", KINDS)
def test_the_state_is_that_of_from_pretrained(pair_of: Callable[..., Any], kind: str) -> None:
    opened = pair_of(kind).b
    assert all(t.is_meta for t in opened.model.state_dict().values())
    assert not opened.model.training
    loaded = type(opened.model).from_pretrained(opened.path)
    expected = loaded.state_dict()
    assert set(opened.state) == set(expected)
    assert all(torch.equal(opened.state[name], value) for name, value in expected.items())
    assert torch.equal(logits(opened.load(), opened.example.kwargs), logits(loaded, opened.example.kwargs))


def test_tied_names_share_a_stored_tensor(pair_of: Callable[..., Any]) -> None:
    opened = pair_of("gpt2").a
    assert opened.state.stored("lm_head.weight") == opened.state.stored("transformer.wte.weight")
    assert opened.names["transformer.wte.weight"] == ("transformer.wte.weight", "lm_head.weight")
    loaded = opened.load()
    assert loaded.lm_head.weight is loaded.transformer.wte.weight
    assert opened.state.nbytes == opened.file.nbytes


def test_buffers_that_are_not_stored_have_values(pair_of: Callable[..., Any]) -> None:
    opened = pair_of("llama").a
    name = next(n for n in opened.buffers if n.endswith("inv_freq"))
    assert torch.equal(opened.buffers[name], tiny("llama").get_buffer(name))


@pytest.mark.parametrize(("dtype", "name"), [(torch.bfloat16, "bfloat16"), (torch.float16, "float16")])
def test_dtypes_are_kept(tmp_path: Path, dtype: torch.dtype, name: str) -> None:
    opened = open_model(save(tiny("bert", dtype=dtype), tmp_path / "m"))
    assert {opened.state[n].dtype for n in opened.state} == {dtype}
    assert next(opened.load().parameters()).dtype == dtype


def test_names_without_the_base_prefix(tmp_path: Path) -> None:
    """Weights of the bare encoder, as a network with a head reads them, and the other way round."""
    with_head, bare = save(tiny("bert"), tmp_path / "head"), save(tiny("bert").bert, tmp_path / "bare")
    expected = load_file(with_head / "model.safetensors")
    head = {k: v for k, v in expected.items() if not k.startswith("bert.")}
    save_file(load_file(bare / "model.safetensors") | head, bare / "model.safetensors")
    edit_config(bare, architectures=["BertForSequenceClassification"])
    opened = open_model(bare)
    assert opened.state.stored("bert.pooler.dense.weight").key == "pooler.dense.weight"
    assert all(torch.equal(opened.state[n], v) for n, v in expected.items())
    edit_config(with_head, architectures=["BertModel"])
    opened = open_model(with_head)
    assert opened.state.stored("pooler.dense.weight").key == "bert.pooler.dense.weight"
    assert opened.names["classifier.weight"] == ()


def test_old_names_of_gains(tmp_path: Path) -> None:
    folder = save(tiny("bert"), tmp_path / "m")
    tensors = load_file(folder / "model.safetensors")
    old = {k.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): v
           for k, v in tensors.items()}  # fmt: skip
    assert old.keys() != tensors.keys()
    save_file(old, folder / "model.safetensors")
    opened = open_model(folder)
    assert all(torch.equal(opened.state[n], v) for n, v in tensors.items())


def test_buffers_of_old_checkpoints_are_no_part_of_the_network(tmp_path: Path) -> None:
    folder = save(tiny("bert"), tmp_path / "m")
    tensors = load_file(folder / "model.safetensors")
    save_file({**tensors, "bert.embeddings.old_ids": torch.arange(4)}, folder / "model.safetensors")
    opened = open_model(folder)
    assert "bert.embeddings.old_ids" not in opened.state
    assert torch.equal(opened.file["bert.embeddings.old_ids"], torch.arange(4))


def test_tied_tensors_stored_twice(tmp_path: Path) -> None:
    folder = save(tiny("gpt2"), tmp_path / "m")
    tensors = load_file(folder / "model.safetensors")
    twin = tensors["transformer.wte.weight"].clone()
    save_file({**tensors, "lm_head.weight": twin}, folder / "model.safetensors")
    opened = open_model(folder)
    assert opened.state.stored("lm_head.weight").key == "lm_head.weight"
    save_file({**tensors, "lm_head.weight": twin + 1}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match="are one tensor in the network, but differ in the file"):
        open_model(folder)


@pytest.mark.parametrize("kind", ["t5", "clip", "wav2vec2", "whisper", "gpt2-classifier", "resnet"])
def test_example_inputs_run_the_network(tmp_path: Path, kind: str) -> None:
    model = {"t5": t5, "clip": clip, "wav2vec2": wav2vec2, "whisper": whisper, "gpt2-classifier": classifier,
             "resnet": resnet}[kind]()  # fmt: skip
    folder = tmp_path / "m"
    randomised(model, 0).eval().save_pretrained(folder)
    opened = open_model(folder)
    with torch.no_grad():
        expected, found = model(**opened.example.kwargs), opened.load()(**opened.example.kwargs)
    key = "logits_per_image" if kind == "clip" else "logits" if "logits" in expected else "last_hidden_state"
    assert torch.equal(expected[key], found[key])
    assert bool(expected[key].isfinite().all())


def t5() -> Any:
    sizes = {"d_model": 8, "d_kv": 4, "d_ff": 12, "num_layers": 1, "num_heads": 2}
    return transformers.T5ForConditionalGeneration(
        transformers.T5Config(vocab_size=19, decoder_start_token_id=0, **sizes)
    )


def clip() -> Any:
    small = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2}
    return transformers.CLIPModel(
        transformers.CLIPConfig(
            text_config={**small, "vocab_size": 19, "eos_token_id": 18, "max_position_embeddings": 16},
            vision_config={**small, "image_size": 8, "patch_size": 4},
            projection_dim=6,
        )
    )


def wav2vec2() -> Any:
    small = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2}
    convolutions = {
        "conv_dim": (8, 8),
        "conv_kernel": (10, 8),
        "conv_stride": (8, 8),
        "num_feat_extract_layers": 2,
    }
    return transformers.Wav2Vec2Model(
        transformers.Wav2Vec2Config(
            **small, **convolutions, num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2, vocab_size=5
        )
    )


def whisper() -> Any:
    sizes = {
        "d_model": 8,
        "encoder_layers": 1,
        "decoder_layers": 1,
        "encoder_ffn_dim": 12,
        "decoder_ffn_dim": 12,
    }
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    lengths = {"max_source_positions": 12, "max_target_positions": 16, "num_mel_bins": 5, "vocab_size": 19}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1, "decoder_start_token_id": 1}
    return transformers.WhisperForConditionalGeneration(
        transformers.WhisperConfig(**sizes, **heads, **lengths, **tokens)
    )


def classifier() -> Any:
    return transformers.GPT2ForSequenceClassification(
        transformers.GPT2Config(vocab_size=19, n_embd=8, n_layer=1, n_head=2, n_positions=16, num_labels=3)
    )


def resnet() -> Any:
    return transformers.ResNetForImageClassification(
        transformers.ResNetConfig(embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], layer_type="basic")
    )


def test_inputs_of_another_kind_must_be_given(tmp_path: Path) -> None:
    class Odd(transformers.BertModel):
        main_input_name = "points"

    from isthmus.pretrained._examples import example_for

    with pytest.raises(DataError, match="No example inputs are known for Odd, which reads 'points'"):
        example_for(Odd(tiny("bert").config))


def test_a_given_example_is_used(tmp_path: Path) -> None:
    example = {"input_ids": torch.tensor([[3, 4, 5]])}
    opened = open_model(save(tiny("bert"), tmp_path / "m"), example=example)
    assert torch.equal(opened.example.kwargs["input_ids"], example["input_ids"])


def test_no_folder(tmp_path: Path) -> None:
    assert not is_model_folder(tmp_path)
    with pytest.raises(CheckpointError, match="no such folder"):
        open_model(tmp_path / "none")
    with pytest.raises(CheckpointError, match=r"has no config.json"):
        open_model(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"), [("{", "cannot be read as JSON"), ("[]", "expected a JSON object")]
)
def test_a_damaged_config(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "config.json").write_text(text, encoding="utf-8")
    assert is_model_folder(tmp_path)
    with pytest.raises(CheckpointError, match=message):
        open_model(tmp_path)


def test_a_config_without_architectures(tmp_path: Path) -> None:
    folder = save(tiny("bert"), tmp_path / "m")
    edit_config(folder, architectures=None)
    with pytest.raises(CheckpointError, match="names no architectures"):
        open_model(folder)
    opened = open_model(folder, architecture="BertForSequenceClassification")
    assert type(opened.model).__name__ == "BertForSequenceClassification"


def test_an_unknown_architecture(tmp_path: Path) -> None:
    folder = save(tiny("bert"), tmp_path / "m")
    edit_config(folder, architectures=["BertForTelepathy"])
    with pytest.raises(ModelError, match="transformers has no architecture 'BertForTelepathy'"):
        open_model(folder)


@pytest.mark.parametrize(
    "name", ["Trainer", "AutoModelForCausalLM", "pipeline", "__name__", "PreTrainedModel"]
)
def test_what_is_no_network_is_no_architecture(tmp_path: Path, name: str) -> None:
    folder = save(tiny("bert"), tmp_path / "m")
    edit_config(folder, architectures=[name])
    with pytest.raises(ModelError, match=f"transformers has no architecture '{name}'"):
        open_model(folder)


@pytest.mark.parametrize("kernel", ["somebody/kernel", "flash_attention_2"])
@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation"])
def test_kernels_named_in_the_config_are_neither_fetched_nor_needed(
    tmp_path: Path, kernel: str, key: str
) -> None:
    """``owner/name`` would be code from the hub, run without being asked for."""
    folder = save(tiny("llama"), tmp_path / "m")
    edit_config(folder, **{key: kernel})
    assert open_model(folder).model.config._attn_implementation == "sdpa"


def test_kernels_of_the_parts_of_a_config(tmp_path: Path) -> None:
    folder = tmp_path / "m"
    randomised(clip(), 0).eval().save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    for part in ("text_config", "vision_config"):
        config[part]["attn_implementation"] = "somebody/kernel"
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    assert open_model(folder).model.config.text_config._attn_implementation != "somebody/kernel"


def test_outputs_have_names_even_if_the_config_asks_for_tuples(tmp_path: Path) -> None:
    folder = save(tiny("bert"), tmp_path / "m")
    edit_config(folder, return_dict=False)
    assert open_model(folder).discover().outputs == ("logits",)


def test_weights_of_another_architecture(tmp_path: Path) -> None:
    folder, other = save(tiny("bert"), tmp_path / "m"), save(tiny("gpt2"), tmp_path / "other")
    (folder / "config.json").write_bytes((other / "config.json").read_bytes())
    with pytest.raises(
        CheckpointError, match=r"the weights lack .* of GPT2LMHeadModel\. They belong to another"
    ):
        open_model(folder)


def test_a_configuration_that_cannot_be_built(tmp_path: Path) -> None:
    folder = save(tiny("bert"), tmp_path / "m")
    edit_config(folder, num_attention_heads=5)
    with pytest.raises(ModelError, match=r"building BertForSequenceClassification from config\.json failed"):
        open_model(folder)


def test_quantised_weights_are_refused(tmp_path: Path) -> None:
    folder = save(tiny("bert"), tmp_path / "m")
    edit_config(folder, quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})
    with pytest.raises(ModelError, match="holds quantised weights"):
        open_model(folder)


def test_missing_weights(tmp_path: Path) -> None:
    folder = save(tiny("bert"), tmp_path / "m")
    tensors = load_file(folder / "model.safetensors")
    del tensors["bert.pooler.dense.bias"]
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"the weights lack 'bert.pooler.dense.bias'"):
        open_model(folder)


def test_weights_of_another_size(tmp_path: Path) -> None:
    folder = save(tiny("bert"), tmp_path / "m")
    edit_config(folder, intermediate_size=11)
    with pytest.raises(CheckpointError, match="Weights and configuration do not match"):
        open_model(folder)


def test_without_transformers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save(tiny("bert"), tmp_path / "m")
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(MissingExtraError, match=r"isthmus\[hf\]"):
        open_model(folder)


CODE = """
from pathlib import Path

import torch
from transformers import PretrainedConfig, PreTrainedModel

(Path("{marker}")).write_text("ran")


class OddConfig(PretrainedConfig):
    model_type = "odd"

    def __init__(self, width=5, **kwargs):
        super().__init__(**kwargs)
        self.width = width


class OddModel(PreTrainedModel):
    config_class = OddConfig
    main_input_name = "input_values"

    def __init__(self, config):
        super().__init__(config)
        self.first = torch.nn.Linear(4, config.width)
        self.last = torch.nn.Linear(config.width, 2)
        self.post_init()

    def forward(self, input_values):
        return self.last(torch.tanh(self.first(input_values)))
"""


@pytest.fixture
def remote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """A folder whose network is defined by code in it, and the file that this code writes when it runs."""
    folder, marker = tmp_path / "odd", tmp_path / "marker"
    folder.mkdir()
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    (folder / "modeling_odd.py").write_text(CODE.replace("{marker}", str(marker)), encoding="utf-8")
    auto = {"AutoConfig": "modeling_odd.OddConfig", "AutoModel": "modeling_odd.OddModel"}
    config = {"model_type": "odd", "architectures": ["OddModel"], "auto_map": auto, "width": 5}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    tensors = {"first.weight": (5, 4), "first.bias": (5,), "last.weight": (2, 5), "last.bias": (2,)}
    save_file({k: torch.randn(v) for k, v in tensors.items()}, folder / "model.safetensors", {"format": "pt"})
    return folder, marker


def test_remote_code_is_refused(remote: tuple[Path, Path]) -> None:
    folder, marker = remote
    with pytest.raises(ModelError, match=r"refused, because OddModel is defined by code in the checkpoint"):
        open_model(folder)
    assert not marker.exists()


def test_remote_code_runs_when_asked_for(remote: tuple[Path, Path]) -> None:
    folder, marker = remote
    opened = open_model(folder, trust_remote_code=True, example=torch.zeros(2, 4))
    assert marker.exists()
    assert [g.size for g in opened.discover().groups.values()] == [5]


def test_remote_code_without_a_place_for_the_class(remote: tuple[Path, Path]) -> None:
    folder, _ = remote
    edit_config(folder, architectures=["OtherModel"])
    with pytest.raises(
        ModelError, match=r"auto_map of config\.json does not say where 'OtherModel' is defined"
    ):
        open_model(folder, trust_remote_code=True)
