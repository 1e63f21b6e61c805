"""Model folders on the command line, from their symmetries to a merged folder that ``from_pretrained`` loads."""

from __future__ import annotations

import importlib
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from isthmus import Alignment, merge
from isthmus.checkpoints import load_state, save_state
from isthmus.errors import DataError
from isthmus.pretrained import open_model
from isthmus.symmetry import SymmetrySpec

transformers = pytest.importorskip("transformers")
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

Cli = Callable[..., "object"]

BATCHES = """
import torch

def batches():
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 19, (24, 5), generator=generator)
    return [{"input_ids": ids[:12], "labels": ids[:12, 0] % 3}, {"input_ids": ids[12:], "labels": ids[12:, 0] % 3}]
"""


NETWORK = """
import torch
from torch import nn

def build():
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
"""


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    for seed, name in enumerate("ab"):
        torch.manual_seed(seed)
        config = transformers.BertConfig(
            vocab_size=19,
            hidden_size=8,
            intermediate_size=6,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=8,
            num_labels=3,
        )
        model = transformers.BertForSequenceClassification(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.2 * torch.randn(parameter.shape)
        model.save_pretrained(root / name)
    return root


@pytest.fixture
def models(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in "ab":
        shutil.copytree(saved / name, tmp_path / name)
    (tmp_path / "mydata.py").write_text(BATCHES, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    sys.modules.pop("mydata", None)
    return tmp_path


def test_symmetry_of_a_folder(isthmus: Cli, models: Path) -> None:
    result = isthmus("symmetry", "a", "--json", "--save", "spec.json")
    assert result.code == 0, result.err
    assert result.json["verification"]["passed"]
    assert result.json["outputs"] == ["logits"]
    assert 6 in [g["size"] for g in result.json["groups"]]
    assert SymmetrySpec.from_json((models / "spec.json").read_text()).groups


def test_align_and_merge_folders(isthmus: Cli, models: Path) -> None:
    aligned = isthmus(
        "align", "a", "b", "--out", "ab.safetensors", "--apply", "b2", "--max-shard-size", "1KB", "--json"
    )
    assert aligned.code == 0, aligned.err
    assert aligned.json["method"] == "weights"
    assert aligned.json["verification_error"] < 1e-12
    assert len(list((models / "b2").glob("model-*.safetensors"))) > 1
    merged = isthmus("merge", "a", "b", "--method", "weights", "--weight", "0.25", "--out", "m", "--json")
    assert merged.code == 0, merged.err
    assert merged.json["tensors"] == len(open_model("a").file)
    alignment = Alignment.load("ab.safetensors")
    expected = merge([open_model("a").load(), alignment.apply(open_model("b").load())], [3, 1])
    found = transformers.BertForSequenceClassification.from_pretrained("m").state_dict()
    assert all(torch.equal(found[n], v) for n, v in expected.items())
    assert "tags:\n- merge" in (models / "m" / "README.md").read_text()
    assert (models / "m" / "isthmus" / "alignment.safetensors").exists()


def test_methods_that_run_the_networks(isthmus: Cli, models: Path) -> None:
    aligned = isthmus(
        "align",
        "a",
        "b",
        "--method",
        "activations",
        "--data",
        "mydata:batches",
        "--out",
        "ab.safetensors",
        "--json",
    )
    assert aligned.code == 0, aligned.err
    assert aligned.json["verification_error"] < 1e-10
    line = isthmus("line", "a", "b", "--data", "mydata:batches", "--alignment", "ab.safetensors", "--points", "3",
                   "--out", "line", "--json")  # fmt: skip
    assert line.code == 0, line.err
    assert len(line.json["curves"]["data"]["loss"]) == 3


@pytest.mark.slow
def test_folders_are_aligned_and_merged_by_larger_classes(isthmus: Cli, models: Path) -> None:
    aligned = isthmus("align", "a", "b", "--symmetry", "all", "--out", "ab.safetensors", "--json")
    assert aligned.code == 0, aligned.err
    assert aligned.json["kinds"]["Linear"] == 4  # queries and keys, values and outputs of two heads
    assert aligned.json["verification_error"] < 1e-10
    merged = isthmus("merge", "a", "b", "--alignment", "ab.safetensors", "--out", "m", "--json")
    assert merged.code == 0, merged.err
    alignment = Alignment.load("ab.safetensors")
    expected = merge([open_model("a").load(), alignment.apply(open_model("b").load())], [1, 1])
    found = transformers.BertForSequenceClassification.from_pretrained("m").state_dict()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6)
    for more in ((), ("--alignment", "ab.safetensors"), ("--method", "none")):
        refused = isthmus("merge", "a", "b", "--symmetry", "all", *more, "--out", "n")
        assert refused.code == 2
        assert "--symmetry says what a method may do when it aligns now, and none does" in refused.err


def test_adapters_are_merged(isthmus: Cli, models: Path) -> None:
    for seed, name in enumerate(("x", "y")):
        generator = torch.Generator().manual_seed(seed)
        (models / name).mkdir()
        config = {
            "peft_type": "LORA",
            "r": 2,
            "lora_alpha": 4,
            "target_modules": ["q"],
            "base_model_name_or_path": "a",
        }
        (models / name / "adapter_config.json").write_text(json.dumps(config))
        factors = {"base_model.model.q.lora_A.weight": (2, 5), "base_model.model.q.lora_B.weight": (4, 2)}
        drawn = {k: torch.randn(s, generator=generator) for k, s in factors.items()}
        save_state(models / name / "adapter_model.safetensors", drawn)
    found = {
        way: isthmus("merge", "x", "y", "--out", f"m-{way}", *more, "--json")
        for way, more in (
            ("svd", ()),
            ("aligned", ("--method", "weights")),
            ("as they are", ("--method", "none")),
        )
    }
    assert {way: (f.code, f.json["way"], f.json["tensors"]) for way, f in found.items()} == {
        way: (0, way, 2) for way in found
    }
    assert found["svd"].json["errors"]["svd"] <= found["svd"].json["errors"]["aligned"]
    assert len(load_state("m-svd/adapter_model.safetensors")) == 2
    refused = isthmus("merge", "x", "y", "--out", "n", "--method", "covariance")
    assert refused.code == 2
    assert "--method covariance: adapters are averaged from their files alone" in refused.err
    assert "no network" not in isthmus("merge", "x", "y", "--out", "n", "--model", "a").out


def test_plain_merge(isthmus: Cli, models: Path) -> None:
    merged = isthmus("merge", "a", "b", "--out", "m")
    assert merged.code == 0, merged.err
    assert "without alignment" in merged.out
    assert not (models / "m" / "isthmus").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["align", "a", "none", "--out", "x.safetensors"], "none: no such file or folder"),
        (["merge", "a", "b", "--out", "b"], "Cannot write b: it is the input b"),
        (["merge", "a", "b", "--out", "a/inside"], "it is inside the input a"),
        (["merge", "a", "b", "--out", "taken"], "it is there already"),
        (["merge", "a", "b", "--out", "m", "--max-shard-size", "much"], "Shard size"),
        (
            ["merge", "a", "b", "--out", "m", "--refresh", "batchnorm", "--data", "mydata:batches"],
            "these networks have no BatchNorm that keeps any",
        ),
        (
            ["merge", "a", "b", "--out", "m", "--refresh", "batchnorm"],
            "--refresh batchnorm runs the network: give",
        ),
        (["merge", "a", "b", "--out", "m", "--repair", "repair"], "repair='repair' needs batches"),
        (
            ["merge", "a", "b", "--out", "m", "--repair", "glue"],
            "Unknown repair 'glue': expected one of none, batchnorm",
        ),
        (["align", "a", "b", "--out", "x.safetensors", "--method", "covariance"], "compares activations"),
    ],
)
def test_bad_use(isthmus: Cli, models: Path, arguments: list[str], message: str) -> None:
    (models / "taken").mkdir()
    (models / "taken" / "mine").touch()
    result = isthmus(*arguments)
    assert result.code == 2
    assert message in result.err
    assert not (models / "m").exists()


def test_a_folder_is_a_target_for_other_checkpoints(isthmus: Cli, models: Path) -> None:
    (models / "b.safetensors").write_bytes((models / "b" / "model.safetensors").read_bytes())
    arguments = ["a", "b.safetensors", "--model", "a", "--method", "weights"]
    merged = isthmus("merge", *arguments, "--out", "m.safetensors", "--json")
    assert merged.code == 0, merged.err
    folders = isthmus("merge", "a", "b", "--method", "weights", "--out", "m", "--json")
    assert folders.code == 0, folders.err
    found, expected = load_state("m.safetensors"), load_state("m/model.safetensors")
    assert found.keys() == expected.keys()
    assert all(torch.allclose(found[n], v, rtol=0, atol=1e-6) for n, v in expected.items())


def test_folders_of_shards_are_checkpoints_of_a_network_in_code(isthmus: Cli, models: Path) -> None:
    (models / "mynet.py").write_text(NETWORK, encoding="utf-8")
    sys.modules.pop("mynet", None)
    network = importlib.import_module("mynet").build()
    for name in "cd":
        torch.nn.init.normal_(network[0].weight)
        tensors = network.state_dict()
        (models / name).mkdir()
        save_state(
            models / name / "one.safetensors", {"0.weight": tensors["0.weight"], "0.bias": tensors["0.bias"]}
        )
        save_state(
            models / name / "two.safetensors", {"2.weight": tensors["2.weight"], "2.bias": tensors["2.bias"]}
        )
        places = {k: f"{'one' if k[0] == '0' else 'two'}.safetensors" for k in tensors}
        index = models / name / "model.safetensors.index.json"
        index.write_text(json.dumps({"weight_map": places}), encoding="utf-8")
    merged = isthmus("merge", "c", "d", "--model", "mynet:build", "--out", "m.safetensors", "--json")
    assert merged.code == 0, merged.err
    c, d = (load_state(models / name / "one.safetensors")["0.weight"] for name in "cd")
    assert torch.allclose(load_state("m.safetensors")["0.weight"], (c + d) / 2)


def test_tensors_that_are_not_used_are_named(isthmus: Cli, models: Path) -> None:
    state = load_state(models / "a" / "model.safetensors")
    save_state(models / "a" / "model.safetensors", state | {"cls.old": torch.ones(2)}, {"format": "pt"})
    plain = isthmus("merge", "a", "b", "--out", "m")
    assert "1 tensors are not used by the architecture in config.json" in plain.out
    assert "cls.old" in plain.out
    aligned = isthmus("align", "b", "a", "--out", "ba.safetensors", "--apply", "a2", "--json")
    assert aligned.json["unused"] == ["cls.old"]


def test_outputs_are_checked_before_the_work(
    isthmus: Cli, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise AssertionError("began to work")

    monkeypatch.setattr("isthmus.pretrained.open_model", fail)
    monkeypatch.setattr("isthmus.cli._folders.open_model", fail)
    (models / "taken").mkdir()
    (models / "taken" / "mine").touch()
    for arguments in (
        ["align", "a", "b", "--out", "x.safetensors", "--apply", "taken"],
        ["merge", "a", "b", "--method", "weights", "--out", "taken"],
    ):
        result = isthmus(*arguments)
        assert result.code == 2
        assert "it is there already" in result.err
    result = isthmus("merge", "a", "b", "--out", "m", "--max-shard-size", "much")
    assert "Shard size" in result.err


def test_an_example_of_ones_own(isthmus: Cli, models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Networks for whose task no example is known: a shape for symmetry, the data for the others."""

    def unknown(model: object) -> object:
        raise DataError("No example inputs are known for this network.")

    monkeypatch.setattr("isthmus.pretrained._transformers.example_for", unknown)
    result = isthmus("symmetry", "a")
    assert result.code == 2
    assert "No example inputs are known" in result.err
    result = isthmus("align", "a", "b", "--out", "x.safetensors")
    assert "give --data (or, for symmetry, --shape)" in result.err
    done = isthmus("align", "a", "b", "--out", "x.safetensors", "--data", "mydata:batches", "--json")
    assert done.code == 0, done.err
    seen = []
    monkeypatch.setattr(
        "isthmus.pretrained.open_model",
        lambda *_, example, **__: seen.append(example) or fail_with_data_error(),
    )
    isthmus("symmetry", "a", "--shape", "2,3")
    assert [tuple(t.shape) for t in seen[0].args] == [(2, 3)]


def fail_with_data_error() -> None:
    raise DataError("enough seen")


def test_remote_code_is_refused(isthmus: Cli, models: Path) -> None:
    path = models / "a" / "config.json"
    config = json.loads(path.read_text()) | {
        "architectures": ["Mine"],
        "auto_map": {"AutoModel": "mine.Mine"},
    }
    path.write_text(json.dumps(config), encoding="utf-8")
    result = isthmus("symmetry", "a")
    assert result.code == 2
    assert "--trust-remote-code" in result.err


def test_a_label_that_does_not_count_leaves_the_networks_own_loss_alone(isthmus: Cli, models: Path) -> None:
    pair = ("a", "b", "--data", "mydata:batches", "--points", "2")
    refused = isthmus("line", *pair, "--out", "line", "--ignore-index", "2")
    assert refused.code == 2
    assert "BertForSequenceClassification is scored by its own loss" in " ".join(refused.err.split())
    said = isthmus("line", *pair, "--out", "line", "--ignore-index", "2", "--loss", "cross_entropy", "--json")
    assert said.code == 0, said.err
    assert said.json["settings"]["loss"] == "cross_entropy(ignore_index=2)"


TIED = """
import torch
from transformers import GPT2Config, GPT2LMHeadModel

def build():
    return GPT2LMHeadModel(GPT2Config(vocab_size=9, n_positions=6, n_embd=4, n_layer=1, n_head=2))

def batches():
    return [{"input_ids": torch.arange(8).reshape(2, 4)}]
"""


def test_tied_weights_fit_the_network_built_in_code(isthmus: Cli, models: Path) -> None:
    (models / "tied_gpt.py").write_text(TIED, encoding="utf-8")
    build = importlib.import_module("tied_gpt").build
    for name in ("g", "h"):
        build().save_pretrained(models / name)
    options = ("--model", "tied_gpt:build", "--data", "tied_gpt:batches", "--method", "weights")
    for pair in (("g", "h"), ("g/model.safetensors", "h/model.safetensors")):
        result = isthmus("align", *pair, *options, "--out", f"{Path(pair[0]).stem}.safetensors")
        assert result.code == 0, result.err
        assert "'lm_head.weight' is not in the file" in " ".join(result.err.split())
