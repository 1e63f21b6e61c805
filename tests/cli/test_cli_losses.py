"""Losses, ignored labels and limits on the command line, with data of the user's own."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from isthmus.checkpoints import save_state
from isthmus.connectivity import interpolate

Cli = Callable[..., Any]

OWN = """
import torch
from torch import nn

class Tagger(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(11, 6), nn.Linear(6, 3)

    def forward(self, tokens):
        return self.head(self.embed(tokens).relu())

def build():
    torch.manual_seed(0)
    return Tagger(), torch.zeros(2, 5, dtype=torch.int64)

def text(ignored=255):
    generator = torch.Generator().manual_seed(0)
    data = []
    for size, length in ((7, 6), (3, 9)):
        tokens = torch.randint(11, (size, length), generator=generator)
        labels = torch.randint(3, (size, length), generator=generator)
        labels[:, 4:] = ignored
        labels[0] = ignored
        data.append((tokens, labels))
    return data

def padded():
    return text(-100)

def endless():
    generator = torch.Generator().manual_seed(0)
    while True:
        yield torch.randint(11, (5, 4), generator=generator), torch.randint(3, (5, 4), generator=generator)

def tokens():
    ids = torch.randint(3, 40, (10, 9), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[4:, 6:] = -100
    return [{"input_ids": ids[:7], "labels": labels[:7]}, {"input_ids": ids[7:], "labels": labels[7:]}]
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The user's module, two checkpoints of whose network lie in the folder."""
    (tmp_path / "tagger.py").write_text(OWN, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "tagger", raising=False)
    import tagger  # type: ignore[import-not-found]

    for seed, name in enumerate("ab"):
        torch.manual_seed(seed)
        save_state(tmp_path / f"{name}.safetensors", tagger.Tagger().state_dict())
    yield tagger
    sys.modules.pop("tagger", None)


def networks(tagger: Any) -> list[Any]:
    found = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        found.append(tagger.Tagger().eval())
    return found


def wanted(tagger: Any, data: Any, ignored: int) -> list[float]:
    """Losses of A, of the midpoint and of B over all labels that count."""
    a, b = networks(tagger)
    middle = tagger.Tagger()
    middle.load_state_dict(interpolate(a, b, 0.5))
    with torch.no_grad():
        return [
            float(
                F.cross_entropy(
                    torch.cat([net(x).flatten(0, 1) for x, _ in data]),
                    torch.cat([y.flatten() for _, y in data]),
                    ignore_index=ignored,
                )
            )
            for net in (a, middle, b)
        ]


PAIR = (
    "a.safetensors",
    "b.safetensors",
    "--model",
    "tagger:build",
    "--points",
    "3",
    "--out",
    "line",
    "--json",
)


@pytest.mark.parametrize(
    ("function", "options", "ignored"),
    [
        ("padded", (), -100),
        ("text", ("--ignore-index", "255"), 255),
        ("text", ("--loss", "cross_entropy", "--ignore-index", "255"), 255),
        ("text", ("--loss", "cross_entropy(ignore_index=255)"), 255),
    ],
)
def test_ignored_labels(
    isthmus: Cli, own: Any, function: str, options: tuple[str, ...], ignored: int
) -> None:
    result = isthmus("line", *PAIR, "--data", f"tagger:{function}", *options)
    assert result.code == 0, result.err
    found = result.json["curves"]["data"]
    assert found["loss"] == pytest.approx(wanted(own, own.text(ignored), ignored), rel=1e-6)
    assert found["examples"] == 10


def test_the_way_out_is_named(isthmus: Cli, own: Any) -> None:
    result = isthmus("line", *PAIR, "--data", "tagger:text")
    assert result.code == 2
    said = " ".join(result.err.split())
    assert 'loss="cross_entropy(ignore_index=255)" (on the command line --ignore-index 255)' in said
    result = isthmus("line", *PAIR, "--data", "tagger:text", "--loss", "mse", "--ignore-index", "255")
    assert result.code == 2
    assert "--ignore-index is an option of cross-entropy, found --loss mse" in " ".join(result.err.split())


@pytest.mark.parametrize("options", [(), ("--batch-size", "4"), ("--batch-size", "100")])
def test_a_limit_holds_for_data_without_an_end(isthmus: Cli, own: Any, options: tuple[str, ...]) -> None:
    result = isthmus("line", *PAIR, "--data", "tagger:endless", "--limit", "12", *options)
    assert result.code == 0, result.err
    found = result.json["curves"]["data"]
    assert found["examples"] == 12
    source = own.endless()
    first: list[tuple[Tensor, Tensor]] = [next(source) for _ in range(3)]
    whole = (torch.cat([x for x, _ in first])[:12], torch.cat([y for _, y in first])[:12])
    assert found["loss"] == pytest.approx(wanted(own, [whole], -100), rel=1e-6)


def test_folders_of_causal_models_are_scored_as_they_were_trained(
    isthmus: Cli, own: Any, tmp_path: Path
) -> None:
    transformers = pytest.importorskip("transformers")
    config = {"n_embd": 16, "n_layer": 1, "n_head": 2, "vocab_size": 40, "n_positions": 16}
    models = []
    for seed, name in enumerate("ab"):
        torch.manual_seed(seed)
        model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**config)).eval()
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        model.save_pretrained(tmp_path / name)
        models.append(model)
    result = isthmus("line", "a", "b", "--data", "tagger:tokens", "--points", "3", "--out", "line", "--json")
    assert result.code == 0, result.err
    middle = transformers.GPT2LMHeadModel(transformers.GPT2Config(**config)).eval()
    middle.load_state_dict(interpolate(models[0], models[1], 0.5))
    data = own.tokens()
    counts = [int((batch["labels"][:, 1:] != -100).sum()) for batch in data]
    for model, loss in zip(
        (models[0], middle, models[1]), result.json["curves"]["data"]["loss"], strict=True
    ):
        with torch.no_grad():
            own_losses = [float(model(**batch).loss) for batch in data]
        mean = sum(n * v for n, v in zip(counts, own_losses, strict=True)) / sum(counts)
        assert loss == pytest.approx(mean, rel=1e-5)
    assert result.json["settings"]["loss"] == "model (next tokens)"
    assert result.json["unit"] == "nats per token"
