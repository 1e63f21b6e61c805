"""The demo: train two networks from different seeds on a named data set and compare them by every method."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from isthmus.errors import ModelError
from isthmus.matching import OnStage, symmetry_named
from isthmus.study._compare import Comparison, compare
from isthmus.training import (
    Dataset,
    EpochRecord,
    OnProgress,
    TrainSettings,
    derive_seed,
    load_dataset,
    network_for,
    to_batches,
    train,
)

__all__ = ["DemoResult", "DemoSettings", "run_demo"]

_EPOCHS = {"digits": 20}
_BATCH = {"digits": 64}
OnEpoch = Callable[[str, EpochRecord, int], Any]


@dataclass(frozen=True)
class DemoSettings:
    """What the demo does.

    Attributes:
        data: name of a data set.
        family: network family (see :data:`isthmus.study.FAMILIES`).
        width: units per hidden layer (``mlp``) or channel multiplier.
        depth: hidden layers of the ``mlp``.
        epochs: passes over the training data; ``None``: 20 for digits, 10 otherwise.
        learning_rate: of SGD with momentum 0.9, warm-up and cosine decay.
        batch_size: ``None``: 64 for digits, 500 otherwise.
        statistics: training examples on which methods compare activations.
        points: positions on each line.
        seed: of the pair; everything random derives from it.
        symmetry: by what methods match besides permutations, as text (``"all"``); ``"permutations"`` for nothing more.
    """

    data: str = "digits"
    family: str = "mlp"
    width: float = 256
    depth: int = 3
    epochs: int | None = None
    learning_rate: float = 0.1
    batch_size: int | None = None
    statistics: int = 5000
    points: int = 11
    seed: int = 0
    symmetry: str = "permutations"

    def filled(self) -> DemoSettings:
        """Return the settings with the data set's defaults in place of ``None``."""
        return replace(
            self,
            epochs=_EPOCHS.get(self.data, 10) if self.epochs is None else self.epochs,
            batch_size=_BATCH.get(self.data, 500) if self.batch_size is None else self.batch_size,
        )


@dataclass(frozen=True, eq=False)
class DemoResult:
    """The trained networks and what was measured on them."""

    model_a: nn.Module
    model_b: nn.Module
    comparison: Comparison


def run_demo(
    settings: DemoSettings,
    data_dir: str | Path | None = None,
    *,
    on_epoch: OnEpoch | None = None,
    on_stage: OnStage | None = None,
    on_download: OnProgress | None = None,
) -> DemoResult:
    """Train two networks that differ in initial values and in the order of the data, and compare them.

    Args:
        settings: what to do.
        data_dir: folder of the data set, if it is not to be downloaded.
        on_epoch: called after each epoch with ``"A"`` or ``"B"``, its record, and the number of epochs.
        on_stage: called during the comparison (see :func:`isthmus.study.compare`).
        on_download: called during a download.

    Raises:
        DataError: the data cannot be had, or an unknown class of symmetries.
        ModelError: an unknown family, or one that does not fit the settings or the data.
        StudyError: the training diverged.
        IsthmusError: whatever the comparison raises.
    """
    used = settings.filled()
    more = () if used.symmetry == "permutations" else (symmetry_named(used.symmetry),)
    assert used.epochs is not None
    assert used.batch_size is not None
    if used.family == "mlp" and used.width != int(used.width):
        raise ModelError(
            f"The mlp's width is its units per hidden layer: expected a whole number, found {used.width:g}."
        )
    train_data = load_dataset(used.data, data_dir, split="train", on_progress=on_download)
    test_data = load_dataset(used.data, data_dir, split="test", on_progress=on_download)
    model_a, model_b = (_trained(used, name, train_data, on_epoch) for name in ("A", "B"))
    comparison = compare(
        model_a,
        model_b,
        to_batches(train_data, 1000, limit=used.statistics, seed=used.seed),
        {"train": to_batches(train_data, 2000, limit=10_000), "test": to_batches(test_data, 2000)},
        name=_describe(used, train_data),
        symmetries=("permutations", *more),
        settings={**_plain(used), "data_note": train_data.note, "data_digest": train_data.digest},
        points=used.points,
        headline="test",
        seed=used.seed,
        on_stage=on_stage,
    )
    return DemoResult(model_a, model_b, comparison)


def _plain(used: DemoSettings) -> dict[str, Any]:
    """Return the settings as they are recorded: what is asked for beside permutations only where something is."""
    return {k: v for k, v in asdict(used).items() if (k, v) != ("symmetry", "permutations")}


def _trained(used: DemoSettings, name: str, data: Dataset, on_epoch: OnEpoch | None) -> nn.Module:
    assert used.epochs is not None
    assert used.batch_size is not None
    epochs = used.epochs
    settings = TrainSettings(
        learning_rate=used.learning_rate,
        batch_size=used.batch_size,
        epochs=epochs,
        seed=derive_seed(used.seed, "network", name),
    )
    network = network_for(used.family, data, width=used.width, depth=used.depth)
    report = None if on_epoch is None else (lambda record: on_epoch(name, record, epochs))
    return train(network, data, settings, on_epoch=report).model.eval()


def _describe(used: DemoSettings, data: Dataset) -> str:
    if used.family != "mlp":
        return f"{used.family} (width {used.width:g}) on {data.name}"
    hidden = "-".join([str(int(used.width))] * used.depth)
    return f"MLP {data.values[0].numel()}-{hidden}-{len(data.classes)} on {data.name}"
