"""Write the tables of ``losses.md``: ``python docs/make_losses.py``.

Small random networks of transformers, one for each task, are evaluated on two batches; what they compute themselves,
``model(**batch).loss``, stands beside it. Nothing is downloaded and nothing random but the weights and inputs, which
are seeded. The tests read the same list.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from isthmus.checkpoints import atomic_path
from isthmus.evaluation import evaluate

os.environ.setdefault("HF_HUB_OFFLINE", "1")

PAGE = Path(__file__).parent / "losses.md"
VOCABULARY, LENGTH, EXAMPLES = 40, 9, 6

WIDE = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 24}
TEXT = {**WIDE, "vocab_size": VOCABULARY, "max_position_embeddings": 32, "pad_token_id": 0}
IMAGE = {"image_size": 16, "patch_size": 4, "num_channels": 3}
GPT2 = {"n_embd": 16, "n_layer": 2, "n_head": 4, "vocab_size": VOCABULARY, "n_positions": 32}
T5 = {
    "d_model": 16,
    "d_kv": 4,
    "d_ff": 24,
    "num_layers": 2,
    "num_heads": 4,
    "vocab_size": VOCABULARY,
    "decoder_start_token_id": 0,
}
BART = {
    **{
        f"{part}_{what}": n
        for part in ("encoder", "decoder")
        for what, n in (("layers", 2), ("attention_heads", 4), ("ffn_dim", 24))
    },
    **{"d_model": 16, "vocab_size": VOCABULARY, "max_position_embeddings": 32, "forced_eos_token_id": None},
    **{"pad_token_id": 1, "eos_token_id": 2, "bos_token_id": 0, "decoder_start_token_id": 2},
}
CLIP = {"text_config": {**TEXT, "eos_token_id": 2}, "vision_config": {**WIDE, **IMAGE}}
SEGFORMER = {
    **{"hidden_sizes": [8, 16], "depths": [1, 1], "num_encoder_blocks": 2, "num_attention_heads": [2, 4]},
    **{"sr_ratios": [2, 1], "patch_sizes": [3, 3], "strides": [2, 2], "mlp_ratios": [2, 2]},
    **{"decoder_hidden_size": 16, "num_labels": 5},
}
WHISPER = {**BART, "num_mel_bins": 8, "max_source_positions": 20, "max_target_positions": 16}


@dataclass(frozen=True)
class Task:
    """A network and the kind of its batches.

    Attributes:
        title: as in the table.
        config: class of the configuration, and its settings.
        network: class of the network.
        data: names of functions below that add entries to a batch.
        convention: what is expected to be found.
    """

    title: str
    config: tuple[str, dict[str, Any]]
    network: str
    data: tuple[str, ...]
    convention: str


TASKS = (
    Task(
        "causal language model",
        ("GPT2Config", GPT2),
        "GPT2LMHeadModel",
        ("text", "own_tokens"),
        "next tokens",
    ),
    Task(
        "the same, grouped heads",
        ("LlamaConfig", {**TEXT, "num_key_value_heads": 2}),
        "LlamaForCausalLM",
        ("text", "padded_tokens"),
        "next tokens",
    ),
    Task(
        "masked language model", ("BertConfig", TEXT), "BertForMaskedLM", ("text", "masked_tokens"), "labels"
    ),
    Task(
        "sequence to sequence",
        ("T5Config", T5),
        "T5ForConditionalGeneration",
        ("text", "padded_tokens"),
        "labels",
    ),
    Task(
        "the same, shifted by another rule",
        ("BartConfig", BART),
        "BartForConditionalGeneration",
        ("text", "padded_tokens"),
        "labels",
    ),
    Task(
        "speech to text",
        ("WhisperConfig", WHISPER),
        "WhisperForConditionalGeneration",
        ("sound", "padded_tokens"),
        "labels",
    ),
    Task(
        "classification of text",
        ("BertConfig", {**TEXT, "num_labels": 3}),
        "BertForSequenceClassification",
        ("text", "classes"),
        "labels",
    ),
    Task(
        "several labels",
        ("BertConfig", {**TEXT, "num_labels": 3, "problem_type": "multi_label_classification"}),
        "BertForSequenceClassification",
        ("text", "yes_or_no"),
        "yes-or-no labels",
    ),
    Task(
        "several labels, told by their type",
        ("BertConfig", {**TEXT, "num_labels": 3}),
        "BertForSequenceClassification",
        ("text", "yes_or_no"),
        "yes-or-no labels",
    ),
    Task(
        "regression",
        ("BertConfig", {**TEXT, "num_labels": 1}),
        "BertForSequenceClassification",
        ("text", "number"),
        "squared error",
    ),
    Task(
        "regression of several numbers",
        ("BertConfig", {**TEXT, "num_labels": 3, "problem_type": "regression"}),
        "BertForSequenceClassification",
        ("text", "numbers"),
        "squared error",
    ),
    Task(
        "token classification",
        ("BertConfig", {**TEXT, "num_labels": 3}),
        "BertForTokenClassification",
        ("text", "token_classes"),
        "labels",
    ),
    Task("question answering", ("BertConfig", TEXT), "BertForQuestionAnswering", ("text", "span"), "spans"),
    Task("multiple choice", ("BertConfig", TEXT), "BertForMultipleChoice", ("choices",), "labels"),
    Task(
        "image classification",
        ("ViTConfig", {**WIDE, **IMAGE, "num_labels": 3}),
        "ViTForImageClassification",
        ("image", "classes"),
        "labels",
    ),
    Task(
        "segmentation",
        ("SegformerConfig", SEGFORMER),
        "SegformerForSemanticSegmentation",
        ("image", "pixel_classes"),
        "pixels, 255 ignored",
    ),
    Task(
        "masked image",
        ("ViTConfig", {**WIDE, **IMAGE, "encoder_stride": 4}),
        "ViTForMaskedImageModeling",
        ("image", "patches"),
        "masked pixels",
    ),
    Task(
        "image and text, softmax",
        ("CLIPConfig", {**CLIP, "projection_dim": 12}),
        "CLIPModel",
        ("text", "image"),
        "pairs in the batch",
    ),
    Task(
        "image and text, sigmoid",
        ("SiglipConfig", CLIP),
        "SiglipModel",
        ("text", "image"),
        "pairs one by one",
    ),
    Task(
        "two heads at once",
        ("BertConfig", TEXT),
        "BertForPreTraining",
        ("text", "masked_tokens", "next_sentence"),
        "by batch",
    ),
    Task(
        "object detection",
        (
            "YolosConfig",
            {**WIDE, "image_size": [16, 16], "patch_size": 4, "num_detection_tokens": 3, "num_labels": 3},
        ),
        "YolosForObjectDetection",
        ("image", "boxes"),
        "by batch",
    ),
    Task(
        "transcription without alignment",
        (
            "Wav2Vec2Config",
            {
                **WIDE,
                "vocab_size": 12,
                "conv_dim": [8, 8],
                "conv_kernel": [10, 3],
                "conv_stride": [5, 2],
                "num_feat_extract_layers": 2,
                "num_conv_pos_embeddings": 4,
                "num_conv_pos_embedding_groups": 2,
                "pad_token_id": 0,
            },
        ),
        "Wav2Vec2ForCTC",
        ("wave", "letters"),
        "by batch",
    ),
)


def network(task: Task, seed: int = 0) -> Any:
    """Build a network with random weights, larger than at the start of training so that predictions differ."""
    import transformers

    transformers.logging.set_verbosity_error()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = getattr(transformers, task.network)(getattr(transformers, task.config[0])(**task.config[1]))
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and not name.endswith("logit_scale"):
                torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def batches(task: Task, seed: int = 0) -> list[dict[str, Any]]:
    """Return two batches, the second smaller and with fewer labels that count."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for size in (EXAMPLES, EXAMPLES - 2):
        batch: dict[str, Any] = {}
        for name in task.data:
            batch.update(globals()[name](size, generator, batch))
        found.append(batch)
    return found


def own_loss(model: Any, task: Task, batch: dict[str, Any]) -> float:
    """Return what the network computes itself."""
    more = {"return_loss": True} if "pairs" in task.convention else {}
    with torch.no_grad():
        return float(model(**batch, **more).loss)


def text(size: int, generator: torch.Generator, batch: dict[str, Any]) -> dict[str, Any]:
    """Tokens, some of them masked."""
    tokens = torch.randint(3, VOCABULARY, (size, LENGTH), generator=generator)
    mask = torch.ones(size, LENGTH, dtype=torch.int64)
    mask[size // 2 :, -3:] = 0
    return {"input_ids": tokens, "attention_mask": mask}


def own_tokens(size: int, generator: torch.Generator, batch: dict[str, Any]) -> dict[str, Any]:
    """The tokens themselves as labels."""
    return {"labels": batch["input_ids"].clone()}


def padded_tokens(size: int, generator: torch.Generator, batch: dict[str, Any]) -> dict[str, Any]:
    """Tokens as labels, the end of some ignored."""
    tokens = batch.get("input_ids")
    if tokens is None:
        tokens = torch.randint(3, VOCABULARY, (size, LENGTH), generator=generator)
    labels = tokens.clone()
    labels[size // 2 :, -3:] = -100
    return {"labels": labels}


def masked_tokens(size: int, generator: torch.Generator, batch: dict[str, Any]) -> dict[str, Any]:
    """Labels of some tokens only."""
    kept = torch.rand(size, LENGTH, generator=generator) < 0.3
    kept[0, 0] = True
    return {"labels": batch["input_ids"].where(kept, -100)}


def classes(size: int, generator: torch.Generator, batch: dict[str, Any]) -> dict[str, Any]:
    """A class for each example."""
    return {"labels": torch.randint(3, (size,), generator=generator)}


def yes_or_no(size: int, generator: torch.Generator, batch: dict[str, Any]) -> dict[str, Any]:
    """Three answers for each example."""
    return {"labels": torch.randint(2, (size, 3), generator=generator).float()}


def number(size: int, generator: torch.Generator, batch: dict[str, Any]) -> dict[str, Any]:
    """A number for each example."""
    return {"labels": torch.randn(size, generator=generator)}


def numbers(size: int, generator: torch.Generator, batch: dict[str, Any]) -> dict[str, Any]:
    """Three numbers for each example."""
    return {"labels": torch.randn(size, 3, generator=generator)}


def token_classes(size: int, generator: torch.Generator, batch: dict[str, Any]) -> dict[str, Any]:
    """A class for each token that is not masked."""
    labels = torch.randint(3, (size, LENGTH), generator=generator)
    return {"labels": labels.where(batch["attention_mask"] == 1, -100)}


def span(size: int, generator: torch.Generator, batch: dict[str, Any]) -> dict[str, Any]:
    """Start and end of an answer, the last one behind the text."""
    start = torch.randint(LENGTH - 3, (size,), generator=generator)
    end = start + torch.randint(3, (size,), generator=generator)
    start[-1] = end[-1] = LENGTH + 5  # an answer behind the text, which does not count
    return {"start_positions": start, "end_positions": end}


def choices(size: int, generator: torch.Generator, batch: dict[str, Any]) -> dict[str, Any]:
    """Three texts for each example, and the right one."""
    tokens = torch.randint(3, VOCABULARY, (size, 3, LENGTH), generator=generator)
    return {"input_ids": tokens, "labels": torch.randint(3, (size,), generator=generator)}


def next_sentence(size: int, generator: torch.Generator, batch: dict[str, Any]) -> dict[str, Any]:
    """Whether one text follows another."""
    return {"next_sentence_label": torch.randint(2, (size,), generator=generator)}


def image(size: int, generator: torch.Generator, batch: dict[str, Any]) -> dict[str, Any]:
    """Pictures."""
    return {"pixel_values": torch.randn(size, 3, 16, 16, generator=generator)}


def pixel_classes(size: int, generator: torch.Generator, batch: dict[str, Any]) -> dict[str, Any]:
    """A class for each pixel, some of them ignored."""
    labels = torch.randint(5, (size, 16, 16), generator=generator)
    labels[:, :, :size] = 255
    return {"labels": labels}


def patches(size: int, generator: torch.Generator, batch: dict[str, Any]) -> dict[str, Any]:
    """Which patches are hidden."""
    return {"bool_masked_pos": torch.rand(size, 16, generator=generator) < 0.1 * size}


def boxes(size: int, generator: torch.Generator, batch: dict[str, Any]) -> dict[str, Any]:
    """Two objects in each picture."""

    def one() -> dict[str, Tensor]:
        place = 0.3 + 0.4 * torch.rand(2, 4, generator=generator)
        return {"class_labels": torch.randint(3, (2,), generator=generator), "boxes": place}

    return {"labels": [one() for _ in range(size)]}


def sound(size: int, generator: torch.Generator, batch: dict[str, Any]) -> dict[str, Any]:
    """Spectra."""
    return {"input_features": torch.randn(size, 8, 40, generator=generator)}


def wave(size: int, generator: torch.Generator, batch: dict[str, Any]) -> dict[str, Any]:
    """Waves."""
    return {"input_values": torch.randn(size, 400, generator=generator)}


def letters(size: int, generator: torch.Generator, batch: dict[str, Any]) -> dict[str, Any]:
    """Letters of a transcription."""
    return {"labels": torch.randint(1, 12, (size, 5), generator=generator)}


def rows() -> Iterator[tuple[str, ...]]:
    """Yield what was measured for each task."""
    import warnings

    for task in TASKS:
        model = network(task)
        for batch in batches(task)[:1]:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # the note of losses taken by batch
                found = evaluate(model, [batch])
            own = own_loss(model, task, batch)
            accuracy = "" if found.accuracy is None else f"{found.accuracy:.1%}"
            yield (
                task.title,
                f"`{task.network}`",
                task.convention,
                f"{found.loss:.6f}",
                f"{own:.6f}",
                f"{abs(found.loss - own):.0e}",
                found.unit,
                accuracy,
            )


def table() -> str:
    """Return the table."""
    head = ("task", "network", "scored by", "ours", "`model(**batch).loss`", "difference", "unit", "right")
    lines = [f"| {' | '.join(row)} |" for row in (head, ("---",) * len(head), *rows())]
    return "\n".join(lines)


def main() -> None:
    """Replace the table of the page."""
    page = PAGE.read_text(encoding="utf-8")
    new = re.sub(
        "<!-- begin tasks -->.*?<!-- end tasks -->",
        lambda _: f"<!-- begin tasks -->\n{table()}\n<!-- end tasks -->",
        page,
        flags=re.DOTALL,
    )
    with atomic_path(PAGE) as temporary:
        temporary.write_text(new, encoding="utf-8")


if __name__ == "__main__":
    main()
