"""Data sets by name: found in a folder in any of their published forms, or downloaded."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from isthmus.errors import DataError, MissingExtraError
from isthmus.training._archive import read_members
from isthmus.training._catalogue import IDX_PREFIX, SOURCES, DatasetSource
from isthmus.training._dataset import Dataset, Described, Outline
from isthmus.training._fetch import OnProgress, RemoteFile, fetch
from isthmus.training._formats import (
    Raw,
    read_bytes,
    read_cifar_binary,
    read_cifar_pickle,
    read_idx,
    read_parquet,
)
from isthmus.training._normalise import Normalise, read_normalise

__all__ = ["DATASETS", "SPLITS", "load_dataset", "outline"]

DATASETS: tuple[str, ...] = ("digits", *SOURCES)
"""Names that :func:`load_dataset` knows."""

SPLITS = ("train", "test")

_DIGITS_TRAIN = 1437
# Where the files lie inside a data set's folder: unpacked archives, torchvision's and Hugging Face's layouts.
_INSIDE = (
    "",
    "raw",
    "data",
    "plain_text",
    "cifar-10-batches-bin",
    "cifar-10-batches-py",
    "cifar-100-binary",
    "cifar-100-python",
)


def load_dataset(
    name: str,
    data_dir: str | Path | None = None,
    *,
    split: str = "train",
    normalise: Normalise | None = None,
    mirrors: Sequence[str] = (),
    on_progress: OnProgress | None = None,
) -> Dataset:
    """Load a split of a data set by name.

    ``digits`` comes with scikit-learn: 1,797 images of 8 × 8, in a fixed shuffled order, 1,437 to train and
    360 to test. ``mnist``, ``fashion-mnist``, ``cifar10`` and ``cifar100`` are read from ``data_dir`` if
    given, and otherwise from the user's cache folder, where missing files are downloaded.

    Args:
        name: one of :data:`DATASETS`.
        data_dir: a folder with the files, or with a folder of the data set's name; never written to. Accepted
            are the published files, zipped or not (IDX; CIFAR batches in binary or Python form, unpacked or
            still in their archive) and parquet files as Hugging Face ``datasets`` writes them.
        split: ``"train"`` or ``"test"``.
        normalise: what inputs, which lie in [0, 1] by default, are shifted and scaled by: ``"train"`` for mean and
            standard deviation of the training set, per channel, ``"imagenet"``, ``"symmetric"`` (to [-1, 1]),
            ``"MEAN/STD"`` or the numbers (see :func:`read_normalise`). Networks must be given inputs as in training.
        mirrors: further base addresses to download from, tried first.
        on_progress: told how far a download is: file name, bytes there, bytes expected.

    Returns:
        The data set. ``note`` tells when the files are not the published ones, or are lossy images.

    Raises:
        DataError: an unknown name or split, missing or damaged files, labels out of range, or no network
            (the message says which files to put where).
        MissingExtraError: a package of the ``study`` extra is missing.
    """
    chosen = read_normalise(normalise)
    found = _loaded(name, data_dir, split, mirrors, on_progress)
    if chosen == "train" and split != "train":
        return found.normalised(chosen, train=_loaded(name, data_dir, "train", mirrors, on_progress))
    return found if chosen is None else found.normalised(chosen)


def outline(name: str, split: str) -> Described:
    """Return what is known of a split without its files.

    Raises:
        DataError: an unknown name or split.
    """
    source = SOURCES.get(name)
    if source is None or split not in SPLITS:
        return load_dataset(name, split=split)
    shape = (source.channels, source.size, source.size)
    return Outline(name, source.classes, shape, source.examples[split])


def _loaded(
    name: str,
    data_dir: str | Path | None,
    split: str,
    mirrors: Sequence[str],
    on_progress: OnProgress | None,
) -> Dataset:
    if split not in SPLITS:
        raise DataError(f"Unknown split {split!r}. Choose 'train' or 'test'.")
    if name == "digits":
        return _digits(split)
    source = SOURCES.get(name)
    if source is None:
        raise DataError(f"Unknown data set {name!r}. Choose one of {', '.join(DATASETS)}.")
    if data_dir is None:
        return _download(source, split, tuple(mirrors), on_progress)
    root = Path(data_dir).expanduser()
    if not root.is_dir():
        raise DataError(f"{root}: no such folder. Give the folder that holds the files of {name}.")
    for folder in _candidates(root, source):
        found = _read_folder(source, split, folder)
        if found is not None:
            return found
    raise DataError(
        f"No files of {name} ({split}) in {root} nor in its folders {', '.join(source.folders)}. "
        f"Put there {_wanted(source, split)}, or a parquet file {split}.parquet."
    )


def _candidates(root: Path, source: DatasetSource) -> Iterator[Path]:
    for outer in (*source.folders, ""):
        for inner in _INSIDE:
            folder = root / outer / inner
            if folder.is_dir():
                yield folder


def _wanted(source: DatasetSource, split: str) -> str:
    return " or ".join(
        " and ".join(file.name for file in alternative) for alternative in source.remote[split]
    )


def _download(
    source: DatasetSource, split: str, mirrors: tuple[str, ...], on_progress: OnProgress | None
) -> Dataset:
    folder = _cache_folder() / source.name
    failures: list[str] = []
    for alternative in source.remote[split]:
        try:
            for file in alternative:
                fetch(replace(file, mirrors=mirrors + file.mirrors), folder, on_progress=on_progress)
        except DataError as error:
            failures.append(str(error))
            continue
        return _published(source, split, folder, alternative)
    raise DataError("\n".join(failures))


def _cache_folder() -> Path:
    try:
        import pooch
    except ImportError as error:
        raise MissingExtraError(
            'Downloading data sets needs pooch: pip install "isthmus[study]", or give a data folder.'
        ) from error
    return Path(pooch.os_cache("isthmus"))


def _published(source: DatasetSource, split: str, folder: Path, files: Sequence[RemoteFile]) -> Dataset:
    if source.kind == "idx":
        images, labels = (folder / file.name for file in files)
        return _idx_dataset(source, split, images, labels)
    archive = folder / files[0].name
    return _image_dataset(source, split, _read_archive(source, split, archive), "", archive)


# --- Reading a folder --------------------------------------------------------------------------------------


def _read_folder(source: DatasetSource, split: str, folder: Path) -> Dataset | None:
    """Return the split if the folder has it in some form, ``None`` if it has nothing of the kind."""
    if source.kind == "idx":
        images = _idx_file(folder, split, "images", 3)
        if images is not None:
            labels = _idx_file(folder, split, "labels", 1)
            if labels is None:
                raise DataError(f"{folder}: has {images.name} but not its labels. Put them beside it.")
            return _idx_dataset(source, split, images, labels)
    else:
        raw = _read_cifar_folder(source, split, folder)
        if raw is not None:
            return _image_dataset(source, split, raw, "", folder)
    found = [*folder.glob(f"{split}.parquet"), *folder.glob(f"{split}-*.parquet")]
    shards = sorted(path for path in found if path.is_file())
    if not shards:
        return None
    columns = ("fine_label", "label", "labels")
    raw, encoding = read_parquet(shards, source.channels, columns)
    note = "images from JPEG copies: slightly lossy" if encoding == "JPEG" else ""
    return _image_dataset(source, split, raw, note, shards[0])


def _idx_file(folder: Path, split: str, kind: str, dimensions: int) -> Path | None:
    stem = f"{IDX_PREFIX[split]}-{kind}"
    for separator in "-.":
        for suffix in ("", ".gz"):
            path = folder / f"{stem}{separator}idx{dimensions}-ubyte{suffix}"
            if path.is_file():
                return path
    return None


def _idx_dataset(source: DatasetSource, split: str, images: Path, labels: Path) -> Dataset:
    contents = {path: read_bytes(path) for path in (images, labels)}
    pixels = read_idx(contents[images], str(images), 3)
    numbers = read_idx(contents[labels], str(labels), 1)
    # MNIST and its kin share their file names, so only the content can tell them apart.
    prefix = IDX_PREFIX[split]
    found = {
        f"{prefix}-{kind}": hashlib.md5(content, usedforsecurity=False).hexdigest()
        for kind, content in zip(("images-idx3", "labels-idx1"), contents.values(), strict=True)
    }
    for other in SOURCES.values():
        if other is not source and found.items() <= dict(other.plain_md5).items():
            raise DataError(f"{images}: these are the files of {other.name}, not of {source.name}.")
    known = not source.plain_md5 or found.items() <= dict(source.plain_md5).items()
    note = "" if known else "not the published files: their checksums differ"
    return _image_dataset(source, split, (pixels[:, None], numbers.astype(np.int64)), note, images)


# Names of the batches of a split: binary form, Python form.
_CIFAR_BATCHES: dict[tuple[str, str], tuple[tuple[str, ...], tuple[str, ...]]] = {
    ("cifar10", "train"): (
        tuple(f"data_batch_{i}.bin" for i in range(1, 6)),
        tuple(f"data_batch_{i}" for i in range(1, 6)),
    ),
    ("cifar10", "test"): (("test_batch.bin",), ("test_batch",)),
    ("cifar100", "train"): (("train.bin",), ("train",)),
    ("cifar100", "test"): (("test.bin",), ("test",)),
}


def _read_cifar_folder(source: DatasetSource, split: str, folder: Path) -> Raw | None:
    for names, read in _cifar_readers(source, split):
        if (folder / names[0]).is_file():
            missing = [n for n in names if not (folder / n).is_file()]
            if missing:
                raise DataError(f"{folder}: has {names[0]} but not {', '.join(missing)}. Put it beside them.")
            return _join(read(read_bytes(folder / n), str(folder / n)) for n in names)
    for alternative in source.remote[split]:
        archive = folder / alternative[0].name
        if archive.is_file():
            return _read_archive(source, split, archive)
    return None


def _cifar_readers(
    source: DatasetSource, split: str
) -> Sequence[tuple[tuple[str, ...], Callable[[bytes, str], Raw]]]:
    binary, python = _CIFAR_BATCHES[source.name, split]
    label_bytes, label_key = (1, "labels") if source.name == "cifar10" else (2, "fine_labels")
    return (
        (binary, lambda content, name: read_cifar_binary(content, name, label_bytes)),
        (python, lambda content, name: read_cifar_pickle(content, name, label_key)),
    )


def _read_archive(source: DatasetSource, split: str, archive: Path) -> Raw:
    """Read the batches of a split straight from the published archive, without unpacking it."""
    wanted = {name for names, _ in _cifar_readers(source, split) for name in names}
    contents = read_members(archive, wanted)
    for names, read in _cifar_readers(source, split):
        if all(name in contents for name in names):
            return _join(read(contents[name], f"{archive}:{name}") for name in names)
    raise DataError(f"{archive}: does not hold the batches of {source.name} ({split}). Get it again.")


def _join(parts: Iterator[Raw]) -> Raw:
    pixels, labels = zip(*parts, strict=True)
    return np.concatenate(pixels), np.concatenate(labels)


def _image_dataset(source: DatasetSource, split: str, raw: Raw, note: str, where: Path) -> Dataset:
    pixels, labels = raw
    expected = (source.channels, source.size, source.size)
    if pixels.shape[1:] != expected:
        raise DataError(
            f"{where}: {source.name} {split}: expected images of {expected} (channels, height, width), "
            f"found {pixels.shape[1:]}. Are these the files of another data set?"
        )
    if len(pixels) != len(labels):
        raise DataError(
            f"{where}: {source.name} {split}: {len(pixels)} images but {len(labels)} labels. "
            "Get both files from the same place."
        )
    tensors = torch.tensor(pixels), torch.tensor(labels)
    try:
        return Dataset(source.name, split, *tensors, source.classes, 255.0, note=note)
    except DataError as error:
        raise DataError(f"{where}: {error}") from error


# --- Digits ------------------------------------------------------------------------------------------------


def _digits(split: str) -> Dataset:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise MissingExtraError(
            'The digits data set needs scikit-learn: pip install "isthmus[study]".'
        ) from error
    bunch: Any = load_digits()
    # Ordered by a digest of the position: shuffled, and the same on every machine and version.
    order = sorted(range(len(bunch.target)), key=lambda i: hashlib.sha256(f"digits {i}".encode()).digest())
    chosen = torch.tensor(order[:_DIGITS_TRAIN] if split == "train" else order[_DIGITS_TRAIN:])
    values = torch.tensor(bunch.images, dtype=torch.uint8)[:, None]
    labels = torch.tensor(bunch.target, dtype=torch.int64)
    return Dataset(
        "digits", split, values[chosen], labels[chosen], tuple("0123456789"), 16.0, examples=chosen
    )
