"""Networks of transformers are scored by the loss that they compute themselves."""

from __future__ import annotations

import copy
import importlib.util
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from isthmus import line
from isthmus.batches import as_batch
from isthmus.errors import DataError, IsthmusWarning, ModelError
from isthmus.evaluation import bind, evaluate
from isthmus.losses import completed, completed_batches, configs_kept, scorer_for
from isthmus.matching import align

transformers = pytest.importorskip("transformers")


def load_tasks() -> Any:
    path = Path(__file__).parents[2] / "docs" / "make_losses.py"
    spec = importlib.util.spec_from_file_location("make_losses", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


tasks = load_tasks()
BY_TITLE = {task.title: task for task in tasks.TASKS}


def scorer(model: nn.Module, batch: Any, loss: Any = None) -> Any:
    with configs_kept(model):
        return scorer_for(
            loss, model, completed(model, as_batch(batch)), bind(model, read=lambda output: output)
        )


@pytest.mark.parametrize("title", BY_TITLE)
def test_our_loss_is_the_networks_own(title: str) -> None:
    task = BY_TITLE[title]
    model, data = tasks.network(task), tasks.batches(task)
    config = copy.deepcopy(model.config.to_dict())
    by_batch = task.convention == "by batch"
    with warnings.catch_warnings():
        if by_batch:
            warnings.simplefilter("ignore", IsthmusWarning)
        assert scorer(model, data[0]).name == f"model ({task.convention})"
        assert model.config.to_dict() == config
        own = [tasks.own_loss(model, task, batch) for batch in data]
        model.config.problem_type = config.get("problem_type")
        each = [evaluate(model, [batch]) for batch in data]
        both = evaluate(model, data)
    assert [e.loss for e in each] == pytest.approx(own, abs=1e-6, rel=1e-6)
    assert model.config.to_dict() == config
    assert both.examples == 2 * tasks.EXAMPLES - 2
    assert (both.notes == ()) == (not by_batch)
    if title == "classification of text":  # the mean over all labels, whatever batch they are in
        assert both.loss == pytest.approx((6 * own[0] + 4 * own[1]) / 10, rel=1e-6)


def test_tokens_count_alike_in_every_batch() -> None:
    task = BY_TITLE["causal language model"]
    model, data = tasks.network(task), tasks.batches(task)
    data[0]["labels"][0, :6] = -100
    data[1]["labels"][1:] = -100
    counts = [int((batch["labels"][:, 1:] != -100).sum()) for batch in data]
    own = [tasks.own_loss(model, task, batch) for batch in data]
    found = evaluate(model, data)
    assert counts[0] != counts[1]
    assert found.loss == pytest.approx(
        sum(n * v for n, v in zip(counts, own, strict=True)) / sum(counts), rel=1e-6
    )
    assert found.perplexity == pytest.approx(float(torch.tensor(found.loss).exp()), rel=1e-6)
    assert found.unit == "nats per token"
    logits = torch.cat(
        [model(b["input_ids"], attention_mask=b["attention_mask"]).logits[:, :-1].argmax(-1) for b in data]
    )
    wanted = torch.cat([b["labels"][:, 1:] for b in data])
    assert found.accuracy == pytest.approx(float((logits == wanted)[wanted != -100].double().mean()))


def test_accuracies_follow_the_convention() -> None:
    several, question, pairs = (
        BY_TITLE[t] for t in ("several labels", "question answering", "image and text, softmax")
    )
    with torch.no_grad():
        model, batch = tasks.network(several), tasks.batches(several)[0]
        right = (model(**batch).logits > 0) == (batch["labels"] > 0.5)
        assert evaluate(model, [batch]).accuracy == pytest.approx(float(right.double().mean()))
        model, batch = tasks.network(question), tasks.batches(question)[0]
        output = model(**batch)
        batch["start_positions"][:3] = output.start_logits.argmax(-1)[:3]
        batch["end_positions"][:2] = output.end_logits.argmax(-1)[:2]
        assert evaluate(model, [batch]).accuracy == pytest.approx(
            2 / 5
        )  # of six, one answer lies behind the text
        model, batch = tasks.network(pairs), tasks.batches(pairs)[0]
        logits = model(**batch).logits_per_text
        own = torch.arange(len(logits))
        share = ((logits.argmax(0) == own).double().mean() + (logits.argmax(1) == own).double().mean()) / 2
        assert evaluate(model, [batch]).accuracy == pytest.approx(float(share))


@pytest.mark.parametrize("ignored", ["padding", "pixels"])
def test_labels_that_a_network_ignores_by_its_own_rule(ignored: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if ignored == "padding":
        task = BY_TITLE["causal language model"]
        model = tasks.network(task)
        model.config.pad_token_id = 7

        def loss(logits: Tensor, labels: Tensor, vocab_size: int, **more: Any) -> Tensor:
            return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=7)

        monkeypatch.setattr(type(model), "loss_function", property(lambda self: loss))
        data = tasks.batches(task)[:1]
        data[0]["labels"][data[0]["labels"] == 7] = 8  # nothing is ignored in the first batch
        second = {k: v.clone() for k, v in data[0].items()}
        second["labels"][:, 5:] = 7
        data.append(second)
        assert scorer(model, data[0]).name == "model (next tokens, 7 ignored)"
    else:
        task = BY_TITLE["segmentation"]
        model = tasks.network(task)
        model.config.semantic_loss_ignore_index = 4
        data = tasks.batches(task)
        for batch in data:
            batch["labels"][batch["labels"] == 255] = 4
        assert scorer(model, data[0]).name == "model (pixels, 4 ignored)"
    for batch in data:
        assert evaluate(model, [batch]).loss == pytest.approx(tasks.own_loss(model, task, batch), abs=1e-6)


def test_a_loss_that_turns_out_to_be_another_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    task = BY_TITLE["causal language model"]
    model, (batch, _) = tasks.network(task), tasks.batches(task)

    def loss(logits: Tensor, labels: Tensor, vocab_size: int, **more: Any) -> Tensor:
        plain = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return plain * (2.0 if int(labels[0, 0]) == 11 else 1.0)

    monkeypatch.setattr(type(model), "loss_function", property(lambda self: loss))
    batch["labels"][0, 0] = 12
    other = {k: v.clone() for k, v in batch.items()}
    other["labels"][0, 0] = 11
    with pytest.raises(ModelError, match=r"own loss of a batch is .*\(next tokens\) gives .*by=\"batch\""):
        evaluate(model, [batch, other])
    with pytest.warns(IsthmusWarning, match="GPT2LMHeadModel's own, one number for each batch"):
        found = evaluate(model, [batch, other], loss='model(by="batch")')
    assert found.loss == pytest.approx(1.5 * evaluate(model, [batch]).loss, rel=1e-6)
    assert found.accuracy is None


def test_pairs_of_tokens_and_targets() -> None:
    task = BY_TITLE["causal language model"]
    model = tasks.network(task)
    tokens = tasks.batches(task)[0]["input_ids"]
    own = float(model(tokens, labels=tokens).loss.detach())
    assert evaluate(model, [(tokens, tokens)]).loss == pytest.approx(own, abs=1e-6)
    assert evaluate(model, [({"input_ids": tokens}, tokens)]).loss == pytest.approx(own, abs=1e-6)
    shifted = evaluate(model, [(tokens[:, :-1], tokens[:, 1:])])
    assert shifted.loss == pytest.approx(own, abs=1e-6)
    padded = tokens[:, 1:].clone()
    padded[:, -3:] = -100
    assert scorer(model, (tokens[:, :-1], padded)).name == "cross_entropy"
    constant = torch.full_like(tokens, 5)
    assert scorer(model, (constant, constant)).name.startswith("model")


def test_an_explicit_loss_is_taken_at_its_word() -> None:
    task = BY_TITLE["causal language model"]
    model, batch = tasks.network(task), tasks.batches(task)[0]
    logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    wanted = F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten())
    with pytest.warns(IsthmusWarning, match="The targets are the input tokens themselves"):
        found = evaluate(model, [batch], loss="cross_entropy")
    assert found.loss == pytest.approx(float(wanted.detach()), rel=1e-6)


def test_what_has_no_loss_is_refused() -> None:
    bert = transformers.BertModel(transformers.BertConfig(**tasks.TEXT)).eval()
    batch = tasks.batches(BY_TITLE["masked language model"])[0]
    with pytest.raises(
        ModelError, match=r"BertModel computes no loss from the labels of these batches.*pass loss="
    ):
        evaluate(bert, [batch])
    model = tasks.network(BY_TITLE["masked language model"])
    del batch["labels"]
    with pytest.raises(ModelError, match="computes no loss from these batches, which have no labels"):
        evaluate(model, [batch])
    classifier = tasks.network(BY_TITLE["classification of text"])
    with pytest.raises(ModelError, match=r"failed with .*Without loss= the network computes its own"):
        evaluate(classifier, [{**batch, "labels": torch.zeros(tasks.EXAMPLES, 2, dtype=torch.int64)}])
    with pytest.raises(
        ModelError, match=r"Linear was to compute its own loss, as loss='model' means, but returned none"
    ):
        evaluate(nn.Linear(2, 2), [(torch.ones(1, 2), torch.tensor([0]))], loss="model")
    with pytest.raises(DataError, match=r"expected by=\"example\" or by=\"batch\""):
        evaluate(model, [batch], loss='model(by="token")')
    with pytest.raises(DataError, match=r"Unknown loss of type int: expected .*a loss of torch\.nn"):
        evaluate(model, [batch], loss=3)  # type: ignore[arg-type]
    with pytest.raises(DataError, match="has no option 'of'"):
        evaluate(model, [batch], loss="model(of=1)")


class Own(nn.Module):
    """A network of anyone's that computes its loss from labels."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 4)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Any]:
        logits = self.linear(x)
        return {"logits": logits, "loss": None if labels is None else 2 * F.cross_entropy(logits, labels)}


def test_any_network_with_a_loss_can_be_asked_for_it() -> None:
    torch.manual_seed(0)
    model, x, y = Own().eval(), torch.randn(5, 3), torch.arange(5) % 4
    plain = evaluate(model, [{"x": x, "labels": y}])
    with pytest.warns(IsthmusWarning, match="Own's own, one number for each batch"):
        own = evaluate(model, [{"x": x, "labels": y}], loss="model")
    assert own.loss == pytest.approx(2 * plain.loss, rel=1e-6)
    assert own.unit == "the model's own loss"


def test_every_label_ignored_is_a_mean_over_nothing() -> None:
    task = BY_TITLE["causal language model"]
    model, batch = tasks.network(task), tasks.batches(task)[0]
    first = {**batch, "labels": batch["labels"].clone()}
    batch["labels"][:] = -100
    assert evaluate(model, [first, batch]).loss == pytest.approx(evaluate(model, [first]).loss, rel=1e-6)
    with pytest.raises(DataError, match="The loss of the model is a mean over nothing"):
        evaluate(model, [batch], loss="cross_entropy")


@pytest.mark.parametrize(
    "title", ["causal language model", pytest.param("the same, grouped heads", marks=pytest.mark.slow)]
)
def test_language_models_are_aligned_on_batches_of_collators(title: str) -> None:
    """Their cache, which is on by default, is no output."""
    task = BY_TITLE[title]
    model, data = tasks.network(task), tasks.batches(task)
    found = align(model, tasks.network(task, seed=1), batches=data[:1], method="weights")
    assert found.verification_error is not None
    assert found.verification_error < 1e-6
    assert len(found.permutations) > 5


@pytest.mark.parametrize(
    "title", ["sequence to sequence", "the same, shifted by another rule", "speech to text"]
)
def test_encoder_decoders_read_what_their_labels_say(title: str) -> None:
    task = BY_TITLE[title]
    model, data = tasks.network(task), tasks.batches(task)
    made = completed(model, as_batch(data[0]))
    with torch.no_grad():
        given = model(**made.kwargs).logits
        own = model(**data[0]).logits
    torch.testing.assert_close(given, own, rtol=0, atol=0)
    assert completed(model, made) is made


@pytest.mark.parametrize(
    "title",
    ["sequence to sequence", pytest.param("the same, shifted by another rule", marks=pytest.mark.slow)],
)
def test_encoder_decoders_are_aligned_without_the_decoders_inputs(title: str) -> None:
    task = BY_TITLE[title]
    model, data = tasks.network(task), tasks.batches(task)
    found = align(model, tasks.network(task, seed=1), batches=data[:1], method="weights")
    assert found.verification_error is not None
    assert found.verification_error < 1e-6
    assert len(found.permutations) > 5


def test_other_networks_batches_are_left_alone() -> None:
    data = [tasks.batches(BY_TITLE["image classification"])[0]]
    assert completed_batches(nn.Linear(2, 2), data) is data
    vision = tasks.network(BY_TITLE["image classification"])
    (found,) = completed_batches(vision, data)
    assert set(as_batch(found).kwargs) == {"pixel_values"}
    bart = tasks.network(BY_TITLE["the same, shifted by another rule"])
    bart.config.pad_token_id = None
    batch = as_batch(tasks.batches(BY_TITLE["the same, shifted by another rule"])[0])
    assert "decoder_input_ids" not in completed(bart, batch).kwargs


class Wrapped(nn.Module):
    """What peft's networks look like from outside."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base

    def get_base_model(self) -> nn.Module:
        return self.base

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.base(*args, **kwargs)


def compiled(model: nn.Module) -> Any:
    return torch.compile(model, backend="eager")


@pytest.mark.parametrize("wrap", [Wrapped, nn.DataParallel, compiled, lambda m: Wrapped(nn.DataParallel(m))])
def test_wrappers_hide_no_convention(wrap: Any) -> None:
    task = BY_TITLE["causal language model"]
    model, data = tasks.network(task), tasks.batches(task)
    with torch.compiler.set_stance("force_eager"):
        assert scorer(wrap(model), data[0]).name == "model (next tokens)"
        assert evaluate(wrap(model), data) == evaluate(model, data)


class Causal(nn.Module):
    """A language model of anyone's: no loss of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(40, 4), nn.Linear(4, 40)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.head(self.embed(input_ids))


def test_targets_that_are_the_tokens_themselves_are_refused() -> None:
    model, tokens = Causal().eval(), torch.arange(24).reshape(4, 6)
    some = tokens.clone()
    some[:, 4:] = -100
    for batch in (
        {"input_ids": tokens, "labels": tokens},
        (tokens, tokens),
        {"input_ids": tokens, "labels": some},
    ):
        with pytest.raises(
            DataError, match=r"The targets are the network's own input tokens.*moved by one place"
        ):
            evaluate(model, [batch])
        assert evaluate(model, [batch], loss="cross_entropy").loss > 0
    assert evaluate(model, [(tokens[:, :-1], tokens[:, 1:])]).loss > 0
    zeros = torch.zeros(2, 3, dtype=torch.int64)
    assert evaluate(model, [(zeros, zeros)]).loss > 0


def test_cross_entropy_by_name_says_that_the_tokens_are_not_moved() -> None:
    task = BY_TITLE["causal language model"]
    model, batch = tasks.network(task), tasks.batches(task)[0]
    for loss in (
        "cross_entropy",
        "cross_entropy(ignore_index=0, label_smoothing=0.1)",
        nn.CrossEntropyLoss(),
    ):
        (note,) = scorer(model, batch, loss).notes
        assert "the input tokens themselves" in note
        assert "--loss model" in note
    moved = {**batch, "labels": batch["labels"].roll(-1, 1)}
    assert not scorer(model, moved, "cross_entropy").notes
    assert not scorer(model, batch).notes


@pytest.mark.parametrize(
    "title", ["question answering", "image and text, softmax", "image and text, sigmoid"]
)
def test_untrained_networks_of_transformers_are_near_chance(title: str) -> None:
    task = BY_TITLE[title]
    a, b = tasks.network(task, 0), tasks.network(task, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = line(a, b, tasks.batches(task), points=3, bootstrap=0)
    assert any("is near chance" in note for note in found.notes), found.notes


def test_a_network_of_tokens_and_labels_that_are_numbers_reads_no_values() -> None:
    task = BY_TITLE["regression"]
    model = tasks.network(task)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = line(model, model, tasks.batches(task), points=3, bootstrap=0)
    assert any("Do the tokens come from the tokenizer" in note for note in found.notes), found.notes
