"""From what a user types to batches: a data set's name, or ``package.module:function``."""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from isthmus.batches import Batches, first_batch, reusable
from isthmus.errors import DataError, IsthmusError
from isthmus.streams import guarded, limited
from isthmus.training._dataset import Dataset, to_batches
from isthmus.training._datasets import DATASETS, SPLITS, load_dataset
from isthmus.training._fetch import OnProgress
from isthmus.training._normalise import Normalise, read_normalise

__all__ = ["resolve_data"]

DATASET_BATCH = 500
"""Examples per batch of a data set, unless told."""


def resolve_data(
    spec: str,
    data_dir: str | Path | None = None,
    *,
    batch_size: int | None = None,
    limit: int | None = None,
    seed: int = 0,
    device: torch.device | str | None = None,
    normalise: Normalise | None = None,
    on_progress: OnProgress | None = None,
) -> dict[str, Batches]:
    """Return named batches for a data set's name or for a function given as ``package.module:function``.

    Args:
        spec: one of :data:`~isthmus.study.DATASETS`, which gives ``"train"`` and ``"test"``; or a function
            without arguments that returns an iterable of batches (given the name ``"data"``), a mapping from
            name to iterable, or :class:`~isthmus.study.Dataset` objects in their place. What can be read only once
            is read into a list, up to ``limit``.
        data_dir: folder of a named data set (see :func:`~isthmus.study.load_dataset`).
        batch_size: examples per batch. By default 500 for a data set; batches of a function stay as they are (see
            :func:`isthmus.streams.limited`).
        limit: use only so many examples of each split. Of a data set they are drawn at random, by ``seed``. Of a
            function's batches they are the first in the order in which they come: nothing is drawn, reading stops
            there, and they are kept, so that every later pass sees the same ones also if the function's loader
            shuffles.
        seed: of the order of a data set.
        device: where the batches of a data set are put.
        normalise: what the inputs of a data set are shifted and scaled by (see :func:`load_dataset`); by default they
            lie in [0, 1]. A function returns its inputs as the network wants them.
        on_progress: told how far a download is.

    Returns:
        From name to batches that can be iterated any number of times.

    Raises:
        DataError: an unknown name, a function that cannot be imported or fails, or data that are empty or
            not batches (see :mod:`isthmus.batches`).
    """

    def batches_of(value: Any, name: str) -> Batches:
        if isinstance(value, Dataset):
            size = DATASET_BATCH if batch_size is None else batch_size
            return to_batches(value, size, limit=limit, seed=seed, device=device)
        if isinstance(value, str) or not isinstance(value, Iterable):
            raise DataError(
                f"{spec}: expected an iterable of batches for {name!r}, found {type(value).__name__}. "
                "Return a list, a DataLoader, a generator or a Dataset."
            )
        where = f"{spec} ({name})"
        read = guarded(value, where) if isinstance(value, Iterator) else value
        many = reusable(limited(read, limit=limit, batch_size=batch_size))
        first_batch(guarded(many, where), where)
        return many

    if ":" not in spec:
        if spec not in DATASETS:
            raise DataError(
                f"Unknown data {spec!r}. Choose one of {', '.join(DATASETS)}, "
                "or give package.module:function."
            )
        found = {
            s: load_dataset(spec, data_dir, split=s, normalise=normalise, on_progress=on_progress)
            for s in SPLITS
        }
    else:
        if read_normalise(normalise) is not None:
            raise DataError(
                f"{spec}: normalise is for data sets by name ({', '.join(DATASETS)}); let the function return its "
                "inputs normalised."
            )
        found = _call(spec)
    if isinstance(found, Mapping):
        if not found:
            raise DataError(f"{spec}: returned an empty mapping. Return at least one named set of batches.")
        return {str(name): batches_of(value, str(name)) for name, value in found.items()}
    return {"data": batches_of(found, "data")}


def _call(spec: str) -> Any:
    module_name, _, function_name = spec.partition(":")
    if module_name.endswith(".py"):
        raise DataError(
            f"{spec}: expected package.module:function, found a file's name. Write "
            f"{Path(module_name).stem}:{function_name}, from the folder in which {Path(module_name).name} lies."
        )
    try:
        module = importlib.import_module(module_name)
    except (ImportError, ValueError) as error:
        raise DataError(
            f"{spec}: cannot import {module_name!r}: {error}. Is it installed, or its folder on PYTHONPATH?"
        ) from error
    except (Exception, SystemExit) as error:  # anything user code raises
        raise DataError(
            f"{spec}: importing {module_name} failed with {type(error).__name__}: {error}."
        ) from error
    function = getattr(module, function_name, None)
    if not callable(function):
        raise DataError(f"{spec}: {module_name!r} has no function {function_name!r}.")
    try:
        return function()
    except IsthmusError:
        raise
    except (Exception, SystemExit) as error:  # anything user code raises
        raise DataError(
            f"{spec}: the function failed: {type(error).__name__}: {error}. It is called without arguments."
        ) from error
